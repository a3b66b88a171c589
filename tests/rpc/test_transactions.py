"""Transactions over the wire: what callers can post, and refusals, which change nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from uuid import UUID

import grpc
import pytest
from daybook.v1.account_pb2 import Account, Balance, User
from daybook.v1.ledger_service_pb2 import (
    CreateTransactionRequest,
    GetBalanceRequest,
    GetTransactionRequest,
    UpdateAccountRequest,
)
from daybook.v1.transaction_pb2 import Booking, EventTicket, Order, Transaction, Usage
from google.protobuf.struct_pb2 import Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp

from server.book import open_book
from server.ledger.instants import to_timestamp
from server.ledger.posting import Kind
from tests.support.callers import Client
from tests.support.clock import NOON, Clock
from tests.support.markers import only_sqlite, shares_a_server
from tests.support.refusals import refusal_of

GRANT, CHARGE, ADJUSTMENT = Transaction.GRANT, Transaction.CHARGE, Transaction.ADJUSTMENT
LARGEST = "999999999999.999999"


async def balance(client: Client, account_id: str = "acme") -> Balance:
    """The account's balance."""
    return await client.ledger.GetBalance(
        GetBalanceRequest(name=f"accounts/{account_id}/balance"), metadata=client.metadata
    )


async def get(client: Client, name: str) -> Transaction:
    """The transaction with this name."""
    return await client.ledger.GetTransaction(GetTransactionRequest(name=name), metadata=client.metadata)


async def test_posted_transaction(client: Client) -> None:
    """A transaction has every field that the caller set, and Daybook sets the rest."""
    await client.create_account("acme")
    details = Transaction(
        kind=GRANT,
        category="credit_package",
        amount="12.500",
        description="Ten hours",
        owner=User(id="u-1", name="Ada", photo_uri="https://example.com/ada.png"),
        creator=User(id="u-2", name="Grace", membership="m-2"),
        labels={"location": "l-1", "membership": "m-1", "company": "c-1", "project": "x"},
        receipt_uri="https://example.com/receipt",
        metadata=Struct(fields={"deep": Value(struct_value=Struct(fields={"n": Value(number_value=1.5)}))}),
        order=Order(id="o-1", product=Order.Product(id="p-1", title="Pack"), option=Order.Option(id="x", name="XL")),
    )
    posted = await client.ledger.CreateTransaction(
        CreateTransactionRequest(parent="accounts/acme", transaction=details, request_id="invoice-7"),
        metadata=client.metadata,
    )
    expected = Transaction()
    expected.CopyFrom(details)
    expected.MergeFrom(
        Transaction(
            name=f"accounts/acme/transactions/{posted.uid}",
            uid=posted.uid,
            sequence=1,
            create_time=to_timestamp(NOON),
            state=Transaction.SUCCEEDED,
            amount="12.5",
            expiring_amount="0",
            permanent_amount="12.5",
            balance_after="12.5",
            request_id="invoice-7",
        )
    )
    assert posted == expected
    uid = UUID(posted.uid)
    assert (uid.version, uid.variant, str(uid)) == (7, "specified in RFC 4122", posted.uid)
    assert uid.int >> 80 == NOON // 1000, "the uid has the create_time in milliseconds"
    assert await get(client, posted.name) == posted
    assert await client.history() == [posted]


@pytest.mark.parametrize(
    ("subject", "field"),
    [
        (Transaction(booking=Booking(id="b", resource=Booking.Resource(id="r", title="Desk"))), "booking"),
        (Transaction(order=Order(id="o")), "order"),
        (
            Transaction(
                event_ticket=EventTicket(
                    id="t",
                    create_time=Timestamp(seconds=1, nanos=1),
                    event=EventTicket.Event(id="e", start_time=Timestamp(), end_time=Timestamp(seconds=2)),
                )
            ),
            "event_ticket",
        ),
        (Transaction(usage=Usage(model="m", input_tokens=0, output_tokens=2**62, cost_usd="0.000001")), "usage"),
        (Transaction(usage=Usage()), "usage"),
    ],
)
@only_sqlite
async def test_subjects(client: Client, subject: Transaction, field: str) -> None:
    """Every subject is stored as given, also its fields that are set to zero."""
    await client.create_account("acme", credit_limit="5")
    subject.MergeFrom(Transaction(kind=CHARGE, category="test", amount="-1"))
    posted = await client.ledger.CreateTransaction(
        CreateTransactionRequest(parent="accounts/acme", transaction=subject), metadata=client.metadata
    )
    assert posted.WhichOneof("subject") == field
    assert getattr(posted, field) == getattr(subject, field)
    assert await get(client, posted.name) == posted


@pytest.mark.parametrize(
    ("kind", "amount", "written"),
    [
        (GRANT, "1", "1"),
        (GRANT, "1.0", "1"),
        (GRANT, "1.500000", "1.5"),
        (GRANT, "000000000007.25", "7.25"),
        (GRANT, "100", "100"),
        (GRANT, "0.000001", "0.000001"),
        (GRANT, "0.1", "0.1"),
        (GRANT, "999999999999.999999", "999999999999.999999"),
        (GRANT, "123456789012.345678", "123456789012.345678"),
        (CHARGE, "-0.10", "-0.1"),
        (CHARGE, "-000010.000", "-10"),
        (CHARGE, "-999999999999.999999", "-999999999999.999999"),
        (ADJUSTMENT, "0.5", "0.5"),
        (ADJUSTMENT, "-0.5", "-0.5"),
    ],
)
@only_sqlite
async def test_amounts_are_exact(client: Client, kind: Kind, amount: str, written: str) -> None:
    """An amount is returned as the same number in its shortest form, in every answer."""
    await client.create_account("acme", credit_limit=LARGEST)
    posted = await client.post("acme", kind, amount)
    assert (posted.amount, posted.permanent_amount, posted.balance_after) == (written, written, written)
    assert await client.history() == [posted]
    assert (await balance(client)).amount == written


@only_sqlite
async def test_sums_are_exact(client: Client) -> None:
    """Ten times 0.1 is 1, and sums that no double can represent are exact."""
    await client.create_account("acme")
    after = [(await client.post("acme", GRANT, "0.1")).balance_after for _ in range(10)]
    assert after == ["0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "1"]
    assert (await client.post("acme", GRANT, "999999999998.999998")).balance_after == "999999999999.999998"
    assert (await client.post("acme", CHARGE, "-999999999999.999997")).balance_after == "0.000001"


@only_sqlite
async def test_sequences_and_balances(client: Client) -> None:
    """Each account has its own sequence, from 1, and its own balance."""
    for account_id in ("acme", "other"):
        await client.create_account(account_id)
    steps = [("acme", "5"), ("other", "7"), ("acme", "-2"), ("acme", "-3"), ("other", "0.5"), ("acme", "1")]
    posted = [
        await client.post(account_id, CHARGE if amount.startswith("-") else GRANT, amount)
        for account_id, amount in steps
    ]
    assert [(each.name.split("/")[1], each.sequence, each.balance_after) for each in posted] == [
        ("acme", 1, "5"),
        ("other", 1, "7"),
        ("acme", 2, "3"),
        ("acme", 3, "0"),
        ("other", 2, "7.5"),
        ("acme", 4, "1"),
    ]


async def test_time_never_decreases(client: Client, clock: Clock) -> None:
    """If the clock goes back, a transaction gets the create_time of its predecessor."""
    await client.create_account("acme")
    await client.create_account("other")
    times = []
    for seconds in (0, -3600, 3600.000001, -0.5):
        clock.advance(seconds)
        times.append((await client.post("acme", GRANT, "1")).create_time)
    assert times == [to_timestamp(NOON)] * 2 + [to_timestamp(NOON + 1)] * 2
    assert (await client.post("other", GRANT, "1")).create_time == to_timestamp(clock.now)


def changed(**fields: object) -> CreateTransactionRequest:
    """A valid request, except for these fields of its transaction."""
    transaction = Transaction(kind=GRANT, category="test", amount="1")
    for name in fields:
        transaction.ClearField(name)  # type: ignore[arg-type]
    transaction.MergeFrom(Transaction(**fields))  # type: ignore[arg-type]
    return CreateTransactionRequest(parent="accounts/acme", transaction=transaction)


WRONG_FIELDS: list[tuple[CreateTransactionRequest, str]] = [
    (CreateTransactionRequest(transaction=changed().transaction), "parent"),
    (CreateTransactionRequest(parent="acme", transaction=changed().transaction), "parent"),
    (CreateTransactionRequest(parent="accounts/", transaction=changed().transaction), "parent"),
    (CreateTransactionRequest(parent="accounts/-", transaction=changed().transaction), "parent"),
    (CreateTransactionRequest(parent="accounts/acme/", transaction=changed().transaction), "parent"),
    (CreateTransactionRequest(parent="accounts/acme\0", transaction=changed().transaction), "parent"),
    (CreateTransactionRequest(parent="accounts/acme"), "transaction.kind"),
    (changed(kind=0), "transaction.kind"),
    (changed(kind=Transaction.REFUND), "transaction.kind"),
    (changed(kind=Transaction.TRANSFER_IN), "transaction.kind"),
    (changed(kind=Transaction.TRANSFER_OUT, amount="-1"), "transaction.kind"),
    (changed(kind=Transaction.EXPIRATION, amount="-1"), "transaction.kind"),
    (changed(kind=99), "transaction.kind"),
    (changed(kind=-1), "transaction.kind"),
    (changed(category=""), "transaction.category"),
    (changed(category="Test"), "transaction.category"),
    (changed(category="1test"), "transaction.category"),
    (changed(category="_test"), "transaction.category"),
    (changed(category="te-st"), "transaction.category"),
    (changed(category="test\n"), "transaction.category"),
    (changed(category="é"), "transaction.category"),
    (changed(category="a" * 64), "transaction.category"),
    (changed(state=99), "transaction.state"),
    (changed(amount=""), "transaction.amount"),
    (changed(amount="0"), "transaction.amount"),
    (changed(amount="-0"), "transaction.amount"),
    (changed(amount="0.000000"), "transaction.amount"),
    (changed(amount="-1"), "transaction.amount"),
    (changed(amount="1", kind=CHARGE), "transaction.amount"),
    (changed(amount="0", kind=CHARGE), "transaction.amount"),
    (changed(amount="0", kind=ADJUSTMENT), "transaction.amount"),
    (changed(amount="+1"), "transaction.amount"),
    (changed(amount="1e1"), "transaction.amount"),
    (changed(amount="1."), "transaction.amount"),
    (changed(amount=".1"), "transaction.amount"),
    (changed(amount="1,5"), "transaction.amount"),
    (changed(amount=" 1"), "transaction.amount"),
    (changed(amount="1\n"), "transaction.amount"),
    (changed(amount="--1"), "transaction.amount"),
    (changed(amount="0x10"), "transaction.amount"),
    (changed(amount="1_000"), "transaction.amount"),
    (changed(amount="inf"), "transaction.amount"),
    (changed(amount="NaN"), "transaction.amount"),
    (changed(amount="٣"), "transaction.amount"),
    (changed(amount="1.0000001"), "transaction.amount"),
    (changed(amount="1.0000000"), "transaction.amount"),
    (changed(amount="1000000000000"), "transaction.amount"),
    (changed(amount="0000000000001"), "transaction.amount"),
    (changed(amount="9" * 100_000), "transaction.amount"),
    (changed(description="x" * 1025), "transaction.description"),
    (changed(description="a\0b"), "transaction.description"),
    (changed(receipt_uri="x" * 2049), "transaction.receipt_uri"),
    (changed(owner=User()), "transaction.owner.id"),
    (changed(creator=User(name="Ada")), "transaction.creator.id"),
    (changed(creator=User(id="x" * 129)), "transaction.creator.id"),
    (changed(labels={"Key": "x"}), "transaction.labels"),
    (changed(labels={"": "x"}), "transaction.labels"),
    (changed(labels={"a" * 64: "x"}), "transaction.labels"),
    (changed(labels={"location": ""}), "transaction.labels.location"),
    (changed(labels={"location": "x" * 129}), "transaction.labels.location"),
    (changed(labels={"location": "a\0"}), "transaction.labels.location"),
    (changed(labels={f"key_{number}": "x" for number in range(33)}), "transaction.labels"),
    (changed(metadata=Struct(fields={"x": Value(string_value="x" * 8192)})), "transaction.metadata"),
    (changed(booking=Booking()), "transaction.booking.id"),
    (changed(order=Order(product=Order.Product(id="p"))), "transaction.order.id"),
    (changed(event_ticket=EventTicket()), "transaction.event_ticket.id"),
    (
        changed(event_ticket=EventTicket(id="t", create_time=Timestamp(nanos=-1))),
        "transaction.event_ticket.create_time",
    ),
    (
        changed(event_ticket=EventTicket(id="t", event=EventTicket.Event(end_time=Timestamp(seconds=10**12)))),
        "transaction.event_ticket.event.end_time",
    ),
    (changed(usage=Usage()), "transaction.usage"),
    (changed(kind=ADJUSTMENT, amount="-1", usage=Usage()), "transaction.usage"),
    (changed(kind=CHARGE, amount="-1", usage=Usage(input_tokens=-1)), "transaction.usage.input_tokens"),
    (changed(kind=CHARGE, amount="-1", usage=Usage(output_tokens=-(2**63))), "transaction.usage.output_tokens"),
    (changed(kind=CHARGE, amount="-1", usage=Usage(model="x" * 256)), "transaction.usage.model"),
    (changed(kind=CHARGE, amount="-1", usage=Usage(cost_usd="")), "transaction.usage.cost_usd"),
    (changed(kind=CHARGE, amount="-1", usage=Usage(cost_usd="-0.01")), "transaction.usage.cost_usd"),
    (changed(kind=CHARGE, amount="-1", usage=Usage(cost_usd="0.0000001")), "transaction.usage.cost_usd"),
    # Fields that only the server sets are refused, since a caller may mean them as input.
    (changed(name="accounts/acme/transactions/x"), "transaction.name"),
    (changed(uid="0192f3a4-5b6c-7d8e-9f01-23456789abcd"), "transaction.uid"),
    (changed(sequence=10**9), "transaction.sequence"),
    (changed(create_time=Timestamp(seconds=1)), "transaction.create_time"),
    (changed(expiring_amount="1"), "transaction.expiring_amount"),
    (changed(permanent_amount="7"), "transaction.permanent_amount"),
    (changed(balance_after="1"), "transaction.balance_after"),
    (changed(request_id="x"), "transaction.request_id"),
    (changed(refund_of="accounts/acme/transactions/x"), "transaction.refund_of"),
    (changed(transfer_peer="accounts/acme/transactions/x"), "transaction.transfer_peer"),
]


def short(value: object) -> str:
    """The test id of a row."""
    return str(value).replace("\n", " ")[:60]


@shares_a_server
@pytest.mark.parametrize(("request_message", "field"), WRONG_FIELDS, ids=short)
async def test_invalid_field_is_refused(
    shared_client: Client, request_message: CreateTransactionRequest, field: str
) -> None:
    """An invalid field gets INVALID_ARGUMENT with the field's name, and nothing is posted."""
    before = await shared_client.post("acme", GRANT, "1")
    refusal = await refusal_of(shared_client.ledger.CreateTransaction(request_message, metadata=shared_client.metadata))
    assert (*refusal.verdict, *refusal.fields) == ("INVALID_ARGUMENT", "FIELD_INVALID", field)
    assert refusal.metadata == {"field": field}
    assert refusal.message.startswith(f"{field}: ")
    assert len(refusal.message) < 1000, "a long value is not quoted in full"
    held = await balance(shared_client)
    assert (held.amount, held.sequence) == (before.balance_after, before.sequence)


@only_sqlite
@pytest.mark.parametrize(
    ("request_message", "is_stored"),
    [
        (changed(category="a" * 63), True),
        (changed(category="a_1"), True),
        (changed(description="😀" * 1024), True),
        (changed(receipt_uri="é" * 2048), True),
        (changed(labels={f"key_{number}": "😀" * 128 for number in range(32)}), True),
        (changed(labels={"a" * 63: "x"}), True),
        (changed(metadata=Struct(fields={"x": Value(string_value="x" * 8170)})), True),
        (changed(description="\u202e\N{COMBINING ACUTE ACCENT}\u2028\ufeff\t\n\x01"), True),
        (changed(kind=CHARGE, amount="-1", usage=Usage(input_tokens=2**63 - 1)), True),
        (changed(state=Transaction.SUCCEEDED), True),
    ],
    ids=short,
)
async def test_bounds_are_inclusive(client: Client, request_message: CreateTransactionRequest, is_stored: bool) -> None:
    """A value at its bound is stored unchanged."""
    await client.create_account("acme", credit_limit="1")
    posted = await client.ledger.CreateTransaction(request_message, metadata=client.metadata)
    sent = request_message.transaction
    assert (
        (posted.category, posted.description, posted.receipt_uri, posted.metadata, posted.usage, dict(posted.labels))
        == (sent.category, sent.description, sent.receipt_uri, sent.metadata, sent.usage, dict(sent.labels))
    ) == is_stored
    assert await get(client, posted.name) == posted


@only_sqlite
@pytest.mark.parametrize(
    ("wrong", "verdict"),
    [
        ("parent, amount, request_id", ("INVALID_ARGUMENT", "FIELD_INVALID")),
        ("unknown account, malformed amount", ("INVALID_ARGUMENT", "FIELD_INVALID")),
        ("unknown account, no credits", ("NOT_FOUND", "ACCOUNT_NOT_FOUND")),
        ("reused request_id, no credits", ("ALREADY_EXISTS", "REQUEST_ID_REUSED")),
        ("reused request_id, malformed amount", ("INVALID_ARGUMENT", "FIELD_INVALID")),
        ("no credits", ("FAILED_PRECONDITION", "INSUFFICIENT_CREDITS")),
        ("out of range", ("FAILED_PRECONDITION", "BALANCE_OUT_OF_RANGE")),
    ],
)
async def test_precedence(client: Client, wrong: str, verdict: tuple[str, str]) -> None:
    """Of several faults the refusal names the one that depends least on the ledger's state, and nothing changes."""
    await client.create_account("acme")
    await client.post("acme", GRANT, "10", request_id="used")
    before = await balance(client)
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "parent, amount, request_id": lambda: client.post("-", GRANT, "x", request_id="é"),
        "unknown account, malformed amount": lambda: client.post("unknown", GRANT, "x"),
        "unknown account, no credits": lambda: client.post("unknown", CHARGE, "-11"),
        "reused request_id, no credits": lambda: client.post("acme", CHARGE, "-11", request_id="used"),
        "reused request_id, malformed amount": lambda: client.post("acme", CHARGE, "x", request_id="used"),
        "no credits": lambda: client.post("acme", CHARGE, "-11"),
        "out of range": lambda: client.post("acme", GRANT, LARGEST),
    }
    refusal = await refusal_of(calls[wrong]())
    assert refusal.verdict == verdict
    assert await balance(client) == before
    assert (await client.post("acme", GRANT, "1")).sequence == 2


@pytest.mark.parametrize(
    ("credit_limit", "kind", "amount", "available_amount"),
    [
        ("0", CHARGE, "-10", None),
        ("0", ADJUSTMENT, "-10", None),
        ("0", CHARGE, "-10.000001", "10"),
        ("0", ADJUSTMENT, "-10.000001", "10"),
        ("0.5", CHARGE, "-10.5", None),
        ("0.5", CHARGE, "-10.500001", "10.5"),
        ("0.5", CHARGE, "-999999999999.999999", "10.5"),
    ],
)
@only_sqlite
async def test_credit_limit(
    client: Client, credit_limit: str, kind: Kind, amount: str, available_amount: str | None
) -> None:
    """A balance may reach minus the credit limit, and not a millionth less."""
    await client.create_account("acme", credit_limit=credit_limit)
    await client.post("acme", GRANT, "10")
    call = client.post("acme", kind, amount)
    if available_amount is None:
        await call
        assert (await balance(client)).available_amount == "0"
        return
    refusal = await refusal_of(call)
    assert refusal.verdict == ("FAILED_PRECONDITION", "INSUFFICIENT_CREDITS")
    assert refusal.metadata == {"account": "accounts/acme", "available_amount": available_amount, "amount": amount}
    held = await balance(client)
    assert (held.amount, held.sequence) == ("10", 1)


@only_sqlite
async def test_raised_credit_limit_applies_at_once(client: Client) -> None:
    """A raised limit applies to the next charge."""
    await client.create_account("acme")
    assert (await refusal_of(client.post("acme", CHARGE, "-3"))).reason == "INSUFFICIENT_CREDITS"
    await client.ledger.UpdateAccount(
        UpdateAccountRequest(account=Account(name="accounts/acme", credit_limit="3")), metadata=client.metadata
    )
    assert (await client.post("acme", CHARGE, "-3")).balance_after == "-3"


@pytest.mark.parametrize(("kind", "amount"), [(GRANT, "0.000001"), (ADJUSTMENT, "0.000001"), (GRANT, LARGEST)])
async def test_balance_out_of_range(client: Client, kind: Kind, amount: str) -> None:
    """A balance may reach 999999999999.999999, and not a millionth more."""
    await client.create_account("acme")
    assert (await client.post("acme", GRANT, LARGEST)).balance_after == LARGEST
    refusal = await refusal_of(client.post("acme", kind, amount))
    assert refusal.verdict == ("FAILED_PRECONDITION", "BALANCE_OUT_OF_RANGE")
    assert refusal.metadata == {"account": "accounts/acme"}
    assert (await balance(client)).amount == LARGEST
    assert (await client.post("acme", CHARGE, f"-{LARGEST}")).balance_after == "0"


async def test_usage_of_an_hour_is_not_bounded_by_a_column(client: Client) -> None:
    """Any amount of usage within an hour is posted, or refused with a reason.

    Ten times the largest amount exceeds a 64-bit column of millionths.
    """
    await client.create_account("acme")
    for turn in range(1, 11):
        await client.post("acme", GRANT, LARGEST)
        try:
            await client.post("acme", CHARGE, f"-{LARGEST}", category="computing", usage=Usage(model="m"))
        except grpc.aio.AioRpcError as error:
            code = error.code()
        else:
            continue
        assert code is grpc.StatusCode.FAILED_PRECONDITION, f"at charge {turn}"
        assert (await balance(client)).amount == LARGEST
        return


async def test_get_transaction(client: Client) -> None:
    """A transaction is found by the name of its own account only."""
    await client.create_account("acme")
    await client.create_account("other")
    mine = await client.post("acme", GRANT, "1")
    others = await client.post("other", GRANT, "2")
    assert await get(client, mine.name) == mine
    for name in (
        f"accounts/acme/transactions/{others.uid}",
        f"accounts/other/transactions/{mine.uid}",
        "accounts/acme/transactions/0192f3a4-5b6c-7d8e-9f01-23456789abcd",
        "accounts/acme/transactions/00000000-0000-0000-0000-000000000000",
    ):
        refusal = await refusal_of(get(client, name))
        assert refusal.verdict == ("NOT_FOUND", "TRANSACTION_NOT_FOUND")
        assert refusal.metadata == {"transaction": name}
    refusal = await refusal_of(get(client, f"accounts/unknown/transactions/{mine.uid}"))
    assert refusal.verdict == ("NOT_FOUND", "ACCOUNT_NOT_FOUND")
    assert refusal.metadata == {"account": "accounts/unknown"}


async def test_posting_to_an_unknown_account(client: Client) -> None:
    """A transaction of an unknown account is NOT_FOUND; it succeeds once the account is created."""
    refusal = await refusal_of(client.post("acme", GRANT, "1"))
    assert refusal.verdict == ("NOT_FOUND", "ACCOUNT_NOT_FOUND")
    assert (await refusal_of(client.history())).verdict == ("NOT_FOUND", "ACCOUNT_NOT_FOUND")
    await client.create_account("acme")
    assert (await client.post("acme", GRANT, "1")).sequence == 1
    assert len(await client.history()) == 1


async def test_answered_transaction_is_stored(client: Client, database_url: str) -> None:
    """Once its call is answered, a transaction is in the database."""
    await client.create_account("acme")
    posted = await client.post("acme", GRANT, "1")
    async with open_book(database_url) as other_book:
        tenant_number = await other_book.credentials.tenant_number("house")
        assert tenant_number is not None
        [stored] = await other_book.account_store.accounts_with_states(tenant_number, ["acme"], NOON)
        assert (stored.state.sequence, stored.state.balance) == (1, 1_000_000)
    assert await client.history() == [posted]


async def test_concurrent_charges(client: Client) -> None:
    """Of 64 concurrent charges of 1 on a balance of 40, exactly 40 succeed."""
    await client.create_account("acme")
    await client.post("acme", GRANT, "40")
    answers = await asyncio.gather(
        *(client.post("acme", CHARGE, "-1", description=str(number)) for number in range(64)), return_exceptions=True
    )
    posted = [answer for answer in answers if isinstance(answer, Transaction)]
    errors = [answer for answer in answers if not isinstance(answer, Transaction)]
    assert all(isinstance(error, grpc.aio.AioRpcError) for error in errors)
    assert {error.code() for error in errors if isinstance(error, grpc.aio.AioRpcError)} == {
        grpc.StatusCode.FAILED_PRECONDITION
    }
    assert len(posted) == 40
    rows = await client.history()
    assert [row.sequence for row in rows] == list(range(1, 42))
    assert [row.balance_after for row in rows] == [str(left) for left in range(40, -1, -1)]
    assert sorted(row.uid for row in rows[1:]) == sorted(answer.uid for answer in posted)
    held = await balance(client)
    assert (held.amount, held.sequence) == ("0", 41)


async def test_concurrent_accounts(client: Client) -> None:
    """Concurrent postings to several accounts each get the next sequence of their own account."""
    account_ids = [f"account-{number}" for number in range(6)]
    for account_id in account_ids:
        await client.create_account(account_id)
    await asyncio.gather(*(client.post(account_id, GRANT, "1") for account_id in account_ids * 5))
    for account_id in account_ids:
        rows = await client.history(account_id)
        assert [(row.sequence, row.balance_after) for row in rows] == [(n, str(n)) for n in range(1, 6)]
