"""Starts on the schema of a later version, and during a migration by another process."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import asyncpg
import grpc
import pytest

from server.store.postgresql import MIGRATION_LOCK
from server.transport.readiness import is_serving
from tests.support.callers import Client
from tests.support.command_line import invoke
from tests.support.processes import Daybook, Ports
from tests.support.refusals import refusal_of
from tests.support.waiting import SECONDS_MAX


@pytest.fixture
def newer(tmp_path: Path, migrated_file: Path) -> Path:
    """A folder with a database that a later version has migrated incompatibly."""
    (tmp_path / "daybook.db").write_bytes(migrated_file.read_bytes())
    set_revision(tmp_path, "9999")
    return tmp_path


def set_revision(folder: Path, revision: str) -> None:
    """Sets the revision of a database."""
    with closing(sqlite3.connect(folder / "daybook.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))


@pytest.mark.parametrize("arguments", [("migrate",), ("serve", "--port", "0"), ("tenants", "list"), ("verify",)])
def test_schema_of_a_later_version_is_refused(
    arguments: tuple[str, ...], newer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an incompatible later schema, every command ends with a distinct exit code and one line."""
    monkeypatch.chdir(newer)
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (os.EX_PROTOCOL, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("daybook: the database was migrated to 9999 by a later version")


def test_worker_starts_again_during_an_upgrade(newer: Path) -> None:
    """On a compatible later schema, a worker that died is restarted and serves."""
    set_revision(newer, "9999_since_0001")
    ports = Ports.free()
    workers = ("--workers", "2", "--worker-port-base", str(ports.gateway))
    daybook = Daybook.start("serve", *workers, "--port", str(ports.server), folder=newer, ports=ports)
    try:
        for count in (2, 3, 4):
            while daybook.stderr.count(" serving ") < count:
                assert daybook.process.poll() is None, daybook.stderr
                time.sleep(0.05)
            daybook.family()[0].kill()
        assert daybook.stop(signal.SIGTERM) == 0
    finally:
        daybook.kill()


@asynccontextmanager
async def migrating(database_url: str) -> AsyncIterator[None]:
    """Holds the locks of a process that migrates an empty database."""
    if database_url.startswith("sqlite"):
        with closing(sqlite3.connect(database_url.partition(":///")[2], isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("BEGIN IMMEDIATE")
            yield
            connection.execute("ROLLBACK")
        return
    connection = await asyncpg.connect(database_url.replace("+asyncpg", ""))
    try:
        async with connection.transaction():
            await connection.execute(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})")
            yield
    finally:
        await connection.close()


async def test_start_during_another_migration(database_url: str, tmp_path: Path) -> None:
    """A server that waits for a migration is alive but not ready, logs it, stops on SIGTERM, and serves afterwards."""
    ports = Ports.free()
    address = f"127.0.0.1:{ports.server}"
    flags = ("serve", "--port", str(ports.server), "--database-url", database_url)
    waiting = "waiting for migration lock"
    async with migrating(database_url):
        ended = Daybook.start(*flags, folder=tmp_path / "ended", ports=ports)
        try:
            await asyncio.to_thread(ended.wait_for, waiting)
            assert await is_serving(address, "")
            assert not await is_serving(address, "daybook.v1.Ledger")
            async with grpc.aio.insecure_channel(address) as channel:
                refusal = await refusal_of(Client(channel, "no key").balance("acme"))
            assert refusal.verdict == ("UNAVAILABLE", "SERVICE_UNAVAILABLE")
            started = time.monotonic()
            assert await asyncio.to_thread(ended.stop, signal.SIGTERM) == 0
            assert time.monotonic() - started < 5
        finally:
            ended.kill()
        patient = Daybook.start(*flags, folder=tmp_path / "patient", ports=ports)
        await asyncio.to_thread(patient.wait_for, waiting)
    try:
        async with asyncio.timeout(SECONDS_MAX):
            while not await is_serving(address, "daybook.v1.Ledger"):
                await asyncio.sleep(0.05)
        assert await asyncio.to_thread(patient.stop, signal.SIGTERM) == 0
    finally:
        patient.kill()
