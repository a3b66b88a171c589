"""PostgreSQL that is full, in recovery or refuses connections: clear refusals, nothing lost, no restart of the server.

tests/journeys/test_processes.py stops PostgreSQL under load, and tests/store/test_failover.py makes it read-only. Only
root can mount a disk to fill, so here a trigger raises PostgreSQL's error; `make chaos` fills a real one.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator

import grpc
import pytest
from daybook.v1.transaction_pb2 import Transaction
from sqlalchemy import text
from structlog.testing import capture_logs

from server.app import serving
from server.book import open_book
from server.config import Settings
from server.ledger.errors import ServiceUnavailable
from server.store.migrate import can_serve
from tests.support.callers import Client, Server
from tests.support.clock import Clock
from tests.support.databases import PostgreSQL, writing
from tests.support.markers import only_postgresql
from tests.support.refusals import refusal_of
from tests.support.waiting import until

GRANT = Transaction.GRANT
DRIVER_WORDS = ("space", "extend", "recover", "starting", "connection", "database", "role", "postgres", "secret")
CALLS = 6
END_SESSIONS = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE usename LIKE 'test_%'"


async def check_unavailable(client: Client, request_id: str) -> None:
    """Checks that a posting is refused, without a word of the database."""
    refusal = await refusal_of(client.post("acme", GRANT, "1", request_id=request_id))
    assert refusal.verdict == ("UNAVAILABLE", "SERVICE_UNAVAILABLE")
    assert not [word for word in DRIVER_WORDS if word in refusal.message.lower()]


async def check_refusals(client: Client) -> None:
    """Checks that concurrent postings are refused."""
    await asyncio.gather(*(check_unavailable(client, f"late {number}") for number in range(CALLS)))


async def check_recovery(client: Client, admin: Client, before: Transaction) -> None:
    """Checks that the refused postings left nothing and succeed at once when repeated."""
    repeated = [client.post("acme", GRANT, "1", request_id=f"late {number}") for number in range(CALLS)]
    posted = sorted(await asyncio.gather(*repeated), key=lambda row: row.sequence)
    assert await client.history() == [before, *posted]
    assert await admin.verify() == []


@only_postgresql
@pytest.mark.parametrize(
    "trigger",
    ["TRIGGER full_disk BEFORE INSERT", "CONSTRAINT TRIGGER full_disk AFTER INSERT"],
    ids=["at a statement", "at the commit"],
)
async def test_full_disk(server: Server, client: Client, admin: Client, trigger: str) -> None:
    """While PostgreSQL can't extend its files, postings are refused and reads go on."""
    await client.create_account("acme")
    before = await client.post("acme", GRANT, "1")
    deferred = "DEFERRABLE INITIALLY DEFERRED" if "CONSTRAINT" in trigger else ""
    async with writing(server.book.database) as connection:
        await connection.execute(
            text(
                "CREATE FUNCTION fail_as_full() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION"
                " 'could not extend file: No space left on device' USING ERRCODE = 'disk_full', DETAIL = 'secret';"
                " END $$"
            )
        )
        await connection.execute(
            text(f"CREATE {trigger} ON transactions {deferred} FOR EACH ROW EXECUTE FUNCTION fail_as_full()")
        )
    try:
        await check_refusals(client)
        assert await client.history() == [before]
        assert (await client.balance()).amount == "1"
        assert await can_serve(server.book.database)
    finally:
        async with writing(server.book.database) as connection:
            await connection.execute(text("DROP FUNCTION fail_as_full CASCADE"))
    await check_recovery(client, admin, before)


@only_postgresql
async def test_calls_during_recovery(client: Client, admin: Client, postgresql: PostgreSQL) -> None:
    """While PostgreSQL recovers after a crash, postings and reads are refused; then nothing is lost."""
    await client.create_account("acme")
    before = await client.post("acme", GRANT, "1")
    await asyncio.to_thread(postgresql.kill)
    await asyncio.to_thread(postgresql.start_in_recovery)
    try:
        with capture_logs() as logs:

            async def is_recovering() -> bool:
                await check_unavailable(client, "late 0")
                return any(each.get("sqlstate") == "57P03" for each in logs)

            await until(is_recovering)
        await check_refusals(client)
        for read in (client.history(), client.balance()):
            assert (await refusal_of(read)).verdict == ("UNAVAILABLE", "SERVICE_UNAVAILABLE")
    finally:
        await asyncio.to_thread(postgresql.promote)
    await check_recovery(client, admin, before)


@pytest.fixture
async def limited(postgresql: PostgreSQL, clock: Clock) -> AsyncIterator[tuple[str, Server]]:
    """A server whose PostgreSQL user is no superuser; also the name of this user and of the database."""
    name = f"test_{uuid.uuid4().hex}"
    postgresql.execute(f"CREATE ROLE {name} LOGIN")
    postgresql.execute(f"CREATE DATABASE {name} OWNER {name}")
    async with (
        open_book(postgresql.url(name).replace("postgres@", f"{name}@"), clock) as book,
        serving(book, Settings(port=0, shutdown_grace_seconds=1)) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield name, Server(book, channel)
    postgresql.execute(f"DROP DATABASE {name} WITH (FORCE)")
    postgresql.execute(f"DROP ROLE {name}")


@pytest.mark.parametrize(
    ("refuse", "accept", "sqlstate"),
    [
        ("DATABASE {} ALLOW_CONNECTIONS false", "DATABASE {} ALLOW_CONNECTIONS true", "55000"),
        # The same error as at max_connections, which only a restart can change.
        ("ROLE {} CONNECTION LIMIT 0", "ROLE {} CONNECTION LIMIT -1", "53300"),
    ],
    ids=["database", "too many"],
)
async def test_refused_connections(
    limited: tuple[str, Server], postgresql: PostgreSQL, refuse: str, accept: str, sqlstate: str
) -> None:
    """While PostgreSQL refuses connections, postings and reads are refused and the server is not ready."""
    name, server = limited
    tenant = await server.create_tenant("house")
    client, admin = await server.client(tenant), await server.client(tenant, scopes={"admin"})
    await client.create_account("acme")
    before = await client.post("acme", GRANT, "1")
    await asyncio.to_thread(postgresql.execute, f"ALTER {refuse.format(name)}")
    await asyncio.to_thread(postgresql.execute, END_SESSIONS)
    with capture_logs() as logs:
        await check_refusals(client)
        for read in (client.history(), client.balance()):
            assert (await refusal_of(read)).verdict == ("UNAVAILABLE", "SERVICE_UNAVAILABLE")
        with pytest.raises(ServiceUnavailable):
            await can_serve(server.book.database)
    assert sqlstate in {each.get("sqlstate") for each in logs}
    await asyncio.to_thread(postgresql.execute, f"ALTER {accept.format(name)}")
    await check_recovery(client, admin, before)
