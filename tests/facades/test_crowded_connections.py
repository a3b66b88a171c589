"""Many requests at once on some connections of the gateway neither delay nor refuse those of other connections."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hpack import Encoder
from hyperframe.frame import Frame, HeadersFrame, SettingsFrame

from tests.support.gateways import gateway_before
from tests.support.http_client import send
from tests.support.processes import Daybook, free_port
from tests.support.waiting import SECONDS_MAX

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CROWDED, OTHERS, REQUESTS = 16, 16, 250
READS = 4096
"""The reads that the gateway runs at a time."""
HEALTH = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"


def requests() -> bytes:
    """The frames of many requests."""
    encoder = Encoder()
    headers = [(":method", "GET"), (":scheme", "http"), (":authority", "localhost"), (":path", "/v1/unknown")]
    frames = (
        HeadersFrame(1 + 2 * number, encoder.encode(headers), flags=["END_HEADERS", "END_STREAM"])
        for number in range(REQUESTS)
    )
    return b"".join(frame.serialize() for frame in frames)


def answered_so_far(connection: socket.socket) -> int:
    """Counts the answers that have arrived on a connection."""
    connection.setblocking(False)
    data = b""
    try:
        while chunk := connection.recv(1_000_000):
            data += chunk
    except BlockingIOError:
        pass
    return sum(isinstance(frame, HeadersFrame) for frame in frames_of(data))


def frames_of(data: bytes) -> Iterator[Frame]:
    """The frames in data that has arrived on a connection."""
    while len(data) >= 9:
        frame, length = Frame.parse_frame_header(memoryview(data[:9]))
        yield frame
        data = data[9 + length :]


def test_requests_of_other_connections_are_not_delayed(tmp_path: Path) -> None:
    """Other connections are answered while most requests of crowded connections still wait."""
    with gateway_before(tmp_path, free_port()) as origin, ExitStack() as stack:
        address = ("127.0.0.1", int(origin.rpartition(":")[2]))

        def connect() -> Any:
            return stack.enter_context(socket.create_connection(address, SECONDS_MAX))

        others = [connect() for _ in range(OTHERS)]
        for other in others:
            other.sendall(HEALTH)
            assert other.recv(65_536).startswith(b"HTTP/1.1 200")
        crowded = [connect() for _ in range(CROWDED)]
        for each in crowded:
            each.sendall(PREFACE + SettingsFrame(0).serialize())
            assert each.recv(9)
        for each in crowded:
            each.sendall(requests())
        for other in others:
            other.sendall(HEALTH)
        for other in others:
            assert other.recv(65_536).startswith(b"HTTP/1.1 200")
        count = sum(answered_so_far(each) for each in crowded)
        assert count < CROWDED * REQUESTS / 2


def unfinished_checks(content_type: str) -> bytes:
    """The frames of many health checks whose messages never arrive, and of a request that is answered after them."""
    encoder = Encoder()
    headers = [
        (":method", "POST"),
        (":scheme", "http"),
        (":authority", "localhost"),
        (":path", "/grpc.health.v1.Health/Check"),
        ("content-type", content_type),
        ("te", "trailers"),
    ]
    healthz = [(":method", "GET"), (":scheme", "http"), (":authority", "localhost"), (":path", "/healthz")]
    frames = [
        *(HeadersFrame(1 + 2 * i, encoder.encode(headers), flags=["END_HEADERS"]) for i in range(REQUESTS)),
        HeadersFrame(1 + 2 * REQUESTS, encoder.encode(healthz), flags=["END_HEADERS", "END_STREAM"]),
    ]
    return b"".join(frame.serialize() for frame in frames)


@pytest.mark.parametrize("content_type", ["application/grpc", "application/grpc-web+proto"])
def test_unfinished_health_checks_take_no_places(gateway: Daybook, content_type: str) -> None:
    """Health checks, which need no credential, don't count as requests in progress before their messages arrive."""
    with ExitStack() as stack:
        address = ("127.0.0.1", int(gateway.origin.rpartition(":")[2]))
        connections = [
            stack.enter_context(socket.create_connection(address, SECONDS_MAX)) for _ in range(READS // REQUESTS + 1)
        ]
        for connection in connections:
            connection.sendall(PREFACE + SettingsFrame(0).serialize() + unfinished_checks(content_type))
        for connection in connections:
            data = b""
            while not any(isinstance(frame, HeadersFrame) for frame in frames_of(data)):
                chunk = connection.recv(65_536)
                assert chunk
                data += chunk
        credential = {"authorization": "Bearer demo-dreadnode.public"}
        assert send(gateway.origin, "/v1/accounts/example", headers=credential).status == 200
        headers = {**credential, "content-type": "application/json"}
        posted = send(gateway.origin, "/v1/accounts/example/transactions", method="POST", headers=headers, body=b"{}")
        assert posted.status == 400
