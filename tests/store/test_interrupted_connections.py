"""A PostgreSQL connection interrupted at any message is never reused in a broken state."""

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
"""With one connection, the next operation gets the interrupted one or its replacement."""


@dataclass
class Proxied:
    """A ledger whose one connection to the database leads through the proxy."""

    book: Book
    proxy: PostgreSQLProxy
    caller: Caller
    direct: Any
    """A connection to the same database without the proxy."""
    next_key: Any
    """The key after which the second page of the list begins."""

    async def list_first(self) -> None:
        """Reads the first page of the tenant."""
        await self.book.transactions.list(self.caller, None, TransactionFilter(), None, 2)

    async def list_second(self) -> None:
        """Reads the second page of the tenant."""
        await self.book.transactions.list(self.caller, None, TransactionFilter(), self.next_key, 2)

    async def list_account(self) -> None:
        """Reads the first page of an account."""
        await self.book.transactions.list(self.caller, "acme", TransactionFilter(), None, 2)

    async def usage(self) -> None:
        """Reads the state and the hour windows of an account."""
        await self.book.usage.history(self.caller, "acme", 0, 2)

    async def balance(self) -> None:
        """Reads the state of an account."""
        await self.book.accounts.balance(self.caller, "acme")

    async def credential(self) -> None:
        """Looks up an API key."""
        await self.book.credentials.api_key("none")

    async def primary_position(self) -> None:
        """Reads the WAL position that a replica needs."""
        await self.book.database.primary.fetch(COMMITTED, {})

    async def write(self) -> None:
        """Runs a transaction in the caller's task."""
        await self.book.credentials.ensure_token_key(bytes(32), 0)

    async def post(self) -> None:
        """Posts a transaction, which the poster commits."""
        # A charge opens no lot, so each posting takes the same messages.
        draft, details = Draft(Transaction.CHARGE, "test", -1), Transaction(category="test")
        await self.book.transactions.create(self.caller, NewTransaction("acme", draft, details, Request("", b"")))

    async def verify(self) -> None:
        """Verifies the books by streaming reads."""
        async with aclosing(self.book.verification.verify_all(None)) as events:
            async for event in events:
                assert not isinstance(event, Finding)

    async def readiness(self) -> None:
        """Does the check of /readyz."""
        assert await can_serve(self.book.database)


Operation = Callable[[Proxied], Awaitable[None]]
OPERATIONS: tuple[Operation, ...] = (
    Proxied.list_first,
    Proxied.list_second,
    Proxied.list_account,
    Proxied.usage,
    Proxied.balance,
    Proxied.credential,
    Proxied.primary_position,
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
        # The path of a socket must be short.
        with TemporaryDirectory(prefix="daybook-proxy-") as folder:
            proxy = PostgreSQLProxy(Path(folder), str(url.query["host"]))
            async with proxy.listening(), open_book(proxy.url(str(url.database)), clock, limits=ONE) as book:
                yield Proxied(book, proxy, caller, direct, first.next_key)
    finally:
        await direct.close()


async def check_sound(proxied: Proxied, number: int) -> None:
    """Asserts that the next operations succeed and that no session stays in a transaction.

    `write` fails in a transaction that was left open; `number` selects one more operation.
    """
    async with asyncio.timeout(PATIENCE_SECONDS):
        for operation in (Proxied.usage, Proxied.write, OPERATIONS[number % len(OPERATIONS)]):
            await operation(proxied)
    # The poster may still run the command of a cancelled caller.
    async with asyncio.timeout(PATIENCE_SECONDS):
        while await proxied.direct.fetch(
            "SELECT query FROM pg_stat_activity"
            " WHERE datname = current_database() AND state LIKE 'idle in transaction%'"
        ):
            await asyncio.sleep(0.01)


async def begin_held(proxied: Proxied, operation: Operation, at: int) -> asyncio.Task[None] | None:
    """Begins an operation on a new connection and holds its message number `at`; None if it has fewer messages."""
    proxied.proxy.cut()
    # Opens the connection, without prepared statements.
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
async def test_cancellation_at_every_message(proxied: Proxied, operation: Operation) -> None:
    """After a cancellation before any message, or one step of the event loop after it, the next operations succeed.

    In that step the answer has arrived, but the operation that waits for it has not resumed yet.
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
async def test_disconnection_at_every_message(proxied: Proxied, operation: Operation) -> None:
    """A connection that breaks at or within any message is UNAVAILABLE for its caller only.

    The kinds of failure alternate, so that over all operations each kind occurs at each message.
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
        # None if the last answer arrived before the failure.
        assert outcome is None or isinstance(outcome, ServiceUnavailable), outcome
        await check_sound(proxied, at)
    assert at > 5


@pytest.mark.parametrize("operation", [Proxied.list_first, Proxied.usage, Proxied.credential])
async def test_silent_connection_of_a_cancelled_caller_is_replaced(proxied: Proxied, operation: Operation) -> None:
    """After a caller of a silent connection is cancelled, its place in the pool soon has a new session."""
    for at in (0, 2):
        task = await begin_held(proxied, operation, at)
        assert task is not None
        task.cancel()
        await check_sound(proxied, at)


async def test_transaction_unknown_to_the_driver_is_ended(proxied: Proxied) -> None:
    """A statement that fails after its BEGIN leaves a transaction that the driver doesn't track; it is ended."""

    async def fail(driver: Any) -> None:
        with pytest.raises(asyncpg.PostgresError):
            await driver.execute("BEGIN; SELECT 1/0")

    primary = proxied.book.database.primary
    assert isinstance(primary, PostgreSQL)
    await primary.run(fail)
    await check_sound(proxied, 0)


async def test_calls_succeed_after_short_deadlines(server: Server, client: Client) -> None:
    """After each of 20 rounds of lists with deadlines of 4 to 34 ms, every balance and posting succeeds."""
    await client.create_account("acme")
    await client.post("acme", Transaction.GRANT, "10")

    async def list_with_deadline(milliseconds: int) -> None:
        request = ListTransactionsRequest(parent="accounts/-", order_by="create_time")
        with suppress(grpc.aio.AioRpcError):
            await client.ledger.ListTransactions(request, metadata=client.metadata, timeout=milliseconds / 1000)

    for _ in range(20):
        await asyncio.gather(*map(list_with_deadline, range(4, 35)))
        for _ in range(server.book.database.pools["read"].size):
            await client.balance()
            await client.post("acme", Transaction.GRANT, "1")
