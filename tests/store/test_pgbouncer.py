"""A real PgBouncer between the ledger and PostgreSQL, in both of its modes."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import asyncpg
import grpc
import pytest
from daybook.v1.transaction_pb2 import Transaction
from sqlalchemy import text

from server.app import serving
from server.book import open_book
from server.config import Settings
from server.ledger.errors import ServiceUnavailable
from server.store.database import Database
from server.store.engine import DatabaseLimits, DatabaseUnfit
from server.store.migrate import can_serve, migrate
from tests.support.callers import Server
from tests.support.cancellation import ISOLATION, cancel_at_every_step, check_no_transaction
from tests.support.clock import Clock
from tests.support.databases import PostgreSQL, ReusedDatabase

PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
SECONDS_MAX = 30
PORT = 6432
BY_TRANSACTION = DatabaseLimits(pooler_mode="transaction")

pytestmark = pytest.mark.skipif(PGBOUNCER is None, reason="the program pgbouncer is not installed")


@asynccontextmanager
async def pgbouncer(postgresql: PostgreSQL, database: str, mode: str, *more: str) -> AsyncIterator[str]:
    """Runs PgBouncer until the end of the block; yields the URL of the database through it."""
    assert PGBOUNCER is not None
    upstream = postgresql.url(database).partition("?host=")[2]
    with TemporaryDirectory(prefix="daybook-pgbouncer-") as name:
        folder = Path(name)
        lines = (
            "[databases]",
            f"* = host={upstream} user=postgres",
            "[pgbouncer]",
            "listen_addr =",
            f"listen_port = {PORT}",
            f"unix_socket_dir = {folder}",
            "auth_type = any",
            f"pool_mode = {mode}",
            *more,
        )
        (folder / "pgbouncer.ini").write_text("\n".join(lines))
        arguments = [PGBOUNCER, str(folder / "pgbouncer.ini")]
        if os.geteuid() == 0:
            # PgBouncer refuses to run as root, so it gets the user of the tests' PostgreSQL.
            user = postgresql._server.system_user
            assert user is not None
            shutil.chown(folder, user)
            arguments[1:1] = ["-u", user]
        process = await asyncio.create_subprocess_exec(
            *arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            async with asyncio.timeout(SECONDS_MAX):
                while not await listens(folder / f".s.PGSQL.{PORT}"):
                    assert process.returncode is None, "PgBouncer ended"
                    await asyncio.sleep(0.01)
            yield f"postgresql+asyncpg://postgres@/{database}?host={folder}&port={PORT}"
        finally:
            process.kill()
            await process.wait()


async def listens(socket: Path) -> bool:
    """Whether the socket accepts connections."""
    try:
        _, writer = await asyncio.open_unix_connection(socket)
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


@pytest.fixture
def name(reused_database: ReusedDatabase) -> str:
    """The name of an empty, migrated database."""
    reused_database.empty()
    return reused_database.url.partition("@/")[2].partition("?")[0]


async def work(url: str, limits: DatabaseLimits, clock: Clock) -> None:
    """Eight callers of two servers post, list and read concurrently; the books stay correct."""
    async with (
        open_book(url, clock, limits=limits) as book,
        serving(book, Settings(port=0, shutdown_grace_seconds=1)) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        open_book(url, clock, limits=limits) as other_book,
        serving(other_book, Settings(port=0, shutdown_grace_seconds=1)) as other_port,
        grpc.aio.insecure_channel(f"127.0.0.1:{other_port}") as other_channel,
    ):
        server = Server(book, channel)
        tenant_number = await server.create_tenant("house")
        client = await server.client(tenant_number, scopes={"admin"})
        await client.create_account("acme")
        other_client = type(client)(other_channel, client.key)

        async def call(number: int) -> None:
            caller = (client, other_client)[number % 2]
            for _ in range(5):
                posted = await caller.post("acme", Transaction.GRANT, "1")
                assert posted.name in {each.name for each in await caller.history()}
                assert await caller.lots()
                await caller.balance()

        await asyncio.gather(*map(call, range(8)))
        assert (await client.balance()).amount == "40"
        assert await client.verify() == []
        assert await can_serve(book.database)


async def limits_of(database: Database) -> list[str]:
    """The timeouts of a writing transaction."""
    names = ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout")
    return await database.transact(lambda connection: [str(connection.scalar(text(f"SHOW {name}"))) for name in names])


async def test_session_mode_works_by_default(postgresql: PostgreSQL, name: str, clock: Clock) -> None:
    """A pooler in session mode works without any setting, and the timeouts are set."""
    async with pgbouncer(postgresql, name, "session") as url:
        await work(url, DatabaseLimits(), clock)
        database = Database(url)
        assert await limits_of(database) == ["5s", "30s", "1min"]
        await database.close()


async def test_transaction_mode_works_when_it_is_set(postgresql: PostgreSQL, name: str, clock: Clock) -> None:
    """Transaction mode works with fewer sessions than connections, and timeouts are set within transactions only."""
    async with pgbouncer(postgresql, name, "transaction", "default_pool_size = 3") as url:
        await work(url, BY_TRANSACTION, clock)
        database = Database(url, BY_TRANSACTION)
        assert await limits_of(database) == ["5s", "30s", "1min"]
        await database.close()
        connection = await asyncpg.connect(url.replace("+asyncpg", ""), statement_cache_size=0)
        assert await connection.fetchval("SHOW lock_timeout") == "0", "another client of the pooler is not affected"
        await connection.close()


async def test_transaction_mode_is_refused_by_default(postgresql: PostgreSQL, name: str) -> None:
    """By default a pooler in transaction mode is refused, and the error names the setting."""
    async with pgbouncer(postgresql, name, "transaction") as url:
        database = Database(url)
        with pytest.raises(DatabaseUnfit, match="set DAYBOOK_DATABASE_POOLER_MODE=transaction"):
            await migrate(database)
        await database.close()


@pytest.mark.parametrize(("mode", "limits"), [("session", DatabaseLimits()), ("transaction", BY_TRANSACTION)])
async def test_migration_works_through_a_pooler(postgresql: PostgreSQL, mode: str, limits: DatabaseLimits) -> None:
    """Two processes migrate an empty database concurrently."""
    postgresql.execute("CREATE DATABASE pooled")
    try:
        async with pgbouncer(postgresql, "pooled", mode) as url:
            databases = [Database(url, limits) for _ in range(2)]
            await asyncio.gather(*map(migrate, databases))
            assert await can_serve(databases[0])
            for each in databases:
                await each.close()
    finally:
        postgresql.execute("DROP DATABASE pooled WITH (FORCE)")


async def test_a_cancelled_read_leaves_no_transaction(postgresql: PostgreSQL, name: str) -> None:
    """In transaction mode, a read cancelled at any step of the event loop leaves no transaction open."""
    async with pgbouncer(postgresql, name, "transaction", "default_pool_size = 1") as url:
        database = Database(url, DatabaseLimits(connections=1, pooler_mode="transaction"))
        primary = database.primary
        async with asyncio.timeout(SECONDS_MAX):
            check = partial(check_no_transaction, primary)
            assert await cancel_at_every_step(partial(primary.fetch, ISOLATION, {}), check) > 1
        await database.close()


async def test_a_stopped_pgbouncer_is_unavailable(postgresql: PostgreSQL, name: str) -> None:
    """Calls get UNAVAILABLE after PgBouncer has stopped."""
    async with pgbouncer(postgresql, name, "session") as url:
        database = Database(url, DatabaseLimits(connect_seconds=1))
        await migrate(database)
    with pytest.raises(ServiceUnavailable):
        await can_serve(database)
    await database.close()
