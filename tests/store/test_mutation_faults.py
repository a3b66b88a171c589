"""Failures at every statement of each mutation: a mutation takes effect completely or not at all."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import grpc
import pytest
from daybook.v1.account_pb2 import Account
from daybook.v1.admin_service_pb2 import ImportTransactionsRequest
from daybook.v1.ledger_service_pb2 import (
    BatchCreateTransactionsRequest,
    CreateAccountRequest,
    CreateTransactionRequest,
    RefundTransactionRequest,
    SubmitTransactionsRequest,
    TransferCreditsRequest,
    UpdateAccountRequest,
)
from daybook.v1.transaction_pb2 import Transaction, Usage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from sqlalchemy import event, select

from server.ledger.instants import to_timestamp
from server.store.database import Database
from server.store.tables import metadata
from tests.support.callers import Client, Server
from tests.support.clock import NOON, Clock
from tests.support.markers import only_sqlite
from tests.support.refusals import read_refusal, read_status

pytestmark = only_sqlite

GRANT, CHARGE = Transaction.GRANT, Transaction.CHARGE
DRIVER_MESSAGE = "disk I/O error in /var/lib/secret"
NEVER_SHOWN = ("disk", "secret", "sqlite", "sql", "select", "insert", "update ", "begin", "account_states", ".db")


class Fault:
    """Fails one statement of the writer's connection, the one with the index `at`; others pass."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.statements: list[str] = []

    def __call__(self, statement: str) -> None:
        """Called in place of the driver, so its error counts as the driver's."""
        self.statements.append(statement)
        if len(self.statements) == self.at + 1:
            raise sqlite3.OperationalError(DRIVER_MESSAGE)


@contextmanager
def failing_at(database: Database, at: int) -> Iterator[Fault]:
    """Makes one statement fail until the end of the block. A commit counts as a statement."""
    fault = Fault(at)
    engine = database.primary.writer
    dialect: Any = engine.dialect
    do_commit: Callable[[object], None] = dialect.do_commit

    def execute(_cursor: object, statement: str, *_rest: object) -> None:
        fault(statement)

    def commit(connection: object) -> None:
        fault("COMMIT")
        do_commit(connection)

    for name in ("do_execute", "do_executemany", "do_execute_no_params"):
        event.listen(engine, name, execute)
    dialect.do_commit = commit
    try:
        yield fault
    finally:
        dialect.do_commit = do_commit
        for name in ("do_execute", "do_executemany", "do_execute_no_params"):
            event.remove(engine, name, execute)


async def contents(database: Database) -> dict[str, list[Any]]:
    """Every row of every table."""
    async with database.primary.snapshot() as connection:
        return {
            table.name: sorted((await connection.execute(select(table))).all(), key=repr)
            for table in metadata.sorted_tables
        }


def check_unavailable(error: grpc.aio.AioRpcError) -> None:
    """Asserts that an error is UNAVAILABLE and shows no details of the database."""
    assert read_refusal(error).verdict == ("UNAVAILABLE", "SERVICE_UNAVAILABLE")
    shown = f"{error.details()} {error.trailing_metadata()}".lower()
    assert not [word for word in NEVER_SHOWN if word in shown]


Call = Callable[[Client], Awaitable[Message]]


def item(
    kind: Transaction.Kind.ValueType, amount: str, parent: str = "acme", **fields: object
) -> CreateTransactionRequest:
    """A request for one transaction."""
    fields = {"kind": kind, "amount": amount, "category": "test", **fields}
    return CreateTransactionRequest(parent=f"accounts/{parent}", transaction=Transaction(**fields))  # type: ignore[arg-type]


async def create_transaction(client: Client) -> Message:
    """A charge that writes to every table that a charge can write to."""
    request = item(CHARGE, "-12", category="computing", usage=Usage(model="m"), labels={"location": "l"})
    request.request_id = "id"
    return await client.ledger.CreateTransaction(request, metadata=client.metadata)


async def expiring_charge(client: Client) -> Message:
    """A charge of an account with an expired lot, which opens its first hour window."""
    request = item(CHARGE, "-1", "expired", category="computing", usage=Usage(model="m"))
    request.request_id = "id"
    return await client.ledger.CreateTransaction(request, metadata=client.metadata)


async def next_hour_charge(client: Client) -> Message:
    """A charge that opens another hour window."""
    request = item(CHARGE, "-1", "hourly", category="computing", usage=Usage(model="m"))
    request.request_id = "id"
    return await client.ledger.CreateTransaction(request, metadata=client.metadata)


async def batch(client: Client) -> Message:
    """Several transactions of two accounts."""
    requests = [item(GRANT, "5"), item(CHARGE, "-1", "other"), item(CHARGE, "-3"), item(GRANT, "1", "other")]
    return await client.ledger.BatchCreateTransactions(
        BatchCreateTransactionsRequest(parent="accounts/-", requests=requests, request_id="id"),
        metadata=client.metadata,
    )


async def refund(client: Client) -> Message:
    """The first refund of a charge."""
    charge = next(row for row in await client.history() if row.kind == CHARGE)
    return await client.ledger.RefundTransaction(
        RefundTransactionRequest(name=charge.name, request_id="id"), metadata=client.metadata
    )


async def second_refund(client: Client) -> Message:
    """The second refund of a charge, into a spent lot."""
    charge = next(row for row in await client.history("other") if row.kind == CHARGE)
    return await client.ledger.RefundTransaction(
        RefundTransactionRequest(name=charge.name, request_id="id"), metadata=client.metadata
    )


async def transfer(client: Client) -> Message:
    """A transfer of credits of two lots."""
    return await client.ledger.TransferCredits(
        TransferCreditsRequest(name="accounts/acme", destination="accounts/other", amount="12", request_id="id"),
        metadata=client.metadata,
    )


async def create_account(client: Client) -> Message:
    """A new account."""
    return await client.ledger.CreateAccount(
        CreateAccountRequest(account_id="new", account=Account(kind=Account.USER), request_id="id"),
        metadata=client.metadata,
    )


async def update_account(client: Client) -> Message:
    """An update of an account's display_name and credit_limit."""
    return await client.ledger.UpdateAccount(
        UpdateAccountRequest(
            account=Account(name="accounts/acme", display_name="New", credit_limit="7"), request_id="id"
        ),
        metadata=client.metadata,
    )


async def import_history(client: Client) -> Message:
    """An import of one message."""
    items = [
        ImportTransactionsRequest.Item(
            parent="accounts/fresh",
            transaction=item(GRANT, "5").transaction,
            create_time=to_timestamp(NOON + seconds),
            request_id=f"id-{seconds}",
        )
        for seconds in range(3)
    ]
    call = client.admin.ImportTransactions(iter([ImportTransactionsRequest(items=items)]), metadata=client.metadata)
    return await call


async def fill(client: Client, clock: Clock) -> None:
    """Creates accounts with the transactions that the calls need."""
    for account_id in ("acme", "other", "fresh", "expired", "hourly"):
        await client.create_account(account_id, credit_limit="5" if account_id == "hourly" else "0")
    await client.post("hourly", CHARGE, "-1", category="computing", usage=Usage(model="m"))
    clock.advance(3600)
    await client.post("expired", GRANT, "5")
    await client.post("expired", GRANT, "5", ttl=Duration(seconds=1))
    await client.post("acme", GRANT, "10", ttl=Duration(seconds=3600))
    await client.post("acme", GRANT, "20", request_id="before")
    await client.post("acme", CHARGE, "-1", category="computing", usage=Usage(model="m"))
    await client.post("other", GRANT, "9")
    charge = await client.post("other", CHARGE, "-9")
    await client.ledger.RefundTransaction(
        RefundTransactionRequest(name=charge.name, amount="4"), metadata=client.metadata
    )
    clock.advance(60)


@pytest.mark.parametrize(
    ("call", "statements_min", "is_replayed"),
    [
        # BEGIN, reads of the states, writes of rows and of the answer, and COMMIT.
        (create_transaction, 10, True),
        (expiring_charge, 9, True),
        (next_hour_charge, 8, True),
        (batch, 9, True),
        (refund, 12, True),
        (second_refund, 12, True),
        (transfer, 9, True),
        (create_account, 5, True),
        (update_account, 5, True),
        (import_history, 9, False),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
async def test_failure_at_any_statement_rolls_back(
    server: Server, admin: Client, clock: Clock, call: Call, statements_min: int, is_replayed: bool
) -> None:
    """A call that fails at any statement changes nothing, shows no details, and succeeds when repeated."""
    database = server.book.database
    await fill(admin, clock)
    before = await contents(database)
    places: list[str] = []
    for at in count():
        with failing_at(database, at) as fault:
            try:
                answer = await call(admin)
            except grpc.aio.AioRpcError as error:
                check_unavailable(error)
            else:
                break
        assert len(fault.statements) == at + 1, f"continued after {fault.statements[-2:]}"
        assert await contents(database) == before, f"after a failure at {fault.statements[-1]}"
        assert await admin.verify() == []
        places.append(fault.statements[-1])
    assert places[0].startswith("BEGIN")
    assert places[-1] == "COMMIT"
    assert len(fault.statements) == len(places) >= statements_min
    assert await contents(database) != before
    if is_replayed:
        assert await call(admin) == answer
    assert await admin.verify() == []


@pytest.mark.parametrize("call", [create_transaction, batch, refund, transfer], ids=lambda call: call.__name__)
async def test_repetition_after_a_lost_answer_posts_nothing(
    server: Server, admin: Client, clock: Clock, call: Call
) -> None:
    """If only the answer to a commit is lost, a repetition gets the stored answer and posts nothing more."""
    await fill(admin, clock)
    dialect: Any = server.book.database.primary.writer.dialect
    do_commit: Callable[[object], None] = dialect.do_commit

    def commit(connection: object) -> None:
        dialect.do_commit = do_commit
        do_commit(connection)
        raise sqlite3.OperationalError(DRIVER_MESSAGE)

    before = len(await admin.history("-"))
    dialect.do_commit = commit
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(admin)
    check_unavailable(caught.value)
    stored = await admin.history("-")
    assert len(stored) > before
    assert await call(admin) == await call(admin)
    assert await admin.history("-") == stored
    assert await admin.verify() == []


async def test_each_item_of_a_submission_is_unavailable(server: Server, admin: Client, clock: Clock) -> None:
    """If the database fails, each valid item of SubmitTransactions gets UNAVAILABLE, and none is posted."""
    database = server.book.database
    await fill(admin, clock)
    before = await contents(database)
    request = SubmitTransactionsRequest(parent="accounts/-", requests=[item(GRANT, "1"), item(GRANT, "x")])
    with failing_at(database, 3):
        answer = await admin.ledger.SubmitTransactions(request, metadata=admin.metadata)
    statuses = [read_status(result.error) for result in answer.results]
    assert [each.verdict for each in statuses] == [
        ("UNAVAILABLE", "SERVICE_UNAVAILABLE"),
        ("INVALID_ARGUMENT", "FIELD_INVALID"),
    ]
    assert not [word for word in NEVER_SHOWN if word in statuses[0].message]
    assert await contents(database) == before


async def test_interrupted_import_continues_when_repeated(
    server: Server, admin: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An import that fails at its second message keeps the first, and continues after it when repeated."""
    # Otherwise messages received while another is posted may share a database transaction.
    monkeypatch.setattr("server.usecases.imports.PART_ITEMS_MAX", 1)
    database = server.book.database
    await admin.create_account("acme")
    messages = [
        ImportTransactionsRequest(
            items=[
                ImportTransactionsRequest.Item(
                    parent="accounts/acme",
                    transaction=item(GRANT, "1").transaction,
                    create_time=to_timestamp(NOON),
                    request_id=f"id-{message}-{n}",
                )
                for n in range(5)
            ]
        )
        for message in range(3)
    ]

    async def stream() -> AsyncIterator[ImportTransactionsRequest]:
        for message in messages:
            yield message

    with failing_at(database, 10**6) as complete:
        await admin.admin.ImportTransactions(stream(), metadata=admin.metadata)
    begins = [at for at, statement in enumerate(complete.statements) if statement == complete.statements[0]]
    assert len(begins) == 3
    await admin.create_account("other")
    for message in messages:
        for each in message.items:
            each.parent = "accounts/other"
    with failing_at(database, begins[1] + 4), pytest.raises(grpc.aio.AioRpcError) as caught:
        await admin.admin.ImportTransactions(stream(), metadata=admin.metadata)
    check_unavailable(caught.value)
    assert len(await admin.history("other")) == 5
    answer = await admin.admin.ImportTransactions(stream(), metadata=admin.metadata)
    assert (answer.imported_count, answer.skipped_count) == (10, 5)
    assert await admin.verify() == []
