"""Each vendor's API: its path, its parameters, and the shape of its errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

from server.demo import spacebring
from tests.support.http_client import Answer, Json, problems_of_any_answer, send
from tests.support.processes import Daybook

TEABLE_CODES = {
    400: "validation_error",
    401: "unauthorized",
    403: "restricted_resource",
    404: "not_found",
    429: "too_many_requests",
    500: "internal_server_error",
    503: "database_connection_unavailable",
    504: "gateway_timeout",
}
SPACEBRING_TYPES = {
    400: "invalidParams",
    401: "unauthorized",
    403: "forbidden",
    404: "notFound",
    429: "tooManyRequests",
    500: "internalError",
    503: "internalError",
    504: "internalError",
}
DREADNODE_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    422: "validation_error",
    429: "rate_limit_error",
    500: "app_error",
    502: "bad_gateway_error",
    504: "gateway_timeout_error",
}


def is_teable(status: int, body: Json) -> bool:
    """Whether it is `{message, status, code}`."""
    return (
        isinstance(body, dict)
        and body.keys() == {"message", "status", "code"}
        and isinstance(body["message"], str)
        and body["status"] == Decimal(status)
        and body["code"] == TEABLE_CODES.get(status)
    )


def is_nebulablock(_status: int, body: Json) -> bool:
    """Whether it is `{data: null, message, status: "failed"}`."""
    return (
        isinstance(body, dict)
        and body.keys() == {"data", "message", "status"}
        and body["data"] is None
        and isinstance(body["message"], str)
        and body["status"] == "failed"
    )


def is_spacebring(status: int, body: Json) -> bool:
    """Whether it is `{message, type}`."""
    return (
        isinstance(body, dict)
        and body.keys() == {"message", "type"}
        and isinstance(body["message"], str)
        and body["type"] == SPACEBRING_TYPES.get(status)
    )


def is_dreadnode(status: int, body: Json) -> bool:
    """Whether it is `{code, detail, type}`, with `errors` where parameters are at fault."""
    if not isinstance(body, dict) or body.keys() - {"errors"} != {"code", "detail", "type"}:
        return False
    errors = body.get("errors", [])
    return (
        body["code"] == Decimal(status)
        and isinstance(body["detail"], str)
        and body["type"] == DREADNODE_TYPES.get(status)
        and isinstance(errors, list)
        and (status == 422) == bool(errors)
        and all(
            isinstance(error, dict)
            and error.keys() == {"loc", "msg", "type"}
            and isinstance(error["loc"], list)
            and all(isinstance(place, str) for place in error["loc"])
            and isinstance(error["msg"], str)
            and isinstance(error["type"], str)
            for error in errors
        )
    )


def is_paged(status: int, body: Json) -> bool:
    """Whether it is `{detail}`, with `field` where a parameter may be at fault."""
    return (
        isinstance(body, dict)
        and body.keys() - ({"field"} if status in (400, 404) else set()) == {"detail"}
        and all(isinstance(value, str) and value for value in body.values())
    )


@dataclass(frozen=True)
class Api:
    """One documented path."""

    path: str
    key: str
    parameters: tuple[str, ...]
    is_envelope: Callable[[int, Json], bool]
    good: str = ""
    """A query string that is answered with 200."""


APIS = {
    "teable": Api(
        "/api/space/spcExampleStudio/billing/credit-history",
        "demo-teable",
        ("month", "cursor", "take", "sourceType", "orderBy", "order"),
        is_teable,
        "month=2024-10",
    ),
    "teable-without-api": Api(
        "/space/spcExampleStudio/billing/credit-history",
        "demo-teable",
        ("month", "cursor", "take", "sourceType", "orderBy", "order"),
        is_teable,
        "month=2024-10",
    ),
    "nebulablock": Api("/users/credits/history", "demo-nebulablock", ("limit", "offset"), is_nebulablock),
    "nebulablock-api": Api("/api/v1/users/credits/history", "demo-nebulablock", ("limit", "offset"), is_nebulablock),
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
        is_spacebring,
    ),
    "dreadnode": Api(
        "/api/v1/org/example/credits/transactions", "demo-dreadnode", ("limit", "transaction_type"), is_dreadnode
    ),
    "paged": Api("/api/billing/accounts/example/transactions", "demo-dreadnode", ("page", "page_size"), is_paged),
}


def ask(gateway: Daybook, api: Api, target: str) -> Answer:
    """Sends a GET with a valid credential."""
    credential = {"authorization": f"Bearer {api.key}.public", "spacebring-network-id": spacebring.NETWORK}
    return send(gateway.origin, target, headers=credential)


def require_sound(api: Api, target: str, answer: Answer) -> None:
    """Fails on a 5xx, and on a refusal without the vendor's envelope."""
    assert answer.status == 200 or 400 <= answer.status < 500, f"{target}: {answer.status} {answer.body!r}"
    assert not list(problems_of_any_answer(answer)), target
    body = answer.json()
    assert answer.status == 200 or api.is_envelope(answer.status, body), f"{target}: {answer.status} {answer.body!r}"


def without_token(body: Json) -> Json:
    """A page without its token, which differs each time, and without links, which repeat the query."""
    if isinstance(body, dict):
        return {
            key: value for key, value in body.items() if key not in {"nextCursor", "nextPageToken", "next", "previous"}
        }
    return body


ENVELOPES: dict[str, Callable[[int, Json], bool]] = {
    "teable": is_teable,
    "nebulablock": is_nebulablock,
    "spacebring": is_spacebring,
    "dreadnode": is_dreadnode,
    "paged": is_paged,
}
# A path of each vendor, and what it makes of what gRPC itself refuses.
PATHS = {
    "teable": ("/api/space/spcExampleStudio/billing/credit-history?month=2024-10", {}),
    "nebulablock": ("/users/credits/history", {}),
    "spacebring": ("/transactions/credits/v1", {}),
    "dreadnode": ("/api/v1/org/example/credits/transactions", {503: 502}),
    "paged": ("/api/billing/accounts/example/transactions", {}),
}
