"""What a story is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from uuid import NAMESPACE_URL, uuid5

from daybook.v1.account_pb2 import Account
from daybook.v1.transaction_pb2 import Transaction

from server.ledger.instants import HOUR, SECOND, Instant

MINUTE: Instant = 60 * SECOND
DAY: Instant = 24 * HOUR


@dataclass(frozen=True, slots=True)
class Event:
    """Something that moved credits."""

    time: Instant
    account_id: str
    transaction: Transaction
    name: str = ""
    """By which a refund finds it."""


@dataclass(frozen=True, slots=True)
class Refund:
    """Credits that were given back."""

    time: Instant
    account_id: str
    charge: str
    """The name of the event."""
    amount: str
    details: Transaction
    """What the refund says of itself."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """Credits that went from one account to another."""

    time: Instant
    source_id: str
    destination_id: str
    amount: str
    details: Transaction
    """What both sides say."""


@dataclass(frozen=True, slots=True)
class Story:
    """A tenant of the demo: its accounts, its keys, and what happened."""

    slug: str
    display_name: str
    uid: str
    start: Instant
    accounts: dict[str, Account]
    keys: dict[str, str | None]
    """The ids of the tenant's keys, each with the account that it is bound to."""
    events: list[Event]
    movements: list[Refund | Transfer] = field(default_factory=list)
    narrow_keys: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Those of the keys that have other scopes than usual, with their scopes."""


def demo_uuid(name: str) -> str:
    """A uuid for a thing of the demo, the same in every run."""
    return str(uuid5(NAMESPACE_URL, f"daybook:demo:{name}"))
