"""Timeouts of the database: an operation that exceeds one is UNAVAILABLE and never hangs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from sqlalchemy import text

from server.book import database_limits
from server.config import Settings
from server.ledger.errors import ServiceUnavailable
from server.store.credentials import CredentialStore
from server.store.database import Database
from server.store.engine import DatabaseLimits
from server.store.migrate import migrate
from server.store.query import Query
from tests.support.cancellation import ISOLATION, cancel_at_every_step, check_no_transaction
from tests.support.databases import writing
from tests.support.markers import only_postgresql

SHORT = DatabaseLimits(
    connections=1, wait_seconds=1, lock_seconds=0.2, statement_seconds=0.4, idle_transaction_seconds=0.2
)
PATIENCE_SECONDS = 30
"""Much longer than these timeouts, and shorter than the statements."""


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A migrated database with short limits."""
    database = Database(database_url, SHORT)
    await migrate(database)
    yield database
    await database.close()


async def is_alive(database: Database) -> bool:
    """Whether the database answers a read."""
    return not await CredentialStore(database).has_tenant()


@only_postgresql
async def test_slow_statement_times_out(database: Database) -> None:
    """A slow statement is canceled and its connection stays usable; `transact_without_timeouts` has none."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        with pytest.raises(ServiceUnavailable):
            async with database.primary.snapshot() as connection:
                await connection.execute(text("SELECT pg_sleep(60)"))
        assert await is_alive(database)
        await database.primary.transact_without_timeouts(
            lambda connection: connection.execute(text("SELECT pg_sleep(0.5)")).close()
        )


@only_postgresql
async def test_timeout_of_0_is_no_limit(database_url: str) -> None:
    """With statement_seconds of 0, statements have no timeout."""
    database = Database(database_url, replace(SHORT, statement_seconds=0))
    try:
        async with database.primary.snapshot() as connection:
            await connection.execute(text("SELECT pg_sleep(0.5)"))
            assert (await connection.execute(text("SHOW statement_timeout"))).scalar_one() == "0"
    finally:
        await database.close()


async def test_wait_for_another_writer_times_out(database: Database, database_url: str) -> None:
    """A wait for another writer times out as UNAVAILABLE, and a later write succeeds."""
    other = Database(database_url)
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            async with writing(other) as connection:
                if database_url.startswith("postgresql"):
                    await connection.execute(text("LOCK TABLE tenants"))
                with pytest.raises(ServiceUnavailable):
                    await CredentialStore(database).create_tenant(slug="s", uid="u", display_name="n", create_time=1)
            await CredentialStore(database).create_tenant(slug="s", uid="u", display_name="n", create_time=1)
    finally:
        await other.close()


@only_postgresql
async def test_idle_transaction_is_ended(database: Database) -> None:
    """An idle transaction is ended, which releases its locks, and the next transaction works."""
    other = Database(database.url.render_as_string(hide_password=False))

    async def stay_idle() -> None:
        async with database.primary.snapshot() as connection:
            await connection.execute(text("LOCK TABLE tenants"))
            assert await is_alive(other), "answered once the lock is released"
            await connection.execute(text("SELECT 1"))

    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            with pytest.raises(ServiceUnavailable):
                await stay_idle()
            assert await is_alive(database)
    finally:
        await other.close()


async def test_wait_for_a_connection_times_out(database: Database) -> None:
    """If every connection is in use, the wait for one times out as UNAVAILABLE."""
    async with asyncio.timeout(PATIENCE_SECONDS), database.primary.snapshot():
        with pytest.raises(ServiceUnavailable):
            async with database.primary.snapshot():
                pass


@only_postgresql
async def test_cancelled_read_leaves_no_transaction(database: Database) -> None:
    """A read cancelled at any step leaves its connection without a transaction, and returns its place in the pool."""
    primary = database.primary
    async with asyncio.timeout(PATIENCE_SECONDS):
        steps = await cancel_at_every_step(lambda: primary.fetch(ISOLATION, {}), lambda: check_no_transaction(primary))
    assert steps > 1
    assert database.pools["read"].in_use == 0


@only_postgresql
async def test_streams_leave_a_connection_to_transactions(database_url: str) -> None:
    """Streams never take the last connection, and a stream that ends returns its place in the pool."""
    database = Database(database_url, replace(SHORT, idle_transaction_seconds=PATIENCE_SECONDS))
    async with asyncio.timeout(PATIENCE_SECONDS):
        for _ in range(2):
            async with database.primary.snapshot():
                with pytest.raises(ServiceUnavailable):
                    await database.primary.snapshot().__aenter__()
                await database.transact(lambda connection: connection.execute(text("SELECT 1")).close())
    await database.close()


@only_postgresql
@pytest.mark.parametrize("turns", range(8))
async def test_session_lost_before_a_read_is_replaced(database: Database, turns: int) -> None:
    """A session lost before its read returns its place in the pool, whenever the event loop notices the loss."""
    ((process,),) = await database.primary.fetch(Query(text("SELECT pg_backend_pid()")), {})

    async def end_session() -> None:
        other = Database(database.url.render_as_string(hide_password=False))
        await other.primary.fetch(Query(text(f"SELECT pg_terminate_backend({process}, 10000)")), {})
        await other.close()

    # Blocks this thread meanwhile, so that its event loop has not noticed the loss yet.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, end_session()).result()
    for _ in range(turns):
        await asyncio.sleep(0)
    # This read fails if the loss was not noticed before.
    with contextlib.suppress(ServiceUnavailable):
        await is_alive(database)
    assert await is_alive(database)


async def test_read_of_a_closed_database_is_refused(database_url: str) -> None:
    """A read of a closed database is refused and opens no connection."""
    database = Database(database_url, SHORT)
    await migrate(database)
    await database.close()
    with pytest.raises(ServiceUnavailable):
        await is_alive(database)


def test_settings_reach_the_database() -> None:
    """Each setting sets the limit of its name, and settings and limits have the same defaults."""
    assert database_limits(Settings()) == DatabaseLimits()
    settings = Settings(
        database_pool_size=1,
        database_pool_wait_seconds=2,
        database_pool_recycle_seconds=3,
        database_connect_timeout_seconds=4,
        database_lock_timeout_seconds=5,
        database_statement_timeout_seconds=6,
        database_idle_transaction_timeout_seconds=7,
        database_pooler_mode="transaction",
    )
    assert database_limits(settings) == DatabaseLimits(
        connections=1,
        wait_seconds=2,
        recycle_seconds=3,
        connect_seconds=4,
        lock_seconds=5,
        statement_seconds=6,
        idle_transaction_seconds=7,
        pooler_mode="transaction",
    )
