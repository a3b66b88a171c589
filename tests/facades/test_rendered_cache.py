"""Cached rendered rows are never stale, and never those of another row."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
from daybook.v1.account_pb2 import Account, Company, User
from daybook.v1.ledger_service_pb2 import RefundTransactionRequest, TransferCreditsRequest, UpdateAccountRequest
from daybook.v1.transaction_pb2 import Booking, EventTicket, Order, Transaction, Usage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.struct_pb2 import Struct

from server.caching import ENTRY_BYTES, ByteLRU
from server.facades import all_facades
from server.facades.spacebring import NETWORK_HEADER
from server.transport import rendered
from server.transport.rendered import cache_rendered
from server.vendors.nebulablock import VENDOR as NEBULA_BLOCK
from tests.support.callers import Client, Server
from tests.support.clock import Clock
from tests.support.methods import facade_requests

COMPANY = str(uuid.uuid5(uuid.NAMESPACE_URL, "daybook:test:company"))
CACHED = [
    (facade, name) for facade in all_facades() for name, each in vars(facade).items() if hasattr(each, "__wrapped__")
]
"""The functions with cached results, each as its module and its name."""

Pages = dict[str, list[Message]]


async def pages(client: Client, bound: Client, network: str) -> Pages:
    """The first page of every facade; Nebula Block's is read with the key that is bound to the account."""
    found: Pages = {}
    for method, request in facade_requests(COMPANY):
        service, answer = method.containing_service.full_name, GetMessageClass(method.output_type)
        caller = bound if service == NEBULA_BLOCK.service else client
        # A unary method has the same wire format as a stream of one message.
        call: Any = caller.channel.unary_stream(f"/{service}/{method.name}")
        metadata = (*caller.metadata, (NETWORK_HEADER, network))
        messages = call(request.SerializeToString(), metadata=metadata)
        found[method.full_name] = [answer.FromString(each) async for each in messages]
    return found


async def test_cached_pages_show_every_change(
    client: Client, server: Server, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every kind of change, a page with cached rows equals the page rendered without a cache."""
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

    async def advance(seconds: float) -> None:
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
        partial(post, Transaction.ADJUSTMENT, "-1", category="admin_adjustment", metadata={"text": "-" * 2048}),
        # Credits expire before their expiration is posted.
        partial(advance, 4 * 3600),
        partial(post, Transaction.CHARGE, "-1", category="computing", usage=usage),
    ]
    previous: Pages = {}
    for change in changes:
        await change()
        cached = await pages(client, bound, network)
        with monkeypatch.context() as patch:
            for facade, name in CACHED:
                patch.setattr(facade, name, getattr(facade, name).__wrapped__)
            fresh = await pages(client, bound, network)
        assert cached == fresh
        assert cached != previous
        previous = cached
    assert all(previous.values())
    assert len(previous[f"{NEBULA_BLOCK.service}.GetCreditsHistory"][0].data.credit_history) == 2  # type: ignore[attr-defined]


def test_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal arguments are rendered once; the least recently used entry is evicted; a large entry is not cached."""
    monkeypatch.setattr(rendered, "_cache", ByteLRU(3 * (ENTRY_BYTES + 230), rendered._size))
    calls: list[bytes] = []

    @cache_rendered
    def render(body: bytes, number: int) -> bytes:
        calls.append(body)
        return body[::-1] + b"%d" % number

    bodies = [bytes([each]) * 80 for each in b"abcd"]
    for body in (bodies[0], bodies[0], bodies[1], bodies[0], bodies[2]):
        assert render(bytes(bytearray(body)), 1) == body + b"1"
    assert calls == bodies[:3]
    assert render(bodies[0], 2) == bodies[0] + b"2", "another argument is another entry"
    # The last call evicted the least recently used entry.
    assert render(bodies[0], 1) == bodies[0] + b"1"
    assert calls == [*bodies[:3], bodies[0]]
    render(bodies[1], 1)
    assert calls == [*bodies[:3], *bodies[:2]]
    monkeypatch.setattr(rendered, "_cache", ByteLRU(10 * rendered.ENTRY_BYTES_MAX, rendered._size))
    large = b"x" * (rendered.ENTRY_BYTES_MAX // 2)
    assert render(large, 1) == render(large, 1)
    assert calls[-2:] == [large, large]
