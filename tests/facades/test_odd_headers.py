"""Headers that HTTP allows and gRPC can't carry: a REST call is answered as if they were not there.

gRPC takes lower-case letters, digits, `_`, `-` and `.` in a name, base64 alone in the value of
a name that ends in `-bin`, and has a grammar of its own for names that begin with `grpc-`.
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
"""What RFC 9110 allows in the name of a header."""
OF_GRPC = (
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
    **{name: {name: "no such thing!"} for name in OF_GRPC},
    "no base64": {"x-trace-bin": "not base64!"},
    "base64 of another alphabet": {"x-trace-bin": "-_-_"},
    "base64 that is cut off": {"X-Trace-Bin": "A"},
    "two base64 values": {"x-trace-bin": "AA,AA!"},
    "no binary value": {"x-trace-bin": ""},
    "only the ending": {"-bin": "!"},
    "of a load balancer": {"lb-cost-bin": "!", "lb-token": "!", "endpoint-load-metrics-bin": "!"},
    "empty value": {"x-empty": ""},
    "value over two lines": {"x-folded": "one\r\n two"},
    "accepts no trailers": {"te": "gzip;q=1"},
    "accepts trailers": {"te": "trailers"},
    "offers HTTP/2": {"upgrade": "h2c", "http2-settings": "!"},
    "expects something unknown": {"expect": "a miracle"},
    "waits to be asked for a body": {"expect": "100-continue"},
    "compressed body": {"content-encoding": "gzip"},
    "body of an unknown coding": {"content-encoding": "knots"},
    "content type of gRPC": {"content-type": "application/grpc"},
    "content type of gRPC with JSON": {"content-type": "application/grpc+json"},
    "strange content type": {"content-type": "application/grpcjson"},
    "content type of gRPC-Web": {"content-type": "application/grpc-web+proto"},
    "finished error": {"x-error-body": "{}", "x-error-status": "200"},
    "host that is no host": {"host": "[::1"},
    "no host": {"host": ""},
    "scheme that is none": {"x-forwarded-proto": "gopher"},
    "cookies": {"cookie": "a=b; =; c"},
    "many": {f"x-{number}": "1" for number in range(85)},
    "many that gRPC can't carry": {f"x!{number}": "1" for number in range(85)},
    "long name": {"x" * 14_000: "1"},
    "long binary value": {"x-long-bin": "!" * 14_000},
}


def require_passed_over(gateway: Daybook, api: str, headers: dict[str, str]) -> None:
    """Fails unless the page is the one that is served without these headers."""
    answer = LISTS[api].send(gateway, **headers)
    assert answer.status == 200, (headers, answer.status, answer.body[:200])
    assert without_token(answer.json()) == without_token(LISTS[api].send(gateway).json())


@pytest.mark.parametrize("name", ODD)
def test_odd_header_changes_nothing(gateway: Daybook, name: str) -> None:
    """Each is passed over on native REST."""
    require_passed_over(gateway, "native", ODD[name])


@pytest.mark.parametrize("api", LISTS)
def test_odd_header_changes_nothing_at_any_path(gateway: Daybook, api: str) -> None:
    """What gRPC can't carry is passed over at each vendor's path, all of it in one request too."""
    odd = {**ODD["no base64"], **{f"x{each}y": "1" for each in TOKEN_CHARACTERS}}
    for headers in (
        {"x-trace-bin": "!"},
        {"x!y": "1"},
        {"content-type": "application/grpc"},
        {"grpc-retry-pushback-ms": "soon"},
        odd,
    ):
        require_passed_over(gateway, api, headers)


@pytest.mark.parametrize("api", LISTS)
def test_odd_header_hides_no_refusal(gateway: Daybook, api: str) -> None:
    """A refusal stays the refusal that it is."""
    for headers in ({}, {"x-trace-bin": "not base64!"}, {"x!y": "1"}):
        answer = send(gateway.origin, LISTS[api].target, headers=headers)
        assert answer.status == 401, answer.body
        assert not list(problems_of_any_answer(answer))


names = st.text(TOKEN_CHARACTERS, min_size=1, max_size=12).map(lambda name: f"q{name}")
values = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=12)


@pytest.mark.parametrize("api", LISTS)
def test_any_header_is_passed_over(gateway: Daybook, api: str) -> None:
    """No name and no value that HTTP allows makes a call fail."""

    @settings(max_examples=examples(15), deadline=None, database=None, derandomize=True)
    @given(
        st.dictionaries(st.one_of(names, names.map("{}-bin".format), names.map("grpc-{}".format)), values, max_size=6)
    )
    def check(headers: dict[str, str]) -> None:
        require_passed_over(gateway, api, headers)

    check()


def test_odd_headers_are_not_logged_as_failures(gateway: Daybook) -> None:
    """Neither the gateway nor the server writes a line about them."""
    before = len(gateway.stdout), len(gateway.stderr)
    for headers in ODD.values():
        LISTS["native"].send(gateway, **headers)
    logged = gateway.stdout[before[0] :] + gateway.stderr[before[1] :]
    assert not logged


def test_unknown_transfer_encoding_is_not_logged_as_a_failure(gateway: Daybook) -> None:
    """A caller's mistake is a 4xx, before the gateway knows the path too."""
    before = len(gateway.stdout)
    answer: Answer = send(gateway.origin, "/v1/accounts", headers={**NATIVE, "transfer-encoding": "knots"})
    assert answer.status == 400
    assert reason_of(answer.json())[0] == "FIELD_INVALID"
    assert not gateway.stdout[before:]


def test_name_that_grpc_cannot_carry_is_passed_over_natively(gateway: Daybook) -> None:
    """The gateway takes it from a native call too. Clients of gRPC refuse to send it, so this one speaks HTTP/2."""
    headers = {"content-type": "application/grpc", "te": "trailers", "authorization": f"Bearer {KEY}", "x!y": "1"}
    with httpx.Client(http1=False, http2=True, base_url=gateway.origin, timeout=60) as client:
        answer = client.post("/daybook.v1.Ledger/ListAccounts", headers=headers, content=bytes(5))
    # The status comes in trailers, which httpx doesn't show, unless the call was refused at once.
    assert "grpc-status" not in answer.headers
    assert answer.content


@pytest.mark.parametrize("api", LISTS)
def test_content_type_of_grpc_makes_a_native_call(gateway: Daybook, api: str) -> None:
    """A POST with gRPC's content type is a native call: a REST path is no method of gRPC, and said to be none."""
    headers = {**NATIVE, "content-type": "application/grpc"}
    answer = send(gateway.origin, LISTS[api].target, method="POST", headers=headers, body=bytes(5))
    assert (answer.status, answer.header("grpc-status")) == (200, "12")
    details = base64.b64decode(f"{answer.header('grpc-status-details-bin')}==")
    info = ErrorInfo()
    assert Status.FromString(details).details[0].Unpack(info)
    assert info.reason == "METHOD_UNKNOWN"
