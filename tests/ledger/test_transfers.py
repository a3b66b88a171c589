"""The rules of transfers: amounts, terms and times of both sides."""

from __future__ import annotations

from random import Random

import pytest
from daybook.v1.ledger_service_pb2 import TransferCreditsResponse
from daybook.v1.transaction_pb2 import Transaction
from hypothesis import given
from hypothesis import strategies as st

from server.ledger import money
from server.ledger.errors import BalanceOutOfRange, DaybookError, InsufficientCredits, TooManyLots
from server.ledger.idempotency import Request
from server.ledger.instants import HOUR, Instant, from_timestamp
from server.ledger.lots import CREDIT_LINE, PERMANENT, Allocation, Lot, Terms, expiring_and_permanent
from server.ledger.money import LARGEST, Millionths
from server.ledger.posting import LOTS_TAKEN_MAX, AccountState, Posting
from server.ledger.transfers import transfer
from server.ledger.usage import UsageWindow
from server.posting.commands import Transfer
from server.posting.unit import Attempt, Unit
from server.store.states import StoredState
from server.store.units import Loaded
from tests.support import account_states
from tests.support.account_states import NOW, lot

SOURCE, DESTINATION = 7, 8


def account(
    number: int,
    *lots: Lot,
    debt: Millionths = 0,
    credit_limit: Millionths = 0,
    last_create_time: Instant = NOW - HOUR,
) -> AccountState:
    """An account with these lots or this debt."""
    return account_states.account(
        *lots,
        number=number,
        account_id=f"account-{number}",
        debt=debt,
        credit_limit=credit_limit,
        last_create_time=last_create_time,
    )


def moved(posting: Posting) -> list[tuple[int, Millionths]]:
    """Each allocation's lot and amount."""
    return [(each.lot_number, each.amount) for each in posting.allocations]


def test_transferred_credits_keep_their_terms() -> None:
    """Credits of each source lot open a lot of the destination with the same expire_time and priority."""
    source = account(SOURCE, lot(1, 10), lot(2, 20, NOW + HOUR), lot(3, 30, NOW + 5 * HOUR, -2), lot(4, 40, None, 3))
    destination = account(DESTINATION, lot(1, 1), lot(2, 2, NOW + 3 * HOUR))
    (left, outgoing), (right, incoming) = transfer(source, destination, 65, NOW)
    assert outgoing.allocations == (
        Allocation(3, -30, Terms(NOW + 5 * HOUR, -2)),
        Allocation(2, -20, Terms(NOW + HOUR)),
        Allocation(1, -10, PERMANENT),
        Allocation(4, -5, Terms(None, 3)),
    )
    assert incoming.allocations == (
        Allocation(3, 30, Terms(NOW + 5 * HOUR, -2)),
        Allocation(4, 20, Terms(NOW + HOUR)),
        Allocation(5, 10, PERMANENT),
        Allocation(6, 5, Terms(None, 3)),
    )
    assert left.lots == (Lot(4, 4, Terms(None, 3), 40, 35),)
    # Transaction 3 of the destination opened four of these lots. All are in spending order.
    assert right.lots == (
        Lot(3, 3, Terms(NOW + 5 * HOUR, -2), 30, 30),
        Lot(4, 3, Terms(NOW + HOUR), 20, 20),
        lot(2, 2, NOW + 3 * HOUR),
        lot(1, 1),
        Lot(5, 3, PERMANENT, 10, 10),
        Lot(6, 3, Terms(None, 3), 5, 5),
    )


def test_each_side_is_a_transaction_of_its_account() -> None:
    """The sides are a TRANSFER_OUT and a TRANSFER_IN of opposite amounts, each with its account's next sequence."""
    source = account(SOURCE, lot(1, 10, NOW + 9))._replace(sequence=41, window=UsageWindow(2, NOW, 5, 6))
    destination = account(DESTINATION)._replace(sequence=99, window=UsageWindow(3, NOW, 7, 8))
    (left, outgoing), (right, incoming) = transfer(source, destination, 4, NOW)
    assert outgoing == Posting(
        Transaction.TRANSFER_OUT,
        "transfer",
        Transaction.SUCCEEDED,
        -4,
        42,
        NOW,
        6,
        (Allocation(1, -4, Terms(NOW + 9)),),
    )
    assert incoming == Posting(
        Transaction.TRANSFER_IN, "transfer", Transaction.SUCCEEDED, 4, 100, NOW, 4, (Allocation(1, 4, Terms(NOW + 9)),)
    )
    assert left == source._replace(balance=6, lots=left.lots, expiring=6, sequence=42, last_create_time=NOW)
    assert right == destination._replace(
        balance=4,
        lots=right.lots,
        lot_count=1,
        open_lot_count=1,
        expiring=4,
        sequence=100,
        last_create_time=NOW,
    )


@pytest.mark.parametrize(
    ("lots", "debt", "credit_limit", "amount", "outcome"),
    [
        pytest.param([lot(1, 10)], 0, 0, 10, 0, id="the whole balance"),
        pytest.param([lot(1, 10)], 0, 0, 11, "0.00001", id="one more"),
        pytest.param([lot(1, 10)], 0, 99, 10, 0, id="the whole balance, with a limit"),
        pytest.param([lot(1, 10)], 0, 99, 11, "0.00001", id="nothing is borrowed"),
        pytest.param([], 0, 99, 1, "0", id="no credits"),
        pytest.param([], 5, 99, 1, "0", id="in debt"),
        pytest.param([lot(1, 10), lot(2, 5, NOW + 1)], 0, 0, 15, 0, id="of several lots"),
        pytest.param([lot(1, 10), lot(2, 5, NOW + 1)], 0, 0, 16, "0.000015", id="one more than several lots"),
    ],
)
def test_a_transfer_never_borrows(
    lots: list[Lot], debt: Millionths, credit_limit: Millionths, amount: Millionths, outcome: Millionths | str
) -> None:
    """A transfer beyond the source's balance is refused. The credit limit does not count as available."""
    source = account(SOURCE, *lots, debt=debt, credit_limit=credit_limit)
    if isinstance(outcome, int):
        (left, _), (right, _) = transfer(source, account(DESTINATION), amount, NOW)
        assert (left.balance, left.debt, right.balance) == (outcome, 0, amount)
        return
    with pytest.raises(InsufficientCredits) as refusal:
        transfer(source, account(DESTINATION), amount, NOW)
    assert refusal.value.metadata["account"] == f"accounts/account-{SOURCE}"
    assert refusal.value.metadata["available_amount"] == outcome


@pytest.mark.parametrize(
    ("amount", "incoming", "debt", "lots", "expiring_amount"),
    [
        pytest.param(3, [(0, 3)], 4, [], 0, id="less than the debt"),
        pytest.param(7, [(0, 7)], 0, [], 0, id="the debt"),
        pytest.param(8, [(0, 7), (1, 1)], 0, [(1, 1, NOW + HOUR)], 1, id="one more"),
        pytest.param(10, [(0, 7), (1, 3)], 0, [(1, 3, NOW + HOUR)], 3, id="the first lot"),
        pytest.param(15, [(0, 7), (1, 3), (2, 5)], 0, [(1, 3, NOW + HOUR), (2, 5, None)], 3, id="into the second lot"),
    ],
)
def test_a_transfer_pays_back_the_destinations_debt_first(
    amount: Millionths,
    incoming: list[tuple[int, Millionths]],
    debt: Millionths,
    lots: list[tuple[int, Millionths, Instant | None]],
    expiring_amount: Millionths,
) -> None:
    """Incoming credits pay back a debt of 7 first, beginning with the credits that come first in spending order."""
    source = account(SOURCE, lot(1, 10, NOW + HOUR), lot(2, 10))
    _, (right, posting) = transfer(source, account(DESTINATION, debt=7), amount, NOW)
    assert moved(posting) == incoming
    assert (right.debt, right.balance) == (debt, amount - 7)
    assert [(each.number, each.remaining, each.terms.expire_time) for each in right.lots] == lots
    assert expiring_and_permanent(posting.allocations) == (expiring_amount, amount - expiring_amount)


@pytest.mark.parametrize(
    ("source_time", "destination_time", "create_times"),
    [
        (NOW - 2, NOW - 1, (NOW, NOW)),
        (NOW, NOW, (NOW, NOW)),
        (NOW + 1, NOW - 1, (NOW + 1, NOW)),
        (NOW - 1, NOW + 1, (NOW, NOW + 1)),
        (NOW + 2, NOW + 1, (NOW + 2, NOW + 1)),
        (0, 0, (NOW, NOW)),
    ],
)
def test_each_side_has_its_own_create_time(
    source_time: Instant, destination_time: Instant, create_times: tuple[Instant, Instant]
) -> None:
    """The create_time of each side is the later of the clock and its account's newest create_time."""
    source = account(SOURCE, lot(1, 10), last_create_time=source_time)
    destination = account(DESTINATION, last_create_time=destination_time)
    (left, outgoing), (right, incoming) = transfer(source, destination, 1, NOW)
    assert (outgoing.create_time, incoming.create_time) == create_times
    assert (left.last_create_time, right.last_create_time) == create_times


@pytest.mark.parametrize(
    ("source", "destination", "amount", "outcome"),
    [
        pytest.param([lot(1, 10)], [lot(1, LARGEST - 10)], 10, LARGEST, id="up to the range"),
        pytest.param([lot(1, 10)], [lot(1, LARGEST - 9)], 10, BalanceOutOfRange, id="out of range"),
        pytest.param(
            [lot(1, 10)],
            [lot(number, 1) for number in range(1, 3001)],
            10,
            3010,
            id="any number of lots",
        ),
        pytest.param(
            [lot(number, 1) for number in range(1, LOTS_TAKEN_MAX + 2)], [], LOTS_TAKEN_MAX, LOTS_TAKEN_MAX, id="lots"
        ),
        pytest.param(
            [lot(number, 1) for number in range(1, LOTS_TAKEN_MAX + 2)],
            [],
            LOTS_TAKEN_MAX + 1,
            TooManyLots,
            id="out of more lots",
        ),
    ],
)
def test_a_transfer_is_limited_by_range_and_lots(
    source: list[Lot], destination: list[Lot], amount: Millionths, outcome: Millionths | type[DaybookError]
) -> None:
    """A transfer is refused if the destination's balance leaves the range, or if it takes from too many lots."""
    sender, receiver = account(SOURCE, *source), account(DESTINATION, *destination)
    if isinstance(outcome, int):
        assert transfer(sender, receiver, amount, NOW)[1][0].balance == outcome
        return
    with pytest.raises(outcome):
        transfer(sender, receiver, amount, NOW)


any_lots = st.lists(
    st.tuples(st.integers(1, 20), st.none() | st.integers(NOW + 1, NOW + 5), st.integers(-1, 1)), max_size=6
).map(lambda rows: [lot(number, *row) for number, row in enumerate(rows, 1)])


@given(any_lots, st.integers(0, 20), any_lots, st.integers(0, 20), st.integers(1, 100))
def test_a_transfer_conserves_credits(
    source_lots: list[Lot], limit: Millionths, destination_lots: list[Lot], debt: Millionths, amount: Millionths
) -> None:
    """For any accounts, the sum of both balances is constant, and credits keep their terms unless they pay a debt."""
    source = account(SOURCE, *source_lots, credit_limit=limit)
    destination = account(DESTINATION, debt=debt) if debt else account(DESTINATION, *destination_lots)
    if amount > source.balance:
        with pytest.raises(InsufficientCredits):
            transfer(source, destination, amount, NOW)
        return
    (left, outgoing), (right, incoming) = transfer(source, destination, amount, NOW)
    assert left.balance + right.balance == source.balance + destination.balance
    assert left.debt == 0
    assert sum(each.amount for each in outgoing.allocations) == outgoing.amount == -amount
    assert sum(each.amount for each in incoming.allocations) == incoming.amount == amount
    assert right.balance == sum(each.remaining for each in right.lots) - right.debt
    if not debt:
        taken: dict[Terms, Millionths] = {}
        for each in outgoing.allocations:
            taken[each.terms] = taken.get(each.terms, 0) - each.amount
        assert [(each.terms, each.amount) for each in incoming.allocations] == list(taken.items())
    assert not [each for each in outgoing.allocations if each.lot_number == CREDIT_LINE]


def run(source: AccountState, destination: AccountState, amount: Millionths, now: Instant) -> TransferCreditsResponse:
    """Transfers between stored accounts, as the service does."""
    states = {state.account_number: StoredState(state, b"") for state in (source, destination)}
    lots = {(state.account_number, each.number): each for state in (source, destination) for each in state.lots}
    openers = {(number, each.opened_by): Transaction().SerializeToString() for (number, _), each in lots.items()}
    unit = Unit(Loaded(states, lots, openers=openers), Random(1).randbytes)
    command = Transfer(
        SOURCE, source.account_id, DESTINATION, destination.account_id, amount, Transaction(), Request("", b"")
    )
    return TransferCreditsResponse.FromString(command.run(Attempt(unit), now))


dated_lots = st.lists(st.tuples(st.integers(1, 20), st.none() | st.integers(NOW - 50, NOW + 50)), max_size=6).map(
    lambda rows: [lot(number, *row) for number, row in enumerate(rows, 1)]
)
any_time = st.integers(NOW - 100, NOW + 100)


@given(dated_lots, any_time, dated_lots, any_time, st.integers(1, 100))
def test_no_account_loses_credits_by_the_other_accounts_time(
    source_lots: list[Lot],
    source_time: Instant,
    destination_lots: list[Lot],
    destination_time: Instant,
    amount: Millionths,
) -> None:
    """For any newest create_times, only the clock decides which credits of each side have expired."""
    source = account(SOURCE, *source_lots, last_create_time=source_time)
    destination = account(DESTINATION, *destination_lots, last_create_time=destination_time)
    if amount > source.at(NOW).balance:
        with pytest.raises(InsufficientCredits):
            run(source, destination, amount, NOW)
        return
    answer = run(source, destination, amount, NOW)
    for state, side, moved_amount in (
        (source, answer.outgoing, -amount),
        (destination, answer.incoming, amount),
    ):
        assert money.parse(side.balance_after) == state.at(NOW).balance + moved_amount
        expired = [each for each in state.lots if each.terms.have_expired(NOW)]
        assert side.sequence == state.sequence + len(expired) + 1
        newest = max([state.last_create_time, *(each.terms.expire_time or 0 for each in expired)])
        assert from_timestamp(side.create_time) == max(NOW, newest)


@pytest.mark.parametrize(
    ("now", "amount", "accepted"),
    [
        (NOW + HOUR - 1, 10, True),
        (NOW + HOUR, 10, False),
        (NOW + HOUR, 4, True),
    ],
)
def test_expired_credits_are_not_transferred(now: Instant, amount: Millionths, accepted: bool) -> None:
    """Of 6 expiring and 4 permanent credits, a transfer at the expire_time can move only the 4."""
    source, destination = account(SOURCE, lot(1, 6, NOW + HOUR), lot(2, 4)), account(DESTINATION)
    if accepted:
        assert run(source, destination, amount, now).incoming.balance_after == f"0.{amount:06d}".rstrip("0")
        return
    with pytest.raises(InsufficientCredits):
        run(source, destination, amount, now)


def test_a_source_expires_credits_by_the_clock() -> None:
    """A destination whose create_time is ahead of the clock still gets credits that expire before that create_time."""
    source = account(SOURCE, lot(1, 6, NOW + 50), last_create_time=NOW)
    destination = account(DESTINATION, last_create_time=NOW + 100)
    answer = run(source, destination, 6, NOW)
    times = [from_timestamp(side.create_time) for side in (answer.outgoing, answer.incoming)]
    assert (times, answer.incoming.balance_after) == ([NOW, NOW + 100], "0.000006")


def test_a_destination_expires_credits_by_the_clock() -> None:
    """A source whose create_time is ahead of the clock doesn't expire the destination's credits."""
    source = account(SOURCE, lot(1, 6), last_create_time=NOW + 100)
    destination = account(DESTINATION, lot(1, 5, NOW + 50), last_create_time=NOW)
    incoming = run(source, destination, 6, NOW).incoming
    assert from_timestamp(incoming.create_time) == NOW
    # Sequence 1 opened the lot, so no expiration was posted in between.
    assert (incoming.sequence, incoming.balance_after) == (2, "0.000011")
