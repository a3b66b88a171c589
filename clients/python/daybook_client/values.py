"""The values that calls take and return.

Amounts are exact decimals, in credits. Datetimes are aware; those of results are in UTC. A result keeps the message it
was made from as `message`. The fields are those of the contracts in protos/daybook/v1, which describe them in full.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Any, Generic, TypeAlias, TypeVar
from uuid import UUID

from daybook.v1 import account_pb2, admin_service_pb2, api_key_pb2, ledger_service_pb2, transaction_pb2
from google.protobuf.message import Message

from daybook_client.errors import DaybookError

T = TypeVar("T")
Amount: TypeAlias = Decimal | int | str
"""An exact decimal with at most 12 digits before the point and 6 after it. A float is refused."""


class AccountKind(StrEnum):
    """The kind of entity that an account represents."""

    SPACE = "SPACE"
    USER = "USER"
    COMPANY = "COMPANY"
    MEMBERSHIP = "MEMBERSHIP"
    ORGANIZATION = "ORGANIZATION"
    OTHER = "OTHER"
    UNKNOWN = "UNKNOWN"
    """A value that only a newer client knows; in results only."""


class TransactionKind(StrEnum):
    """Why credits moved, in accounting terms."""

    GRANT = "GRANT"
    CHARGE = "CHARGE"
    REFUND = "REFUND"
    TRANSFER_IN = "TRANSFER_IN"
    TRANSFER_OUT = "TRANSFER_OUT"
    EXPIRATION = "EXPIRATION"
    ADJUSTMENT = "ADJUSTMENT"
    UNKNOWN = "UNKNOWN"
    """A value that only a newer client knows; in results only."""


class TransactionState(StrEnum):
    """The outcome of a transaction. FAILED and CANCELED transactions moved no credits."""

    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELED = "CANCELED"
    UNKNOWN = "UNKNOWN"
    """A value that only a newer client knows; in results only."""


class TransactionView(StrEnum):
    """The parts of a transaction to return: all but the allocations, or all."""

    BASIC = "BASIC"
    FULL = "FULL"


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """A person, described by the tenant."""

    id: str
    name: str = ""
    surname: str = ""
    email: str = ""
    phone_number: str = ""
    photo_uri: str = ""
    about: str = ""
    membership: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A postal address."""

    line1: str = ""
    line2: str = ""
    city: str = ""
    state: str = ""
    postal_code: str = ""
    country_code: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Company:
    """A company, described by the tenant."""

    title: str = ""
    legal_name: str = ""
    tax_id: str = ""
    billing_address: str = ""
    business_address: Address | None = None
    notes: str = ""
    location: str = ""
    subscription: str = ""
    expiring_day_passes: int | None = None
    metadata: Mapping[str, Any] | None = None
    create_time: datetime | None = None
    delete_time: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BookingResource:
    """A resource that can be booked."""

    id: str = ""
    title: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Booking:
    """A booking of a resource."""

    id: str
    resource: BookingResource | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderProduct:
    """A product that is for sale."""

    id: str = ""
    title: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderOption:
    """One form in which a product is sold."""

    id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """An order of a product."""

    id: str
    product: OrderProduct | None = None
    option: OrderOption | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """An event that a ticket admits to."""

    id: str = ""
    title: str = ""
    start_time: datetime | None = None
    end_time: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EventTicket:
    """A ticket to an event."""

    id: str
    create_time: datetime | None = None
    event: Event | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """The use of a metered service."""

    model: str = ""
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: Decimal | None = None


@dataclass(frozen=True, slots=True)
class NewTransaction:
    """A transaction to post. Its amount is above 0 for a GRANT and below 0 for a CHARGE."""

    kind: TransactionKind
    """GRANT, CHARGE or ADJUSTMENT."""
    category: str
    """The reason in the tenant's own terms, for example `inference`."""
    amount: Amount
    state: TransactionState = field(default=TransactionState.SUCCEEDED, kw_only=True)
    description: str = field(default="", kw_only=True)
    owner: User | None = field(default=None, kw_only=True)
    creator: User | None = field(default=None, kw_only=True)
    labels: Mapping[str, str] | None = field(default=None, kw_only=True)
    receipt_uri: str = field(default="", kw_only=True)
    metadata: Mapping[str, Any] | None = field(default=None, kw_only=True)
    expire_time: datetime | None = field(default=None, kw_only=True)
    """When the credits expire. At most one of this and `ttl`; without both they never expire."""
    ttl: timedelta | None = field(default=None, kw_only=True)
    priority: int = field(default=0, kw_only=True)
    booking: Booking | None = field(default=None, kw_only=True)
    """The subject. At most one of this, `order`, `event_ticket` and `usage`."""
    order: Order | None = field(default=None, kw_only=True)
    event_ticket: EventTicket | None = field(default=None, kw_only=True)
    usage: Usage | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True)
class Posting:
    """A transaction of a batch, and its account."""

    account: str
    """`accounts/{account}`."""
    transaction: NewTransaction
    request_id: str = field(default="", kw_only=True)
    """For submit_transactions only; by default, the client makes one."""
    record_declined: bool = field(default=False, kw_only=True)
    """Whether a charge that fails for lack of credits is recorded as FAILED instead."""


@dataclass(frozen=True, slots=True)
class PastTransaction:
    """A transaction to import."""

    account: str
    """`accounts/{account}`."""
    transaction: NewTransaction
    create_time: datetime
    request_id: str
    """Required, because a repeated import skips the items whose request_id was imported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """An account, which holds credits."""

    name: str
    number: int
    kind: AccountKind
    display_name: str
    credit_limit: Decimal
    hour_anchor_time: datetime
    create_time: datetime
    update_time: datetime
    etag: str
    user: User | None
    company: Company | None
    message: account_pb2.Account = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """The credits that an account holds at one instant."""

    name: str
    amount: Decimal
    expiring_amount: Decimal
    permanent_amount: Decimal
    available_amount: Decimal
    sequence: int
    read_time: datetime
    message: account_pb2.Balance = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The amount that a transaction moved in one lot; `lot` is empty for debt."""

    lot: str
    amount: Decimal
    expire_time: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Transaction:
    """A movement of credits of one account."""

    name: str
    uid: UUID
    sequence: int
    create_time: datetime
    kind: TransactionKind
    category: str
    state: TransactionState
    amount: Decimal
    expiring_amount: Decimal
    permanent_amount: Decimal
    balance_after: Decimal
    description: str
    owner: User | None
    creator: User | None
    labels: Mapping[str, str]
    receipt_uri: str
    metadata: Mapping[str, Any] | None
    request_id: str
    refund_of: str
    transfer_peer: str
    allocations: tuple[Allocation, ...]
    """Only with the view FULL."""
    expire_time: datetime | None
    priority: int
    booking: Booking | None
    order: Order | None
    event_ticket: EventTicket | None
    usage: Usage | None
    message: transaction_pb2.Transaction = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lot:
    """Credits that were added together."""

    name: str
    sequence: int
    amount: Decimal
    remaining_amount: Decimal
    expire_time: datetime | None
    priority: int
    message: transaction_pb2.Lot = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """The two transactions of a transfer."""

    outgoing: Transaction
    incoming: Transaction
    message: ledger_service_pb2.TransferCreditsResponse = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """The outcome of one posting: the transaction, or the error, which has the request_id to repeat it with."""

    transaction: Transaction | None
    error: DaybookError | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A credential for programs, without its secret."""

    name: str
    display_name: str
    scopes: tuple[str, ...]
    account: str
    create_time: datetime
    expire_time: datetime | None
    revoke_time: datetime | None
    last_use_time: datetime | None
    message: api_key_pb2.ApiKey = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewApiKey:
    """A key with its new secret, which can't be read again."""

    api_key: ApiKey
    key_string: str = field(repr=False)
    """The credential to send with calls."""
    message: admin_service_pb2.CreateApiKeyResponse | admin_service_pb2.RotateApiKeyResponse = field(
        repr=False, compare=False
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """The outcome of an import."""

    imported_count: int
    skipped_count: int
    """The number of items that were already imported."""
    message: admin_service_pb2.ImportTransactionsResponse = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A difference between the stored and the expected data."""

    account: str
    sequence: int
    subject: str
    expected: str
    found: str
    message: admin_service_pb2.VerifyAccountsResponse.Finding = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The progress of a verification; `done` in the last message."""

    account_count: int
    transaction_count: int
    finding_count: int
    done: bool
    message: admin_service_pb2.VerifyAccountsResponse.Progress = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[T]):
    """One page of a list. Only a page without a next_page_token is the last; any page may be empty."""

    items: tuple[T, ...]
    next_page_token: str
    message: Message = field(repr=False, compare=False)
