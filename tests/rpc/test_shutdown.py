"""Shutdown: a server first stops being ready but still takes calls, and stops once load balancers have noticed."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from server.app import serving
from server.book import Book
from server.config import Settings
from tests.support.callers import Server
from tests.support.ledgers import prepare
from tests.support.markers import only_sqlite
from tests.support.processes import Daybook, Ports, sqlite_url
from tests.support.waiting import SECONDS_MAX, until

DRAIN_SECONDS = 600
"""Drain time, longer than any test waits."""


@asynccontextmanager
async def health_at(port: int) -> AsyncIterator[Any]:
    """A client of the health service."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield HealthStub(channel)


async def is_not_ready(health: Any) -> bool:
    """Whether the health service reports that the ledger is not ready."""
    answer = await health.Check(HealthCheckRequest(service="daybook.v1.Ledger"), timeout=SECONDS_MAX)
    return bool(answer.status == HealthCheckResponse.NOT_SERVING)


@only_sqlite
async def test_draining_server_is_not_ready_and_answers(book: Book) -> None:
    """During a drain the health check fails and calls on new connections succeed; afterwards the port is closed."""
    stopping, drained = asyncio.Event(), asyncio.Event()
    ports: asyncio.Queue[int] = asyncio.Queue()

    async def serve() -> None:
        async with serving(
            book, Settings(port=0, shutdown_grace_seconds=1), drain_seconds=lambda: DRAIN_SECONDS
        ) as port:
            ports.put_nowait(port)
            await stopping.wait()
        drained.set()

    running = asyncio.create_task(serve())
    port = await ports.get()
    async with health_at(port) as health, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert not await is_not_ready(health)
        stopping.set()
        await until(lambda: is_not_ready(health))
        server = Server(book, channel)
        client = await server.client(await server.create_tenant("late"))
        assert (await client.create_account("acme")).name == "accounts/acme"
        assert not drained.is_set()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            await is_not_ready(health)


async def test_sigterm_drains_and_sigint_does_not(tmp_path: Path) -> None:
    """After SIGTERM `daybook serve` keeps running, not ready, until a second signal; after SIGINT it stops at once."""
    url = sqlite_url(tmp_path / "daybook.db")
    await prepare(url)
    ports = Ports.free()
    flags = ("--database-url", url, "--port", str(ports.server), "--shutdown-drain-seconds", str(DRAIN_SECONDS))
    daybook = Daybook.start("serve", *flags, folder=tmp_path / "first", ports=ports)
    try:
        await asyncio.to_thread(daybook.wait_for, " serving ")
        daybook.process.send_signal(signal.SIGTERM)
        async with health_at(ports.server) as health:
            await until(lambda: is_not_ready(health))
        assert daybook.process.poll() is None
        daybook.process.send_signal(signal.SIGTERM)
        assert daybook.process.wait(SECONDS_MAX) == -signal.SIGTERM
    finally:
        daybook.kill()
    daybook = Daybook.start("serve", *flags, folder=tmp_path / "second", ports=ports)
    try:
        await asyncio.to_thread(daybook.wait_for, " serving ")
        assert await asyncio.to_thread(daybook.stop, signal.SIGINT) == 0
    finally:
        daybook.kill()
