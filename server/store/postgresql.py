"""Connections to one PostgreSQL: how they are made, and which of them may be used again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import asyncpg
from sqlalchemy import NullPool, event
from sqlalchemy.engine import URL
from sqlalchemy.engine.interfaces import IsolationLevel
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import PoolProxiedConnection

from server.store.engines import DatabaseLimits, DatabaseUnfit
from server.store.failures import Meaning, leaves_session_sound, meaning_of, sqlstate_of
from server.store.postgresql_url import connect_arguments

STATEMENT_BYTES_CACHED_MAX = 65_536
"""The longest statement that stays prepared: the longest lists are merged of 64 walks, 500 bytes each."""
END_SECONDS_MAX = 1.0
"""How long the end of an interrupted session may take, until its statement is canceled at the server."""
LEFT_SECONDS_MAX = 0.25
"""How long a read goes on whose caller has left. It keeps its place in the pool for that long at most."""
_GENERATION = "daybook_generation"
_SESSION = "SELECT pg_backend_pid()"

Result = TypeVar("Result")


class PostgreSQL:
    """A pool of connections to one PostgreSQL.

    A connection goes back to the pool only if its session is known to be idle and in no
    transaction. In every other case (a caller who leaves, a timeout, an error that is not the
    server's answer to a statement) the session is ended, and the pool makes a new one. The
    place in the pool is free once the old session has ended, so the server never has more
    sessions than the pool has places.
    """

    def __init__(self, url: URL, limits: DatabaseLimits, *, must_be_primary: bool = True) -> None:
        """`must_be_primary` refuses to connect to a standby. Raises DatabaseUrlInvalid."""
        self._arguments = connect_arguments(url, limits, must_be_primary=must_be_primary)
        self._limits = limits
        self._generation = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self.engine: AsyncEngine = create_async_engine(
            "postgresql+asyncpg://",
            pool_size=limits.connections,
            max_overflow=0,
            pool_timeout=limits.wait_seconds,
            pool_recycle=limits.recycle_seconds,
            connect_args=self._arguments | _driver_arguments(limits),
            # An error that is logged must not tell values.
            hide_parameters=True,
        )
        self._listen()

    def _listen(self) -> None:
        engine = self.engine.sync_engine

        @event.listens_for(engine, "connect")
        def prepare(connection: Any, record: Any) -> None:
            record.info[_GENERATION] = self._generation
            if not self._limits.is_pooled_by_transaction:
                connection.run_async(lambda driver: driver.execute(self._limits.set_statement(is_local=False)))

        @event.listens_for(engine, "checkin")
        def end_transaction(connection: Any, record: Any) -> None:
            # A BEGIN that failed in its second half leaves one of which the driver does not know.
            if connection is None or connection.driver_connection.is_closed():
                return
            if connection.driver_connection.is_in_transaction():
                record.invalidate()

        @event.listens_for(engine, "checkout")
        def replace(connection: Any, record: Any, _proxy: object) -> None:
            # The server ended it while it was in the pool, or another of its age led to a wrong server.
            if connection.driver_connection.is_closed() or record.info[_GENERATION] != self._generation:
                raise DisconnectionError

    async def run(self, work: Callable[[Any], Awaitable[Result]]) -> Result:
        """Does bounded work on a connection of asyncpg, for reads that need nothing of SQLAlchemy but its pool.

        Work that has begun goes on for a while when its caller leaves, because to interrupt it
        costs a session, and with it the statements that are prepared there. To make an
        AsyncConnection, and to end that, costs as much as the round trip.
        """
        pooled = await self.engine.raw_connection()
        task = asyncio.create_task(self._run(pooled, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            asyncio.get_running_loop().call_later(LEFT_SECONDS_MAX, task.cancel)
            raise

    async def _run(self, pooled: PoolProxiedConnection, work: Callable[[Any], Awaitable[Result]]) -> Result:
        try:
            return await work(pooled.driver_connection)
        except BaseException as error:
            if not self._is_sound_after(error, pooled.info):
                await _end(pooled)
            raise
        finally:
            pooled.close()

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[AsyncConnection]:
        """A connection of SQLAlchemy."""
        async with self.engine.connect() as connection:
            info = connection.info
            try:
                yield connection
            except BaseException as error:
                if not self._is_sound_after(error, info) and not connection.invalidated:
                    await connection.invalidate()
                raise

    @asynccontextmanager
    async def transaction(self, isolation_level: IsolationLevel = "READ COMMITTED") -> AsyncIterator[AsyncConnection]:
        """A connection of SQLAlchemy in a transaction, which the end of the block commits."""
        async with self.connect() as connection:
            if isolation_level != "READ COMMITTED":
                await connection.execution_options(isolation_level=isolation_level)
            async with connection.begin():
                if self._limits.is_pooled_by_transaction:
                    await connection.exec_driver_sql(self._limits.set_statement(is_local=True))
                yield connection

    def _is_sound_after(self, error: BaseException, info: dict[str, Any]) -> bool:
        if meaning_of(sqlstate_of(error)) is Meaning.WRONG_SERVER and info[_GENERATION] == self._generation:
            # All others were made to the same address, so they are replaced when they are next asked for.
            self._generation += 1
        return leaves_session_sound(error)

    @asynccontextmanager
    async def unlimited_transaction(self) -> AsyncIterator[AsyncConnection]:
        """A transaction on a connection of its own, in which nothing has a limit but the time to connect."""
        arguments = self._arguments | _prepared_statements(self._limits)
        engine = create_async_engine(
            "postgresql+asyncpg://", poolclass=NullPool, connect_args=arguments, hide_parameters=True
        )
        async with engine.begin() as connection:
            yield connection

    async def check(self) -> None:
        """Raises DatabaseUnfit for an encoding other than UTF8, and for a pooler in another mode than is set."""
        async with self._apart() as connection:
            encoding = await connection.fetchval("SHOW server_encoding")
            if encoding != "UTF8":
                raise DatabaseUnfit(
                    f"the database has the encoding {encoding}, which lacks characters of texts:"
                    " make it with CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0"
                )
            session = await connection.fetchval(_SESSION)
            if session == connection.get_server_pid() or self._limits.is_pooled_by_transaction:
                return
            # A pooler is in between. In transaction mode it gives the same session to the next client.
            async with self._apart() as other:
                if await other.fetchval(_SESSION) == session:
                    raise DatabaseUnfit(
                        "database_url leads to a connection pooler in transaction mode:"
                        " set DAYBOOK_DATABASE_POOLER_MODE=transaction"
                    )

    @asynccontextmanager
    async def _apart(self) -> AsyncIterator[Any]:
        """A connection of asyncpg beside the pool, which keeps no statement prepared."""
        connection = await asyncpg.connect(**self._arguments, statement_cache_size=0)
        try:
            yield connection
        finally:
            connection.terminate()

    async def close(self) -> None:
        """Closes every connection."""
        if self._tasks:
            # After this time each of them is canceled, or ended by its own limits.
            await asyncio.wait(self._tasks, timeout=LEFT_SECONDS_MAX + END_SECONDS_MAX)
        await self.engine.dispose()


def _driver_arguments(limits: DatabaseLimits) -> dict[str, Any]:
    return {
        # Where the server isn't there any more to give a statement up, this process does.
        "command_timeout": limits.statement_seconds + limits.connect_seconds if limits.statement_seconds else None,
        **_prepared_statements(limits),
    }


def _prepared_statements(limits: DatabaseLimits) -> dict[str, Any]:
    """What the driver and SQLAlchemy keep prepared: nothing where the next statement may run in another session."""
    if not limits.is_pooled_by_transaction:
        return {"max_cacheable_statement_size": STATEMENT_BYTES_CACHED_MAX}
    return {
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
        # The unnamed statement, which the next one replaces.
        "prepared_statement_name_func": str,
    }


async def _end(pooled: PoolProxiedConnection) -> None:
    """Ends a session, together with the statement that it may still be at."""
    driver: Any = pooled.driver_connection
    try:
        # What goes wrong here ends the session too.
        with suppress(Exception):
            await driver.close(timeout=END_SECONDS_MAX)
    finally:
        pooled.invalidate()
