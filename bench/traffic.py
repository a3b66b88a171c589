"""A gRPC client for mixed traffic: lists of many accounts, and concurrent commits.

h2load repeats one request, so it can't pick an account for each call. This client sends HTTP/2 frames that are encoded
in advance, and counts the responses. It uses about a quarter of the processor time of the ceiling; both sides of a
ratio have the same client.
"""

from __future__ import annotations

import selectors
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from random import Random
from types import TracebackType
from typing import NamedTuple, Self

from bench.calls import Call
from bench.load import CLIENTS, GRPC_HEADERS, STREAMS, Load, LoadFailed, frame

COMMITS_PER_SECOND = 20
SEED = 1
"""The seed of the picks. Each side and each round of a comparison gets the same calls."""
PICKS = 50_000
"""The number of calls picked in advance; after them, the same calls are repeated."""
ANSWERED_MIN = 0.5
"""The fraction of the commits that must be answered. The last ones are cut off, which are many on a busy machine."""

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_FRAME = struct.Struct(">BHBBI")
_SETTING = struct.Struct(">HI")
_UINT32 = struct.Struct(">I")
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_INITIAL_WINDOW_SIZE = 4
_WINDOW_DEFAULT = 65_535
_WINDOW_MAX = 2**31 - 1
_LITERAL = b"\x00"
_STRING_BYTES_MAX = 127
_READ_BYTES = 1024 * 1024


def zipf_weights(count: int) -> list[float]:
    """Returns the weight of each of `count` ranks: 1/rank."""
    return [1 / rank for rank in range(1, count + 1)]


class Mix:
    """Calls with weights."""

    def __init__(self, calls: Sequence[Call], weights: Sequence[float]) -> None:
        self._requests = [_encode(call) for call in calls]
        self._weights = weights

    @classmethod
    def by_zipf(cls, calls_of_accounts: Sequence[Sequence[Call]]) -> Self:
        """Weights accounts by Zipf, the first account most, and the calls of an account equally."""
        weights = zipf_weights(len(calls_of_accounts))
        pairs = [
            (call, weight / len(calls))
            for weight, calls in zip(weights, calls_of_accounts, strict=True)
            for call in calls
        ]
        return cls([call for call, _ in pairs], [weight for _, weight in pairs])

    def picks(self) -> Iterator[_Request]:
        """Yields encoded requests without end, in the same order each time."""
        return cycle(Random(SEED).choices(self._requests, self._weights, k=PICKS))


@dataclass(frozen=True, slots=True)
class Traffic:
    """Mixed traffic: lists as fast as possible, and commits at a steady rate."""

    lists: Mix
    commits: Mix

    def rate(self, port: int, seconds: float, answer_bytes: int) -> float:
        """Returns the answered lists per second.

        Raises LoadFailed if a call fails, which shows as a response without a body; if the mean size of the bodies of
        lists is not within a tenth of `answer_bytes`; or if too few commits are answered.
        """
        lists, commits = self.run(port, seconds)
        if lists.refused or commits.refused or not lists.answers:
            raise LoadFailed(f"{lists.refused} of {lists.answers} lists and {commits.refused} commits were refused")
        mean = lists.body_bytes / lists.answers
        if not 0.9 <= mean / answer_bytes <= 1.1:
            raise LoadFailed(f"a list is answered with {mean:.0f} bytes on average and not with {answer_bytes}")
        if commits.answers < ANSWERED_MIN * COMMITS_PER_SECOND * seconds:
            raise LoadFailed(f"only {commits.answers} commits were answered in {seconds} seconds")
        return lists.rate

    def run(self, port: int, seconds: float) -> tuple[Load, Load]:
        """Returns the results of the lists and of the commits."""
        lists, commits = self.lists.picks(), self.commits.picks()
        with ExitStack() as stack:
            selector = stack.enter_context(selectors.DefaultSelector())
            readers = [stack.enter_context(_Connection(port)) for _ in range(CLIENTS)]
            writer = stack.enter_context(_Connection(port))
            for connection in (*readers, writer):
                selector.register(connection.socket, selectors.EVENT_READ, connection)
            for connection in readers:
                connection.send([next(lists) for _ in range(STREAMS)])
            start = next_commit = time.monotonic()
            end = start + seconds
            while (now := time.monotonic()) < end:
                if now >= next_commit:
                    writer.send([next(commits)])
                    next_commit += 1 / COMMITS_PER_SECOND
                for key, _ in selector.select(max(0.0, min(next_commit, end) - now)):
                    connection = key.data
                    ended = connection.receive()
                    if ended and connection is not writer:
                        connection.send([next(lists) for _ in range(ended)])
            return _load(readers, seconds), _load([writer], seconds)


class _Request(NamedTuple):
    """A call on the wire, without frame headers, which depend on the stream."""

    headers: bytes
    body: bytes


class _Connection:
    """An HTTP/2 connection that counts the answered calls."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.answers = self.refused = self.body_bytes = 0
        self._next_stream = 1
        self._body_bytes_of: dict[int, int] = {}
        """The bytes of body received so far, by open stream."""
        self._window = _WINDOW_DEFAULT
        """The remaining flow control window of the server, in bytes."""
        self._unread = b""
        # The largest windows, so that responses never wait for a window update.
        self.socket.sendall(
            _PREFACE
            + _frame(_SETTINGS, 0, 0, _SETTING.pack(_INITIAL_WINDOW_SIZE, _WINDOW_MAX))
            + _frame(_WINDOW_UPDATE, 0, 0, _UINT32.pack(_WINDOW_MAX - _WINDOW_DEFAULT))
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, requests: Sequence[_Request]) -> None:
        """Starts a call for each request. Raises LoadFailed if the server's window is full."""
        parts = []
        for request in requests:
            stream, self._next_stream = self._next_stream, self._next_stream + 2
            self._body_bytes_of[stream] = 0
            self._window -= len(request.body)
            parts += [
                _FRAME.pack(0, len(request.headers), _HEADERS, _END_HEADERS, stream),
                request.headers,
                _FRAME.pack(0, len(request.body), _DATA, _END_STREAM, stream),
                request.body,
            ]
        if self._window < 0:
            raise LoadFailed("the server's flow control window is full")
        self.socket.sendall(b"".join(parts))

    def receive(self) -> int:
        """Reads frames. Returns the number of calls that ended. Raises LoadFailed if the server disconnects."""
        received = self.socket.recv(_READ_BYTES)
        if not received:
            raise LoadFailed("the server closed a connection")
        buffer = self._unread + received
        position, ended = 0, 0
        while position + _FRAME.size <= len(buffer):
            high, low, kind, flags, stream = _FRAME.unpack_from(buffer, position)
            begin = position + _FRAME.size
            end = begin + (high << 16 | low)
            if end > len(buffer):
                break
            position = end
            if kind in {_DATA, _HEADERS, _RST_STREAM}:
                ended += self._receive_of_call(kind, flags, stream, end - begin)
            else:
                self._receive_of_connection(kind, flags, stream, buffer[begin:end])
        self._unread = buffer[position:]
        return ended

    def _receive_of_call(self, kind: int, flags: int, stream: int, size: int) -> bool:
        """Returns whether the call has ended."""
        if stream not in self._body_bytes_of:
            # A reset after the end of a response.
            return False
        if kind == _DATA:
            self._body_bytes_of[stream] += size
        if kind != _RST_STREAM and not flags & _END_STREAM:
            return False
        body_bytes = self._body_bytes_of.pop(stream)
        self.answers += 1
        self.refused += kind == _RST_STREAM or body_bytes == 0
        self.body_bytes += body_bytes
        return True

    def _receive_of_connection(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind in {_SETTINGS, _PING} and not flags & _ACK:
            self.socket.sendall(_frame(kind, _ACK, 0, payload if kind == _PING else b""))
        elif kind == _WINDOW_UPDATE and stream == 0:
            self._window += _UINT32.unpack(payload)[0]
        elif kind == _GOAWAY:
            raise LoadFailed("the server sent GOAWAY")


def _load(connections: Sequence[_Connection], seconds: float) -> Load:
    answers = sum(connection.answers for connection in connections)
    return Load(
        rate=answers / seconds,
        answers=answers,
        refused=sum(connection.refused for connection in connections),
        body_bytes=sum(connection.body_bytes for connection in connections),
    )


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return _FRAME.pack(0, len(payload), kind, flags, stream) + payload


def _encode(call: Call) -> _Request:
    (request,) = call.requests
    headers: Mapping[str, str] = {
        ":method": "POST",
        ":scheme": "http",
        ":path": f"/{call.method}",
        ":authority": "127.0.0.1",
        **GRPC_HEADERS,
        **call.headers,
    }
    # HPACK literals without indexing have the same bytes on every connection.
    encoded = (_LITERAL + _string(name) + _string(value) for name, value in headers.items())
    return _Request(b"".join(encoded), frame(request))


def _string(text: str) -> bytes:
    """Returns an HPACK string (RFC 7541, 5.2) without Huffman coding."""
    octets = text.encode("ascii")
    if len(octets) < _STRING_BYTES_MAX:
        return bytes([len(octets)]) + octets
    rest = len(octets) - _STRING_BYTES_MAX
    assert rest < 128, "the length must fit two bytes"
    return bytes([_STRING_BYTES_MAX, rest]) + octets
