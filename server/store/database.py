"""The connection to the database: engines, and what is particular to each kind."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import structlog
from sqlalchemy import event
from sqlalchemy.engine import URL, make_url
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

WRITER_CACHE_KIBIBYTES = 32_768
LOG_PAGES_MAX = 4000
"""How long SQLite's write-ahead log grows before it is worked off: 16 MiB."""


Result = TypeVar("Result")


class Conflict(Exception):
    """Another writer was in the way; the same work may succeed if it is done again."""


@dataclass(frozen=True, slots=True)
class PoolUse:
    """How much of a pool of connections is in use at a moment."""

    size: int
    in_use: int
    waiting: int
    """How many want a connection and have none yet."""


class DatabaseTracer:
    """Told what the database is asked to do. This one takes no notice; others override what they want to know."""

    def work(self, name: str) -> AbstractContextManager[None]:
        """Entered for all that is done with one connection, from the wait for it to the commit."""
        del name
        return _NOTHING

    def statement(self, system: str, text: str) -> Callable[[BaseException | None], None]:
        """A statement begins, given without its values; what this gives is told at its end whether it failed."""
        raise NotImplementedError


_NOTHING = nullcontext()


class Database:
    """Hands out connections: `read` for a consistent look, `write` for a transaction.

    SQLite has one writer, so there is one connection that writes, and readers of their own
    that never wait for it (WAL). Whatever the driver says, callers only ever see
    ServiceUnavailable; the log has the rest. `write` may also raise Conflict.
    """

    def __init__(self, url: str, *, readers: int = 4) -> None:
        self.url: URL = make_url(url)
        self.conflict_count = 0
        """How often work was undone because another writer was in the way."""
        self._tracer = DatabaseTracer()
        if self.url.get_backend_name() == "sqlite":
            self._writer = _sqlite_engine(self.url, begin="BEGIN IMMEDIATE", connections=1)
            self._reader = _sqlite_engine(self.url, begin="BEGIN", connections=readers, query_only=True)
        else:
            self._writer = self._reader = create_async_engine(
                self.url,
                pool_size=readers,
                max_overflow=0,
                pool_timeout=POOL_WAIT_SECONDS_MAX,
                # An error that is logged must not tell values.
                hide_parameters=True,
            )
        self._wanted = dict.fromkeys((self._reader, self._writer), 0)

    @property
    def pools(self) -> Mapping[str, PoolUse]:
        """The pools of connections by what they are for; PostgreSQL has one for both."""
        if self._reader is self._writer:
            return {"all": self._pool_use(self._reader)}
        return {"read": self._pool_use(self._reader), "write": self._pool_use(self._writer)}

    def _pool_use(self, engine: AsyncEngine) -> PoolUse:
        pool = engine.pool
        assert isinstance(pool, QueuePool)
        in_use = pool.checkedout()
        return PoolUse(pool.size(), in_use, max(0, self._wanted[engine] - in_use))

    @contextmanager
    def traced(self, tracer: DatabaseTracer) -> Iterator[None]:
        """Tells the tracer of everything until the end of the block."""
        before, self._tracer = self._tracer, tracer
        listeners = _statement_listeners(tracer, self.url.get_backend_name())
        engines = {self._reader.sync_engine, self._writer.sync_engine}
        for engine, (name, listener) in product(engines, listeners.items()):
            event.listen(engine, name, listener)
        try:
            yield
        finally:
            self._tracer = before
            for engine, (name, listener) in product(engines, listeners.items()):
                event.remove(engine, name, listener)

    @contextmanager
    def _working(self, engine: AsyncEngine, name: str) -> Iterator[None]:
        """Around all that is done with one connection: counts who wants one, and lets only known errors out."""
        self._wanted[engine] += 1
        try:
            with self._tracer.work(name):
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
        finally:
            self._wanted[engine] -= 1

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A connection that sees one state of the database."""
        with self._working(self._reader, "read"):
            async with self._reader.begin() as connection:
                yield connection

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[AsyncConnection]:
        """A connection that sees one state of the database over several statements."""
        if self.url.get_backend_name() == "sqlite":
            async with self.read() as connection:
                yield connection
            return
        with self._working(self._reader, "snapshot"):
            async with self._reader.connect() as connection:
                await connection.execution_options(isolation_level="REPEATABLE READ")
                async with connection.begin():
                    yield connection

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A database transaction: committed durably at the end, or undone by an exception."""
        with self._working(self._writer, "write"):
            async with self._writer.begin() as connection:
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
                self.conflict_count += 1
                log.info("lost against another writer")
        raise ServiceUnavailable

    async def close(self) -> None:
        """Closes every connection."""
        await self._reader.dispose()
        await self._writer.dispose()


def _statement_listeners(tracer: DatabaseTracer, system: str) -> Mapping[str, Callable[..., None]]:
    """What SQLAlchemy calls around each statement. A connection has one under way at most."""
    key = "daybook_end_statement"

    def begin(connection: Any, _cursor: object, statement: str, *_: object) -> None:
        connection.info[key] = tracer.statement(system, statement)

    def end(connection: Any, *_: object) -> None:
        if told := connection.info.pop(key, None):
            told(None)

    def fail(failure: Any) -> None:
        if failure.connection is not None and (told := failure.connection.info.pop(key, None)):
            told(failure.original_exception)

    return {"before_cursor_execute": begin, "after_cursor_execute": end, "handle_error": fail}


def _sqlite_engine(url: URL, *, begin: str, connections: int, query_only: bool = False) -> AsyncEngine:
    if url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_async_engine(
        url,
        pool_size=connections,
        max_overflow=0,
        pool_timeout=POOL_WAIT_SECONDS_MAX,
        connect_args={"timeout": LOCK_WAIT_SECONDS_MAX},
        # An error that is logged must not tell values.
        hide_parameters=True,
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
