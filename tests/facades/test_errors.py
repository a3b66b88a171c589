"""Refusals in each vendor's words: of every error, of both limits, and on every page of the documentation."""

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
# Nothing is written through a facade, and an unknown method belongs to none.
ERRORS_OF_READING = [
    each for each in LEAVES if not issubclass(each, AlreadyExists | Aborted | FailedPrecondition | Unimplemented)
]


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("leaf", ERRORS_OF_READING, ids=lambda leaf: leaf.__name__)
def test_every_error_of_reading_has_the_vendors_envelope(vendor: str, leaf: type[DaybookError]) -> None:
    """Whatever a list may raise leaves in the vendor's shape, with the word of its status, as the gateway has it."""
    error = RENDERERS[vendor](make(leaf))
    assert is_error(vendor, error.status, read_json(json.dumps(error.body))), error


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("error", [ServiceUnavailable(), InternalFailure(), RateLimited(7), TooBusy()])
def test_what_is_not_the_callers_fault_tells_nothing_of_us(vendor: str, error: DaybookError) -> None:
    """A vendor's client is told neither of our log nor of our line."""
    assert error.message not in json.dumps(RENDERERS[vendor](error).body)


# The statuses that each vendor's page lists for errors; Teable's 5xx are those of its published codes.
DOCUMENTED = {
    "teable": {400, 401, 403, 404, 429, 500, 503, 504},
    "spacebring": {400},
    "dreadnode": {400, 401, 403, 404, 409, 422, 426, 429, 500, 502, 504},
}


def shown_by_golden_files(vendor: str) -> set[tuple[int, str]]:
    """The statuses of the vendor's refusals, each with the number of a file that shows it."""
    files = sorted((FOLDER / vendor).glob("*.http"))
    return {(each.status, file.name[:2]) for file in files for each in read_exchanges(file) if each.status >= 400}


def read_table(vendor: str) -> tuple[set[tuple[int, str]], set[int]]:
    """The table of errors on a vendor's page: statuses with the numbers of their files, and those that do not arise."""
    text = (ROOT / f"docs/facades/{vendor}.md").read_text()
    arise, absent = set(), set()
    for status, row, numbers in re.findall(r"(?m)^\| (\d{3}) \| (.*) \| ([\d, ]*)\|$", text):
        if "does not arise" in row:
            absent.add(int(status))
        else:
            assert numbers, row
            arise |= {(int(status), number) for number in re.findall(r"\d+", numbers)}
    return arise, absent


@pytest.mark.parametrize("vendor", VENDORS)
def test_every_documented_status_is_shown_or_explained(vendor: str) -> None:
    """Each status has golden exchanges and a row in the vendor's page, or a row that says why it does not arise."""
    arise, absent = read_table(vendor)
    shown = shown_by_golden_files(vendor)
    assert arise <= shown
    statuses = {status for status, _ in shown}
    assert {status for status, _ in arise} == statuses
    assert not absent & statuses
    assert DOCUMENTED.get(vendor, set()) <= statuses | absent


def test_native_callers_are_limited_too(gateway: Daybook, tmp_path: Path) -> None:
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
        of_status, of_retry = ErrorInfo(), RetryInfo()
        assert Status.FromString(details).details[0].Unpack(of_status)
        assert Status.FromString(details).details[1].Unpack(of_retry)
        assert of_status.reason == "RATE_LIMITED"
        assert 900 < of_retry.retry_delay.ToTimedelta().total_seconds() <= 1000


def test_a_crowded_gateway(origin_in: OriginIn) -> None:
    """What the gateway does not let pass is 429 over REST and RESOURCE_EXHAUSTED over gRPC."""
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
    # gRPC may find it in either place of an answer that is all trailers.
    metadata = [*(error.initial_metadata() or ()), *(error.trailing_metadata() or ())]
    assert ("retry-after", "1") in [tuple(each) for each in metadata]


def test_health_is_not_limited(origin_in: OriginIn) -> None:
    """A crowded gateway still says that it is healthy: a balancer must not take it away as well."""
    origin = origin_in("crowded")
    for path in ("/healthz", "/readyz"):
        assert [send(origin, path).status for _ in range(5)] == [200] * 5
    with grpc.insecure_channel(origin.removeprefix("http://")) as channel:
        health: Any = HealthStub(channel)
        statuses = [health.Check(HealthCheckRequest()).status for _ in range(5)]
    assert statuses == [HealthCheckResponse.SERVING] * 5


class Refusing(grpc.GenericRpcHandler):
    """Ends every call with a code, in words that are for nobody's client, and without a vendor's body."""

    code = grpc.StatusCode.UNKNOWN

    def service(self, _details: grpc.HandlerCallDetails) -> Any:
        """The handler of whatever method."""
        return grpc.unary_unary_rpc_method_handler(lambda _, context: context.abort(self.code, "words of gRPC"))


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Refusing, str]]:
    """A server that refuses everything, and the gateway before it."""
    handler, server = Refusing(), grpc.server(ThreadPoolExecutor())
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with gateway_before(tmp_path_factory.mktemp("refusing"), port) as origin:
        yield handler, origin
    server.stop(None).wait()


@pytest.mark.parametrize("vendor", VENDORS)
def test_what_grpc_refuses_is_in_the_vendors_words(refusing: tuple[Refusing, str], vendor: str) -> None:
    """An error that no facade has put into words has those of its status, and is our fault if it is no other's.

    RESOURCE_EXHAUSTED is not 429: gRPC says it of a message that is too large, and that
    would be no better a moment later.
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
        assert b"words of gRPC" not in answer.body


@pytest.mark.parametrize(
    ("vendor", "error", "status", "told"),
    [
        ("teable", FieldInvalid("take", "is not UTF-8"), 400, 'Validation error: Invalid at "take"'),
        ("dreadnode", FieldInvalid("org", "is not UTF-8"), 422, '"loc": ["path", "org"]'),
        ("dreadnode", FieldInvalid("limit", "is not UTF-8"), 422, '"loc": ["query", "limit"]'),
        ("spacebring", CredentialInvalid(), 401, "unauthorized"),
        ("nebulablock", FieldInvalid("limit", "is not UTF-8"), 400, "limit is not UTF-8"),
    ],
)
def test_where_the_mistake_is(vendor: str, error: DaybookError, status: int, told: str) -> None:
    """A refusal names the parameter in the way of the vendor."""
    rendered = RENDERERS[vendor](error)
    assert rendered.status == status
    assert told in json.dumps(rendered.body, ensure_ascii=False).replace('\\"', '"')
