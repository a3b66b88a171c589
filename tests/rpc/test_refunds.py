"""Refunds over the wire: their fields, the lots to which credits return, and the limit of the charge."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from daybook.v1.account_pb2 import User
from daybook.v1.ledger_service_pb2 import RefundTransactionRequest, TransferCreditsRequest
from daybook.v1.transaction_pb2 import Allocation, Booking, EventTicket, Order, Transaction, Usage
from google.protobuf.struct_pb2 import Struct, Value

from tests.support.callers import Client, Server
from tests.support.clock import Clock, after
from tests.support.markers import only_sqlite
from tests.support.refusals import refusal_of

GRANT, CHARGE, REFUND = Transaction.GRANT, Transaction.CHARGE, Transaction.REFUND
EXCEEDS = ("FAILED_PRECONDITION", "REFUND_EXCEEDS_CHARGE")
UNKNOWN_UID = "0192f3a4-5b6c-7d8e-9f01-23456789abcd"


async def refund(client: Client, name: str, amount: str = "", *, request_id: str = "") -> Transaction:
    """Refunds an amount of a charge, or all that is left."""
    return await client.ledger.RefundTransaction(
        RefundTransactionRequest(name=name, amount=amount, request_id=request_id), metadata=client.metadata
    )


async def remaining(client: Client) -> list[str]:
    """The remaining amount of each lot of acme."""
    return [lot.remaining_amount for lot in await client.lots()]


async def test_refund(client: Client, clock: Clock) -> None:
    """A refund names its charge and has its owner, labels and subject; other fields come from its own request."""
    await client.create_account("acme")
    await client.post("acme", GRANT, "10", expire_time=after(3600))
    owner = User(id="u-1", name="Ada", surname="Lovelace")
    charge = await client.post(
        "acme",
        CHARGE,
        "-4",
        category="booking",
        description="A desk",
        owner=owner,
        creator=User(id="u-2"),
        labels={"location": "l-1", "membership": "m-1", "company": "c-1", "project": "x"},
        receipt_uri="https://example.com/receipt",
        metadata=Struct(fields={"of": Value(string_value="the charge")}),
        booking=Booking(id="b-1", resource=Booking.Resource(id="r-1", title="Desk")),
    )
    clock.advance(60)
    metadata = Struct(fields={"of": Value(string_value="the refund")})
    refunded = await client.ledger.RefundTransaction(
        RefundTransactionRequest(
            name=charge.name,
            amount="1.50",
            request_id="refund-7",
            description="Too loud",
            creator=User(id="u-3", name="Grace"),
            metadata=metadata,
        ),
        metadata=client.metadata,
    )
    assert refunded == Transaction(
        name=f"accounts/acme/transactions/{refunded.uid}",
        uid=refunded.uid,
        sequence=3,
        create_time=after(60),
        kind=REFUND,
        category="refund",
        state=Transaction.SUCCEEDED,
        amount="1.5",
        expiring_amount="1.5",
        permanent_amount="0",
        balance_after="7.5",
        description="Too loud",
        owner=owner,
        creator=User(id="u-3", name="Grace"),
        labels=charge.labels,
        metadata=metadata,
        request_id="refund-7",
        refund_of=charge.name,
        booking=charge.booking,
    )
    full = await client.full(refunded.name)
    assert list(full.allocations) == [Allocation(lot="accounts/acme/lots/1", amount="1.5", expire_time=after(3600))]
    assert (await client.history())[2] == refunded
    assert (await client.history())[1] == charge, "a charge that is refunded stays as it was"


@pytest.mark.parametrize(
    ("subject", "copied"),
    [
        (Transaction(booking=Booking(id="b")), True),
        (Transaction(order=Order(id="o", product=Order.Product(id="p"), option=Order.Option(id="x"))), True),
        (Transaction(event_ticket=EventTicket(id="t", event=EventTicket.Event(id="e"))), True),
        (Transaction(usage=Usage(model="m", input_tokens=1)), False),
        (Transaction(), False),
    ],
    ids=["booking", "order", "event_ticket", "usage", "none"],
)
@only_sqlite
async def test_subject_of_a_refund(client: Client, subject: Transaction, copied: bool) -> None:
    """A refund has the subject of its charge, except usage, which is not undone."""
    await client.create_account("acme", credit_limit="5")
    field = subject.WhichOneof("subject")
    fields = {} if field is None else {field: getattr(subject, field)}
    charge = await client.post("acme", CHARGE, "-1", **fields)
    refunded = await refund(client, charge.name)
    assert refunded.WhichOneof("subject") == (field if copied else None)
    if copied:
        assert field is not None
        assert getattr(refunded, field) == getattr(subject, field)
    assert not refunded.HasField("owner")
    assert not refunded.HasField("creator")


async def test_refunds_never_exceed_the_charge(client: Client, admin: Client) -> None:
    """A charge can be refunded in any number of parts, up to its amount."""
    await client.create_account("acme")
    await client.post("acme", GRANT, "10")
    charge = await client.post("acme", CHARGE, "-3")
    assert (await refund(client, charge.name, "0.000001")).balance_after == "7.000001"
    refusal = await refusal_of(refund(client, charge.name, "3"))
    assert refusal.verdict == EXCEEDS
    assert refusal.metadata == {"transaction": charge.name, "refundable_amount": "2.999999"}
    assert (await refund(client, charge.name, "1")).balance_after == "8.000001"
    assert (await refund(client, charge.name)).amount == "1.999999"
    for amount in ("", "0.000001", "999999999999.999999"):
        refusal = await refusal_of(refund(client, charge.name, amount))
        assert refusal.verdict == EXCEEDS
        assert refusal.metadata["refundable_amount"] == "0"
    assert (await client.balance()).amount == "10"
    assert await remaining(client) == ["10"]
    assert len(await client.history()) == 5
    assert await admin.verify() == []


async def test_refund_returns_the_last_taken_credits_first(client: Client, admin: Client) -> None:
    """Credits return to the lots of the charge, the last taken first."""
    await client.create_account("acme")
    await client.post("acme", GRANT, "5")
    await client.post("acme", GRANT, "3", expire_time=after(3600))
    await client.post("acme", GRANT, "2", priority=-1)
    charge = await client.post("acme", CHARGE, "-9")
    assert await remaining(client) == ["1", "0", "0"]
    first = await refund(client, charge.name, "5")
    assert await remaining(client) == ["5", "1", "0"]
    assert (first.expiring_amount, first.permanent_amount) == ("1", "4")
    second = await refund(client, charge.name, "3")
    assert await remaining(client) == ["5", "3", "1"]
    assert (second.expiring_amount, second.permanent_amount) == ("2", "1")
    await refund(client, charge.name)
    assert await remaining(client) == ["5", "3", "2"]
    assert len(await client.lots()) == 3
    assert await admin.verify() == []


async def test_refund_of_expired_credits(client: Client, admin: Client, clock: Clock) -> None:
    """Credits of an expired lot return in a new lot, with the lifetime that the old one had left at the charge."""
    await client.create_account("acme")
    await client.post("acme", GRANT, "5", expire_time=after(1000), priority=7)
    await client.post("acme", GRANT, "5", priority=8)
    clock.advance(400)
    charge = await client.post("acme", CHARGE, "-6")
    clock.advance(1600)
    refunded = await refund(client, charge.name)
    assert (refunded.expiring_amount, refunded.permanent_amount, refunded.balance_after) == ("5", "1", "10")
    lots = await client.lots()
    assert [lot.remaining_amount for lot in lots] == ["0", "5", "5"]
    new = lots[2]
    # 600 seconds were left at the charge; the refund is at 2000.
    assert (new.sequence, new.amount, new.expire_time, new.priority) == (refunded.sequence, "5", after(2600), 7)
    assert [each.lot for each in (await client.full(refunded.name)).allocations] == [
        "accounts/acme/lots/2",
        "accounts/acme/lots/3",
    ]
    clock.advance(600)
    assert (await client.balance()).amount == "5"
    assert await admin.verify() == []


async def test_refund_at_the_expire_time(client: Client, clock: Clock) -> None:
    """A lot that expires at the instant of the refund has expired, so the credits return in a new lot."""
    await client.create_account("acme")
    await client.post("acme", GRANT, "5", expire_time=after(10))
    charge = await client.post("acme", CHARGE, "-5")
    clock.advance(10)
    await refund(client, charge.name)
    lots = await client.lots()
    assert [(lot.remaining_amount, lot.expire_time) for lot in lots] == [("0", after(10)), ("5", after(20))]


async def test_refund_of_debt(client: Client, admin: Client) -> None:
    """Refunded debt reduces the debt; if it is paid already, the credits return as permanent ones."""
    await client.create_account("acme", credit_limit="10")
    await client.post("acme", GRANT, "2", expire_time=after(3600))
    charge = await client.post("acme", CHARGE, "-8")
    assert (await client.balance()).amount == "-6"
    refunded = await refund(client, charge.name, "1")
    assert (refunded.permanent_amount, refunded.balance_after) == ("1", "-5")
    assert list((await client.full(refunded.name)).allocations) == [Allocation(amount="1")]
    await client.post("acme", GRANT, "5", expire_time=after(3600))
    refunded = await refund(client, charge.name)
    held = await client.balance()
    assert (held.amount, held.expiring_amount, held.permanent_amount) == ("7", "2", "5")
    assert [(each.lot, each.amount) for each in (await client.full(refunded.name)).allocations] == [
        ("accounts/acme/lots/2", "5"),
        ("accounts/acme/lots/1", "2"),
    ]
    assert await admin.verify() == []


async def test_refund_pays_debt_first(client: Client, admin: Client) -> None:
    """A refund pays the debt of another charge before credits return to lots."""
    await client.create_account("acme", credit_limit="10")
    await client.post("acme", GRANT, "5")
    charge = await client.post("acme", CHARGE, "-5")
    await client.post("acme", CHARGE, "-3")
    refunded = await refund(client, charge.name)
    assert refunded.balance_after == "2"
    assert await remaining(client) == ["2"]
    assert [(each.lot, each.amount) for each in (await client.full(refunded.name)).allocations] == [
        ("", "3"),
        ("accounts/acme/lots/1", "2"),
    ]
    assert await admin.verify() == []


@pytest.mark.parametrize(
    "source", ["grant", "adjustment", "failed", "canceled", "refund", "transfer out", "transfer in", "expiration"]
)
async def test_only_successful_charges_are_refundable(client: Client, clock: Clock, source: str) -> None:
    """Only a charge that succeeded can be refunded."""
    await client.create_account("acme")
    await client.create_account("other")
    grant = await client.post("acme", GRANT, "10", expire_time=after(1))
    match source:
        case "grant":
            name = grant.name
        case "adjustment":
            name = (await client.post("acme", Transaction.ADJUSTMENT, "-1")).name
        case "failed":
            name = (await client.post("acme", CHARGE, "-1", state=Transaction.FAILED)).name
        case "canceled":
            name = (await client.post("acme", CHARGE, "-1", state=Transaction.CANCELED)).name
        case "refund":
            name = (await refund(client, (await client.post("acme", CHARGE, "-1")).name)).name
        case "expiration":
            clock.advance(1)
            await client.post("acme", GRANT, "1")
            name = (await client.history())[1].name
        case _:
            sides = await client.ledger.TransferCredits(
                TransferCreditsRequest(name="accounts/acme", destination="accounts/other", amount="1"),
                metadata=client.metadata,
            )
            name = (sides.outgoing if source == "transfer out" else sides.incoming).name
    held = await client.balance()
    for amount in ("", "0.5", "100"):
        refusal = await refusal_of(refund(client, name, amount))
        assert refusal.verdict == ("FAILED_PRECONDITION", "NOT_REFUNDABLE")
        assert refusal.metadata == {"transaction": name}
    assert await client.balance() == held


async def test_refund_of_an_unknown_transaction(server: Server, client: Client) -> None:
    """A transaction that the account lacks is NOT_FOUND, even if another account or tenant has it."""
    for account_id in ("acme", "other"):
        await client.create_account(account_id, credit_limit="5")
    charge = await client.post("acme", CHARGE, "-1")
    unknown = f"accounts/acme/transactions/{UNKNOWN_UID}"
    elsewhere = f"accounts/other/transactions/{charge.uid}"
    for name in (unknown, elsewhere):
        refusal = await refusal_of(refund(client, name))
        assert refusal.verdict == ("NOT_FOUND", "TRANSACTION_NOT_FOUND")
        assert refusal.metadata == {"transaction": name}
    refusal = await refusal_of(refund(client, f"accounts/unknown/transactions/{charge.uid}"))
    assert refusal.verdict == ("NOT_FOUND", "ACCOUNT_NOT_FOUND")
    stranger = await server.client(await server.create_tenant("stranger"))
    assert (await refusal_of(refund(stranger, charge.name))).verdict == ("NOT_FOUND", "ACCOUNT_NOT_FOUND")
    await stranger.create_account("acme", credit_limit="5")
    assert (await refusal_of(refund(stranger, charge.name))).verdict == ("NOT_FOUND", "TRANSACTION_NOT_FOUND")
    assert (await client.balance()).amount == "-1"


async def test_bound_credential(server: Server, client: Client) -> None:
    """A bound credential refunds only the charges of its own account."""
    for account_id in ("acme", "other"):
        await client.create_account(account_id, credit_limit="5")
    own, foreign = [await client.post(account_id, CHARGE, "-1") for account_id in ("acme", "other")]
    tenant_number = await server.book.credentials.tenant_number("house")
    assert tenant_number is not None
    bound = await server.client(tenant_number, account_id="acme")
    for name in (foreign.name, f"accounts/unknown/transactions/{UNKNOWN_UID}"):
        refusal = await refusal_of(refund(bound, name))
        assert refusal.verdict == ("PERMISSION_DENIED", "ACCOUNT_NOT_PERMITTED")
    assert (await client.balance("other")).amount == "-1"
    assert (await refund(bound, own.name)).balance_after == "0"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        *(
            ({"amount": amount}, "amount")
            for amount in ("0", "-1", "-0", "0.0000001", "1.0000000", "1000000000000", "+1", "1e0", " 1", "1\n", "all")
        ),
        ({"name": ""}, "name"),
        ({"name": "accounts/acme"}, "name"),
        ({"name": f"accounts/-/transactions/{UNKNOWN_UID}"}, "name"),
        ({"name": f"accounts/acme/transactions/{UNKNOWN_UID.upper()}"}, "name"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"request_id": "é"}, "request_id"),
        ({"description": "x" * 1025}, "description"),
        ({"creator": User()}, "creator.id"),
        ({"metadata": Struct(fields={"x": Value(number_value=float("nan"))})}, "metadata.x"),
    ],
    ids=lambda value: str(value)[:40].replace("\n", " "),
)
@only_sqlite
async def test_malformed_request_is_refused(client: Client, changes: dict[str, object], field: str) -> None:
    """A malformed refund is refused with its field, and refunds nothing."""
    await client.create_account("acme", credit_limit="5")
    charge = await client.post("acme", CHARGE, "-2")
    request = RefundTransactionRequest(**{"name": charge.name, **changes})  # type: ignore[arg-type]
    refusal = await refusal_of(client.ledger.RefundTransaction(request, metadata=client.metadata))
    assert (*refusal.verdict, *refusal.fields) == ("INVALID_ARGUMENT", "FIELD_INVALID", field)
    assert (await client.balance()).amount == "-2"


async def test_refund_is_replayed(client: Client, clock: Clock) -> None:
    """A repeated refund gets the same bytes and refunds nothing more, also when nothing is left."""
    await client.create_account("acme", credit_limit="5")
    charge = await client.post("acme", CHARGE, "-2")
    request = RefundTransactionRequest(name=charge.name, request_id="id").SerializeToString()
    first = await client.raw_call("RefundTransaction", request)
    clock.advance(100)
    await client.post("acme", CHARGE, "-1")
    assert await client.raw_call("RefundTransaction", request) == first
    assert Transaction.FromString(first).request_id == "id"
    assert (await client.balance()).amount == "-1"
    assert len(await client.history()) == 3


async def test_used_request_id_is_refused(client: Client) -> None:
    """A request_id that any other request has used is refused; the id of a refused refund is free."""
    await client.create_account("acme", credit_limit="5")
    charge = await client.post("acme", CHARGE, "-2", request_id="charge")
    assert (await refusal_of(refund(client, charge.name, "3", request_id="refund"))).verdict == EXCEEDS
    refunded = await refund(client, charge.name, "1", request_id="refund")
    assert refunded.amount == "1"
    for call in (
        refund(client, charge.name, "1", request_id="charge"),
        refund(client, charge.name, "1.0", request_id="refund"),
        refund(client, charge.name, request_id="refund"),
        client.post("acme", GRANT, "1", request_id="refund"),
    ):
        assert (await refusal_of(call)).verdict == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")
    assert (await client.balance()).amount == "-1"


async def test_concurrent_refunds(client: Client, admin: Client) -> None:
    """Concurrent refunds together never exceed the charge."""
    await client.create_account("acme", credit_limit="10")
    charge = await client.post("acme", CHARGE, "-10")
    outcomes = await asyncio.gather(*(refund(client, charge.name, "1.5") for _ in range(24)), return_exceptions=True)
    refusals = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
    assert len(outcomes) - len(refusals) == 6
    assert {refusal.code() for refusal in refusals} == {grpc.StatusCode.FAILED_PRECONDITION}
    assert (await client.balance()).amount == "-1"
    assert (await refund(client, charge.name)).amount == "1"
    assert await admin.verify() == []


async def test_concurrent_repetitions(client: Client) -> None:
    """A refund that is sent many times at once is posted once, and every call gets the same answer."""
    await client.create_account("acme", credit_limit="10")
    charge = await client.post("acme", CHARGE, "-10")
    answers = await asyncio.gather(*(refund(client, charge.name, "1", request_id="id") for _ in range(16)))
    assert all(answer == answers[0] for answer in answers)
    assert (await client.balance()).amount == "-9"
