"""The exceptions of calls: a class for each reason of daybook.v1.ErrorReason, below a class for each gRPC status.

An error without a reason, as of a broken connection, is an instance of its status's class. So is an error with a reason
that this version of the client doesn't know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar

import grpc
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

_DETAILS = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True)
class Violation:
    """A field of the request that is missing, malformed or out of bounds."""

    field: str
    """The path of the field, for example `transaction.amount`."""
    description: str


class DaybookError(Exception):
    """A call that failed. Its text is for people; program against the class or the reason."""

    STATUS: ClassVar[grpc.StatusCode | None] = None
    """The gRPC status of the class; None for this class, which has the statuses without a class of their own."""
    REASON: ClassVar[str] = ""
    """The reason of the class; empty for a class that stands for a status."""

    def __init__(self, message: str, code: grpc.StatusCode, request_id: str = "") -> None:
        super().__init__(message, code, request_id)
        self.message = message
        self.code = code
        self.request_id = request_id
        """The request_id of the call; empty if its method takes none. Repeat an unanswered call with it."""
        self.reason = ""
        """The name of the value of daybook.v1.ErrorReason; empty if the error is not from Daybook."""
        self.metadata: Mapping[str, str] = {}
        """Facts about the error, such as `largest_amount`."""
        self.violations: tuple[Violation, ...] = ()
        """The fields that are at fault."""
        self.retry_delay: timedelta | None = None
        """The time after which the call may be repeated; None if the server gave none."""

    def __str__(self) -> str:
        return self.message


class InvalidArgument(DaybookError):
    """The request is wrong, whatever the state of the ledger."""

    STATUS = grpc.StatusCode.INVALID_ARGUMENT


class FieldInvalid(InvalidArgument):
    """A field of the request is missing, malformed or out of bounds; see `violations`."""

    REASON = "FIELD_INVALID"


class FilterInvalid(InvalidArgument):
    """The filter can't be parsed, or uses a feature that the list does not support."""

    REASON = "FILTER_INVALID"


class PageTokenInvalid(InvalidArgument):
    """The page token is damaged or no longer valid. Start again from the first page."""

    REASON = "PAGE_TOKEN_INVALID"


class PageTokenMismatch(InvalidArgument):
    """The page token belongs to another list. Send the arguments of the first page again."""

    REASON = "PAGE_TOKEN_MISMATCH"


class Unauthenticated(DaybookError):
    """The caller is not authenticated."""

    STATUS = grpc.StatusCode.UNAUTHENTICATED


class CredentialMissing(Unauthenticated):
    """The call carries no credential."""

    REASON = "CREDENTIAL_MISSING"


class CredentialInvalid(Unauthenticated):
    """The credential is malformed, unknown, expired or revoked."""

    REASON = "CREDENTIAL_INVALID"


class PermissionDenied(DaybookError):
    """The credential does not permit the call."""

    STATUS = grpc.StatusCode.PERMISSION_DENIED


class AccountNotPermitted(PermissionDenied):
    """The credential is bound to another account; metadata `account`."""

    REASON = "ACCOUNT_NOT_PERMITTED"


class TenantNotPermitted(PermissionDenied):
    """The credential belongs to another tenant."""

    REASON = "TENANT_NOT_PERMITTED"


class ScopeMissing(PermissionDenied):
    """The credential lacks the scope in metadata `scope`."""

    REASON = "SCOPE_MISSING"


class NotFound(DaybookError):
    """The tenant has no such resource."""

    STATUS = grpc.StatusCode.NOT_FOUND


class AccountNotFound(NotFound):
    """The tenant has no account with this name; metadata `account`."""

    REASON = "ACCOUNT_NOT_FOUND"


class TransactionNotFound(NotFound):
    """The account has no transaction with this name; metadata `transaction`."""

    REASON = "TRANSACTION_NOT_FOUND"


class ApiKeyNotFound(NotFound):
    """The tenant has no API key with this name; metadata `api_key`."""

    REASON = "API_KEY_NOT_FOUND"


class MethodNotFound(NotFound):
    """No method of the REST API has this path."""

    REASON = "METHOD_NOT_FOUND"


class AlreadyExists(DaybookError):
    """The resource or the request_id exists already."""

    STATUS = grpc.StatusCode.ALREADY_EXISTS


class AccountExists(AlreadyExists):
    """The tenant already has an account with this id; metadata `account`."""

    REASON = "ACCOUNT_EXISTS"


class RequestIdReused(AlreadyExists):
    """The request_id was already used with a different request."""

    REASON = "REQUEST_ID_REUSED"


class FailedPrecondition(DaybookError):
    """The state of the ledger does not permit the call."""

    STATUS = grpc.StatusCode.FAILED_PRECONDITION


class InsufficientCredits(FailedPrecondition):
    """The balance would go below minus the credit limit; metadata `available_amount`."""

    REASON = "INSUFFICIENT_CREDITS"


class BalanceOutOfRange(FailedPrecondition):
    """The balance, or the usage of an hour, would exceed 999999999999.999999 credits."""

    REASON = "BALANCE_OUT_OF_RANGE"


class TooManyLots(FailedPrecondition):
    """The transaction would take credits from too many lots; the next one can take metadata `largest_amount`."""

    REASON = "TOO_MANY_LOTS"


class NotRefundable(FailedPrecondition):
    """The transaction is not a charge that succeeded."""

    REASON = "NOT_REFUNDABLE"


class RefundExceedsCharge(FailedPrecondition):
    """The refunds would exceed the charge; metadata `refundable_amount` is the rest."""

    REASON = "REFUND_EXCEEDS_CHARGE"


class ApiKeyInactive(FailedPrecondition):
    """The API key is revoked or has expired."""

    REASON = "API_KEY_INACTIVE"


class NotStorable(FailedPrecondition):
    """The database can't store a value of the request."""

    REASON = "NOT_STORABLE"


class Aborted(DaybookError):
    """Another call was first."""

    STATUS = grpc.StatusCode.ABORTED


class EtagMismatch(Aborted):
    """Another call has changed the account since the etag was read. Read it again, then repeat the update."""

    REASON = "ETAG_MISMATCH"


class ResourceExhausted(DaybookError):
    """A limit was exceeded. The call had no effect."""

    STATUS = grpc.StatusCode.RESOURCE_EXHAUSTED


class TooBusy(ResourceExhausted):
    """Too many calls are in progress."""

    REASON = "TOO_BUSY"


class RateLimited(ResourceExhausted):
    """The credential exceeded its rate limit."""

    REASON = "RATE_LIMITED"


class RequestTooLarge(ResourceExhausted):
    """The request is too large for the gateway."""

    REASON = "REQUEST_TOO_LARGE"


class DeadlineExceeded(DaybookError):
    """The deadline passed. The call may have taken effect: repeat it with the same request_id."""

    STATUS = grpc.StatusCode.DEADLINE_EXCEEDED


class TimedOut(DeadlineExceeded):
    """The call exceeded the time limit of the server or the gateway."""

    REASON = "TIMED_OUT"


class Unimplemented(DaybookError):
    """The server lacks the method."""

    STATUS = grpc.StatusCode.UNIMPLEMENTED


class MethodUnknown(Unimplemented):
    """The API of this server has no method with this name; the server may be older than the client."""

    REASON = "METHOD_UNKNOWN"


class MethodNotAllowed(Unimplemented):
    """The path of the REST API does not support the HTTP method."""

    REASON = "METHOD_NOT_ALLOWED"


class Unavailable(DaybookError):
    """The server can't be reached or can't answer. The call may have taken effect: repeat it with its request_id."""

    STATUS = grpc.StatusCode.UNAVAILABLE


class ServiceUnavailable(Unavailable):
    """The server can't reach its database, or is shutting down."""

    REASON = "SERVICE_UNAVAILABLE"


class ClockSkewed(Unavailable):
    """The server's clock is wrong, so the server refuses to post. The call had no effect."""

    REASON = "CLOCK_SKEWED"


class Internal(DaybookError):
    """An internal error, not caused by the caller."""

    STATUS = grpc.StatusCode.INTERNAL


class InternalFailure(Internal):
    """A defect of the server, whose log has the details."""

    REASON = "INTERNAL_FAILURE"


class Cancelled(DaybookError):
    """The client or the server cancelled the call, for example because it closed the connection."""

    STATUS = grpc.StatusCode.CANCELLED


def _subclasses(of: type[DaybookError]) -> Iterator[type[DaybookError]]:
    for each in of.__subclasses__():
        yield each
        yield from _subclasses(each)


_CODES = {code.value[0]: code for code in grpc.StatusCode}
BY_REASON = {each.REASON: each for each in _subclasses(DaybookError) if each.REASON}
"""The class of each reason."""
BY_STATUS = {each.STATUS: each for each in DaybookError.__subclasses__()}
"""The class of each status."""


def from_status(status: Status, request_id: str = "") -> DaybookError:
    """Returns the exception of a google.rpc.Status."""
    info, bad, retry = ErrorInfo(), BadRequest(), RetryInfo()
    for detail in status.details:
        for each in (info, bad, retry):
            detail.Unpack(each)
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    error = (BY_REASON.get(info.reason) or BY_STATUS.get(code, DaybookError))(status.message, code, request_id)
    error.reason = info.reason
    error.metadata = dict(info.metadata)
    error.violations = tuple(Violation(each.field, each.description) for each in bad.field_violations)
    if retry.HasField("retry_delay"):
        error.retry_delay = retry.retry_delay.ToTimedelta()
    return error


def from_rpc_error(error: grpc.RpcError, request_id: str = "") -> DaybookError:
    """Returns the exception of a failed gRPC call."""
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError), "an error of a call has its status"
    for name, value in error.trailing_metadata() or ():
        if name == _DETAILS and isinstance(value, bytes):
            return from_status(Status.FromString(value), request_id)
    return from_status(Status(code=error.code().value[0], message=error.details() or ""), request_id)
