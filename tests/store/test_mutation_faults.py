"""A driver that fails at the n-th statement, for every n, of each mutation: all of it is there, or nothing."""

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
DRIVER_WORDS = "disk I/O error in /var/lib/secret"
NEVER_TOLD = ("disk", "secret", "sqlite", "sql", "select", "insert", "update ", "begin", "account_states", ".db")


class Fault:
    """Fails the n-th statement of the connection that writes, counted from 0; later ones pass."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.statements: list[str] = []

    def __call__(self, statement: str) -> None:
        """Stands in the driver's place, so that what it raises passes for the driver's own."""
        self.statements.append(statement)
        if len(self.statements) == self.at + 1:
            raise sqlite3.OperationalError(DRIVER_WORDS)


@contextmanager
def failing_at(database: Database, at: int) -> Iterator[Fault]:
    """Rigs the database: one row or many, a statement that fails is one; the commit counts as the last."""
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
    """Holds an error to what a caller may learn of a broken database: that it is one."""
    assert read_refusal(error).verdict == ("UNAVAILABLE", "SERVICE_UNAVAILABLE")
    told = f"{error.details()} {error.trailing_metadata()}".lower()
    assert not [word for word in NEVER_TOLD if word in told]


Call = Callable[[Client], Awaitable[Message]]


def item(
    kind: Transaction.Kind.ValueType, amount: str, parent: str = "acme", **fields: object
) -> CreateTransactionRequest:
    """A request for one transaction."""
    fields = {"kind": kind, "amount": amount, "category": "test", **fields}
    return CreateTransactionRequest(parent=f"accounts/{parent}", transaction=Transaction(**fields))  # type: ignore[arg-type]


async def create_transaction(client: Client) -> Message:
    """A charge that writes to every table to which a charge can."""
    request = item(CHARGE, "-12", category="computing", usage=Usage(model="m"), labels={"location": "l"})
    request.request_id = "id"
    return await client.ledger.CreateTransaction(request, metadata=client.metadata)


async def expiring_charge(client: Client) -> Message:
    """A charge of an account of which something has expired."""
    request = item(CHARGE, "-1", "expired")
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
    """The second refund of a charge, into a lot that was spent."""
    charge = next(row for row in await client.history("other") if row.kind == CHARGE)
    return await client.ledger.RefundTransaction(
        RefundTransactionRequest(name=charge.name, request_id="id"), metadata=client.metadata
    )


async def transfer(client: Client) -> Message:
    """Credits of two lots to another account."""
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
    """Another name for an account."""
    return await client.ledger.UpdateAccount(
        UpdateAccountRequest(
            account=Account(name="accounts/acme", display_name="New", credit_limit="7"), request_id="id"
        ),
        metadata=client.metadata,
    )


async def bring_in(client: Client) -> Message:
    """A message of history."""
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
    """Accounts on which each of the calls has something to do."""
    for account_id in ("acme", "other", "fresh", "expired"):
        await client.create_account(account_id)
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
        # Each begins, reads the states, writes its rows and its answer, and commits.
        (create_transaction, 10, True),
        (expiring_charge, 9, True),
        (batch, 9, True),
        (refund, 12, True),
        (second_refund, 12, True),
        (transfer, 9, True),
        (create_account, 5, True),
        (update_account, 5, True),
        (bring_in, 9, False),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
async def test_failure_at_every_statement(
    server: Server, admin: Client, clock: Clock, call: Call, statements_min: int, is_replayed: bool
) -> None:
    """A call that fails at any statement changes nothing, tells nothing, and succeeds when it is repeated."""
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
        assert len(fault.statements) == at + 1, f"went on after {fault.statements[-2:]}"
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
async def test_lost_answer(server: Server, admin: Client, clock: Clock, call: Call) -> None:
    """Where the commit happened and only its answer was lost, a repetition gets the answer and posts nothing more."""
    await fill(admin, clock)
    dialect: Any = server.book.database.primary.writer.dialect
    do_commit: Callable[[object], None] = dialect.do_commit

    def commit(connection: object) -> None:
        dialect.do_commit = do_commit
        do_commit(connection)
        raise sqlite3.OperationalError(DRIVER_WORDS)

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


async def test_every_item_of_a_submission(server: Server, admin: Client, clock: Clock) -> None:
    """Where the database fails, each item of SubmitTransactions says so for itself, and none of them is there."""
    database = server.book.database
    await fill(admin, clock)
    before = await contents(database)
    request = SubmitTransactionsRequest(parent="accounts/-", requests=[item(GRANT, "1"), item(GRANT, "x")])
    with failing_at(database, 3):
        answer = await admin.ledger.SubmitTransactions(request, metadata=admin.metadata)
    told = [read_status(result.error) for result in answer.results]
    assert [each.verdict for each in told] == [
        ("UNAVAILABLE", "SERVICE_UNAVAILABLE"),
        ("INVALID_ARGUMENT", "FIELD_INVALID"),
    ]
    assert not [word for word in NEVER_TOLD if word in told[0].message]
    assert await contents(database) == before


async def test_import_that_fails_in_the_middle(server: Server, admin: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """An import whose second message meets a broken database keeps the first and goes on when it is repeated."""
    # Else messages that come while another is posted may share a database transaction.
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

    with failing_at(database, 10**6) as sound:
        await admin.admin.ImportTransactions(stream(), metadata=admin.metadata)
    begins = [at for at, statement in enumerate(sound.statements) if statement == sound.statements[0]]
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
