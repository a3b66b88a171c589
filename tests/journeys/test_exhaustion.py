"""A server that runs out of memory for a message, or of room on its disk, refuses calls, loses nothing and goes on."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import psutil
import pytest
import pytest_asyncio
from daybook.v1.transaction_pb2 import Transaction

from tests.support.callers import Client
from tests.support.ledgers import prepare
from tests.support.processes import Daybook, Ports, sqlite_url
from tests.support.refusals import read_refusal

GRANT, CHARGE = Transaction.GRANT, Transaction.CHARGE
MEBIBYTE = 1 << 20
BOMB_BYTES = 400 * MEBIBYTE
"""About 400 kB on the wire."""
GROWTH_BYTES_MAX = 64 * MEBIBYTE
CALLS_MAX = 5000


@pytest.fixture
def daybook(tmp_path: Path) -> Iterator[tuple[Daybook, str]]:
    """A server on SQLite in a process of its own, and a key."""
    url = sqlite_url(tmp_path / "daybook.db")
    key = asyncio.run(prepare(url))
    ports = Ports.free()
    flags = ("--database-url", url, "--port", str(ports.server))
    started = Daybook.start("serve", *flags, folder=tmp_path / "server", ports=ports)
    try:
        started.wait_for(" serving ")
        yield started, key
        assert started.stop() == 0
        assert "Traceback" not in started.stderr
    finally:
        started.kill()


@pytest_asyncio.fixture
async def client(daybook: tuple[Daybook, str]) -> AsyncIterator[Client]:
    """A caller of the server."""
    started, key = daybook
    async with grpc.aio.insecure_channel(f"127.0.0.1:{started.ports.server}") as channel:
        yield Client(channel, key)


async def test_a_compressed_message_is_bounded_by_its_full_length(daybook: tuple[Daybook, str], client: Client) -> None:
    """A message of 400 MiB that travels as 400 kB is refused, and the server's memory doesn't grow by it."""
    process = psutil.Process(daybook[0].process.pid)
    await client.create_account("acme")
    before = process.memory_info().rss
    bomb: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = client.channel.unary_unary(
        "/daybook.v1.Ledger/CreateTransaction", request_serializer=bytes
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bomb(bytes(BOMB_BYTES), metadata=client.metadata, compression=grpc.Compression.Gzip)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert process.memory_info().rss < before + GROWTH_BYTES_MAX
    assert (await client.post("acme", GRANT, "1")).sequence == 1


async def test_a_full_disk(daybook: tuple[Daybook, str], client: Client) -> None:
    """Postings are UNAVAILABLE while files can't grow, lists go on, and postings succeed once there is room."""
    process = psutil.Process(daybook[0].process.pid)
    await client.create_account("acme")
    await client.post("acme", GRANT, str(CALLS_MAX))
    database = daybook[0].folder.parent / "daybook.db"
    room = max(file.stat().st_size for file in (database, database.with_name("daybook.db-wal"))) + MEBIBYTE
    process.rlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    acknowledged = 0

    async def charge_on() -> None:
        nonlocal acknowledged
        for _ in range(CALLS_MAX):
            await client.post("acme", CHARGE, "-1", description="x" * 1000)
            acknowledged += 1

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await charge_on()
    assert (caught.value.code(), read_refusal(caught.value).reason) == (
        grpc.StatusCode.UNAVAILABLE,
        "SERVICE_UNAVAILABLE",
    )
    assert acknowledged > 0
    assert len(await client.history("acme")) == acknowledged + 1

    process.rlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert (await client.post("acme", CHARGE, "-1")).sequence == acknowledged + 2
    assert (await client.balance("acme")).amount == str(CALLS_MAX - acknowledged - 1)
    assert await client.verify() == []
