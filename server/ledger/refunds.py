"""The rules by which a charge is refunded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from daybook.v1.transaction_pb2 import Transaction

from server.ledger import money
from server.ledger.errors import NotRefundable, RefundExceedsCharge
from server.ledger.instants import Instant
from server.ledger.lots import CREDIT_LINE, PERMANENT, Allocation, Lot, Terms
from server.ledger.money import Millionths
from server.ledger.posting import AccountState, Kind, Portion, Posting, State, posted, put


@dataclass(frozen=True, slots=True)
class Charge:
    """A transaction to be refunded."""

    name: str
    kind: Kind
    state: State
    amount: Millionths
    post_time: Instant
    """The time of posting by the clock: see `names.post_time`."""
    allocations: tuple[Allocation, ...]
    lots: Mapping[int, Lot]
    """The lots of its allocations, by number, open or not."""
    refunded: Millionths = 0
    """The sum of earlier refunds, 0 or more."""


@dataclass(frozen=True, slots=True)
class RefundTotal:
    """The sum of the refunds of one charge so far."""

    amount: Millionths
    last_create_time: Instant


Refunds: TypeAlias = Mapping[tuple[int, int], RefundTotal]
"""Totals of refunds, by account number and sequence of the charge."""


@dataclass(frozen=True, slots=True)
class StoredCharge:
    """A stored transaction to be refunded."""

    sequence: int
    charge: Charge
    body: bytes


def refund(
    state: AccountState, charge: Charge, amount: Millionths | None, now: Instant
) -> tuple[AccountState, Posting]:
    """Refunds an amount (above 0) of a charge; None refunds all that is not refunded yet.

    Credits go back to their lots, in reverse order, so that the state is as if only the rest had
    been charged. Credits of a lot that has expired since go to a new lot, with the lifetime that the
    old lot had left at the charge. Borrowed credits come back as permanent credits. A refund pays
    back debt first, as every incoming amount does.

    Raises, in this order: NotRefundable unless the transaction is a charge that succeeded,
    RefundExceedsCharge, and the errors of `put`.
    """
    if charge.kind != Transaction.CHARGE or charge.state != Transaction.SUCCEEDED:
        raise NotRefundable(charge.name)
    left = -charge.amount - charge.refunded
    if amount is None:
        amount = left
    if amount > left or not left:
        raise RefundExceedsCharge(charge.name, refundable_amount=money.write(left))
    create_time = max(now, state.last_create_time)
    after, allocations = put(state, _portions(charge, amount, now))
    return posted(after, Transaction.REFUND, "refund", amount, create_time, allocations)


def _portions(charge: Charge, amount: Millionths, now: Instant) -> Iterator[Portion]:
    already_refunded = charge.refunded
    for allocation in reversed(charge.allocations):
        taken = -allocation.amount
        skipped = min(already_refunded, taken)
        already_refunded -= skipped
        part = min(taken - skipped, amount)
        amount -= part
        if part:
            yield _portion(charge, allocation, part, now)


def _portion(charge: Charge, allocation: Allocation, part: Millionths, now: Instant) -> Portion:
    if allocation.lot_number == CREDIT_LINE:
        return Portion(part, PERMANENT)
    expire_time = allocation.terms.expire_time
    if expire_time is not None and expire_time <= now:
        life = expire_time - charge.post_time
        return Portion(part, Terms(now + life, allocation.terms.priority))
    return Portion(part, allocation.terms, charge.lots[allocation.lot_number])
