"""gRPC-Web and Connect through the gateway, for web pages and for `buf curl`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from daybook.v1.ledger_service_pb2 import ListTransactionsRequest, ListTransactionsResponse
from daybook.v1.ledger_service_pb2_grpc import LedgerStub

from server.demo import dreadnode
from server.demo.load import SECRET
from tests.support.gateways import away
from tests.support.http_client import Answer, send
from tests.support.processes import BIN, Daybook, run, sqlite_url

PROTOCOLS = ("grpcweb", "connect")
KEY = f"{dreadnode.KEY}.{SECRET}"
LIST = "/daybook.v1.Ledger/ListTransactions"
ACCOUNT = f"accounts/{dreadnode.ORGANIZATION}"
CREDENTIAL = {"authorization": f"Bearer {KEY}"}
CONNECT = {"content-type": "application/proto", "connect-protocol-version": "1"}
GRPC_WEB = {"content-type": "application/grpc-web+proto", "x-grpc-web": "1"}

Curl = Callable[..., tuple[int, str]]


@pytest.fixture(params=PROTOCOLS)
def curl(request: pytest.FixtureRequest, gateway: Daybook) -> Curl:
    """Runs `buf curl` over a protocol with a key; returns its exit code and its output."""

    def call(method: str, body: object, key: str = KEY) -> tuple[int, str]:
        flags = ["--protocol", request.param, "-H", f"authorization: Bearer {key}", "-d", json.dumps(body)]
        command = [str(BIN / "buf"), "curl", *flags, f"{gateway.origin}/{method}"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.returncode, result.stdout or result.stderr

    return call


def test_buf_curl_lists(curl: Curl) -> None:
    """`buf curl` lists transactions by reflection, a bidirectional stream."""
    status, printed = curl("daybook.v1.Ledger/ListTransactions", {"parent": ACCOUNT, "pageSize": 2})
    assert status == 0, printed
    assert [each["name"].startswith(ACCOUNT) for each in json.loads(printed)["transactions"]] == [True, True]


def test_buf_curl_reads_a_stream(curl: Curl, gateway: Daybook) -> None:
    """`buf curl` reads the server stream of VerifyAccounts to its end."""
    database = sqlite_url(gateway.folder / "daybook.db")
    created = run(
        "keys",
        "create",
        "--tenant",
        "demo-dreadnode",
        "--scope",
        "admin",
        "--database-url",
        database,
        folder=gateway.folder,
    )
    assert created.returncode == 0, created.stderr
    status, printed = curl("daybook.v1.Admin/VerifyAccounts", {}, created.stdout.split()[-1])
    assert status == 0, printed
    assert printed.count("{") > 0


def test_error_has_its_details(curl: Curl) -> None:
    """An error has the code, message and details of gRPC."""
    status, printed = curl("daybook.v1.Ledger/ListTransactions", {"parent": "accounts/unknown"})
    assert status != 0
    error = json.loads(printed)
    assert (error["code"], error["message"]) == ("not_found", "accounts/unknown is not found")
    assert error["details"][0]["type"].endswith("google.rpc.ErrorInfo")


def ask(origin: str, path: str, body: bytes, **headers: str) -> Answer:
    """Sends a POST as a web page of another origin."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    origin_of_page = {"origin": "https://app.example.com"}
    return send(origin, path, method="POST", body=body, headers={**CREDENTIAL, **origin_of_page, **named})


def framed(message: bytes) -> bytes:
    """A gRPC frame with an uncompressed message."""
    return b"\0" + len(message).to_bytes(4) + message


def test_web_page_calls_from_another_origin(gateway: Daybook) -> None:
    """A gRPC-Web answer has the CORS headers that let a web page read it and its status."""
    request = ListTransactionsRequest(parent=ACCOUNT, page_size=1).SerializeToString()
    answer = ask(gateway.origin, LIST, framed(request), **GRPC_WEB)
    assert answer.status == 200
    assert answer.header("access-control-allow-origin") == "https://app.example.com"
    assert "grpc-status" in (answer.header("access-control-expose-headers") or "")
    length = int.from_bytes(answer.body[1:5])
    assert len(ListTransactionsResponse.FromString(answer.body[5 : 5 + length]).transactions) == 1
    # The trailers are the last frame.
    assert answer.body[5 + length] == 0x80
    assert b"grpc-status:0" in answer.body[5 + length :]


def test_unary_answer_of_connect_is_unframed(gateway: Daybook) -> None:
    """The body of a unary Connect answer is the message without a frame."""
    request = ListTransactionsRequest(parent=ACCOUNT, page_size=1).SerializeToString()
    answer = ask(gateway.origin, LIST, request, **CONNECT)
    assert (answer.status, answer.header("content-type")) == (200, "application/proto")
    assert len(ListTransactionsResponse.FromString(answer.body).transactions) == 1


@pytest.mark.parametrize("protocol", [CONNECT, GRPC_WEB], ids=PROTOCOLS[::-1])
def test_unknown_method_is_named(gateway: Daybook, protocol: dict[str, str]) -> None:
    """A call of an unknown method is refused in the protocol's format, with the existing methods."""
    answer = ask(gateway.origin, "/daybook.v1.Ledger/Nothing", framed(b""), **protocol)
    text = answer.body + (answer.header("grpc-message") or "").encode()
    assert b"there is no method daybook.v1.Ledger/Nothing; daybook.v1.Ledger has " in text


def test_unreachable_server_is_unavailable(gateway: Daybook, tmp_path: Path) -> None:
    """Without a server, a gRPC-Web call gets UNAVAILABLE and a Connect call 503."""
    with away(gateway, tmp_path) as origin:
        connect = ask(origin, LIST, b"", **CONNECT)
        web = ask(origin, LIST, framed(b""), **GRPC_WEB)
    assert (connect.status, connect.body) == (503, b"The service is unavailable")
    assert web.header("grpc-status") == str(grpc.StatusCode.UNAVAILABLE.value[0])
    assert web.header("grpc-message") == "The service is unavailable"


@pytest.mark.parametrize(
    "content_type", ["application/json", "application/connect+json; charset=utf-8", "Application/JSON", "text/plain"]
)
def test_json_of_connect_is_refused(gateway: Daybook, content_type: str) -> None:
    """Connect's JSON is refused as a Connect error that names the alternatives."""
    answer = ask(gateway.origin, LIST, b"{}", content_type=content_type, connect_protocol_version="1")
    assert answer.status == 415
    assert answer.json() == {
        "code": "unimplemented",
        "message": "Connect's JSON is not served: use its binary format (application/proto), or REST",
    }


def test_json_post_to_a_grpc_path_is_not_found(gateway: Daybook) -> None:
    """A POST of JSON to a gRPC path without a Connect header gets 404."""
    answer = ask(gateway.origin, LIST, b"{}", content_type="application/json")
    assert answer.status == 404
    assert answer.json()["message"] == f"POST {LIST} is not found"  # type: ignore[index,call-overload]


REST = f"/v1/{ACCOUNT}/transactions?pageSize=1"
CONNECT_QUERY = "&connect=v1&encoding=json&message=%7B%7D"
"""The query of a Connect GET."""


@pytest.mark.parametrize(
    "content_type", ["application/grpc-web", "application/grpc-web-text", "application/connect+proto"]
)
@pytest.mark.parametrize("method", ["GET", "PATCH"])
def test_only_a_post_is_grpc_web_or_connect(gateway: Daybook, method: str, content_type: str) -> None:
    """A GET or PATCH with the headers of gRPC-Web or Connect is answered as REST."""
    path, body = (REST, b"") if method == "GET" else ("/v1/accounts/unknown", b'{"displayName": "Unknown"}')
    claims = {"content-type": content_type, "connect-protocol-version": "1", "accept": content_type}
    plain = send(gateway.origin, path, method=method, body=body, headers=CREDENTIAL)
    answer = send(gateway.origin, path, method=method, body=body, headers={**CREDENTIAL, **claims})
    assert (answer.status, answer.header("content-type")) == (plain.status, "application/json")
    assert answer.json().keys() == plain.json().keys()  # type: ignore[union-attr]


@pytest.mark.parametrize(("path", "status"), [(REST, 400), (f"{LIST}?", 404)])
def test_connect_get_is_not_supported(gateway: Daybook, path: str, status: int) -> None:
    """A Connect GET is answered as REST, so its query is refused or its path not found."""
    answer = send(gateway.origin, path + CONNECT_QUERY, headers=CREDENTIAL)
    assert answer.status == status
    expected = f"GET {LIST} is not found" if status == 404 else "connect"
    assert expected in answer.json()["message"]  # type: ignore[index,call-overload,operator]


async def test_grpc_call_with_a_connect_header_is_grpc(gateway: Daybook) -> None:
    """A gRPC call with a connect-protocol-version header, as from a proxy, is answered as gRPC."""
    metadata = (("authorization", f"Bearer {KEY}"), ("connect-protocol-version", "1"))
    async with grpc.aio.insecure_channel(gateway.origin.removeprefix("http://")) as channel:
        answer = await LedgerStub(channel).ListTransactions(ListTransactionsRequest(parent=ACCOUNT), metadata=metadata)
    assert answer.transactions
