"""The rules of refunds: refundable amounts, and the lots to which credits return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from daybook.v1.transaction_pb2 import Transaction
from hypothesis import given
from hypothesis import strategies as st

from server.ledger.errors import BalanceOutOfRange, DaybookError, NotRefundable, RefundExceedsCharge
from server.ledger.instants import HOUR, Instant
from server.ledger.lots import PERMANENT, Allocation, Lot, Terms, expiring_and_permanent
from server.ledger.money import LARGEST, Millionths
from server.ledger.posting import AccountState, Draft, Kind, Posting, State, expire_due, post
from server.ledger.refunds import Charge, refund
from server.ledger.usage import UsageWindow
from tests.support.account_states import NOW, account, lot

NAME = "accounts/acme/transactions/0192f3a4-5b6c-7d8e-9f01-23456789abcd"

GRANT, CHARGE, REFUND = Transaction.GRANT, Transaction.CHARGE, Transaction.REFUND
SUCCEEDED, FAILED, CANCELED = Transaction.SUCCEEDED, Transaction.FAILED, Transaction.CANCELED


def spend(state: AccountState, amount: Millionths, now: Instant = NOW) -> tuple[AccountState, Charge]:
    """Charges an amount above 0. Returns the new state, and the charge as a refund loads it from the database."""
    after, posting = post(state, Draft(CHARGE, "ai_chat", -amount), now)
    # A refund takes open lots from the state. It reads the lots of the charge only if they are spent.
    used = {each.lot_number for each in posting.allocations}
    lots = {each.number: each._replace(remaining=0) for each in state.lots if each.number in used}
    charge = Charge(NAME, posting.kind, posting.state, posting.amount, posting.create_time, posting.allocations, lots)
    return after, charge


def refund_parts(
    state: AccountState, charge: Charge, parts: Sequence[Millionths | None], now: Instant = NOW
) -> tuple[AccountState, list[Posting]]:
    """Refunds a charge in parts, one after the other."""
    postings = []
    for part in parts:
        state, posting = refund(state, charge, part, now)
        charge = replace(charge, refunded=charge.refunded + posting.amount)
        postings.append(posting)
    return state, postings


def expire(state: AccountState, now: Instant) -> AccountState:
    """The state after its due expirations."""
    for after, _ in expire_due(state, now):
        state = after
    return state


def moved(posting: Posting) -> list[tuple[int, Millionths]]:
    """Each allocation's lot and amount."""
    return [(each.lot_number, each.amount) for each in posting.allocations]


def balance_debt_and_lots(state: AccountState) -> tuple[Millionths, Millionths, tuple[Lot, ...]]:
    """The balance, debt and lots of an account."""
    return state.balance, state.debt, state.lots


THREE_LOTS = (lot(1, 10), lot(2, 10, NOW + 2 * HOUR, 4), lot(3, 10, NOW + HOUR, 4))
SPENDING_ORDER = (1, 3, 2)
"""The numbers of THREE_LOTS in the order in which a charge takes them."""


@pytest.mark.parametrize(
    ("amount", "allocations", "expiring_amount"),
    [
        pytest.param(1, [(0, 1)], 0, id="a part of the borrowed amount"),
        pytest.param(5, [(0, 5)], 0, id="the borrowed amount"),
        pytest.param(6, [(0, 5), (2, 1)], 1, id="into the lot taken last"),
        pytest.param(15, [(0, 5), (2, 10)], 10, id="the lot taken last"),
        pytest.param(16, [(0, 5), (2, 10), (3, 1)], 11, id="into the lot before it"),
        pytest.param(25, [(0, 5), (2, 10), (3, 10)], 20, id="two lots"),
        pytest.param(34, [(0, 5), (2, 10), (3, 10), (1, 9)], 20, id="all but one"),
        pytest.param(35, [(0, 5), (2, 10), (3, 10), (1, 10)], 20, id="all"),
        pytest.param(None, [(0, 5), (2, 10), (3, 10), (1, 10)], 20, id="all, without an amount"),
    ],
)
def test_credits_return_to_their_lots_in_reverse_order(
    amount: Millionths | None, allocations: list[tuple[int, Millionths]], expiring_amount: Millionths
) -> None:
    """For a charge of 35 that emptied three lots and borrowed 5, the credits taken last return first."""
    state, charge = spend(account(*THREE_LOTS, credit_limit=10), 35)
    assert [each.lot_number for each in charge.allocations] == [*SPENDING_ORDER, 0]
    after, posting = refund(state, charge, amount, NOW + 5)
    refunded_amount = 35 if amount is None else amount
    assert moved(posting) == allocations
    assert expiring_and_permanent(posting.allocations) == (expiring_amount, refunded_amount - expiring_amount)
    assert (after.balance, after.debt) == (refunded_amount - 5, max(0, 5 - refunded_amount))


def test_a_refund_is_a_transaction() -> None:
    """A refund is a REFUND with the next sequence and the present time as its create_time."""
    state, charge = spend(account(*THREE_LOTS), 30)
    state = state._replace(sequence=41, window=UsageWindow(2, NOW, 5, 6))
    after, posting = refund(state, charge, 12, NOW + 5)
    allocations = (Allocation(2, 10, Terms(NOW + 2 * HOUR, 4)), Allocation(3, 2, Terms(NOW + HOUR, 4)))
    assert posting == Posting(REFUND, "refund", SUCCEEDED, 12, 42, NOW + 5, 12, allocations, PERMANENT)
    assert after == state._replace(
        balance=12, lots=after.lots, open_lot_count=2, expiring=12, sequence=42, last_create_time=NOW + 5
    )


@pytest.mark.parametrize(
    ("parts", "allocations"),
    [
        pytest.param([4, 1, 30], [[(0, 4)], [(0, 1)], [(2, 10), (3, 10), (1, 10)]], id="at the boundaries of lots"),
        pytest.param([4, 4, 4], [[(0, 4)], [(0, 1), (2, 3)], [(2, 4)]], id="across boundaries of lots"),
        pytest.param([14, 14, None], [[(0, 5), (2, 9)], [(2, 1), (3, 10), (1, 3)], [(1, 7)]], id="the rest"),
        pytest.param([34, 1], [[(0, 5), (2, 10), (3, 10), (1, 9)], [(1, 1)]], id="all but 1, then 1"),
        pytest.param([1, None], [[(0, 1)], [(0, 4), (2, 10), (3, 10), (1, 10)]], id="1, then the rest"),
    ],
)
def test_a_further_refund_continues_after_the_previous_one(
    parts: list[Millionths | None], allocations: list[list[tuple[int, Millionths]]]
) -> None:
    """Partial refunds of a charge of 35 return each credit once."""
    state, charge = spend(account(*THREE_LOTS, credit_limit=10), 35)
    _, postings = refund_parts(state, charge, parts)
    assert [moved(each) for each in postings] == allocations


def test_charging_100_and_refunding_30_is_charging_70() -> None:
    """After a partial refund, the lots are as if only the rest had been charged."""
    before = account(lot(1, 60), lot(2, 50, NOW + HOUR))
    state, charge = spend(before, 100)
    after, _ = refund(state, charge, 30, NOW)
    assert balance_debt_and_lots(after) == balance_debt_and_lots(spend(before, 70)[0])
    assert [(each.number, each.remaining) for each in after.lots] == [(1, 40)]


@pytest.mark.parametrize(
    ("charged", "refunded", "amount", "refundable"),
    [
        pytest.param(10_000_000, 0, 10_000_001, "10", id="a millionth too much"),
        pytest.param(10_000_000, 4_000_000, 6_000_001, "6", id="with an earlier refund"),
        pytest.param(10_000_000, 10_000_000, 1, "0", id="nothing is left"),
        pytest.param(10_000_000, 10_000_000, None, "0", id="all of nothing"),
        pytest.param(10_000_000, 9_999_999, 2, "0.000001", id="one millionth is left"),
    ],
)
def test_refunds_never_exceed_the_charge(
    charged: Millionths, refunded: Millionths, amount: Millionths | None, refundable: str
) -> None:
    """A refund that exceeds the rest of the charge is refused with the amount that is left."""
    state, charge = spend(account(lot(1, charged)), charged)
    with pytest.raises(RefundExceedsCharge) as refusal:
        refund(state, replace(charge, refunded=refunded), amount, NOW)
    assert refusal.value.metadata == {"transaction": NAME, "refundable_amount": refundable}


@pytest.mark.parametrize(
    ("kind", "state", "amount", "outcome"),
    [
        (CHARGE, SUCCEEDED, -10, None),
        (CHARGE, FAILED, -10, NotRefundable),
        (CHARGE, CANCELED, -10, NotRefundable),
        (GRANT, SUCCEEDED, 10, NotRefundable),
        (REFUND, SUCCEEDED, 10, NotRefundable),
        (Transaction.TRANSFER_IN, SUCCEEDED, 10, NotRefundable),
        (Transaction.TRANSFER_OUT, SUCCEEDED, -10, NotRefundable),
        (Transaction.EXPIRATION, SUCCEEDED, -10, NotRefundable),
        (Transaction.ADJUSTMENT, SUCCEEDED, -10, NotRefundable),
        (Transaction.ADJUSTMENT, SUCCEEDED, 10, NotRefundable),
    ],
)
@pytest.mark.parametrize("requested", [1, 10, 11, None])
def test_only_a_charge_that_succeeded_is_refunded(
    requested: Millionths | None, kind: Kind, state: State, amount: Millionths, outcome: type[DaybookError] | None
) -> None:
    """A transaction that is not a successful charge is refused before its amount is checked."""
    account_state, charge = spend(account(lot(1, 10)), 10)
    other = replace(charge, kind=kind, state=state, amount=amount)
    if outcome is None and requested != 11:
        assert refund(account_state, other, requested, NOW)[1].amount == (requested or 10)
        return
    with pytest.raises(outcome or RefundExceedsCharge) as refusal:
        refund(account_state, other, requested, NOW)
    assert refusal.value.metadata["transaction"] == NAME


CHARGED_AT = NOW + 300
EXPIRES_AT = NOW + 1000


@pytest.mark.parametrize(
    ("last_create_time", "now", "lots"),
    [
        pytest.param(CHARGED_AT, EXPIRES_AT - 1, [Lot(1, 1, Terms(EXPIRES_AT, 6), 100, 40)], id="a microsecond before"),
        pytest.param(CHARGED_AT, EXPIRES_AT, [Lot(2, 9, Terms(EXPIRES_AT + 700, 6), 40, 40)], id="at the expire_time"),
        pytest.param(CHARGED_AT, NOW + 5000, [Lot(2, 9, Terms(NOW + 5700, 6), 40, 40)], id="long after"),
        pytest.param(
            NOW + 5000, EXPIRES_AT - 1, [Lot(1, 1, Terms(EXPIRES_AT, 6), 100, 40)], id="only the create_time is later"
        ),
        pytest.param(
            NOW + 5000,
            EXPIRES_AT,
            [Lot(2, 9, Terms(EXPIRES_AT + 700, 6), 40, 40)],
            id="at the expire_time, with a later create_time",
        ),
    ],
)
def test_credits_of_an_expired_lot_get_their_remaining_lifetime(
    last_create_time: Instant, now: Instant, lots: list[Lot]
) -> None:
    """Credits charged 700 microseconds before they expired return with a lifetime of 700 microseconds."""
    state, charge = spend(account(lot(1, 100, EXPIRES_AT, 6)), 100, CHARGED_AT)
    state = state._replace(sequence=8, last_create_time=last_create_time)
    after, posting = refund(state, charge, 40, now)
    assert list(after.lots) == lots
    assert posting.allocations == (Allocation(lots[0].number, 40, lots[0].terms),)
    assert posting.create_time == max(now, last_create_time)
    assert (expiring_and_permanent(posting.allocations), after.balance, after.lot_count) == (
        (40, 0),
        40,
        lots[0].number,
    )


def test_expired_credits_are_not_refunded() -> None:
    """If 60 of 100 credits were spent and 40 expired, a refund returns the 60, in a new lot."""
    state, charge = spend(account(lot(1, 100, EXPIRES_AT)), 60, CHARGED_AT)
    state = expire(state, EXPIRES_AT)
    assert balance_debt_and_lots(state) == (0, 0, ())
    after, _ = refund(state, charge, None, EXPIRES_AT)
    # Transactions 2 and 3 were the charge and the expiration.
    assert balance_debt_and_lots(after) == (60, 0, (Lot(2, 4, Terms(EXPIRES_AT + 700), 60, 60),))


def test_only_the_part_of_the_expired_lot_gets_a_new_lot() -> None:
    """If one of several lots has expired since the charge, credits of the others return to them."""
    state, charge = spend(account(lot(1, 10, NOW + HOUR), lot(2, 10, NOW + 3 * HOUR), lot(3, 10)), 25)
    state, posting = refund(expire(state, NOW + 2 * HOUR), charge, 22, NOW + 2 * HOUR)
    assert moved(posting) == [(3, 5), (2, 10), (4, 7)]
    assert [(each.number, each.remaining, each.terms) for each in state.lots] == [
        (2, 10, Terms(NOW + 3 * HOUR)),
        (4, 7, Terms(NOW + 3 * HOUR)),
        (3, 10, PERMANENT),
    ]


def test_each_refund_of_expired_credits_starts_their_lifetime() -> None:
    """Each of two partial refunds of an expired lot opens a lot, whose lifetime begins at that refund."""
    state, charge = spend(account(lot(1, 100, EXPIRES_AT)), 100, CHARGED_AT)
    state, first = refund(state, charge, 30, NOW + 5000)
    state, second = refund(state, replace(charge, refunded=30), 50, NOW + 5001)
    assert first.allocations + second.allocations == (
        Allocation(2, 30, Terms(NOW + 5700)),
        Allocation(3, 50, Terms(NOW + 5701)),
    )


def test_borrowed_credits_return_as_permanent() -> None:
    """If the debt has been paid back since, the borrowed part of a charge returns as a permanent lot."""
    state, charge = spend(account(lot(1, 10, NOW + HOUR, 3), credit_limit=10), 16)
    state, _ = post(state, Draft(GRANT, "purchase", 6), NOW)
    assert balance_debt_and_lots(state) == (0, 0, ())
    state, posting = refund(state, charge, None, NOW)
    assert moved(posting) == [(2, 6), (1, 10)]
    assert state.lots == (Lot(2, state.sequence, PERMANENT, 6, 6), Lot(1, 1, Terms(NOW + HOUR, 3), 10, 10))
    assert expiring_and_permanent(posting.allocations) == (10, 6)


@pytest.mark.parametrize(
    ("amount", "allocations", "debt", "lots"),
    [
        pytest.param(3, [(0, 3)], 4, [], id="less than the debt"),
        pytest.param(7, [(0, 7)], 0, [], id="the debt"),
        pytest.param(8, [(0, 7), (2, 1)], 0, [(2, 1)], id="one more"),
        pytest.param(15, [(0, 7), (2, 3), (1, 5)], 0, [(1, 5), (2, 3)], id="all"),
    ],
)
def test_a_refund_pays_a_later_debt_first(
    amount: Millionths,
    allocations: list[tuple[int, Millionths]],
    debt: Millionths,
    lots: list[tuple[int, Millionths]],
) -> None:
    """Refunded credits first pay back the debt of a later charge; the rest goes into lots."""
    state, charge = spend(account(lot(1, 5, NOW + HOUR), lot(2, 10), credit_limit=20), 15)
    state, _ = spend(state, 7)
    after, posting = refund(state, charge, amount, NOW)
    assert moved(posting) == allocations
    assert (after.debt, [(each.number, each.remaining) for each in after.lots]) == (debt, lots)
    assert after.balance == amount - 7


@pytest.mark.parametrize(
    ("state", "charged", "filled", "outcome"),
    [
        pytest.param(account(lot(1, 10)), 10, [lot(2, LARGEST - 10)], LARGEST, id="up to the largest balance"),
        pytest.param(account(lot(1, 10)), 10, [lot(2, LARGEST - 9)], BalanceOutOfRange, id="above the largest balance"),
        pytest.param(
            account(lot(1, 10)), 10, [lot(number, 1) for number in range(2, 3001)], 3009, id="any number of lots"
        ),
    ],
)
def test_a_refund_is_limited_by_the_largest_balance_only(
    state: AccountState, charged: Millionths, filled: list[Lot], outcome: Millionths | type[DaybookError]
) -> None:
    """A refund is refused if the balance would exceed LARGEST; the number of lots doesn't matter."""
    _, charge = spend(state, charged)
    full = account(*filled)
    if isinstance(outcome, int):
        assert refund(full, charge, None, NOW)[0].balance == outcome
        return
    with pytest.raises(outcome):
        refund(full, charge, None, NOW)


any_lots = st.lists(
    st.tuples(st.integers(1, 20), st.none() | st.integers(NOW + 1, NOW + 5), st.integers(-1, 1)), max_size=6
).map(lambda rows: tuple(lot(number, *row) for number, row in enumerate(rows, 1)))


@st.composite
def spent_accounts(draw: st.DrawFn) -> tuple[AccountState, Millionths]:
    """An account and an amount that it can be charged."""
    before = account(*draw(any_lots), credit_limit=draw(st.integers(1, 20)))
    return before, draw(st.integers(1, before.available))


@given(spent_accounts(), st.data())
def test_a_partial_refund_is_as_if_the_rest_had_been_charged(
    case: tuple[AccountState, Millionths], data: st.DataObject
) -> None:
    """For any lots, a charge with a partial refund leaves the same state as a charge of the rest."""
    before, charged = case
    refunded_amount = data.draw(st.integers(1, charged))
    state, charge = spend(before, charged)
    after, posting = refund(state, charge, refunded_amount, NOW)
    rest = charged - refunded_amount
    assert balance_debt_and_lots(after) == balance_debt_and_lots(spend(before, rest)[0] if rest else before)
    assert sum(each.amount for each in posting.allocations) == posting.amount == refunded_amount
    assert all(each.amount > 0 for each in posting.allocations)


@given(spent_accounts(), st.data())
def test_partial_refunds_equal_one_refund_of_their_sum(
    case: tuple[AccountState, Millionths], data: st.DataObject
) -> None:
    """For any lots and charge, partial refunds leave the same lots as one refund of their sum."""
    before, charged = case
    total = data.draw(st.integers(1, charged))
    cuts = data.draw(st.sets(st.integers(1, total), max_size=5)) | {total}
    edges = sorted(cuts)
    parts = [edge - previous for previous, edge in zip([0, *edges], edges, strict=False)]
    state, charge = spend(before, charged)
    in_parts, postings = refund_parts(state, charge, parts)
    assert balance_debt_and_lots(in_parts) == balance_debt_and_lots(refund(state, charge, total, NOW)[0])
    assert [sum(each.amount for each in posting.allocations) for posting in postings] == parts
    assert in_parts.sequence == state.sequence + len(parts)


@given(spent_accounts(), st.lists(st.integers(1, 15), max_size=5), st.data())
def test_refunding_everything_restores_the_balance(
    case: tuple[AccountState, Millionths], later: list[Millionths], data: st.DataObject
) -> None:
    """Refunds of all charges in any order restore the balance, and no lot exceeds its original amount."""
    before, first = case
    state, charge = spend(before, first)
    charges = [charge]
    for amount in later:
        if amount <= state.available:
            state, charge = spend(state, amount)
            charges.append(charge)
    for charge in data.draw(st.permutations(charges)):
        state, _ = refund(state, charge, None, NOW)
        assert state.debt == 0 or not state.lots
        assert all(each.remaining <= each.amount for each in state.lots)
    assert (state.balance, state.debt) == (before.balance, 0)
    if not any(each.lot_number == 0 for charge in charges for each in charge.allocations):
        assert state.lots == before.lots
