"""The engine for SQLite: one file, one writer, and readers that never wait for the writer."""

from __future__ import annotations

import asyncio
import contextvars
import errno
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import Dialect, NullPool, Select, Table, and_, column, create_engine, event, text, values
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.dialects.sqlite.base import SQLiteCompiler
from sqlalchemy.engine import URL
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import QueuePool

from server.store.engine import Columns, DatabaseLimits, DatabaseUrlInvalid, Engine, Keys, PoolUse, Result, Rows, Work
from server.store.failures import Conflict, DatabaseBroken, driver_error, translate_common, unavailable
from server.store.query import Query

READ_LOCK_SECONDS_MAX = 0.25
"""Timeout of a bounded read while SQLite recovers its write-ahead log, in seconds. It blocks the event loop."""
READER_CACHE_KIBIBYTES = 8192
"""Page cache of bounded reads: holds the upper levels of the indexes of a large ledger."""
WRITER_CACHE_KIBIBYTES = 32_768
"""Page cache of the writer: holds a large import, which is then checkpointed once and not every few groups."""
BULK_CACHE_KIBIBYTES = 262_144
SORTING_THREADS = 2
LOG_PAGES_MAX = 4000
"""Length of the write-ahead log at which it is checkpointed, in pages: 16 MiB."""
JOURNAL_TRIES = 100
JOURNAL_PAUSE_SECONDS = 0.05

# Registered because the driver otherwise searches for an adapter of every value that is neither a
# number nor a text, which takes a fifth of the time of an insert.
sqlite3.register_adapter(bytes, bytes)
sqlite3.register_adapter(type(None), lambda none: none)


class SQLite(Engine):
    """A SQLite file in WAL mode.

    A whole transaction runs in the writer thread, because a thread switch per statement costs more
    than the statements. A bounded read costs less than a thread switch, so it runs on the event
    loop's thread. Each connection of streaming reads has a thread.
    """

    has_clock = False
    has_round_trips = False
    has_table = Query(text("SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = :name"))

    def __init__(self, url: URL, limits: DatabaseLimits) -> None:
        """Creates the file's folder. Raises DatabaseUrlInvalid, and OSError if the folder can't be created."""
        super().__init__()
        self.insert = insert
        if problem := _problem_of(url):
            raise DatabaseUrlInvalid(problem)
        self._url = url
        self._file = Path(url.database or "").absolute()
        self._thread = ThreadPoolExecutor(1, "database")
        self._is_closed = False
        self.writer = self._write_engine(
            limits.lock_seconds, poolclass=QueuePool, pool_size=1, max_overflow=0, pool_timeout=limits.wait_seconds
        )
        self.dialect = self.writer.dialect
        self._streams = self._async_engine(
            "BEGIN",
            is_writer=False,
            pool_size=limits.connections,
            max_overflow=0,
            pool_timeout=limits.wait_seconds,
            connect_args={"timeout": limits.lock_seconds},
        )

    def _write_engine(self, lock_seconds: float, **options: Any) -> sqlalchemy.Engine:
        engine = create_engine(
            self._url.set(drivername="sqlite+pysqlite"),
            connect_args={"timeout": lock_seconds, "check_same_thread": False},
            # Logged errors must not show values.
            hide_parameters=True,
            **options,
        )
        self._prepare(engine, "BEGIN IMMEDIATE", is_writer=True)
        return engine

    def _async_engine(self, begin: str, *, is_writer: bool, **options: Any) -> AsyncEngine:
        engine = create_async_engine(self._url, hide_parameters=True, **options)
        self._prepare(engine.sync_engine, begin, is_writer=is_writer)
        return engine

    def _prepare(self, engine: sqlalchemy.Engine, begin: str, *, is_writer: bool) -> None:
        self._adopt(engine)
        engine.dialect.statement_compiler = _HintingCompiler
        event.listen(engine, "connect", lambda connection, _: _set_up(connection, is_writer=is_writer))
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))

    @cached_property
    def reader(self) -> sqlite3.Connection:
        """The driver's connection of bounded reads."""
        if self._is_closed:
            raise sqlite3.OperationalError("the database is closed")
        connection = sqlite3.connect(self._file, timeout=READ_LOCK_SECONDS_MAX)
        _set_up(connection, is_writer=False)
        connection.execute(f"PRAGMA cache_size = -{READER_CACHE_KIBIBYTES}")
        return connection

    @property
    def pools(self) -> Mapping[str, PoolUse]:
        """The connections of streaming reads, and the writer's connection."""
        return {
            "read": self._use_of_engine("read", self._streams.sync_engine),
            "write": self._use_of_engine("write", self.writer),
        }

    async def fetch(self, query: Query, parameters: Mapping[str, object]) -> Rows:
        """The rows of a query."""
        with self.tracer.work("read"), self.translated():
            compiled = query.compiled(self.dialect)
            end = self.tracer.statement("sqlite", compiled.text)
            try:
                rows = self.reader.execute(compiled.text, compiled.values(parameters)).fetchall()
            except BaseException as failure:
                end(failure)
                raise
            end(None)
            return rows

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[AsyncConnection]:
        """A connection for streaming reads, all of one snapshot of the database."""
        with self.using("read", "snapshot"):
            async with self._streams.begin() as connection:
                yield connection

    async def transact(self, work: Work[Result]) -> Result:
        """Runs `work` in one database transaction, in the writer's thread."""
        with self.using("write", "write"):
            # Logs and spans in the thread get the caller's context.
            run = contextvars.copy_context().run
            return await asyncio.get_running_loop().run_in_executor(self._thread, run, _transact, self.writer, work)

    async def transact_without_timeouts(self, work: Work[Result]) -> Result:
        """Runs `work` in one database transaction on its own connection. Raises Conflict if another process writes."""
        with self.translated():
            return await asyncio.to_thread(_transact_separately, self._write_engine(READ_LOCK_SECONDS_MAX), work)

    @asynccontextmanager
    async def bulk_transaction(self) -> AsyncIterator[AsyncConnection]:
        """A database transaction that writes many gigabytes. Raises ValueError if the file is open elsewhere.

        Uses a rollback journal: SQLite writes to the file directly and saves only the old pages, instead
        of writing all new pages to the log first.
        """
        await self._disconnect()
        engine = self._async_engine("BEGIN IMMEDIATE", is_writer=True, poolclass=NullPool)
        async with engine.connect() as connection:
            await _set_journal(connection, "DELETE")
            await _pragma(connection, f"cache_size = -{BULK_CACHE_KIBIBYTES}")
            await _pragma(connection, f"threads = {SORTING_THREADS}")
            try:
                with self.translated():
                    async with connection.begin():
                        yield connection
            finally:
                await _set_journal(connection, "WAL")

    async def insert_bulk(self, connection: AsyncConnection, table: Table, rows: Sequence[Sequence[object]]) -> None:
        """Inserts rows without SQLAlchemy."""
        await (await _driver_of(connection)).executemany(_insert_statement(table, self.dialect), rows)

    def with_keys(self, statement: Select[Any], columns: Columns, keys: Keys) -> Select[Any]:
        """The statement, for the rows that have one of the keys in these columns.

        The keys are a joined table: SQLite looks each of them up in an index. For `(a, b) IN (VALUES ...)`
        it would scan the whole table.
        """
        joined = values(*(column(each.name, each.type) for each in columns), name="keys").data(keys).cte()
        return statement.join(joined, and_(*(joined.c[each.name] == each for each in columns)))

    async def back_up(self, file: Path) -> None:
        """Copies the database, as it is at the start of the copy, to a new file. Others may write meanwhile."""
        await asyncio.to_thread(self._back_up, file)

    def _back_up(self, file: Path) -> None:
        """The copy appears whole or not at all."""
        for path, number, is_wrong in (
            (self._file, errno.ENOENT, not self._file.exists()),
            (file, errno.EEXIST, file.exists()),
            (file.parent, errno.ENOENT, not file.parent.is_dir()),
        ):
            if is_wrong:
                raise OSError(number, os.strerror(number), str(path))
        partial = file.with_name(f"{file.name}.partial")
        partial.unlink(missing_ok=True)
        try:
            # One read transaction, which lets others write.
            with self.translated(), closing(sqlite3.connect(self._file)) as source:
                _set_up(source, is_writer=False)
                with closing(sqlite3.connect(partial)) as copy:
                    source.backup(copy)
            partial.rename(file)
        finally:
            partial.unlink(missing_ok=True)
        # SQLite has synced the content, but not the name.
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    async def close(self) -> None:
        """Closes every connection, after the transaction under way."""
        await asyncio.to_thread(self._thread.shutdown)
        self._is_closed = True
        await self._disconnect()

    async def _disconnect(self) -> None:
        if (reader := self.__dict__.pop("reader", None)) is not None:
            reader.close()
        self.writer.dispose()
        await self._streams.dispose()

    def translate(self, error: Exception) -> Exception:
        """The error for callers in place of one of SQLite; other errors unchanged."""
        driver = driver_error(error)
        if isinstance(driver, sqlite3.Error):
            code = _code_of(driver)
            if code == sqlite3.SQLITE_NOTADB:
                return DatabaseBroken("database_url names a file that is not a SQLite database")
            if code == sqlite3.SQLITE_CORRUPT:
                return DatabaseBroken(f"SQLite can't read the database: {driver}")
        if isinstance(error, sqlite3.OperationalError):
            return unavailable(str(error))
        return translate_common(error)


class _HintingCompiler(SQLiteCompiler):
    """Writes index hints (`INDEXED BY`), which SQLAlchemy supports for other databases."""

    def get_from_hint_text(self, _table: object, text: str | None) -> str | None:
        """The text after the name of the table."""
        return text


@lru_cache
def _insert_statement(table: Table, dialect: Dialect) -> str:
    return str(insert(table).compile(dialect=dialect))


def _problem_of(url: URL) -> str | None:
    """Why the file of this URL can't hold a ledger, as text after the setting's name; None if it can.

    Checked before the file is opened, because the driver's message names no cause. Creates the
    file's folder if it is missing. Does not open the file, because closing it would release the
    locks that SQLite has on it in this process. Raises OSError if the folder can't be created.
    """
    if url.query:
        return "takes no parameters after a ? for SQLite"
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        return "must name a file, like sqlite+aiosqlite:///daybook.db: a ledger in memory is lost when the process ends"
    file = Path(url.database)
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        return None if os.access(file.parent, os.W_OK | os.X_OK) else "names a folder that this user can't write to"
    if not file.is_file():
        return "names a folder or a device; it must name a file"
    if not os.access(file, os.R_OK | os.W_OK):
        return "names a file that this user can't read and write"
    if not os.access(file.parent, os.W_OK | os.X_OK):
        return "names a file in a folder that this user can't write to, where SQLite keeps its log"
    return None


def _set_up(connection: Any, *, is_writer: bool) -> None:
    """Prepares a new connection of the driver."""
    # Otherwise the driver would begin transactions implicitly.
    connection.isolation_level = None
    cursor = connection.cursor()
    # A reader of a new file must not set its journal mode.
    if is_writer:
        _write_ahead(cursor)
        cursor.execute(f"PRAGMA cache_size = -{WRITER_CACHE_KIBIBYTES}")
        cursor.execute(f"PRAGMA wal_autocheckpoint = {LOG_PAGES_MAX}")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute(f"PRAGMA query_only = {'OFF' if is_writer else 'ON'}")
    cursor.close()


def _write_ahead(cursor: Any) -> None:
    """Switches the write-ahead log on. Retries while another process does so, because SQLite doesn't wait then."""
    for tries_left in reversed(range(JOURNAL_TRIES)):
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            if not tries_left:
                raise
            time.sleep(JOURNAL_PAUSE_SECONDS)
        else:
            return


def _transact(engine: sqlalchemy.Engine, work: Work[Result]) -> Result:
    with engine.begin() as connection:
        return work(connection)


def _transact_separately(engine: sqlalchemy.Engine, work: Work[Result]) -> Result:
    """Raises Conflict if another process writes meanwhile."""
    try:
        return _transact(engine, work)
    except OperationalError as error:
        if _code_of(driver_error(error)) == sqlite3.SQLITE_BUSY:
            raise Conflict from None
        raise
    finally:
        engine.dispose()


def _code_of(error: BaseException) -> int:
    """The primary result code: the lower byte of an extended result code."""
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF


async def _driver_of(connection: AsyncConnection) -> Any:
    driver = (await connection.get_raw_connection()).driver_connection
    assert driver is not None
    return driver


async def _pragma(connection: AsyncConnection, setting: str) -> object:
    """Sets a pragma outside a transaction; returns SQLite's answer."""
    rows = await (await _driver_of(connection)).execute_fetchall(f"PRAGMA {setting}")
    return rows[0][0] if rows else None


async def _set_journal(connection: AsyncConnection, mode: str) -> None:
    try:
        found = await _pragma(connection, f"journal_mode = {mode}")
    except sqlite3.OperationalError:
        found = None
    if str(found).upper() != mode:
        raise ValueError("another process has the database open: stop the servers that use it first")
