"""Clients of the gRPC port who are slow, silent or too lively: each is bounded, and none keeps others out."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random

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
from tests.support.callers import Client, Server
from tests.support.certificates import Authority
from tests.support.clock import Clock
from tests.support.markers import shares_a_server

MOMENT = 0.5
LONG = 60.0
NO_ERROR, ENHANCE_YOUR_CALM = 0, 11


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_book(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Book]:
    """One ledger for all tests of this module."""
    database_url = f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('connections')}/daybook.db"
    async with open_book(database_url, Clock(), Random(1).randbytes) as book:
        yield book


@dataclass
class Peer:
    """A client of HTTP/2 that does exactly what a test says. It never asks for more data than fits at first."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, *frames: Frame) -> None:
        """Sends frames."""
        self.writer.write(b"".join(frame.serialize() for frame in frames))

    async def frames(self, *, answers: bool = True) -> AsyncIterator[Frame]:
        """What comes until the server closes the connection; answers to pings and settings unless told otherwise."""
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

    async def goodbyes(self, *, answers: bool = True) -> list[tuple[int, bytes]]:
        """Why the server closed the connection: the codes and texts of its GOAWAYs."""
        frames = [frame async for frame in self.frames(answers=answers)]
        return [(frame.error_code, frame.additional_data) for frame in frames if isinstance(frame, GoAwayFrame)]


@asynccontextmanager
async def peer(port: int) -> AsyncIterator[Peer]:
    """A client that has greeted."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame(0).serialize())
        yield Peer(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def bounded(**seconds: float) -> Settings:
    """A server on a free port with one bound that is short, and no other."""
    return Settings(port=0, shutdown_grace_seconds=0, **seconds)  # type: ignore[arg-type]  # settings have other types


@pytest.mark.parametrize("is_secured", [False, True], ids=["plain", "TLS"])
@shares_a_server
async def test_who_says_nothing_is_sent_away(shared_book: Book, authority: Authority, is_secured: bool) -> None:
    """A connection over which no greeting comes is closed, with TLS before its handshake is done."""
    pair = authority.issue("connections")
    files = {"tls_certificate_file": str(pair.certificate), "tls_key_file": str(pair.key)} if is_secured else {}
    settings = Settings(port=0, shutdown_grace_seconds=0, handshake_seconds_max=MOMENT, **files)  # type: ignore[arg-type]
    async with serving(shared_book, settings) as port, asyncio.timeout(LONG):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        started = time.monotonic()
        # With TLS the server waits for the client to begin; without it sends its own greeting first.
        greeting = await reader.read()
        assert time.monotonic() - started > MOMENT / 2
        assert bool(greeting) is not is_secured
        writer.close()


@shares_a_server
async def test_idle_connection_is_closed(shared_book: Book) -> None:
    """A connection without a call is closed, however well it answers pings."""
    async with (
        serving(shared_book, bounded(connection_idle_seconds_max=MOMENT)) as port,
        peer(port) as idle,
        asyncio.timeout(LONG),
    ):
        assert [text for _, text in await idle.goodbyes()] == [b"connection idle"]


@shares_a_server
async def test_old_connection_is_made_anew(shared_book: Book) -> None:
    """A connection that is old is asked to go, and closed."""
    settings = bounded(connection_age_seconds_max=MOMENT, stream_seconds_max=MOMENT)
    async with serving(shared_book, settings) as port, peer(port) as old, asyncio.timeout(LONG):
        goodbyes = await old.goodbyes()
        assert goodbyes[0] == (NO_ERROR, b"max_age"), "first it takes no more calls, and lets those under way end"
        assert len(goodbyes) > 1


@pytest.mark.parametrize("answers", [True, False])
@shares_a_server
async def test_who_is_not_there_any_more(shared_book: Book, answers: bool) -> None:
    """A client is asked whether it is there; if it doesn't answer, its connection is closed, else it stays."""
    settings = bounded(keepalive_seconds=MOMENT / 5, keepalive_timeout_seconds=MOMENT)
    async with serving(shared_book, settings) as port, peer(port) as silent, asyncio.timeout(LONG):
        if not answers:
            assert [text for _, text in await silent.goodbyes(answers=False)] == [b"ping_timeout"]
            return
        asked = 0
        async for frame in silent.frames():
            asked += isinstance(frame, PingFrame)
            if asked == 10:
                # Which takes longer than it may take to answer once.
                break
        assert asked == 10


@shares_a_server
async def test_who_pings_too_often_is_sent_away(shared_book: Book) -> None:
    """A client that keeps the server busy with pings is told to calm down."""
    async with serving(shared_book, bounded()) as port, peer(port) as lively, asyncio.timeout(LONG):
        lively.send(*(PingFrame(0, b"too many") for _ in range(20)))
        assert await lively.goodbyes() == [(ENHANCE_YOUR_CALM, b"too_many_pings")]


def ask(slow: Peer, client: Client, method: str, request: Message) -> None:
    """Asks for more than fits into what the peer takes at first."""
    body = request.SerializeToString()
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": f"/{method}",
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
        **dict(client.metadata),
    }
    slow.send(
        HeadersFrame(1, Encoder().encode(headers.items()), flags=["END_HEADERS"]),
        DataFrame(1, b"\0" + len(body).to_bytes(4) + body, flags=["END_STREAM"]),
    )


@shares_a_server
async def test_who_does_not_read_an_answer(shared_book: Book) -> None:
    """An answer that nobody reads goes with its connection, which ends all the same; others are served meanwhile."""
    settings = bounded(connection_age_seconds_max=2 * MOMENT, stream_seconds_max=MOMENT)
    # Posted at a server that keeps connections: a busy machine may take longer than the others last.
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
            ask(slow, client, "daybook.v1.Ledger/ListTransactions", request)
            frames = [frame async for frame in slow.frames()]
        assert 0 < sum(len(frame.data) for frame in frames if isinstance(frame, DataFrame)) < 100_000
        assert (await client.balance()).amount == "1000"


@shares_a_server
async def test_who_does_not_read_a_stream(shared_book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that nobody reads is called off when its caller has taken no message for too long."""
    async with (
        serving(shared_book, bounded(stream_idle_seconds_max=MOMENT)) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        asyncio.timeout(LONG),
    ):
        server = Server(shared_book, channel)
        client = await server.client(await server.create_tenant("streams"), scopes=("admin",))
        monkeypatch.setattr(shared_book.verification, "verify_all", find_for_ever)
        with structlog.testing.capture_logs() as logs:
            async with peer(port) as slow:
                ask(slow, client, "daybook.v1.Admin/VerifyAccounts", VerifyAccountsRequest())
                # It is there and answers; it only takes no more than what fits.
                reading = asyncio.create_task(slow.goodbyes())
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


async def find_for_ever(_tenant_number: int | None) -> AsyncIterator[Finding]:
    """More findings than a window takes."""
    while True:
        yield Finding("acme", 1, "amount", "1", "x" * 1000)


async def with_many_transactions(server: Server) -> Client:
    """A caller with an account of a thousand transactions, which are more than a window takes."""
    client = await server.client(await server.create_tenant(f"readers-{server.book.random_bytes(4).hex()}"))
    await client.create_account("acme")
    grant = Transaction(kind=Transaction.GRANT, category="purchase", amount="1", description="x" * 1000)
    for _ in range(10):
        requests = [CreateTransactionRequest(parent="accounts/acme", transaction=grant) for _ in range(100)]
        await client.ledger.BatchCreateTransactions(
            BatchCreateTransactionsRequest(parent="accounts/acme", requests=requests), metadata=client.metadata
        )
    return client
