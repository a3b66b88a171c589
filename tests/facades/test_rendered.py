"""Rows that a facade keeps rendered: they never show what is no longer so, nor another row's."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
from daybook.facades.dreadnode.v1.credits_service_pb2 import (
    ListCreditTransactionsRequest,
    ListCreditTransactionsResponse,
)
from daybook.facades.nebulablock.v1.users_service_pb2 import GetCreditsHistoryRequest, GetCreditsHistoryResponse
from daybook.facades.paged.v1.statements_service_pb2 import (
    ListAccountTransactionsRequest,
    ListAccountTransactionsResponse,
)
from daybook.facades.spacebring.v1.transactions_service_pb2 import (
    CreditsTransaction,
    GetCreditsTransactionsRequest,
    GetCreditsTransactionsResponse,
)
from daybook.facades.spacebring.v1.transactions_service_pb2_grpc import TransactionsStub
from daybook.facades.teable.v1.billing_service_pb2 import GetSpaceCreditHistoryRequest, GetSpaceCreditHistoryResponse
from daybook.v1.account_pb2 import Account, Company, User
from daybook.v1.ledger_service_pb2 import RefundTransactionRequest, TransferCreditsRequest, UpdateAccountRequest
from daybook.v1.transaction_pb2 import Booking, EventTicket, Order, Transaction, Usage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

from server.app import FACADES
from server.facades import dreadnode, nebulablock, paged, spacebring, teable
from server.ledger.paging import Page, TransactionKey
from server.ledger.refunds import RefundTotal
from server.store.accounts import AccountStore
from server.store.transactions import TransactionRow
from server.transport import rendered
from server.transport.rendered import PAGE_ROWS_BYTES_MAX, ROW_BYTES_MAX, ROWS_CACHED_MAX, KeptPages, keep_rendered
from tests.support.callers import Client, Server
from tests.support.clock import Clock
from tests.support.statement_counter import statements

COMPANY = str(uuid.uuid5(uuid.NAMESPACE_URL, "daybook:test:company"))
KEPT: list[tuple[ModuleType, str]] = [
    *((facade, "_render") for facade in (dreadnode, nebulablock, paged, spacebring, teable)),
    (spacebring, "_render_company"),
]
"""The functions whose results are kept."""
REQUESTS: dict[str, tuple[Message, type[Message]]] = {
    "daybook.facades.teable.v1.Billing/GetSpaceCreditHistory": (
        GetSpaceCreditHistoryRequest(space_id=COMPANY, month="2024-10", take="100"),
        GetSpaceCreditHistoryResponse,
    ),
    "daybook.facades.nebulablock.v1.Users/GetCreditsHistory": (
        GetCreditsHistoryRequest(limit="100"),
        GetCreditsHistoryResponse,
    ),
    "daybook.facades.spacebring.v1.Transactions/GetCreditsTransactions": (
        GetCreditsTransactionsRequest(limit="100"),
        GetCreditsTransactionsResponse,
    ),
    "daybook.facades.dreadnode.v1.Credits/ListCreditTransactions": (
        ListCreditTransactionsRequest(org=COMPANY, limit="100"),
        ListCreditTransactionsResponse,
    ),
    "daybook.facades.paged.v1.Statements/ListAccountTransactions": (
        ListAccountTransactionsRequest(account=COMPANY, page_size="100"),
        ListAccountTransactionsResponse,
    ),
}

Pages = dict[str, list[Message]]


async def pages(client: Client, bound: Client, network: str) -> Pages:
    """The first page of every facade: that of the caller's hours by who is bound to the account."""
    found: Pages = {}
    for method, (request, answer) in REQUESTS.items():
        caller = bound if method.startswith(nebulablock.SERVICE) else client
        # A method that answers with one message looks no different on the wire.
        call: Any = caller.channel.unary_stream(f"/{method}")
        metadata = (*caller.metadata, (spacebring.NETWORK_HEADER, network))
        messages = call(request.SerializeToString(), metadata=metadata)
        found[method] = [answer.FromString(each) async for each in messages]
    return found


async def test_kept_rows_show_every_change(
    client: Client, server: Server, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever happens, a page of rows that are kept is the page that is rendered from nothing."""
    assert {method.partition("/")[0] for method in REQUESTS} == FACADES.keys()
    tenant_number = await server.book.credentials.tenant_number("house")
    assert tenant_number is not None
    network = str(uuid.uuid5(uuid.NAMESPACE_URL, "house"))
    await client.create_account(COMPANY, kind=Account.COMPANY, company=Company(title="Before", notes="Early"))
    await client.create_account("other")
    bound = await server.client(tenant_number, account_id=COMPANY)
    member = User(id=str(uuid.uuid4()), name="Member", surname="Of House", photo_uri="https://example.com/a.png")
    usage = Usage(model="example", input_tokens=3, cost_usd="0.25")
    metadata = Struct()
    metadata.update({"floor": 3})
    post = partial(client.post, COMPANY, labels={"company": COMPANY})

    async def update(**fields: Any) -> None:
        account = Account(name=f"accounts/{COMPANY}", company=Company(**fields))
        await client.ledger.UpdateAccount(UpdateAccountRequest(account=account), metadata=client.metadata)

    async def refund(amount: str) -> None:
        newest = next(each for each in reversed(await client.history(COMPANY)) if each.kind == Transaction.CHARGE)
        request = RefundTransactionRequest(name=newest.name, amount=amount)
        await client.ledger.RefundTransaction(request, metadata=client.metadata)

    async def transfer(source: str, destination: str) -> None:
        request = TransferCreditsRequest(
            name=f"accounts/{source}", destination=f"accounts/{destination}", amount="1", labels={"company": COMPANY}
        )
        await client.ledger.TransferCredits(request, metadata=client.metadata)

    async def pass_by(seconds: float) -> None:
        clock.advance(seconds)

    changes: list[Callable[[], Awaitable[object]]] = [
        partial(post, Transaction.GRANT, "100", category="purchase", description="Top-up"),
        partial(post, Transaction.GRANT, "10", category="credit_package", ttl=Duration(seconds=3 * 3600)),
        partial(post, Transaction.CHARGE, "-1.5", category="computing", usage=usage),
        partial(post, Transaction.CHARGE, "-2", category="computing", usage=usage),
        partial(post, Transaction.CHARGE, "-0.000001", category="serverless", usage=usage),
        partial(post, Transaction.CHARGE, "-1", category="ai_chat", creator=member, description="Chat"),
        partial(post, Transaction.CHARGE, "-1", category="inference", usage=usage),
        partial(post, Transaction.CHARGE, "-1", category="order", order=Order(id="1")),
        partial(post, Transaction.CHARGE, "-1", category="event_ticket", event_ticket=EventTicket(id="2")),
        partial(post, Transaction.CHARGE, "-9", category="booking", state=Transaction.FAILED),
        partial(post, Transaction.CHARGE, "-9", category="booking", booking=Booking(id="3"), owner=member),
        partial(refund, "4"),
        partial(refund, "5"),
        partial(update, title="After"),
        partial(update, title="After", metadata=metadata, expiring_day_passes=0),
        partial(transfer, COMPANY, "other"),
        partial(transfer, "other", COMPANY),
        # Too long to be kept.
        partial(
            post, Transaction.ADJUSTMENT, "-1", category="admin_adjustment", metadata={"text": "-" * ROW_BYTES_MAX}
        ),
        # What expires is gone before that is posted.
        partial(pass_by, 4 * 3600),
        partial(post, Transaction.CHARGE, "-1", category="computing", usage=usage),
    ]
    before: Pages = {}
    for change in changes:
        await change()
        kept = await pages(client, bound, network)
        with monkeypatch.context() as patch:
            for facade, name in KEPT:
                patch.setattr(facade, name, getattr(facade, name).__wrapped__)
            patch.setattr(KeptPages, "of", lambda pages, _question, page: pages._render(page))
            patch.setattr(AccountStore, "_kept_holding", lambda _accounts, _row, _now: None)
            anew = await pages(client, bound, network)
        assert kept == anew
        assert kept != before
        before = kept
    assert all(before.values())
    assert len(before[f"{nebulablock.SERVICE}/GetCreditsHistory"][0].data.credit_history) == 2  # type: ignore[attr-defined]


def test_what_is_kept() -> None:
    """The same bytes are rendered once, other bytes for themselves, long ones each time; the last rows stay."""
    rendered: list[bytes] = []

    @keep_rendered
    def render(body: bytes) -> bytes:
        rendered.append(body)
        return body[::-1]

    short, long = b"ab" * (ROW_BYTES_MAX // 2), b"-" * (ROW_BYTES_MAX + 1)
    for body in (short, long):
        assert [render(body), render(bytes(bytearray(body)))] == [body[::-1]] * 2
    assert rendered == [short, long, long]
    assert render(short[:-1] + b"c") == b"c" + short[-2::-1]
    rendered.clear()
    for number in range(ROWS_CACHED_MAX + 1):
        render(b"%d" % number)
    render(b"1")
    assert len(rendered) == ROWS_CACHED_MAX + 1
    render(b"0")
    assert len(rendered) == ROWS_CACHED_MAX + 2


def page_of(*bodies: bytes, next_key: TransactionKey | None = None) -> Page[TransactionRow, TransactionKey]:
    """A page of an account's rows, newest first."""
    return Page([TransactionRow(9, 7, 9 - at, body) for at, body in enumerate(bodies)], next_key)


def test_which_pages_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows are rendered once for the same question, other rows anew, long pages each time."""
    monkeypatch.setattr(rendered, "PAGES_CACHED_MAX", 2)
    asked: list[Page[TransactionRow, TransactionKey]] = []

    def render(page: Page[TransactionRow, TransactionKey]) -> int:
        asked.append(page)
        return len(asked)

    kept = KeptPages(render)
    page = page_of(b"ab", b"c")
    assert [kept.of("first", page), kept.of("first", page_of(b"ab", b"c"))] == [1, 1]
    # Each is what the question finds next: another body, one row more, another place to go on from.
    others = [
        page_of(b"ab", b"d"),
        page_of(b"ab", b"d", b"e"),
        page_of(b"ab", b"d", b"e", next_key=TransactionKey(9, 7, 7)),
    ]
    assert [kept.of("first", each) for each in others for _ in range(2)] == [2, 2, 3, 3, 4, 4]
    long, longer = page_of(b"x" * PAGE_ROWS_BYTES_MAX), page_of(b"x" * PAGE_ROWS_BYTES_MAX, b"y")
    assert [kept.of("second", each) for each in (long, long, longer, longer)] == [5, 5, 6, 7]
    # No other question goes for one that is kept.
    assert [kept.of("second", page), kept.of("first", others[-1])] == [8, 4]
    # The question that was asked first goes.
    assert [kept.of(question, page) for question in ("third", "third", "first", "third")] == [9, 9, 10, 9]


def test_a_page_with_a_refund_that_came_meanwhile_is_not_kept() -> None:
    """What was refunded is read after the heads: where it tells of another head, those no longer stand for it."""
    charge = Transaction(kind=Transaction.CHARGE, category="booking", state=Transaction.SUCCEEDED)
    charge.amount, charge.expiring_amount, charge.permanent_amount = "-2", "0", "-2"
    page = spacebring._RenderedPage(page_of(charge.SerializeToString(), charge.SerializeToString()))
    heads, refunds = {7: b"then"}, {(7, 9): RefundTotal(1_000_000, 0)}
    assert page.shown_before({}, heads) is None
    shown = page.shown({}, heads, refunds, {7: b"now"})
    found = GetCreditsTransactionsResponse.FromString(shown.transactions).transactions
    assert [row.refund.amount for row in found] == [1, 0]
    assert page.shown_before({}, heads) is None
    # Nor where there is an account whose head nobody knows.
    assert page.shown({}, {}, {}, {}) != shown
    assert page.shown_before({}, {}) is None
    assert page.shown({}, {7: b"now"}, refunds, {7: b"now"}) == shown
    assert page.shown_before({}, {7: b"now"}) == shown
    assert page.shown_before({}, {7: b"later"}) is None
    long = "x" * spacebring.SHOWN_BYTES_MAX
    for length, is_kept in ((spacebring.SHOWN_BYTES_MAX // 2, False), (16, True)):
        companies = {"acme": CreditsTransaction(description=long[:length]).SerializeToString()}
        row = Transaction(category="credit_package", kind=Transaction.GRANT, state=Transaction.SUCCEEDED)
        row.amount = row.permanent_amount = "1"
        row.expiring_amount = "0"
        row.labels["company"] = "acme"
        page = spacebring._RenderedPage(page_of(*[row.SerializeToString()] * 2))
        shown = page.shown(companies, heads, {}, {})
        assert page.shown_before(companies, heads) == (shown if is_kept else None)
    assert page.shown_before({"acme": b""}, {7: b"now"}) is None


async def test_nothing_is_read_again_of_a_page_that_is_known(client: Client, server: Server) -> None:
    """But its rows, and the accounts of its companies: not what they hold, and not what was refunded."""
    await client.create_account(COMPANY, kind=Account.COMPANY)
    await client.post(COMPANY, Transaction.GRANT, "9", category="credit_package", labels={"company": COMPANY})
    network = (spacebring.NETWORK_HEADER, str(uuid.uuid5(uuid.NAMESPACE_URL, "house")))
    call = TransactionsStub(client.channel).GetCreditsTransactions
    reads = []
    for is_posted in (False, False, True, False):
        if is_posted:
            await client.post(COMPANY, Transaction.CHARGE, "-2", category="booking", labels={"company": COMPANY})
        with statements(server.book) as found:
            await call(GetCreditsTransactionsRequest(), metadata=(*client.metadata, network))
        reads.append((found.of("lots"), found.of("refunds"), found.of("accounts")))
    assert reads == [(1, 1, 3), (0, 0, 1), (1, 1, 3), (0, 0, 1)]
