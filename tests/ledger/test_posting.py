"""The rules of posting: refusals and their order, allocations, and times."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from daybook.v1.transaction_pb2 import Transaction
from hypothesis import given
from hypothesis import strategies as st

from server.ledger.errors import BalanceOutOfRange, DaybookError, FieldInvalid, InsufficientCredits, TooManyLots
from server.ledger.instants import HOUR, Instant
from server.ledger.lots import CREDIT_LINE, PERMANENT, Allocation, Lot, Terms, expiring_and_permanent, sort_lots
from server.ledger.money import LARGEST, Millionths
from server.ledger.posting import (
    LOTS_TAKEN_MAX,
    AccountState,
    Draft,
    Kind,
    Portion,
    Posting,
    State,
    expire_due,
    post,
    put,
    record,
    withdraw,
)
from server.ledger.usage import UsageWindow
from tests.support.account_states import NOW, account, lot

ONE: Millionths = 1_000_000

GRANT, CHARGE, ADJUSTMENT = Transaction.GRANT, Transaction.CHARGE, Transaction.ADJUSTMENT
EXPIRATION = Transaction.EXPIRATION
SUCCEEDED, FAILED, CANCELED = Transaction.SUCCEEDED, Transaction.FAILED, Transaction.CANCELED


def account_with_balance(balance: Millionths, credit_limit: Millionths) -> AccountState:
    """An account with a balance: one permanent lot, or a debt."""
    if balance > 0:
        return account(lot(1, balance), credit_limit=credit_limit)
    return account(debt=-balance, credit_limit=credit_limit)


def moved(allocations: Sequence[Allocation]) -> list[tuple[int, Millionths]]:
    """Each allocation's lot and amount."""
    return [(each.lot_number, each.amount) for each in allocations]


def remainders(state: AccountState) -> list[tuple[int, Millionths]]:
    """Each open lot's number and remaining amount, in spending order."""
    return [(each.number, each.remaining) for each in state.lots]


def post_after_expirations(state: AccountState, draft: Draft, now: Instant) -> tuple[AccountState, list[Posting]]:
    """Posts as the service does: due expirations first."""
    postings = []
    for after, expiration in expire_due(state, now):
        state = after
        postings.append(expiration)
    state, posting = post(state, draft, now)
    return state, [*postings, posting]


@pytest.mark.parametrize(
    ("kind", "balance", "credit_limit", "amount", "outcome"),
    [
        (GRANT, 0, 0, 1, 1),
        (GRANT, 0, 0, LARGEST, LARGEST),
        (GRANT, LARGEST - 1, 0, 1, LARGEST),
        (GRANT, LARGEST, 0, 1, BalanceOutOfRange),
        (GRANT, 1, 0, LARGEST, BalanceOutOfRange),
        (GRANT, -1, 1, LARGEST, LARGEST - 1),
        (GRANT, 0, 0, 0, FieldInvalid),
        (GRANT, 0, 0, -1, FieldInvalid),
        (GRANT, ONE, 0, -1, FieldInvalid),
        (CHARGE, 1, 0, -1, 0),
        (CHARGE, ONE, 0, -1, ONE - 1),
        (CHARGE, 0, 0, -1, InsufficientCredits),
        (CHARGE, ONE, 0, -ONE - 1, InsufficientCredits),
        (CHARGE, 0, 5, -5, -5),
        (CHARGE, 0, 5, -6, InsufficientCredits),
        (CHARGE, 3, 5, -8, -5),
        (CHARGE, 3, 5, -9, InsufficientCredits),
        (CHARGE, -2, 5, -3, -5),
        (CHARGE, -2, 5, -4, InsufficientCredits),
        (CHARGE, -5, 5, -1, InsufficientCredits),
        (CHARGE, 0, LARGEST, -LARGEST, -LARGEST),
        (CHARGE, 0, 0, 0, FieldInvalid),
        (CHARGE, ONE, 0, 1, FieldInvalid),
        (ADJUSTMENT, 0, 0, 1, 1),
        (ADJUSTMENT, 1, 0, -1, 0),
        (ADJUSTMENT, 0, 5, -5, -5),
        (ADJUSTMENT, 0, 0, -1, InsufficientCredits),
        (ADJUSTMENT, 0, 5, -6, InsufficientCredits),
        (ADJUSTMENT, LARGEST, 0, 1, BalanceOutOfRange),
        (ADJUSTMENT, 0, 0, 0, FieldInvalid),
        # The debt exceeds a limit that was lowered: credits may be added but not taken.
        (GRANT, -10, 5, 1, -9),
        (GRANT, -10, 5, 11, 1),
        (ADJUSTMENT, -10, 5, 1, -9),
        (CHARGE, -10, 5, -1, InsufficientCredits),
        # No request can set such a limit, but the check of the range does not rely on that.
        (CHARGE, -LARGEST, 2 * LARGEST, -1, BalanceOutOfRange),
        (ADJUSTMENT, -LARGEST, 2 * LARGEST, -1, BalanceOutOfRange),
        # Several faults at once: the sign is checked before credits, and credits before the range.
        (GRANT, -LARGEST, 0, -LARGEST, FieldInvalid),
        (CHARGE, LARGEST, 0, LARGEST, FieldInvalid),
        (CHARGE, -LARGEST, 0, -LARGEST, InsufficientCredits),
        (ADJUSTMENT, -LARGEST, LARGEST, -1, InsufficientCredits),
    ],
)
def test_a_draft_is_posted_or_refused(
    kind: Kind,
    balance: Millionths,
    credit_limit: Millionths,
    amount: Millionths,
    outcome: Millionths | type[DaybookError],
) -> None:
    """Posting a draft results in the new balance, or in the first error that applies."""
    state, draft = account_with_balance(balance, credit_limit), Draft(kind, "test", amount)
    if isinstance(outcome, int):
        after, posting = post(state, draft, NOW)
        assert after.balance == posting.balance_after == outcome
        assert sum(each.remaining for each in after.lots) - after.debt == outcome
        return
    with pytest.raises(DaybookError) as refusal:
        post(state, draft, NOW)
    assert type(refusal.value) is outcome


@pytest.mark.parametrize(
    ("draft", "state", "refusal"),
    [
        pytest.param(
            Draft(GRANT, "purchase", 0, expire_time=NOW),
            account(),
            FieldInvalid("transaction.amount", "must be above 0 for a GRANT"),
            id="sign before expiry",
        ),
        pytest.param(
            Draft(GRANT, "purchase", LARGEST, expire_time=NOW),
            account(lot(1, 1)),
            FieldInvalid("transaction.expire_time", "must be in the future"),
            id="expiry before range",
        ),
        pytest.param(
            Draft(CHARGE, "ai_chat", -LOTS_TAKEN_MAX - 2),
            account(*(lot(number, 1) for number in range(1, LOTS_TAKEN_MAX + 2))),
            InsufficientCredits("accounts/acme", available_amount="0.001001", amount="-0.001002"),
            id="credits before lots",
        ),
        pytest.param(
            Draft(CHARGE, "ai_chat", 1, is_usage=True),
            account(),
            FieldInvalid("transaction.amount", "must be below 0 for a CHARGE"),
            id="sign of a charge",
        ),
        pytest.param(
            Draft(ADJUSTMENT, "correction", 0, expire_time=NOW),
            account(),
            FieldInvalid("transaction.amount", "must not be 0"),
            id="adjustment by 0",
        ),
        pytest.param(
            Draft(ADJUSTMENT, "correction", 5, expire_time=NOW - 1),
            account(),
            FieldInvalid("transaction.expire_time", "must be in the future"),
            id="adjustment that has expired",
        ),
    ],
)
def test_refusals_have_the_documented_precedence(draft: Draft, state: AccountState, refusal: DaybookError) -> None:
    """Of several faults, the first in the documented order is raised, with the field or account in its message."""
    with pytest.raises(type(refusal)) as raised:
        post(state, draft, NOW)
    assert (raised.value.message, raised.value.metadata) == (refusal.message, refusal.metadata)


@pytest.mark.parametrize(
    ("balance", "credit_limit", "available_amount"),
    [
        (3_500_000, 0, "3.5"),
        (3_500_000, 250_000, "3.75"),
        (-100_000, 250_000, "0.15"),
        (-250_000, 250_000, "0"),
        # The limit was lowered below the debt.
        (-500_000, 250_000, "0"),
    ],
)
def test_insufficient_credits_names_the_amounts(
    balance: Millionths, credit_limit: Millionths, available_amount: str
) -> None:
    """The refusal has the account, the amount and the available amount, which is never below 0."""
    state = account_with_balance(balance, credit_limit)
    with pytest.raises(InsufficientCredits) as refusal:
        post(state, Draft(CHARGE, "test", -4_000_000), NOW)
    assert refusal.value.metadata == {
        "account": "accounts/acme",
        "available_amount": available_amount,
        "amount": "-4",
    }


@pytest.mark.parametrize(
    ("lots", "debt", "credit_limit", "available", "expiring"),
    [
        pytest.param([], 0, 0, 0, 0, id="empty"),
        pytest.param([lot(1, 5)], 0, 0, 5, 0, id="permanent"),
        pytest.param([lot(1, 5), lot(2, 7, NOW + 1)], 0, 3, 15, 7, id="both and a limit"),
        pytest.param([lot(1, 5, NOW + 1), lot(2, 7, NOW + 9, 4)], 0, 0, 12, 12, id="expiring"),
        pytest.param([], 4, 10, 6, 0, id="in debt"),
        pytest.param([], 10, 10, 0, 0, id="in debt up to the limit"),
        pytest.param([], 11, 10, 0, 0, id="in debt beyond the limit"),
        pytest.param([lot(1, LARGEST)], 0, 1, LARGEST, 0, id="beyond the largest amount"),
    ],
)
def test_available_and_expiring_amounts(
    lots: list[Lot], debt: Millionths, credit_limit: Millionths, available: Millionths, expiring: Millionths
) -> None:
    """`available` is the balance plus the limit, within the range; `expiring` is the sum of expiring lots."""
    state = account(*lots, debt=debt, credit_limit=credit_limit)
    assert (state.available, state.expiring) == (available, expiring)


# Lots 1 to 3 of 10 each: permanent, expiring later, expiring sooner. Spending order: 3, 2, 1.
THREE_LOTS = (lot(1, 10), lot(2, 10, NOW + 2 * HOUR), lot(3, 10, NOW + HOUR))


@pytest.mark.parametrize(
    ("amount", "allocations", "left", "debt", "expiring_amount", "permanent_amount"),
    [
        pytest.param(-1, [(3, -1)], [(3, 9), (2, 10), (1, 10)], 0, -1, 0, id="part of one lot"),
        pytest.param(-10, [(3, -10)], [(2, 10), (1, 10)], 0, -10, 0, id="exactly one lot"),
        pytest.param(-11, [(3, -10), (2, -1)], [(2, 9), (1, 10)], 0, -11, 0, id="of two lots"),
        pytest.param(-20, [(3, -10), (2, -10)], [(1, 10)], 0, -20, 0, id="all expiring lots"),
        pytest.param(-26, [(3, -10), (2, -10), (1, -6)], [(1, 4)], 0, -20, -6, id="of three lots"),
        pytest.param(-30, [(3, -10), (2, -10), (1, -10)], [], 0, -20, -10, id="the whole balance"),
        pytest.param(-31, [(3, -10), (2, -10), (1, -10), (0, -1)], [], 1, -20, -11, id="borrowing"),
        pytest.param(-40, [(3, -10), (2, -10), (1, -10), (0, -10)], [], 10, -20, -20, id="up to the limit"),
    ],
)
@pytest.mark.parametrize("kind", [CHARGE, ADJUSTMENT])
def test_a_charge_takes_lots_in_spending_order(
    kind: Kind,
    amount: Millionths,
    allocations: list[tuple[int, Millionths]],
    left: list[tuple[int, Millionths]],
    debt: Millionths,
    expiring_amount: Millionths,
    permanent_amount: Millionths,
) -> None:
    """A charge takes from the lots in spending order, borrows the rest, and has its expiring and permanent parts."""
    state, posting = post(account(*THREE_LOTS, credit_limit=10), Draft(kind, "test", amount), NOW)
    assert moved(posting.allocations) == allocations
    assert (remainders(state), state.debt) == (left, debt)
    assert expiring_and_permanent(posting.allocations) == (expiring_amount, permanent_amount)
    assert state.lot_count == 3


@pytest.mark.parametrize(
    ("amount", "expire_time", "allocations", "lots", "debt", "expiring_amount", "permanent_amount"),
    [
        pytest.param(4, None, [(0, 4)], [], 6, 0, 4, id="less than the debt"),
        pytest.param(4, NOW + 1, [(0, 4)], [], 6, 0, 4, id="less than the debt, expiring"),
        pytest.param(10, None, [(0, 10)], [], 0, 0, 10, id="the debt"),
        pytest.param(10, NOW + 1, [(0, 10)], [], 0, 0, 10, id="the debt, expiring"),
        pytest.param(11, None, [(0, 10), (1, 1)], [Lot(1, 1, PERMANENT, 1, 1)], 0, 0, 11, id="one more"),
        pytest.param(
            15, NOW + 1, [(0, 10), (1, 5)], [Lot(1, 1, Terms(NOW + 1, 6), 5, 5)], 0, 5, 10, id="more, expiring"
        ),
    ],
)
@pytest.mark.parametrize("kind", [GRANT, ADJUSTMENT])
def test_incoming_credits_pay_back_the_debt_first(
    kind: Kind,
    amount: Millionths,
    expire_time: Instant | None,
    allocations: list[tuple[int, Millionths]],
    lots: list[Lot],
    debt: Millionths,
    expiring_amount: Millionths,
    permanent_amount: Millionths,
) -> None:
    """Incoming credits pay back a debt of 10 first. Only the rest opens a lot, and only the rest can expire."""
    priority = 6 if expire_time else 0
    draft = Draft(kind, "purchase", amount, expire_time=expire_time, priority=priority)
    state, posting = post(account(debt=10, credit_limit=10), draft, NOW)
    assert moved(posting.allocations) == allocations
    assert state.lots == tuple(lots)
    assert (state.debt, state.balance, state.lot_count) == (debt, amount - 10, len(lots))
    assert expiring_and_permanent(posting.allocations) == (expiring_amount, permanent_amount)


@pytest.mark.parametrize(
    ("expire_time", "time_to_live", "priority", "terms"),
    [
        pytest.param(None, None, 0, PERMANENT, id="permanent"),
        pytest.param(None, None, -1000, Terms(None, -1000), id="with a priority"),
        pytest.param(NOW + 1, None, 0, Terms(NOW + 1), id="the earliest expire_time"),
        pytest.param(NOW + HOUR, None, 5, Terms(NOW + HOUR, 5), id="with an expire_time"),
        pytest.param(None, 1, 0, Terms(NOW + 1), id="for a microsecond"),
        pytest.param(None, HOUR, 7, Terms(NOW + HOUR, 7), id="for an hour"),
    ],
)
@pytest.mark.parametrize("kind", [GRANT, ADJUSTMENT])
def test_a_grant_opens_a_lot(
    kind: Kind, expire_time: Instant | None, time_to_live: Instant | None, priority: int, terms: Terms
) -> None:
    """A grant opens the next lot, full and with the grant's terms, which the posting has too."""
    draft = Draft(kind, "purchase", 8, expire_time=expire_time, time_to_live=time_to_live, priority=priority)
    state, posting = post(account()._replace(sequence=41, lot_count=5), draft, NOW)
    assert state.lots == (Lot(6, 42, terms, 8, 8),)
    assert posting.allocations == (Allocation(6, 8, terms),)
    assert posting.terms == terms


def test_a_new_lot_is_inserted_in_spending_order() -> None:
    """After a grant the open lots are in spending order."""
    draft = Draft(GRANT, "purchase", 10, expire_time=NOW + HOUR + 1)
    assert remainders(post(account(*THREE_LOTS), draft, NOW)[0]) == [(3, 10), (4, 10), (2, 10), (1, 10)]


@pytest.mark.parametrize(
    ("now", "last_create_time", "expire_time", "accepted"),
    [
        (NOW, NOW, NOW - HOUR, False),
        (NOW, NOW, NOW - 1, False),
        (NOW, NOW, NOW, False),
        (NOW, NOW, NOW + 1, True),
        # The account's newest create_time is ahead of the clock, which alone decides.
        (NOW - HOUR, NOW, NOW - HOUR, False),
        (NOW - HOUR, NOW, NOW - HOUR + 1, True),
        (NOW - HOUR, NOW, NOW, True),
        (NOW, NOW - HOUR, NOW - 1, False),
        (NOW, NOW, 0, False),
    ],
)
def test_a_grant_must_expire_in_the_future(
    now: Instant, last_create_time: Instant, expire_time: Instant, accepted: bool
) -> None:
    """Credits that have expired by the clock are refused, whatever the account's newest create_time is."""
    state, draft = account(last_create_time=last_create_time), Draft(GRANT, "purchase", 1, expire_time=expire_time)
    if accepted:
        assert post(state, draft, now)[0].balance == 1
        return
    with pytest.raises(FieldInvalid) as refusal:
        post(state, draft, now)
    assert refusal.value.field == "transaction.expire_time"


def test_a_time_to_live_begins_now() -> None:
    """A time_to_live begins at the clock's time, even if the account's newest create_time is ahead of it."""
    draft = Draft(GRANT, "purchase", 1, time_to_live=5)
    state, posting = post(account(last_create_time=NOW), draft, NOW - HOUR)
    assert state.lots[0].terms == Terms(NOW - HOUR + 5)
    assert posting.create_time == NOW
    _, posting = post(account(last_create_time=NOW), draft._replace(state=FAILED), NOW - HOUR)
    assert posting.terms == Terms(NOW - HOUR + 5)


@pytest.mark.parametrize(
    ("last_create_time", "now", "create_time"),
    [
        (NOW, NOW + 1, NOW + 1),
        (NOW, NOW, NOW),
        (NOW, NOW - 1, NOW),
        (NOW, NOW - 5 * HOUR, NOW),
        (NOW, 0, NOW),
    ],
)
@pytest.mark.parametrize("state", [SUCCEEDED, FAILED])
@pytest.mark.parametrize(("kind", "amount"), [(GRANT, 1), (CHARGE, -1), (ADJUSTMENT, 1), (ADJUSTMENT, -1)])
def test_create_times_never_decrease(
    kind: Kind, amount: Millionths, state: State, last_create_time: Instant, now: Instant, create_time: Instant
) -> None:
    """A transaction has the clock's time, or its predecessor's create_time if that is later."""
    before = account(lot(1, 10), last_create_time=last_create_time)
    after, posting = post(before, Draft(kind, "purchase", amount, state=state), now)
    assert posting.create_time == after.last_create_time == create_time


@pytest.mark.parametrize(
    "draft",
    [
        pytest.param(Draft(GRANT, "purchase", 5), id="grant"),
        pytest.param(Draft(CHARGE, "ai_chat", -5), id="charge"),
        pytest.param(Draft(ADJUSTMENT, "correction", 5), id="adjustment up"),
        pytest.param(Draft(ADJUSTMENT, "correction", -5), id="adjustment down"),
        pytest.param(Draft(CHARGE, "ai_chat", -LARGEST), id="beyond the balance"),
        pytest.param(Draft(GRANT, "purchase", LARGEST), id="out of range"),
        pytest.param(Draft(GRANT, "purchase", 5, expire_time=NOW - HOUR), id="expired"),
        pytest.param(Draft(GRANT, "purchase", 5, expire_time=NOW + HOUR, priority=3), id="expiring"),
        pytest.param(Draft(CHARGE, "computing", -5, is_usage=True), id="usage"),
    ],
)
@pytest.mark.parametrize("state", [FAILED, CANCELED])
@pytest.mark.parametrize("lots", [(), (lot(1, 10, NOW + 1),)], ids=["empty", "with credits"])
def test_a_failed_transaction_moves_nothing(lots: tuple[Lot, ...], state: State, draft: Draft) -> None:
    """A FAILED or CANCELED transaction takes a sequence and a create_time, and changes nothing else.

    Its posting has the terms of the credits that it would have granted.
    """
    before = account(*lots, window=UsageWindow(2, NOW - HOUR, 3, 4))._replace(sequence=8)
    after, posting = post(before, draft._replace(state=state), NOW)
    assert after == before._replace(sequence=9, last_create_time=NOW)
    terms = Terms(draft.expire_time, draft.priority)
    assert posting == Posting(draft.kind, draft.category, state, draft.amount, 9, NOW, before.balance, (), terms)
    assert expiring_and_permanent(posting.allocations) == (0, 0)


@pytest.mark.parametrize(("kind", "amount"), [(GRANT, -1), (GRANT, 0), (CHARGE, 1), (CHARGE, 0), (ADJUSTMENT, 0)])
@pytest.mark.parametrize("state", [FAILED, CANCELED])
def test_a_failed_transaction_must_have_the_sign_of_its_kind(state: State, kind: Kind, amount: Millionths) -> None:
    """A transaction that moves nothing is refused too if its sign doesn't fit its kind."""
    with pytest.raises(FieldInvalid) as refusal:
        post(account(), Draft(kind, "test", amount, state=state), NOW)
    assert refusal.value.field == "transaction.amount"


def test_a_declined_charge_is_recorded_in_debt_too() -> None:
    """A recorded charge has the balance of the account, even if that is negative."""
    draft = Draft(CHARGE, "ai_chat", -7, state=FAILED)
    after, posting = record(account(debt=4, credit_limit=5), draft, NOW)
    assert (after.balance, after.debt, posting.balance_after, posting.allocations) == (-4, 4, -4, ())


@pytest.mark.parametrize(
    ("amount", "borrows", "is_refused"),
    [
        (-LOTS_TAKEN_MAX, False, False),
        (-LOTS_TAKEN_MAX - 1, False, True),
        (-LOTS_TAKEN_MAX - 5, False, True),
        (-LOTS_TAKEN_MAX - 3, True, False),
    ],
    ids=["as many as allowed", "one more", "all", "a debt does not count"],
)
@pytest.mark.parametrize("kind", [CHARGE, ADJUSTMENT])
def test_the_lots_of_one_transaction_are_limited(
    kind: Kind, amount: Millionths, borrows: bool, is_refused: bool
) -> None:
    """A transaction from too many lots is refused with the largest possible amount, which is then accepted."""
    lots = LOTS_TAKEN_MAX if borrows else LOTS_TAKEN_MAX + 5
    state = account(*(lot(number, 1) for number in range(1, lots + 1)), credit_limit=3 if borrows else 0)
    if not is_refused:
        after, _ = post(state, Draft(kind, "test", amount), NOW)
        assert after.open_lot_count == len(after.lots) == max(0, lots + amount)
        return
    with pytest.raises(TooManyLots) as refusal:
        post(state, Draft(kind, "test", amount), NOW)
    assert refusal.value.metadata == {"account": "accounts/acme", "lot_limit": "1000", "largest_amount": "0.001"}
    assert len(post(state, Draft(kind, "test", -1000), NOW)[0].lots) == 5


@pytest.mark.parametrize("kind", [GRANT, ADJUSTMENT])
def test_incoming_credits_have_no_limit_of_lots(kind: Kind) -> None:
    """A transaction that adds credits is accepted for any number of open lots."""
    state = account(*(lot(number, 1) for number in range(1, 3001)))
    after, _ = post(state, Draft(kind, "purchase", 5, expire_time=NOW + HOUR), NOW)
    assert (after.open_lot_count, after.expiring, after.lots[0].number) == (3001, 5, 3001)


def partly_loaded(state: AccountState, count: int) -> AccountState:
    """The state with only the first `count` lots in spending order loaded."""
    edge = state.lots[count - 1].spending_order if count else ()
    return state._replace(lots=state.lots[:count], edge=edge if count < len(state.lots) else None)


@pytest.mark.parametrize(
    ("count", "amount", "lacks"),
    [(0, 0, False), (0, 1, True), (1, 10, False), (1, 11, True), (2, 20, False), (2, 21, True), (3, 30, False)],
)
def test_a_state_lacks_lots_until_they_hold_the_amount(count: int, amount: Millionths, lacks: bool) -> None:
    """A state lacks lots until the loaded lots up to the edge hold the amount."""
    state = partly_loaded(account(*THREE_LOTS), count)
    assert state.lacks_lots(amount) is lacks
    # An amount beyond the balance is refused in any case, so no lots are lacking.
    assert not state.lacks_lots(31)


any_lots = st.lists(
    st.tuples(st.integers(1, 9), st.none() | st.integers(NOW + 1, NOW + 5), st.integers(-1, 1)), min_size=1, max_size=12
).map(lambda rows: [lot(number, *row) for number, row in enumerate(rows, 1)])


@given(any_lots, st.integers(0, 12), st.lists(st.integers(-25, 25).filter(bool), max_size=6), st.integers(-1, 1))
def test_partly_loaded_lots_make_no_difference(
    lots: list[Lot], count: int, amounts: list[Millionths], priority: int
) -> None:
    """For any part of the lots loaded first, postings have the same allocations as with all lots loaded."""
    whole = account(*lots, credit_limit=20)
    part = partly_loaded(whole, min(count, len(lots)))
    for amount in amounts:
        draft = Draft(ADJUSTMENT, "correction", amount, priority=priority if amount > 0 else 0)
        while part.lacks_lots(max(0, -amount)):
            stored = sort_lots(lots)
            count = 1 + sum(each.spending_order <= part.edge for each in stored if part.edge is not None)
            edge = stored[count - 1].spending_order if count < len(stored) else None
            added = [each for each in stored[:count] if part.edge is None or each.spending_order > part.edge]
            part = part.with_loaded(added, edge, part.horizon)
        try:
            whole, expected = post(whole, draft, NOW)
        except DaybookError as refusal:
            with pytest.raises(type(refusal)):
                post(part, draft, NOW)
            continue
        part, posting = post(part, draft, NOW)
        assert posting == expected
        assert set(part.lots) <= set(whole.lots)
        assert part._replace(lots=whole.lots, edge=None) == whole


def test_a_lot_behind_the_edge_is_not_spent() -> None:
    """A new lot that follows unloaded lots in spending order is not spent before they are loaded."""
    state = partly_loaded(account(*THREE_LOTS), 1)
    state, _ = post(state, Draft(GRANT, "purchase", 100), NOW)
    assert remainders(state) == [(3, 10), (4, 100)]
    assert not state.lacks_lots(10)
    assert state.lacks_lots(11)
    with pytest.raises(RuntimeError):
        withdraw(state, 11)
    state = state.with_loaded(THREE_LOTS, None, state.horizon)
    assert moved(withdraw(state, 31)[1]) == [(3, -10), (2, -10), (1, -10), (4, -1)]


def test_lots_beyond_the_limit_are_not_loaded() -> None:
    """A state lacks no lots for an amount that takes from too many lots: it is refused in any case."""
    state = partly_loaded(account(*(lot(number, 1) for number in range(1, 5001))), LOTS_TAKEN_MAX + 1)
    assert not state.lacks_lots(2000)
    with pytest.raises(TooManyLots):
        withdraw(state, 2000)


def test_portions_pay_debt_and_then_go_into_lots() -> None:
    """Each portion pays back remaining debt, then goes into its lot, open or closed, or into a new lot."""
    closed = Lot(2, 2, Terms(NOW + 9), 10, 0)
    state = account(debt=5)._replace(lot_count=4, sequence=20)
    after, allocations = put(
        state, [Portion(3, Terms(NOW + 7)), Portion(4, closed.terms, closed), Portion(6, PERMANENT)]
    )
    assert moved(allocations) == [(CREDIT_LINE, 3), (CREDIT_LINE, 2), (2, 2), (5, 6)]
    assert after.lots == (closed._replace(remaining=2), Lot(5, 21, PERMANENT, 6, 6))
    assert (after.debt, after.lot_count, after.balance) == (0, 5, 8)


def test_a_portion_is_added_to_the_lot_of_the_state() -> None:
    """A portion raises the lot of the state, even if the portion's copy of the lot is stale."""
    current = Lot(1, 1, PERMANENT, 10, 6)
    stale = current._replace(remaining=0)
    after, _ = put(account(current), [Portion(1, PERMANENT, stale), Portion(2, PERMANENT, current)])
    assert after.lots == (current._replace(remaining=9),)


@pytest.mark.parametrize(
    ("lots", "debt", "credit_limit", "amount", "borrow", "outcome"),
    [
        pytest.param([lot(1, 10)], 0, 5, 15, True, -5, id="borrowing all"),
        pytest.param([lot(1, 10)], 0, 5, 16, True, "0.000015", id="beyond the limit"),
        pytest.param([lot(1, 10)], 0, 5, 10, False, 0, id="the whole balance"),
        pytest.param([lot(1, 10)], 0, 5, 11, False, "0.00001", id="no borrowing"),
        pytest.param([], 0, 5, 1, False, "0", id="no borrowing from nothing"),
        pytest.param([], 3, 5, 1, False, "0", id="no borrowing in debt"),
        pytest.param([], 3, 5, 2, True, -5, id="borrowing more"),
    ],
)
def test_a_withdrawal_is_limited(
    lots: list[Lot], debt: Millionths, credit_limit: Millionths, amount: Millionths, borrow: bool, outcome: int | str
) -> None:
    """A withdrawal results in the new balance, or is refused with the available amount in credits."""
    state = account(*lots, debt=debt, credit_limit=credit_limit)
    if isinstance(outcome, int):
        after, allocations = withdraw(state, amount, borrow=borrow)
        assert (after.balance, sum(each.amount for each in allocations)) == (outcome, -amount)
        return
    with pytest.raises(InsufficientCredits) as refusal:
        withdraw(state, amount, borrow=borrow)
    assert refusal.value.metadata["available_amount"] == outcome


@pytest.mark.parametrize(
    ("now", "last_create_time", "expirations"),
    [
        pytest.param(NOW + HOUR - 1, NOW, [], id="a microsecond before"),
        pytest.param(NOW + HOUR, NOW, [(3, NOW + HOUR, 20)], id="at the expire_time"),
        pytest.param(NOW + HOUR + 1, NOW, [(3, NOW + HOUR, 20)], id="a microsecond after"),
        pytest.param(
            NOW + 2 * HOUR, NOW, [(3, NOW + HOUR, 20), (2, NOW + 2 * HOUR, 10)], id="two, each at its expire_time"
        ),
        pytest.param(
            NOW + 99 * HOUR,
            NOW,
            [(3, NOW + HOUR, 20), (2, NOW + 2 * HOUR, 10)],
            id="long after",
        ),
        pytest.param(NOW - HOUR, NOW, [], id="the clock went back"),
        pytest.param(NOW, NOW + HOUR, [], id="only the newest transaction is at the expire_time"),
        pytest.param(NOW + HOUR - 1, NOW + 99 * HOUR, [], id="only the newest transaction is long after"),
        pytest.param(NOW + HOUR, NOW + 99 * HOUR, [(3, NOW + 99 * HOUR, 20)], id="a newest transaction that is ahead"),
        pytest.param(
            NOW + 2 * HOUR,
            NOW + HOUR + 5,
            [(3, NOW + HOUR + 5, 20), (2, NOW + 2 * HOUR, 10)],
            id="never before the newest transaction",
        ),
    ],
)
def test_each_expired_lot_has_an_expiration(
    now: Instant, last_create_time: Instant, expirations: list[tuple[int, Instant, Millionths]]
) -> None:
    """Each expired lot gets its own expiration, the earliest first, dated at its expire_time."""
    state = account(*THREE_LOTS, last_create_time=last_create_time)
    steps = expire_due(state, now)
    assert [
        (posting.allocations[0].lot_number, posting.create_time, posting.balance_after) for _, posting in steps
    ] == expirations
    for sequence, (after, posting) in enumerate(steps, 4):
        assert (posting.kind, posting.category, posting.state) == (EXPIRATION, "expiration", SUCCEEDED)
        assert (posting.amount, posting.sequence, expiring_and_permanent(posting.allocations)) == (
            -10,
            sequence,
            (-10, 0),
        )
        assert (after.balance, after.sequence, after.last_create_time) == (
            posting.balance_after,
            sequence,
            posting.create_time,
        )
        assert posting.allocations[0].lot_number not in [each.number for each in after.lots]


def test_expirations_of_one_instant_come_in_the_order_of_their_lots() -> None:
    """Lots with the same expire_time expire the oldest first, whatever their priority."""
    state = account(lot(1, 1, NOW, 9), lot(2, 2, NOW, -9), lot(3, 3, NOW, 0), last_create_time=NOW - 1)
    assert [posting.amount for _, posting in expire_due(state, NOW)] == [-1, -2, -3]


def test_only_what_remains_expires() -> None:
    """An expiration takes the remaining amount, and an account without expired lots has no expirations."""
    state = account(Lot(1, 1, Terms(NOW), 100, 30), lot(2, 5))
    ((after, posting),) = expire_due(state, NOW)
    assert (posting.amount, posting.allocations) == (-30, (Allocation(1, -30, Terms(NOW)),))
    assert (after.balance, remainders(after)) == (5, [(2, 5)])
    assert expire_due(after, NOW + 99 * HOUR) == []


@pytest.mark.parametrize(
    ("now", "balance", "expiring", "left"),
    [
        pytest.param(NOW, 30, 20, [3, 2, 1], id="before"),
        pytest.param(NOW + HOUR - 1, 30, 20, [3, 2, 1], id="a microsecond before"),
        pytest.param(NOW + HOUR, 20, 10, [2, 1], id="at the expire_time"),
        pytest.param(NOW + 2 * HOUR - 1, 20, 10, [2, 1], id="a microsecond before the second"),
        pytest.param(NOW + 2 * HOUR, 10, 0, [1], id="at the second"),
        pytest.param(NOW + 999 * HOUR, 10, 0, [1], id="much later"),
    ],
)
def test_the_state_at_an_instant_is_without_expired_lots(
    now: Instant, balance: Millionths, expiring: Millionths, left: list[int]
) -> None:
    """A lot leaves the state at exactly its expire_time, and the rest of the state is unchanged."""
    state = account(*THREE_LOTS, credit_limit=4, last_create_time=NOW)
    result = state.at(now)
    assert (result.balance, result.expiring, [each.number for each in result.lots]) == (balance, expiring, left)
    assert result.available == balance + 4
    assert result == state._replace(balance=balance, lots=result.lots, open_lot_count=len(left), expiring=expiring)


def test_an_expiration_takes_only_credits_of_its_lot() -> None:
    """An expiration takes only the unspent 20 of its lot of 100, not the 50 permanent credits granted later."""
    state, _ = post(account(), Draft(GRANT, "promotion", 100, expire_time=NOW + HOUR), NOW)
    state, _ = post(state, Draft(CHARGE, "ai_chat", -80), NOW)
    state, _ = post(state, Draft(GRANT, "purchase", 50), NOW)
    ((state, expiration),) = expire_due(state, NOW + HOUR)
    assert (expiration.amount, expiration.balance_after, state.balance) == (-20, 50, 50)
    assert remainders(state) == [(2, 50)]


@pytest.mark.parametrize(
    ("now", "amount", "outcome"),
    [
        (NOW + HOUR - 1, -100, [(CHARGE, -100, 0, NOW + HOUR - 1)]),
        (NOW + HOUR, -100, InsufficientCredits),
        (NOW + HOUR, -40, [(EXPIRATION, -60, 40, NOW + HOUR), (CHARGE, -40, 0, NOW + HOUR)]),
        (NOW + 9 * HOUR, -40, [(EXPIRATION, -60, 40, NOW + HOUR), (CHARGE, -40, 0, NOW + 9 * HOUR)]),
    ],
)
def test_an_expired_lot_is_never_spent(
    now: Instant, amount: Millionths, outcome: list[tuple[Kind, Millionths, Millionths, Instant]] | type[DaybookError]
) -> None:
    """Of 60 expiring and 40 permanent credits, a charge at the expire_time can take only the 40."""
    state = account(lot(1, 60, NOW + HOUR), lot(2, 40), last_create_time=NOW)
    if isinstance(outcome, type):
        with pytest.raises(outcome):
            post_after_expirations(state, Draft(CHARGE, "ai_chat", amount), now)
        return
    _, postings = post_after_expirations(state, Draft(CHARGE, "ai_chat", amount), now)
    assert [(each.kind, each.amount, each.balance_after, each.create_time) for each in postings] == outcome


def test_an_expiration_stays_if_the_clock_goes_back() -> None:
    """If the clock goes back after an expiration, the lot stays expired and create_times stay in order."""
    state = account(lot(1, 60, NOW), lot(2, 40), last_create_time=NOW - HOUR)
    state, postings = post_after_expirations(state, Draft(CHARGE, "ai_chat", -10), NOW)
    state, more = post_after_expirations(state, Draft(CHARGE, "ai_chat", -10), NOW - 1)
    assert [(each.amount, each.create_time) for each in (*postings, *more)] == [(-60, NOW), (-10, NOW), (-10, NOW)]
    assert remainders(state) == [(2, 20)]


@pytest.mark.parametrize(
    ("draft", "now", "window"),
    [
        pytest.param(Draft(CHARGE, "computing", -3, is_usage=True), NOW, (4, NOW, 13, 20), id="usage"),
        pytest.param(Draft(CHARGE, "serverless", -3, is_usage=True), NOW, (4, NOW, 10, 23), id="serverless usage"),
        pytest.param(Draft(CHARGE, "computing", -3, is_usage=True), NOW + HOUR, (5, NOW + HOUR, 3, 0), id="next hour"),
        pytest.param(Draft(CHARGE, "computing", -3, is_usage=True), NOW - 1, (4, NOW, 13, 20), id="clock went back"),
        pytest.param(Draft(CHARGE, "inference", -3, is_usage=True), NOW, (4, NOW, 10, 20), id="another category"),
        pytest.param(Draft(CHARGE, "computing", -3), NOW, (4, NOW, 10, 20), id="no usage subject"),
        pytest.param(Draft(GRANT, "computing", 3, is_usage=True), NOW, (4, NOW, 10, 20), id="a grant"),
        pytest.param(Draft(ADJUSTMENT, "computing", -3, is_usage=True), NOW, (4, NOW, 10, 20), id="an adjustment"),
        pytest.param(
            Draft(CHARGE, "computing", -3, state=FAILED, is_usage=True), NOW, (4, NOW, 10, 20), id="a failed charge"
        ),
    ],
)
def test_a_charge_of_usage_is_added_to_its_window(
    draft: Draft, now: Instant, window: tuple[int, Instant, Millionths, Millionths]
) -> None:
    """A successful charge of usage is added to the window of its create_time; no other transaction is."""
    state = account(lot(1, 100), last_create_time=NOW, window=UsageWindow(4, NOW, 10, 20))
    assert post(state, draft, now)[0].window == UsageWindow(*window)


def test_borrowed_usage_counts_in_full() -> None:
    """A charge of usage counts in full, even if a part of it is borrowed."""
    state = account(lot(1, 1), credit_limit=9, last_create_time=NOW)
    assert post(state, Draft(CHARGE, "computing", -10, is_usage=True), NOW)[0].window == UsageWindow(1, NOW, 10, 0)


def test_a_posting_describes_the_transaction() -> None:
    """A posting has its draft's kind, category and amount, the next sequence, its create_time and the new balance."""
    before = account(lot(1, 10))._replace(sequence=41)
    after, posting = post(before, Draft(CHARGE, "booking", -3), NOW)
    assert posting == Posting(CHARGE, "booking", SUCCEEDED, -3, 42, NOW, 7, (Allocation(1, -3, PERMANENT),), PERMANENT)
    assert after == before._replace(balance=7, lots=(Lot(1, 1, PERMANENT, 10, 7),), sequence=42, last_create_time=NOW)


drafts = st.builds(
    Draft,
    kind=st.sampled_from((GRANT, CHARGE, ADJUSTMENT)),
    category=st.just("computing"),
    amount=st.integers(-30, 30),
    state=st.sampled_from((SUCCEEDED, SUCCEEDED, SUCCEEDED, FAILED, CANCELED)),
    is_usage=st.booleans(),
    expire_time=st.none() | st.integers(NOW, NOW + 40),
    priority=st.integers(-1, 1),
)


@given(st.lists(st.tuples(drafts, st.integers(-3, 8) | st.integers(-99, 99)), max_size=30), st.integers(0, 40))
def test_the_books_always_add_up(steps: list[tuple[Draft, Instant]], credit_limit: Millionths) -> None:
    """After any drafts at any times, balance, lots, debt, allocations, sequences and times are consistent."""
    state, now = account(credit_limit=credit_limit, last_create_time=0), NOW
    postings: list[Posting] = []
    for draft, elapsed in steps:
        now += elapsed
        try:
            state, posted = post_after_expirations(state, draft, now)
        except DaybookError:
            continue
        postings += posted
        assert state.balance == sum(each.remaining for each in state.lots) - state.debt >= -credit_limit
        assert state.debt == 0 or not state.lots
        assert state.lots == sort_lots(state.lots)
        assert all(0 < each.remaining <= each.amount for each in state.lots)
        assert not [each for each in state.lots if each.terms.have_expired(now)]
    balance = 0
    for sequence, posting in enumerate(postings, 1):
        moves = posting.state == SUCCEEDED
        balance += posting.amount if moves else 0
        assert (posting.sequence, posting.balance_after) == (sequence, balance)
        assert sum(each.amount for each in posting.allocations) == (posting.amount if moves else 0)
        assert sum(expiring_and_permanent(posting.allocations)) == (posting.amount if moves else 0)
    assert [each.create_time for each in postings] == sorted(each.create_time for each in postings)
