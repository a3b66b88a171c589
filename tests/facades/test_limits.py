"""The limits of the gateway: each just below, which is served, and just above, which is told.

Those of a call over gRPC are in tests/rpc/test_limits.py, bodies that are too large at a
vendor's path in */46-body-too-large.http, rates in test_errors.py and */4?-*rate-limit.http.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import yaml

from server.config import Settings
from tests.support.gateways import configuration_of
from tests.support.http_client import Answer, problems_of_any_answer, send
from tests.support.processes import ROOT, Daybook

CREDENTIAL = {"authorization": "Bearer demo-dreadnode.public"}
ACCOUNT = "/v1/accounts/example"
BODY_BYTES_MAX = 1024 * 1024
HEADERS_BYTES_MAX = 16 * 1024
HEADERS_MAX = 100
NONE: Mapping[str, str] = {}


def ask(gateway: Daybook, target: str = ACCOUNT, *, headers: Mapping[str, str] = NONE, body: bytes = b"") -> Answer:
    """Sends a request; holds the answer to what every answer of REST must keep."""
    more = {"content-type": "application/json"} if body else {}
    method = "POST" if body else "GET"
    answer = send(gateway.origin, target, method=method, headers={**CREDENTIAL, **more, **headers}, body=body)
    assert not list(problems_of_any_answer(answer))
    return answer


def reason_of(answer: Answer) -> str:
    """The reason of a refusal."""
    body: Any = answer.json()
    return str(body["details"][0]["reason"])


@pytest.mark.parametrize(("size", "status"), [(BODY_BYTES_MAX, 409), (BODY_BYTES_MAX + 1, 413)])
def test_size_of_a_body(gateway: Daybook, size: int, status: int) -> None:
    """A body of 1 MiB is read, and here refused for what it says; one byte more is 413."""
    body = json.dumps({"kind": "OTHER"}).encode().ljust(size)
    assert ask(gateway, "/v1/accounts?accountId=example", body=body).status == status


@pytest.mark.parametrize(("size", "status"), [(HEADERS_BYTES_MAX - 512, 200), (HEADERS_BYTES_MAX, 431)])
def test_size_of_headers(gateway: Daybook, size: int, status: int) -> None:
    """Headers of less than 16 KiB are taken; more are 431, with a reason."""
    answer = ask(gateway, headers={"x-filler": "x" * size})
    assert answer.status == status
    if status == 431:
        assert reason_of(answer) == "REQUEST_TOO_LARGE"


@pytest.mark.parametrize(("size", "status"), [(HEADERS_BYTES_MAX - 512, 404), (HEADERS_BYTES_MAX, 431)])
def test_length_of_a_path(gateway: Daybook, size: int, status: int) -> None:
    """A path is one of the headers: it is looked at, at once, until it is longer than they may be together."""
    assert ask(gateway, "/" + "x" * size).status == status


@pytest.mark.parametrize(("size", "status"), [(HEADERS_BYTES_MAX - 512, 400), (HEADERS_BYTES_MAX, 431)])
def test_length_of_a_query(gateway: Daybook, size: int, status: int) -> None:
    """So is a query."""
    assert ask(gateway, f"{ACCOUNT}/transactions?pageToken={'x' * size}").status == status


@pytest.mark.parametrize(("count", "status"), [(HEADERS_MAX, 200), (HEADERS_MAX + 1, 431)])
def test_number_of_headers(gateway: Daybook, count: int, status: int) -> None:
    """A hundred headers are taken, the three among them that each of these requests has; one more is 431."""
    assert ask(gateway, headers={f"x-{number}": "1" for number in range(count - 3)}).status == status


@pytest.mark.parametrize(
    ("depth", "reason"), [(20, "INSUFFICIENT_CREDITS"), (21, "FIELD_INVALID"), (90, "FIELD_INVALID"), (20_000, "")]
)
def test_depth_of_json(gateway: Daybook, depth: int, reason: str) -> None:
    """Metadata may be twenty levels deep, and here is refused for what it costs; what is deeper is for that."""
    metadata = '{"in":' * depth + "1" + "}" * depth
    body = f'{{"kind":"CHARGE","category":"test","amount":"-999999999999","metadata":{metadata}}}'
    answer = ask(gateway, f"{ACCOUNT}/transactions", body=body.encode())
    assert answer.status == 400
    if reason:
        assert reason_of(answer) == reason


LONG_BODIES = {
    "a word": '{"priority":"' + "x" * 1_000_000 + '"}',
    "words of a refusal": '{"priority":"' + ": invalid value " * 60_000 + '"}',
    "more words of it": '{"priority":"' + ": invalid value x for type " * 35_000 + '"}',
    "other words of it": '{"priority":"' + "Could not find field " * 40_000 + '"}',
    "lists in lists": '{"metadata":' + "[" * 500_000 + "]" * 500_000 + "}",
}


@pytest.mark.parametrize("what", LONG_BODIES)
def test_what_is_long_keeps_nobody_waiting(gateway: Daybook, what: str) -> None:
    """A refusal takes time in proportion to what was sent: one of a megabyte is there long before `send` gives up."""
    assert ask(gateway, f"{ACCOUNT}/transactions", body=LONG_BODIES[what].encode()).status == 400


def filters_of(configuration: dict[str, Any]) -> dict[str, Any]:
    """What each filter of a gateway is told, by its name; its listeners share them."""
    listener = configuration["static_resources"]["listeners"][0]
    filters = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
    return {each["name"].removeprefix("envoy.filters.http."): each["typed_config"] for each in filters}


def test_rate_of_the_gateway_is_a_setting() -> None:
    """`daybook up` limits all callers together as its settings say; 0 a second is no limit."""
    settings = Settings(gateway_rate_limit_requests_per_second=7, gateway_rate_limit_burst=9)
    limit = filters_of(configuration_of(settings))["local_ratelimit"]
    assert limit["token_bucket"] == {"max_tokens": 9, "tokens_per_fill": 7, "fill_interval": "1s"}
    assert limit["filter_enforced"] == limit["filter_enabled"] == {"default_value": {"numerator": 100}}
    unlimited = filters_of(configuration_of(Settings(gateway_rate_limit_requests_per_second=0)))["local_ratelimit"]
    assert unlimited["filter_enforced"] == {"default_value": {"numerator": 0}}


def test_rate_of_the_gateway_is_by_default_that_of_its_file() -> None:
    """Envoy by itself, with the project's file, limits as `daybook up` does."""
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    bucket = filters_of(yaml.safe_load((ROOT / "envoy.yaml").read_text()))["local_ratelimit"]["token_bucket"]
    assert bucket == {
        "max_tokens": defaults["gateway_rate_limit_burst"],
        "tokens_per_fill": defaults["gateway_rate_limit_requests_per_second"],
        "fill_interval": "1s",
    }


@pytest.mark.parametrize(("bytes_max", "body"), [(1024, 1024), (2**20, 2**20), (4 * 2**20, 2**20)])
def test_body_is_no_larger_than_a_message(bytes_max: int, body: int) -> None:
    """Where the server takes less than the gateway would, it is the gateway that refuses, in words of HTTP."""
    settings = Settings(message_bytes_max=bytes_max)
    assert filters_of(configuration_of(settings))["buffer"]["max_request_bytes"] == body
