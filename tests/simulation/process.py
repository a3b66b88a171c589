"""Simulated server processes: one object graph each, on one database, with injected faults."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.message import Message
from sqlalchemy import Connection, Select, Table
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncConnection

from server.book import Book, composed
from server.facades.dreadnode import Credits
from server.facades.nebulablock import Users
from server.facades.paged import Statements
from server.facades.spacebring import CreditsTransactions
from server.facades.teable import Billing
from server.ledger.errors import DaybookError, ServiceUnavailable
from server.ledger.instants import Instant
from server.rpc.admin import Admin
from server.rpc.ledger import Ledger
from server.store.database import Database
from server.store.engine import Columns, Engine, Keys, PoolUse, Rows, Work
from server.store.failures import Conflict
from server.store.query import Query
from server.transport.auth import Authenticator, authentication
from server.transport.call_metadata import call_metadata
from server.transport.page_tokens import PageTokens
from server.transport.token_keys import refreshed_token_keys
from server.transport.validation import Sizes
from tests.simulation.disk import Disk, Transaction

if TYPE_CHECKING:
    from tests.simulation.simulation import Simulation

Result = TypeVar("Result")

_process_of_context: ContextVar[Process] = ContextVar("process_of_context")


class ConnectionLost(Exception):
    """The client does not learn the outcome of its call."""


class SimulatedEngine(Engine):
    """The engine of one simulated server: the shared database with injected faults."""

    has_clock = False
    has_round_trips = False
    has_table = Disk.has_table

    def __init__(self, process: Process) -> None:
        super().__init__()
        disk = process.world.disk
        self.insert, self.dialect, self.writer = disk.insert, disk.dialect, disk.writer
        self._disk = disk
        self._process = process
        self._faults = process.world.faults

    @property
    def pools(self) -> Mapping[str, PoolUse]:
        """None."""
        return {}

    async def fetch(self, query: Query, parameters: Mapping[str, object]) -> Rows:
        """The rows of a query."""
        await self._before_read()
        try:
            rows = await self._disk.fetch(query, parameters)
        except Exception as error:
            self._process.world.crash(error)
            raise
        await self._faults.delay()
        return rows

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[AsyncConnection]:
        """Streaming reads."""
        await self._before_read()
        async with self._disk.snapshot() as connection:
            yield connection

    async def transact(self, work: Work[Result]) -> Result:
        """Runs `work` in one database transaction."""
        faults, process = self._faults, self._process
        await faults.delay()
        await self._may_die("before a transaction")
        transaction = faults.transaction(process.name)
        process.transactions.append(transaction)
        began, began_by_clock = process.world.now, process.clock()
        try:
            result = await self._disk.run(
                work, transaction, lambda: process.world.committed(process, began, began_by_clock)
            )
        except Exception as error:
            if error is not transaction.failure and not isinstance(error, DaybookError | Conflict):
                process.world.crash(error)
            raise
        finally:
            process.transactions.remove(transaction)
        await self._may_die("after a commit")
        await faults.delay()
        if faults.happens(faults.rates.lost):
            process.world.note(process.name, "loses the answer of a commit")
            raise ServiceUnavailable
        return result

    async def _before_read(self) -> None:
        await self._faults.delay()
        await self._may_die("before a read")
        if self._faults.happens(self._faults.rates.fails):
            self._process.world.note(self._process.name, "fails to read")
            raise ServiceUnavailable

    async def _may_die(self, where: str) -> None:
        if self._process.is_halted:
            raise ServiceUnavailable
        if self._faults.happens(self._faults.rates.dies / 2):
            self._process.kill(where)
            # Never done: the loop runs nothing of a killed process.
            await asyncio.get_running_loop().create_future()

    async def transact_without_timeouts(self, work: Work[Result]) -> Result:
        """Runs `work` in one database transaction."""
        return await self.transact(work)

    def bulk_transaction(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """Not simulated: only `daybook seed` loads in bulk, and no server runs meanwhile."""
        raise NotImplementedError

    async def insert_bulk(self, connection: AsyncConnection, table: Table, rows: Any) -> None:
        """Not simulated, as bulk_transaction."""
        raise NotImplementedError

    def lock_accounts(self, connection: Connection, account_numbers: Collection[int]) -> None:
        """Locks the accounts."""
        self._disk.lock_accounts(connection, account_numbers)

    def with_keys(self, statement: Select[Any], columns: Columns, keys: Keys) -> Select[Any]:
        """The statement, for the rows that have one of the keys in these columns."""
        return self._disk.with_keys(statement, columns, keys)

    def translate(self, error: Exception) -> Exception:
        """The error that callers see."""
        return self._disk.translate(error)

    async def close(self) -> None:
        """Does nothing: the database survives its servers."""


class SimulatedDatabase(Database):
    """A Database with a given engine."""

    def __init__(self, engine: Engine) -> None:
        self.conflict_count = 0
        self.url = make_url("sqlite+aiosqlite:///simulated.db")
        self.primary = self.lists = engine
        self.replica = None


@dataclass(frozen=True)
class Serving:
    """The object graph of a server that is up."""

    book: Book
    services: Mapping[str, Any]
    """Servicers, by the name of their service."""
    authenticator: Authenticator


class Process:
    """One life of a server, from its start to its end."""

    def __init__(self, world: Simulation, name: str) -> None:
        self.world = world
        self.name = name
        self.is_killed = False
        self.is_halted = False
        """Whether the simulation is over."""
        self.serving: Serving | None = None
        """None while the process starts and after its end."""
        self.transactions: list[Transaction] = []
        """Database transactions that have begun."""
        self._calls: dict[asyncio.Future[bytes], None] = {}
        """The answers for which clients wait."""
        self._loop = world.loop
        self._context = copy_context()
        self._context.run(_process_of_context.set, self)
        self._stop = self._loop.create_future()
        self._loop.create_task(self._serve(), context=self._context)

    def clock(self) -> Instant:
        """The time that the clock of the server shows."""
        return self.world.clock(self.name)

    def run_apart(self, work: Coroutine[Any, Any, object]) -> None:
        """Does work in the process for which no client waits, and ignores its failure."""
        self._loop.create_task(work, context=self._context.copy())

    async def _serve(self) -> None:
        try:
            async with self._graph() as serving:
                self.serving = serving
                self.world.note(self.name, "serves")
                await self._stop
                self.serving = None
        except DaybookError as error:
            self.world.note(self.name, "fails", error.reason)
        self.serving = None
        if not self.is_halted:
            self.kill("at its end")

    @asynccontextmanager
    async def _graph(self) -> AsyncIterator[Serving]:
        database = SimulatedDatabase(SimulatedEngine(self))
        async with AsyncExitStack() as stack:
            book = await stack.enter_async_context(
                composed(database, self.clock, Random(self.world.random.getrandbits(64)).randbytes)
            )
            keys = await stack.enter_async_context(refreshed_token_keys(book.credentials, book.clock))
            await stack.enter_async_context(book.expirations.sweeping())
            tokens, sizes = PageTokens(keys, book.random_bytes), Sizes()
            services = {
                "Ledger": Ledger(book.accounts, book.transactions, tokens, sizes),
                "Admin": Admin(book.imports, book.verification, book.api_keys, tokens, sizes),
                "Dreadnode": Credits(book.transactions, book.accounts),
                "NebulaBlock": Users(book.usage),
                "Paged": Statements(book.transactions),
                "Spacebring": CreditsTransactions(book.transactions, tokens),
                "Teable": Billing(book.transactions, tokens),
            }
            authenticator = Authenticator(book.credentials, book.clock, book.api_key_uses.note, self._loop.time)
            yield Serving(book, services, authenticator)

    def stop(self) -> None:
        """Ends the process as SIGTERM does."""
        if not self._stop.done():
            self._stop.set_result(None)

    def kill(self, where: str) -> None:
        """Ends the process as SIGKILL does: the loop runs nothing of it, and its clients lose their connections."""
        if self.is_killed:
            return
        self.world.note(self.name, "dies", where)
        self.is_killed = True
        self.serving = None
        for transaction in self.transactions:
            self.world.disk.release(transaction)
        for call in self._calls:
            if not call.done():
                call.set_exception(ConnectionLost())
        self.world.ended(self)

    async def call(self, service: str, method: str, request: Any, key: str, cancel_after: float | None) -> bytes:
        """Calls a method as a client does; gives the serialized answer, or the concatenated ones of a stream.

        Raises DaybookError, and ConnectionLost if the process dies or after `cancel_after` seconds.
        """
        if self.serving is None:
            raise ConnectionLost
        answer: asyncio.Future[bytes] = self._loop.create_future()
        self._calls[answer] = None
        handling = self._loop.create_task(
            self._handle(self.serving, service, method, request, key, answer), context=self._context.copy()
        )
        if cancel_after is not None:
            self._loop.call_later(cancel_after, self._cancel, handling, answer)
        try:
            return await answer
        finally:
            self._calls.pop(answer, None)

    def _cancel(self, handling: asyncio.Task[None], answer: asyncio.Future[bytes]) -> None:
        if not answer.done():
            self.world.note(self.name, "has a call cancelled")
            handling.cancel()
            answer.set_exception(ConnectionLost())

    async def _handle(
        self, serving: Serving, service: str, method: str, request: Any, key: str, answer: asyncio.Future[bytes]
    ) -> None:
        try:
            metadata = [("x-api-key", key)]
            call_metadata.set(metadata)
            authentication.set(await serving.authenticator.authenticate(metadata))
            given = getattr(serving.services[service], method)(request, None)
            if isinstance(given, AsyncGenerator):
                async with aclosing(given) as answers:
                    outcome = b"".join([_serialized(each) async for each in answers])
            else:
                outcome = _serialized(await given)
        except Exception as error:
            if not answer.done():
                answer.set_exception(error)
            return
        if not answer.done():
            answer.set_result(outcome)


def _serialized(answer: Message | bytes) -> bytes:
    return answer.SerializeToString() if isinstance(answer, Message) else answer


def is_killed(context: Context) -> bool:
    """Whether a callback belongs to a process that was killed."""
    process = context.get(_process_of_context)
    return process is not None and process.is_killed and not process.is_halted
