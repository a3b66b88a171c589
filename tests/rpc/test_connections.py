"""Clients of the gRPC port that are slow, silent or too active: each is bounded, and none blocks others."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import grpc
import pytest
import pytest_asyncio
import structlog
from daybook.v1.admin_service_pb2 import VerifyAccountsRequest
from daybook.v1.ledger_service_pb2 import (
    BatchCreateTransactionsRequest,
    CreateTransactionRequest,
    ListTransactionsRequest,
)
from daybook.v1.transaction_pb2 import Transaction
from google.protobuf.message import Message
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from hpack import Encoder
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    SettingsFrame,
)

from server.app import serving
from server.book import Book, open_book
from server.config import Settings
from server.ledger.audit import Finding
from server.transport import open_services
from server.transport.open_services import OPEN_STREAMS_MAX
from tests.support.callers import OWN_CONNECTION, Client, Server
from tests.support.certificates import Authority
from tests.support.clock import Clock
from tests.support.ledgers import prepare
from tests.support.markers import shares_a_server
from tests.support.processes import Daybook, Ports, sqlite_url
from tests.support.refusals import refusal_of
from tests.support.waiting import until

MOMENT = 0.5
LONG = 60.0
NO_ERROR, ENHANCE_YOUR_CALM = 0, 11
TOO_BUSY = ("RESOURCE_EXHAUSTED", "TOO_BUSY")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_book(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Book]:
    """One ledger for all tests of this module."""
    database_url = f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('connections')}/daybook.db"
    async with open_book(database_url, Clock(), Random(1).randbytes) as book:
        yield book


NO_WINDOW = {SettingsFrame.INITIAL_WINDOW_SIZE: 0}


@dataclass
class Peer:
    """An HTTP/2 client that sends exactly the frames of a test. It never enlarges its flow-control window."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, *frames: Frame) -> None:
        """Sends frames."""
        self.writer.write(b"".join(frame.serialize() for frame in frames))

    async def frames(self, *, answers: bool = True) -> AsyncIterator[Frame]:
        """Frames until the server closes the connection. With `answers`, pings and settings are acknowledged."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionResetError):
            while True:
                frame, length = Frame.parse_frame_header(memoryview(await self.reader.readexactly(9)))
                frame.parse_body(memoryview(await self.reader.readexactly(length)))
                yield frame
                if answers and "ACK" not in frame.flags:
                    if isinstance(frame, PingFrame):
                        self.send(PingFrame(0, frame.opaque_data, flags=["ACK"]))
                    elif isinstance(frame, SettingsFrame):
                        self.send(SettingsFrame(0, flags=["ACK"]))

    async def goaways(self, *, answers: bool = True) -> list[tuple[int, bytes]]:
        """The codes and texts of the GOAWAY frames that the server sends before it closes the connection."""
        frames = [frame async for frame in self.frames(answers=answers)]
        return [(frame.error_code, frame.additional_data) for frame in frames if isinstance(frame, GoAwayFrame)]


@asynccontextmanager
async def peer(port: int, settings: Mapping[int, int] | None = None) -> AsyncIterator[Peer]:
    """A client that has sent its connection preface, with these HTTP/2 settings."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame(0, dict(settings or {})).serialize())
        yield Peer(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def bounded(**seconds: float) -> Settings:
    """Settings of a server on a free port with one short time limit."""
    return Settings(port=0, shutdown_grace_seconds=0, **seconds)  # type: ignore[arg-type]  # settings have other types


@pytest.mark.parametrize("is_secured", [False, True], ids=["plain", "TLS"])
@shares_a_server
async def test_silent_connection_is_closed(shared_book: Book, authority: Authority, is_secured: bool) -> None:
    """A connection without a preface is closed, with TLS also before its handshake."""
    pair = authority.issue("connections")
    files = {"tls_certificate_file": str(pair.certificate), "tls_key_file": str(pair.key)} if is_secured else {}
    settings = Settings(port=0, shutdown_grace_seconds=0, handshake_seconds_max=MOMENT, **files)  # type: ignore[arg-type]
    async with serving(shared_book, settings) as port, asyncio.timeout(LONG):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        started = time.monotonic()
        # Without TLS the server sends its settings first; with TLS it waits for the client.
        received = await reader.read()
        assert time.monotonic() - started > MOMENT / 2
        assert bool(received) is not is_secured
        writer.close()


@shares_a_server
async def test_idle_connection_is_closed(shared_book: Book) -> None:
    """A connection without calls is closed, even if it answers pings."""
    async with (
        serving(shared_book, bounded(connection_idle_seconds_max=MOMENT)) as port,
        peer(port) as idle,
        asyncio.timeout(LONG),
    ):
        assert [text for _, text in await idle.goaways()] == [b"connection idle"]


@shares_a_server
async def test_old_connection_is_closed(shared_book: Book) -> None:
    """A connection beyond its maximum age gets a GOAWAY, and is closed."""
    settings = bounded(connection_age_seconds_max=MOMENT, stream_seconds_max=MOMENT)
    async with serving(shared_book, settings) as port, peer(port) as old, asyncio.timeout(LONG):
        goaways = await old.goaways()
        assert goaways[0] == (NO_ERROR, b"max_age"), "the first GOAWAY lets running calls end"
        assert len(goaways) > 1


@pytest.mark.parametrize("answers", [True, False])
@shares_a_server
async def test_unanswered_keepalive_closes_the_connection(shared_book: Book, answers: bool) -> None:
    """A connection whose client doesn't answer keepalive pings is closed; any other stays open."""
    settings = bounded(keepalive_seconds=MOMENT / 5, keepalive_timeout_seconds=MOMENT)
    async with serving(shared_book, settings) as port, peer(port) as silent, asyncio.timeout(LONG):
        if not answers:
            assert [text for _, text in await silent.goaways(answers=False)] == [b"ping_timeout"]
            return
        pings = 0
        async for frame in silent.frames():
            pings += isinstance(frame, PingFrame)
            if pings == 10:
                # Ten pings take longer than the timeout of one.
                break
        assert pings == 10


@shares_a_server
async def test_excessive_pings_close_the_connection(shared_book: Book) -> None:
    """A client that sends too many pings gets ENHANCE_YOUR_CALM."""
    async with serving(shared_book, bounded()) as port, peer(port) as eager, asyncio.timeout(LONG):
        eager.send(*(PingFrame(0, b"too many") for _ in range(20)))
        assert await eager.goaways() == [(ENHANCE_YOUR_CALM, b"too_many_pings")]


def health_of(channel: grpc.aio.Channel) -> Any:
    """A stub of the health service, whose types are missing."""
    return HealthStub(channel)


def bad_call(path: bytes) -> Frame:
    """The headers of a call of a method."""
    headers = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path),
        (b":authority", b"localhost"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
    ]
    return HeadersFrame(1, Encoder().encode(headers, huffman=False), flags=["END_HEADERS"])


@shares_a_server
async def test_path_that_is_not_utf_8_ends_no_server(shared_book: Book) -> None:
    """After such a call, which ends a server of grpc.aio, others are served; those that run go on."""
    async with (
        serving(shared_book, bounded()) as port,
        asyncio.timeout(LONG),
        grpc.aio.insecure_channel(f"127.0.0.1:{port}", OWN_CONNECTION) as running,
    ):
        watch = health_of(running).Watch(HealthCheckRequest())
        assert (await watch.read()).status == HealthCheckResponse.SERVING
        for path in (b"/daybook.v1.Ledger/GetBalance?x=\xae", b"/\xff", b"/daybook.v1.Ledger/\xc3"):
            with structlog.testing.capture_logs() as lines:
                async with peer(port) as hostile:
                    hostile.send(bad_call(path))
                    await until(lines.copy)
                async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", OWN_CONNECTION) as channel:
                    health = await health_of(channel).Check(HealthCheckRequest(), wait_for_ready=True)
            assert health.status == HealthCheckResponse.SERVING
            assert {line["event"] for line in lines} <= {
                "grpc server ended by a request",
                "grpc server not replaced yet",
            }
        assert not watch.done()


CALLERS = 16
BAD_CALLS = 60
"""With registered methods (server/transport/lasting_server.py) the process ended after 2 to 23."""


@pytest.mark.long
async def test_paths_that_are_not_utf_8_end_no_process(tmp_path: Path) -> None:
    """Such calls overwrite no memory of a process that posts for many callers."""
    database_url, ports = sqlite_url(tmp_path / "daybook.db"), Ports.free()
    key = await prepare(database_url)
    flags = ("--database-url", database_url, "--port", str(ports.server))
    daybook = Daybook.start("serve", *flags, folder=tmp_path, ports=ports)
    address, is_over = f"127.0.0.1:{ports.server}", asyncio.Event()

    posted = 0

    async def post() -> None:
        nonlocal posted
        async with grpc.aio.insecure_channel(address, OWN_CONNECTION) as channel:
            client = Client(channel, key)
            while not is_over.is_set():
                # A server that is replaced ends its connections.
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await client.post("a", Transaction.GRANT, "1")
                    posted += 1

    def has_replaced(count: int) -> bool:
        assert daybook.process.poll() is None
        return daybook.stderr.count("grpc server ended by a request") == count

    try:
        await asyncio.to_thread(daybook.wait_for, "serving")
        async with asyncio.timeout(LONG), asyncio.TaskGroup() as callers:
            for _ in range(CALLERS):
                callers.create_task(post())
            for number in range(BAD_CALLS):
                async with grpc.aio.insecure_channel(address, OWN_CONNECTION) as channel:
                    await health_of(channel).Check(HealthCheckRequest(), wait_for_ready=True)
                async with peer(ports.server) as hostile:
                    hostile.send(bad_call(b"/\xff"))
                    await until(partial(has_replaced, number + 1))
            is_over.set()
        assert posted
        assert daybook.stop() == 0
    finally:
        daybook.kill()


def send_call(slow: Peer, client: Client | None, method: str, request: Message) -> None:
    """Sends a call whose answer exceeds the peer's flow-control window; without a client it has no credential."""
    body = request.SerializeToString()
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": f"/{method}",
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
        **dict(client.metadata if client else ()),
    }
    slow.send(
        HeadersFrame(1, Encoder().encode(headers.items()), flags=["END_HEADERS"]),
        DataFrame(1, b"\0" + len(body).to_bytes(4) + body, flags=["END_STREAM"]),
    )


@shares_a_server
async def test_unread_answer_ends_with_its_connection(shared_book: Book) -> None:
    """A connection whose client doesn't read an answer ends at its maximum age; others are served meanwhile."""
    settings = bounded(connection_age_seconds_max=2 * MOMENT, stream_seconds_max=MOMENT)
    # Posts through a server without the limit: on a busy machine posting may take longer than the limit.
    async with (
        serving(shared_book, bounded()) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        key = (await with_many_transactions(Server(shared_book, channel))).key
    async with (
        serving(shared_book, settings) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        asyncio.timeout(LONG),
    ):
        client = Client(channel, key)
        async with peer(port) as slow:
            request = ListTransactionsRequest(parent="accounts/acme", page_size=1000)
            send_call(slow, client, "daybook.v1.Ledger/ListTransactions", request)
            frames = [frame async for frame in slow.frames()]
        assert 0 < sum(len(frame.data) for frame in frames if isinstance(frame, DataFrame)) < 100_000
        assert (await client.balance()).amount == "1000"


@shares_a_server
async def test_unread_health_delays_no_shutdown(shared_book: Book) -> None:
    """A client that watches the health and reads nothing doesn't delay its changes, which begin a shutdown."""
    watch = "grpc.health.v1.Health/Watch"

    async def next_status() -> int:
        status: int = (await watching.read()).status
        # Otherwise the server would wait for both clients.
        await stack.aclose()
        return status

    async with asyncio.timeout(LONG), AsyncExitStack() as stack:
        async with serving(shared_book, Settings(port=0, shutdown_grace_seconds=LONG)) as port:
            slow = await stack.enter_async_context(peer(port, NO_WINDOW))
            send_call(slow, None, watch, HealthCheckRequest(service="daybook.v1.Ledger"))
            async for frame in slow.frames():
                if isinstance(frame, HeadersFrame):
                    break
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}", OWN_CONNECTION))
            watching = health_of(channel).Watch(HealthCheckRequest(service="daybook.v1.Ledger"))
            assert (await watching.read()).status == HealthCheckResponse.SERVING
            changed = asyncio.create_task(next_status())
        assert await changed == HealthCheckResponse.NOT_SERVING


@shares_a_server
async def test_open_streams_are_bounded(shared_book: Book) -> None:
    """Streams that need no credential are refused beyond a number; calls are served, and an ended stream makes room."""

    def reflect(channel: grpc.aio.Channel) -> Any:
        method: Any = channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
        return method()

    async with (
        serving(shared_book, bounded()) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}", OWN_CONNECTION) as channel,
        asyncio.timeout(LONG),
    ):
        health = health_of(channel)
        watches = [health.Watch(HealthCheckRequest()) for _ in range(OPEN_STREAMS_MAX)]
        for watch in watches:
            assert (await watch.read()).status == HealthCheckResponse.SERVING
        for stream in (health.Watch(HealthCheckRequest()), reflect(channel)):
            assert (await refusal_of(stream.read())).verdict == TOO_BUSY
        assert (await health.Check(HealthCheckRequest())).status == HealthCheckResponse.SERVING
        for watch in watches:
            watch.cancel()
        await until_answered(partial(reflect, channel))


async def until_answered(start: Callable[[], Any]) -> None:
    """Starts a stream until one is not refused: the server may not know yet that earlier ones have ended."""
    while True:
        stream = start()
        reading = asyncio.create_task(stream.read())
        await asyncio.wait([reading], timeout=MOMENT)
        if not reading.done():
            stream.cancel()
            await asyncio.wait([reading])
            return
        assert (await refusal_of(reading)).verdict == TOO_BUSY


@shares_a_server
@pytest.mark.parametrize("method", ["Check", "List", "Watch"])
async def test_open_call_without_a_message_ends(
    shared_book: Book, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """A call that needs no credential ends with DEADLINE_EXCEEDED if its message doesn't arrive."""
    monkeypatch.setattr(open_services, "OPEN_REQUEST_SECONDS_MAX", MOMENT)
    never = asyncio.Event()

    async def nothing() -> AsyncIterator[bytes]:
        await never.wait()
        yield b""

    async with (
        serving(shared_book, bounded()) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}", OWN_CONNECTION) as channel,
        asyncio.timeout(LONG),
    ):
        upload: Any = channel.stream_unary(f"/grpc.health.v1.Health/{method}")
        assert (await refusal_of(upload(nothing()))).verdict == ("DEADLINE_EXCEEDED", "TIMED_OUT")


@shares_a_server
async def test_unread_stream_is_cancelled(shared_book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream is cancelled if its client reads no message for too long."""
    async with (
        serving(shared_book, bounded(stream_idle_seconds_max=MOMENT)) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        asyncio.timeout(LONG),
    ):
        server = Server(shared_book, channel)
        client = await server.client(await server.create_tenant("streams"), scopes=("admin",))
        monkeypatch.setattr(shared_book.verification, "verify_all", endless_findings)
        with structlog.testing.capture_logs() as logs:
            async with peer(port) as slow:
                send_call(slow, client, "daybook.v1.Admin/VerifyAccounts", VerifyAccountsRequest())
                # The client answers pings, but never enlarges its window.
                reading = asyncio.create_task(slow.goaways())
                while not (
                    ended := [
                        entry
                        for entry in logs
                        if entry["event"] == "call finished" and "VerifyAccounts" in entry["method"]
                    ]
                ):
                    await asyncio.sleep(MOMENT / 10)
                assert not reading.done()
                reading.cancel()
        assert ended[0]["seconds"] > MOMENT / 2


async def endless_findings(_tenant_number: int | None) -> AsyncIterator[Finding]:
    """Findings without end, which exceed every flow-control window."""
    while True:
        yield Finding("acme", 1, "amount", "1", "x" * 1000)


async def with_many_transactions(server: Server) -> Client:
    """A caller with an account of a thousand transactions, which exceed the flow-control window."""
    client = await server.client(await server.create_tenant(f"readers-{server.book.random_bytes(4).hex()}"))
    await client.create_account("acme")
    grant = Transaction(kind=Transaction.GRANT, category="purchase", amount="1", description="x" * 1000)
    for _ in range(10):
        requests = [CreateTransactionRequest(parent="accounts/acme", transaction=grant) for _ in range(100)]
        await client.ledger.BatchCreateTransactions(
            BatchCreateTransactionsRequest(parent="accounts/acme", requests=requests), metadata=client.metadata
        )
    return client
