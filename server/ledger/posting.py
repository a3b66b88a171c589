"""The rules by which a transaction is posted to an account."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from daybook.v1.transaction_pb2 import Transaction

from server.ledger import money
from server.ledger.errors import BalanceOutOfRange, FieldInvalid, InsufficientCredits
from server.ledger.instants import Instant, window_start
from server.ledger.money import Millionths
from server.ledger.names import account_name

Kind: TypeAlias = "Transaction.Kind.ValueType"

USAGE_CATEGORIES = ("computing", "serverless")
"""The categories of usage that are summed in hour windows."""


@dataclass(frozen=True, slots=True)
class UsageWindow:
    """What an account used in one of its hours. Hours without usage have no window."""

    number: int
    """1 for the account's first window, without a gap."""
    start: Instant
    computing: Millionths = 0
    serverless: Millionths = 0


@dataclass(frozen=True, slots=True)
class AccountState:
    """What the next posting to an account depends on."""

    account_number: int
    account_id: str
    credit_limit: Millionths
    hour_anchor: Instant
    balance: Millionths = 0
    sequence: int = 0
    last_create_time: Instant = 0
    window: UsageWindow | None = None
    """The newest window."""

    @property
    def available(self) -> Millionths:
        """What a charge may take; no charge can take more than an amount can say."""
        return min(max(0, self.balance + self.credit_limit), money.LARGEST)


@dataclass(frozen=True, slots=True)
class Draft:
    """A transaction that somebody wants posted."""

    kind: Kind
    category: str
    amount: Millionths
    is_usage: bool = False


@dataclass(frozen=True, slots=True)
class Posting:
    """What a draft becomes when it is posted."""

    draft: Draft
    sequence: int
    create_time: Instant
    balance_after: Millionths


def check_sign(draft: Draft) -> None:
    """Raises FieldInvalid unless the amount's sign fits the kind; 0 fits none."""
    match draft.kind:
        case Transaction.GRANT if draft.amount <= 0:
            raise FieldInvalid("transaction.amount", "must be above 0 for a GRANT")
        case Transaction.CHARGE if draft.amount >= 0:
            raise FieldInvalid("transaction.amount", "must be below 0 for a CHARGE")
        case Transaction.ADJUSTMENT if draft.amount == 0:
            raise FieldInvalid("transaction.amount", "must not be 0")


def post(state: AccountState, draft: Draft, now: Instant) -> tuple[AccountState, Posting]:
    """Posts a draft: the state after it, and what was posted.

    Raises, in this order: FieldInvalid for an amount of the wrong sign,
    InsufficientCredits where credits are taken that are not there, BalanceOutOfRange. A
    clock that went back does not: the transaction then gets the time of its predecessor.
    """
    check_sign(draft)
    balance = state.balance + draft.amount
    if draft.amount < 0 and balance < -state.credit_limit:
        raise InsufficientCredits(
            account_name(state.account_id),
            available_amount=money.write(state.available),
            amount=money.write(draft.amount),
        )
    if abs(balance) > money.LARGEST:
        raise BalanceOutOfRange(account_name(state.account_id))
    create_time = max(now, state.last_create_time)
    after = replace(
        state,
        balance=balance,
        sequence=state.sequence + 1,
        last_create_time=create_time,
        window=_add_usage(state, draft, create_time),
    )
    return after, Posting(draft, after.sequence, create_time, balance)


def _add_usage(state: AccountState, draft: Draft, create_time: Instant) -> UsageWindow | None:
    if not draft.is_usage or draft.category not in USAGE_CATEGORIES:
        return state.window
    start = window_start(state.hour_anchor, create_time)
    window = state.window
    if window is None or window.start != start:
        # Times never decrease within an account, so another start is a later one.
        window = UsageWindow(number=window.number + 1 if window else 1, start=start)
    if draft.category == "computing":
        return replace(window, computing=window.computing - draft.amount)
    return replace(window, serverless=window.serverless - draft.amount)
