"""Byte streams of a connection: HTTP/1 and HTTP/2 that begin like valid ones and break every rule of framing."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from types import TracebackType
from typing import Literal, Self, TypeAlias

from daybook.v1.ledger_service_pb2 import CreateTransactionRequest, GetBalanceRequest
from daybook.v1.transaction_pb2 import Transaction
from hpack import Decoder, Encoder, HPACKError
from hyperframe.exceptions import HyperframeError
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from tests.fuzz.mutations import mutated, reordered
from tests.fuzz.target import Target, Tenant
from tests.support.waiting import SECONDS_MAX

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
WAIT_SECONDS_MAX = 0.2
"""How long a client waits for the first answer before it shuts its side of the connection down."""
CONNECT_SECONDS = 0.02
"""Time between two attempts to connect."""
Header: TypeAlias = tuple[bytes, bytes]
Port: TypeAlias = Literal["server", "gateway"]


@dataclass
class ByteStreams:
    """Streams of one protocol at one port, each over a connection of its own."""

    target: Target
    tenant: Tenant
    port: Port
    stream: Callable[[Random, bytes], bytes]
    """Draws a stream for a caller with this key."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def draw(self, random: Random) -> tuple[bytes, bool]:
        """Draws a stream, and whether its client waits for an answer before it shuts its side down."""
        is_patient = random.random() < 0.6
        return self.stream(random, self.tenant.key.encode()), is_patient

    async def send(self, drawn: tuple[bytes, bool]) -> list[str]:
        """Sends the stream and reads until the peer closes the connection. Returns the statuses in its answers."""
        content, is_patient = drawn
        answer, has_status = bytearray(), asyncio.Event()
        async with asyncio.timeout(SECONDS_MAX):
            reader, writer = await self._connect()
            try:
                reading = asyncio.create_task(_read_all(reader, answer, has_status))
                # The peer may close at any byte.
                with contextlib.suppress(OSError):
                    writer.write(content)
                    await writer.drain()
                    if is_patient:
                        with contextlib.suppress(TimeoutError):
                            await asyncio.wait_for(has_status.wait(), WAIT_SECONDS_MAX)
                    if not reading.done():
                        writer.write_eof()
                await reading
            finally:
                writer.transport.abort()
        return sorted(set(_statuses(bytes(answer)))) or ["closed"]

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connects, also while the server listens again after a path that is not UTF-8."""
        while True:
            self.target.require_alive()
            with contextlib.suppress(ConnectionError):
                return await asyncio.open_connection("127.0.0.1", getattr(self.target.daybook.ports, self.port))
            await asyncio.sleep(CONNECT_SECONDS)

    def is_fault(self, status: str) -> bool:
        """Whether a status blames the server.

        gRPC itself answers broken frames with INTERNAL or UNAVAILABLE, and it refuses streams during a flood of
        resets, for which the gateway answers 503.
        """
        return re.fullmatch(r"5(?!03)\d\d|gRPC 2", status) is not None


async def _read_all(reader: asyncio.StreamReader, answer: bytearray, has_status: asyncio.Event) -> None:
    """Appends what is read to the answer, until the end; notes its first status."""
    with contextlib.suppress(ConnectionError):
        while chunk := await reader.read(65_536):
            answer += chunk
            if not has_status.is_set() and any(_statuses(bytes(answer))):
                has_status.set()
    has_status.set()


def _statuses(answer: bytes) -> Iterator[str]:
    """The statuses of an answer in HTTP/1 or HTTP/2: of responses, of gRPC, and the errors of frames."""
    if answer.startswith(b"HTTP/1"):
        yield from (found.decode() for found in re.findall(rb"(?:^|[\n}\]])HTTP/1\.[01] (\d{3}) ", answer))
        return
    decoder, view, at = Decoder(), memoryview(answer), 0
    while at + 9 <= len(view):
        try:
            frame, length = Frame.parse_frame_header(view[at : at + 9])
            frame.parse_body(view[at + 9 : at + 9 + length])
            at += 9 + length
            if isinstance(frame, GoAwayFrame):
                yield f"GOAWAY {frame.error_code}"
            elif isinstance(frame, RstStreamFrame):
                yield f"RST_STREAM {frame.error_code}"
            elif isinstance(frame, HeadersFrame | ContinuationFrame):
                for name, value in decoder.decode(frame.data, raw=True):
                    if name == b":status":
                        yield value.decode()
                    elif name == b"grpc-status":
                        yield f"gRPC {value.decode()}"
        except (HyperframeError, HPACKError):
            # The connection ended within a frame.
            return


def http1(random: Random, key: bytes) -> bytes:
    """One or more requests of HTTP/1 with damage."""
    requests = b"".join(_http1_request(random, key) for _ in range(random.choice((1, 1, 1, 2, 5))))
    return mutated(requests, random) if random.random() < 0.7 else requests


def _http1_request(random: Random, key: bytes) -> bytes:
    verb = random.choice(
        (b"GET", b"GET", b"POST", b"PATCH", b"OPTIONS", b"CONNECT", b"PRI", b"get", b"G\0T", b"X" * 99)
    )
    target = random.choice(
        (
            *(b"/v1/accounts", b"/v1/accounts/a/balance", b"/v1/accounts/a/transactions?pageSize=1", b"*", b"", b"//"),
            *(
                b"/v1/accounts/a%00b",
                b"http://other/v1/accounts",
                b"/healthz",
                b"/../../etc/passwd",
                b"/" + b"a" * 70_000,
            ),
            *(b"/daybook.v1.Ledger/GetBalance", b"/v1/accounts?" + b"a=b&" * 999, b"/%", b"/\xff", b"/v1/accounts#x"),
        )
    )
    version = random.choice(
        (b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9", b"", b"HTTP/1.1 x")
    )
    body = random.choice((b"", b"{}", b'{"kind": "OTHER"}', b"\0" * 64))
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    framing = random.choice(
        (
            (b"content-length: %d\r\n" % len(body), body),
            (b"content-length: %d\r\n" % len(body), body),
            (b"content-length: %d\r\ncontent-length: 0\r\n" % len(body), body),
            (b"content-length: -1\r\n", body),
            (b"content-length: 99999999999999999999\r\n", body),
            (b"content-length: 5, 5\r\n", body),
            (b"transfer-encoding: chunked\r\n", chunked),
            (b"transfer-encoding: chunked\r\ncontent-length: 3\r\n", chunked),
            (b"transfer-encoding: chunked, chunked\r\n", chunked),
            (b"transfer-encoding: \x0bchunked\r\n", chunked),
            (b"transfer-encoding: chunked\r\n", b"ffffffffffffffff\r\n" + body),
            (b"transfer-encoding: chunked\r\n", b"2;" + b"x" * 5000 + b"\r\n{}\r\n0\r\n\r\n"),
            (b"transfer-encoding: chunked\r\n", b"2\r\n{}\r\n0\r\ntrailer: " + b"x" * 99 + b"\r\n\r\n"),
            (b"", b""),
        )
    )
    odd = (
        *(
            b"",
            b"",
            b"",
            b"connection: keep-alive, upgrade\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n",
            b": x\r\n",
        ),
        *(
            b"a\r\n",
            b"a b: c\r\n",
            b"x: y\r\n z\r\n",
            b"x: \0\r\n",
            b"x: y\n",
            b"x:" + b"y" * 70_000 + b"\r\n",
            b"\r\n",
        ),
        *(
            b"x: y\r\n" * 200,
            b"expect: 100-continue\r\n",
            b"host: [::1\r\n",
            b"te: trailers\r\n",
            b"connection: close\r\n",
        ),
        *(b"content-type: application/grpc\r\n", b"content-type: application/json\r\n", b"x\x80: y\r\n", b"x" * 70_000),
    )
    return b"".join(
        (
            b"%s %s %s\r\nhost: localhost\r\nauthorization: Bearer %s\r\n" % (verb, target, version, key),
            random.choice(odd),
            framing[0],
            b"\r\n",
            framing[1],
        )
    )


def http2(random: Random, key: bytes) -> bytes:
    """A connection of HTTP/2 that follows one of the scenarios, often with damage in or between its frames."""
    frames = list(random.choice(_SCENARIOS)(random, key))
    kind = random.random()
    if kind < 0.3:
        frames = reordered(frames, random)
    elif kind < 0.5:
        frames = [_with_other_header(each, random) if random.random() < 0.3 else each for each in frames]
    if kind > 0.9:
        return mutated(PREFACE + SettingsFrame(0).serialize() + b"".join(frames), random)
    return PREFACE + SettingsFrame(0).serialize() + b"".join(frames)


def _with_other_header(frame: bytes, random: Random) -> bytes:
    """The frame with another length, type, flags or stream in its header."""
    if len(frame) < 9:
        return frame
    length, kind, flags, stream = int.from_bytes(frame[:3]), frame[3], frame[4], frame[5:9]
    match random.randrange(4):
        case 0:
            length = random.choice((0, 1, max(0, length - 1), length + 1, 16_384, 16_385, 2**24 - 1))
        case 1:
            kind = random.randrange(16)
        case 2:
            flags = random.randrange(256)
        case _:
            stream = struct.pack(">I", random.choice((0, 1, 2, 3, 2**31 - 1, 2**32 - 1)))
    return length.to_bytes(3) + bytes([kind, flags]) + stream + frame[9:]


def _native_headers(key: bytes, method: bytes = b"GetBalance") -> list[Header]:
    return [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", b"/daybook.v1.Ledger/" + method),
        (b":authority", b"localhost"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
        (b"authorization", b"Bearer " + key),
    ]


def _rest_headers(key: bytes) -> list[Header]:
    return [
        (b":method", b"GET"),
        (b":scheme", b"http"),
        (b":path", b"/v1/accounts/a/balance"),
        (b":authority", b"localhost"),
        (b"authorization", b"Bearer " + key),
    ]


def _block(headers: Sequence[Header]) -> bytes:
    return Encoder().encode(headers, huffman=False)


def _headers(stream: int, block: bytes, *flags: str) -> bytes:
    return HeadersFrame(stream, block, flags=["END_HEADERS", *flags]).serialize()


def _data(stream: int, content: bytes, *flags: str) -> bytes:
    return DataFrame(stream, content, flags=flags).serialize()


def _prefixed(message: bytes, *, is_compressed: int = 0, length: int | None = None) -> bytes:
    return struct.pack(">BI", is_compressed, len(message) if length is None else length) + message


_MESSAGE = GetBalanceRequest(name="accounts/a/balance").SerializeToString()
_POSTING = CreateTransactionRequest(
    parent="accounts/a", transaction=Transaction(kind=Transaction.GRANT, category="test", amount="1")
).SerializeToString()


def _calls(random: Random, key: bytes) -> Iterator[bytes]:
    """Several good calls."""
    for stream in range(1, 2 * random.randint(1, 5), 2):
        if random.random() < 0.5:
            yield _headers(stream, _block(_native_headers(key)))
            yield _data(stream, _prefixed(_MESSAGE), "END_STREAM")
        else:
            yield _headers(stream, _block(_native_headers(key, b"CreateTransaction")))
            yield _data(stream, _prefixed(_POSTING)[:7])
            yield _data(stream, _prefixed(_POSTING)[7:], "END_STREAM")


def _rest_calls(random: Random, key: bytes) -> Iterator[bytes]:
    """Several good calls over REST."""
    for stream in range(1, 2 * random.randint(1, 5), 2):
        yield _headers(stream, _block(_rest_headers(key)), "END_STREAM")


def _gzipped(content: bytes) -> bytes:
    # The default mtime is the time, and an input must be the same in every run.
    return gzip.compress(content, mtime=0)


def _false_prefixes(random: Random, key: bytes) -> Iterator[bytes]:
    """Messages whose prefix lies about length or compression."""
    headers = _native_headers(key)
    encoding = random.choice((b"", b"identity", b"gzip", b"deflate", b"snappy", b"GZIP", b"gzip,gzip", b"\xff"))
    if encoding:
        headers.append((b"grpc-encoding", encoding))
    content = random.choice((_MESSAGE, _gzipped(_MESSAGE), zlib.compress(_MESSAGE), _gzipped(bytes(1 << 16)), b""))
    length = random.choice((None, 0, 1, len(content) - 1, len(content) + 1, 2**31, 2**32 - 1))
    message = _prefixed(
        content, is_compressed=random.choice((0, 1, 1, 2, 255)), length=None if length is None else max(0, length)
    )
    message *= random.choice((1, 1, 2, 20))
    yield _headers(1, _block(headers))
    cut = random.randint(0, len(message))
    yield _data(1, message[:cut])
    yield _data(1, message[cut:], *random.choice(((), ("END_STREAM",))))


def _odd_headers(random: Random, key: bytes) -> Iterator[bytes]:
    """Headers that HTTP/2 or gRPC forbids."""
    headers = random.choice((_native_headers(key), _rest_headers(key)))
    for _ in range(random.randint(1, 4)):
        headers.insert(random.randint(0, len(headers)), random.choice(_ODD_HEADERS))
    if random.random() < 0.3:
        del headers[random.randrange(len(headers))]
    yield _headers(1, _block(headers))
    yield _data(1, _prefixed(_MESSAGE), "END_STREAM")


_ODD_HEADERS: Sequence[Header] = (
    (b":path", b"/"),
    (b":path", b""),
    (b":path", b"*"),
    (b":method", b"CONNECT"),
    (b":protocol", b"websocket"),
    (b":status", b"200"),
    (b":unknown", b"x"),
    (b":authority", b"\0"),
    (b":scheme", b"gopher"),
    (b"Upper", b"x"),
    (b"", b"x"),
    (b"a b", b"x"),
    (b"x", b"\r\ny: z"),
    (b"x", b"\0"),
    (b"x-bin", b"!"),
    (b"x-bin", b"AA=A"),
    (b"connection", b"close"),
    (b"transfer-encoding", b"chunked"),
    (b"content-length", b"5"),
    (b"content-length", b"-1"),
    (b"te", b"gzip"),
    (b"host", b"other"),
    (b"cookie", b"a=b"),
    (b"grpc-timeout", b"1n"),
    (b"grpc-timeout", b"99999999999999H"),
    (b"grpc-timeout", b"x"),
    (b"grpc-timeout", b"-1S"),
    (b"grpc-encoding", b"gzip"),
    (b"grpc-accept-encoding", b"\xff"),
    (b"grpc-status", b"0"),
    (b"grpc-message-type", b"x"),
    (b"grpc-previous-rpc-attempts", b"-1"),
    (b"grpc-trace-bin", b"AA"),
    (b"grpc-internal-encoding-request", b"gzip"),
    (b"content-type", b"application/grpc+json"),
    (b"content-type", b"application/grpc-web-text"),
    (b"content-type", b"text/html"),
    (b"authorization", b"Basic \xff"),
    (b"x-long", b"y" * 9000),
)


def _huge_headers(random: Random, key: bytes) -> Iterator[bytes]:
    """A header block of up to a mebibyte, in CONTINUATION frames."""
    size = random.choice((9_000, 20_000, 70_000, 300_000, 1 << 20))
    block = _block([*_native_headers(key), (b"x", b"y" * size)])
    parts = [block[at : at + 16_384] for at in range(0, len(block), 16_384)]
    yield HeadersFrame(1, parts[0]).serialize()
    for part in parts[1:]:
        yield ContinuationFrame(1, part).serialize()
    if random.random() < 0.5:
        yield ContinuationFrame(1, b"", flags=["END_HEADERS"]).serialize()


def _many_headers(random: Random, key: bytes) -> Iterator[bytes]:
    """Thousands of small headers, or one indexed thousands of times (a decompression bomb)."""
    block = _block([*_native_headers(key), (b"x", b"y" * random.choice((1, 4000)))])
    # 0xbe refers to the newest entry of the dynamic table; the other adds `a: b`, not indexed.
    block += random.choice((b"\xbe", b"\x00\x01a\x01b")) * random.choice((100, 2_000, 10_000))
    parts = [block[at : at + 16_384] for at in range(0, len(block), 16_384)]
    yield HeadersFrame(1, parts[0], flags=["END_HEADERS"] if len(parts) == 1 else []).serialize()
    for number, part in enumerate(parts[1:], 2):
        yield ContinuationFrame(1, part, flags=["END_HEADERS"] if number == len(parts) else []).serialize()


def _continuations(random: Random, key: bytes) -> Iterator[bytes]:
    """A flood of CONTINUATION frames that never end the headers."""
    yield HeadersFrame(1, _block(_native_headers(key))).serialize()
    content = random.choice((b"", b"", b"\x00\x01a\x01b"))
    for _ in range(random.choice((1, 50, 1000, 5000))):
        yield ContinuationFrame(1, content).serialize()


def _rapid_resets(random: Random, key: bytes) -> Iterator[bytes]:
    """Calls that are reset at once (CVE-2023-44487)."""
    block = _block(random.choice((_native_headers(key), _rest_headers(key))))
    for stream in range(1, 2 * random.choice((2, 20, 200, 1000)), 2):
        yield _headers(stream, block, *random.choice(((), ("END_STREAM",))))
        yield RstStreamFrame(stream, random.choice((0, 8))).serialize()


def _floods(random: Random, key: bytes) -> Iterator[bytes]:
    """Many frames that cost their sender nothing."""
    yield _headers(1, _block(_native_headers(key)))
    frame = random.choice(
        (
            PingFrame(0, bytes(8)),
            PingFrame(0, bytes(8), flags=["ACK"]),
            SettingsFrame(0, {SettingsFrame.HEADER_TABLE_SIZE: random.choice((0, 2**32 - 1))}),
            SettingsFrame(0, flags=["ACK"]),
            DataFrame(1, b""),
            DataFrame(1, b"", pad_length=255, flags=["PADDED"]),
            WindowUpdateFrame(0, 1),
            WindowUpdateFrame(1, 2**31 - 1),
            PriorityFrame(3, depends_on=1, stream_weight=1),
            PriorityFrame(1, depends_on=1),
            RstStreamFrame(1, 8),
        )
    ).serialize()
    yield from [frame] * random.choice((1, 3, 100, 2000))


def _odd_frames(random: Random, key: bytes) -> Iterator[bytes]:
    """A call among frames with forbidden values."""
    yield from random.choices(_ODD_FRAMES, k=random.randint(0, 2))
    yield _headers(1, _block(_native_headers(key)))
    yield from random.choices(_ODD_FRAMES, k=random.randint(0, 3))
    yield _data(1, _prefixed(_MESSAGE), "END_STREAM")
    yield from random.choices(_ODD_FRAMES, k=random.randint(0, 2))


def _raw(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    return len(content).to_bytes(3) + bytes([kind, flags]) + struct.pack(">I", stream) + content


_ODD_FRAMES: Sequence[bytes] = (
    SettingsFrame(0, {SettingsFrame.INITIAL_WINDOW_SIZE: 0}).serialize(),
    SettingsFrame(0, {SettingsFrame.INITIAL_WINDOW_SIZE: 2**32 - 1}).serialize(),
    SettingsFrame(0, {SettingsFrame.MAX_FRAME_SIZE: 1}).serialize(),
    SettingsFrame(0, {SettingsFrame.ENABLE_PUSH: 7}).serialize(),
    SettingsFrame(0, {SettingsFrame.MAX_HEADER_LIST_SIZE: 0}).serialize(),
    SettingsFrame(0, {SettingsFrame.MAX_CONCURRENT_STREAMS: 0}).serialize(),
    SettingsFrame(0, {99: 99}).serialize(),
    # Settings of a wrong length, with a stream, and an acknowledgement with content.
    _raw(4, 0, 0, b"\0" * 5),
    _raw(4, 0, 1, b"\0" * 6),
    _raw(4, 1, 0, b"\0" * 6),
    # Updates of windows by nothing, by too much, and of a wrong length.
    _raw(8, 0, 0, bytes(4)),
    _raw(8, 0, 1, bytes(4)),
    _raw(8, 0, 0, b"\x7f\xff\xff\xff"),
    _raw(8, 0, 1, b"\x7f\xff\xff\xff"),
    _raw(8, 0, 0, bytes(3)),
    # Padding that is longer than the frame.
    _raw(0, 8, 1, b"\xff\0"),
    _raw(1, 0x2C, 3, b"\xff\0\0\0\0\0"),
    # A promise by a client, a farewell, and frames of unknown and extension types.
    _raw(5, 4, 1, struct.pack(">I", 2) + _block([(b":method", b"GET")])),
    GoAwayFrame(0, 0, 0).serialize(),
    GoAwayFrame(0, 2**31 - 1, 2, b"x" * 1000).serialize(),
    _raw(10, 0, 0, b"\0\0"),
    _raw(16, 0, 0, bytes(4) + b"u=9"),
    _raw(255, 255, 7, b"x" * 100),
    # Pings of a wrong length and with a stream; resets of no stream; data of no stream, and of one that is idle.
    _raw(6, 0, 0, bytes(7)),
    _raw(6, 0, 1, bytes(8)),
    _raw(3, 0, 0, bytes(4)),
    _raw(3, 0, 9, bytes(4)),
    _raw(0, 0, 0, b"x"),
    _raw(0, 1, 5, b"x"),
    # Header blocks that can't be decoded: no such index, a table size beyond the limit, an endless integer.
    _raw(1, 4, 3, b"\xff\xff\xff\xff\x0f"),
    _raw(1, 4, 3, b"\x3f\xff\xff\xff\x0f"),
    _raw(1, 4, 3, b"\xff" * 50),
    _raw(1, 4, 2, b"\x82"),
    _raw(2, 0, 1, struct.pack(">IB", 1, 0)),
)
_SCENARIOS: Sequence[Callable[[Random, bytes], Iterator[bytes]]] = (
    *(_calls, _rest_calls, _calls, _rest_calls),
    *(_false_prefixes, _false_prefixes, _odd_headers, _odd_headers, _odd_frames, _odd_frames),
    *(_huge_headers, _many_headers, _continuations, _rapid_resets, _floods),
)
