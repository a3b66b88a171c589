"""Headers that HTTP allows and gRPC can't carry are ignored in a REST call.

gRPC allows lower-case letters, digits, `_`, `-` and `.` in a name and requires base64 in the value
of a name that ends in `-bin`. Values of names that begin with `grpc-` have their own grammars.
"""

from __future__ import annotations

import base64
import string

import httpx
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.demo import LISTS, NATIVE
from tests.support.examples import examples
from tests.support.http_client import Answer, problems_of_any_answer, send
from tests.support.processes import Daybook
from tests.support.rest import KEY, reason_of
from tests.support.vendors import without_token

TOKEN_CHARACTERS = "!#$%&'*+-.^_`|~" + string.digits + string.ascii_letters
"""The characters that RFC 9110 allows in a header name."""
GRPC_HEADERS = (
    "grpc-accept-encoding",
    "grpc-encoding",
    "grpc-internal-encoding-request",
    "grpc-message",
    "grpc-previous-rpc-attempts",
    "grpc-retry-pushback-ms",
    "grpc-status",
    "grpc-status-details-bin",
    "grpc-tags-bin",
    "grpc-timeout",
    "grpc-trace-bin",
)
ODD: dict[str, dict[str, str]] = {
    **{f"{each!r} in the name": {f"x{each}y": "1"} for each in TOKEN_CHARACTERS},
    **{f"{each!r} alone": {each: "1"} for each in "!#$%&'*+-.^_`|~"},
    **{name: {name: "not valid!"} for name in GRPC_HEADERS},
    "invalid base64": {"x-trace-bin": "not base64!"},
    "base64 of another alphabet": {"x-trace-bin": "-_-_"},
    "truncated base64": {"X-Trace-Bin": "A"},
    "two base64 values": {"x-trace-bin": "AA,AA!"},
    "empty binary value": {"x-trace-bin": ""},
    "only the suffix": {"-bin": "!"},
    "of a load balancer": {"lb-cost-bin": "!", "lb-token": "!", "endpoint-load-metrics-bin": "!"},
    "empty value": {"x-empty": ""},
    "value over two lines": {"x-folded": "one\r\n two"},
    "no trailers accepted": {"te": "gzip;q=1"},
    "trailers accepted": {"te": "trailers"},
    "upgrade to HTTP/2": {"upgrade": "h2c", "http2-settings": "!"},
    "unknown expectation": {"expect": "a miracle"},
    "expectation of 100": {"expect": "100-continue"},
    "compressed body": {"content-encoding": "gzip"},
    "body of an unknown encoding": {"content-encoding": "knots"},
    "content type of gRPC": {"content-type": "application/grpc"},
    "content type of gRPC with JSON": {"content-type": "application/grpc+json"},
    "unknown content type": {"content-type": "application/grpcjson"},
    "content type of gRPC-Web": {"content-type": "application/grpc-web+proto"},
    "internal error headers": {"x-error-body": "{}", "x-error-status": "200"},
    "invalid host": {"host": "[::1"},
    "empty host": {"host": ""},
    "unknown scheme": {"x-forwarded-proto": "gopher"},
    "cookies": {"cookie": "a=b; =; c"},
    "many": {f"x-{number}": "1" for number in range(85)},
    "many that gRPC can't carry": {f"x!{number}": "1" for number in range(85)},
    "long name": {"x" * 14_000: "1"},
    "long binary value": {"x-long-bin": "!" * 14_000},
}


def require_ignored(gateway: Daybook, api: str, headers: dict[str, str]) -> None:
    """Fails unless an API serves the same page with and without the headers."""
    answer = LISTS[api].send(gateway, **headers)
    assert answer.status == 200, (headers, answer.status, answer.body[:200])
    assert without_token(answer.json()) == without_token(LISTS[api].send(gateway).json())


@pytest.mark.parametrize("name", ODD)
def test_odd_header_is_ignored(gateway: Daybook, name: str) -> None:
    """The native REST API ignores each odd header."""
    require_ignored(gateway, "native", ODD[name])


@pytest.mark.parametrize("api", LISTS)
def test_odd_header_is_ignored_by_every_api(gateway: Daybook, api: str) -> None:
    """Every API ignores headers that gRPC can't carry, alone and all in one request."""
    odd = {**ODD["invalid base64"], **{f"x{each}y": "1" for each in TOKEN_CHARACTERS}}
    for headers in (
        {"x-trace-bin": "!"},
        {"x!y": "1"},
        {"content-type": "application/grpc"},
        {"grpc-retry-pushback-ms": "soon"},
        odd,
    ):
        require_ignored(gateway, api, headers)


@pytest.mark.parametrize("api", LISTS)
def test_odd_header_does_not_change_a_refusal(gateway: Daybook, api: str) -> None:
    """A request without a credential gets 401, with or without odd headers."""
    for headers in ({}, {"x-trace-bin": "not base64!"}, {"x!y": "1"}):
        answer = send(gateway.origin, LISTS[api].target, headers=headers)
        assert answer.status == 401, answer.body
        assert not list(problems_of_any_answer(answer))


names = st.text(TOKEN_CHARACTERS, min_size=1, max_size=12).map(lambda name: f"q{name}")
values = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=12)


@pytest.mark.parametrize("api", LISTS)
def test_random_headers_are_ignored(gateway: Daybook, api: str) -> None:
    """No header that HTTP allows makes a call fail."""

    @settings(max_examples=examples(15), deadline=None, database=None, derandomize=True)
    @given(
        st.dictionaries(st.one_of(names, names.map("{}-bin".format), names.map("grpc-{}".format)), values, max_size=6)
    )
    def check(headers: dict[str, str]) -> None:
        require_ignored(gateway, api, headers)

    check()


def test_odd_headers_are_not_logged(gateway: Daybook) -> None:
    """Neither the gateway nor the server logs odd headers."""
    lengths = len(gateway.stdout), len(gateway.stderr)
    for headers in ODD.values():
        LISTS["native"].send(gateway, **headers)
    logged = gateway.stdout[lengths[0] :] + gateway.stderr[lengths[1] :]
    assert not logged


def test_unknown_transfer_encoding_is_refused_and_not_logged(gateway: Daybook) -> None:
    """An unknown transfer encoding gets 400 before routing, without a log line."""
    length = len(gateway.stdout)
    answer: Answer = send(gateway.origin, "/v1/accounts", headers={**NATIVE, "transfer-encoding": "knots"})
    assert answer.status == 400
    assert reason_of(answer.json())[0] == "FIELD_INVALID"
    assert not gateway.stdout[length:]


def test_invalid_name_in_a_native_call_is_ignored(gateway: Daybook) -> None:
    """The gateway removes an invalid name from a native call. gRPC clients can't send one, so the test uses HTTP/2."""
    headers = {"content-type": "application/grpc", "te": "trailers", "authorization": f"Bearer {KEY}", "x!y": "1"}
    with httpx.Client(http1=False, http2=True, base_url=gateway.origin, timeout=60) as client:
        answer = client.post("/daybook.v1.Ledger/ListAccounts", headers=headers, content=bytes(5))
    # A successful call has its status in trailers, which httpx doesn't show.
    assert "grpc-status" not in answer.headers
    assert answer.content


@pytest.mark.parametrize("api", LISTS)
def test_content_type_of_grpc_makes_a_native_call(gateway: Daybook, api: str) -> None:
    """A POST with gRPC's content type is a native call, so a REST path is refused as an unknown method."""
    headers = {**NATIVE, "content-type": "application/grpc"}
    answer = send(gateway.origin, LISTS[api].target, method="POST", headers=headers, body=bytes(5))
    assert (answer.status, answer.header("grpc-status")) == (200, "12")
    details = base64.b64decode(f"{answer.header('grpc-status-details-bin')}==")
    info = ErrorInfo()
    assert Status.FromString(details).details[0].Unpack(info)
    assert info.reason == "METHOD_UNKNOWN"


@pytest.mark.parametrize("content_type", ["application/grpc", "application/grpc-web+proto", "application/json"])
@pytest.mark.parametrize("target", ["/daybook.v1.Ledger/ListAccounts", "/v1/accounts", "/"])
def test_query_outside_ascii_reaches_no_server(gateway: Daybook, content_type: str, target: str) -> None:
    """A path that is not UTF-8, which would end a server of gRPC, is refused by the gateway."""
    headers = {**NATIVE, "content-type": content_type, "te": "trailers"}
    answer = send(gateway.origin, f"{target}?x=".encode() + b"\xae", method="POST", headers=headers, body=bytes(5))
    assert answer.status in (400, 404) or answer.header("grpc-status") == "12"
    assert "ended by a request" not in gateway.stderr
