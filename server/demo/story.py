"""The types of demo data. A story is the invented history of one tenant."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from daybook.v1.account_pb2 import Account
from daybook.v1.transaction_pb2 import Transaction

from server.ledger.instants import HOUR, SECOND, Instant

MINUTE: Instant = 60 * SECOND
DAY: Instant = 24 * HOUR


@dataclass(frozen=True, slots=True)
class Event:
    """A transaction that is posted."""

    time: Instant
    account_id: str
    transaction: Transaction
    name: str = ""
    """The name by which a refund refers to the event."""


@dataclass(frozen=True, slots=True)
class Refund:
    """A refund of a charge."""

    time: Instant
    account_id: str
    charge: str
    """The name of the charge's event."""
    amount: str
    details: Transaction
    """The fields of the refund that posting stores unchanged."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """A transfer from one account to another."""

    time: Instant
    source_id: str
    destination_id: str
    amount: str
    details: Transaction
    """The fields of both transactions that posting stores unchanged."""


@dataclass(frozen=True, slots=True)
class Story:
    """A tenant of the demo: its accounts, its keys and its history."""

    slug: str
    display_name: str
    uid: str
    start: Instant
    accounts: dict[str, Account]
    keys: dict[str, str | None]
    """The account that each key is bound to, by the id of the key; None for a key to all accounts."""
    events: list[Event]
    refunds_and_transfers: list[Refund | Transfer] = field(default_factory=list)
    narrow_keys: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """The scopes of each key that doesn't have the default scopes, by the id of the key."""


def grant(category: str, amount: str, **fields: Any) -> Transaction:
    """A grant of an amount above 0."""
    return Transaction(kind=Transaction.GRANT, category=category, amount=amount, **fields)


def charge(category: str, amount: str, **fields: Any) -> Transaction:
    """A charge of an amount below 0."""
    return Transaction(kind=Transaction.CHARGE, category=category, amount=amount, **fields)


def demo_uuid(name: str) -> str:
    """A UUID for a named object of the demo, the same in every run."""
    return str(uuid5(NAMESPACE_URL, f"daybook:demo:{name}"))
