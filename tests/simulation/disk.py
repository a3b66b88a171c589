"""The database that all simulated servers share: real SQLite in memory, without threads."""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from sqlalchemy import Connection, Engine, QueuePool, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.util import await_only, greenlet_spawn

from server.store import sqlite
from server.store.engine import DatabaseLimits, PoolUse, Work
from server.store.failures import Conflict, driver_error

Result = TypeVar("Result")

_WORK = "simulated_work"
_FOR_UPDATE = "/* FOR UPDATE */"


class _Compiler(sqlite._HintingCompiler):
    """Marks the statements that lock rows on PostgreSQL."""

    def for_update_clause(self, select: Any, **_: Any) -> str:
        return f" {_FOR_UPDATE}"


class _Connection(sqlite3.Connection):
    """Stays open when its pool closes it, because an in-memory database ends with its connection."""

    def close(self) -> None:
        """Does nothing."""


@dataclass(eq=False)
class Transaction:
    """A database transaction of a simulated server."""

    pause_seconds: Callable[[], float | None] | None = None
    """Draws the pause before the next statement, in which other transactions run; None for no pause.

    Without a function the transaction runs as a whole, like that of SQLite's one writer.
    """
    fails_at: int | None = None
    """The number of the statement that fails, from 1 on; None for the commit."""
    failure: Exception | None = None
    """The error of that statement or commit; None for a transaction that succeeds. After it nothing is committed."""
    statements: int = 0
    has_begun_to_write: bool = False
    locks: list[object] = field(default_factory=list)


class Disk(sqlite.SQLite):
    """One SQLite database in memory.

    A transaction runs as a whole, as on SQLite, or interleaved with others, as on PostgreSQL in READ COMMITTED.
    An interleaved transaction takes the row locks that PostgreSQL would take. Other transactions run between its
    reads only: its writes and its commit are one step, because PostgreSQL shows them only after the commit.
    """

    def __init__(self) -> None:
        super().__init__(make_url(f"sqlite+aiosqlite:///{tempfile.gettempdir()}/never-opened.db"), DatabaseLimits())
        self._raw, self.writer = self._connect()
        self._raw.execute("PRAGMA foreign_keys = ON")
        self.dialect = self.writer.dialect
        event.listen(self.writer, "before_cursor_execute", self._before_statement)
        self._locks: dict[object, tuple[Transaction, deque[asyncio.Future[None]]]] = {}
        self._copies: list[tuple[sqlite3.Connection, Engine]] = []
        """Databases for snapshots, reused because their engines keep compiled statements."""

    def _connect(self) -> tuple[sqlite3.Connection, Engine]:
        raw = sqlite3.connect(":memory:", isolation_level=None, factory=_Connection)
        engine = create_engine(
            "sqlite+pysqlite://", creator=lambda: raw, poolclass=QueuePool, pool_size=64, hide_parameters=True
        )
        engine.dialect.statement_compiler = _Compiler
        self._adopt(engine)
        return raw, engine

    @property
    def reader(self) -> sqlite3.Connection:
        """The one connection, also for reads."""
        return self._raw

    @property
    def pools(self) -> Mapping[str, PoolUse]:
        """None."""
        return {}

    def rows(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """The committed rows of a statement."""
        return self._raw.execute(statement, values).fetchall()

    def image(self) -> bytes:
        """The whole database, serialized."""
        return self._raw.serialize()

    def load(self, image: bytes) -> None:
        """Replaces the whole database."""
        self._locks.clear()
        self._raw.deserialize(image)
        self._raw.execute("PRAGMA foreign_keys = ON")

    async def run(self, work: Work[Result], transaction: Transaction, committed: Callable[[], None]) -> Result:
        """Runs `work` in one database transaction; calls `committed` right after the commit."""
        if transaction.pause_seconds is None:
            return self._run(work, transaction, committed)
        return await greenlet_spawn(self._run, work, transaction, committed)

    def _run(self, work: Work[Result], transaction: Transaction, committed: Callable[[], None]) -> Result:
        try:
            with self.translated(), self.writer.connect() as connection:
                connection.execution_options(**{_WORK: transaction})
                with connection.begin():
                    result = work(connection)
                    if transaction.fails_at is None and transaction.failure is not None:
                        raise transaction.failure
                committed()
                return result
        finally:
            self.release(transaction)

    async def transact(self, work: Work[Result]) -> Result:
        """Runs `work` in one database transaction, without faults."""
        return self._run(work, Transaction(), lambda: None)

    async def transact_without_timeouts(self, work: Work[Result]) -> Result:
        """Runs `work` in one database transaction, without faults."""
        return await self.transact(work)

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[AsyncConnection]:
        """Streaming reads of a copy of the database."""
        raw, engine = self._copies.pop() if self._copies else self._connect()
        raw.deserialize(self.image())
        try:
            with engine.connect() as connection:
                yield cast("AsyncConnection", _Snapshot(connection))
        finally:
            self._copies.append((raw, engine))

    async def close(self) -> None:
        """Does nothing: the database survives its servers."""

    def lock_accounts(self, connection: Connection, account_numbers: Collection[int]) -> None:
        """Locks the accounts one by one in ascending order, and waits for each that another transaction has locked."""
        for number in sorted(account_numbers):
            self._lock(connection.get_execution_options()[_WORK], ("account", number))

    def release(self, transaction: Transaction) -> None:
        """Releases the locks of a transaction, and wakes the transactions that wait for them."""
        for key in transaction.locks:
            _, waiting = self._locks.pop(key)
            for each in waiting:
                if not each.done():
                    each.set_result(None)
        transaction.locks.clear()

    def _lock(self, transaction: Transaction, key: object) -> None:
        if transaction.pause_seconds is None:
            return
        while (held := self._locks.get(key)) is not None and held[0] is not transaction:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            held[1].append(turn)
            await_only(turn)
        if held is None:
            self._locks[key] = (transaction, deque())
            transaction.locks.append(key)

    def _before_statement(
        self, connection: Connection, _cursor: object, statement: str, parameters: Any, *_: object
    ) -> None:
        transaction: Transaction | None = connection.get_execution_options().get(_WORK)
        if transaction is None:
            return
        transaction.statements += 1
        if transaction.fails_at == transaction.statements:
            assert transaction.failure is not None
            raise transaction.failure
        if not transaction.has_begun_to_write:
            if transaction.pause_seconds is not None and (seconds := transaction.pause_seconds()) is not None:
                await_only(asyncio.sleep(seconds))
            if statement.endswith(_FOR_UPDATE):
                self._lock(transaction, ("row", str(parameters)))
        if not transaction.has_begun_to_write and not statement.lstrip().startswith(("SELECT", "WITH", "PRAGMA")):
            transaction.has_begun_to_write = True
            self._raw.execute("BEGIN IMMEDIATE")

    def translate(self, error: Exception) -> Exception:
        """Translates a duplicate key to Conflict: as on PostgreSQL, the slower of two inserts is tried again."""
        if isinstance(error, IntegrityError) and "UNIQUE" in str(driver_error(error)):
            return Conflict()
        return super().translate(error)


class _Snapshot:
    """The part of SQLAlchemy's AsyncConnection that streaming reads use."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def execute(self, statement: Any) -> Any:
        """The result of a statement, read to its end: an abandoned cursor must not outlive the copy."""
        await asyncio.sleep(0)
        return self._connection.execute(statement).freeze()()

    async def run_sync(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Runs `work` on the connection."""
        await asyncio.sleep(0)
        return work(self._connection, *arguments)
