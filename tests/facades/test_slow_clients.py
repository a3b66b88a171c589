"""The gateway's timeouts for clients that are slow on purpose.

Each test shortens one timeout of envoy.yaml, and fails if the timeout is missing there.
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
from daybook.v1.ledger_service_pb2 import ExportTransactionsResponse
from google.api.httpbody_pb2 import HttpBody
from hpack import Encoder
from hyperframe.frame import Frame, HeadersFrame, RstStreamFrame, SettingsFrame

from server.config import Settings
from server.gateway.configuration import write_secrets
from tests.support.certificates import Authority
from tests.support.gateways import configuration_of, gateway_before, http_manager
from tests.support.processes import Ports
from tests.support.waiting import SECONDS_MAX

TIMEOUT_SECONDS = 0.3
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Upstream(grpc.GenericRpcHandler):
    """A server that streams endless answers, or reads endless requests."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        """Set when a stream has ended for any reason."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The handler of a method."""
        method = handler_call_details.method.rpartition("/")[2]
        return {
            "VerifyAccounts": grpc.unary_stream_rpc_method_handler(self.flood),
            "ExportTransactions": grpc.unary_stream_rpc_method_handler(self.send_file),
            "ImportTransactions": grpc.stream_unary_rpc_method_handler(self.swallow),
        }.get(method, grpc.unary_unary_rpc_method_handler(lambda _request, _context: b""))

    def flood(self, _request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Yields messages of 10 kB, findings of an account with a long name, until the stream ends."""
        context.add_callback(self.ended.set)
        while not self.ended.is_set():
            yield b"\x0a\x93\x4e\x0a\x90\x4e" + b"x" * 10_000

    def send_file(self, _request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Yields parts of a file, of 10 kB each, until the stream ends."""
        context.add_callback(self.ended.set)
        part = ExportTransactionsResponse(file=HttpBody(content_type="text/csv", data=b"x" * 10_000))
        while not self.ended.is_set():
            yield part.SerializeToString()

    def swallow(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """Reads messages until the stream ends."""
        context.add_callback(self.ended.set)
        for _ in requests:
            pass
        return b""


def shorten(owner: dict[str, Any], *names: str) -> None:
    """Sets existing timeouts to TIMEOUT_SECONDS."""
    for name in names:
        assert owner[name].endswith("s")
        owner[name] = f"{TIMEOUT_SECONDS}s"


def rest_routes(configuration: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of the routes of native requests that read, and of those that write."""
    (host,) = http_manager(configuration)["route_config"]["virtual_hosts"]
    routes = [each["route"] for each in host["routes"] if each["match"].get("prefix") == "/v1/"]
    assert len(routes) == 2
    return routes


def shorten_rest_durations(configuration: dict[str, Any]) -> None:
    """Shortens the whole time of a native request."""
    for route in rest_routes(configuration):
        shorten(route["max_stream_duration"], "max_stream_duration")


def shorten_rest_idle_timeouts(configuration: dict[str, Any]) -> None:
    """Shortens the time without progress of a native request."""
    for route in rest_routes(configuration):
        shorten(route, "idle_timeout")


def file_route(configuration: dict[str, Any]) -> dict[str, Any]:
    """The settings of the routes of files."""
    (host,) = http_manager(configuration)["route_config"]["virtual_hosts"]
    route: dict[str, Any] = next(
        each["route"]
        for each in host["routes"]
        if each.get("route", {}).get("timeout") == "0s" and "idle_timeout" in each["route"]
    )
    return route


def shorten_idle_timeout(configuration: dict[str, Any]) -> None:
    """Shortens the timeout of idle connections, and the drain before Envoy closes one."""
    manager = http_manager(configuration)
    shorten(manager["common_http_protocol_options"], "idle_timeout")
    manager["drain_timeout"] = f"{TIMEOUT_SECONDS / 5}s"


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "request_headers_timeout": lambda whole: shorten(http_manager(whole), "request_headers_timeout"),
    "stream_idle_timeout": lambda whole: shorten(http_manager(whole), "stream_idle_timeout"),
    "connection idle_timeout": shorten_idle_timeout,
    "route idle_timeout": shorten_rest_idle_timeouts,
    "file idle_timeout": lambda whole: shorten(file_route(whole), "idle_timeout"),
    "file max_stream_duration": lambda whole: shorten(file_route(whole)["max_stream_duration"], "max_stream_duration"),
    "max_stream_duration": shorten_rest_durations,
}


@dataclass(frozen=True)
class Shortened:
    """A gateway with one short timeout, and the server behind it."""

    port: int
    upstream: Upstream

    def connect(self) -> socket.socket:
        """A connection to the gateway."""
        return socket.create_connection(("127.0.0.1", self.port), SECONDS_MAX)


@pytest.fixture
def shortened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shortened]:
    """A gateway whose timeout named by the test is short."""
    upstream, server = Upstream(), grpc.server(ThreadPoolExecutor())
    server.add_generic_rpc_handlers((upstream,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with gateway_before(tmp_path, port, CHANGES[request.param]) as origin:
        yield Shortened(int(origin.rpartition(":")[2]), upstream)
    upstream.ended.set()
    server.stop(None).wait()


def with_short(name: str) -> pytest.MarkDecorator:
    """Shortens a timeout of CHANGES for the test."""
    return pytest.mark.parametrize("shortened", [name], indirect=True)


def read_until_closed(connection: socket.socket) -> bytes:
    """Reads until the gateway closes the connection; fails unless the short timeout is the cause."""
    started, received = time.monotonic(), b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(65_536):
            received += chunk
    # The shortest timeout in envoy.yaml is ten seconds.
    assert TIMEOUT_SECONDS / 2 < time.monotonic() - started < 9
    return received


@with_short("request_headers_timeout")
def test_unfinished_headers_are_refused(shortened: Shortened) -> None:
    """A request with unfinished headers is refused, over HTTP/1.1 and HTTP/2."""
    with shortened.connect() as connection:
        connection.sendall(b"GET /v1/accounts HTTP/1.1\r\nhost: localhost\r\nx-slow: ")
        assert read_until_closed(connection).startswith(b"HTTP/1.1 408 ")
    with shortened.connect() as connection:
        unfinished = HeadersFrame(1, Encoder().encode([(":method", "GET"), (":scheme", "http"), (":path", "/")]))
        connection.sendall(PREFACE + SettingsFrame(0).serialize() + unfinished.serialize())
        started, received = time.monotonic(), b""
        while not is_refused_over_http_2(received):
            chunk = connection.recv(65_536)
            assert chunk, "the connection was closed without an answer"
            received += chunk
        assert TIMEOUT_SECONDS / 2 < time.monotonic() - started < 9


def is_refused_over_http_2(data: bytes) -> bool:
    """Whether frames end the first stream, by the headers of an answer or a reset."""
    while len(data) >= 9:
        frame, length = Frame.parse_frame_header(memoryview(data[:9]))
        if isinstance(frame, HeadersFrame | RstStreamFrame) and frame.stream_id == 1:
            return True
        data = data[9 + length :]
    return False


@with_short("connection idle_timeout")
def test_idle_connection_is_closed(shortened: Shortened) -> None:
    """An idle connection is closed, before and after its first request."""
    with shortened.connect() as connection:
        assert read_until_closed(connection) == b""
    with shortened.connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert read_until_closed(connection).startswith(b"HTTP/1.1 ")


BODY = (
    b"POST /v1/accounts HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9999\r\n\r\n"
)


@with_short("route idle_timeout")
def test_stalled_body_is_refused(shortened: Shortened) -> None:
    """A request whose body stalls gets 408 in the API's error format."""
    with shortened.connect() as connection:
        connection.sendall(BODY + b'{"kind"')
        answer = read_until_closed(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"TIMED_OUT"' in answer


@with_short("max_stream_duration")
def test_dripping_body_is_refused(shortened: Shortened) -> None:
    """A body that arrives byte by byte gets 408, although it never stalls."""
    with shortened.connect() as connection:
        connection.sendall(BODY)
        connection.settimeout(TIMEOUT_SECONDS / 10)
        answer = b""
        for _ in range(200):
            connection.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(65_536)
                break
    assert answer.startswith(b"HTTP/1.1 408 ")


@with_short("route idle_timeout")
def test_unread_answer_is_cancelled(shortened: Shortened) -> None:
    """A streaming answer over REST that its client does not read is cancelled, also in the server."""
    with shortened.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(b"GET /v1/accounts:verify HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert shortened.upstream.ended.wait(SECONDS_MAX / 4)


@pytest.mark.parametrize("shortened", ["file idle_timeout", "file max_stream_duration"], indirect=True)
def test_unread_file_is_cut_off(shortened: Shortened) -> None:
    """A file that its client does not read is cancelled in the server, and lacks its last chunk at the client."""
    with shortened.connect() as connection:
        connection.sendall(b"GET /v1/accounts/-/transactions:export?format=CSV HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert shortened.upstream.ended.wait(SECONDS_MAX / 4)
        received = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while chunk := connection.recv(65_536):
                received += chunk
        assert received.startswith(b"HTTP/1.1 200 OK")
        assert not received.endswith(b"0\r\n\r\n")


@with_short("stream_idle_timeout")
def test_stalled_grpc_stream_is_cancelled(shortened: Shortened) -> None:
    """A gRPC stream whose client stops sending or reading is cancelled, also in the server."""
    sending = threading.Event()

    def messages() -> Iterator[bytes]:
        yield b""
        sending.wait(SECONDS_MAX)

    with grpc.insecure_channel(f"127.0.0.1:{shortened.port}") as channel:
        upload: Any = channel.stream_unary("/daybook.v1.Admin/ImportTransactions")
        with pytest.raises(grpc.RpcError):
            upload(messages(), timeout=SECONDS_MAX / 4)
        sending.set()
        assert shortened.upstream.ended.wait(SECONDS_MAX / 4)
        shortened.upstream.ended.clear()
        download: Any = channel.unary_stream("/daybook.v1.Admin/VerifyAccounts")
        unread = download(b"")
        assert next(unread)
        assert shortened.upstream.ended.wait(SECONDS_MAX / 4)
        unread.cancel()


def test_unfinished_tls_handshake_is_closed(authority: Authority, tmp_path: Path) -> None:
    """A connection to the TLS port without a handshake is closed."""
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
        assert read_until_closed(silent) == b""
