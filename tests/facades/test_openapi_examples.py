"""The examples of the OpenAPI documents: a gateway answers each request as the document shows."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator

import pytest

from docs.openapi.exchanges import Exchange, read_exchanges
from tests.support.demo import create_key, create_tenant
from tests.support.http_client import send
from tests.support.openapi import NATIVE, VENDORS
from tests.support.processes import Daybook

VARYING = re.compile(
    r"(?P<uuid>[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})"
    r"|(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z)"
    r"|(?P<api_key>apiKeys/[0-9a-f]{20})"
)
"""Parts of texts that are new in each run."""
VARYING_FIELDS = {"etag", "keyString", "nextCursor", "nextPageToken", "number"}


def differences(place: str, expected: object, actual: object, known: dict[str, str]) -> Iterator[str]:
    """Yields the differences of two bodies, and adds each value that is new in this run to `known`."""
    match expected, actual:
        case dict(), dict():
            if expected.keys() != actual.keys():
                yield f"{place}: expected the fields {list(expected)}, got {list(actual)}"
            for key in expected.keys() & actual.keys():
                if key not in VARYING_FIELDS or not expected[key] or not actual[key]:
                    yield from differences(f"{place}.{key}", expected[key], actual[key], known)
        case list(), list():
            if len(expected) != len(actual):
                yield f"{place}: expected {len(expected)} elements, got {len(actual)}"
            for index, (one, other) in enumerate(zip(expected, actual, strict=False)):
                yield from differences(f"{place}[{index}]", one, other, known)
        case str(), str() if stable(expected) == stable(actual):
            pairs = zip(VARYING.finditer(expected), VARYING.finditer(actual), strict=True)
            for one, other in pairs:
                # The same value in another place must be the same value of this run.
                if one["time"] is None and known.setdefault(one[0], other[0]) != other[0]:
                    yield f"{place}: expected {known[one[0]]} as earlier, got {other[0]}"
        case _:
            if type(expected) is not type(actual) or expected != actual:
                yield f"{place}: expected {expected!r}, got {actual!r}"


def stable(text: str) -> str:
    """A text with a placeholder for each part that is new in each run."""
    return VARYING.sub(lambda match: f"<{match.lastgroup}>", text)


def replay(origin: str, exchange: Exchange, keys: dict[str, str], known: dict[str, str]) -> list[str]:
    """Sends the request of an exchange. Returns the differences of the response."""
    target = exchange.target
    for recorded, current in known.items():
        target = target.replace(recorded.rpartition("/")[2], current.rpartition("/")[2])
    headers = dict(exchange.headers)
    if "authorization" in headers:
        scheme, name = headers["authorization"].split(" ")
        headers["authorization"] = f"{scheme} {keys.get(name, name)}"
    body = b"" if exchange.body is None else json.dumps(exchange.body).encode()
    more = {"content-type": "application/json"} if body else {}
    answer = send(origin, target, method=exchange.method, headers={**headers, **more}, body=body)
    if (answer.status, answer.header("content-type")) != (exchange.status, exchange.content_type):
        return [f"{exchange.method} {target}: got {answer.status} {answer.header('content-type')}, {answer.body!r}"]
    text = answer.body.decode()
    actual = (
        json.loads(text) if exchange.content_type == "application/json" else text.replace("\r\n", "\n").rstrip("\n")
    )
    return list(differences(f"{exchange.method} {target}", exchange.answer, actual, known))


def test_native_examples_are_true(gateway: Daybook) -> None:
    """Each example of the native API, in order, in a tenant of its own."""
    slug = f"examples-{uuid.uuid4()}"
    create_tenant(gateway, slug)
    keys = {
        "KEY": create_key(gateway, slug, "--scope", "admin"),
        "READONLY_KEY": create_key(gateway, slug, "--scope", "transactions.readonly"),
    }
    known: dict[str, str] = {}
    problems = [each for exchange in read_exchanges(NATIVE) for each in replay(gateway.origin, exchange, keys, known)]
    assert not problems


@pytest.mark.parametrize("vendor", VENDORS)
def test_examples_of_facade_are_true(gateway: Daybook, vendor: str) -> None:
    """Each example of a facade, on the demo data."""
    known: dict[str, str] = {}
    problems = [each for exchange in read_exchanges(vendor) for each in replay(gateway.origin, exchange, {}, known)]
    assert not problems


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        ({"amount": "1"}, {"amount": "2"}),
        ({"amount": "1"}, {}),
        ([1], [1, 2]),
        ([1, 2], [1]),
        (1, "1"),
        (1, True),
        ({"number": "7"}, {"number": ""}),
        ("0192e2e0-3f00-705b-a856-6f43b10310ce", "x"),
        (["0192e2e0-3f00-705b-a856-6f43b10310ce"] * 2, [str(uuid.UUID(int=1)), str(uuid.UUID(int=2))]),
        ("2024-10-10T06:54:58Z", "yesterday"),
    ],
)
def test_comparison_finds_difference(expected: object, actual: object) -> None:
    """A change of a value, a type, a field or a length is found."""
    assert list(differences("$", expected, actual, {}))


def test_comparison_ignores_what_is_new_in_each_run() -> None:
    """Uids, times and numbers may differ."""
    expected = {"name": "accounts/a/transactions/0192e2e0-3f00-705b-a856-6f43b10310ce", "number": "1"}
    actual = {"name": f"accounts/a/transactions/{uuid.UUID(int=1)}", "number": "2"}
    assert not list(differences("$", expected, actual, {}))
    assert not list(differences("$", "2024-10-10T06:54:58Z", "2026-01-01T00:00:00.5Z", {}))
