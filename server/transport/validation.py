"""Validates and parses the fields of native requests. All functions raise only FieldInvalid.

CHARACTERS_MAX has the maximum lengths that the comments of the contract state.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

from daybook.v1.account_pb2 import Account, Company, User
from daybook.v1.api_key_pb2 import ApiKey
from daybook.v1.transaction_pb2 import Booking, EventTicket, Order, Transaction, Usage
from google.api.field_behavior_pb2 import IDENTIFIER, OUTPUT_ONLY, field_behavior
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from server.ledger import money
from server.ledger.access import SUFFICIENT
from server.ledger.errors import FieldInvalid
from server.ledger.idempotency import Request
from server.ledger.instants import EARLIEST, HOUR, LATEST, SECOND, Instant
from server.ledger.money import Millionths
from server.ledger.posting import Draft
from server.transport.metadata import check_metadata

PAGE_SIZE_DEFAULT = 50
PAGE_SIZE_MAX = 1000
BATCH_SIZE_MAX = 1000
PRIORITY_MAX = 1000
DISPLAY_NAME_CHARACTERS_MAX = 255
TIME_TO_LIVE_DAYS_MAX = 36_525
GRACE_PERIOD_DAYS_MAX = 30
LABELS_MAX = 32
LABEL_CHARACTERS_MAX = 128
REQUEST_ID_CHARACTERS_MAX = 128

CHARACTERS_MAX: Mapping[str, Mapping[str, int]] = {
    Account.DESCRIPTOR.full_name: {"display_name": DISPLAY_NAME_CHARACTERS_MAX},
    User.DESCRIPTOR.full_name: {
        "id": 128,
        "name": 255,
        "surname": 255,
        "email": 255,
        "phone_number": 64,
        "photo_uri": 2048,
        "about": 2048,
        "membership": 128,
    },
    Company.DESCRIPTOR.full_name: {
        "title": 255,
        "legal_name": 255,
        "tax_id": 64,
        "billing_address": 1024,
        "notes": 4096,
        "location": 128,
        "subscription": 128,
    },
    Company.Address.DESCRIPTOR.full_name: {
        "line1": 255,
        "line2": 255,
        "city": 255,
        "state": 255,
        "postal_code": 32,
        "country_code": 2,
    },
    ApiKey.DESCRIPTOR.full_name: {"display_name": DISPLAY_NAME_CHARACTERS_MAX},
    Transaction.DESCRIPTOR.full_name: {"description": 1024, "receipt_uri": 2048},
    Booking.DESCRIPTOR.full_name: {"id": 128},
    Booking.Resource.DESCRIPTOR.full_name: {"id": 128, "title": 255},
    Order.DESCRIPTOR.full_name: {"id": 128},
    Order.Product.DESCRIPTOR.full_name: {"id": 128, "title": 255},
    Order.Option.DESCRIPTOR.full_name: {"id": 128, "name": 255},
    EventTicket.DESCRIPTOR.full_name: {"id": 128},
    EventTicket.Event.DESCRIPTOR.full_name: {"id": 128, "title": 255},
    Usage.DESCRIPTOR.full_name: {"model": 255},
}

TEXT_CHARACTERS_MAX = max(length for lengths in CHARACTERS_MAX.values() for length in lengths.values())
"""The maximum length of any text. server/transport/parsing.py applies it to every text of every request."""

IDENTIFIED: frozenset[type[Message]] = frozenset((User, Booking, Order, EventTicket))
"""The messages whose id is required."""

CREATABLE_KINDS = (Transaction.GRANT, Transaction.CHARGE, Transaction.ADJUSTMENT)
STATES = frozenset(Transaction.State.values())

DETAILS = frozenset(
    (
        "description",
        "owner",
        "creator",
        "labels",
        "receipt_uri",
        "metadata",
        *(field.name for field in Transaction.DESCRIPTOR.oneofs_by_name["subject"].fields),
    )
)
"""The fields of a transaction that a caller sets and posting stores unchanged."""
_NO_DETAILS = frozenset(field for field in Transaction.DESCRIPTOR.fields if field.name not in DETAILS)

_ADVICE: Mapping[str, str] = {
    "daybook.v1.Account.name": "the id of a new account is account_id",
    "daybook.v1.Transaction.request_id": "send it as the request's request_id, or as the header Idempotency-Key",
    "daybook.v1.Transaction.create_time": "only ImportTransactions takes a time, beside the transaction",
    "daybook.v1.Transaction.refund_of": "RefundTransaction posts refunds",
    "daybook.v1.Transaction.transfer_peer": "TransferCredits posts transfers",
}
"""Advice to a caller that sets a field that only Daybook sets."""
_SET_BY_DAYBOOK: Mapping[FieldDescriptor, str] = {
    field: "; ".join(filter(None, ("is set by Daybook and must be left out", _ADVICE.get(field.full_name))))
    for message in (Account, ApiKey, Transaction)
    for field in message.DESCRIPTOR.fields
    if {OUTPUT_ONLY, IDENTIFIER} & set(field.GetOptions().Extensions[field_behavior])
}
"""The fields that a caller can't set, each with the error message."""

CATEGORY = re.compile(r"[a-z][a-z0-9_]{0,62}", re.ASCII)
COUNTRY_CODE = re.compile(r"[A-Z]{2}", re.ASCII)
_EARLIEST_SECOND = EARLIEST // SECOND
_LATEST_SECOND = LATEST // SECOND
_REQUEST_ID = re.compile(rf"[\x20-\x7e]{{0,{REQUEST_ID_CHARACTERS_MAX}}}", re.ASCII)


_Message = TypeVar("_Message", bound=Message)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Maximum sizes of one call: those of the contract, or lower ones from the settings."""

    page_size_max: int = PAGE_SIZE_MAX
    """Rows of a native list. A larger page_size is reduced to it."""
    batch_size_max: int = BATCH_SIZE_MAX
    """Requests of a batch, and items of an import message. More are refused."""


def read_page_size(page_size: int, page_size_max: int = PAGE_SIZE_MAX) -> int:
    """The maximum number of rows of a native page."""
    if page_size < 0:
        raise FieldInvalid("page_size", "must not be negative")
    return min(page_size or PAGE_SIZE_DEFAULT, page_size_max)


def read_positive_amount(field: str, text: str) -> Millionths:
    """An amount above 0."""
    if not text:
        raise FieldInvalid(field, "is required")
    amount = read_amount(field, text)
    if amount <= 0:
        raise FieldInvalid(field, "must be above 0")
    return amount


def read_request_id(request: Message) -> str:
    """The request_id of a mutation. Each mutation reads it before everything else, and hashes its request last."""
    request_id: str = getattr(request, "request_id")  # noqa: B009  # Message has no such field for mypy
    if not _REQUEST_ID.fullmatch(request_id):
        raise FieldInvalid(
            "request_id", f"must have at most {REQUEST_ID_CHARACTERS_MAX} characters, all of them printable ASCII"
        )
    return request_id


def identity_of(method: str, request: Message, request_id: str) -> Request:
    """What identifies a mutation if it is repeated: its request_id, and a hash of everything else in the request."""
    content = request
    if request_id:
        content = _copy_of(request)
        content.ClearField("request_id")
    serialized = method.encode() + b"\n" + content.SerializeToString(deterministic=True)
    return Request(request_id, hashlib.sha256(serialized).digest())


def _copy_of(message: _Message) -> _Message:
    copied = type(message)()
    copied.CopyFrom(message)
    return copied


def read_amount(field: str, text: str) -> Millionths:
    """An amount of credits."""
    try:
        return money.parse(text)
    except ValueError as error:
        raise FieldInvalid(field, str(error)) from None


def read_transaction(transaction: Transaction) -> tuple[Draft, Transaction]:
    """The draft to be posted, and the details that are stored with it."""
    kind, category, state, priority = (
        transaction.kind,
        transaction.category,
        transaction.state,
        transaction.priority,
    )
    if not kind:
        raise FieldInvalid("transaction.kind", "is required")
    if kind not in CREATABLE_KINDS:
        names = ", ".join(Transaction.Kind.Name(kind) for kind in CREATABLE_KINDS)
        raise FieldInvalid("transaction.kind", f"must be one of {names}")
    if not category:
        raise FieldInvalid("transaction.category", "is required")
    if not CATEGORY.fullmatch(category):
        raise FieldInvalid(
            "transaction.category",
            "must be a lower-case letter, then at most 62 lower-case letters, digits and underscores",
        )
    if state not in STATES:
        raise FieldInvalid("transaction.state", "must be SUCCEEDED, FAILED, CANCELED or left out")
    if not transaction.amount:
        raise FieldInvalid("transaction.amount", "is required")
    amount = read_amount("transaction.amount", transaction.amount)
    is_usage = transaction.WhichOneof("subject") == "usage"
    if is_usage and kind != Transaction.CHARGE:
        raise FieldInvalid("transaction.usage", "is only possible with kind CHARGE")
    expire_time, time_to_live = read_lifetime("transaction", transaction)
    if not -PRIORITY_MAX <= priority <= PRIORITY_MAX:
        raise FieldInvalid("transaction.priority", f"must be between -{PRIORITY_MAX} and {PRIORITY_MAX}")
    if amount <= 0 and priority:
        raise FieldInvalid("transaction.priority", "is only possible with an amount above 0")
    if amount <= 0 and (expire_time is not None or time_to_live is not None):
        raise FieldInvalid(
            f"transaction.{transaction.WhichOneof('lifetime')}", "is only possible with an amount above 0"
        )
    draft = Draft(kind, category, amount, state or Transaction.SUCCEEDED, is_usage, expire_time, time_to_live, priority)
    return draft, read_details("transaction", transaction)


def read_details(path: str, transaction: Transaction) -> Transaction:
    """A validated copy of a transaction with only the fields that posting stores unchanged.

    Refuses a field that only Daybook sets.
    """
    copied = _copy_of(transaction)
    try:
        for field, value in transaction.ListFields():
            if field in _NO_DETAILS:
                _refuse_set_by_daybook("", field)
                copied.ClearField(field.name)  # type: ignore[arg-type]  # a name from the message itself
            elif (check := _check_of(field)) is not None:
                check(value)
    except FieldInvalid as refusal:
        raise _inside(path, refusal) from None
    return copied


def read_lifetime(path: str, owner: Transaction | ApiKey) -> tuple[Instant | None, Instant | None]:
    """The expire_time and the time to live of a new lot or API key; at most one of them is set."""
    match owner.WhichOneof("lifetime"):
        case "expire_time":
            return read_timestamp(f"{path}.expire_time", owner.expire_time), None
        case "ttl":
            time_to_live = _to_microseconds(owner.ttl)
            if time_to_live is None or not SECOND <= time_to_live <= TIME_TO_LIVE_DAYS_MAX * 24 * HOUR:
                raise FieldInvalid(f"{path}.ttl", f"must be between a second and {TIME_TO_LIVE_DAYS_MAX} days")
            return None, time_to_live
    return None, None


def read_grace_period(grace_period: Duration) -> Instant:
    """The time that earlier secrets stay valid after a rotation, in microseconds."""
    period = _to_microseconds(grace_period)
    if period is None or not 0 <= period <= GRACE_PERIOD_DAYS_MAX * 24 * HOUR:
        raise FieldInvalid("grace_period", f"must be between 0 and {GRACE_PERIOD_DAYS_MAX} days")
    return period


def _to_microseconds(duration: Duration) -> Instant | None:
    """The length of a duration; None if it is negative or malformed."""
    if duration.seconds < 0 or not 0 <= duration.nanos < 1_000_000_000:
        return None
    return duration.seconds * SECOND + duration.nanos // 1000


def read_scopes(field: str, scopes: Iterable[str]) -> tuple[str, ...]:
    """The scopes of a new key, without duplicates."""
    requested = set(scopes)
    if not requested:
        raise FieldInvalid(field, "is required")
    if not requested <= SUFFICIENT.keys():
        raise FieldInvalid(field, f"must be one or more of {', '.join(SUFFICIENT)}")
    return tuple(scope for scope in SUFFICIENT if scope in requested)


def check_account(account: Account) -> None:
    """Checks the fields of an account that a caller can set."""
    settable = Account(display_name=account.display_name)
    for name in ("hour_anchor_time", "user", "company"):
        if account.HasField(name):
            getattr(settable, name).CopyFrom(getattr(account, name))
    check_content("account", settable)


def require_unset_by_caller(path: str, message: Account | ApiKey) -> None:
    """Refuses a new resource with a field that only Daybook sets, because it would be ignored."""
    for field, _ in message.ListFields():
        _refuse_set_by_daybook(path, field)


def _refuse_set_by_daybook(path: str, field: FieldDescriptor) -> None:
    if field in _SET_BY_DAYBOOK:
        raise FieldInvalid(_join(path, field.name), _SET_BY_DAYBOOK[field])


def read_profile(account: Account) -> bytes:
    """The profile of an account in its stored form."""
    profile = Account()
    for name in ("user", "company"):
        if account.HasField(name):
            getattr(profile, name).CopyFrom(getattr(account, name))
    return profile.SerializeToString(deterministic=True)


def check_content(path: str, message: Message) -> None:
    """Checks every text, number, time and Struct of a message."""
    try:
        _check_fields(message)
    except FieldInvalid as refusal:
        raise _inside(path, refusal) from None


def _inside(path: str, refusal: FieldInvalid) -> FieldInvalid:
    """The refusal with the path of its message before its field.

    So the path of a field is built only for a refusal.
    """
    return FieldInvalid(_join(path, refusal.field), refusal.problem)


def _check_fields(message: Message) -> None:
    if type(message) in IDENTIFIED and not getattr(message, "id"):  # noqa: B009  # as in read_request_id
        raise FieldInvalid("id", "is required")
    for field, value in message.ListFields():
        check = _check_of(field)
        if check is not None:
            check(value)


@cache
def _check_of(field: FieldDescriptor) -> Callable[[Any], object] | None:
    """The check of a field, or None if every value is valid. Computed once per field."""
    owner = field.containing_type
    assert owner is not None, "only extensions have none, and the contracts have no extensions"
    if field.full_name in _FIELD_CHECKS:
        return partial(_FIELD_CHECKS[field.full_name], field.name)
    if field.is_repeated:
        return None
    if field.message_type is not None:
        check = _MESSAGE_CHECKS.get(field.message_type.full_name)
        return partial(check_content, field.name) if check is None else partial(check, field.name)
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        characters_max = CHARACTERS_MAX.get(owner.full_name, {}).get(field.name)
        return partial(_check_text, field.name, characters_max)
    if field.cpp_type in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64):
        return partial(_check_count, field.name)
    return None


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _check_labels(place: str, labels: Mapping[str, str]) -> None:
    if len(labels) > LABELS_MAX:
        raise FieldInvalid(place, f"must have at most {LABELS_MAX} entries")
    for key, value in labels.items():
        if not CATEGORY.fullmatch(key):
            raise FieldInvalid(
                place,
                "must have keys of a lower-case letter, then at most 62 lower-case letters, digits and underscores",
            )
        if not 1 <= len(value) <= LABEL_CHARACTERS_MAX or "\0" in value:
            raise FieldInvalid(f"{place}.{key}", f"must have 1 to {LABEL_CHARACTERS_MAX} characters, none of them NUL")


def _check_cost(place: str, text: str) -> None:
    if read_amount(place, text) < 0:
        raise FieldInvalid(place, "must not be negative")


def _check_count(place: str, number: int) -> None:
    if number < 0:
        raise FieldInvalid(place, "must not be negative")


def _check_country_code(place: str, text: str) -> None:
    if not COUNTRY_CODE.fullmatch(text):
        raise FieldInvalid(place, "must be two capital letters by ISO 3166-1")


def _check_text(place: str, characters_max: int | None, text: str) -> None:
    if characters_max is not None and len(text) > characters_max:
        raise FieldInvalid(place, f"must have at most {characters_max} characters")
    if "\0" in text:
        raise FieldInvalid(place, "must not contain the character NUL")


def read_timestamp(place: str, timestamp: Timestamp) -> Instant:
    """The instant of a Timestamp, which may be malformed."""
    seconds, nanos = timestamp.seconds, timestamp.nanos
    if not (_EARLIEST_SECOND <= seconds <= _LATEST_SECOND and 0 <= nanos < 1_000_000_000):
        raise FieldInvalid(place, "must be a time between the years 1 and 9999")
    return seconds * SECOND + nanos // 1000


_MESSAGE_CHECKS: Mapping[str, Callable[[str, Any], object]] = {
    Timestamp.DESCRIPTOR.full_name: read_timestamp,
    Struct.DESCRIPTOR.full_name: check_metadata,
}
_FIELD_CHECKS: Mapping[str, Callable[[str, Any], None]] = {
    Transaction.DESCRIPTOR.fields_by_name["labels"].full_name: _check_labels,
    Usage.DESCRIPTOR.fields_by_name["cost_usd"].full_name: _check_cost,
    Company.Address.DESCRIPTOR.fields_by_name["country_code"].full_name: _check_country_code,
}
"""The fields with a check of their own."""
