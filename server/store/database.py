"""The database, and who does what work on it where."""

from __future__ import annotations

import asyncio
import contextvars
import getpass
import os
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from typing import Any, TypeAlias, TypeVar, cast

import structlog
from sqlalchemy import Connection, Dialect, Engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.engine.interfaces import IsolationLevel
from sqlalchemy.exc import (
    ArgumentError,
    InvalidRequestError,
    NoSuchModuleError,
    OperationalError,
)
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.pool import QueuePool

from server.ledger.errors import ServiceUnavailable
from server.store import sqlite_file
from server.store.database_tracer import DatabaseTracer, statement_listeners
from server.store.engines import (
    DatabaseLimits,
    DatabaseUrlInvalid,
    sqlite_bulk_engine,
    sqlite_look_engine,
    sqlite_stream_engine,
    sqlite_write_engine,
)
from server.store.failures import ONLY_KNOWN_ERRORS, Conflict, ReplicaUnfit
from server.store.postgresql import PostgreSQL
from server.store.query import Query
from server.store.replica import Replica

log = structlog.get_logger(__name__)

TRIES_MAX = 8
"""How often work that lost against another writer is done again."""

LOOK_WAIT_SECONDS_MAX = 0.25
"""How long everybody waits where a look finds SQLite locked, as it is while its log is being restored."""
BULK_CACHE_KIBIBYTES = 262_144
SORTING_THREADS = 2

Result = TypeVar("Result")
Rows: TypeAlias = Sequence[Sequence[Any]]
"""Rows as the driver gives them."""


@dataclass(frozen=True, slots=True)
class PoolUse:
    """How much of a pool of connections is in use at a moment."""

    size: int
    in_use: int
    waiting: int
    """How many want a connection and have none yet."""


class Database:
    """Runs work on the database: `look` for a bounded read, `transact` for what writes.

    Work is an ordinary function on a connection; it may be run again, so it changes nothing
    else. Whatever the driver says, callers only ever see ServiceUnavailable; the log has
    the rest.

    SQLite has one writer, with a thread of its own in which a whole transaction runs: to
    go to a thread and back for each statement costs more than the statements. Readers never
    wait for it (WAL), and a bounded look costs less than the way to a thread, so it is
    taken where the caller is.
    """

    def __init__(self, url: str, limits: DatabaseLimits | None = None, replica_url: str | None = None) -> None:
        """With a replica lists are read there, as far as it keeps up. Raises DatabaseUrlInvalid."""
        self.conflict_count = 0
        """How often work was undone because another writer was in the way."""
        self.list_reads = Counter[str]()
        """How many reads of lists the `replica` served, and the `primary` in its place; none without a replica."""
        self._limits = limits or DatabaseLimits()
        self._tracer = DatabaseTracer()
        with _no_word_of_the_url():
            self.url: URL = make_url(url)
            self._open()
        self.replica = self._open_replica(replica_url) if replica_url else None
        self._wanted = dict.fromkeys(self._engines, 0)

    def _open(self) -> None:
        limits = self._limits
        self._postgresql: PostgreSQL | None = None
        if self.url.get_backend_name() == "sqlite":
            if problem := sqlite_file.problem_of(self.url):
                raise DatabaseUrlInvalid(problem)
            self._thread: ThreadPoolExecutor | None = ThreadPoolExecutor(1, "database")
            self._looker = sqlite_look_engine(self.url, limits, lock_seconds=LOOK_WAIT_SECONDS_MAX)
            self._streamer = sqlite_stream_engine(self.url, limits)
            self.writer = sqlite_write_engine(self.url, limits)
        else:
            if self.url.drivername != "postgresql+asyncpg":
                raise DatabaseUrlInvalid("must begin with sqlite+aiosqlite: or postgresql+asyncpg:")
            _require_user(self.url)
            self._thread = None
            self._postgresql = PostgreSQL(self.url, limits)
            self._streamer = self._postgresql.engine
            self._looker = self.writer = self._streamer.sync_engine

    def _open_replica(self, url: str) -> Replica:
        setting = "database_replica_url"
        with _no_word_of_the_url(setting):
            parsed = make_url(url)
        if parsed.drivername != "postgresql+asyncpg":
            raise DatabaseUrlInvalid("must begin with postgresql+asyncpg:", setting)
        if self._thread is not None:
            raise DatabaseUrlInvalid("can be set only where database_url begins with postgresql+asyncpg:", setting)
        with _no_word_of_the_url(setting):
            server = PostgreSQL(parsed, self._limits.of_replica, must_be_primary=False)
        return Replica(server, self._ask_primary, self._limits.replica_wait_seconds)

    @property
    def _engines(self) -> set[Engine]:
        engines = {self._streamer.sync_engine, self._looker, self.writer}
        return engines if self.replica is None else engines | {self.replica.server.engine.sync_engine}

    @property
    def _at_postgresql(self) -> PostgreSQL:
        assert self._postgresql is not None, "this database is SQLite"
        return self._postgresql

    @cached_property
    def _sqlite(self) -> sqlite3.Connection:
        """The driver's connection on which lists are read; to take it from the pool would cost as much as a list."""
        return cast("sqlite3.Connection", self._looker.raw_connection().driver_connection)

    @property
    def has_round_trips(self) -> bool:
        """Whether a read costs a round trip, so that concurrent reads are worth batching."""
        return self._thread is None

    @property
    def dialect(self) -> Dialect:
        """The kind of database, for statements that are compiled once."""
        return self.writer.dialect

    @property
    def pools(self) -> Mapping[str, PoolUse]:
        """The pools of connections by what they are for; PostgreSQL has one for all, and one of a replica."""
        if self.replica is not None:
            return {
                "all": self._pool_use(self.writer),
                "replica": self._pool_use(self.replica.server.engine.sync_engine),
            }
        if self._thread is None:
            return {"all": self._pool_use(self.writer)}
        return {"read": self._pool_use(self._streamer.sync_engine), "write": self._pool_use(self.writer)}

    def _pool_use(self, engine: Engine) -> PoolUse:
        pool = engine.pool
        assert isinstance(pool, QueuePool)
        in_use = pool.checkedout()
        return PoolUse(pool.size(), in_use, max(0, self._wanted[engine] - in_use))

    @contextmanager
    def traced(self, tracer: DatabaseTracer) -> Iterator[None]:
        """Tells the tracer of everything until the end of the block."""
        before, self._tracer = self._tracer, tracer
        listeners = statement_listeners(tracer, self.url.get_backend_name())
        engines = self._engines
        for engine, (name, listener) in product(engines, listeners.items()):
            event.listen(engine, name, listener)
        try:
            yield
        finally:
            self._tracer = before
            for engine, (name, listener) in product(engines, listeners.items()):
                event.remove(engine, name, listener)

    @contextmanager
    def _working(self, engine: Engine, name: str) -> Iterator[None]:
        """Around all that is done with one connection: counts who wants one, and lets only known errors out."""
        self._wanted[engine] += 1
        try:
            with self._tracer.work(name), ONLY_KNOWN_ERRORS:
                yield
        finally:
            self._wanted[engine] -= 1

    async def fetch(self, query: Query, parameters: Mapping[str, object], *, at_replica: bool = True) -> Rows:
        """The rows of a query that reads a bounded number of them; by a replica if there is one.

        The fast path of lists: straight on the driver's connection, because SQLAlchemy
        costs several times what the database does.
        """
        values = query.values(parameters)
        if self._thread is not None:
            with self._tracer.work("read"), ONLY_KNOWN_ERRORS:
                return self._fetch_sqlite(query.text, values)

        async def fetch(driver: Any) -> Rows:
            return await self._fetch_postgresql(driver, query.text, values)

        if at_replica and self.replica is not None:
            with suppress(ReplicaUnfit):
                return await self._at_replica(self.replica, "read", partial(_drive, fetch))
        with self._working(self._looker, "read"):
            return await self._at_postgresql.run(fetch)

    async def fetch_together(
        self, queries: Sequence[Query], parameters: Mapping[str, object], *, at_replica: bool = False
    ) -> list[Rows]:
        """The rows of each of several queries, which all see one state of the database."""
        asked = [(query.text, query.values(parameters)) for query in queries]

        async def fetch(driver: Any) -> list[Rows]:
            async with driver.transaction(isolation="repeatable_read", readonly=True):
                return [await self._fetch_postgresql(driver, *each) for each in asked]

        if at_replica and self.replica is not None:
            with suppress(ReplicaUnfit):
                return await self._at_replica(self.replica, "snapshot", partial(_drive, fetch))
        with self._working(self._looker, "snapshot"):
            if self._thread is not None:
                self._sqlite.execute("BEGIN")
                try:
                    return [self._fetch_sqlite(*each) for each in asked]
                finally:
                    self._sqlite.execute("COMMIT")
            return await self._at_postgresql.run(fetch)

    def _fetch_sqlite(self, text: str, values: Sequence[object]) -> Rows:
        end = self._tracer.statement("sqlite", text)
        try:
            rows: Rows = self._sqlite.execute(text, values).fetchall()
        except BaseException as failure:
            end(failure)
            raise
        end(None)
        return rows

    async def _fetch_postgresql(self, driver: Any, text: str, values: Sequence[object]) -> Rows:
        end = self._tracer.statement("postgresql", text)
        try:
            rows: Rows = await driver.fetch(text, *values)
        except BaseException as failure:
            end(failure)
            raise
        end(None)
        return rows

    async def _at_replica(
        self, replica: Replica, name: str, work: Callable[[AsyncConnection], Awaitable[Result]]
    ) -> Result:
        """Raises ReplicaUnfit where the primary is to do it, and ServiceUnavailable."""
        try:
            committed = await replica.committed()
            with self._working(replica.server.engine.sync_engine, name):
                async with replica.connect(committed) as shared:
                    result = await work(shared)
        except ReplicaUnfit:
            self.list_reads["primary"] += 1
            raise
        self.list_reads["replica"] += 1
        return result

    async def _ask_primary(self, text: str) -> Any:
        """The one value of a statement that asks PostgreSQL about itself."""
        with self._working(self._looker, "read"):
            return await self._at_postgresql.run(lambda driver: driver.fetchval(text))

    async def check(self) -> None:
        """Raises DatabaseUnfit for a database that can't hold a ledger, whatever is in it, and ServiceUnavailable."""
        if self._postgresql is not None:
            with ONLY_KNOWN_ERRORS:
                await self._postgresql.check()

    async def look(
        self, work: Callable[[Connection], Result], *, consistent: bool = False, at_replica: bool = False
    ) -> Result:
        """Does work that reads a bounded number of rows.

        With `consistent` all of its statements see one state of the database; without,
        each sees the state at its beginning, which is cheaper. With `at_replica` a replica
        does it if there is one.
        """
        name = "snapshot" if consistent else "read"
        isolation_level: IsolationLevel = "REPEATABLE READ" if consistent else "AUTOCOMMIT"
        if at_replica and self.replica is not None:
            with suppress(ReplicaUnfit):
                return await self._at_replica(
                    self.replica, name, lambda shared: _look_on(shared, isolation_level, work)
                )
        with self._working(self._looker, name):
            if self._thread is not None:
                with self._looker.connect() as connection:
                    return _at_one_state(connection, work) if consistent else work(connection)
            async with self._at_postgresql.connect() as shared:
                return await _look_on(shared, isolation_level, work)

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A connection for reads without a bound, whose every statement may see another state."""
        with self._working(self._streamer.sync_engine, "read"):
            async with self._streaming("READ COMMITTED") as connection:
                yield connection

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[AsyncConnection]:
        """A connection for reads without a bound, which sees one state of the database throughout."""
        with self._working(self._streamer.sync_engine, "snapshot"):
            async with self._streaming("REPEATABLE READ") as connection:
                yield connection

    def _streaming(self, isolation_level: IsolationLevel) -> AbstractAsyncContextManager[AsyncConnection]:
        if self._postgresql is not None:
            return self._postgresql.transaction(isolation_level)
        # A transaction of SQLite sees one state anyway.
        return self._streamer.begin()

    async def transact(self, work: Callable[[Connection], Result]) -> Result:
        """Does work in a database transaction: committed durably at the end, or undone by an exception.

        Again if another writer was in the way; raises ServiceUnavailable if that happens
        every time, and whatever the work raises.
        """
        for _ in range(TRIES_MAX):
            try:
                with self._working(self.writer, "write"):
                    return await self._transact_once(work)
            except Conflict:
                self.conflict_count += 1
                log.info("lost against another writer")
        raise ServiceUnavailable

    async def _transact_once(self, work: Callable[[Connection], Result]) -> Result:
        if self._thread is not None:
            # What the caller's logs and traces are about, the thread is to know as well.
            run = contextvars.copy_context().run
            return await asyncio.get_running_loop().run_in_executor(self._thread, run, _transact, self.writer, work)
        async with self._at_postgresql.transaction() as connection:
            return await connection.run_sync(work)

    async def transact_unhurried(self, work: Callable[[Connection], Result]) -> Result:
        """Like `transact`, once, for what may take long: a statement has no limit.

        Raises Conflict while another process writes to SQLite.
        """
        if self._thread is not None:
            engine = sqlite_write_engine(self.url, replace(self._limits, lock_seconds=LOOK_WAIT_SECONDS_MAX))
            with ONLY_KNOWN_ERRORS:
                return await asyncio.to_thread(_transact_alone, engine, work)
        with ONLY_KNOWN_ERRORS:
            async with self._at_postgresql.unlimited_transaction() as connection:
                return await connection.run_sync(work)

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[AsyncConnection]:
        """A database transaction of many gigabytes.

        SQLite then writes to the place itself and keeps only what was there before, instead of
        writing everything to the log first; nobody else may have the file open. Raises
        ValueError if somebody has.
        """
        if self._thread is None:
            with ONLY_KNOWN_ERRORS:
                async with self._at_postgresql.unlimited_transaction() as connection:
                    yield connection
            return
        await self._disconnect()
        engine = sqlite_bulk_engine(self.url)
        async with engine.connect() as connection:
            await _set_journal(connection, "DELETE")
            await _pragma(connection, f"cache_size = -{BULK_CACHE_KIBIBYTES}")
            await _pragma(connection, f"threads = {SORTING_THREADS}")
            try:
                with ONLY_KNOWN_ERRORS:
                    async with connection.begin():
                        yield connection
            finally:
                await _set_journal(connection, "WAL")

    @asynccontextmanager
    async def replica_watched(self) -> AsyncIterator[None]:
        """Lets the replica, if there is one, serve lists until the end of the block."""
        async with nullcontext() if self.replica is None else self.replica.watched():
            yield

    async def close(self) -> None:
        """Closes every connection, after the transaction that is under way."""
        if self._thread is not None:
            await asyncio.to_thread(self._thread.shutdown)
        await self._disconnect()

    async def _disconnect(self) -> None:
        self.__dict__.pop("_sqlite", None)
        if self._thread is not None:
            self.writer.dispose()
            self._looker.dispose()
            await self._streamer.dispose()
        if self._postgresql is not None:
            await self._postgresql.close()
        if self.replica is not None:
            await self.replica.server.close()


async def _drive(work: Callable[[Any], Awaitable[Result]], shared: AsyncConnection) -> Result:
    """Does work with the driver's connection."""
    return await work((await shared.get_raw_connection()).driver_connection)


async def _look_on(
    shared: AsyncConnection, isolation_level: IsolationLevel, work: Callable[[Connection], Result]
) -> Result:
    await shared.execution_options(isolation_level=isolation_level)
    return await shared.run_sync(work)


def _transact(engine: Engine, work: Callable[[Connection], Result]) -> Result:
    with engine.begin() as connection:
        return work(connection)


def _transact_alone(engine: Engine, work: Callable[[Connection], Result]) -> Result:
    """Raises Conflict if another process writes meanwhile."""
    try:
        return _transact(engine, work)
    except OperationalError as error:
        # The lower byte: the others tell apart kinds of the same error.
        if (getattr(error.orig, "sqlite_errorcode", None) or 0) & 0xFF == sqlite3.SQLITE_BUSY:
            raise Conflict from None
        raise
    finally:
        engine.dispose()


def _at_one_state(connection: Connection, work: Callable[[Connection], Result]) -> Result:
    """Does work that reads, of SQLite, inside a transaction, which has no need to begin for a single statement."""
    connection.exec_driver_sql("BEGIN")
    try:
        return work(connection)
    finally:
        connection.exec_driver_sql("COMMIT")


async def _pragma(connection: AsyncConnection, setting: str) -> object:
    """Sets something of SQLite's outside a transaction; answers with what SQLite answers."""
    raw = (await connection.get_raw_connection()).driver_connection
    assert raw is not None
    rows = await raw.execute_fetchall(f"PRAGMA {setting}")
    return rows[0][0] if rows else None


async def _set_journal(connection: AsyncConnection, mode: str) -> None:
    try:
        found = await _pragma(connection, f"journal_mode = {mode}")
    except sqlite3.OperationalError:
        found = None
    if str(found).upper() != mode:
        raise ValueError("somebody else has the database open: stop the servers that use it first")


def _require_user(url: URL) -> None:
    """Raises DatabaseUrlInvalid where the driver would look in vain for the name of the process's user."""
    if url.username is None and "user" not in url.query and not os.environ.get("PGUSER"):
        try:
            getpass.getuser()
        except (KeyError, OSError):
            raise DatabaseUrlInvalid(
                "must name a user, like postgresql+asyncpg://daybook@host/database: the process's own has no name"
            ) from None


@contextmanager
def _no_word_of_the_url(setting: str = "database_url") -> Iterator[None]:
    try:
        yield
    except DatabaseUrlInvalid as error:
        raise DatabaseUrlInvalid(error.problem, setting) from None
    except (NoSuchModuleError, InvalidRequestError, ImportError):
        raise DatabaseUrlInvalid("must begin with sqlite+aiosqlite: or postgresql+asyncpg:") from None
    except (ArgumentError, ValueError):
        raise DatabaseUrlInvalid(
            "can't be read; in a password all but letters and digits are percent-encoded", setting
        ) from None
    except OSError as error:
        raise DatabaseUrlInvalid(f"names a folder that can't be made: {error.strerror}") from None
