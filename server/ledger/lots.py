"""Lots: amounts of credits with common terms, and the order in which they are spent.

Every grant opens a lot, permanent or expiring. A balance is the sum of an account's open
lots, less its debt on the credit line. Debt is recorded as pseudo-lot 0, so that every
transaction is the sum of its allocations.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

from server.ledger.instants import Instant
from server.ledger.money import Millionths

CREDIT_LINE = 0
"""The lot number of an account's debt. This pseudo-lot goes below 0, down to the credit limit."""

NEVER: Instant = 2**63 - 1
"""Later than every expire_time."""

SpendingOrder: TypeAlias = tuple[int, Instant, int] | tuple[()]
"""A place in spending order: priority, expire_time (NEVER for permanent), number. The empty tuple precedes all."""


class Terms(NamedTuple):
    """The expiry of credits, and their priority in spending."""

    expire_time: Instant | None = None
    """Credits are expired from this instant on; None for permanent credits."""
    priority: int = 0
    """Lots of a lower number are spent first."""

    def have_expired(self, now: Instant) -> bool:
        """Whether the credits have expired."""
        expire_time = self.expire_time
        return expire_time is not None and expire_time <= now


PERMANENT = Terms()


class Lot(NamedTuple):
    """Credits of one account that were granted together."""

    number: int
    """1, 2, 3 and so on in its account, in the order of opening."""
    opened_by: int
    """The sequence of the transaction that opened it."""
    terms: Terms
    amount: Millionths
    """The amount at its opening."""
    remaining: Millionths
    """The amount not yet spent, 0 or more. A refund can raise it again, up to `amount`."""

    def with_remaining(self, remaining: Millionths) -> Lot:
        """The lot with this remaining amount. Hot path: `_replace` is slow."""
        return Lot(self.number, self.opened_by, self.terms, self.amount, remaining)

    @property
    def spending_order(self) -> SpendingOrder:
        """Priority, then the earliest to expire (permanent last), then the oldest."""
        expire_time = self.terms.expire_time
        return self.terms.priority, NEVER if expire_time is None else expire_time, self.number


class Allocation(NamedTuple):
    """The change of one lot by one transaction: above 0 into it, below 0 out of it."""

    lot_number: int
    """CREDIT_LINE for debt that was drawn (below 0) or paid back (above 0)."""
    amount: Millionths
    terms: Terms
    """The terms of the lot, so that a transaction can be read without it."""


def sort_lots(lots: Iterable[Lot]) -> tuple[Lot, ...]:
    """Open lots in the order in which they are spent."""
    return tuple(sorted((lot for lot in lots if lot.remaining), key=lambda lot: lot.spending_order))


def insert(lots: list[Lot], lot: Lot) -> None:
    """Inserts a lot that is not empty into open lots, in spending order."""
    insort(lots, lot, key=lambda each: each.spending_order)


def take_out(lots: list[Lot], number: int) -> Lot | None:
    """Takes the lot of this number out of open lots; None if it is not among them."""
    for place, lot in enumerate(lots):
        if lot.number == number:
            return lots.pop(place)
    return None


def take(lots: tuple[Lot, ...], amount: Millionths) -> tuple[tuple[Lot, ...], list[Allocation]]:
    """Takes an amount (above 0) out of sorted lots; returns the lots left open, and the allocations.

    The amount that the lots lack is drawn from the credit line; the caller decides whether that
    is allowed.
    """
    allocations = []
    for place, lot in enumerate(lots):
        taken = min(lot.remaining, amount)
        allocations.append(Allocation(lot.number, -taken, lot.terms))
        amount -= taken
        if taken < lot.remaining:
            return (lot.with_remaining(lot.remaining - taken), *lots[place + 1 :]), allocations
        if not amount:
            return lots[place + 1 :], allocations
    allocations.append(Allocation(CREDIT_LINE, -amount, PERMANENT))
    return (), allocations


def expiring_and_permanent(allocations: Iterable[Allocation]) -> tuple[Millionths, Millionths]:
    """The amounts of expiring and of permanent credits that these allocations moved.

    Borrowed credits count as permanent.
    """
    expiring = permanent = 0
    for each in allocations:
        if each.terms.expire_time is None:
            permanent += each.amount
        else:
            expiring += each.amount
    return expiring, permanent
