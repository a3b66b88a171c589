"""The interface of a database engine; server/store/sqlite.py and server/store/postgresql.py implement it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

import sqlalchemy
from sqlalchemy import Connection, Dialect, Select, Table
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.pool import QueuePool
from sqlalchemy.sql.elements import KeyedColumnElement

from server.store.database_tracer import DatabaseTracer, trace_statements
from server.store.failures import UnexpectedDatabaseError
from server.store.query import Query

Result = TypeVar("Result")
Rows: TypeAlias = Sequence[Sequence[Any]]
"""Rows of the driver."""
Work: TypeAlias = Callable[[Connection], Result]
Columns: TypeAlias = Iterable[KeyedColumnElement[Any]]
Keys: TypeAlias = Sequence[tuple[Any, ...]]

_ENGINE = "daybook_engine"


class DatabaseUrlInvalid(ValueError):
    """The URL of a database is invalid. The message shows no value of the URL, which may hold a password."""

    def __init__(self, problem: str, setting: str = "database_url") -> None:
        super().__init__(f"{setting} {problem}")
        self.problem = problem


class DatabaseUnfit(ValueError):
    """The database is reachable, but its configuration can't hold a ledger. The message says how to change it."""


@dataclass(frozen=True, slots=True)
class DatabaseLimits:
    """Sizes of connection pools and timeouts in seconds; server/config.py describes each.

    A `statement_seconds` of 0 is no limit. SQLite uses connections (streaming reads),
    wait_seconds and lock_seconds only.
    """

    connections: int = 6
    wait_seconds: float = 5.0
    recycle_seconds: float = 1800.0
    connect_seconds: float = 5.0
    lock_seconds: float = 5.0
    statement_seconds: float = 30.0
    idle_transaction_seconds: float = 60.0
    replica_wait_seconds: float = 0.05
    pooler_mode: Literal["session", "transaction"] = "session"

    @property
    def is_pooled_by_transaction(self) -> bool:
        """Whether a pooler may run each transaction in another session of PostgreSQL."""
        return self.pooler_mode == "transaction"


@dataclass(frozen=True, slots=True)
class PoolUse:
    """The use of a connection pool at a moment."""

    size: int
    in_use: int
    waiting: int
    """Callers that wait for a connection."""


class Reader(ABC):
    """Bounded reads. They raise ServiceUnavailable, and UnexpectedDatabaseError for faults of this program."""

    @abstractmethod
    async def fetch(self, query: Query, parameters: Mapping[str, object]) -> Rows:
        """The rows of a query."""


class Engine(Reader):
    """A database: bounded reads, streaming reads and transactions, each over connections of its own.

    Callers see ServiceUnavailable, Conflict or another error of this program, never an error of the
    driver; the log has the driver's message.
    """

    has_clock: ClassVar[bool]
    """Whether the database has a clock that all its clients share."""
    has_round_trips: ClassVar[bool]
    """Whether a read costs a round trip, so that concurrent reads are worth batching."""
    has_table: ClassVar[Query]
    """Returns a row if there is a table with the name `name`."""
    insert: Callable[[Table], Any]
    """Makes an INSERT that has `on_conflict_do_update`."""
    dialect: Dialect
    writer: sqlalchemy.Engine
    """SQLAlchemy's engine of transactions."""

    def __init__(self) -> None:
        self.tracer = DatabaseTracer()
        self._callers = Counter[str]()

    @property
    @abstractmethod
    def pools(self) -> Mapping[str, PoolUse]:
        """The connection pools, by name."""

    @abstractmethod
    def snapshot(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A connection for streaming reads, all of one snapshot of the database."""

    @abstractmethod
    async def transact(self, work: Work[Result]) -> Result:
        """Runs `work` in one database transaction: commits at its end, or rolls back if it raises.

        Raises Conflict after a conflict with another writer: the same work may succeed later.
        """

    @abstractmethod
    async def transact_without_timeouts(self, work: Work[Result]) -> Result:
        """Like `transact`, for work that may take long: statements have no timeout.

        Raises Conflict immediately if another process writes to SQLite.
        """

    @abstractmethod
    def bulk_transaction(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A database transaction that writes many gigabytes. Raises ValueError if SQLite's file is open elsewhere."""

    @abstractmethod
    async def insert_bulk(self, connection: AsyncConnection, table: Table, rows: Sequence[Sequence[object]]) -> None:
        """Inserts rows without SQLAlchemy; each row has the values of all columns, in the order of the table."""

    def lock_accounts(self, connection: Connection, account_numbers: Collection[int]) -> None:
        """Keeps other transactions from posting to these accounts until this one ends."""

    def try_migration_lock(self, connection: Connection) -> bool:
        """Takes the lock of migrations until the transaction ends; False if another process holds it."""
        del connection
        return True

    @abstractmethod
    def with_keys(self, statement: Select[Any], columns: Columns, keys: Keys) -> Select[Any]:
        """The statement, for the rows that have one of the keys in these columns."""

    async def check(self) -> None:
        """Raises DatabaseUnfit for a database whose configuration can't hold a ledger, and ServiceUnavailable."""

    async def back_up(self, file: Path) -> None:
        """Copies the database, as it is at the start of the copy, to a new file. Others may write meanwhile.

        Raises ValueError for PostgreSQL, which has tools of its own, and OSError.
        """
        raise ValueError("backup copies SQLite only; use pg_dump or pg_basebackup for PostgreSQL")

    @abstractmethod
    async def close(self) -> None:
        """Closes every connection, after the transaction under way."""

    @abstractmethod
    def translate(self, error: Exception) -> Exception:
        """The error for callers in place of an error of the driver; other errors unchanged."""

    @contextmanager
    def using(self, pool: str, name: str) -> Iterator[None]:
        """Wraps the use of one connection of a pool: counts callers, traces, and translates errors."""
        self._callers[pool] += 1
        try:
            with self.tracer.work(name), self.translated():
                yield
        finally:
            self._callers[pool] -= 1

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Translates the errors of a block."""
        try:
            yield
        except Exception as error:
            translated = self.translate(error)
            if translated is error:
                raise
            if isinstance(translated, UnexpectedDatabaseError):
                # The driver's error may quote values, so the log must not show it.
                raise translated.with_traceback(error.__traceback__) from None
            raise translated from error

    def _use_of(self, pool: str, size: int, in_use: int) -> PoolUse:
        return PoolUse(size, in_use, max(0, self._callers[pool] - in_use))

    def _use_of_engine(self, pool: str, engine: sqlalchemy.Engine) -> PoolUse:
        connections = engine.pool
        assert isinstance(connections, QueuePool)
        return self._use_of(pool, connections.size(), connections.checkedout())

    def _adopt(self, engine: sqlalchemy.Engine) -> None:
        """Makes one of SQLAlchemy's engines part of this one, for `engine_of` and for the tracing of statements."""
        engine.update_execution_options(**{_ENGINE: self})
        trace_statements(engine, lambda: self.tracer)


def engine_of(connection: Connection) -> Engine:
    """The engine of a connection, for statements that differ between engines."""
    found: Engine = connection.get_execution_options()[_ENGINE]
    return found
