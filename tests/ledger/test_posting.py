"""The rules of posting: what is refused and in which order, what moves in which lot, and when."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from daybook.v1.transaction_pb2 import Transaction
from hypothesis import given
from hypothesis import strategies as st

from server.ledger.errors import BalanceOutOfRange, DaybookError, FieldInvalid, InsufficientCredits, TooManyLots
from server.ledger.instants import HOUR, Instant
from server.ledger.lots import CREDIT_LINE, PERMANENT, Allocation, Lot, Terms, parts, sort_lots
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


def holding(balance: Millionths, credit_limit: Millionths) -> AccountState:
    """An account with a balance: one permanent lot of it, or a debt."""
    if balance > 0:
        return account(lot(1, balance), credit_limit=credit_limit)
    return account(debt=-balance, credit_limit=credit_limit)


def moved(allocations: Sequence[Allocation]) -> list[tuple[int, Millionths]]:
    """Each allocation's lot and amount."""
    return [(each.lot_number, each.amount) for each in allocations]


def remainders(state: AccountState) -> list[tuple[int, Millionths]]:
    """Each open lot's number and what is left of it, in spending order."""
    return [(each.number, each.remaining) for each in state.lots]


def follow(state: AccountState, draft: Draft, now: Instant) -> tuple[AccountState, list[Posting]]:
    """Posts as the service does: what is due expires first."""
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
        # A limit that was lowered undoes nothing: what adds is taken, what removes is not.
        (GRANT, -10, 5, 1, -9),
        (GRANT, -10, 5, 11, 1),
        (ADJUSTMENT, -10, 5, 1, -9),
        (CHARGE, -10, 5, -1, InsufficientCredits),
        # No request can give such a limit, but the range does not depend on that.
        (CHARGE, -LARGEST, 2 * LARGEST, -1, BalanceOutOfRange),
        (ADJUSTMENT, -LARGEST, 2 * LARGEST, -1, BalanceOutOfRange),
        # Several faults at once: the sign is told before missing credits, and those before the range.
        (GRANT, -LARGEST, 0, -LARGEST, FieldInvalid),
        (CHARGE, LARGEST, 0, LARGEST, FieldInvalid),
        (CHARGE, -LARGEST, 0, -LARGEST, InsufficientCredits),
        (ADJUSTMENT, -LARGEST, LARGEST, -1, InsufficientCredits),
    ],
)
def test_balances_and_refusals(
    kind: Kind,
    balance: Millionths,
    credit_limit: Millionths,
    amount: Millionths,
    outcome: Millionths | type[DaybookError],
) -> None:
    """A draft of a kind gives the new balance, or the first of the errors that apply."""
    state, draft = holding(balance, credit_limit), Draft(kind, "test", amount)
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
            id="adjustment by nothing",
        ),
        pytest.param(
            Draft(ADJUSTMENT, "correction", 5, expire_time=NOW - 1),
            account(),
            FieldInvalid("transaction.expire_time", "must be in the future"),
            id="adjustment that is past",
        ),
    ],
)
def test_precedence_of_refusals(draft: Draft, state: AccountState, refusal: DaybookError) -> None:
    """Of several faults the first in the documented order is told, in words that name the field or account."""
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
        # The limit was lowered below what is used already.
        (-500_000, 250_000, "0"),
    ],
)
def test_missing_credits_are_told_in_credits(
    balance: Millionths, credit_limit: Millionths, available_amount: str
) -> None:
    """The refusal names the account, what is asked for, and what is available, which is never below 0."""
    state = holding(balance, credit_limit)
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
        pytest.param([], 4, 10, 6, 0, id="owing"),
        pytest.param([], 10, 10, 0, 0, id="owing all of the limit"),
        pytest.param([], 11, 10, 0, 0, id="owing more than the limit"),
        pytest.param([lot(1, LARGEST)], 0, 1, LARGEST, 0, id="more than an amount can say"),
    ],
)
def test_what_an_account_holds(
    lots: list[Lot], debt: Millionths, credit_limit: Millionths, available: Millionths, expiring: Millionths
) -> None:
    """Available is the balance and the limit, held to what an amount can say; expiring is what has a date of expiry."""
    state = account(*lots, debt=debt, credit_limit=credit_limit)
    assert (state.available, state.expiring) == (available, expiring)


# Lots 1 to 3 of 10 each: permanent, expiring later, expiring sooner. Spent: 3, 2, 1.
THREE_LOTS = (lot(1, 10), lot(2, 10, NOW + 2 * HOUR), lot(3, 10, NOW + HOUR))


@pytest.mark.parametrize(
    ("amount", "allocations", "left", "debt", "expiring_amount", "permanent_amount"),
    [
        pytest.param(-1, [(3, -1)], [(3, 9), (2, 10), (1, 10)], 0, -1, 0, id="of one"),
        pytest.param(-10, [(3, -10)], [(2, 10), (1, 10)], 0, -10, 0, id="exactly one"),
        pytest.param(-11, [(3, -10), (2, -1)], [(2, 9), (1, 10)], 0, -11, 0, id="of two"),
        pytest.param(-20, [(3, -10), (2, -10)], [(1, 10)], 0, -20, 0, id="all that expires"),
        pytest.param(-26, [(3, -10), (2, -10), (1, -6)], [(1, 4)], 0, -20, -6, id="of three"),
        pytest.param(-30, [(3, -10), (2, -10), (1, -10)], [], 0, -20, -10, id="all there is"),
        pytest.param(-31, [(3, -10), (2, -10), (1, -10), (0, -1)], [], 1, -20, -11, id="one is borrowed"),
        pytest.param(-40, [(3, -10), (2, -10), (1, -10), (0, -10)], [], 10, -20, -20, id="up to the limit"),
    ],
)
@pytest.mark.parametrize("kind", [CHARGE, ADJUSTMENT])
def test_what_a_charge_takes(
    kind: Kind,
    amount: Millionths,
    allocations: list[tuple[int, Millionths]],
    left: list[tuple[int, Millionths]],
    debt: Millionths,
    expiring_amount: Millionths,
    permanent_amount: Millionths,
) -> None:
    """A charge takes from the lots in spending order, borrows the rest, and says how much of it could expire."""
    state, posting = post(account(*THREE_LOTS, credit_limit=10), Draft(kind, "test", amount), NOW)
    assert moved(posting.allocations) == allocations
    assert (remainders(state), state.debt) == (left, debt)
    assert parts(posting.allocations) == (expiring_amount, permanent_amount)
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
def test_what_comes_in_pays_back_first(
    kind: Kind,
    amount: Millionths,
    expire_time: Instant | None,
    allocations: list[tuple[int, Millionths]],
    lots: list[Lot],
    debt: Millionths,
    expiring_amount: Millionths,
    permanent_amount: Millionths,
) -> None:
    """Of a debt of 10 is paid back what comes in; only what is left over opens a lot, and only that can expire."""
    priority = 6 if expire_time else 0
    draft = Draft(kind, "purchase", amount, expire_time=expire_time, priority=priority)
    state, posting = post(account(debt=10, credit_limit=10), draft, NOW)
    assert moved(posting.allocations) == allocations
    assert state.lots == tuple(lots)
    assert (state.debt, state.balance, state.lot_count) == (debt, amount - 10, len(lots))
    assert parts(posting.allocations) == (expiring_amount, permanent_amount)


@pytest.mark.parametrize(
    ("expire_time", "time_to_live", "priority", "terms"),
    [
        pytest.param(None, None, 0, PERMANENT, id="permanent"),
        pytest.param(None, None, -1000, Terms(None, -1000), id="of a priority"),
        pytest.param(NOW + 1, None, 0, Terms(NOW + 1), id="the shortest life"),
        pytest.param(NOW + HOUR, None, 5, Terms(NOW + HOUR, 5), id="until a date"),
        pytest.param(None, 1, 0, Terms(NOW + 1), id="for a microsecond"),
        pytest.param(None, HOUR, 7, Terms(NOW + HOUR, 7), id="for an hour"),
    ],
)
@pytest.mark.parametrize("kind", [GRANT, ADJUSTMENT])
def test_the_lot_that_a_grant_opens(
    kind: Kind, expire_time: Instant | None, time_to_live: Instant | None, priority: int, terms: Terms
) -> None:
    """A grant opens the next lot, full, on its terms, and the posting tells these terms."""
    draft = Draft(kind, "purchase", 8, expire_time=expire_time, time_to_live=time_to_live, priority=priority)
    state, posting = post(account()._replace(sequence=41, lot_count=5), draft, NOW)
    assert state.lots == (Lot(6, 42, terms, 8, 8),)
    assert posting.allocations == (Allocation(6, 8, terms),)
    assert posting.terms == terms


def test_a_new_lot_takes_its_place_in_the_order() -> None:
    """After a grant the open lots are still in spending order, wherever the new one belongs."""
    draft = Draft(GRANT, "purchase", 10, expire_time=NOW + HOUR + 1)
    assert remainders(post(account(*THREE_LOTS), draft, NOW)[0]) == [(3, 10), (4, 10), (2, 10), (1, 10)]


@pytest.mark.parametrize(
    ("now", "last_create_time", "expire_time", "accepted"),
    [
        (NOW, NOW, NOW - HOUR, False),
        (NOW, NOW, NOW - 1, False),
        (NOW, NOW, NOW, False),
        (NOW, NOW, NOW + 1, True),
        # The account's newest transaction is ahead of the clock, by which its credits are good.
        (NOW - HOUR, NOW, NOW - HOUR, False),
        (NOW - HOUR, NOW, NOW - HOUR + 1, True),
        (NOW - HOUR, NOW, NOW, True),
        (NOW, NOW - HOUR, NOW - 1, False),
        (NOW, NOW, 0, False),
    ],
)
def test_credits_must_outlive_their_grant(
    now: Instant, last_create_time: Instant, expire_time: Instant, accepted: bool
) -> None:
    """Credits that are past by the clock are refused, whatever the account's newest create_time is."""
    state, draft = account(last_create_time=last_create_time), Draft(GRANT, "purchase", 1, expire_time=expire_time)
    if accepted:
        assert post(state, draft, now)[0].balance == 1
        return
    with pytest.raises(FieldInvalid) as refusal:
        post(state, draft, now)
    assert refusal.value.field == "transaction.expire_time"


def test_a_time_to_live_begins_now() -> None:
    """Credits live as long as asked for by the clock, also where the account's newest create_time is ahead of it."""
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
def test_time_never_decreases(
    kind: Kind, amount: Millionths, state: State, last_create_time: Instant, now: Instant, create_time: Instant
) -> None:
    """A transaction gets the time of the clock, or of its predecessor where the clock went back."""
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
        pytest.param(Draft(CHARGE, "ai_chat", -LARGEST), id="more than there is"),
        pytest.param(Draft(GRANT, "purchase", LARGEST), id="out of range"),
        pytest.param(Draft(GRANT, "purchase", 5, expire_time=NOW - HOUR), id="past"),
        pytest.param(Draft(GRANT, "purchase", 5, expire_time=NOW + HOUR, priority=3), id="expiring"),
        pytest.param(Draft(CHARGE, "computing", -5, is_usage=True), id="usage"),
    ],
)
@pytest.mark.parametrize("state", [FAILED, CANCELED])
@pytest.mark.parametrize("lots", [(), (lot(1, 10, NOW + 1),)], ids=["empty", "holding"])
def test_what_failed_moves_nothing(lots: tuple[Lot, ...], state: State, draft: Draft) -> None:
    """A FAILED or CANCELED transaction takes a sequence and a time and leaves all else as it was.

    What it says of the credits that it would have brought is kept with it.
    """
    before = account(*lots, window=UsageWindow(2, NOW - HOUR, 3, 4))._replace(sequence=8)
    after, posting = post(before, draft._replace(state=state), NOW)
    assert after == before._replace(sequence=9, last_create_time=NOW)
    terms = Terms(draft.expire_time, draft.priority)
    assert posting == Posting(draft.kind, draft.category, state, draft.amount, 9, NOW, before.balance, (), terms)
    assert parts(posting.allocations) == (0, 0)


@pytest.mark.parametrize(("kind", "amount"), [(GRANT, -1), (GRANT, 0), (CHARGE, 1), (CHARGE, 0), (ADJUSTMENT, 0)])
@pytest.mark.parametrize("state", [FAILED, CANCELED])
def test_what_failed_still_has_the_sign_of_its_kind(state: State, kind: Kind, amount: Millionths) -> None:
    """Also a transaction that moves nothing is refused if its sign doesn't fit its kind."""
    with pytest.raises(FieldInvalid) as refusal:
        post(account(), Draft(kind, "test", amount, state=state), NOW)
    assert refusal.value.field == "transaction.amount"


def test_a_declined_charge_is_recorded_in_debt_too() -> None:
    """A record has the balance of the account, also where that is negative."""
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
    ids=["as many as may be", "one more", "all", "a debt is no lot"],
)
@pytest.mark.parametrize("kind", [CHARGE, ADJUSTMENT])
def test_one_transaction_takes_from_so_many_lots(
    kind: Kind, amount: Millionths, borrows: bool, is_refused: bool
) -> None:
    """Beyond the limit it is refused, and the refusal says how much can be taken at once: exactly that."""
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
def test_credits_come_in_however_many_lots_are_open(kind: Kind) -> None:
    """Nothing that adds credits is refused for the number of lots."""
    state = account(*(lot(number, 1) for number in range(1, 3001)))
    after, _ = post(state, Draft(kind, "purchase", 5, expire_time=NOW + HOUR), NOW)
    assert (after.open_lot_count, after.expiring, after.lots[0].number) == (3001, 5, 3001)


def known(state: AccountState, count: int) -> AccountState:
    """The state of which only the first lots in spending order are known."""
    edge = state.lots[count - 1].spending_order if count else ()
    return state._replace(lots=state.lots[:count], edge=edge if count < len(state.lots) else None)


@pytest.mark.parametrize(
    ("count", "amount", "lacks"),
    [(0, 0, False), (0, 1, True), (1, 10, False), (1, 11, True), (2, 20, False), (2, 21, True), (3, 30, False)],
)
def test_which_lots_an_amount_needs(count: int, amount: Millionths, lacks: bool) -> None:
    """Lots are lacking until those that are known up to the edge hold the amount."""
    state = known(account(*THREE_LOTS), count)
    assert state.lacks_lots(amount) is lacks
    # More than there is will be refused, whatever the lots are.
    assert not state.lacks_lots(31)


any_lots = st.lists(
    st.tuples(st.integers(1, 9), st.none() | st.integers(NOW + 1, NOW + 5), st.integers(-1, 1)), min_size=1, max_size=12
).map(lambda rows: [lot(number, *row) for number, row in enumerate(rows, 1)])


@given(any_lots, st.integers(0, 12), st.lists(st.integers(-25, 25).filter(bool), max_size=6), st.integers(-1, 1))
def test_what_is_known_makes_no_difference(
    lots: list[Lot], count: int, amounts: list[Millionths], priority: int
) -> None:
    """Whatever part of the lots is known at first, postings move the same credits in the same lots."""
    whole = account(*lots, credit_limit=20)
    part = known(whole, min(count, len(lots)))
    for amount in amounts:
        draft = Draft(ADJUSTMENT, "correction", amount, priority=priority if amount > 0 else 0)
        while part.lacks_lots(max(0, -amount)):
            stored = sort_lots(lots)
            reached = 1 + sum(each.spending_order <= part.edge for each in stored if part.edge is not None)
            edge = stored[reached - 1].spending_order if reached < len(stored) else None
            touched = [each for each in stored[:reached] if part.edge is None or each.spending_order > part.edge]
            part = part.with_loaded(touched, edge, part.horizon)
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


def test_a_lot_behind_the_edge_does_not_count() -> None:
    """A lot that was granted behind lots that are not known is known, but not spent before them."""
    state = known(account(*THREE_LOTS), 1)
    state, _ = post(state, Draft(GRANT, "purchase", 100), NOW)
    assert remainders(state) == [(3, 10), (4, 100)]
    assert not state.lacks_lots(10)
    assert state.lacks_lots(11)
    with pytest.raises(RuntimeError):
        withdraw(state, 11)
    state = state.with_loaded(THREE_LOTS, None, state.horizon)
    assert moved(withdraw(state, 31)[1]) == [(3, -10), (2, -10), (1, -10), (4, -1)]


def test_lots_beyond_the_limit_are_not_lacking() -> None:
    """An amount that will be refused for the number of its lots needs no more of them known."""
    state = known(account(*(lot(number, 1) for number in range(1, 5001))), LOTS_TAKEN_MAX + 1)
    assert not state.lacks_lots(2000)
    with pytest.raises(TooManyLots):
        withdraw(state, 2000)


def test_portions_go_where_they_belong() -> None:
    """Each portion pays what is still owed, then goes into its lot, open or closed, or into a new one."""
    closed = Lot(2, 2, Terms(NOW + 9), 10, 0)
    state = account(debt=5)._replace(lot_count=4, sequence=20)
    after, allocations = put(
        state, [Portion(3, Terms(NOW + 7)), Portion(4, closed.terms, closed), Portion(6, PERMANENT)]
    )
    assert moved(allocations) == [(CREDIT_LINE, 3), (CREDIT_LINE, 2), (2, 2), (5, 6)]
    assert after.lots == (closed._replace(remaining=2), Lot(5, 21, PERMANENT, 6, 6))
    assert (after.debt, after.lot_count, after.balance) == (0, 5, 8)


def test_a_portion_is_added_to_what_its_lot_holds_now() -> None:
    """Credits that go back raise the lot as it is in the state, whatever copy of it came along."""
    current = Lot(1, 1, PERMANENT, 10, 6)
    stale = current._replace(remaining=0)
    after, _ = put(account(current), [Portion(1, PERMANENT, stale), Portion(2, PERMANENT, current)])
    assert after.lots == (current._replace(remaining=9),)


@pytest.mark.parametrize(
    ("lots", "debt", "credit_limit", "amount", "borrow", "outcome"),
    [
        pytest.param([lot(1, 10)], 0, 5, 15, True, -5, id="borrowing all"),
        pytest.param([lot(1, 10)], 0, 5, 16, True, "0.000015", id="more than may be borrowed"),
        pytest.param([lot(1, 10)], 0, 5, 10, False, 0, id="all there is"),
        pytest.param([lot(1, 10)], 0, 5, 11, False, "0.00001", id="no borrowing"),
        pytest.param([], 0, 5, 1, False, "0", id="no borrowing from nothing"),
        pytest.param([], 3, 5, 1, False, "0", id="no borrowing while owing"),
        pytest.param([], 3, 5, 2, True, -5, id="borrowing more"),
    ],
)
def test_withdrawing(
    lots: list[Lot], debt: Millionths, credit_limit: Millionths, amount: Millionths, borrow: bool, outcome: int | str
) -> None:
    """A withdrawal gives the new balance, or is refused with what was available, in credits."""
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
            NOW + 2 * HOUR, NOW, [(3, NOW + HOUR, 20), (2, NOW + 2 * HOUR, 10)], id="two, each at its own time"
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
        pytest.param(
            NOW + HOUR, NOW + 99 * HOUR, [(3, NOW + 99 * HOUR, 20)], id="behind a newest transaction that is ahead"
        ),
        pytest.param(
            NOW + 2 * HOUR,
            NOW + HOUR + 5,
            [(3, NOW + HOUR + 5, 20), (2, NOW + 2 * HOUR, 10)],
            id="never before the newest transaction",
        ),
    ],
)
def test_expirations(
    now: Instant, last_create_time: Instant, expirations: list[tuple[int, Instant, Millionths]]
) -> None:
    """Each lot that is past expires by itself, the earliest first, dated at its expire_time."""
    state = account(*THREE_LOTS, last_create_time=last_create_time)
    steps = expire_due(state, now)
    assert [
        (posting.allocations[0].lot_number, posting.create_time, posting.balance_after) for _, posting in steps
    ] == expirations
    for sequence, (after, posting) in enumerate(steps, 4):
        assert (posting.kind, posting.category, posting.state) == (EXPIRATION, "expiration", SUCCEEDED)
        assert (posting.amount, posting.sequence, parts(posting.allocations)) == (-10, sequence, (-10, 0))
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
    """An expiration takes what is left of the lot, and an account without such lots has none."""
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
def test_the_state_at_an_instant(now: Instant, balance: Millionths, expiring: Millionths, left: list[int]) -> None:
    """A lot is gone from the state at exactly its expire_time, and nothing else of the state changes."""
    state = account(*THREE_LOTS, credit_limit=4, last_create_time=NOW)
    seen = state.at(now)
    assert (seen.balance, seen.expiring, [each.number for each in seen.lots]) == (balance, expiring, left)
    assert seen.available == balance + 4
    assert seen == state._replace(balance=balance, lots=seen.lots, open_lot_count=len(left), expiring=expiring)


def test_expiry_never_takes_credits_that_were_paid_for() -> None:
    """Grant 100 that expire, spend 80, grant 50 for good: after the expiry 50 are left, not 30 or -30."""
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
def test_a_lot_that_is_past_is_never_spent(
    now: Instant, amount: Millionths, outcome: list[tuple[Kind, Millionths, Millionths, Instant]] | type[DaybookError]
) -> None:
    """Of 60 expiring and 40 permanent credits a charge at the expire_time can have only the 40."""
    state = account(lot(1, 60, NOW + HOUR), lot(2, 40), last_create_time=NOW)
    if isinstance(outcome, type):
        with pytest.raises(outcome):
            follow(state, Draft(CHARGE, "ai_chat", amount), now)
        return
    _, postings = follow(state, Draft(CHARGE, "ai_chat", amount), now)
    assert [(each.kind, each.amount, each.balance_after, each.create_time) for each in postings] == outcome


def test_an_expiration_stays_where_the_clock_goes_back() -> None:
    """What has expired stays so, and the account goes on in order, if the clock then shows an earlier time."""
    state = account(lot(1, 60, NOW), lot(2, 40), last_create_time=NOW - HOUR)
    state, postings = follow(state, Draft(CHARGE, "ai_chat", -10), NOW)
    state, more = follow(state, Draft(CHARGE, "ai_chat", -10), NOW - 1)
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
def test_usage_goes_into_its_window(
    draft: Draft, now: Instant, window: tuple[int, Instant, Millionths, Millionths]
) -> None:
    """A charge of usage that succeeds is added to the window of its create_time, and nothing else is."""
    state = account(lot(1, 100), last_create_time=NOW, window=UsageWindow(4, NOW, 10, 20))
    assert post(state, draft, now)[0].window == UsageWindow(*window)


def test_borrowed_usage_counts_in_full() -> None:
    """Usage is what was used, also where a part of it had to be borrowed."""
    state = account(lot(1, 1), credit_limit=9, last_create_time=NOW)
    assert post(state, Draft(CHARGE, "computing", -10, is_usage=True), NOW)[0].window == UsageWindow(1, NOW, 10, 0)


def test_a_posting_says_what_was_posted() -> None:
    """A posting holds its draft's kind, category and amount, the next sequence, its time and the balance after it."""
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
    """After any drafts at any times, balance, lots, debt, allocations, sequences and times agree with each other."""
    state, now = account(credit_limit=credit_limit, last_create_time=0), NOW
    postings: list[Posting] = []
    for draft, elapsed in steps:
        now += elapsed
        try:
            state, posted = follow(state, draft, now)
        except DaybookError:
            continue
        postings += posted
        assert state.balance == sum(each.remaining for each in state.lots) - state.debt >= -credit_limit
        assert state.debt == 0 or not state.lots
        assert state.lots == sort_lots(state.lots)
        assert all(0 < each.remaining <= each.amount for each in state.lots)
        assert not [each for each in state.lots if each.terms.are_past(now)]
    balance = 0
    for sequence, posting in enumerate(postings, 1):
        moves = posting.state == SUCCEEDED
        balance += posting.amount if moves else 0
        assert (posting.sequence, posting.balance_after) == (sequence, balance)
        assert sum(each.amount for each in posting.allocations) == (posting.amount if moves else 0)
        assert sum(parts(posting.allocations)) == (posting.amount if moves else 0)
    assert [each.create_time for each in postings] == sorted(each.create_time for each in postings)
