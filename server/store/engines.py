"""The limits of a database, and how connections to SQLite are made."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass, replace
from typing import Any, Literal

from sqlalchemy import Connection, Engine, NullPool, create_engine, event
from sqlalchemy.dialects.sqlite.base import SQLiteCompiler
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import QueuePool

WRITER_CACHE_KIBIBYTES = 32_768
LOOKER_CACHE_KIBIBYTES = 8192
"""What lists keep of SQLite's file: the upper levels of a large ledger's indexes, whose places are then known."""
REPLICA_SECONDS_MAX = 2.0
"""How long a replica may take for anything: to be connected to, to have a connection free, to read a page."""
JOURNAL_TRIES = 100
JOURNAL_PAUSE_SECONDS = 0.05
LOG_PAGES_MAX = 4000
"""How long SQLite's write-ahead log grows before it is worked off: 16 MiB."""


class DatabaseUrlInvalid(ValueError):
    """No database can be opened by its URL. Shows no value out of the URL, which may hold a password."""

    def __init__(self, problem: str, setting: str = "database_url") -> None:
        super().__init__(f"{setting} {problem}")
        self.problem = problem


class DatabaseUnfit(ValueError):
    """The database can be reached, and can't be used as it is set up. Says what to change."""


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
    replica_wait_seconds: float = 0.05
    pooler_mode: Literal["session", "transaction"] = "session"

    @property
    def of_replica(self) -> DatabaseLimits:
        """Those of a replica, of which nothing is waited for long, because the primary can do it too."""
        return replace(
            self,
            wait_seconds=min(self.wait_seconds, REPLICA_SECONDS_MAX),
            connect_seconds=min(self.connect_seconds, REPLICA_SECONDS_MAX),
            statement_seconds=min(self.statement_seconds or REPLICA_SECONDS_MAX, REPLICA_SECONDS_MAX),
            # What a standby has replayed is remembered for its session.
            pooler_mode="session",
        )

    @property
    def is_pooled_by_transaction(self) -> bool:
        """Whether a pooler may run each transaction in another session of PostgreSQL."""
        return self.pooler_mode == "transaction"

    def set_statement(self, *, is_local: bool) -> str:
        """The statement that sets these limits in PostgreSQL, for the session or for one transaction.

        Not sent as parameters of the connection, because PgBouncer refuses those.
        """
        seconds = {
            "lock_timeout": self.lock_seconds,
            "statement_timeout": self.statement_seconds,
            "idle_in_transaction_session_timeout": self.idle_transaction_seconds,
        }
        calls = (
            f"set_config('{name}', '{round(value * 1000)}', {str(is_local).lower()})" for name, value in seconds.items()
        )
        return f"SELECT {', '.join(calls)}"


def sqlite_write_engine(url: URL, limits: DatabaseLimits) -> Engine:
    """An engine of one connection, whose transactions have the database to themselves from their begin."""
    engine = _sqlite_engine(url, limits, lock_seconds=limits.lock_seconds, query_only=False)
    event.listen(engine, "begin", _begin_at_once)
    return engine


def sqlite_bulk_engine(url: URL) -> AsyncEngine:
    """The same for what has the whole file, without a pool."""
    engine = create_async_engine(url, poolclass=NullPool)
    _prepare_sqlite(engine.sync_engine, query_only=False)
    event.listen(engine.sync_engine, "begin", _begin_at_once)
    return engine


def _begin_at_once(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _sqlite_engine(url: URL, limits: DatabaseLimits, *, lock_seconds: float, query_only: bool) -> Engine:
    engine = create_engine(
        url.set(drivername="sqlite+pysqlite"),
        poolclass=QueuePool,
        pool_size=1,
        max_overflow=0,
        pool_timeout=limits.wait_seconds,
        connect_args={"timeout": lock_seconds, "check_same_thread": False},
        hide_parameters=True,
    )
    _prepare_sqlite(engine, query_only=query_only)
    return engine


def sqlite_look_engine(url: URL, limits: DatabaseLimits, *, lock_seconds: float) -> Engine:
    """An engine of one connection that can only read, for lists and whatever else is bounded."""
    engine = _sqlite_engine(url, limits, lock_seconds=lock_seconds, query_only=True)
    cache = f"PRAGMA cache_size = -{LOOKER_CACHE_KIBIBYTES}"
    event.listen(engine, "connect", lambda connection, _: connection.execute(cache))
    return engine


def sqlite_stream_engine(url: URL, limits: DatabaseLimits) -> AsyncEngine:
    """An engine whose connections have a thread each, so that a long read stands in nobody's way."""
    engine = create_async_engine(
        url,
        pool_size=limits.connections,
        max_overflow=0,
        pool_timeout=limits.wait_seconds,
        connect_args={"timeout": limits.lock_seconds},
        hide_parameters=True,
    )
    _prepare_sqlite(engine.sync_engine, query_only=True)
    event.listen(engine.sync_engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return engine


# Of every value that is neither a number nor a text the driver asks in vain, in three places, what it
# stands for, before it takes it as it is. To be told at the first costs a fifth less for each row.
sqlite3.register_adapter(bytes, bytes)
sqlite3.register_adapter(type(None), lambda none: none)


class _HintingCompiler(SQLiteCompiler):
    """Writes hints of which index to take, as SQLAlchemy does for other databases."""

    def get_from_hint_text(self, _table: object, text: str | None) -> str | None:
        """What stands behind the name of the table."""
        return text


def _write_ahead(cursor: Any) -> None:
    """Switches the log on; again where others do the same at a new file, which SQLite itself doesn't wait for."""
    for tries_left in reversed(range(JOURNAL_TRIES)):
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            if not tries_left:
                raise
            time.sleep(JOURNAL_PAUSE_SECONDS)
        else:
            return


def _prepare_sqlite(engine: Engine, *, query_only: bool) -> None:
    engine.dialect.statement_compiler = _HintingCompiler

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: object) -> None:
        # The driver would begin transactions at moments of its own.
        connection.isolation_level = None
        cursor = connection.cursor()
        # A reader of a database that has just been made must not set its journal mode.
        if not query_only:
            _write_ahead(cursor)
            # What a large import touches stays in memory, and goes from the log to its place
            # once and not every few groups: a fifth less time in the database.
            cursor.execute(f"PRAGMA cache_size = -{WRITER_CACHE_KIBIBYTES}")
            cursor.execute(f"PRAGMA wal_autocheckpoint = {LOG_PAGES_MAX}")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute(f"PRAGMA query_only = {'ON' if query_only else 'OFF'}")
        cursor.close()
