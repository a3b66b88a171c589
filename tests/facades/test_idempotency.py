"""The header Idempotency-Key over REST: a repeated mutation is performed once."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

import pytest
from google.api.annotations_pb2 import http

from tests.support.http_client import Answer, send
from tests.support.native_methods import METHODS, REST_METHODS, World
from tests.support.processes import Daybook
from tests.support.rest import KEY, Rest, reason_of

CHARGE = {"kind": "CHARGE", "category": "inference", "amount": "-0.5"}


def post(rest: Rest, target: str, body: Mapping[str, object], *keys: str) -> Answer:
    """Sends a mutation with one Idempotency-Key header per key."""
    headers = {"idempotency-key" if not index else "Idempotency-Key": key for index, key in enumerate(keys)}
    return rest.send("POST", target, body, **headers)


def funded(rest: Rest) -> str:
    """The transactions path of a new account with 10 credits."""
    account = rest.account()
    rest.post(account, "GRANT", "10")
    return f"/v1/accounts/{account}/transactions"


def count(rest: Rest, target: str) -> int:
    """The number of transactions at a path."""
    rows = rest.call("GET", target)["transactions"]
    assert isinstance(rows, list)
    return len(rows)


def test_key_in_the_body_is_refused(rest: Rest) -> None:
    """A requestId within the transaction has no effect, so it is refused and nothing is posted."""
    target = funded(rest)
    for _ in range(2):
        refused = post(rest, target, {**CHARGE, "requestId": "c-1"})
        assert (refused.status, reason_of(refused.json())[2]) == (400, ["transaction.request_id"])
        assert "Idempotency-Key" in refused.body.decode()
    assert count(rest, target) == 1


def test_charge_with_the_header_is_replayed(rest: Rest) -> None:
    """The same key and body charge once and get the same answer; another body is refused."""
    target = funded(rest)
    first = post(rest, target, CHARGE, "c-1")
    assert first.status == 200, first.body
    body = first.json()
    assert isinstance(body, dict)
    assert body["requestId"] == "c-1"
    # The header and the query parameter are equivalent.
    for again in (
        post(rest, target, CHARGE, "c-1"),
        post(rest, f"{target}?requestId=c-1", CHARGE),
        post(rest, f"{target}?requestId=c-1", CHARGE, "c-1"),
        post(rest, f"{target}?request_id=c-1", CHARGE, "c-1"),
    ):
        assert (again.status, again.json()) == (200, body)
    assert count(rest, target) == 2
    other = post(rest, target, {**CHARGE, "amount": "-1"}, "c-1")
    assert (other.status, reason_of(other.json())[0]) == (409, "REQUEST_ID_REUSED")
    assert post(rest, target, CHARGE, "c-2").status == 200
    assert count(rest, target) == 3


def test_header_and_query_that_differ_are_refused(rest: Rest) -> None:
    """A request with two different keys is refused, and the answer names both."""
    target = funded(rest)
    refused = post(rest, f"{target}?requestId=one", CHARGE, "another")
    assert (refused.status, reason_of(refused.json())[2]) == (400, ["request_id"])
    message = str(refused.json())
    assert "'one'" in message
    assert "'another'" in message
    assert "Idempotency-Key" in message
    assert count(rest, target) == 1


@pytest.mark.parametrize(
    "keys", [("",), ("x" * 129,), ("caf\udcc3\udca9",), ("a\udca0",), ("a\tb",), ("same", "same"), ("a", "b")]
)
def test_invalid_header_is_refused(rest: Rest, keys: tuple[str, ...]) -> None:
    """A key that is empty, too long, not printable ASCII, or given twice is refused by the name of the header."""
    target = funded(rest)
    refused = post(rest, target, CHARGE, *keys)
    assert (refused.status, reason_of(refused.json())[2]) == (400, ["Idempotency-Key"])
    assert count(rest, target) == 1


@pytest.mark.parametrize("key", ["x" * 128, "a b", '"quoted"', "~!@#$%^&*()", "a, b"])
def test_header_value_is_used_unchanged(rest: Rest, key: str) -> None:
    """The request_id is the header's value unchanged, including quotes and commas."""
    answer = post(rest, funded(rest), CHARGE, key).json()
    assert isinstance(answer, dict)
    assert answer["requestId"] == key


def repeated(world: World, method: str, headers: Mapping[str, str]) -> tuple[Answer, Answer]:
    """The answers to the same request, sent twice."""
    request = world.base(method)
    return world.rest_answer(method, request, headers), world.rest_answer(method, request, headers)


@pytest.mark.parametrize("method", REST_METHODS)
def test_header_is_honoured_or_refused_by_every_mutation(world: World, method: str) -> None:
    """A mutation is performed once per key or refuses the header; a read ignores it."""
    first, second = repeated(world, method, {"idempotency-key": str(uuid.uuid4())})
    if "request_id" in METHODS[method].input_type.fields_by_name:
        assert (first.status, second.status, second.body) == (200, 200, first.body)
    elif METHODS[method].GetOptions().Extensions[http].WhichOneof("pattern") == "get":
        assert (first.status, second.status) == (200, 200)
    else:
        for answer in (first, second):
            assert (answer.status, reason_of(answer.json())[2]) == (400, ["Idempotency-Key"])


def test_import_refuses_the_header(world: World) -> None:
    """ImportTransactions refuses the header, since each item has its own request_id."""
    request = world.base("ImportTransactions")
    assert world.grpc("ImportTransactions", request, {"idempotency-key": "a"}) == (
        "INVALID_ARGUMENT",
        ("Idempotency-Key",),
    )


@pytest.mark.parametrize("path", ["/api/v1/org/example/credits/transactions?limit=1", "/v1/accounts/example"])
def test_read_ignores_the_header(gateway: Daybook, path: str) -> None:
    """A read with an invalid Idempotency-Key succeeds, natively and through a facade."""
    headers: dict[str, Any] = {"authorization": f"Bearer {KEY}", "idempotency-key": "x" * 200}
    answer = send(gateway.origin, path, headers=headers)
    assert answer.status == 200, answer.body
    assert json.loads(answer.body)
