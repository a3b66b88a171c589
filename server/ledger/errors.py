"""Every way in which Daybook refuses a call.

    DaybookError
    ├── InvalidArgument          FieldInvalid, FilterInvalid, PageTokenInvalid, PageTokenMismatch
    ├── Unauthenticated          CredentialMissing, CredentialInvalid
    ├── PermissionDenied         AccountNotPermitted, TenantNotPermitted, ScopeMissing
    ├── NotFound                 AccountNotFound, TransactionNotFound, ApiKeyNotFound
    ├── AlreadyExists            AccountExists, RequestIdReused
    ├── FailedPrecondition       InsufficientCredits, BalanceOutOfRange, TooManyLots, NotRefundable,
    │                            RefundExceedsCharge, ApiKeyInactive, NotStorable
    ├── Aborted                  EtagMismatch
    ├── ResourceExhausted        TooBusy, RateLimited
    ├── DeadlineExceeded         TimedOut
    ├── Unimplemented            MethodUnknown
    ├── Unavailable              ServiceUnavailable, ClockSkewed
    └── Internal                 InternalFailure

The second level is the status, the leaves are the reasons of daybook.v1.ErrorReason; a
test compares the two. Messages are for the caller: they name the field and never contain
SQL, a path, a secret or a message of a driver.
"""

from __future__ import annotations

import math
from typing import ClassVar

_NAME_CHARACTERS = len("accounts/") + 128
"""Length of the longest name of an account."""


class SchemaTooNew(Exception):
    """A later version created the database's schema, and this version can't use it. Raised at the start only."""


class DaybookError(Exception):
    """A refusal, for the caller."""

    reason: ClassVar[str]
    """The name of the value of daybook.v1.ErrorReason."""
    retry_seconds: float | None = None
    """The time after which the caller may retry, in seconds; None for no advice."""

    def __init__(self, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = metadata


class InvalidArgument(DaybookError):
    """One field of the request is wrong, whatever the state of the ledger."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}", field=field)
        self.field = field
        self.problem = problem


class FieldInvalid(InvalidArgument):
    """A field is missing, malformed or out of bounds."""

    reason = "FIELD_INVALID"


class FilterInvalid(InvalidArgument):
    """The filter can't be parsed or is not supported by the list."""

    reason = "FILTER_INVALID"


class PageTokenInvalid(InvalidArgument):
    """The page token was not sealed by this ledger, or was damaged."""

    reason = "PAGE_TOKEN_INVALID"

    def __init__(self, field: str) -> None:
        super().__init__(field, "is not a page token of this service")


class PageTokenMismatch(InvalidArgument):
    """The page token is genuine but belongs to another list."""

    reason = "PAGE_TOKEN_MISMATCH"

    def __init__(self, field: str) -> None:
        super().__init__(field, "belongs to a request with other arguments")


class Unauthenticated(DaybookError):
    """The caller is not authenticated."""


class CredentialMissing(Unauthenticated):
    """The call carries no credential."""

    reason = "CREDENTIAL_MISSING"

    def __init__(self) -> None:
        super().__init__("the call carries no credential")


class CredentialInvalid(Unauthenticated):
    """The credential is malformed, unknown, expired or revoked. The error does not say which."""

    reason = "CREDENTIAL_INVALID"

    def __init__(self) -> None:
        super().__init__("the credential is not valid")


class PermissionDenied(DaybookError):
    """The caller is authenticated and may not do this."""


class AccountNotPermitted(PermissionDenied):
    """The credential is bound to one account, and the call is about another account or the whole tenant."""

    reason = "ACCOUNT_NOT_PERMITTED"

    def __init__(self, account: str) -> None:
        super().__init__(f"the credential is not for {account}", account=account)


class TenantNotPermitted(PermissionDenied):
    """The call names another tenant than its credential belongs to."""

    reason = "TENANT_NOT_PERMITTED"

    def __init__(self) -> None:
        super().__init__("the credential belongs to another tenant")


class ScopeMissing(PermissionDenied):
    """The credential lacks the scope that the call needs."""

    reason = "SCOPE_MISSING"

    def __init__(self, scope: str, request: object = None) -> None:
        super().__init__(f"the credential lacks the scope {scope}", scope=scope)
        self.request = request
        """The refused request, for a facade whose errors quote it."""


class NotFound(DaybookError):
    """The tenant has no such resource."""


class AccountNotFound(NotFound):
    """The tenant has no account of this name."""

    reason = "ACCOUNT_NOT_FOUND"

    def __init__(self, account: str) -> None:
        # No account has a longer name, but vendors' APIs take any text for one. An error must fit into
        # the 8 KiB of headers that gRPC's clients accept, in which it has the name four times.
        if len(account) > _NAME_CHARACTERS:
            account = f"{account[:_NAME_CHARACTERS]}..."
        super().__init__(f"{account} is not found", account=account)


class TransactionNotFound(NotFound):
    """The account has no transaction of this name."""

    reason = "TRANSACTION_NOT_FOUND"

    def __init__(self, transaction: str) -> None:
        super().__init__(f"{transaction} is not found", transaction=transaction)


class ApiKeyNotFound(NotFound):
    """The tenant has no API key of this name."""

    reason = "API_KEY_NOT_FOUND"

    def __init__(self, api_key: str) -> None:
        super().__init__(f"{api_key} is not found", api_key=api_key)


class AlreadyExists(DaybookError):
    """The resource or the request_id exists already."""


class AccountExists(AlreadyExists):
    """The tenant already has an account of this id."""

    reason = "ACCOUNT_EXISTS"

    def __init__(self, account: str) -> None:
        super().__init__(f"{account} already exists", account=account)


class RequestIdReused(AlreadyExists):
    """The request_id was used before, with another request."""

    reason = "REQUEST_ID_REUSED"

    def __init__(self, request_id: str) -> None:
        super().__init__(f"request_id {request_id!r} was used for another request: use another", request_id=request_id)


class FailedPrecondition(DaybookError):
    """The request is valid, but the present state of the ledger forbids it."""


class InsufficientCredits(FailedPrecondition):
    """The balance would go below minus the credit limit."""

    reason = "INSUFFICIENT_CREDITS"

    def __init__(self, account: str, *, available_amount: str, amount: str) -> None:
        super().__init__(
            f"{account} has {available_amount} credits available; the amount is {amount}",
            account=account,
            available_amount=available_amount,
            amount=amount,
        )


class BalanceOutOfRange(FailedPrecondition):
    """The balance would exceed the largest amount."""

    reason = "BALANCE_OUT_OF_RANGE"

    def __init__(self, account: str) -> None:
        super().__init__(f"the balance of {account} would be out of range: send a smaller amount", account=account)


class TooManyLots(FailedPrecondition):
    """One transaction would take from too many lots. The caller can take the credits in smaller amounts."""

    reason = "TOO_MANY_LOTS"

    def __init__(self, account: str, *, lot_limit: int, largest_amount: str) -> None:
        super().__init__(
            f"this amount takes from more than {lot_limit} lots of {account}; "
            f"take it in several transactions: the next one may take {largest_amount} credits",
            account=account,
            lot_limit=str(lot_limit),
            largest_amount=largest_amount,
        )


class NotRefundable(FailedPrecondition):
    """Only a charge that succeeded can be refunded."""

    reason = "NOT_REFUNDABLE"

    def __init__(self, transaction: str) -> None:
        super().__init__(f"{transaction} can't be refunded: it is not a charge that succeeded", transaction=transaction)


class RefundExceedsCharge(FailedPrecondition):
    """The refunds together would exceed the charge."""

    reason = "REFUND_EXCEEDS_CHARGE"

    def __init__(self, transaction: str, *, refundable_amount: str) -> None:
        super().__init__(
            f"the amount exceeds the {refundable_amount} credits of {transaction} that are left to refund",
            transaction=transaction,
            refundable_amount=refundable_amount,
        )


class ApiKeyInactive(FailedPrecondition):
    """The API key is revoked or has expired."""

    reason = "API_KEY_INACTIVE"

    def __init__(self, api_key: str) -> None:
        super().__init__(f"{api_key} is revoked or has expired: create a new key", api_key=api_key)


class NotStorable(FailedPrecondition):
    """The database can't hold a value of the request."""

    reason = "NOT_STORABLE"

    def __init__(self) -> None:
        super().__init__(
            "the database can't hold a value of the request: a text with characters that its encoding lacks, or a"
            " number or a time out of its range"
        )


class Aborted(DaybookError):
    """A concurrent write came first."""


class EtagMismatch(Aborted):
    """The account was written since its etag was read."""

    reason = "ETAG_MISMATCH"

    def __init__(self, account: str) -> None:
        super().__init__(f"{account} was changed since its etag was read: get the account again", account=account)


class ResourceExhausted(DaybookError):
    """A limit on load is reached."""

    retry_seconds: float


class TooBusy(ResourceExhausted):
    """Too many calls are in progress, wait to be posted, or are verifying."""

    reason = "TOO_BUSY"
    retry_seconds = 1.0

    def __init__(self) -> None:
        super().__init__("too many calls are in progress; try again in a second")


class RateLimited(ResourceExhausted):
    """The credential calls more often than it may."""

    reason = "RATE_LIMITED"

    def __init__(self, retry_seconds: float) -> None:
        super().__init__(f"this credential makes too many calls; try again in {math.ceil(retry_seconds)} s")
        self.retry_seconds = retry_seconds


class DeadlineExceeded(DaybookError):
    """The call exceeded its time limit."""


class TimedOut(DeadlineExceeded):
    """The call exceeded the server's time limit. Transactions that it has posted stay."""

    reason = "TIMED_OUT"

    def __init__(self) -> None:
        super().__init__("the call took too long; it may have taken effect: repeat it with the same request_id")


class Unimplemented(DaybookError):
    """The API has no such method."""


class MethodUnknown(Unimplemented):
    """No service has this method."""

    reason = "METHOD_UNKNOWN"

    def __init__(self, method: str, hint: str) -> None:
        super().__init__(f"there is no method {method}; {hint}", method=method)


class Unavailable(DaybookError):
    """The same call may succeed later."""


class ServiceUnavailable(Unavailable):
    """The database or the keys of access tokens are unavailable, or the server is shutting down."""

    reason = "SERVICE_UNAVAILABLE"

    def __init__(self, *, is_partial: bool = False) -> None:
        """`is_partial`: a part of a sharded database is down, so calls to other accounts may succeed."""
        super().__init__("the service is unavailable; try again later")
        self.is_partial = is_partial


class ClockSkewed(Unavailable):
    """The server's clock differs too much from its reference for posting."""

    reason = "CLOCK_SKEWED"
    retry_seconds = 5.0

    def __init__(self, skew_seconds: float) -> None:
        side = "ahead of" if skew_seconds > 0 else "behind"
        super().__init__(
            f"the server's clock is {abs(skew_seconds):.1f} s {side} its reference, so nothing is posted; "
            "try again later, or have an operator set the clock"
        )


class Internal(DaybookError):
    """A fault of the server."""


class InternalFailure(Internal):
    """An unexpected failure. The server's log has the details."""

    reason = "INTERNAL_FAILURE"

    def __init__(self) -> None:
        super().__init__("the server failed; its log has the details")


def of_item(error: DaybookError, index: int, field: str = "requests") -> DaybookError:
    """Adds the index of the refused item of a repeated field to the item's error."""
    error.metadata["index"] = str(index)
    if isinstance(error, InvalidArgument):
        error.field = f"{field}[{index}].{error.field}"
        error.metadata["field"] = error.field
        error.message = f"{error.field}: {error.problem}"
    return error
