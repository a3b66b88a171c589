"""A database that fails at the n-th statement, for every n: all of a transaction is there, or nothing."""

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

DRIVER_WORDS = "disk I/O error in /var/lib/secret"
POSTING_STATEMENTS_MIN = 7
"""BEGIN, two reads of the account, the request, and a row in each of three tables, at the least."""

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


class Fault:
    """Fails the n-th statement of the connection that writes, counted from 0; later ones pass."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.statements: list[str] = []

    @property
    def struck(self) -> bool:
        """Whether there were so many statements."""
        return len(self.statements) > self.at

    def execute(self, _cursor: object, statement: str, _parameters: object, _context: object) -> None:
        """Stands before the driver, so that what it raises passes for the driver's own."""
        self.statements.append(statement)
        if len(self.statements) == self.at + 1:
            raise sqlite3.OperationalError(DRIVER_WORDS)


@contextmanager
def failing_at(database: Database, at: int) -> Iterator[Fault]:
    """Rigs the database."""
    fault = Fault(at)
    engine = database.primary.writer
    event.listen(engine, "do_execute", fault.execute)
    try:
        yield fault
    finally:
        event.remove(engine, "do_execute", fault.execute)


@contextmanager
def failing_commit(database: Database, *, after: bool) -> Iterator[None]:
    """Makes the next commit fail: before it happened, or after, when only the answer is lost."""
    dialect: Any = database.primary.writer.dialect
    do_commit: Callable[[object], None] = dialect.do_commit

    def commit(connection: object) -> None:
        dialect.do_commit = do_commit
        if after:
            do_commit(connection)
        raise sqlite3.OperationalError(DRIVER_WORDS)

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
    """What acme holds now."""
    return await client.ledger.GetBalance(GetBalanceRequest(name="accounts/acme/balance"), metadata=client.metadata)


def check_unavailable(error: grpc.aio.AioRpcError) -> None:
    """Holds an error to what a caller may learn of a broken database: that it is one."""
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    serialized = dict(error.trailing_metadata())["grpc-status-details-bin"]
    status = Status.FromString(serialized)
    info = ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("SERVICE_UNAVAILABLE", "daybook")
    told = f"{error.details()} {status} {error.trailing_metadata()}".lower()
    for word in ("disk", "secret", "sqlite", "sql", "select", "insert", "update ", "begin", "account_states", ".db"):
        assert word not in told, f"the caller is told {word!r}"


async def usage_charge(client: Client, request_id: str = "charge") -> Transaction:
    """A charge that writes a row into every table that posting can write."""
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
async def test_failure_at_every_statement(
    server: Server, client: Client, windows: str, clock: Callable[[], int]
) -> None:
    """A posting that fails at any statement changes nothing, tells nothing, and succeeds when it is repeated.

    It makes its account's first hour window, adds to the newest, or makes another.
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
        assert fault.struck
        assert await contents(database) == before, f"after a failure at {fault.statements[-1]}"
        assert await balance(client) == held
    assert not fault.struck, "a failed statement was passed over"
    assert at == len(fault.statements) >= POSTING_STATEMENTS_MIN
    assert posted.sequence == held.sequence + 1
    assert await usage_charge(client) == posted, "the id is used by the one that succeeded"
    rows = await client.ledger.ListTransactions(
        ListTransactionsRequest(parent="accounts/acme"), metadata=client.metadata
    )
    assert [row.sequence for row in rows.transactions] == list(range(posted.sequence, 0, -1))


@pytest.mark.parametrize(("after", "posted"), [(False, 0), (True, 1)])
async def test_failing_commit(server: Server, client: Client, after: bool, posted: int) -> None:
    """Where the commit fails, a repetition with the same id posts once, whether or not the first took effect."""
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


async def test_failure_hits_one_caller_only(server: Server, client: Client) -> None:
    """After a failure at every statement in turn, a call of another account works at once."""
    database = server.book.database
    for account_id in ("acme", "other"):
        await client.create_account(account_id, credit_limit="100")
    for at in range(POSTING_STATEMENTS_MIN):
        with failing_at(database, at), pytest.raises(grpc.aio.AioRpcError):
            await usage_charge(client)
        assert (await client.post("other", Transaction.CHARGE, "-1")).sequence == at + 1


async def test_failing_creation(server: Server, client: Client) -> None:
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


async def test_failing_update(server: Server, client: Client) -> None:
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
async def test_failing_reads(server: Server, client: Client, method: str, verdict: str) -> None:
    """A read that fails is UNAVAILABLE and tells nothing, and the next one works."""
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

    sound = await read()
    # Where nothing was committed a list might send no statement.
    await client.create_account("other")
    # The driver itself breaks every statement off.
    primary = server.book.database.primary
    assert isinstance(primary, SQLite)
    primary.reader.set_progress_handler(lambda: 1, 1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read()
    primary.reader.set_progress_handler(None, 1)
    assert caught.value.code().name == verdict
    check_unavailable(caught.value)
    assert await read() == sound


async def test_numbers_of_rows_after_failures(server: Server, client: Client) -> None:
    """However many postings failed, there is one row for each that was answered."""
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
