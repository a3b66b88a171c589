"""The connection to the database: engines, and what is particular to each kind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import structlog
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.engine.interfaces import IsolationLevel
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import QueuePool

from server.ledger.errors import ServiceUnavailable

log = structlog.get_logger(__name__)

# PostgreSQL: serialization_failure, deadlock_detected, unique_violation. The last is what
# the slower of two writers of one new row gets; when it looks again, the row is there.
_CONFLICT_STATES = ("40001", "40P01", "23505")
TRIES_MAX = 8
"""How often work that lost against another writer is done again."""

POOL_WAIT_SECONDS_MAX = 5.0
LOCK_WAIT_SECONDS_MAX = 5.0
LOOK_WAIT_SECONDS_MAX = 0.25
"""How long everybody waits where a look finds SQLite locked, as it is while its log is being restored."""

WRITER_CACHE_KIBIBYTES = 32_768
LOG_PAGES_MAX = 4000
"""How long SQLite's write-ahead log grows before it is worked off: 16 MiB."""


Result = TypeVar("Result")


class Conflict(Exception):
    """Another writer was in the way; the same work may succeed if it is done again."""


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

    def __init__(self, url: str, *, readers: int = 4) -> None:
        self.url: URL = make_url(url)
        if self.url.get_backend_name() == "sqlite":
            self._thread: ThreadPoolExecutor | None = ThreadPoolExecutor(1, "database")
            self._looker = _sqlite_engine(self.url, wait_seconds_max=LOOK_WAIT_SECONDS_MAX, query_only=True)
            self._streamer = _sqlite_stream_engine(self.url, readers)
            self.writer = _sqlite_engine(self.url, wait_seconds_max=LOCK_WAIT_SECONDS_MAX)
            event.listen(self.writer, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
        else:
            self._thread = None
            self._streamer = create_async_engine(
                self.url, pool_size=readers, max_overflow=0, pool_timeout=POOL_WAIT_SECONDS_MAX
            )
            self._looker = self.writer = self._streamer.sync_engine

    async def look(self, work: Callable[[Connection], Result], *, consistent: bool = False) -> Result:
        """Does work that reads a bounded number of rows.

        With `consistent` all of its statements see one state of the database; without,
        each sees the state at its beginning, which is cheaper.
        """
        with _only_known_errors():
            if self._thread is not None:
                with self._looker.connect() as connection:
                    return _at_one_state(connection, work) if consistent else work(connection)
            isolation_level: IsolationLevel = "REPEATABLE READ" if consistent else "AUTOCOMMIT"
            async with self._streamer.connect() as shared:
                await shared.execution_options(isolation_level=isolation_level)
                return await shared.run_sync(work)

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A connection for reads without a bound, whose every statement may see another state."""
        with _only_known_errors():
            async with self._streamer.begin() as connection:
                yield connection

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[AsyncConnection]:
        """A connection for reads without a bound, which sees one state of the database throughout."""
        with _only_known_errors():
            async with self._streamer.connect() as connection:
                if self._thread is None:
                    await connection.execution_options(isolation_level="REPEATABLE READ")
                async with connection.begin():
                    yield connection

    async def transact(self, work: Callable[[Connection], Result]) -> Result:
        """Does work in a database transaction: committed durably at the end, or undone by an exception.

        Again if another writer was in the way; raises ServiceUnavailable if that happens
        every time, and whatever the work raises.
        """
        for _ in range(TRIES_MAX):
            try:
                with _only_known_errors():
                    return await self._transact_once(work)
            except Conflict:
                log.info("lost against another writer")
        raise ServiceUnavailable

    async def _transact_once(self, work: Callable[[Connection], Result]) -> Result:
        if self._thread is not None:
            return await asyncio.get_running_loop().run_in_executor(self._thread, _transact, self.writer, work)
        async with self._streamer.begin() as connection:
            return await connection.run_sync(work)

    async def close(self) -> None:
        """Closes every connection, after the transaction that is under way."""
        if self._thread is not None:
            await asyncio.to_thread(self._thread.shutdown)
            self.writer.dispose()
            self._looker.dispose()
        await self._streamer.dispose()


def _transact(engine: Engine, work: Callable[[Connection], Result]) -> Result:
    with engine.begin() as connection:
        return work(connection)


def _at_one_state(connection: Connection, work: Callable[[Connection], Result]) -> Result:
    """Does work that reads, of SQLite, inside a transaction, which has no need to begin for a single statement."""
    connection.exec_driver_sql("BEGIN")
    try:
        return work(connection)
    finally:
        connection.exec_driver_sql("COMMIT")


@contextmanager
def _only_known_errors() -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) in _CONFLICT_STATES:
            raise Conflict from error
        if not isinstance(error, InterfaceError | OperationalError):
            raise
        log.warning("database unavailable", error=str(error.orig))
        raise ServiceUnavailable from error
    except (PoolTimeout, OSError) as error:
        log.warning("database unavailable", error=str(error))
        raise ServiceUnavailable from error


def _sqlite_engine(url: URL, *, wait_seconds_max: float, query_only: bool = False) -> Engine:
    """An engine of one connection."""
    engine = create_engine(
        url.set(drivername="sqlite+pysqlite"),
        poolclass=QueuePool,
        pool_size=1,
        max_overflow=0,
        pool_timeout=POOL_WAIT_SECONDS_MAX,
        connect_args={"timeout": wait_seconds_max, "check_same_thread": False},
    )
    _prepare_sqlite(engine, query_only=query_only)
    return engine


def _sqlite_stream_engine(url: URL, connections: int) -> AsyncEngine:
    """An engine whose connections have a thread each, so that a long read stands in nobody's way."""
    engine = create_async_engine(
        url,
        pool_size=connections,
        max_overflow=0,
        pool_timeout=POOL_WAIT_SECONDS_MAX,
        connect_args={"timeout": LOCK_WAIT_SECONDS_MAX},
    )
    _prepare_sqlite(engine.sync_engine, query_only=True)
    event.listen(engine.sync_engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return engine


def _prepare_sqlite(engine: Engine, *, query_only: bool) -> None:
    url = engine.url
    if url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: object) -> None:
        # The driver would begin transactions at moments of its own.
        connection.isolation_level = None
        cursor = connection.cursor()
        # A reader of a database that has just been made must not set its journal mode.
        if not query_only:
            cursor.execute("PRAGMA journal_mode = WAL")
            # What a large import touches stays in memory, and goes from the log to its place
            # once and not every few groups: a fifth less time in the database.
            cursor.execute(f"PRAGMA cache_size = -{WRITER_CACHE_KIBIBYTES}")
            cursor.execute(f"PRAGMA wal_autocheckpoint = {LOG_PAGES_MAX}")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute(f"PRAGMA query_only = {'ON' if query_only else 'OFF'}")
        cursor.close()
