"""The error responses of an API: their statuses, headers and bodies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from daybook.v1.error_reason_pb2 import ErrorReason
from google.protobuf.json_format import MessageToDict
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from docs.generate import error_reasons
from docs.openapi.schemas import Schema, Schemas, Use
from server.facades import Facade
from server.ledger import errors
from server.ledger.errors import DaybookError
from server.transport.errors import http_status_of, to_status
from server.vendors.vendor import Refusal

REQUEST_ID = {"x-request-id": {"description": "The value of the request, or a new one.", "schema": {"type": "string"}}}
"""The header of every response."""

_RETRY_AFTER = {
    "retry-after": {
        "description": "The time after which to try again, in seconds.",
        "schema": {"type": "integer", "minimum": 1},
    }
}
_MESSAGE = "The message of the error."


def native_errors(schemas: Schemas) -> Mapping[int, Schema]:
    """Returns the responses with a google.rpc.Status, by HTTP status. A description lists the possible reasons."""
    schemas.enum(ErrorReason.DESCRIPTOR)
    for detail in (ErrorInfo, BadRequest, RetryInfo):
        schemas.message(detail.DESCRIPTOR, Use.ANSWER)
        component = schemas.components[detail.DESCRIPTOR.name]
        type_url = {"const": f"type.googleapis.com/{detail.DESCRIPTOR.full_name}"}
        component["properties"] = {"@type": type_url, **component["properties"]}
        component["required"] = ["@type", *component.get("required", [])]
    body = schemas.message(Status.DESCRIPTOR, Use.ANSWER)
    meanings: dict[int, list[str]] = defaultdict(list)
    for reason in error_reasons():
        for status in reason.http_statuses:
            meanings[status].append(f"- `{reason.name}`: {reason.meaning}")
    responses = {
        status: _response(status, body, "\n".join(lines), retry_after=status in {429, 503})
        for status, lines in sorted(meanings.items())
    }
    for error in _errors_of_server():
        content = responses[http_status_of(error)]["content"]["application/json"]
        value = MessageToDict(to_status(error), always_print_fields_with_no_presence=True)
        content.setdefault("examples", {})[error.reason] = {"value": value}
    return responses


def facade_errors(facade: Facade, parameters: Iterable[str]) -> Mapping[int, Schema]:
    """Returns the responses with the vendor's errors, by HTTP status. `parameters` are those of the query."""
    vendor = facade.VENDOR
    refusals: dict[int, list[Refusal]] = defaultdict(list)
    by_gateway: dict[int, Refusal] = {}
    for refusal in vendor.gateway_refusals().values():
        by_gateway.setdefault(refusal.status, refusal)
    for refusal in (*by_gateway.values(), *map(facade.render_error, _errors_of_reading(parameters))):
        refusals[refusal.status].append(refusal)
    responses = {}
    for status, found in sorted(refusals.items()):
        form = vendor.refuse(status, _MESSAGE).body
        response = _response(
            status,
            _schema(form, found),
            HTTPStatus(status).phrase,
            challenge=vendor.challenge,
            retry_after=status == 429,
        )
        # Envoy replaces the operators of such a text.
        if status in by_gateway and "%" not in str(by_gateway[status].body):
            response["content"]["application/json"]["examples"] = {"gateway": {"value": by_gateway[status].body}}
        responses[status] = response
    return responses


def _errors_of_server() -> Sequence[DaybookError]:
    """The errors of the native API that no request causes by itself."""
    return [
        errors.TooBusy(),
        errors.RateLimited(1),
        errors.InternalFailure(),
        errors.ServiceUnavailable(),
        errors.ClockSkewed(7),
        errors.TimedOut(),
    ]


def _errors_of_reading(parameters: Iterable[str]) -> Sequence[DaybookError]:
    """The errors that the methods of facades have."""
    return [
        *(errors.FieldInvalid(name, _MESSAGE) for name in parameters),
        errors.CredentialMissing(),
        errors.AccountNotPermitted("accounts/acme"),
        errors.AccountNotFound("accounts/acme"),
        errors.RateLimited(1),
        errors.ServiceUnavailable(),
        errors.TimedOut(),
        errors.InternalFailure(),
    ]


def _response(
    status: int, body: Schema, description: str, *, challenge: str = "Bearer", retry_after: bool
) -> dict[str, Any]:
    headers: dict[str, Any] = dict(REQUEST_ID)
    if status == 401:
        headers["www-authenticate"] = {"description": "How to authenticate.", "schema": {"const": challenge}}
    if retry_after:
        headers.update(_RETRY_AFTER)
    return {"description": description, "headers": headers, "content": {"application/json": {"schema": body}}}


def _schema(form: Mapping[str, object], refusals: Sequence[Refusal]) -> Schema:
    """The schema of the bodies with a status. Members beyond the vendor's form are required if all bodies have them."""
    more = {name: value for refusal in refusals for name, value in refusal.body.items() if name not in form}
    return {
        "type": "object",
        "required": [*form, *(name for name in more if all(name in refusal.body for refusal in refusals))],
        "properties": {
            **{name: _TEXT if value == _MESSAGE else _constant(value) for name, value in form.items()},
            **{name: _like(value) for name, value in more.items()},
        },
    }


_TEXT: Schema = {"type": "string", "minLength": 1}


def _constant(value: object) -> Schema:
    return {"type": "null"} if value is None else {"const": value}


def _like(value: Any) -> Schema:
    """The schema of values that are built like this one."""
    match value:
        case dict():
            return {
                "type": "object",
                "required": list(value),
                "properties": {name: _like(each) for name, each in value.items()},
            }
        case list():
            return {"type": "array", "minItems": 1, "items": _like(value[0])}
    return _TEXT
