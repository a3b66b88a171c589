"""The rules by which transactions are posted to an account.

Each rule takes the state of an account and returns the state after it, with the postings. A
refusal is an exception and changes nothing. Callers post due expirations first (`expire_due`),
so that no transaction uses an expired lot.

Hot path: the values are named tuples, because copying a frozen dataclass takes four times as
long. The copies that every posting makes are written out, because `_replace` takes twice as
long.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

from daybook.v1.transaction_pb2 import Transaction

from server.ledger import money
from server.ledger.errors import BalanceOutOfRange, FieldInvalid, InsufficientCredits, TooManyLots
from server.ledger.instants import EARLIEST, Instant
from server.ledger.lots import (
    CREDIT_LINE,
    NEVER,
    PERMANENT,
    Allocation,
    Lot,
    SpendingOrder,
    Terms,
    expiring_and_permanent,
    insert,
    sort_lots,
    take,
    take_out,
)
from server.ledger.money import Millionths
from server.ledger.names import account_name
from server.ledger.usage import UsageWindow, add_usage

Kind: TypeAlias = "Transaction.Kind.ValueType"
State: TypeAlias = "Transaction.State.ValueType"

LOTS_TAKEN_MAX = 1000
"""The largest number of lots that one transaction takes from. An account may have any number of open lots."""


class AccountState(NamedTuple):
    """The data of an account on which its next posting depends."""

    account_number: int
    account_id: str
    tenant_number: int
    credit_limit: Millionths
    hour_anchor: Instant
    balance: Millionths = 0
    """The sum of the open lots less the debt."""
    debt: Millionths = 0
    """The amount drawn from the credit line, 0 or more. An account with a debt has no open lot."""
    lots: tuple[Lot, ...] = ()
    """The open lots that are loaded, in spending order. `edge` and `horizon` bound the others."""
    lot_count: int = 0
    """The number of the newest lot."""
    sequence: int = 0
    last_create_time: Instant = EARLIEST
    window: UsageWindow | None = None
    """The newest window."""
    import_time: Instant = 0
    """When history was last imported; 0 if never."""
    open_lot_count: int = 0
    """The number of open lots, loaded or not."""
    expiring: Millionths = 0
    """The sum of the open lots that have an expire_time, loaded or not."""
    edge: SpendingOrder | None = None
    """All open lots up to this place in spending order are loaded; None if all are."""
    horizon: Instant = NEVER
    """All open lots that expire before this instant are loaded."""

    @property
    def available(self) -> Millionths:
        """The largest amount of a charge, at most the largest amount that can be represented."""
        return min(max(0, self.balance + self.credit_limit), money.LARGEST)

    def with_loaded(self, lots: Iterable[Lot], edge: SpendingOrder | None, horizon: Instant) -> AccountState:
        """The state with more open lots loaded. Lots that it already has are unchanged."""
        loaded = {lot.number for lot in self.lots}
        added = (lot for lot in lots if lot.number not in loaded)
        return self._replace(lots=sort_lots((*self.lots, *added)), edge=edge, horizon=horizon)

    def lacks_lots(self, amount: Millionths) -> bool:
        """Whether `withdraw` needs more lots to be loaded to take an amount, 0 or more."""
        if self.edge is None or not 0 < amount <= self.available:
            return False
        for count, lot in enumerate(self.lots):
            if lot.spending_order > self.edge:
                return True
            if count == LOTS_TAKEN_MAX:
                # `withdraw` refuses an amount from more lots.
                return False
            amount -= lot.remaining
            if amount <= 0:
                return False
        return True

    def at(self, now: Instant) -> AccountState:
        """The state without expired lots, even if their expiration is not posted. All lots must be loaded."""
        expired = sum(lot.remaining for lot in self.lots if lot.terms.have_expired(now))
        if not expired:
            return self
        lots = tuple(lot for lot in self.lots if not lot.terms.have_expired(now))
        return self._replace(
            lots=lots, balance=self.balance - expired, open_lot_count=len(lots), expiring=self.expiring - expired
        )


class Draft(NamedTuple):
    """A transaction to be posted."""

    kind: Kind
    category: str
    amount: Millionths
    state: State = Transaction.SUCCEEDED
    is_usage: bool = False
    expire_time: Instant | None = None
    """When its credits expire."""
    time_to_live: Instant | None = None
    """The lifetime of its credits from the posting on, instead of expire_time."""
    priority: int = 0


class Posting(NamedTuple):
    """A posted transaction: the fields that the rules decide."""

    kind: Kind
    category: str
    state: State
    amount: Millionths
    sequence: int
    create_time: Instant
    balance_after: Millionths
    allocations: tuple[Allocation, ...] = ()
    """The changes of lots. They sum to the amount, or are empty for a transaction that moves nothing."""
    terms: Terms = PERMANENT
    """The terms of the lot that a grant opens, or would open if it had succeeded."""


class Portion(NamedTuple):
    """Incoming credits: for an existing lot that they were taken from, or for a new lot."""

    amount: Millionths
    terms: Terms
    lot: Lot | None = None


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
    """Posts a grant, a charge or an adjustment.

    Raises, in this order: FieldInvalid for an amount of the wrong sign or an expire_time that
    is not in the future, InsufficientCredits, BalanceOutOfRange, and TooManyLots if it would take
    from more than LOTS_TAKEN_MAX lots.

    `now` decides which lots have expired, and a time_to_live begins at it. The create_time keeps the
    account's history in order: if the newest transaction is ahead of `now`, its create_time is
    repeated.
    """
    check_sign(draft)
    if draft.state != Transaction.SUCCEEDED:
        return record(state, draft, now)
    create_time = max(now, state.last_create_time)
    terms = _terms(draft, now)
    if terms.have_expired(now):
        raise FieldInvalid("transaction.expire_time", "must be in the future")
    if draft.amount > 0:
        after, allocations = put(state, [Portion(draft.amount, terms)])
    else:
        after, allocations = withdraw(state, -draft.amount)
    window = state.window
    if draft.is_usage and draft.kind == Transaction.CHARGE:
        window = add_usage(window, state.hour_anchor, draft.category, -draft.amount, create_time)
        if window is not None and window.total > money.LARGEST:
            raise BalanceOutOfRange(account_name(state.account_id))
    return posted(after, draft.kind, draft.category, draft.amount, create_time, allocations, terms, window)


def record(state: AccountState, draft: Draft, now: Instant) -> tuple[AccountState, Posting]:
    """Records a transaction that failed or was canceled, with all of its fields. It moves no credits."""
    create_time = max(now, state.last_create_time)
    terms = _terms(draft, now)
    after = _count(state, create_time, state.window)
    return after, Posting(
        draft.kind, draft.category, draft.state, draft.amount, after.sequence, create_time, after.balance, (), terms
    )


def expire_due(state: AccountState, now: Instant) -> list[tuple[AccountState, Posting]]:
    """Posts the expiration of every loaded lot that has expired, each dated at its expire_time.

    Returns each posting with the state after it, the earliest first. Only `now` decides which lots
    are due: if the account's newest create_time is ahead of the clock, no credits expire early.
    """
    # Terms.have_expired, inlined: every posting evaluates it for every lot.
    due = [lot for lot in state.lots if lot.terms.expire_time is not None and lot.terms.expire_time <= now]
    if not due:
        return []
    steps: list[tuple[AccountState, Posting]] = []
    for lot in sorted(due, key=lambda lot: (lot.terms.expire_time, lot.number)):
        assert lot.terms.expire_time is not None
        create_time = max(lot.terms.expire_time, state.last_create_time)
        left = tuple(other for other in state.lots if other.number != lot.number)
        state = state._replace(
            lots=left,
            balance=state.balance - lot.remaining,
            open_lot_count=state.open_lot_count - 1,
            expiring=state.expiring - lot.remaining,
        )
        allocation = Allocation(lot.number, -lot.remaining, lot.terms)
        state, posting = posted(state, Transaction.EXPIRATION, "expiration", -lot.remaining, create_time, [allocation])
        steps.append((state, posting))
    return steps


def withdraw(state: AccountState, amount: Millionths, *, borrow: bool = True) -> tuple[AccountState, list[Allocation]]:
    """Takes an amount (above 0) out of the lots, and the rest from the credit line.

    Raises, in this order: InsufficientCredits if the amount exceeds the lots and the credit limit, or
    without `borrow` the lots alone; BalanceOutOfRange; TooManyLots. The caller must load enough lots: see `lacks_lots`.
    """
    available = state.available if borrow else max(0, state.balance)
    if amount > available:
        raise InsufficientCredits(
            account_name(state.account_id), available_amount=money.write(available), amount=money.write(-amount)
        )
    lots, allocations = take(state.lots, amount)
    # Only the last allocation can draw on the credit line.
    borrowed = -allocations[-1].amount if allocations[-1].lot_number == CREDIT_LINE else 0
    after = state._replace(
        lots=lots,
        debt=state.debt + borrowed,
        balance=state.balance - amount,
        open_lot_count=state.open_lot_count - (len(state.lots) - len(lots)),
        expiring=state.expiring + expiring_and_permanent(allocations)[0],
    )
    _check_range(after)
    lots_taken = len(allocations) - (1 if borrowed else 0)
    if lots_taken > LOTS_TAKEN_MAX:
        largest = sum(lot.remaining for lot in state.lots[:LOTS_TAKEN_MAX])
        raise TooManyLots(account_name(state.account_id), lot_limit=LOTS_TAKEN_MAX, largest_amount=money.write(largest))
    if state.edge is not None and (borrowed or state.lots[lots_taken - 1].spending_order > state.edge):
        raise RuntimeError("lots that come earlier in spending order are not loaded")
    return after, allocations


def put(state: AccountState, portions: Iterable[Portion]) -> tuple[AccountState, list[Allocation]]:
    """Adds credits. They pay back the debt first; the rest goes into lots.

    Raises BalanceOutOfRange.
    """
    debt, lot_count, open_lot_count = state.debt, state.lot_count, state.open_lot_count
    lots = list(state.lots)
    allocations = []
    brought = 0
    for portion in portions:
        brought += portion.amount
        paid = min(debt, portion.amount)
        if paid:
            debt -= paid
            allocations.append(Allocation(CREDIT_LINE, paid, PERMANENT))
        rest = portion.amount - paid
        if not rest:
            continue
        if portion.lot is None:
            lot_count += 1
            open_lot_count += 1
            lot = Lot(lot_count, state.sequence + 1, portion.terms, rest, rest)
        else:
            # The lot may be open without being loaded.
            lot = take_out(lots, portion.lot.number) or portion.lot
            open_lot_count += 0 if lot.remaining else 1
            lot = lot.with_remaining(lot.remaining + rest)
        insert(lots, lot)
        allocations.append(Allocation(lot.number, rest, lot.terms))
    after = state._replace(
        lots=tuple(lots),
        debt=debt,
        balance=state.balance + brought,
        lot_count=lot_count,
        open_lot_count=open_lot_count,
        expiring=state.expiring + expiring_and_permanent(allocations)[0],
    )
    _check_range(after)
    return after, allocations


def posted(
    state: AccountState,
    kind: Kind,
    category: str,
    amount: Millionths,
    create_time: Instant,
    allocations: Sequence[Allocation],
    terms: Terms = PERMANENT,
    window: UsageWindow | None = None,
) -> tuple[AccountState, Posting]:
    """Makes the posting of a transaction whose credits have moved already, and counts it in the state.

    `window` is the newest window after it; None leaves the state's window.
    """
    after = _count(state, create_time, window or state.window)
    return after, Posting(
        kind,
        category,
        Transaction.SUCCEEDED,
        amount,
        after.sequence,
        create_time,
        after.balance,
        tuple(allocations),
        terms,
    )


def _count(state: AccountState, create_time: Instant, window: UsageWindow | None) -> AccountState:
    """The state with one more transaction, and this newest window."""
    return state._replace(sequence=state.sequence + 1, last_create_time=create_time, window=window)


def _terms(draft: Draft, now: Instant) -> Terms:
    expire_time = draft.expire_time
    if draft.time_to_live is not None:
        expire_time = now + draft.time_to_live
    elif expire_time is None and not draft.priority:
        return PERMANENT
    return Terms(expire_time, draft.priority)


def _check_range(state: AccountState) -> None:
    if abs(state.balance) > money.LARGEST:
        raise BalanceOutOfRange(account_name(state.account_id))
