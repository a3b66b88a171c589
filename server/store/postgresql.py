"""The engine for PostgreSQL: creates and pools sessions, and decides which may be reused."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import asyncpg
from sqlalchemy import Connection, NullPool, Select, String, Table, bindparam, event, func, select, text, tuple_
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.engine import URL
from sqlalchemy.engine.interfaces import IsolationLevel
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from server.store.engine import Columns, DatabaseLimits, DatabaseUnfit, Engine, Keys, PoolUse, Rows, Work
from server.store.failures import unavailable
from server.store.postgresql_errors import Meaning, leaves_session_sound, meaning_of, sqlstate_of, translate
from server.store.postgresql_url import connect_arguments
from server.store.query import Query
from server.store.tables import account_states

DRIVER = "postgresql+asyncpg"
STATEMENT_BYTES_CACHED_MAX = 65_536
"""The longest statement that stays prepared, in bytes: a list merged from 64 index scans of 500 bytes each."""
END_SECONDS_MAX = 1.0
"""Timeout for closing an interrupted session, which cancels its statement at the server, in seconds."""
LEFT_SECONDS_MAX = 0.25
"""Time for which a read continues after its caller was cancelled, in seconds. It occupies a connection of the pool."""
MIGRATION_LOCK = 0x0DA1_B00C
"""The key of the advisory lock that serializes migrations; arbitrary, but fixed."""
INDEX_MEMORY_MEBIBYTES = 256
"""Memory of the server for sorting an index of a bulk transaction, in MiB."""
ONE_CONNECTION_PER_NODE = text("SET LOCAL citus.multi_shard_modify_mode TO 'sequential'")
"""Makes Citus use one connection to each node until the transaction ends.

Citus requires this if a transaction writes a copied table after it accessed a distributed one.
PostgreSQL without Citus accepts the setting and ignores it.
"""
_GENERATION = "daybook_generation"
_PROCESS = "SELECT pg_backend_pid()"
# A loop inside the database costs no round trip for each account. A sharded PostgreSQL refuses
# one SELECT ... FOR UPDATE of several accounts, and one UPDATE locks in the order of its plan.
_LOCK_EACH = text("""
    DO $$
    DECLARE
        each bigint;
    BEGIN
        FOREACH each IN ARRAY current_setting('daybook.accounts')::bigint[] LOOP
            PERFORM FROM account_states WHERE account_number = each FOR UPDATE;
        END LOOP;
    END $$
""")

Result = TypeVar("Result")


class Session(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no types
    """A session of the pool of bounded reads."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.info: dict[str, Any] = {}
        """Data of this program about the session."""


class PostgreSQL(Engine):
    """Sessions of one PostgreSQL server: a pool of asyncpg's for bounded reads, one of SQLAlchemy's for the rest.

    A session returns to its pool only if it is known to be idle and in no transaction. In every
    other case (a cancelled caller, a timeout, an error that is not the server's answer to a
    statement) it is closed. Its place in the pool becomes free only after that, so the server never
    has more sessions than the size of the pools.
    """

    has_clock = True
    has_round_trips = True
    has_table = Query(text("SELECT 1 WHERE to_regclass(:name) IS NOT NULL").bindparams(bindparam("name", type_=String)))

    def __init__(
        self, url: URL, limits: DatabaseLimits, *, reads: int | None = None, must_be_primary: bool = True
    ) -> None:
        """`reads` connections are for bounded reads, by default half of all; the other pool has the rest.

        Bounded reads have at least one connection, and the rest at least two: streaming reads may
        take hours, so together they always leave one connection to transactions. With
        `must_be_primary`, connections to a standby are refused. Raises DatabaseUrlInvalid.
        """
        super().__init__()
        self.insert = insert
        self._arguments = connect_arguments(url, limits, must_be_primary=must_be_primary)
        # A client-side timeout, for a server that is unreachable and can't cancel the statement itself.
        self._timeout = {
            "command_timeout": limits.statement_seconds + limits.connect_seconds if limits.statement_seconds else None
        }
        # A pooler may run the next statement in another session, so no statement stays prepared.
        self._prepared = (
            {"statement_cache_size": 0}
            if limits.is_pooled_by_transaction
            else {"max_cacheable_statement_size": STATEMENT_BYTES_CACHED_MAX}
        )
        self._limits = limits
        self._generation = 0
        """Incremented if the sessions lead to the wrong server. Sessions of earlier generations are replaced."""
        self._read_count = max(1, limits.connections // 2) if reads is None else reads
        self._read_places = asyncio.Semaphore(self._read_count)
        pool_size = max(2, limits.connections - self._read_count)
        self._stream_places = asyncio.Semaphore(pool_size - 1)
        self._pool: Any = None
        self._is_closed = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._engine = self._make_engine(
            self._timeout,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=limits.wait_seconds,
            pool_recycle=limits.recycle_seconds,
        )
        self.writer = self._engine.sync_engine
        self.dialect = self.writer.dialect
        self._listen()

    def _make_engine(self, timeout: Mapping[str, Any], **options: Any) -> AsyncEngine:
        arguments = {**self._arguments, **self._prepared, **timeout}
        if self._limits.is_pooled_by_transaction:
            # An unnamed statement, which the next one replaces.
            arguments |= {"prepared_statement_cache_size": 0, "prepared_statement_name_func": str}
        # Logged errors must not show values.
        engine = create_async_engine(f"{DRIVER}://", connect_args=arguments, hide_parameters=True, **options)
        self._adopt(engine.sync_engine)
        return engine

    def _listen(self) -> None:
        @event.listens_for(self.writer, "connect")
        def prepare(connection: Any, record: Any) -> None:
            record.info[_GENERATION] = self._generation
            if not self._limits.is_pooled_by_transaction:
                connection.run_async(lambda driver: driver.execute(_set_limits(self._limits, is_local=False)))

        @event.listens_for(self.writer, "checkin")
        def end_transaction(connection: Any, record: Any) -> None:
            # A BEGIN that is interrupted leaves a transaction open that the driver does not track.
            if connection is None or connection.driver_connection.is_closed():
                return
            if connection.driver_connection.is_in_transaction():
                record.invalidate()

        @event.listens_for(self.writer, "checkout")
        def replace(connection: Any, record: Any, _proxy: object) -> None:
            if connection.driver_connection.is_closed() or record.info[_GENERATION] != self._generation:
                raise DisconnectionError

    @property
    def pools(self) -> Mapping[str, PoolUse]:
        """Sessions of bounded reads, and those of transactions and streaming reads."""
        in_use = 0 if self._pool is None else self._pool.get_size() - self._pool.get_idle_size()
        return {
            "read": self._use_of("read", self._read_count, in_use),
            "write": self._use_of_engine("write", self.writer),
        }

    async def fetch(self, query: Query, parameters: Mapping[str, object]) -> Rows:
        """The rows of a query."""
        with self.using("read", "read"):
            return await self.run(lambda session: self.fetch_by(session, query, parameters))

    async def fetch_by(self, session: Any, query: Query, parameters: Mapping[str, object]) -> Rows:
        """The rows of a query, read in a session."""
        compiled = query.compiled(self.dialect)
        end = self.tracer.statement("postgresql", compiled.text)
        try:
            rows: Rows = await session.fetch(compiled.text, *compiled.values(parameters))
        except BaseException as failure:
            end(failure)
            raise
        end(None)
        return rows

    async def run(self, work: Callable[[Any], Awaitable[Result]]) -> Result:
        """Does a bounded read in a session of asyncpg. Raises the errors of the driver.

        If the caller is cancelled, a read that has begun continues for LEFT_SECONDS_MAX, because
        interrupting it costs the session and its prepared statements.
        """
        await self._take_place(self._read_places)
        try:
            session = await self._acquire()
        except BaseException:
            self._read_places.release()
            raise
        task = asyncio.create_task(self._run(session, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            asyncio.get_running_loop().call_later(LEFT_SECONDS_MAX, task.cancel)
            raise

    async def _take_place(self, places: asyncio.Semaphore) -> None:
        """Waits for a place in a pool. asyncpg's own timeout would include the time to connect."""
        try:
            async with asyncio.timeout(self._limits.wait_seconds):
                await places.acquire()
        except TimeoutError:
            raise PoolTimeout(f"no connection was free within {self._limits.wait_seconds} seconds") from None

    async def _acquire(self) -> Any:
        if self._is_closed:
            raise unavailable("the database is closed")
        if self._pool is None:
            # With min_size=0 this opens no connection, so no other task runs in between.
            self._pool = await asyncpg.create_pool(
                min_size=0,
                max_size=self._read_count,
                max_queries=sys.maxsize,
                max_inactive_connection_lifetime=0,
                connect=self._connect,
                reset=_skip_reset,
                connection_class=Session,
                **self._arguments,
                **self._prepared,
                **self._timeout,
            )
        while True:
            session = await self._pool.acquire()
            age_seconds = time.monotonic() - session.info["connected"]
            if session.info[_GENERATION] == self._generation and age_seconds < self._limits.recycle_seconds:
                return session
            await self._give_back(session, is_sound=False)

    async def _connect(self, *arguments: Any, **options: Any) -> Session:
        session: Session = await asyncpg.connect(*arguments, **options)
        try:
            if not self._limits.is_pooled_by_transaction:
                await session.execute(_set_limits(self._limits, is_local=False))
        except BaseException:
            session.terminate()
            raise
        session.info |= {_GENERATION: self._generation, "connected": time.monotonic()}
        return session

    async def _run(self, session: Any, work: Callable[[Any], Awaitable[Result]]) -> Result:
        generation, is_sound = self._generation, True
        try:
            # Raises InterfaceError if the session was lost: its pool proxy is detached then.
            session.is_closed()
            generation = session.info[_GENERATION]
            return await work(session)
        except BaseException as error:
            is_sound = self._is_sound_after(error, generation)
            raise
        finally:
            try:
                await self._give_back(session, is_sound=is_sound)
            finally:
                self._read_places.release()

    async def _give_back(self, session: Any, *, is_sound: bool) -> None:
        """Returns a session to the pool without a round trip, or closes it and cancels its statement."""
        # If closing fails, the driver aborts the session.
        with suppress(Exception):
            # A BEGIN that is interrupted leaves a transaction open that the driver does not track.
            if not is_sound or session.is_in_transaction():
                await session.close(timeout=END_SECONDS_MAX)
        await self._pool.release(session)

    def _is_sound_after(self, error: BaseException, generation: int) -> bool:
        if meaning_of(sqlstate_of(error)) is Meaning.WRONG_SERVER and generation == self._generation:
            # All other sessions lead to the same server, so they are replaced before their next use.
            self._generation += 1
        return leaves_session_sound(error)

    @asynccontextmanager
    async def _transaction(self, isolation_level: IsolationLevel) -> AsyncIterator[AsyncConnection]:
        async with self._engine.connect() as connection:
            generation = connection.info[_GENERATION]
            try:
                if isolation_level != "READ COMMITTED":
                    await connection.execution_options(isolation_level=isolation_level)
                async with connection.begin():
                    if self._limits.is_pooled_by_transaction:
                        await connection.exec_driver_sql(_set_limits(self._limits, is_local=True))
                    yield connection
            except BaseException as error:
                if not self._is_sound_after(error, generation) and not connection.invalidated:
                    await connection.invalidate()
                raise

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[AsyncConnection]:
        """A connection for streaming reads, all of one snapshot of the database."""
        with self.using("write", "snapshot"):
            await self._take_place(self._stream_places)
            try:
                async with self._transaction("REPEATABLE READ") as connection:
                    yield connection
            finally:
                self._stream_places.release()

    async def transact(self, work: Work[Result]) -> Result:
        """Runs `work` in one database transaction. Raises Conflict if another writer interfered."""
        with self.using("write", "write"):
            async with self._transaction("READ COMMITTED") as connection:
                return await connection.run_sync(work)

    async def transact_without_timeouts(self, work: Work[Result]) -> Result:
        """Like `transact`, for work that may take long: only connecting has a timeout."""
        with self.translated():
            async with self._unlimited_transaction() as connection:
                return await connection.run_sync(work)

    @asynccontextmanager
    async def bulk_transaction(self) -> AsyncIterator[AsyncConnection]:
        """A database transaction that writes many gigabytes; only connecting has a timeout."""
        with self.translated():
            async with self._unlimited_transaction() as connection:
                await connection.execute(ONE_CONNECTION_PER_NODE)
                await connection.execute(text(f"SET LOCAL maintenance_work_mem = '{INDEX_MEMORY_MEBIBYTES}MB'"))
                yield connection
                # Otherwise the planner has no statistics until autovacuum runs.
                await connection.execute(text("ANALYZE"))

    @asynccontextmanager
    async def _unlimited_transaction(self) -> AsyncIterator[AsyncConnection]:
        engine = self._make_engine({}, poolclass=NullPool)
        async with engine.begin() as connection:
            yield connection

    async def insert_bulk(self, connection: AsyncConnection, table: Table, rows: Sequence[Sequence[object]]) -> None:
        """Inserts rows by COPY."""
        driver: Any = (await connection.get_raw_connection()).driver_connection
        await driver.copy_records_to_table(table.name, records=rows, columns=table.columns.keys())

    def lock_accounts(self, connection: Connection, account_numbers: Collection[int]) -> None:
        """Locks accounts one by one in ascending order, so that two writers never deadlock.

        Takes two statements for any number of accounts.
        """
        numbers = sorted(account_numbers)
        if len(numbers) == 1:
            number = account_states.c.account_number
            connection.execute(select(number).where(number == numbers[0]).with_for_update())
            return
        # DO takes no parameters.
        connection.execute(select(func.set_config("daybook.accounts", f"{{{','.join(map(str, numbers))}}}", True)))
        connection.execute(_LOCK_EACH)

    def try_migration_lock(self, connection: Connection) -> bool:
        """Takes the lock of migrations until the transaction ends; False if another process holds it."""
        return bool(connection.scalar(select(func.pg_try_advisory_xact_lock(MIGRATION_LOCK))))

    def with_keys(self, statement: Select[Any], columns: Columns, keys: Keys) -> Select[Any]:
        """The statement, for the rows that have one of the keys in these columns.

        The keys are a list, because a sharded PostgreSQL can't send a joined table of keys to its nodes.
        """
        return statement.where(tuple_(*columns).in_(keys))

    async def check(self) -> None:
        """Raises DatabaseUnfit for an encoding other than UTF8, and for a pooler in another mode than configured."""
        with self.translated():
            await self._check()

    async def _check(self) -> None:
        async with self._unpooled() as connection:
            encoding = await connection.fetchval("SHOW server_encoding")
            if encoding != "UTF8":
                raise DatabaseUnfit(
                    f"the database has the encoding {encoding}, which lacks characters that texts may have:"
                    " create it with CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0"
                )
            process = await connection.fetchval(_PROCESS)
            if process == connection.get_server_pid() or self._limits.is_pooled_by_transaction:
                return
            # The connection leads to a pooler. In transaction mode it gives the same session to the next client.
            async with self._unpooled() as other:
                if await other.fetchval(_PROCESS) == process:
                    raise DatabaseUnfit(
                        "database_url leads to a connection pooler in transaction mode:"
                        " set DAYBOOK_DATABASE_POOLER_MODE=transaction"
                    )

    @asynccontextmanager
    async def _unpooled(self) -> AsyncIterator[Any]:
        """A connection of asyncpg outside the pools, without prepared statements."""
        connection = await asyncpg.connect(**self._arguments, statement_cache_size=0)
        try:
            yield connection
        finally:
            connection.terminate()

    async def close(self) -> None:
        """Closes every connection."""
        self._is_closed = True
        if self._tasks:
            # After this time each task is cancelled or has reached its own timeout.
            await asyncio.wait(self._tasks, timeout=LEFT_SECONDS_MAX + END_SECONDS_MAX)
        if self._pool is not None:
            # If this fails or takes too long, the pool aborts its connections.
            with suppress(Exception):
                await asyncio.wait_for(self._pool.close(), END_SECONDS_MAX)
        await self._engine.dispose()

    def translate(self, error: Exception) -> Exception:
        """The error for callers in place of one of PostgreSQL or its driver; other errors unchanged."""
        return translate(error)


async def _skip_reset(_session: Any) -> None:
    """Replaces asyncpg's reset, which costs a round trip: a bounded read leaves no state in its session."""


def _set_limits(limits: DatabaseLimits, *, is_local: bool) -> str:
    """The statement that sets the limits, for the session or for one transaction.

    A statement, because PgBouncer refuses these settings as connection parameters.
    """
    seconds = {
        "lock_timeout": limits.lock_seconds,
        "statement_timeout": limits.statement_seconds,
        "idle_in_transaction_session_timeout": limits.idle_transaction_seconds,
    }
    local = str(is_local).lower()
    calls = [f"set_config('{name}', '{round(each * 1000)}', {local})" for name, each in seconds.items()]
    return f"SELECT {', '.join(calls)}"
