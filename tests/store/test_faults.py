"""Failures at every statement of a posting: a transaction is stored completely or not at all."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import grpc
import pytest
from daybook.v1.account_pb2 import Account, Balance
from daybook.v1.ledger_service_pb2 import (
    CreateAccountRequest,
    GetAccountRequest,
    GetBalanceRequest,
    ListTransactionsRequest,
    UpdateAccountRequest,
)
from daybook.v1.transaction_pb2 import Transaction, Usage
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from sqlalchemy import event, func, select

from server.store.database import Database
from server.store.sqlite import SQLite
from server.store.tables import metadata
from tests.support.callers import Client, Server

DRIVER_MESSAGE = "disk I/O error in /var/lib/secret"
POSTING_STATEMENTS_MIN = 7
"""BEGIN, two reads of the account, a read of the request, and writes to three tables."""

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


class Fault:
    """Fails one statement of the writer's connection, the one with the index `at`; others pass."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.statements: list[str] = []

    @property
    def has_failed(self) -> bool:
        """Whether the statement has failed."""
        return len(self.statements) > self.at

    def execute(self, _cursor: object, statement: str, _parameters: object, _context: object) -> None:
        """Called in place of the driver, so its error counts as the driver's."""
        self.statements.append(statement)
        if len(self.statements) == self.at + 1:
            raise sqlite3.OperationalError(DRIVER_MESSAGE)


@contextmanager
def failing_at(database: Database, at: int) -> Iterator[Fault]:
    """Makes one statement fail until the end of the block."""
    fault = Fault(at)
    engine = database.primary.writer
    event.listen(engine, "do_execute", fault.execute)
    try:
        yield fault
    finally:
        event.remove(engine, "do_execute", fault.execute)


@contextmanager
def failing_commit(database: Database, *, after: bool) -> Iterator[None]:
    """Makes the next commit fail: before it takes effect, or after, so that only its answer is lost."""
    dialect: Any = database.primary.writer.dialect
    do_commit: Callable[[object], None] = dialect.do_commit

    def commit(connection: object) -> None:
        dialect.do_commit = do_commit
        if after:
            do_commit(connection)
        raise sqlite3.OperationalError(DRIVER_MESSAGE)

    dialect.do_commit = commit
    try:
        yield
    finally:
        dialect.do_commit = do_commit


async def contents(database: Database) -> dict[str, list[Any]]:
    """Every row of every table."""
    async with database.primary.snapshot() as connection:
        return {
            table.name: sorted((await connection.execute(select(table))).all(), key=repr)
            for table in metadata.sorted_tables
        }


async def balance(client: Client) -> Balance:
    """The balance of the account acme."""
    return await client.ledger.GetBalance(GetBalanceRequest(name="accounts/acme/balance"), metadata=client.metadata)


def check_unavailable(error: grpc.aio.AioRpcError) -> None:
    """Asserts that an error is UNAVAILABLE and shows no details of the database."""
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    serialized = dict(error.trailing_metadata())["grpc-status-details-bin"]
    status = Status.FromString(serialized)
    info = ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("SERVICE_UNAVAILABLE", "daybook")
    shown = f"{error.details()} {status} {error.trailing_metadata()}".lower()
    for word in ("disk", "secret", "sqlite", "sql", "select", "insert", "update ", "begin", "account_states", ".db"):
        assert word not in shown, f"the error shows {word!r}"


async def usage_charge(client: Client, request_id: str = "charge") -> Transaction:
    """A charge that writes to every table that a charge can write to."""
    return await client.post(
        "acme",
        Transaction.CHARGE,
        "-1",
        request_id=request_id,
        category="computing",
        usage=Usage(model="m"),
        labels={"location": "l"},
    )


@pytest.mark.parametrize("windows", ["first", "same", "next"])
async def test_failure_at_any_statement_rolls_back(
    server: Server, client: Client, windows: str, clock: Callable[[], int]
) -> None:
    """A posting that fails at any statement changes nothing, shows no details, and succeeds when repeated.

    It opens its account's first hour window, adds to the newest, or opens the next.
    """
    database = server.book.database
    await client.create_account("acme")
    await client.post("acme", Transaction.GRANT, "1000")
    if windows != "first":
        await usage_charge(client, "before")
    if windows == "next":
        clock.advance(3600)  # type: ignore[attr-defined]
    before, held = await contents(database), await balance(client)
    for at in count():
        with failing_at(database, at) as fault:
            try:
                posted = await usage_charge(client)
            except grpc.aio.AioRpcError as error:
                check_unavailable(error)
            else:
                break
        assert fault.has_failed
        assert await contents(database) == before, f"after a failure at {fault.statements[-1]}"
        assert await balance(client) == held
    assert not fault.has_failed, "a failed statement was ignored"
    assert at == len(fault.statements) >= POSTING_STATEMENTS_MIN
    assert posted.sequence == held.sequence + 1
    assert await usage_charge(client) == posted, "the request_id returns the stored answer"
    rows = await client.ledger.ListTransactions(
        ListTransactionsRequest(parent="accounts/acme"), metadata=client.metadata
    )
    assert [row.sequence for row in rows.transactions] == list(range(posted.sequence, 0, -1))


@pytest.mark.parametrize(("after", "posted"), [(False, 0), (True, 1)])
async def test_repetition_after_a_failed_commit_posts_once(
    server: Server, client: Client, after: bool, posted: int
) -> None:
    """After a failed commit, a repetition with the same request_id posts once, even if the commit took effect."""
    database = server.book.database
    await client.create_account("acme")
    await client.post("acme", Transaction.GRANT, "10")
    with failing_commit(database, after=after):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await usage_charge(client)
        check_unavailable(caught.value)
    assert (await balance(client)).sequence == 1 + posted
    charged = await usage_charge(client)
    assert (charged.sequence, charged.balance_after) == (2, "9")
    assert await usage_charge(client) == charged
    assert (await balance(client)).sequence == 2


async def test_failure_does_not_affect_the_next_caller(server: Server, client: Client) -> None:
    """After a failure at any statement, a call for another account succeeds."""
    database = server.book.database
    for account_id in ("acme", "other"):
        await client.create_account(account_id, credit_limit="100")
    for at in range(POSTING_STATEMENTS_MIN):
        with failing_at(database, at), pytest.raises(grpc.aio.AioRpcError):
            await usage_charge(client)
        assert (await client.post("other", Transaction.CHARGE, "-1")).sequence == at + 1


async def test_failed_creation_leaves_no_account(server: Server, client: Client) -> None:
    """A CreateAccount that fails at any statement leaves no account, and the next one succeeds."""
    database = server.book.database
    before = await contents(database)
    request = CreateAccountRequest(account_id="acme", account=Account(kind=Account.USER), request_id="id")
    for at in count():
        with failing_at(database, at) as fault:
            try:
                created = await client.ledger.CreateAccount(request, metadata=client.metadata)
            except grpc.aio.AioRpcError as error:
                check_unavailable(error)
            else:
                break
        assert await contents(database) == before, f"after a failure at {fault.statements[-1]}"
    assert at == len(fault.statements) >= 5
    assert await client.ledger.CreateAccount(request, metadata=client.metadata) == created
    assert (await client.post("acme", Transaction.GRANT, "1")).sequence == 1


async def test_failed_update_changes_nothing(server: Server, client: Client) -> None:
    """An UpdateAccount that fails at any statement changes nothing, and the next one succeeds."""
    database = server.book.database
    await client.create_account("acme")
    before = await contents(database)
    request = UpdateAccountRequest(account=Account(name="accounts/acme", display_name="New"), request_id="id")
    for at in count():
        with failing_at(database, at) as fault:
            try:
                updated = await client.ledger.UpdateAccount(request, metadata=client.metadata)
            except grpc.aio.AioRpcError as error:
                check_unavailable(error)
            else:
                break
        assert await contents(database) == before, f"after a failure at {fault.statements[-1]}"
    assert at == len(fault.statements) >= 4
    assert updated.display_name == "New"


@pytest.mark.parametrize(
    ("method", "verdict"),
    [("balance", "UNAVAILABLE"), ("get", "UNAVAILABLE"), ("list", "UNAVAILABLE"), ("tenant", "UNAVAILABLE")],
)
async def test_failed_read_is_unavailable(server: Server, client: Client, method: str, verdict: str) -> None:
    """A read that fails is UNAVAILABLE and shows no details, and the next one succeeds."""
    await client.create_account("acme")
    await client.post("acme", Transaction.GRANT, "1")

    async def read() -> object:
        match method:
            case "balance":
                return await balance(client)
            case "get":
                return await client.ledger.GetAccount(GetAccountRequest(name="accounts/acme"), metadata=client.metadata)
            case _:
                parent = "accounts/acme" if method == "list" else "accounts/-"
                return await client.ledger.ListTransactions(
                    ListTransactionsRequest(parent=parent), metadata=client.metadata
                )

    expected = await read()
    # A commit, because a cached list might send no statement.
    await client.create_account("other")
    # Makes the driver interrupt every statement.
    primary = server.book.database.primary
    assert isinstance(primary, SQLite)
    primary.reader.set_progress_handler(lambda: 1, 1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read()
    primary.reader.set_progress_handler(None, 1)
    assert caught.value.code().name == verdict
    check_unavailable(caught.value)
    assert await read() == expected


async def test_every_answered_posting_has_one_row(server: Server, client: Client) -> None:
    """After failed and successful postings, there is one row for each successful one."""
    database = server.book.database
    await client.create_account("acme")
    answered = 0
    for at in range(12):
        with failing_at(database, at % 9):
            try:
                await client.post("acme", Transaction.GRANT, "1")
                answered += 1
            except grpc.aio.AioRpcError as error:
                check_unavailable(error)
    async with database.primary.snapshot() as connection:
        stored = (
            await connection.execute(select(func.count()).select_from(metadata.tables["transactions"]))
        ).scalar_one()
    held = await balance(client)
    assert 0 < answered < 12
    assert (stored, held.sequence, held.amount) == (answered, answered, str(answered))
