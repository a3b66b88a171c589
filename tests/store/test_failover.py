"""Errors of PostgreSQL by SQLSTATE, read-only servers and standbys: errors for callers, and replaced connections."""

from __future__ import annotations

import asyncio
import inspect
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import asyncpg
import grpc
import pytest
from asyncpg import exceptions
from daybook.v1.transaction_pb2 import Transaction
from sqlalchemy import Connection, text
from structlog.testing import capture_logs

from server.book import open_book
from server.ledger.errors import DaybookError, NotStorable, ServiceUnavailable
from server.store.database import Database
from server.store.engine import DatabaseLimits
from server.store.failures import Conflict, UnexpectedDatabaseError
from server.store.migrate import can_serve, migrate
from server.store.postgresql import PostgreSQL as PostgreSQLEngine
from server.store.postgresql_errors import MEANINGS, Meaning, meaning_of
from server.store.query import Query
from tests.support.callers import Client, Server
from tests.support.clock import Clock
from tests.support.databases import PostgreSQL
from tests.support.markers import only_postgresql
from tests.support.postgresql_proxy import PostgreSQLProxy
from tests.support.postgresql_standby import standby_of
from tests.support.refusals import refusal_of

SECONDS_MAX = 30
ONE = DatabaseLimits(connections=1)
PROCESS = "SELECT pg_backend_pid()"

_ERRORS: list[Any] = [error for _, error in inspect.getmembers(exceptions, inspect.isclass)]
UNEXPECTED_CLASSES = frozenset(
    "00 01 02 03 09 0A 0F 0L 0P 0Z 10 20 21 23 27 2B 2F 38 39 3F 42 44 54 55 F0 HV P0 XX".split()  # noqa: SIM905
)
KNOWN_CODES = sorted({each.sqlstate for each in _ERRORS if issubclass(each, asyncpg.PostgresError) and each.sqlstate})


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Waits until the condition holds."""
    async with asyncio.timeout(SECONDS_MAX):
        while not await condition():
            await asyncio.sleep(0.02)


async def is_ready(database: Database) -> bool:
    """The result of the readiness check."""
    try:
        return await can_serve(database)
    except DaybookError:
        return False


@contextmanager
def read_only(postgresql: PostgreSQL) -> Iterator[None]:
    """Makes every session of the server refuse writes until the end of the block."""
    postgresql.execute("ALTER SYSTEM SET default_transaction_read_only = on")
    postgresql.execute("SELECT pg_reload_conf()")
    try:
        yield
    finally:
        postgresql.execute("SET default_transaction_read_only = off; ALTER SYSTEM RESET default_transaction_read_only")
        postgresql.execute("SELECT pg_reload_conf()")


@only_postgresql
async def test_read_only_server_refuses_writes_only(server: Server, client: Client, postgresql: PostgreSQL) -> None:
    """While the server is read-only, writes are UNAVAILABLE, readiness fails and lists work; then all recovers."""
    database = server.book.database
    await client.create_account("acme")
    await client.post("acme", Transaction.GRANT, "1")
    assert await is_ready(database)
    with read_only(postgresql):

        async def is_unready() -> bool:
            return not await is_ready(database)

        await until(is_unready)
        for call in (
            lambda: client.post("acme", Transaction.GRANT, "1"),
            lambda: client.create_account("other"),
        ):
            assert (await refusal_of(call())).verdict == ("UNAVAILABLE", "SERVICE_UNAVAILABLE")
        assert len(await client.history()) == 1

    async def posts() -> bool:
        try:
            await client.post("acme", Transaction.GRANT, "1")
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE  # noqa: PT017
            return False
        return True

    await until(posts)
    assert await is_ready(database)


@only_postgresql
async def test_standby_at_the_address_of_the_primary_is_not_used(
    server: Server, client: Client, clock: Clock, postgresql: PostgreSQL
) -> None:
    """While a standby has the primary's address, calls are UNAVAILABLE; once the primary is back, they succeed."""
    await client.create_account("acme")
    url = server.book.database.url
    with standby_of(postgresql) as standby, TemporaryDirectory(prefix="daybook-proxy-") as folder:
        proxy = PostgreSQLProxy(Path(folder), str(url.query["host"]))
        primary_folder = proxy.upstream_folder
        async with proxy.listening(), open_book(proxy.url(str(url.database)), clock, limits=ONE) as book:
            assert await is_ready(book.database)
            proxy.upstream_folder = str(standby.url("x").partition("?host=")[2])
            proxy.cut()
            for call in (
                lambda: book.credentials.ensure_token_key(bytes(32), 0),
                book.credentials.has_tenant,
            ):
                for _ in range(3):
                    with pytest.raises(ServiceUnavailable):
                        await call()
            assert not await is_ready(book.database)
            proxy.upstream_folder = primary_folder
            await book.credentials.ensure_token_key(bytes(32), 0)
            assert await is_ready(book.database)


@only_postgresql
async def test_all_connections_to_a_wrong_server_are_replaced(server: Server, client: Client) -> None:
    """If one connection leads to the wrong server, each other connection is replaced before its next use."""
    del client
    database = server.book.database
    pool = database.pools["write"]
    sessions: set[int] = set()

    async def hold(number: int) -> None:
        if number:
            async with database.primary.snapshot() as connection:
                sessions.add(await connection.scalar(text("SELECT pg_backend_pid()")) or 0)
                await hold(number - 1)

    # Streaming reads leave one connection to transactions.
    await hold(pool.size - 1)
    before = set(sessions)
    assert len(before) == pool.size - 1
    with pytest.raises(ServiceUnavailable):
        await database.transact(partial(_raise, "25006"))
    sessions.clear()
    await hold(pool.size - 1)
    assert not sessions & before


def _raise(sqlstate: str, connection: Connection) -> None:
    connection.execute(_raising(sqlstate))


def _raising(sqlstate: str) -> Any:
    return text(f"DO $$ BEGIN RAISE EXCEPTION 'a reason' USING ERRCODE = '{sqlstate}', DETAIL = 'a secret'; END $$")


def test_every_class_of_errors_has_a_meaning() -> None:
    """Each class of the driver's codes has a meaning, or is listed here as UNEXPECTED."""
    assert len(KNOWN_CODES) > 200
    assert {code[:2] for code in KNOWN_CODES} <= {code[:2] for code in MEANINGS} | UNEXPECTED_CLASSES
    assert not {meaning_of(name) for name in UNEXPECTED_CLASSES} - {Meaning.UNEXPECTED}
    assert {code for code in MEANINGS if len(code) == 5} <= set(KNOWN_CODES)


ERRORS = {
    Meaning.CONFLICT: Conflict,
    Meaning.BUSY: ServiceUnavailable,
    Meaning.DISCONNECTED: ServiceUnavailable,
    Meaning.WRONG_SERVER: ServiceUnavailable,
    Meaning.NOT_STORABLE: NotStorable,
    Meaning.UNEXPECTED: UnexpectedDatabaseError,
}


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A database with one connection."""
    database = Database(database_url, ONE)
    yield database
    await database.close()


@only_postgresql
async def test_each_sqlstate_has_the_effect_of_its_meaning(database: Database) -> None:
    """For each SQLSTATE: the caller's error, whether the session is replaced, and no value in the log."""
    primary = database.primary

    async def sessions() -> list[int]:
        """The session of bounded reads and the session of transactions."""
        ((read,),) = await primary.fetch(Query(text(PROCESS)), {})
        return [int(read), await primary.transact(lambda connection: int(connection.scalar(text(PROCESS)) or 0))]

    for code in KNOWN_CODES:
        if code[:2] in {"00", "01", "02"}:
            # Not errors, so PL/pgSQL can't raise them.
            continue
        meaning, before = meaning_of(code), await sessions()
        for at, operation in enumerate(("read", "write")):
            with capture_logs() as logs, pytest.raises(ERRORS[meaning]) as caught:  # noqa: PT012
                if operation == "read":
                    await primary.fetch(Query(_raising(code)), {})
                else:
                    await primary.transact(partial(_raise, code))
            assert "secret" not in str(logs) + str(caught.value), code
            # Class 08 from a server that continues reports a lost Citus node.
            is_replaced = meaning in {Meaning.DISCONNECTED, Meaning.WRONG_SERVER} and code[:2] != "08"
            after = await sessions()
            assert (after[at] != before[at]) is is_replaced, (code, operation)
            # The other session leads to the wrong server too, and is replaced.
            assert (after[1 - at] != before[1 - at]) is (meaning is Meaning.WRONG_SERVER), (code, operation)
            before = after


@pytest.mark.parametrize("has_tables", [False, True])
async def test_another_encoding_is_refused(
    postgresql: PostgreSQL, clock: Clock, has_tables: bool, monkeypatch: Any
) -> None:
    """A database with another encoding is refused at the start; a character that it lacks is NOT_STORABLE."""
    postgresql.execute("CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")
    try:
        database = Database(postgresql.url("latin"))
        try:
            with pytest.raises(ValueError, match=r"^the database has the encoding LATIN1"):
                await migrate(database)
        finally:
            await database.close()
        if has_tables:
            monkeypatch.setattr(PostgreSQLEngine, "check", lambda _: asyncio.sleep(0))
            async with open_book(postgresql.url("latin"), clock) as book:
                with pytest.raises(NotStorable):
                    await book.credentials.create_tenant(slug="s", uid="u", display_name="€", create_time=0)
                await book.credentials.create_tenant(slug="s", uid="u", display_name="é", create_time=0)
    finally:
        postgresql.execute("DROP DATABASE latin WITH (FORCE)")


@pytest.mark.parametrize("operation", ["read", "write"])
async def test_silent_connection_times_out_and_is_replaced(
    clock: Clock, postgresql: PostgreSQL, operation: str
) -> None:
    """A call to a server that stops answering times out; the next calls get a new session."""
    limits = DatabaseLimits(connections=1, statement_seconds=0.5, connect_seconds=0.5)
    name = f"test_{uuid.uuid4().hex}"
    postgresql.execute(f"CREATE DATABASE {name}")
    with TemporaryDirectory(prefix="daybook-proxy-") as folder:
        proxy = PostgreSQLProxy(Path(folder), postgresql.url(name).partition("?host=")[2])
        async with proxy.listening(), open_book(proxy.url(name), clock, limits=limits) as book:
            works: dict[str, Callable[[], Awaitable[object]]] = {
                "read": book.credentials.has_tenant,
                "write": lambda: book.credentials.ensure_token_key(bytes(32), 0),
            }
            proxy.hold_at(0)
            async with asyncio.timeout(SECONDS_MAX):
                with pytest.raises(ServiceUnavailable):
                    await works[operation]()
                assert proxy.arrived.is_set()
                # The held message goes to a session that has ended.
                proxy.release()
                for work in works.values():
                    await work()
    postgresql.execute(f"DROP DATABASE {name} WITH (FORCE)")
