"""Clients who are slow on purpose: the gateway lets none of them hold a connection or a call for long.

Each bound of envoy.yaml is shown by itself, shortened; one that were missing there could not be.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from hpack import Encoder
from hyperframe.frame import Frame, HeadersFrame, RstStreamFrame, SettingsFrame

from server.config import Settings
from server.gateway.configuration import write_secrets
from tests.support.certificates import Authority
from tests.support.gateways import configuration_of, gateway_before, http_manager
from tests.support.processes import Ports
from tests.support.waiting import SECONDS_MAX

MOMENT = 0.3
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Upstream(grpc.GenericRpcHandler):
    """A server that answers with more than anybody takes at once, or waits for more than anybody sends."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        """That a stream came to its end, whoever ended it."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The handler of a method."""
        method = handler_call_details.method.rpartition("/")[2]
        return {
            "VerifyAccounts": grpc.unary_stream_rpc_method_handler(self.flood),
            "ImportTransactions": grpc.stream_unary_rpc_method_handler(self.swallow),
        }.get(method, grpc.unary_unary_rpc_method_handler(lambda _request, _context: b""))

    def flood(self, _request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Messages without an end, of 10 kB: each a finding in an account with such a name."""
        context.add_callback(self.ended.set)
        while not self.ended.is_set():
            yield b"\x0a\x93\x4e\x0a\x90\x4e" + b"x" * 10_000

    def swallow(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """Whatever is sent."""
        context.add_callback(self.ended.set)
        for _ in requests:
            pass
        return b""


def shorten(owner: dict[str, Any], *names: str) -> None:
    """Makes bounds short that must be there."""
    for name in names:
        assert owner[name].endswith("s")
        owner[name] = f"{MOMENT}s"


def rest(configuration: dict[str, Any]) -> dict[str, Any]:
    """What all routes of REST share."""
    (host,) = http_manager(configuration)["route_config"]["virtual_hosts"]
    route: dict[str, Any] = next(each["route"] for each in host["routes"] if each["match"].get("prefix") == "/v1/")
    return route


def shorten_idle_timeout(configuration: dict[str, Any]) -> None:
    """Makes the bound of idle connections short, and the drain that Envoy puts before it closes one."""
    manager = http_manager(configuration)
    shorten(manager["common_http_protocol_options"], "idle_timeout")
    manager["drain_timeout"] = f"{MOMENT / 5}s"


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "request_headers_timeout": lambda whole: shorten(http_manager(whole), "request_headers_timeout"),
    "stream_idle_timeout": lambda whole: shorten(http_manager(whole), "stream_idle_timeout"),
    "connection idle_timeout": shorten_idle_timeout,
    "route idle_timeout": lambda whole: shorten(rest(whole), "idle_timeout"),
    "max_stream_duration": lambda whole: shorten(rest(whole)["max_stream_duration"], "max_stream_duration"),
}


@dataclass(frozen=True)
class Slowed:
    """A gateway with one bound that is short, and the server behind it."""

    port: int
    upstream: Upstream

    def connect(self) -> socket.socket:
        """A connection to the gateway."""
        return socket.create_connection(("127.0.0.1", self.port), SECONDS_MAX)


@pytest.fixture
def slowed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Slowed]:
    """A gateway with the bound that the test names."""
    upstream, server = Upstream(), grpc.server(ThreadPoolExecutor())
    server.add_generic_rpc_handlers((upstream,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with gateway_before(tmp_path, port, CHANGES[request.param]) as origin:
        yield Slowed(int(origin.rpartition(":")[2]), upstream)
    upstream.ended.set()
    server.stop(None).wait()


def bounded_by(name: str) -> pytest.MarkDecorator:
    """Which bound is short."""
    return pytest.mark.parametrize("slowed", [name], indirect=True)


def rest_of(connection: socket.socket) -> bytes:
    """What comes until the gateway closes the connection, which it must, though not before its time."""
    started, received = time.monotonic(), b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(65_536):
            received += chunk
    # The shortest of the bounds as they are in envoy.yaml is ten seconds.
    assert MOMENT / 2 < time.monotonic() - started < 9
    return received


@bounded_by("request_headers_timeout")
def test_headers_that_never_end(slowed: Slowed) -> None:
    """A request whose headers don't come to an end is refused, over HTTP/1.1 and over HTTP/2."""
    with slowed.connect() as connection:
        connection.sendall(b"GET /v1/accounts HTTP/1.1\r\nhost: localhost\r\nx-slow: ")
        assert rest_of(connection).startswith(b"HTTP/1.1 408 ")
    with slowed.connect() as connection:
        begun = HeadersFrame(1, Encoder().encode([(":method", "GET"), (":scheme", "http"), (":path", "/")]))
        connection.sendall(PREFACE + SettingsFrame(0).serialize() + begun.serialize())
        started, received = time.monotonic(), b""
        while not is_refused_over_http_2(received):
            chunk = connection.recv(65_536)
            assert chunk, "the connection was closed without a word"
            received += chunk
        assert MOMENT / 2 < time.monotonic() - started < 9


def is_refused_over_http_2(data: bytes) -> bool:
    """Whether frames hold an end of the first stream: the headers of an answer, or a reset."""
    while len(data) >= 9:
        frame, length = Frame.parse_frame_header(memoryview(data[:9]))
        if isinstance(frame, HeadersFrame | RstStreamFrame) and frame.stream_id == 1:
            return True
        data = data[9 + length :]
    return False


@bounded_by("connection idle_timeout")
def test_idle_connections_are_closed(slowed: Slowed) -> None:
    """A connection over which nothing comes is closed, whether or not there was a request before."""
    with slowed.connect() as connection:
        assert rest_of(connection) == b""
    with slowed.connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert rest_of(connection).startswith(b"HTTP/1.1 ")


BODY = (
    b"POST /v1/accounts HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9999\r\n\r\n"
)


@bounded_by("route idle_timeout")
def test_body_that_stalls(slowed: Slowed) -> None:
    """A request whose body stops on the way is refused in the words of the API."""
    with slowed.connect() as connection:
        connection.sendall(BODY + b'{"kind"')
        answer = rest_of(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"TIMED_OUT"' in answer


@bounded_by("max_stream_duration")
def test_body_that_drips(slowed: Slowed) -> None:
    """A body that comes byte by byte is refused too, for it would never stall."""
    with slowed.connect() as connection:
        connection.sendall(BODY)
        connection.settimeout(MOMENT / 10)
        answer = b""
        for _ in range(200):
            connection.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(65_536)
                break
    assert answer.startswith(b"HTTP/1.1 408 ")


@bounded_by("route idle_timeout")
def test_who_does_not_read_over_rest(slowed: Slowed) -> None:
    """An answer without an end that nobody reads is called off, also in the server."""
    with slowed.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(b"GET /v1/accounts:verify HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert slowed.upstream.ended.wait(SECONDS_MAX / 4)


@bounded_by("stream_idle_timeout")
def test_streams_of_grpc_that_stall(slowed: Slowed) -> None:
    """A native stream over which nothing comes is called off, whoever it is that doesn't send or doesn't read."""
    sending = threading.Event()

    def messages() -> Iterator[bytes]:
        yield b""
        sending.wait(SECONDS_MAX)

    with grpc.insecure_channel(f"127.0.0.1:{slowed.port}") as channel:
        upload: Any = channel.stream_unary("/daybook.v1.Admin/ImportTransactions")
        with pytest.raises(grpc.RpcError):
            upload(messages(), timeout=SECONDS_MAX / 4)
        sending.set()
        assert slowed.upstream.ended.wait(SECONDS_MAX / 4)
        slowed.upstream.ended.clear()
        download: Any = channel.unary_stream("/daybook.v1.Admin/VerifyAccounts")
        unread = download(b"")
        assert next(unread)
        assert slowed.upstream.ended.wait(SECONDS_MAX / 4)
        unread.cancel()


def test_handshake_that_never_ends(authority: Authority, tmp_path: Path) -> None:
    """Whoever connects to the port with TLS and does not begin is sent away."""
    pair, port = authority.issue("slow"), Ports.free().gateway
    settings = Settings(
        gateway_port=port,
        gateway_tls_certificate_file=str(pair.certificate),
        gateway_tls_key_file=str(pair.key),
    )

    def with_tls(configuration: dict[str, Any]) -> None:
        (listener,) = configuration_of(settings, tmp_path)["static_resources"]["listeners"]
        shorten(listener["filter_chains"][0], "transport_socket_connect_timeout")
        configuration["static_resources"]["listeners"].append(listener)

    write_secrets(settings, tmp_path)
    with gateway_before(tmp_path, port, with_tls), socket.create_connection(("127.0.0.1", port), SECONDS_MAX) as silent:
        assert rest_of(silent) == b""
