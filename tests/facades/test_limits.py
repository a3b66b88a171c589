"""The limits of the gateway: a request at each limit is served, and one above it is refused.

tests/rpc/test_limits.py tests the limits of gRPC calls, */46-body-too-large.http too large bodies at
vendors' paths, test_errors.py and */4?-*rate-limit.http rate limits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from server.config import Settings
from tests.support.gateways import configuration_of, gateway_before, rate_limit_of
from tests.support.http_client import Answer, problems_of_any_answer, send
from tests.support.processes import ROOT, Daybook
from tests.support.waiting import SECONDS_MAX

CREDENTIAL = {"authorization": "Bearer demo-dreadnode.public"}
ACCOUNT = "/v1/accounts/example"
BODY_BYTES_MAX = 1024 * 1024
HEADERS_BYTES_MAX = 16 * 1024
HEADERS_MAX = 100
NONE: Mapping[str, str] = {}


def ask(gateway: Daybook, target: str = ACCOUNT, *, headers: Mapping[str, str] = NONE, body: bytes = b"") -> Answer:
    """Sends a request; checks the answer against the rules for every REST answer."""
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
def test_body_size_is_bounded(gateway: Daybook, size: int, status: int) -> None:
    """A body of 1 MiB reaches the server, which refuses this one with 409; one byte more gets 413."""
    body = json.dumps({"kind": "OTHER"}).encode().ljust(size)
    assert ask(gateway, "/v1/accounts?accountId=example", body=body).status == status


@pytest.mark.parametrize(("size", "status"), [(HEADERS_BYTES_MAX - 512, 200), (HEADERS_BYTES_MAX, 431)])
def test_size_of_headers_is_bounded(gateway: Daybook, size: int, status: int) -> None:
    """Headers of less than 16 KiB in total are accepted; larger ones get 431 with a reason."""
    answer = ask(gateway, headers={"x-filler": "x" * size})
    assert answer.status == status
    if status == 431:
        assert reason_of(answer) == "REQUEST_TOO_LARGE"


@pytest.mark.parametrize(("size", "status"), [(HEADERS_BYTES_MAX - 512, 404), (HEADERS_BYTES_MAX, 431)])
def test_path_counts_as_a_header(gateway: Daybook, size: int, status: int) -> None:
    """An unknown path gets 404, and 431 if it exceeds the limit for headers."""
    assert ask(gateway, "/" + "x" * size).status == status


@pytest.mark.parametrize(("size", "status"), [(HEADERS_BYTES_MAX - 512, 400), (HEADERS_BYTES_MAX, 431)])
def test_query_counts_as_a_header(gateway: Daybook, size: int, status: int) -> None:
    """A long query gets 431 if it exceeds the limit for headers."""
    assert ask(gateway, f"{ACCOUNT}/transactions?pageToken={'x' * size}").status == status


@pytest.mark.parametrize(("count", "status"), [(HEADERS_MAX, 200), (HEADERS_MAX + 1, 431)])
def test_number_of_headers_is_bounded(gateway: Daybook, count: int, status: int) -> None:
    """A request with 100 headers is accepted; one more gets 431. Each request here has three headers by itself."""
    assert ask(gateway, headers={f"x-{number}": "1" for number in range(count - 3)}).status == status


@pytest.mark.parametrize(
    ("depth", "reason"), [(20, "INSUFFICIENT_CREDITS"), (21, "FIELD_INVALID"), (90, "FIELD_INVALID"), (20_000, "")]
)
def test_depth_of_json_is_bounded(gateway: Daybook, depth: int, reason: str) -> None:
    """Metadata 20 levels deep is valid, so that the charge fails for lack of credits; deeper metadata is refused."""
    metadata = '{"in":' * depth + "1" + "}" * depth
    body = f'{{"kind":"CHARGE","category":"test","amount":"-999999999999","metadata":{metadata}}}'
    answer = ask(gateway, f"{ACCOUNT}/transactions", body=body.encode())
    assert answer.status == 400
    if reason:
        assert reason_of(answer) == reason


LONG_BODIES = {
    "long string": '{"priority":"' + "x" * 1_000_000 + '"}',
    "text of an error": '{"priority":"' + ": invalid value " * 60_000 + '"}',
    "text of a longer error": '{"priority":"' + ": invalid value x for type " * 35_000 + '"}',
    "text of another error": '{"priority":"' + "Could not find field " * 40_000 + '"}',
    "nested lists": '{"metadata":' + "[" * 500_000 + "]" * 500_000 + "}",
}


@pytest.mark.parametrize("name", LONG_BODIES)
def test_long_body_is_refused_in_linear_time(gateway: Daybook, name: str) -> None:
    """Refusing a body takes time in proportion to its size: 1 MB is refused before the timeout of `send`."""
    assert ask(gateway, f"{ACCOUNT}/transactions", body=LONG_BODIES[name].encode()).status == 400


def filters_of(configuration: dict[str, Any]) -> dict[str, Any]:
    """The configuration of each HTTP filter, by its name; all listeners share the filters."""
    listener = configuration["static_resources"]["listeners"][0]
    filters = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
    return {each["name"].removeprefix("envoy.filters.http."): each["typed_config"] for each in filters}


def test_gateway_rate_limit_is_a_setting() -> None:
    """`daybook up` limits the rate of each credential by its settings; 0 per second means no limit."""
    settings = Settings(gateway_rate_limit_requests_per_second=7, gateway_rate_limit_burst=9)
    limit = rate_limit_of(configuration_of(settings))
    bucket = {"max_tokens": 9, "tokens_per_fill": 7, "fill_interval": "1s"}
    assert [limit["token_bucket"], *(each["token_bucket"] for each in limit["descriptors"])] == [bucket, bucket]
    assert limit["filter_enforced"] == limit["filter_enabled"] == {"default_value": {"numerator": 100}}
    unlimited = rate_limit_of(configuration_of(Settings(gateway_rate_limit_requests_per_second=0)))
    assert unlimited["filter_enabled"] == {"default_value": {"numerator": 0}}


def test_gateway_limits_each_credential(gateway: Daybook, tmp_path: Path) -> None:
    """Each credential has its own bucket, in either header and in each protocol; requests without one share another."""

    def two_an_hour(configuration: dict[str, Any]) -> None:
        limit = rate_limit_of(configuration)
        for each in (limit, *limit["descriptors"]):
            each["token_bucket"] = {"max_tokens": 2, "tokens_per_fill": 1, "fill_interval": "3600s"}

    credentials: list[dict[str, str]] = [
        {"authorization": "Bearer one"},
        {"authorization": "Bearer two"},
        {"x-api-key": "one"},
        {},
    ]
    with gateway_before(tmp_path, gateway.ports.server, two_an_hour) as origin:

        def status(headers: dict[str, str]) -> int:
            return send(origin, ACCOUNT, headers=headers).status

        assert [[status(headers) for _ in range(3)] for headers in credentials] == [[401, 401, 429]] * len(credentials)
        # Other credentials don't fill a bucket again.
        for number in range(100):
            assert status({"authorization": f"Bearer {number}"}) == 401
        assert [status(headers) for headers in credentials] == [429] * len(credentials)
        # A second credential doesn't help.
        assert status({"authorization": "Bearer one", "x-api-key": "new"}) == 429
        assert status({"authorization": "Bearer new", "x-api-key": "one"}) == 429
        with grpc.insecure_channel(origin.removeprefix("http://")) as channel:
            call: Any = channel.unary_unary("/daybook.v1.Ledger/GetAccount")
            codes = [
                call.future(b"", metadata=(("authorization", f"Bearer {name}"),), timeout=SECONDS_MAX).code()
                for name in ("two", "three")
            ]
        assert codes == [grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAUTHENTICATED]


def test_default_rate_limit_equals_envoy_yaml() -> None:
    """envoy.yaml has the default rate limit of `daybook up`."""
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    limit = rate_limit_of(yaml.safe_load((ROOT / "envoy.yaml").read_text()))
    assert (
        limit["token_bucket"]
        == limit["descriptors"][0]["token_bucket"]
        == {
            "max_tokens": defaults["gateway_rate_limit_burst"],
            "tokens_per_fill": defaults["gateway_rate_limit_requests_per_second"],
            "fill_interval": "1s",
        }
    )


@pytest.mark.parametrize(("bytes_max", "body"), [(1024, 1024), (2**20, 2**20), (4 * 2**20, 2**20)])
def test_body_limit_is_at_most_the_message_limit(bytes_max: int, body: int) -> None:
    """If the server's message limit is below 1 MiB, the gateway refuses larger bodies itself."""
    settings = Settings(message_bytes_max=bytes_max)
    assert filters_of(configuration_of(settings))["buffer"]["max_request_bytes"] == body
