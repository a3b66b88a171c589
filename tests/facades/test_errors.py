"""Errors have each vendor's format: every error of reading, both rate limits, and every documented status."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from daybook.v1.ledger_service_pb2 import GetAccountRequest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from server.app import FACADES
from server.ledger.errors import (
    Aborted,
    AlreadyExists,
    CredentialInvalid,
    DaybookError,
    FailedPrecondition,
    FieldInvalid,
    InternalFailure,
    RateLimited,
    ServiceUnavailable,
    TooBusy,
    Unimplemented,
)
from tests.support.callers import credential, ledger_stub
from tests.support.errors import LEAVES, make
from tests.support.gateways import OriginIn, gateway_before, limited
from tests.support.golden import read_exchanges
from tests.support.http_client import problems_of_any_answer, read_json, send
from tests.support.processes import ROOT, Daybook
from tests.support.vendors import PATHS, VENDORS, is_error

KEY = "demo-dreadnode.public"
FOLDER = Path(__file__).parent

RENDERERS = {service.split(".")[2]: render for service, render in FACADES.items()}
# Facades never write, and an unknown method belongs to no facade.
ERRORS_OF_READING = [
    each for each in LEAVES if not issubclass(each, AlreadyExists | Aborted | FailedPrecondition | Unimplemented)
]


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("leaf", ERRORS_OF_READING, ids=lambda leaf: leaf.__name__)
def test_every_read_error_has_the_vendors_format(vendor: str, leaf: type[DaybookError]) -> None:
    """Every error that a list raises has the vendor's body, with the error type of its status."""
    error = RENDERERS[vendor](make(leaf))
    assert is_error(vendor, error.status, read_json(json.dumps(error.body))), error


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("error", [ServiceUnavailable(), InternalFailure(), RateLimited(7), TooBusy()])
def test_server_error_hides_internal_details(vendor: str, error: DaybookError) -> None:
    """The native message of an error that the caller did not cause, about the log or the queue, is not shown."""
    assert error.message not in json.dumps(RENDERERS[vendor](error).body)


# The error statuses that each vendor's page lists; Teable's 5xx are from its published error codes.
DOCUMENTED = {
    "teable": {400, 401, 403, 404, 429, 500, 503, 504},
    "spacebring": {400},
    "dreadnode": {400, 401, 403, 404, 409, 422, 426, 429, 500, 502, 504},
}


def shown_by_golden_files(vendor: str) -> set[tuple[int, str]]:
    """The error statuses in a vendor's golden files, each with the number of a file."""
    files = sorted((FOLDER / vendor).glob("*.http"))
    return {(each.status, file.name[:2]) for file in files for each in read_exchanges(file) if each.status >= 400}


def read_table(vendor: str) -> tuple[set[tuple[int, str]], set[int]]:
    """The table of errors on a vendor's page: statuses with their file numbers, and statuses that are never sent."""
    text = (ROOT / f"docs/facades/{vendor}.md").read_text()
    arise, absent = set(), set()
    for status, row, numbers in re.findall(r"(?m)^\| (\d{3}) \| (.*) \| ([\d, ]*)\|$", text):
        if "never sent" in row:
            absent.add(int(status))
        else:
            assert numbers, row
            arise |= {(int(status), number) for number in re.findall(r"\d+", numbers)}
    return arise, absent


@pytest.mark.parametrize("vendor", VENDORS)
def test_every_documented_status_has_exchanges_or_a_reason(vendor: str) -> None:
    """Each status has golden exchanges and a row on the vendor's page, or a row that says why it is never sent."""
    arise, absent = read_table(vendor)
    shown = shown_by_golden_files(vendor)
    assert arise <= shown
    statuses = {status for status, _ in shown}
    assert {status for status, _ in arise} == statuses
    assert not absent & statuses
    assert DOCUMENTED.get(vendor, set()) <= statuses | absent


def test_native_calls_are_rate_limited(gateway: Daybook, tmp_path: Path) -> None:
    """The third call with a key gets RATE_LIMITED with RetryInfo, over REST with retry-after, and over gRPC."""
    with limited(gateway, tmp_path) as origin:
        headers = {"authorization": f"Bearer {KEY}"}
        assert [send(origin, "/v1/accounts/example", headers=headers).status for _ in range(2)] == [200, 200]
        answer = send(origin, "/v1/accounts/example", headers=headers)
        assert not list(problems_of_any_answer(answer))
        assert answer.status == 429
        body = json.loads(answer.body)
        info, retry = body["details"]
        assert (body["code"], info["reason"], info["domain"]) == (8, "RATE_LIMITED", "daybook")
        seconds = float(retry["retryDelay"].removesuffix("s"))
        assert 900 < seconds <= 1000
        assert 0 <= int(answer.header("retry-after") or 0) - seconds < 1

        with grpc.insecure_channel(origin.removeprefix("http://")) as channel, pytest.raises(grpc.RpcError) as caught:
            ledger_stub(channel).GetAccount(GetAccountRequest(name="accounts/example"), metadata=credential(KEY))
        error = caught.value
        assert isinstance(error, grpc.Call)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        details = dict(error.trailing_metadata())["grpc-status-details-bin"]
        assert isinstance(details, bytes)
        info_detail, retry_detail = ErrorInfo(), RetryInfo()
        assert Status.FromString(details).details[0].Unpack(info_detail)
        assert Status.FromString(details).details[1].Unpack(retry_detail)
        assert info_detail.reason == "RATE_LIMITED"
        assert 900 < retry_detail.retry_delay.ToTimedelta().total_seconds() <= 1000


def test_gateway_rate_limit_over_rest_and_grpc(origin_in: OriginIn) -> None:
    """A call over the gateway's rate limit gets 429 over REST and RESOURCE_EXHAUSTED over gRPC."""
    origin = origin_in("crowded")
    answer = send(origin, "/v1/accounts/example", headers={"authorization": f"Bearer {KEY}"})
    assert not list(problems_of_any_answer(answer))
    assert (answer.status, answer.header("retry-after")) == (429, "1")
    info = '{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "RATE_LIMITED", "domain": "daybook"}'
    assert answer.json() == read_json(f'{{"code": 8, "message": "Too many requests", "details": [{info}]}}')
    with grpc.insecure_channel(origin.removeprefix("http://")) as channel, pytest.raises(grpc.RpcError) as caught:
        ledger_stub(channel).GetAccount(GetAccountRequest(name="accounts/example"), metadata=credential(KEY))
    error = caught.value
    assert isinstance(error, grpc.Call)
    assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "Too many requests")
    # gRPC may report the metadata of a trailers-only answer as initial or as trailing.
    metadata = [*(error.initial_metadata() or ()), *(error.trailing_metadata() or ())]
    assert ("retry-after", "1") in [tuple(each) for each in metadata]


@pytest.mark.parametrize("content_type", ["application/json", "application/grpcjson", "application/grpc-web+proto"])
def test_gateway_rate_limit_refuses_in_json(origin_in: OriginIn, content_type: str) -> None:
    """Over the gateway's rate limit REST requests get 429 in JSON, also for odd content types and wrong methods."""
    for method in ("POST", "DELETE"):
        headers = {"authorization": f"Bearer {KEY}", "content-type": content_type}
        answer = send(origin_in("crowded"), "/v1/accounts/example", method=method, headers=headers, body=b"{}")
        assert not list(problems_of_any_answer(answer))
        body: Any = answer.json()
        assert (answer.status, body["code"]) == (429, 8)


def test_gateway_rate_limit_refuses_head_without_body(origin_in: OriginIn) -> None:
    """Over the gateway's rate limit HEAD gets 429 without a body."""
    answer = send(origin_in("crowded"), "/v1/accounts/example", method="HEAD")
    assert (answer.status, answer.header("retry-after"), answer.body) == (429, "1", b"")


def test_health_checks_are_not_rate_limited(origin_in: OriginIn) -> None:
    """Health checks succeed over the rate limit, so that a load balancer keeps the gateway."""
    origin = origin_in("crowded")
    for path in ("/healthz", "/readyz"):
        assert [send(origin, path).status for _ in range(5)] == [200] * 5
    with grpc.insecure_channel(origin.removeprefix("http://")) as channel:
        health: Any = HealthStub(channel)
        statuses = [health.Check(HealthCheckRequest()).status for _ in range(5)]
    assert statuses == [HealthCheckResponse.SERVING] * 5


class Refusing(grpc.GenericRpcHandler):
    """Ends every call with a status code and an internal message, without a vendor's error body."""

    code = grpc.StatusCode.UNKNOWN

    def service(self, _details: grpc.HandlerCallDetails) -> Any:
        """The handler of every method."""
        return grpc.unary_unary_rpc_method_handler(lambda _, context: context.abort(self.code, "internal message"))


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Refusing, str]]:
    """A server that refuses every call, and a gateway in front of it."""
    handler, server = Refusing(), grpc.server(ThreadPoolExecutor())
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with gateway_before(tmp_path_factory.mktemp("refusing"), port) as origin:
        yield handler, origin
    server.stop(None).wait()


@pytest.mark.parametrize("vendor", VENDORS)
def test_grpc_error_has_the_vendors_format(refusing: tuple[Refusing, str], vendor: str) -> None:
    """An error that no facade rendered gets the vendor's body for 503, 504 or else 500.

    RESOURCE_EXHAUSTED is 500 and not 429: gRPC uses it for a message that is too large, and a
    retry would not help.
    """
    handler, origin = refusing
    for code in grpc.StatusCode:
        if code is grpc.StatusCode.OK:
            continue
        handler.code = code
        answer = send(origin, PATHS[vendor])
        assert not list(problems_of_any_answer(answer))
        status = {grpc.StatusCode.UNAVAILABLE: 503, grpc.StatusCode.DEADLINE_EXCEEDED: 504}.get(code, 500)
        assert answer.status == VENDORS[vendor].statuses.get(status, status), code
        assert is_error(vendor, answer.status, answer.json()), answer.body
        assert b"internal message" not in answer.body


@pytest.mark.parametrize(
    ("vendor", "error", "status", "text"),
    [
        ("teable", FieldInvalid("take", "is not UTF-8"), 400, 'Validation error: Invalid at "take"'),
        ("dreadnode", FieldInvalid("org", "is not UTF-8"), 422, '"loc": ["path", "org"]'),
        ("dreadnode", FieldInvalid("limit", "is not UTF-8"), 422, '"loc": ["query", "limit"]'),
        ("spacebring", CredentialInvalid(), 401, "unauthorized"),
        ("nebulablock", FieldInvalid("limit", "is not UTF-8"), 400, "limit is not UTF-8"),
    ],
)
def test_invalid_parameter_is_named(vendor: str, error: DaybookError, status: int, text: str) -> None:
    """A refusal names the invalid parameter in the vendor's format."""
    rendered = RENDERERS[vendor](error)
    assert rendered.status == status
    assert text in json.dumps(rendered.body, ensure_ascii=False).replace('\\"', '"')
