"""The connection to the database: engines, and what is particular to each kind."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import structlog
from sqlalchemy import NullPool, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from server.ledger.errors import ServiceUnavailable

log = structlog.get_logger(__name__)

# PostgreSQL: serialization_failure, deadlock_detected, unique_violation. The last is what
# the slower of two writers of one new row gets; when it looks again, the row is there.
_CONFLICT_STATES = ("40001", "40P01", "23505")
# PostgreSQL has no room, is being stopped or started, fails itself, or took too long over a
# lock, a statement or a transaction: nothing that the caller did wrong.
_OUTAGE_STATES = ("08", "25P03", "25P04", "53", "55P03", "57", "58")
"""Beginnings of codes, which are classes of errors where they have two characters."""
TRIES_MAX = 8
"""How often work that lost against another writer is done again."""

WRITER_CACHE_KIBIBYTES = 32_768
LOG_PAGES_MAX = 4000
"""How long SQLite's write-ahead log grows before it is worked off: 16 MiB."""


Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class DatabaseLimits:
    """How many connections there are, and how long anything may take. Settings describes each.

    A statement may take as long as it needs for 0. SQLite knows connections (of readers),
    wait_seconds and lock_seconds only.
    """

    connections: int = 4
    wait_seconds: float = 5.0
    recycle_seconds: float = 1800.0
    connect_seconds: float = 5.0
    lock_seconds: float = 5.0
    statement_seconds: float = 30.0
    idle_transaction_seconds: float = 60.0

    @property
    def of_postgresql(self) -> dict[str, Any]:
        """What its driver is told at each connection."""
        return {
            "timeout": self.connect_seconds,
            # Where the server isn't there any more to give a statement up, this process does.
            "command_timeout": self.statement_seconds + self.connect_seconds if self.statement_seconds else None,
            "server_settings": {
                "application_name": "daybook",
                "lock_timeout": _milliseconds(self.lock_seconds),
                "statement_timeout": _milliseconds(self.statement_seconds),
                "idle_in_transaction_session_timeout": _milliseconds(self.idle_transaction_seconds),
            },
        }


def _milliseconds(seconds: float) -> str:
    return str(round(seconds * 1000))


class Conflict(Exception):
    """Another writer was in the way; the same work may succeed if it is done again."""


class Database:
    """Hands out connections: `read` for a consistent look, `write` for a transaction.

    SQLite has one writer, so there is one connection that writes, and readers of their own
    that never wait for it (WAL). Whatever the driver says, callers only ever see
    ServiceUnavailable; the log has the rest. `write` may also raise Conflict.
    """

    def __init__(self, url: str, limits: DatabaseLimits | None = None) -> None:
        self.url: URL = make_url(url)
        self._limits = limits = limits or DatabaseLimits()
        if self._is_sqlite:
            self._writer = _sqlite_engine(self.url, limits, begin="BEGIN IMMEDIATE", connections=1)
            self._reader = _sqlite_engine(
                self.url, limits, begin="BEGIN", connections=limits.connections, query_only=True
            )
        else:
            self._writer = self._reader = create_async_engine(
                self.url,
                pool_size=limits.connections,
                max_overflow=0,
                pool_timeout=limits.wait_seconds,
                pool_recycle=limits.recycle_seconds,
                connect_args=limits.of_postgresql,
            )

    @property
    def _is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A connection that sees one state of the database."""
        with _only_known_errors():
            async with self._reader.begin() as connection:
                yield connection

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[AsyncConnection]:
        """A connection that sees one state of the database over several statements."""
        if self._is_sqlite:
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
    async def unhurried(self) -> AsyncIterator[AsyncConnection]:
        """Like `write`, for what may take long: a statement and the wait for a lock have no limit."""
        if self._is_sqlite:
            async with self.write() as connection:
                yield connection
            return
        engine = create_async_engine(
            self.url, poolclass=NullPool, connect_args={"timeout": self._limits.connect_seconds}
        )
        with _only_known_errors():
            async with engine.begin() as connection:
                yield connection

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


@contextmanager
def _only_known_errors() -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        state = getattr(error.orig, "sqlstate", None) or ""
        if state in _CONFLICT_STATES:
            raise Conflict from error
        is_outage = error.connection_invalidated or state.startswith(_OUTAGE_STATES)
        if not is_outage and not isinstance(error, InterfaceError | OperationalError):
            raise
        log.warning("database unavailable", error=str(error.orig))
        raise ServiceUnavailable from error
    # The driver's own come from connections that are not made yet.
    except (PoolTimeout, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        log.warning("database unavailable", error=str(error))
        raise ServiceUnavailable from error


def _sqlite_engine(
    url: URL, limits: DatabaseLimits, *, begin: str, connections: int, query_only: bool = False
) -> AsyncEngine:
    if url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_async_engine(
        url,
        pool_size=connections,
        max_overflow=0,
        pool_timeout=limits.wait_seconds,
        connect_args={"timeout": limits.lock_seconds},
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
