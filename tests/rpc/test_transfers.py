"""Transfers over the wire: both sides or neither, with the terms of the credits."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from daybook.v1.account_pb2 import User
from daybook.v1.ledger_service_pb2 import (
    BatchCreateTransactionsRequest,
    CreateTransactionRequest,
    TransferCreditsRequest,
    TransferCreditsResponse,
)
from daybook.v1.transaction_pb2 import Allocation, Transaction
from google.protobuf.struct_pb2 import Struct, Value

from tests.support.callers import Client, Server
from tests.support.clock import Clock, after
from tests.support.markers import only_sqlite
from tests.support.refusals import refusal_of

GRANT, CHARGE = Transaction.GRANT, Transaction.CHARGE
INSUFFICIENT = ("FAILED_PRECONDITION", "INSUFFICIENT_CREDITS")
LARGEST = "999999999999.999999"


@pytest.fixture
async def two(client: Client) -> Client:
    """A caller with 10 credits in `giver` and none in `taker`."""
    for account_id in ("giver", "taker"):
        await client.create_account(account_id)
    await client.post("giver", GRANT, "10")
    return client


async def everything(client: Client, *account_ids: str) -> list[object]:
    """The balances, histories and lots of accounts."""
    return [
        each
        for account_id in account_ids
        for each in (
            await client.balance(account_id),
            await client.history(account_id),
            await client.lots(account_id),
        )
    ]


async def test_both_sides(two: Client, clock: Clock) -> None:
    """Each side has the fields of the request, its own amounts, and the name of the other side."""
    clock.advance(5)
    request = TransferCreditsRequest(
        name="accounts/giver",
        destination="accounts/taker",
        amount="2.50",
        request_id="move-7",
        description="For the desk",
        creator=User(id="u-1", name="Ada"),
        labels={"location": "l-1", "project": "x"},
        metadata=Struct(fields={"x": Value(bool_value=True)}),
    )
    sides = await two.ledger.TransferCredits(request, metadata=two.metadata)
    outgoing, incoming = sides.outgoing, sides.incoming
    common = Transaction(
        create_time=after(5),
        category="transfer",
        state=Transaction.SUCCEEDED,
        expiring_amount="0",
        request_id="move-7",
        description="For the desk",
        creator=User(id="u-1", name="Ada"),
        labels={"location": "l-1", "project": "x"},
        metadata=request.metadata,
    )
    expected_outgoing = Transaction(
        name=f"accounts/giver/transactions/{outgoing.uid}",
        uid=outgoing.uid,
        sequence=2,
        kind=Transaction.TRANSFER_OUT,
        amount="-2.5",
        permanent_amount="-2.5",
        balance_after="7.5",
        transfer_peer=f"accounts/taker/transactions/{incoming.uid}",
    )
    expected_outgoing.MergeFrom(common)
    expected_incoming = Transaction(
        name=f"accounts/taker/transactions/{incoming.uid}",
        uid=incoming.uid,
        sequence=1,
        kind=Transaction.TRANSFER_IN,
        amount="2.5",
        permanent_amount="2.5",
        balance_after="2.5",
        transfer_peer=f"accounts/giver/transactions/{outgoing.uid}",
    )
    expected_incoming.MergeFrom(common)
    assert (outgoing, incoming) == (expected_outgoing, expected_incoming)
    assert outgoing.uid != incoming.uid
    assert (await two.history("giver"))[1:] == [outgoing]
    assert await two.history("taker") == [incoming]
    for side in (outgoing, incoming):
        peer = await two.full(side.transfer_peer)
        assert peer.transfer_peer == side.name


async def test_transferred_credits_keep_their_terms(client: Client, admin: Client, clock: Clock) -> None:
    """Credits are taken in spending order, and arrive in lots with the same terms."""
    for account_id in ("giver", "taker"):
        await client.create_account(account_id)
    await client.post("giver", GRANT, "5", priority=2)
    await client.post("giver", GRANT, "3", expire_time=after(3600), priority=2)
    await client.post("giver", GRANT, "2", expire_time=after(60))
    sides = await client.transfer("giver", "taker", "6")
    assert (sides.outgoing.expiring_amount, sides.outgoing.permanent_amount) == ("-5", "-1")
    assert (sides.incoming.expiring_amount, sides.incoming.permanent_amount) == ("5", "1")
    assert [lot.remaining_amount for lot in await client.lots("giver")] == ["4", "0", "0"]
    lots = [
        (lot.amount, lot.remaining_amount, lot.expire_time if lot.HasField("expire_time") else None, lot.priority)
        for lot in await client.lots("taker")
    ]
    assert lots == [("2", "2", after(60), 0), ("3", "3", after(3600), 2), ("1", "1", None, 2)]
    assert list((await client.full(sides.incoming.name)).allocations) == [
        Allocation(lot="accounts/taker/lots/1", amount="2", expire_time=after(60)),
        Allocation(lot="accounts/taker/lots/2", amount="3", expire_time=after(3600)),
        Allocation(lot="accounts/taker/lots/3", amount="1"),
    ]
    clock.advance(60)
    assert (await client.balance("taker")).amount == "4"
    assert await admin.verify() == []


async def test_credit_limit_allows_no_transfer(client: Client) -> None:
    """A credit limit allows charges, not transfers."""
    for account_id in ("giver", "taker"):
        await client.create_account(account_id, credit_limit="100")
    await client.post("giver", GRANT, "3.5")
    before = await everything(client, "giver", "taker")
    refusal = await refusal_of(client.transfer("giver", "taker", "3.500001"))
    assert refusal.verdict == INSUFFICIENT
    assert refusal.metadata == {"account": "accounts/giver", "available_amount": "3.5", "amount": "-3.500001"}
    assert await everything(client, "giver", "taker") == before
    await client.post("giver", CHARGE, "-4")
    refusal = await refusal_of(client.transfer("giver", "taker", "0.000001"))
    assert refusal.verdict == INSUFFICIENT
    assert refusal.metadata["available_amount"] == "0"


async def test_transfer_pays_debt_first(client: Client, admin: Client) -> None:
    """Credits that arrive pay the debt before they open a lot."""
    await client.create_account("giver")
    await client.create_account("taker", credit_limit="10")
    await client.post("giver", GRANT, "10", expire_time=after(60))
    await client.post("taker", CHARGE, "-4")
    incoming = (await client.transfer("giver", "taker", "6")).incoming
    assert (incoming.amount, incoming.expiring_amount, incoming.permanent_amount) == ("6", "2", "4")
    assert incoming.balance_after == "2"
    assert [(lot.amount, lot.sequence) for lot in await client.lots("taker")] == [("2", 2)]
    assert await admin.verify() == []


@pytest.mark.parametrize(
    ("why", "verdict"),
    [
        ("too little", INSUFFICIENT),
        ("expired", INSUFFICIENT),
        ("destination out of range", ("FAILED_PRECONDITION", "BALANCE_OUT_OF_RANGE")),
        ("too many lots", ("FAILED_PRECONDITION", "TOO_MANY_LOTS")),
        ("no destination", ("NOT_FOUND", "ACCOUNT_NOT_FOUND")),
        ("no source", ("NOT_FOUND", "ACCOUNT_NOT_FOUND")),
    ],
)
async def test_refused_transfer_changes_nothing(
    two: Client, admin: Client, clock: Clock, why: str, verdict: tuple[str, str]
) -> None:
    """A transfer that either side refuses changes neither account and leaves its request_id free."""
    source, destination, amount = "giver", "taker", "10"
    match why:
        case "too little":
            amount = "10.000001"
        case "expired":
            await two.post("giver", GRANT, "1", expire_time=after(1))
            clock.advance(1)
            amount = "10.5"
        case "destination out of range":
            await two.post("taker", GRANT, LARGEST)
        case "too many lots":
            grant = Transaction(kind=GRANT, category="x", amount="0.000001", priority=1)
            amount = "10.001"
            await two.ledger.BatchCreateTransactions(
                BatchCreateTransactionsRequest(
                    parent="accounts/giver", requests=[CreateTransactionRequest(transaction=grant)] * 1000
                ),
                metadata=two.metadata,
            )
        case "no destination":
            destination = "unknown"
        case "no source":
            source = "unknown"
    before = await everything(two, "giver", "taker")
    refusal = await refusal_of(two.transfer(source, destination, amount, request_id="id"))
    assert refusal.verdict == verdict
    if verdict[0] == "NOT_FOUND":
        assert refusal.metadata == {"account": "accounts/unknown"}
    assert await everything(two, "giver", "taker") == before
    await two.create_account("third")
    assert (await two.transfer("giver", "third", "4", request_id="id")).incoming.balance_after == "4"
    assert await admin.verify() == []


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        *(
            ({"amount": amount}, "amount")
            for amount in ("", "0", "-0", "-1", "0.0000001", "1000000000000", "+1", " 1", "1\n", "٣")
        ),
        ({"name": ""}, "name"),
        ({"name": "giver"}, "name"),
        ({"name": "accounts/-"}, "name"),
        ({"destination": ""}, "destination"),
        ({"destination": "accounts/-"}, "destination"),
        ({"destination": "accounts/giver"}, "destination"),
        ({"destination": "accounts/taker/balance"}, "destination"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"description": "x" * 1025}, "description"),
        ({"creator": User(name="without an id")}, "creator.id"),
        ({"labels": {"Upper": "x"}}, "labels"),
        ({"labels": {"location": ""}}, "labels.location"),
        ({"metadata": Struct(fields={"x": Value()})}, "metadata.x"),
    ],
    ids=lambda value: str(value)[:40].replace("\n", " "),
)
@only_sqlite
async def test_malformed_request_is_refused(two: Client, changes: dict[str, object], field: str) -> None:
    """A malformed transfer is refused with its field, and moves nothing."""
    fields = {"name": "accounts/giver", "destination": "accounts/taker", "amount": "1", **changes}
    request = TransferCreditsRequest(**fields)  # type: ignore[arg-type]
    refusal = await refusal_of(two.ledger.TransferCredits(request, metadata=two.metadata))
    assert (*refusal.verdict, *refusal.fields) == ("INVALID_ARGUMENT", "FIELD_INVALID", field)
    assert (await two.balance("giver")).amount == "10"
    assert await two.history("taker") == []


async def test_transfer_is_replayed(two: Client, clock: Clock) -> None:
    """A repeated transfer gets the same bytes and moves nothing more."""
    request = TransferCreditsRequest(
        name="accounts/giver", destination="accounts/taker", amount="6", request_id="id"
    ).SerializeToString()
    first = await two.raw_call("TransferCredits", request)
    clock.advance(100)
    await two.post("taker", CHARGE, "-6")
    assert await two.raw_call("TransferCredits", request) == first
    assert (await two.balance("giver")).amount == "4"
    assert len(await two.history("-")) == 4


async def test_request_id_belongs_to_the_source(two: Client) -> None:
    """A transfer's request_id belongs to its source, which can't reuse it; the destination can use it."""
    await two.transfer("giver", "taker", "6", request_id="id")
    assert (await two.transfer("taker", "giver", "1", request_id="id")).outgoing.balance_after == "5"
    for call in (
        two.transfer("giver", "taker", "5", request_id="id"),
        two.transfer("giver", "taker", "6.0", request_id="id"),
        two.post("giver", GRANT, "1", request_id="id"),
        two.post("taker", GRANT, "1", request_id="id"),
    ):
        assert (await refusal_of(call)).verdict == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")
    assert [(await two.balance(account_id)).amount for account_id in ("giver", "taker")] == ["5", "5"]


async def test_concurrent_repetitions(two: Client) -> None:
    """A transfer that is sent many times at once is posted once, and every call gets the same answer."""
    answers = await asyncio.gather(*(two.transfer("giver", "taker", "1", request_id="id") for _ in range(16)))
    assert all(answer == answers[0] for answer in answers)
    assert (await two.balance("giver")).amount == "9"


async def test_transfers_in_both_directions_at_once(two: Client, admin: Client) -> None:
    """Concurrent transfers in both directions don't deadlock, and neither create nor lose credits."""
    await two.post("taker", GRANT, "10", expire_time=after(3600))
    directions = [("giver", "taker"), ("taker", "giver")] * 32
    outcomes = await asyncio.wait_for(
        asyncio.gather(
            *(two.transfer(*direction, f"{1 + n % 7}") for n, direction in enumerate(directions)),
            return_exceptions=True,
        ),
        timeout=60,
    )
    refusals = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert all(isinstance(refusal, grpc.aio.AioRpcError) for refusal in refusals)
    assert {refusal.code().name for refusal in refusals if isinstance(refusal, grpc.aio.AioRpcError)} <= {
        "FAILED_PRECONDITION"
    }
    posted = [outcome for outcome in outcomes if isinstance(outcome, TransferCreditsResponse)]
    assert len(posted) > 32
    held = [await two.balance(account_id) for account_id in ("giver", "taker")]
    assert sum(float(each.amount) for each in held) == 20
    assert sum(float(each.expiring_amount) for each in held) == 10
    for account_id in ("giver", "taker"):
        rows = await two.history(account_id)
        assert [row.sequence for row in rows] == list(range(1, len(posted) + 2))
        assert min(float(row.balance_after) for row in rows) >= 0
    assert await admin.verify() == []


async def test_bound_credentials_move_nothing(server: Server, two: Client) -> None:
    """A credential bound to one side can't transfer in either direction, nor between other accounts."""
    await two.create_account("third")
    await two.post("taker", GRANT, "10")
    tenant_number = await server.book.credentials.tenant_number("house")
    assert tenant_number is not None
    bound = await server.client(tenant_number, account_id="giver")
    before = await everything(two, "giver", "taker", "third")
    for source, destination in (("giver", "taker"), ("taker", "giver"), ("taker", "third"), ("giver", "unknown")):
        refusal = await refusal_of(bound.transfer(source, destination, "1"))
        assert refusal.verdict == ("PERMISSION_DENIED", "ACCOUNT_NOT_PERMITTED")
    assert await everything(two, "giver", "taker", "third") == before


async def test_tenants_are_isolated(server: Server, two: Client) -> None:
    """No transfer goes to or comes from an account of another tenant, whatever its name."""
    stranger = await server.client(await server.create_tenant("stranger"))
    await stranger.create_account("abroad")
    await stranger.post("abroad", GRANT, "5")
    for caller, source, destination in (
        (two, "giver", "abroad"),
        (two, "abroad", "giver"),
        (stranger, "giver", "abroad"),
        (stranger, "abroad", "giver"),
    ):
        refusal = await refusal_of(caller.transfer(source, destination, "1"))
        assert refusal.verdict == ("NOT_FOUND", "ACCOUNT_NOT_FOUND")
    assert (await two.balance("giver")).amount == "10"
    assert (await stranger.balance("abroad")).amount == "5"


async def test_transfer_to_an_account_ahead(client: Client, admin: Client, clock: Clock) -> None:
    """A destination whose newest create_time is ahead of the clock can receive credits that are valid by the clock."""
    for account_id in ("giver", "taker"):
        await client.create_account(account_id)
    await client.post("giver", GRANT, "3")
    await client.post("giver", GRANT, "2", expire_time=after(5))
    clock.advance(10)
    await client.post("taker", GRANT, "1")
    clock.advance(-10)
    sides = await client.transfer("giver", "taker", "4")
    assert (sides.outgoing.create_time, sides.outgoing.expiring_amount) == (after(0), "-2")
    assert (sides.incoming.create_time, sides.incoming.expiring_amount) == (after(10), "2")
    assert (await client.balance("taker")).amount == "5"
    clock.advance(5)
    assert (await client.balance("taker")).amount == "3"
    refusal = await refusal_of(client.transfer("taker", "giver", "3.000001"))
    assert refusal.verdict == INSUFFICIENT
    assert await admin.verify() == []
