"""Lots over the wire: lists, spending order, allocations and expiry."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Any

import pytest
from daybook.v1.account_pb2 import User
from daybook.v1.ledger_service_pb2 import (
    TRANSACTION_VIEW_BASIC,
    TRANSACTION_VIEW_UNSPECIFIED,
    BatchCreateTransactionsRequest,
    CreateTransactionRequest,
    GetTransactionRequest,
    ListLotsRequest,
    ListTransactionsRequest,
    RefundTransactionRequest,
    TransferCreditsRequest,
)
from daybook.v1.transaction_pb2 import Allocation, Lot, Transaction
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from server.ledger.instants import SECOND, from_timestamp
from server.ledger.posting import Kind
from tests.support.callers import Client, Server
from tests.support.clock import NOON, Clock, after
from tests.support.markers import only_sqlite
from tests.support.refusals import refusal_of

GRANT, CHARGE, ADJUSTMENT = Transaction.GRANT, Transaction.CHARGE, Transaction.ADJUSTMENT
HOUR_SECONDS = 3600
CENTURY_SECONDS = 36_525 * 24 * 3600


def lot(number: int, amount: str, remaining: str, **fields: object) -> Lot:
    """A lot of acme, opened by the transaction of the same number unless `fields` say otherwise."""
    return Lot(
        **{  # type: ignore[arg-type]
            "name": f"accounts/acme/lots/{number}",
            "sequence": number,
            "amount": amount,
            "remaining_amount": remaining,
            **fields,
        }
    )


async def pages_of(client: Client, page_size: int) -> list[list[Lot]]:
    """The lots of acme, page by page."""
    pages: list[list[Lot]] = []
    request = ListLotsRequest(parent="accounts/acme", page_size=page_size)
    while not pages or request.page_token:
        page = await client.ledger.ListLots(request, metadata=client.metadata)
        pages.append(list(page.lots))
        request.page_token = page.next_page_token
        assert len(pages) < 100, "the list has no end"
    return pages


async def test_lots_are_listed_in_order_of_opening(server: Server, client: Client, clock: Clock) -> None:
    """A list of lots includes spent and expired ones, with their remaining amounts, before and after a sweep."""
    await client.create_account("acme")
    await client.post("acme", GRANT, "10")
    await client.post("acme", GRANT, "5", expire_time=after(HOUR_SECONDS), priority=3)
    await client.post("acme", GRANT, "7", priority=-1)
    await client.post("acme", ADJUSTMENT, "0.5", expire_time=after(HOUR_SECONDS + 1))
    # Takes 7 from the lot of priority -1, then 0.5 from an expiring lot, then 0.75 from the permanent one.
    await client.post("acme", CHARGE, "-8.25")
    fields: list[dict[str, object]] = [
        {},
        {"expire_time": after(HOUR_SECONDS), "priority": 3},
        {"priority": -1},
        {"expire_time": after(HOUR_SECONDS + 1)},
    ]
    amounts = ["10", "5", "7", "0.5"]

    def lots(*remaining: str) -> list[Lot]:
        return [lot(n + 1, amounts[n], remaining[n], **fields[n]) for n in range(4)]

    assert await client.lots() == lots("9.25", "5", "0", "0")
    clock.advance(HOUR_SECONDS)
    assert await client.lots() == lots("9.25", "0", "0", "0")
    assert await server.book.expirations.sweep() == 1
    assert await client.lots() == lots("9.25", "0", "0", "0")


async def test_pages_of_lots(client: Client) -> None:
    """Every lot is on exactly one page, in order, for any page size, and no page is empty."""
    await client.create_account("acme")
    await client.create_account("other")
    for number in range(1, 6):
        await client.post("acme", GRANT, str(number))
        await client.post("other", GRANT, "100")
    for page_size, lengths in {1: [1] * 5, 2: [2, 2, 1], 4: [4, 1], 5: [5], 6: [5], 0: [5]}.items():
        pages = await pages_of(client, page_size)
        assert [len(page) for page in pages] == lengths
        assert [each.name for page in pages for each in page] == [f"accounts/acme/lots/{n}" for n in range(1, 6)]
        assert [each.amount for page in pages for each in page] == ["1", "2", "3", "4", "5"]


async def test_lots_opened_between_pages(client: Client) -> None:
    """A lot that is opened between pages is listed last and moves no other."""
    await client.create_account("acme")
    for _ in range(3):
        await client.post("acme", GRANT, "1")
    first = await client.ledger.ListLots(ListLotsRequest(parent="accounts/acme", page_size=2), metadata=client.metadata)
    await client.post("acme", CHARGE, "-3")
    await client.post("acme", GRANT, "1")
    request = ListLotsRequest(parent="accounts/acme", page_size=50, page_token=first.next_page_token)
    second = await client.ledger.ListLots(request, metadata=client.metadata)
    assert [each.name[-1] for each in (*first.lots, *second.lots)] == ["1", "2", "3", "4"]
    assert not second.next_page_token


async def test_sizes_of_pages_of_lots(client: Client) -> None:
    """A page has 50 lots by default, and more if requested."""
    await client.create_account("acme")
    requests = [CreateTransactionRequest(transaction=Transaction(kind=GRANT, category="x", amount="1"))] * 51
    await client.ledger.BatchCreateTransactions(
        BatchCreateTransactionsRequest(parent="accounts/acme", requests=requests), metadata=client.metadata
    )
    assert [len(page) for page in await pages_of(client, 0)] == [50, 1]
    assert [len(page) for page in await pages_of(client, 2000)] == [51]


@pytest.mark.parametrize(
    ("request_message", "verdict"),
    [
        (ListLotsRequest(parent="accounts/acme", page_size=-1), ("INVALID_ARGUMENT", "FIELD_INVALID", "page_size")),
        (ListLotsRequest(parent=""), ("INVALID_ARGUMENT", "FIELD_INVALID", "parent")),
        (ListLotsRequest(parent="accounts/-"), ("INVALID_ARGUMENT", "FIELD_INVALID", "parent")),
        (ListLotsRequest(parent="accounts/acme/lots"), ("INVALID_ARGUMENT", "FIELD_INVALID", "parent")),
        (ListLotsRequest(parent="accounts/unknown"), ("NOT_FOUND", "ACCOUNT_NOT_FOUND")),
        (
            ListLotsRequest(parent="accounts/acme", page_token="made-up"),
            ("INVALID_ARGUMENT", "PAGE_TOKEN_INVALID", "page_token"),
        ),
        (
            ListLotsRequest(parent="accounts/other", page_token="of acme"),
            ("INVALID_ARGUMENT", "PAGE_TOKEN_MISMATCH", "page_token"),
        ),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else str(value).replace("\n", " "),
)
@only_sqlite
async def test_malformed_request_for_lots_is_refused(
    client: Client, request_message: ListLotsRequest, verdict: tuple[str, ...]
) -> None:
    """A malformed request for lots is refused with the name of its field."""
    await client.create_account("acme")
    await client.create_account("other")
    for _ in range(2):
        await client.post("acme", GRANT, "1")
    if request_message.page_token == "of acme":
        page = await client.ledger.ListLots(
            ListLotsRequest(parent="accounts/acme", page_size=1), metadata=client.metadata
        )
        request_message.page_token = page.next_page_token
    refusal = await refusal_of(client.ledger.ListLots(request_message, metadata=client.metadata))
    assert (*refusal.verdict, *refusal.fields) == verdict


@only_sqlite
async def test_lots_of_other_accounts_are_refused(server: Server, client: Client) -> None:
    """A bound credential lists only its own account's lots, and no tenant lists another tenant's lots."""
    await client.create_account("acme")
    await client.create_account("other")
    await client.post("acme", GRANT, "1")
    tenant_number = await server.book.credentials.tenant_number("house")
    assert tenant_number is not None
    bound = await server.client(tenant_number, account_id="acme")
    assert len(await bound.lots("acme")) == 1
    assert (await refusal_of(bound.lots("other"))).verdict == ("PERMISSION_DENIED", "ACCOUNT_NOT_PERMITTED")
    stranger = await server.client(await server.create_tenant("stranger"))
    assert (await refusal_of(stranger.lots("acme"))).verdict == ("NOT_FOUND", "ACCOUNT_NOT_FOUND")


async def test_allocations(client: Client) -> None:
    """The full view has the amount moved in each lot, in spending order; they add up to the transaction's amount."""
    await client.create_account("acme", credit_limit="10")
    grants = [
        await client.post("acme", GRANT, "4"),
        await client.post("acme", GRANT, "3", expire_time=after(HOUR_SECONDS)),
        await client.post("acme", GRANT, "2", priority=-5),
    ]
    charge = await client.post("acme", CHARGE, "-11.5")
    payment = await client.post("acme", GRANT, "6", expire_time=after(HOUR_SECONDS))
    name = "accounts/acme/lots/"
    expected = {
        grants[0].name: [Allocation(lot=f"{name}1", amount="4")],
        grants[1].name: [Allocation(lot=f"{name}2", amount="3", expire_time=after(HOUR_SECONDS))],
        grants[2].name: [Allocation(lot=f"{name}3", amount="2")],
        charge.name: [
            Allocation(lot=f"{name}3", amount="-2"),
            Allocation(lot=f"{name}2", amount="-3", expire_time=after(HOUR_SECONDS)),
            Allocation(lot=f"{name}1", amount="-4"),
            Allocation(amount="-2.5"),
        ],
        payment.name: [
            Allocation(amount="2.5"),
            Allocation(lot=f"{name}4", amount="3.5", expire_time=after(HOUR_SECONDS)),
        ],
    }
    for row in await client.history():
        assert not row.allocations, "a list has the basic view"
        full = await client.full(row.name)
        assert list(full.allocations) == expected[row.name]
        assert sum(Decimal(each.amount) for each in full.allocations) == Decimal(row.amount)
        for view in (TRANSACTION_VIEW_UNSPECIFIED, TRANSACTION_VIEW_BASIC):
            request = GetTransactionRequest(name=row.name, view=view)
            assert await client.ledger.GetTransaction(request, metadata=client.metadata) == row
        full.ClearField("allocations")
        assert full == row
    parts = [(row.expiring_amount, row.permanent_amount) for row in await client.history()]
    # Debt, and its repayment, counts as permanent.
    assert parts == [("0", "4"), ("3", "0"), ("0", "2"), ("-3", "-8.5"), ("3.5", "2.5")]
    assert (await client.lots())[3].amount == "3.5", "a lot opens with the credits left after the debt"


@only_sqlite
async def test_unknown_view_is_refused(client: Client) -> None:
    """An unknown view is refused."""
    await client.create_account("acme")
    grant = await client.post("acme", GRANT, "1")
    request = GetTransactionRequest(name=grant.name, view=3)  # type: ignore[arg-type]
    refusal = await refusal_of(client.ledger.GetTransaction(request, metadata=client.metadata))
    assert (*refusal.verdict, *refusal.fields) == ("INVALID_ARGUMENT", "FIELD_INVALID", "view")


@pytest.mark.parametrize(
    ("fields", "expire_time", "priority"),
    [
        ({}, None, -1000),
        ({"expire_time": after(0.000001)}, after(0.000001), 1000),
        (
            {"expire_time": Timestamp(seconds=after(1).seconds, nanos=1_999)},
            Timestamp(seconds=after(1).seconds, nanos=1_000),
            0,
        ),
        ({"expire_time": Timestamp(seconds=253_402_300_799)}, Timestamp(seconds=253_402_300_799), 0),
        ({"ttl": Duration(seconds=1)}, after(1), 1),
        ({"ttl": Duration(seconds=90, nanos=500_000_999)}, after(90.5), -1),
        ({"ttl": Duration(seconds=CENTURY_SECONDS)}, after(CENTURY_SECONDS), 0),
    ],
)
@only_sqlite
async def test_terms_of_a_grant(
    client: Client, fields: dict[str, Any], expire_time: Timestamp | None, priority: int
) -> None:
    """The terms of a grant are in its answer and its lot; a ttl becomes an expire_time."""
    await client.create_account("acme")
    posted = await client.post("acme", GRANT, "2.5", priority=priority, **fields)
    assert (posted.expire_time if posted.HasField("expire_time") else None) == expire_time
    assert posted.WhichOneof("lifetime") == ("expire_time" if expire_time else None)
    assert posted.priority == priority
    expected = lot(1, "2.5", "2.5", priority=priority)
    if expire_time is not None:
        expected.expire_time.CopyFrom(expire_time)
    assert await client.lots() == [expected]
    assert (posted.expiring_amount, posted.permanent_amount) == (("2.5", "0") if expire_time else ("0", "2.5"))


@pytest.mark.parametrize(
    ("kind", "amount", "fields", "field"),
    [
        (GRANT, "1", {"ttl": Duration()}, "ttl"),
        (GRANT, "1", {"ttl": Duration(nanos=999_999_999)}, "ttl"),
        (GRANT, "1", {"ttl": Duration(seconds=-1)}, "ttl"),
        (GRANT, "1", {"ttl": Duration(seconds=-1, nanos=-1)}, "ttl"),
        (GRANT, "1", {"ttl": Duration(seconds=1, nanos=-1)}, "ttl"),
        (GRANT, "1", {"ttl": Duration(seconds=CENTURY_SECONDS + 1)}, "ttl"),
        (GRANT, "1", {"ttl": Duration(seconds=CENTURY_SECONDS, nanos=1_000)}, "ttl"),
        (GRANT, "1", {"ttl": Duration(seconds=1, nanos=1_000_000_000)}, "ttl"),
        (GRANT, "1", {"expire_time": after(-1)}, "expire_time"),
        (GRANT, "1", {"expire_time": after(0)}, "expire_time"),
        (GRANT, "1", {"expire_time": Timestamp(seconds=after(0).seconds, nanos=999)}, "expire_time"),
        (GRANT, "1", {"expire_time": Timestamp(seconds=253_402_300_800)}, "expire_time"),
        (GRANT, "1", {"expire_time": Timestamp(seconds=after(1).seconds, nanos=-1)}, "expire_time"),
        (GRANT, "1", {"priority": 1001}, "priority"),
        (GRANT, "1", {"priority": -1001}, "priority"),
        (ADJUSTMENT, "1", {"priority": 2**31 - 1}, "priority"),
        (ADJUSTMENT, "1", {"expire_time": after(0)}, "expire_time"),
        (CHARGE, "-1", {"expire_time": after(1)}, "expire_time"),
        (CHARGE, "-1", {"ttl": Duration(seconds=1)}, "ttl"),
        (CHARGE, "-1", {"priority": 1}, "priority"),
        (ADJUSTMENT, "-1", {"expire_time": after(1)}, "expire_time"),
        (ADJUSTMENT, "-1", {"priority": -1}, "priority"),
    ],
)
@only_sqlite
async def test_invalid_terms_are_refused(
    client: Client, kind: Kind, amount: str, fields: dict[str, Any], field: str
) -> None:
    """Terms that are out of bounds, or of a transaction that removes credits, are refused; nothing is posted."""
    await client.create_account("acme", credit_limit="10")
    refusal = await refusal_of(client.post("acme", kind, amount, **fields))
    assert (*refusal.verdict, *refusal.fields) == ("INVALID_ARGUMENT", "FIELD_INVALID", f"transaction.{field}")
    assert await client.history() == []
    assert await client.lots() == []


@pytest.mark.parametrize(
    ("terms", "spent"),
    [
        ([{}, {}, {}], [0, 1, 2]),
        ([{"priority": 2}, {"priority": 1}, {"priority": -1}], [2, 1, 0]),
        ([{}, {"expire_time": after(20)}, {"expire_time": after(10)}], [2, 1, 0]),
        ([{"expire_time": after(10)}, {"expire_time": after(10)}, {"expire_time": after(9)}], [2, 0, 1]),
        ([{"priority": 1, "expire_time": after(1)}, {}, {"priority": -1}], [2, 1, 0]),
        ([{"priority": -1}, {"priority": -1, "expire_time": after(9)}, {"expire_time": after(1)}], [1, 0, 2]),
    ],
    ids=["oldest", "priority", "expire_time", "same expire_time", "priority before expire_time", "within a priority"],
)
@only_sqlite
async def test_spending_order(client: Client, terms: list[dict[str, Any]], spent: list[int]) -> None:
    """Lots are spent by priority, then the first to expire, then the oldest."""
    await client.create_account("acme")
    for each in terms:
        await client.post("acme", GRANT, "1", **each)
    order = []
    for _ in terms:
        charge = await client.full((await client.post("acme", CHARGE, "-1")).name)
        assert len(charge.allocations) == 1
        order.append(int(charge.allocations[0].lot.rpartition("/")[2]) - 1)
    assert order == spent


async def test_balance_has_an_expiring_part(client: Client, clock: Clock) -> None:
    """A balance has an expiring and a permanent part, and debt counts in the permanent part."""
    await client.create_account("acme", credit_limit="5")

    async def parts() -> tuple[str, str, str, str]:
        held = await client.balance()
        return held.amount, held.expiring_amount, held.permanent_amount, held.available_amount

    assert await parts() == ("0", "0", "0", "5")
    await client.post("acme", GRANT, "10", expire_time=after(100))
    await client.post("acme", GRANT, "1.5", expire_time=after(200))
    await client.post("acme", GRANT, "20")
    assert await parts() == ("31.5", "11.5", "20", "36.5")
    await client.post("acme", CHARGE, "-10.25")
    assert await parts() == ("21.25", "1.25", "20", "26.25")
    clock.advance(200)
    assert await parts() == ("20", "0", "20", "25")
    await client.post("acme", CHARGE, "-24")
    assert await parts() == ("-4", "0", "-4", "1")


async def test_expiry_takes_effect_at_once(server: Server, client: Client, admin: Client, clock: Clock) -> None:
    """Of 100 expiring credits 80 are spent; the other 20 leave the balance at the expire_time, swept or not."""
    await client.create_account("acme")
    await client.post("acme", GRANT, "100", expire_time=after(HOUR_SECONDS))
    await client.post("acme", CHARGE, "-80")
    await client.post("acme", GRANT, "50")

    async def held() -> tuple[str, str, str, str, Timestamp]:
        now = await client.balance()
        return now.amount, now.expiring_amount, now.permanent_amount, now.available_amount, now.read_time

    clock.advance(HOUR_SECONDS - 0.000001)
    assert await held() == ("70", "20", "50", "70", after(HOUR_SECONDS - 0.000001))
    assert await server.book.expirations.sweep() == 0
    clock.advance(0.000001)
    assert await held() == ("50", "0", "50", "50", after(HOUR_SECONDS))
    assert (await client.balance()).sequence == 3
    refusal = await refusal_of(client.post("acme", CHARGE, "-50.000001"))
    assert refusal.metadata == {"account": "accounts/acme", "available_amount": "50", "amount": "-50.000001"}
    clock.advance(HOUR_SECONDS)
    assert await server.book.expirations.sweep() == 1
    assert await held() == ("50", "0", "50", "50", after(2 * HOUR_SECONDS))
    assert (await client.balance()).sequence == 4
    assert await server.book.expirations.sweep() == 0
    assert await admin.verify() == []


Post = Callable[[Client], Awaitable[object]]


async def _refund(client: Client) -> object:
    charge = next(row for row in await client.history() if row.kind == CHARGE)
    return await client.ledger.RefundTransaction(RefundTransactionRequest(name=charge.name), metadata=client.metadata)


async def _transfer(client: Client, source: str, destination: str) -> object:
    return await client.ledger.TransferCredits(
        TransferCreditsRequest(name=f"accounts/{source}", destination=f"accounts/{destination}", amount="1"),
        metadata=client.metadata,
    )


async def _batch(client: Client) -> object:
    requests = [CreateTransactionRequest(transaction=Transaction(kind=CHARGE, category="x", amount="-1"))]
    return await client.ledger.BatchCreateTransactions(
        BatchCreateTransactionsRequest(parent="accounts/acme", requests=requests), metadata=client.metadata
    )


@pytest.mark.parametrize(
    ("post", "kind"),
    [
        (lambda client: client.post("acme", GRANT, "1"), GRANT),
        (lambda client: client.post("acme", CHARGE, "-1"), CHARGE),
        (lambda client: client.post("acme", ADJUSTMENT, "-1"), ADJUSTMENT),
        (lambda client: client.post("acme", CHARGE, "-1", state=Transaction.FAILED), CHARGE),
        (_batch, CHARGE),
        (_refund, Transaction.REFUND),
        (lambda client: _transfer(client, "acme", "other"), Transaction.TRANSFER_OUT),
        (lambda client: _transfer(client, "other", "acme"), Transaction.TRANSFER_IN),
    ],
    ids=["grant", "charge", "adjustment", "failed charge", "batch", "refund", "transfer out", "transfer in"],
)
async def test_due_expirations_are_posted_first(
    client: Client, admin: Client, clock: Clock, post: Post, kind: Kind
) -> None:
    """A posting first posts the due expirations, each at its own expire_time."""
    await client.create_account("acme")
    await client.create_account("other")
    await client.post("other", GRANT, "5")
    await client.post("acme", GRANT, "10", expire_time=after(200))
    await client.post("acme", GRANT, "20", expire_time=after(100))
    await client.post("acme", GRANT, "30", expire_time=after(300))
    await client.post("acme", GRANT, "2", expire_time=after(50))
    await client.post("acme", CHARGE, "-2")
    await client.post("acme", GRANT, "40")
    clock.advance(200)
    await post(client)
    rows = await client.history()
    expirations = [(row.sequence, row.kind, row.amount, row.create_time) for row in rows[6:8]]
    assert expirations == [
        (7, Transaction.EXPIRATION, "-20", after(100)),
        (8, Transaction.EXPIRATION, "-10", after(200)),
    ]
    assert [row.kind for row in rows[8:]] == [kind]
    assert rows[8].create_time == after(200)
    first = rows[6]
    assert (first.category, first.state, first.expiring_amount, first.permanent_amount, first.balance_after) == (
        "expiration",
        Transaction.SUCCEEDED,
        "-20",
        "0",
        "80",
    )
    assert not first.HasField("expire_time")
    full = await client.full(first.name)
    assert list(full.allocations) == [Allocation(lot="accounts/acme/lots/2", amount="-20", expire_time=after(100))]
    assert await admin.verify() == []


async def test_expiration_has_the_owner_and_labels_of_its_lot(
    server: Server, client: Client, admin: Client, clock: Clock
) -> None:
    """An expiration has the owner and the labels of the transaction that opened its lot, so that lists show both.

    A grant, a transfer or the refund of expired credits may have opened the lot. No other field is copied.
    """
    for account_id in ("acme", "other"):
        await client.create_account(account_id)
    ada, bob = User(id="ada", name="Ada", membership="m"), User(id="bob")
    await client.post(
        "acme", GRANT, "8", expire_time=after(10), owner=ada, creator=bob, labels={"company": "c", "floor": "2"}
    )
    await client.ledger.TransferCredits(
        TransferCreditsRequest(
            name="accounts/acme", destination="accounts/other", amount="3", creator=bob, labels={"location": "l"}
        ),
        metadata=client.metadata,
    )
    charge = await client.post("acme", CHARGE, "-1", owner=bob, labels={"membership": "m"}, description="Tea")
    clock.advance(10)
    assert await server.book.expirations.sweep() == 2
    await client.ledger.RefundTransaction(RefundTransactionRequest(name=charge.name), metadata=client.metadata)
    clock.advance(10)
    # Without a sweep the next posting posts the expiration.
    await client.post("acme", GRANT, "1", labels={"location": "elsewhere"})

    def origins(rows: list[Transaction]) -> list[tuple[str, User | None, dict[str, str]]]:
        expirations = [row for row in rows if row.kind == Transaction.EXPIRATION]
        assert not any(row.HasField("creator") or row.description for row in expirations)
        return [(row.amount, row.owner if row.HasField("owner") else None, dict(row.labels)) for row in expirations]

    acme, other = await client.history("acme"), await client.history("other")
    assert origins(acme) == [("-4", ada, {"company": "c", "floor": "2"}), ("-1", bob, {"membership": "m"})]
    assert origins(other) == [("-3", None, {"location": "l"})]
    by_label = ListTransactionsRequest(parent="accounts/-", filter='labels.company = "c"')
    listed = (await client.ledger.ListTransactions(by_label, metadata=client.metadata)).transactions
    assert [(row.kind, row.amount) for row in listed] == [(Transaction.EXPIRATION, "-4"), (GRANT, "8")]
    assert await admin.verify() == []


async def test_clock_that_went_back_revives_no_credits(
    server: Server, client: Client, admin: Client, clock: Clock
) -> None:
    """Credits that had expired at an account's newest transaction stay expired if the clock goes back."""
    await client.create_account("acme")
    await client.post("acme", GRANT, "10", expire_time=after(100))
    clock.advance(100)
    await client.post("acme", GRANT, "1")
    clock.advance(-50)
    assert (await client.balance()).amount == "1"
    assert [each.remaining_amount for each in await client.lots()] == ["0", "1"]
    assert (await refusal_of(client.post("acme", CHARGE, "-2"))).verdict == (
        "FAILED_PRECONDITION",
        "INSUFFICIENT_CREDITS",
    )
    assert await server.book.expirations.sweep() == 0
    assert await admin.verify() == []


async def test_spent_lots_do_not_expire(server: Server, client: Client, clock: Clock) -> None:
    """A lot that is spent before its expire_time has no EXPIRATION."""
    await client.create_account("acme")
    await client.post("acme", GRANT, "10", expire_time=after(100))
    await client.post("acme", CHARGE, "-10")
    clock.advance(1000)
    assert await server.book.expirations.sweep() == 0
    await client.post("acme", GRANT, "1")
    assert [row.kind for row in await client.history()] == [GRANT, CHARGE, GRANT]


ACCOUNT_COUNT = 260
"""With three lots each, more than one batch of a sweep."""


async def test_sweep_of_many_accounts(server: Server, client: Client, admin: Client, clock: Clock) -> None:
    """A sweep posts every due expiration of any number of idle accounts, and nothing else."""
    account_ids = [f"a-{number}" for number in range(ACCOUNT_COUNT)]
    await asyncio.gather(*map(client.create_account, account_ids))
    for amount, seconds in (("5", 30), ("3", 20), ("2", 1000)):
        transaction = Transaction(kind=GRANT, category="x", amount=amount, expire_time=after(seconds))
        requests = [
            CreateTransactionRequest(parent=f"accounts/{account_id}", transaction=transaction)
            for account_id in account_ids
        ]
        await client.ledger.BatchCreateTransactions(
            BatchCreateTransactionsRequest(parent="accounts/-", requests=requests), metadata=client.metadata
        )
    clock.advance(30)
    assert await server.book.expirations.sweep() == 2 * ACCOUNT_COUNT
    assert await server.book.expirations.sweep() == 0
    for account_id in account_ids[:: ACCOUNT_COUNT // 10]:
        rows = await client.history(account_id)
        expirations = [(row.sequence, row.amount, from_timestamp(row.create_time) - NOON) for row in rows[3:]]
        assert expirations == [(4, "-3", 20 * SECOND), (5, "-5", 30 * SECOND)]
        assert (await client.balance(account_id)).amount == "2"
    assert len(await client.history("-")) == 5 * ACCOUNT_COUNT
    assert await admin.verify() == []
