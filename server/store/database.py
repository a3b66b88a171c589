"""The connection to the database: engines, and what is particular to each kind."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import structlog
from sqlalchemy import event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from server.ledger.errors import ServiceUnavailable

log = structlog.get_logger(__name__)

# PostgreSQL: serialization_failure, deadlock_detected, unique_violation. The last is what
# the slower of two writers of one new row gets; when it looks again, the row is there.
_CONFLICT_STATES = ("40001", "40P01", "23505")
TRIES_MAX = 8
"""How often work that lost against another writer is done again."""

POOL_WAIT_SECONDS_MAX = 5.0
LOCK_WAIT_SECONDS_MAX = 5.0

WRITER_CACHE_KIBIBYTES = 32_768
BULK_CACHE_KIBIBYTES = 262_144
SORTING_THREADS = 2
LOG_PAGES_MAX = 4000
"""How long SQLite's write-ahead log grows before it is worked off: 16 MiB."""


Result = TypeVar("Result")


class Conflict(Exception):
    """Another writer was in the way; the same work may succeed if it is done again."""


class Database:
    """Hands out connections: `read` for a consistent look, `write` for a transaction.

    SQLite has one writer, so there is one connection that writes, and readers of their own
    that never wait for it (WAL). Whatever the driver says, callers only ever see
    ServiceUnavailable; the log has the rest. `write` may also raise Conflict.
    """

    def __init__(self, url: str, *, readers: int = 4) -> None:
        self.url: URL = make_url(url)
        if self.url.get_backend_name() == "sqlite":
            self._writer = _sqlite_engine(self.url, begin="BEGIN IMMEDIATE", connections=1)
            self._reader = _sqlite_engine(self.url, begin="BEGIN", connections=readers, query_only=True)
        else:
            self._writer = self._reader = create_async_engine(
                self.url, pool_size=readers, max_overflow=0, pool_timeout=POOL_WAIT_SECONDS_MAX
            )

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A connection that sees one state of the database."""
        with _only_known_errors():
            async with self._reader.begin() as connection:
                yield connection

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[AsyncConnection]:
        """A connection that sees one state of the database over several statements."""
        if self.url.get_backend_name() == "sqlite":
            async with self.read() as connection:
                yield connection
            return
        with _only_known_errors():
            async with self._reader.connect() as connection:
                await connection.execution_options(isolation_level="REPEATABLE READ")
                async with connection.begin():
                    yield connection

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A database transaction: committed durably at the end, or undone by an exception."""
        with _only_known_errors():
            async with self._writer.begin() as connection:
                yield connection

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[AsyncConnection]:
        """Like `write`, for a database transaction of many gigabytes.

        SQLite then writes to the place itself and keeps only what was there before, instead of
        writing everything to the log first; nobody else may have the file open. Raises
        ValueError if somebody has.
        """
        if self.url.get_backend_name() != "sqlite":
            async with self.write() as connection:
                yield connection
            return
        await self.close()
        async with self._writer.connect() as connection:
            await _set_journal(connection, "DELETE")
            await _pragma(connection, f"cache_size = -{BULK_CACHE_KIBIBYTES}")
            await _pragma(connection, f"threads = {SORTING_THREADS}")
            try:
                with _only_known_errors():
                    async with connection.begin():
                        yield connection
            finally:
                await _set_journal(connection, "WAL")
                await connection.invalidate()

    async def transact(self, work: Callable[[AsyncConnection], Awaitable[Result]]) -> Result:
        """Does work in a database transaction, again if another writer was in the way.

        Raises ServiceUnavailable if that happens every time, and whatever the work raises.
        """
        for _ in range(TRIES_MAX):
            try:
                async with self.write() as connection:
                    return await work(connection)
            except Conflict:
                log.info("lost against another writer")
        raise ServiceUnavailable

    async def close(self) -> None:
        """Closes every connection."""
        await self._reader.dispose()
        await self._writer.dispose()


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


def _sqlite_engine(url: URL, *, begin: str, connections: int, query_only: bool = False) -> AsyncEngine:
    if url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_async_engine(
        url,
        pool_size=connections,
        max_overflow=0,
        pool_timeout=POOL_WAIT_SECONDS_MAX,
        connect_args={"timeout": LOCK_WAIT_SECONDS_MAX},
    )

    @event.listens_for(engine.sync_engine, "connect")
    def prepare(connection: Any, _record: object) -> None:
        # The driver would begin transactions at moments of its own; `begin` below does.
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

    @event.listens_for(engine.sync_engine, "begin")
    def begin_transaction(connection: Any) -> None:
        connection.exec_driver_sql(begin)

    return engine
