"""Renders errors as gRPC statuses.

Every error becomes a google.rpc.Status with one ErrorInfo, and a BadRequest where a field
is at fault. A facade's error also has its HTTP status and JSON body in trailing metadata,
from which the gateway makes the REST response.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Mapping
from typing import NoReturn, TypeAlias

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from server.ledger.errors import (
    Aborted,
    AlreadyExists,
    DaybookError,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from server.vendors.vendor import MESSAGES, Refusal

DOMAIN = "daybook"
UNCERTAIN_SECONDS = 0.1
"""A call that is cancelled at most this long before its deadline counts as DEADLINE_EXCEEDED."""

CODES: Mapping[type[DaybookError], grpc.StatusCode] = {
    InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    NotFound: grpc.StatusCode.NOT_FOUND,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    Aborted: grpc.StatusCode.ABORTED,
    ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    Internal: grpc.StatusCode.INTERNAL,
}


RenderError: TypeAlias = Callable[[DaybookError], Refusal]
"""Renders an error in a vendor's format."""


def code_of(error: DaybookError) -> grpc.StatusCode:
    """The gRPC status of an error's class, or of its nearest ancestor in CODES."""
    for ancestor in type(error).__mro__:
        if ancestor in CODES:
            return CODES[ancestor]
    raise AssertionError(f"{type(error).__name__} has no status")


def code_of_cancellation(context: grpc.aio.ServicerContext[object, object]) -> grpc.StatusCode:
    """The status of a cancelled call: DEADLINE_EXCEEDED or CANCELLED, because gRPC cancels a call in either case.

    The client's deadline began before the server's, so it may be over a little earlier.
    """
    remaining = context.time_remaining()
    if remaining is not None and remaining <= UNCERTAIN_SECONDS:
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return grpc.StatusCode.CANCELLED


def http_status_of(error: DaybookError) -> int:
    """The HTTP status of an error, by the mapping of google.rpc.Code."""
    return _HTTP_STATUSES[code_of(error)]


def plain_message(error: DaybookError) -> str:
    """The message of a facade's error. Faults of the server have the same text as the gateway's."""
    if isinstance(error, ResourceExhausted | DeadlineExceeded | Unavailable | Internal):
        return MESSAGES[http_status_of(error)]
    return error.message


_HTTP_STATUSES = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.INTERNAL: 500,
}


def to_status(error: DaybookError) -> Status:
    """The google.rpc.Status of an error."""
    details = [_pack(ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata))]
    if isinstance(error, InvalidArgument):
        violation = BadRequest.FieldViolation(field=error.field, description=error.problem, reason=error.reason)
        details.append(_pack(BadRequest(field_violations=[violation])))
    if error.retry_seconds is not None:
        delay = Duration()
        delay.FromMilliseconds(math.ceil(error.retry_seconds * 1000))
        details.append(_pack(RetryInfo(retry_delay=delay)))
    return Status(code=code_of(error).value[0], message=error.message, details=details)


def _pack(detail: ErrorInfo | BadRequest | RetryInfo) -> Any:
    packed = Any()
    packed.Pack(detail)
    return packed


def trailers_of(error: DaybookError, render: RenderError | None) -> tuple[tuple[str, str | bytes], ...]:
    """The trailing metadata of an error: everything but its code and its message."""
    metadata: list[tuple[str, str | bytes]] = [("grpc-status-details-bin", to_status(error).SerializeToString())]
    if render is not None:
        rest = render(error)
        metadata += [("x-error-status", str(rest.status)), ("x-error-body", json.dumps(rest.body))]
    if error.retry_seconds is not None:
        # RetryInfo for REST, in whole seconds. 0 would mean immediately.
        metadata.append(("retry-after", str(max(1, math.ceil(error.retry_seconds)))))
    return tuple(metadata)


async def refuse(
    context: grpc.aio.ServicerContext[object, object],
    error: DaybookError,
    render: RenderError | None,
    last: bytes | None = None,
) -> NoReturn:
    """Ends the call with the error, after a last message if there is one.

    Raises CancelledError if gRPC has already ended the call, for instance because a message was
    too large. The client then gets gRPC's status.
    """
    try:
        if last is not None:
            await context.write(last)
        await context.abort(code_of(error), error.message, trailers_of(error, render))
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None
