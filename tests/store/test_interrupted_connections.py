"""A connection to PostgreSQL that was interrupted, at any message, never reaches another caller as it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import asyncpg
import grpc
import pytest
from daybook.v1.ledger_service_pb2 import ListTransactionsRequest
from daybook.v1.transaction_pb2 import Transaction

from server.book import Book, open_book
from server.ledger.access import Caller
from server.ledger.audit import Finding
from server.ledger.errors import ServiceUnavailable
from server.ledger.idempotency import Request
from server.ledger.paging import TransactionFilter
from server.ledger.posting import Draft
from server.store.engine import DatabaseLimits
from server.store.migrate import can_serve
from server.store.postgresql import PostgreSQL
from server.store.replica import COMMITTED
from server.usecases.transactions import NewTransaction
from tests.support.callers import Client, Server
from tests.support.clock import Clock
from tests.support.markers import only_postgresql
from tests.support.postgresql_proxy import PostgreSQLProxy

pytestmark = [only_postgresql, pytest.mark.one_server]

PATIENCE_SECONDS = 30
ONE = DatabaseLimits(connections=1, wait_seconds=10, connect_seconds=10)
"""With one connection, the next operation gets the one that was interrupted, or its replacement."""


@dataclass
class Proxied:
    """A ledger whose one connection to the database leads through the proxy."""

    book: Book
    proxy: PostgreSQLProxy
    caller: Caller
    direct: Any
    """A connection to the same database past the proxy."""
    next_key: Any
    """Where the second page of the list begins."""

    async def list_first(self) -> None:
        """A page of the tenant, by Engine.fetch."""
        await self.book.transactions.list(self.caller, None, TransactionFilter(), None, 2)

    async def list_second(self) -> None:
        """The page behind it."""
        await self.book.transactions.list(self.caller, None, TransactionFilter(), self.next_key, 2)

    async def list_account(self) -> None:
        """The first page of an account."""
        await self.book.transactions.list(self.caller, "acme", TransactionFilter(), None, 2)

    async def usage(self) -> None:
        """Two reads, of the state and of the hour windows."""
        await self.book.usage.history(self.caller, "acme", 0, 2)

    async def balance(self) -> None:
        """An account's state."""
        await self.book.accounts.balance(self.caller, "acme")

    async def credential(self) -> None:
        """A lookup."""
        await self.book.credentials.api_key("none")

    async def ask_primary(self) -> None:
        """What is asked before a replica serves."""
        await self.book.database.primary.fetch(COMMITTED, {})

    async def write(self) -> None:
        """A transaction that the caller itself waits for."""
        await self.book.credentials.ensure_token_key(bytes(32), 0)

    async def post(self) -> None:
        """A transaction that the poster commits."""
        # Makes no lot, so that each posting takes the same messages.
        draft, details = Draft(Transaction.CHARGE, "test", -1), Transaction(category="test")
        await self.book.transactions.create(self.caller, NewTransaction("acme", draft, details, Request("", b"")))

    async def verify(self) -> None:
        """Streams through server-side cursors."""
        async with aclosing(self.book.verification.verify_all(None)) as events:
            async for event in events:
                assert not isinstance(event, Finding)

    async def readiness(self) -> None:
        """What /readyz asks."""
        assert await can_serve(self.book.database)


Operation = Callable[[Proxied], Awaitable[None]]
OPERATIONS: tuple[Operation, ...] = (
    Proxied.list_first,
    Proxied.list_second,
    Proxied.list_account,
    Proxied.usage,
    Proxied.balance,
    Proxied.credential,
    Proxied.ask_primary,
    Proxied.write,
    Proxied.post,
    Proxied.verify,
    Proxied.readiness,
)
each_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: each.__name__)


@pytest.fixture
async def proxied(server: Server, client: Client, clock: Clock) -> AsyncIterator[Proxied]:
    """An account with three transactions, behind a proxy."""
    await client.create_account("acme")
    for _ in range(3):
        await client.post("acme", Transaction.GRANT, "10")
    url = server.book.database.url
    tenant_number = await server.book.credentials.tenant_number("house")
    assert tenant_number is not None
    caller = Caller(tenant_number, "", "test")
    first = await server.book.transactions.list(caller, None, TransactionFilter(), None, 2)
    direct = await asyncpg.connect(url.set(drivername="postgresql").render_as_string(hide_password=False))
    try:
        # A socket's path must be short.
        with TemporaryDirectory(prefix="daybook-proxy-") as folder:
            proxy = PostgreSQLProxy(Path(folder), str(url.query["host"]))
            async with proxy.listening(), open_book(proxy.url(str(url.database)), clock, limits=ONE) as book:
                yield Proxied(book, proxy, caller, direct, first.next_key)
    finally:
        await direct.close()


async def check_sound(proxied: Proxied, number: int) -> None:
    """The next operations succeed, and no session stays in a transaction.

    `write` fails in a transaction that was left open; the other operations take turns, by the number.
    """
    async with asyncio.timeout(PATIENCE_SECONDS):
        for operation in (Proxied.usage, Proxied.write, OPERATIONS[number % len(OPERATIONS)]):
            await operation(proxied)
    # The poster may still be at the command of a caller that left.
    async with asyncio.timeout(PATIENCE_SECONDS):
        while await proxied.direct.fetch(
            "SELECT query FROM pg_stat_activity"
            " WHERE datname = current_database() AND state LIKE 'idle in transaction%'"
        ):
            await asyncio.sleep(0.01)


async def begin_held(proxied: Proxied, operation: Operation, at: int) -> asyncio.Task[None] | None:
    """Begins an operation on a new connection and holds its message of this number; None if it has no such one."""
    proxied.proxy.cut()
    # The connection is there, and no statement is prepared on it.
    await proxied.book.database.transact(lambda connection: connection.connection.is_valid)
    proxied.proxy.hold_at(at)
    task = asyncio.ensure_future(operation(proxied))
    arrived = asyncio.ensure_future(proxied.proxy.arrived.wait())
    async with asyncio.timeout(PATIENCE_SECONDS):
        await asyncio.wait([task, arrived], return_when=asyncio.FIRST_COMPLETED)
    if arrived.done():
        return task
    arrived.cancel()
    proxied.proxy.hold_at(None)
    await task
    return None


@pytest.mark.long
@each_operation
async def test_caller_leaves_at_every_message(proxied: Proxied, operation: Operation) -> None:
    """A caller leaves before a message arrives, or in the turn of the loop after that: the next callers succeed.

    In that turn the answer is there, and the operation that waits for it has not yet gone on.
    """
    for at in count():
        for turns in (None, 1):
            task = await begin_held(proxied, operation, at)
            if task is None:
                assert at > 5
                return
            if turns is not None:
                proxied.proxy.release()
                for _ in range(turns):
                    await asyncio.sleep(0)
            task.cancel()
            proxied.proxy.release()
            await asyncio.wait([task], timeout=PATIENCE_SECONDS)
            assert task.done()
            await check_sound(proxied, at)


@pytest.mark.long
@each_operation
async def test_server_leaves_at_every_message(proxied: Proxied, operation: Operation) -> None:
    """A connection that breaks at any message, or within one, is UNAVAILABLE for its caller and for nobody else.

    The ways to break take turns; over all operations each comes at each message.
    """
    for at in count():
        task = await begin_held(proxied, operation, at)
        if task is None:
            break
        match (at + OPERATIONS.index(operation)) % 3:
            case 0:
                proxied.proxy.cut()
            case 1:
                proxied.proxy.release_half()
            case 2:
                await proxied.direct.execute(
                    "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
                proxied.proxy.release()
        async with asyncio.timeout(PATIENCE_SECONDS):
            (outcome,) = await asyncio.gather(task, return_exceptions=True)
        # The last answer may have arrived before.
        assert outcome is None or isinstance(outcome, ServiceUnavailable), outcome
        await check_sound(proxied, at)
    assert at > 5


@pytest.mark.parametrize("operation", [Proxied.list_first, Proxied.usage, Proxied.credential])
async def test_answer_that_never_comes(proxied: Proxied, operation: Operation) -> None:
    """A caller leaves a connection that stays silent: its place in the pool is soon free, with another session."""
    for at in (0, 2):
        task = await begin_held(proxied, operation, at)
        assert task is not None
        task.cancel()
        await check_sound(proxied, at)


async def test_transaction_that_the_driver_did_not_begin(proxied: Proxied) -> None:
    """A BEGIN that fails in its second half is answered as an error, and leaves a transaction all the same."""

    async def fail(driver: Any) -> None:
        with pytest.raises(asyncpg.PostgresError):
            await driver.execute("BEGIN; SELECT 1/0")

    primary = proxied.book.database.primary
    assert isinstance(primary, PostgreSQL)
    await primary.run(fail)
    await check_sound(proxied, 0)


async def test_short_deadlines(server: Server, client: Client) -> None:
    """After 20 rounds of lists whose callers have a deadline of 4 to 34 ms, every balance and posting succeeds."""
    await client.create_account("acme")
    await client.post("acme", Transaction.GRANT, "10")

    async def give_up(milliseconds: int) -> None:
        request = ListTransactionsRequest(parent="accounts/-", order_by="create_time")
        with suppress(grpc.aio.AioRpcError):
            await client.ledger.ListTransactions(request, metadata=client.metadata, timeout=milliseconds / 1000)

    for _ in range(20):
        await asyncio.gather(*map(give_up, range(4, 35)))
        for _ in range(server.book.database.pools["read"].size):
            await client.balance()
            await client.post("acme", Transaction.GRANT, "1")
