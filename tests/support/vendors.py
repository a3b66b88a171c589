"""Each vendor's API: its path, its parameters, and its errors."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from google.api.annotations_pb2 import http

from server.demo import spacebring
from server.vendors import all_vendors
from tests.support.golden import Matcher
from tests.support.http_client import Answer, Json, problems_of_any_answer, read_json, send
from tests.support.methods import facade_requests
from tests.support.processes import Daybook

VENDORS = {each.service.split(".")[2]: each for each in all_vendors()}


def is_error(vendor: str, status: int, body: Json) -> bool:
    """Whether a body is the vendor's error for a status, with any message. It may have further members."""
    refusal = VENDORS[vendor].refuse(status, "<text>")
    expected = read_json(json.dumps(refusal.body))
    if refusal.status != status or not isinstance(body, dict) or not isinstance(expected, dict):
        return False
    return not Matcher().differences(expected, {name: value for name, value in body.items() if name in expected})


@dataclass(frozen=True)
class Api:
    """One documented path."""

    path: str
    key: str
    parameters: tuple[str, ...]
    vendor: str
    good: str = ""
    """A query string that gets status 200."""


APIS = {
    "teable": Api(
        "/api/space/spcExampleStudio/billing/credit-history",
        "demo-teable",
        ("month", "cursor", "take", "sourceType", "orderBy", "order"),
        "teable",
        "month=2024-10",
    ),
    "teable-without-api": Api(
        "/space/spcExampleStudio/billing/credit-history",
        "demo-teable",
        ("month", "cursor", "take", "sourceType", "orderBy", "order"),
        "teable",
        "month=2024-10",
    ),
    "nebulablock": Api("/users/credits/history", "demo-nebulablock", ("limit", "offset"), "nebulablock"),
    "nebulablock-api": Api("/api/v1/users/credits/history", "demo-nebulablock", ("limit", "offset"), "nebulablock"),
    "spacebring": Api(
        "/transactions/credits/v1",
        "demo-spacebring",
        (
            "limit",
            "nextPageToken",
            "createDate[gte]",
            "createDate%5Blte%5D",
            "createDate",
            "locationRef",
            "membershipRef",
            "companyRef",
        ),
        "spacebring",
    ),
    "dreadnode": Api(
        "/api/v1/org/example/credits/transactions", "demo-dreadnode", ("limit", "transaction_type"), "dreadnode"
    ),
    "paged": Api("/api/billing/accounts/example/transactions", "demo-dreadnode", ("page", "page_size"), "paged"),
}


def ask(gateway: Daybook, api: Api, target: str) -> Answer:
    """Sends a GET with a valid credential."""
    credential = {"authorization": f"Bearer {api.key}.public", "spacebring-network-id": spacebring.NETWORK}
    return send(gateway.origin, target, headers=credential)


def require_sound(api: Api, target: str, answer: Answer) -> None:
    """Fails on a status 5xx, and on an error without the vendor's envelope."""
    assert answer.status == 200 or 400 <= answer.status < 500, f"{target}: {answer.status} {answer.body!r}"
    assert not list(problems_of_any_answer(answer)), target
    body = answer.json()
    assert answer.status == 200 or is_error(api.vendor, answer.status, body), (
        f"{target}: {answer.status} {answer.body!r}"
    )


def without_token(body: Json) -> Json:
    """Returns a page without its token, which differs each time, and without links, which repeat the query."""
    if isinstance(body, dict):
        return {
            key: value for key, value in body.items() if key not in {"nextCursor", "nextPageToken", "next", "previous"}
        }
    return body


PATHS = {
    method.containing_service.full_name.split(".")[2]: re.sub(r"{[^}]+}", "x", method.GetOptions().Extensions[http].get)
    for method, _ in reversed(list(facade_requests("x")))
}
"""The path of each vendor's first method, about an account `x`."""
