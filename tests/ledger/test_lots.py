"""Lots: their spending order, and the allocations of an amount."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.ledger.lots import CREDIT_LINE, PERMANENT, Allocation, Lot, Terms, expiring_and_permanent, sort_lots, take

SOON, LATER = 1_000, 2_000
FIRST_EVER, LAST_EVER = -(2**62), 2**63 - 2
"""Extreme instants: terms are only compared."""


def lot(number: int, remaining: int = 10, expire_time: int | None = None, priority: int = 0) -> Lot:
    """A full lot, permanent by default."""
    return Lot(number, number, Terms(expire_time, priority), remaining, remaining)


def amounts(allocations: list[Allocation]) -> list[tuple[int, int]]:
    """Each allocation's lot and amount."""
    return [(each.lot_number, each.amount) for each in allocations]


def remainders(lots: tuple[Lot, ...]) -> list[tuple[int, int]]:
    """Each lot's number and remaining amount."""
    return [(each.number, each.remaining) for each in lots]


@pytest.mark.parametrize(
    ("lots", "order"),
    [
        pytest.param([], [], id="none"),
        pytest.param([lot(1)], [1], id="one"),
        pytest.param([lot(2), lot(1)], [1, 2], id="the older first"),
        pytest.param([lot(10), lot(9), lot(100)], [9, 10, 100], id="numbers compared as numbers, not as text"),
        pytest.param([lot(1), lot(2, expire_time=LATER)], [2, 1], id="a permanent one last"),
        pytest.param([lot(1), lot(2, expire_time=LAST_EVER)], [2, 1], id="a permanent one after the latest expiry"),
        pytest.param([lot(1, expire_time=LATER), lot(2, expire_time=SOON)], [2, 1], id="the sooner to expire first"),
        pytest.param([lot(1, expire_time=SOON + 1), lot(2, expire_time=SOON)], [2, 1], id="to the microsecond"),
        pytest.param([lot(2, expire_time=SOON), lot(1, expire_time=SOON)], [1, 2], id="one expiry: the older first"),
        pytest.param([lot(1, expire_time=0), lot(2, expire_time=FIRST_EVER)], [2, 1], id="an expiry before 1970"),
        pytest.param([lot(1, expire_time=0), lot(2)], [1, 2], id="an expiry at 0 is not permanent"),
        pytest.param([lot(1, expire_time=SOON, priority=1), lot(2)], [2, 1], id="priority before expiry"),
        pytest.param([lot(1), lot(2, priority=-1)], [2, 1], id="priority before age"),
        pytest.param(
            [lot(1, priority=2), lot(2, priority=10)], [1, 2], id="priorities compared as numbers, not as text"
        ),
        pytest.param([lot(1, priority=-2), lot(2, priority=-10)], [2, 1], id="priorities below 0"),
        pytest.param(
            [
                lot(1, priority=5),
                lot(2, expire_time=LATER, priority=5),
                lot(3),
                lot(4, expire_time=SOON, priority=5),
                lot(5, expire_time=SOON, priority=-5),
                lot(6, priority=-5),
                lot(7),
                lot(8, expire_time=SOON, priority=5),
            ],
            [5, 6, 3, 7, 4, 8, 2, 1],
            id="all criteria",
        ),
        pytest.param([lot(1, remaining=0), lot(2), lot(3, remaining=0, priority=-1)], [2], id="empty lots left out"),
    ],
)
def test_spending_order(lots: list[Lot], order: list[int]) -> None:
    """Open lots are sorted by priority, then the earliest to expire with permanent ones last, then the oldest."""
    assert [each.number for each in sort_lots(lots)] == order
    assert [each.number for each in sort_lots(reversed(lots))] == order


@pytest.mark.parametrize(
    ("lots", "amount", "taken", "left"),
    [
        pytest.param([lot(1)], 1, [(1, -1)], [(1, 9)], id="the smallest amount"),
        pytest.param([lot(1)], 9, [(1, -9)], [(1, 1)], id="all but the smallest amount"),
        pytest.param([lot(1)], 10, [(1, -10)], [], id="exactly one lot"),
        pytest.param([lot(1)], 11, [(1, -10), (CREDIT_LINE, -1)], [], id="more than the lot has"),
        pytest.param([], 7, [(CREDIT_LINE, -7)], [], id="no lots"),
        pytest.param([lot(1), lot(2, 5)], 10, [(1, -10)], [(2, 5)], id="the first of two, exactly"),
        pytest.param([lot(1), lot(2, 5)], 11, [(1, -10), (2, -1)], [(2, 4)], id="into the second"),
        pytest.param([lot(1), lot(2, 5)], 9, [(1, -9)], [(1, 1), (2, 5)], id="the second untouched"),
        pytest.param([lot(1), lot(2, 5)], 15, [(1, -10), (2, -5)], [], id="both, exactly"),
        pytest.param(
            [lot(1), lot(2, 5)], 16, [(1, -10), (2, -5), (CREDIT_LINE, -1)], [], id="both, and one on the credit line"
        ),
        pytest.param(
            [lot(4, 1), lot(2, 2), lot(3, 3), lot(1, 4)],
            5,
            [(4, -1), (2, -2), (3, -2)],
            [(3, 1), (1, 4)],
            id="in the order given",
        ),
        pytest.param([lot(1, 10**18 - 1)], 10**18 - 1, [(1, -(10**18 - 1))], [], id="the largest amount"),
    ],
)
def test_an_amount_is_taken_in_order(
    lots: list[Lot], amount: int, taken: list[tuple[int, int]], left: list[tuple[int, int]]
) -> None:
    """An amount is taken from one lot after the other, and the rest is borrowed."""
    remaining, allocations = take(tuple(lots), amount)
    assert amounts(allocations) == taken
    assert remainders(remaining) == left


def test_an_allocation_has_the_terms_of_its_lot() -> None:
    """An allocation has the expire_time and the priority of its lot; a borrowed amount is permanent."""
    lots = (lot(3, 5, SOON, -2), lot(1, 5, None, 4))
    assert take(lots, 11)[1] == [
        Allocation(3, -5, Terms(SOON, -2)),
        Allocation(1, -5, Terms(None, 4)),
        Allocation(CREDIT_LINE, -1, PERMANENT),
    ]


def test_taking_changes_only_the_remaining_amount() -> None:
    """A lot that stays open keeps its number, opener, terms and original amount."""
    (left,), _ = take((Lot(4, 9, Terms(SOON, 3), 50, 30),), 10)
    assert left == Lot(4, 9, Terms(SOON, 3), 50, 20)


@pytest.mark.parametrize(
    ("expire_time", "now", "have_expired"),
    [
        (None, 0, False),
        (None, LAST_EVER, False),
        (SOON, SOON - 1, False),
        (SOON, SOON, True),
        (SOON, SOON + 1, True),
        (0, 0, True),
        (0, -1, False),
    ],
)
def test_credits_expire_at_their_expire_time(expire_time: int | None, now: int, have_expired: bool) -> None:
    """Credits expire at exactly their expire_time, and not a microsecond earlier."""
    assert Terms(expire_time).have_expired(now) is have_expired


@pytest.mark.parametrize(
    ("allocations", "expiring", "permanent"),
    [
        pytest.param([], 0, 0, id="nothing moved"),
        pytest.param([Allocation(1, -5, PERMANENT)], 0, -5, id="permanent"),
        pytest.param([Allocation(1, -5, Terms(SOON))], -5, 0, id="expiring"),
        pytest.param([Allocation(1, 5, Terms(SOON)), Allocation(2, 7, PERMANENT)], 5, 7, id="both"),
        pytest.param([Allocation(CREDIT_LINE, -9, PERMANENT), Allocation(1, -2, Terms(LATER))], -2, -9, id="borrowed"),
        pytest.param([Allocation(1, -1, Terms(SOON)), Allocation(2, -2, Terms(LATER))], -3, 0, id="two dates"),
        pytest.param([Allocation(1, 4, Terms(0))], 4, 0, id="an expiry at 0 is not permanent"),
        pytest.param([Allocation(1, 4, Terms(None, 7))], 0, 4, id="a priority without an expiry is permanent"),
    ],
)
def test_parts_of_an_amount(allocations: list[Allocation], expiring: int, permanent: int) -> None:
    """The expiring part is the sum of allocations with an expire_time; the permanent part is the rest."""
    assert expiring_and_permanent(allocations) == (expiring, permanent)


any_lots = st.lists(st.tuples(st.integers(0, 20), st.none() | st.integers(0, 5), st.integers(-2, 2)), max_size=8).map(
    lambda rows: [lot(number, *row) for number, row in enumerate(rows, 1)]
)


@given(any_lots, st.integers(1, 200))
def test_taking_conserves_credits(lots: list[Lot], amount: int) -> None:
    """For any lots, the taken and the remaining amount of each lot add up to its earlier amount."""
    before = sort_lots(lots)
    after, allocations = take(before, amount)
    taken = dict(amounts(allocations))
    left = dict(remainders(after))
    assert sum(taken.values()) == -amount
    assert len(taken) == len(allocations)
    assert taken.get(CREDIT_LINE, 0) == -max(0, amount - sum(each.remaining for each in before))
    for each in before:
        assert left.get(each.number, 0) - taken.get(each.number, 0) == each.remaining
    assert all(each.remaining > 0 for each in after)
    assert all(each.amount < 0 for each in allocations)


@given(any_lots, st.integers(1, 200))
def test_a_lot_is_spent_only_after_its_predecessors_are_empty(lots: list[Lot], amount: int) -> None:
    """For any lots, those taken from are the first in spending order, and all but the last of them are empty."""
    before = sort_lots(lots)
    after, allocations = take(before, amount)
    spent = [each.lot_number for each in allocations if each.lot_number != CREDIT_LINE]
    assert spent == [each.number for each in before[: len(spent)]]
    assert not set(spent[:-1]) & {each.number for each in after}


@given(any_lots, st.integers(1, 50), st.integers(1, 50))
def test_taking_twice_is_taking_the_sum(lots: list[Lot], first: int, second: int) -> None:
    """For any lots, taking two amounts in succession leaves the same lots as taking their sum."""
    once, _ = take(sort_lots(lots), first + second)
    part, _ = take(sort_lots(lots), first)
    assert take(part, second)[0] == once


@given(any_lots)
def test_the_order_is_total(lots: list[Lot]) -> None:
    """For any lots, the spending orders are strictly increasing."""
    assert all(one.spending_order < next_one.spending_order for one, next_one in pairwise(sort_lots(lots)))
