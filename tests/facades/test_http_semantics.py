"""HTTP semantics of the gateway: HEAD, CORS, compression, connections, and headers of every answer."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import h11
import httpx
import pytest
from daybook.v1.ledger_service_pb2 import GetAccountRequest

from server.vendors.vendor import MALFORMED
from tests.support.callers import credential, ledger_stub
from tests.support.demo import ACCOUNT, LISTS, NATIVE, TRANSACTIONS, Target
from tests.support.gateways import OriginIn, gateway_before
from tests.support.http_client import Answer, Json, problems_of_any_answer, read_json, send
from tests.support.processes import Daybook
from tests.support.rest import KEY, reason_of
from tests.support.vendors import APIS, Api, ask, require_sound
from tests.support.waiting import SECONDS_MAX

OTHERS = {
    "dreadnode without v1": Target("/api/org/example/credits/transactions?limit=100", "demo-dreadnode"),
    "balance of Dreadnode": Target("/api/v1/org/example/credits", "demo-dreadnode"),
    "account": Target(ACCOUNT, "demo-dreadnode"),
    "accounts": Target("/v1/accounts", "demo-dreadnode"),
    "balance": Target(f"{ACCOUNT}/balance", "demo-dreadnode"),
    "lots": Target(f"{ACCOUNT}/lots", "demo-dreadnode"),
    "verify": Target("/v1/accounts:verify", "demo-dreadnode", 403),
    "no credential": Target(ACCOUNT, "demo-dreadnode", 401),
    "no account": Target("/v1/accounts/nowhere", "demo-dreadnode", 404),
    "no path": Target("/v1/nowhere", "demo-dreadnode", 404),
    "unreadable path": Target("/v1/accounts/a%00b", "demo-dreadnode", 400),
    "unknown parameter": Target(f"{ACCOUNT}?colour=red", "demo-dreadnode", 400),
}
PER_ANSWER_HEADERS = {"date", "x-request-id"}
BODY_HEADERS = {"content-length", "transfer-encoding", "vary"}


@pytest.mark.parametrize("encoding", ["identity", "gzip", "br"])
@pytest.mark.parametrize("name", [*LISTS, *OTHERS])
def test_head_has_the_headers_of_get(gateway: Daybook, name: str, encoding: str) -> None:
    """HEAD has the status and the headers of GET, and the same content-length or none."""
    target = {**LISTS, **OTHERS}[name]
    got, head = (target.send(gateway, method, **{"accept-encoding": encoding}) for method in ("GET", "HEAD"))
    assert (got.status, head.status, head.body) == (target.status, target.status, b"")

    def headers(answer: Answer) -> list[tuple[str, str]]:
        return sorted((name, value) for name, value in answer.headers if name not in PER_ANSWER_HEADERS | BODY_HEADERS)

    assert headers(head) == headers(got)
    # Without a content-length, HEAD cannot know whether a body would be compressed, so it may lack vary.
    assert tokens(got.header("vary")) <= tokens(head.header("vary"))
    if got.status == 200 or head.header("content-length") is not None:
        assert head.header("content-length") == got.header("content-length")


def tokens(value: str | None) -> set[str]:
    """The elements of a comma-separated header, in lower case."""
    return {each.strip().lower() for each in (value or "").split(",")}


@pytest.mark.parametrize("name", ["native", "dreadnode", "account", "no account"])
def test_head_over_http_2_has_no_body(gateway: Daybook, name: str) -> None:
    """Over HTTP/2 an answer to HEAD has no DATA frame in any encoding; the client would refuse one."""
    target = {**LISTS, **OTHERS}[name]
    with httpx.Client(http1=False, http2=True, base_url=gateway.origin, headers=NATIVE) as client:
        for encoding in ("identity", "gzip", "br"):
            head = client.head(target.target, headers={"accept-encoding": encoding})
            assert (head.http_version, head.status_code, head.content) == ("HTTP/2", target.status, b"")
            assert client.get(target.target, headers={"accept-encoding": encoding}).status_code == target.status


def without_token(body: Json) -> Json:
    """A page without its token or link to the next page, which differ by answer or by host."""
    tokens = ("nextCursor", "nextPageToken", "next")
    return {key: value for key, value in body.items() if key not in tokens} if isinstance(body, dict) else body


# Accept-Encoding, and the Content-Encoding of a body that is large enough.
ENCODINGS = {
    "gzip": "gzip",
    "br": "br",
    "gzip, br": "br",
    "gzip, deflate, br, zstd": "br",
    "gzip;q=1.0, br;q=0.5": "gzip",
    "gzip;q=0.2, br;q=0.5": "br",
    "br;q=0, *": "gzip",
    "*": "br",
    "gzip;q=0": None,
    "gzip;q=0, br;q=0": None,
    "identity": None,
    "identity, gzip;q=0.5": None,
    "deflate": None,
    "": None,
}


@pytest.mark.parametrize("name", LISTS)
def test_large_answer_has_the_preferred_encoding(gateway: Daybook, name: str) -> None:
    """A list has its caller's preferred encoding, and the same content in each."""
    target = LISTS[name]
    plain = target.send(gateway)
    assert plain.header("content-encoding") is None
    assert "accept-encoding" in tokens(plain.header("vary"))
    for accepted, encoding in ENCODINGS.items():
        answer = target.send(gateway, **{"accept-encoding": accepted})
        assert answer.header("content-encoding") == encoding, accepted
        assert "accept-encoding" in tokens(answer.header("vary"))
        assert without_token(answer.json()) == without_token(plain.json())
        assert (len(answer.body) < len(plain.body)) == (encoding is not None)
        assert answer.header("content-length") in (None, str(len(answer.body)))


def test_small_answer_is_not_compressed(gateway: Daybook) -> None:
    """An answer that fits into one packet is not compressed."""
    for name in ("account", "no account", "no path", "no credential"):
        answer = OTHERS[name].send(gateway, **{"accept-encoding": "gzip, br"})
        assert answer.header("content-encoding") is None
        assert answer.header("content-length") == str(len(answer.body))


def test_large_refusal_is_compressed(gateway: Daybook) -> None:
    """A large refusal by the gateway is compressed."""
    target = Target(f"/v1/accounts?pageSize={'x' * 2000}", "demo-dreadnode", 400)
    plain, small = target.send(gateway), target.send(gateway, **{"accept-encoding": "gzip"})
    assert (small.status, small.header("content-encoding")) == (400, "gzip")
    assert gzip.decompress(small.body) == plain.body


def test_grpc_answer_has_no_http_extras(gateway: Daybook) -> None:
    """A gRPC answer is not compressed and has no CORS or cache headers, even if the request asks for them."""
    request = GetAccountRequest(name="accounts/example").SerializeToString()
    headers = {"accept-encoding": "gzip, br", "origin": "https://app.example.com", "te": "trailers", **NATIVE}
    with httpx.Client(http1=False, http2=True, base_url=gateway.origin) as client:
        answer = client.post(
            "/daybook.v1.Ledger/GetAccount",
            content=b"\0" + len(request).to_bytes(4, "big") + request,
            headers={**headers, "content-type": "application/grpc"},
        )
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/grpc")
    absent = ("content-encoding", "vary", "cache-control", "access-control-allow-origin")
    assert not [name for name in absent if name in answer.headers]
    assert b"accounts/example" in answer.content


PREFLIGHT = {"origin": "https://app.example.com", "access-control-request-headers": "authorization, content-type"}


@pytest.mark.parametrize(
    ("path", "method"),
    [(ACCOUNT, "PATCH"), (TRANSACTIONS, "POST"), (f"{ACCOUNT}:transferCredits", "POST"), ("/v1/accounts", "GET")],
)
def test_preflight_allows_native_methods(gateway: Daybook, path: str, method: str) -> None:
    """A CORS preflight allows a native path's method and the headers for credentials."""
    headers = {**PREFLIGHT, "access-control-request-method": method}
    answer = send(gateway.origin, path, method="OPTIONS", headers=headers)
    assert (answer.status, answer.body) == (200, b"")
    assert not list(problems_of_any_answer(answer))
    assert answer.header("access-control-allow-origin") == "https://app.example.com"
    assert method.lower() in tokens(answer.header("access-control-allow-methods"))
    assert "authorization" in tokens(answer.header("access-control-allow-headers"))


@pytest.mark.parametrize("name", [each for each in OTHERS if each != "unreadable path"])
def test_web_page_may_read_every_native_answer(gateway: Daybook, name: str) -> None:
    """A web page of another origin may read answers, refusals and x-request-id."""
    answer = OTHERS[name].send(gateway, origin="https://app.example.com")
    assert answer.status == OTHERS[name].status
    assert answer.header("access-control-allow-origin") == "https://app.example.com"
    assert "x-request-id" in tokens(answer.header("access-control-expose-headers"))


def test_web_page_may_read_the_allow_header(gateway: Daybook) -> None:
    """A web page of another origin may read the allow header of a 405 answer."""
    answer = OTHERS["account"].send(gateway, "DELETE", origin="https://app.example.com")
    assert (answer.status, answer.header("allow")) == (405, "GET, HEAD, PATCH")
    assert answer.header("access-control-allow-origin") == "https://app.example.com"
    assert "allow" in tokens(answer.header("access-control-expose-headers"))


@pytest.mark.parametrize("name", APIS)
def test_repeated_parameter_is_refused(gateway: Daybook, name: str) -> None:
    """A repeated parameter is refused with the vendor's error body."""
    api: Api = APIS[name]
    for parameter in api.parameters:
        # Spacebring documents no plain createDate, and Dreadnode's transaction_type may be repeated.
        if parameter in ("createDate", "transaction_type"):
            continue
        target = f"{api.path}?{parameter}=1&{parameter}=2"
        answer = ask(gateway, api, target)
        require_sound(api, target, answer)
        assert answer.status in (400, 422)
        assert MALFORMED in str(answer.json())


@pytest.mark.parametrize(
    ("query", "same_as"),
    [
        ("page%5Fsize=%32", "page_size=2"),
        ("page_size=2&filter=&orderBy=", "page_size=2"),
        ("page_size=2&&", "page_size=2"),
        ("filter=kind+%3D+GRANT&page_size=2", "filter=kind%20%3D%20GRANT&page_size=2"),
        ('filter=create_time+<+"2024-11-05T00:00:00%2B01:00"', "filter=create_time%20%3C%20%222024-11-04T23:00:00Z%22"),
    ],
)
def test_native_parameters_are_decoded(gateway: Daybook, query: str, same_as: str) -> None:
    """Escapes and pluses are decoded, and empty parameters and a trailing slash are ignored."""
    expected = without_token(Target(f"{TRANSACTIONS}?{same_as}", "demo-dreadnode").send(gateway).json())
    for path in (TRANSACTIONS, f"{TRANSACTIONS}/", "/v1/accounts/%65xample/transactions"):
        answer = Target(f"{path}?{query}", "demo-dreadnode").send(gateway)
        assert (answer.status, without_token(answer.json())) == (200, expected)


@pytest.mark.parametrize("name", [*LISTS, "dreadnode without v1", "balance of Dreadnode"])
def test_extra_slashes_are_ignored(gateway: Daybook, name: str) -> None:
    """Repeated and trailing slashes in a path are ignored."""
    target = {**LISTS, **OTHERS}[name]
    expected = without_token(target.send(gateway).json())
    path, _, query = target.target.partition("?")
    for spelled in (f"/{path}", path.replace("/", "//"), f"{path}/", f"{path}//"):
        answer = Target(f"{spelled}?{query}", target.key).send(gateway)
        assert (answer.status, without_token(answer.json())) == (200, expected), spelled


@contextmanager
def connected(daybook: Daybook) -> Iterator[socket.socket]:
    """A connection to the gateway."""
    address = urlsplit(daybook.origin)
    with socket.create_connection((address.hostname or "", address.port or 80), SECONDS_MAX) as connection:
        yield connection


def request_bytes(method: str, target: str, **headers: str) -> bytes:
    """A request without a body."""
    lines = [f"{method} {target} HTTP/1.1", "host: localhost", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


class Reader:
    """Reads the answers on one connection in order."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._parser = h11.Connection(h11.CLIENT)

    def read(self, method: str, target: str) -> tuple[int, bytes]:
        """Status and body of the next answer, to a request with this method and target."""
        if self._parser.our_state is h11.DONE:
            self._parser.start_next_cycle()
        # The request is already sent: the parser only needs its method.
        self._parser.send(h11.Request(method=method, target=target, headers=[("host", "localhost")]))
        self._parser.send(h11.EndOfMessage())
        status, body = 0, b""
        while True:
            event = self._parser.next_event()
            if event is h11.NEED_DATA:
                received = self._socket.recv(65536)
                assert received, f"the connection was closed before the answer to {method} {target} was complete"
                self._parser.receive_data(received)
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return status, body


SERVER_ANSWERS = [
    ("GET", ACCOUNT, 200),
    ("HEAD", TRANSACTIONS, 200),
    ("GET", LISTS["dreadnode"].target, 200),
    ("HEAD", LISTS["dreadnode"].target, 200),
    ("GET", "/v1/accounts/nowhere", 404),
    ("HEAD", "/v1/accounts/nowhere", 404),
    ("GET", "/api/v1/org/nowhere/credits/transactions", 404),
    ("GET", LISTS["teable"].target, 403),
    ("GET", ACCOUNT, 200),
]
# Without a 400, after which Envoy closes an HTTP/1 connection.
GATEWAY_ANSWERS = [
    ("GET", "/v1/nowhere", 404),
    ("HEAD", "/v1/nowhere", 404),
    ("DELETE", ACCOUNT, 405),
    ("OPTIONS", ACCOUNT, 405),
    ("GET", "/api/v1/org/example/nothing", 404),
]


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_connection_is_reused_after_refusals(gateway: Daybook, encoding: str) -> None:
    """A connection stays open for further requests after refusals and HEAD."""
    with connected(gateway) as connection:
        reader = Reader(connection)
        for method, target, status in [*SERVER_ANSWERS, *GATEWAY_ANSWERS, *SERVER_ANSWERS]:
            connection.sendall(request_bytes(method, target, **NATIVE, **{"accept-encoding": encoding}))
            found, body = reader.read(method, target)
            assert (found, bool(body)) == (status, method != "HEAD"), target


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_pipelined_requests_are_answered_in_order(gateway: Daybook, encoding: str) -> None:
    """Pipelined requests get their answers in order."""
    # Only answers of the server: Envoy may close a pipelined connection after its own refusal, as HTTP allows.
    headers = {**NATIVE, "accept-encoding": encoding}
    with connected(gateway) as connection:
        connection.sendall(b"".join(request_bytes(method, target, **headers) for method, target, _ in SERVER_ANSWERS))
        reader = Reader(connection)
        for method, target, status in SERVER_ANSWERS:
            found, body = reader.read(method, target)
            assert (found, bool(body)) == (status, method != "HEAD"), target


@pytest.mark.parametrize("name", LISTS)
def test_http_1_0_is_answered(gateway: Daybook, name: str) -> None:
    """An HTTP/1.0 request without a Host gets the same body, not chunked, until the connection closes."""
    target = LISTS[name]
    lines = [
        f"GET {target.target} HTTP/1.0",
        f"authorization: Bearer {target.key}.public",
        "spacebring-network-id: 1d1449b0-23e2-5ea8-8621-209f077c011f",
    ]
    with connected(gateway) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.split()[1] == b"200"
    assert b"transfer-encoding" not in head.lower()
    assert without_token(read_json(body.decode())) == without_token(target.send(gateway).json())


@pytest.mark.parametrize("offer", ["TLS/1.2", "websocket", "h2c"])
@pytest.mark.parametrize("name", LISTS)
def test_upgrade_header_is_ignored(gateway: Daybook, name: str, offer: str) -> None:
    """A request that offers a protocol upgrade gets its normal answer."""
    target = LISTS[name]
    answer = target.send(gateway, upgrade=offer, connection="upgrade, close")
    assert answer.status == 200
    assert without_token(answer.json()) == without_token(target.send(gateway).json())


def test_connect_is_refused(gateway: Daybook) -> None:
    """The gateway refuses the method CONNECT, since it is no forward proxy."""
    answer = send(gateway.origin, "db.example.com:443", method="CONNECT")
    assert answer.status == 404
    assert reason_of(answer.json())[0] == "METHOD_NOT_FOUND"


def test_unknown_transfer_encoding_is_refused(gateway: Daybook) -> None:
    """An unknown transfer encoding gets 400."""
    answer = send(gateway.origin, ACCOUNT, headers={**NATIVE, "transfer-encoding": "knots"})
    body = answer.json()
    assert isinstance(body, dict)
    assert (answer.status, body["code"]) == (400, 3)
    assert reason_of(body)[0] == "FIELD_INVALID"


def test_expect_header_gets_100_continue(gateway: Daybook) -> None:
    """A request with `expect: 100-continue` gets 100 before its body is sent."""
    body = json.dumps({"kind": "NOTHING"}).encode()
    request = request_bytes(
        "POST", "/v1/accounts?accountId=x", **NATIVE, expect="100-continue", **{"content-length": str(len(body))}
    )
    with connected(gateway) as connection:
        connection.sendall(request)
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        status, answer = Reader(connection).read("POST", "/v1/accounts")
    assert status == 400
    assert reason_of(read_json(answer.decode()))[2] == ["request"]


UNROUTED = {
    "NUL in the path": ("/v1/accounts/a%00b", {}, 400),
    "large headers": (ACCOUNT, {"x-large": "x" * 20_000}, 431),
    "many headers": (ACCOUNT, {f"x-{number}": "1" for number in range(200)}, 431),
    "no such path": ("/nowhere", {}, 404),
}


@pytest.mark.parametrize("name", UNROUTED)
def test_refusal_before_routing_has_a_request_id(gateway: Daybook, name: str) -> None:
    """A request that is refused before routing gets a new x-request-id each time."""
    target, headers, status = UNROUTED[name]
    answers = [send(gateway.origin, target, headers=headers) for _ in range(2)]
    for answer in answers:
        assert answer.status == status
        assert not list(problems_of_any_answer(answer))
    assert answers[0].header("x-request-id") != answers[1].header("x-request-id")


def test_refusal_before_routing_keeps_the_callers_request_id(gateway: Daybook) -> None:
    """A request that is refused before routing keeps its x-request-id."""
    answer = send(gateway.origin, "/v1/accounts/a%00b", headers={"x-request-id": "mine"})
    assert (answer.status, answer.header("x-request-id")) == (400, "mine")


class Exhausted(grpc.GenericRpcHandler):
    """Ends every call with RESOURCE_EXHAUSTED, and with the `x-trailer-...` headers of the request as trailers."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The handler of every method."""

        def refuse(_request: bytes, context: grpc.ServicerContext) -> None:
            given = [(str(name), value) for name, value in context.invocation_metadata()]
            trailers = [(name, value) for name, value in given if name.startswith("x-trailer-")]
            context.set_trailing_metadata(tuple((name.removeprefix("x-trailer-"), value) for name, value in trailers))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "exhausted")

        return grpc.unary_unary_rpc_method_handler(refuse)


def test_resource_exhausted_has_retry_after(tmp_path: Path) -> None:
    """A 429 keeps the server's retry-after; without one the gateway adds `1`."""
    server = grpc.server(ThreadPoolExecutor())
    server.add_generic_rpc_handlers((Exhausted(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    body = {"x-trailer-x-error-status": "429", "x-trailer-x-error-body": '{"detail": "exhausted"}'}
    with gateway_before(tmp_path, port) as origin:
        for target, headers in ((ACCOUNT, {}), *((f"{api.path}?{api.good}", body) for api in APIS.values())):
            with_trailer = send(origin, target, headers={**headers, "x-trailer-retry-after": "7"})
            without_trailer = send(origin, target, headers=headers)
            assert (with_trailer.status, with_trailer.header("retry-after")) == (429, "7")
            assert (without_trailer.status, without_trailer.header("retry-after")) == (429, "1")
            assert not [*problems_of_any_answer(with_trailer), *problems_of_any_answer(without_trailer)]
    server.stop(None).wait()


@pytest.mark.parametrize(
    ("condition", "status", "reason"),
    [("away", 503, "SERVICE_UNAVAILABLE"), ("slow", 504, "TIMED_OUT"), ("crowded", 429, "RATE_LIMITED")],
)
def test_gateway_failure_is_a_native_status(origin_in: OriginIn, condition: str, status: int, reason: str) -> None:
    """A native call that does not reach the server gets a google.rpc.Status without the server's address."""
    answer = send(origin_in(condition), ACCOUNT, headers={**NATIVE, "origin": "https://app.example.com"})
    assert not list(problems_of_any_answer(answer))
    body = answer.json()
    assert isinstance(body, dict)
    details = body["details"]
    assert isinstance(details, list)
    assert isinstance(details[0], dict)
    assert (answer.status, details[0]["reason"], details[0]["domain"]) == (status, reason, "daybook")
    assert answer.header("access-control-allow-origin") == "https://app.example.com"
    assert b"127.0.0.1" not in answer.body


def test_grpc_failure_hides_the_server_address(origin_in: OriginIn) -> None:
    """A gRPC call without a server gets UNAVAILABLE and a message without network details."""
    with (
        grpc.insecure_channel(origin_in("away").removeprefix("http://")) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        ledger_stub(channel).GetAccount(GetAccountRequest(name="accounts/example"), metadata=credential(KEY))
    error = caught.value
    assert isinstance(error, grpc.Call)
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "The service is unavailable")


@pytest.mark.parametrize(
    ("allowed", "origins"),
    [
        ("https://app.example.com", ["https://app.example.com"]),
        ("https://app.example.com,https://x.example.com", ["https://app.example.com", "https://x.example.com"]),
        ("", []),
    ],
)
def test_allowed_origins_are_a_setting(gateway: Daybook, tmp_path: Path, allowed: str, origins: list[str]) -> None:
    """With `gateway_cors_origins`, other origins get no CORS headers, with or without a preflight."""
    with gateway_before(tmp_path, gateway.ports.server, gateway_cors_origins=allowed) as narrowed:
        for origin in ("https://app.example.com", "https://x.example.com", "https://app.example.com.evil.com", "null"):
            preflight_headers = {"origin": origin, "access-control-request-method": "GET"}
            preflight = send(narrowed, ACCOUNT, method="OPTIONS", headers=preflight_headers)
            answer = send(narrowed, ACCOUNT, headers={**NATIVE, "origin": origin})
            for each in (preflight, answer):
                assert not list(problems_of_any_answer(each))
                assert each.header("access-control-allow-origin") == (origin if origin in origins else None)
            assert (preflight.header("access-control-allow-methods") is not None) == (origin in origins)
