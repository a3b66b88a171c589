"""The rules of posting: what is refused and in which order, balances, sequences, times and usage windows."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from daybook.v1.transaction_pb2 import Transaction
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from server.ledger.errors import BalanceOutOfRange, DaybookError, FieldInvalid, InsufficientCredits
from server.ledger.instants import HOUR, Instant
from server.ledger.money import LARGEST, Millionths
from server.ledger.posting import AccountState, Draft, Kind, UsageWindow, post

NOW: Instant = 480_000 * HOUR
ONE: Millionths = 1_000_000


def account(balance: Millionths = 0, credit_limit: Millionths = 0, **fields: Any) -> AccountState:
    """An account whose hours begin with the clock's, unless told otherwise."""
    return AccountState(
        **{
            "account_number": 7,
            "account_id": "acme",
            "credit_limit": credit_limit,
            "hour_anchor": 0,
            "balance": balance,
            **fields,
        }
    )


def usage(amount: Millionths, category: str = "computing") -> Draft:
    """A charge for something used."""
    return Draft(Transaction.CHARGE, category, amount, is_usage=True)


@pytest.mark.parametrize(
    ("kind", "balance", "credit_limit", "amount", "outcome"),
    [
        (Transaction.GRANT, 0, 0, 1, 1),
        (Transaction.GRANT, 0, 0, LARGEST, LARGEST),
        (Transaction.GRANT, LARGEST - 1, 0, 1, LARGEST),
        (Transaction.GRANT, LARGEST, 0, 1, BalanceOutOfRange),
        (Transaction.GRANT, 1, 0, LARGEST, BalanceOutOfRange),
        (Transaction.GRANT, 0, 0, 0, FieldInvalid),
        (Transaction.GRANT, 0, 0, -1, FieldInvalid),
        (Transaction.GRANT, ONE, 0, -1, FieldInvalid),
        (Transaction.CHARGE, 1, 0, -1, 0),
        (Transaction.CHARGE, ONE, 0, -1, ONE - 1),
        (Transaction.CHARGE, 0, 0, -1, InsufficientCredits),
        (Transaction.CHARGE, ONE, 0, -ONE - 1, InsufficientCredits),
        (Transaction.CHARGE, 0, 5, -5, -5),
        (Transaction.CHARGE, 0, 5, -6, InsufficientCredits),
        (Transaction.CHARGE, 3, 5, -8, -5),
        (Transaction.CHARGE, 3, 5, -9, InsufficientCredits),
        (Transaction.CHARGE, -5, 5, -1, InsufficientCredits),
        (Transaction.CHARGE, 0, LARGEST, -LARGEST, -LARGEST),
        (Transaction.CHARGE, 0, 0, 0, FieldInvalid),
        (Transaction.CHARGE, ONE, 0, 1, FieldInvalid),
        (Transaction.ADJUSTMENT, 0, 0, 1, 1),
        (Transaction.ADJUSTMENT, 1, 0, -1, 0),
        (Transaction.ADJUSTMENT, 0, 5, -5, -5),
        (Transaction.ADJUSTMENT, 0, 0, -1, InsufficientCredits),
        (Transaction.ADJUSTMENT, 0, 5, -6, InsufficientCredits),
        (Transaction.ADJUSTMENT, LARGEST, 0, 1, BalanceOutOfRange),
        (Transaction.ADJUSTMENT, 0, 0, 0, FieldInvalid),
        # A limit that was lowered undoes nothing: what adds is taken, what removes is not.
        (Transaction.GRANT, -10, 5, 1, -9),
        (Transaction.ADJUSTMENT, -10, 5, 1, -9),
        (Transaction.CHARGE, -10, 5, -1, InsufficientCredits),
        # No request can give such a limit, but the range does not depend on that.
        (Transaction.CHARGE, -LARGEST, 2 * LARGEST, -1, BalanceOutOfRange),
        (Transaction.ADJUSTMENT, -LARGEST, 2 * LARGEST, -1, BalanceOutOfRange),
        # Precedence: a wrong sign is told before missing credits, and those before the range.
        (Transaction.GRANT, 0, 0, -ONE, FieldInvalid),
        (Transaction.CHARGE, LARGEST, 0, LARGEST, FieldInvalid),
        (Transaction.GRANT, -LARGEST, 0, -LARGEST, FieldInvalid),
        (Transaction.CHARGE, -LARGEST, 0, -LARGEST, InsufficientCredits),
        (Transaction.ADJUSTMENT, -LARGEST, LARGEST, -1, InsufficientCredits),
    ],
)
def test_rules(
    kind: Kind,
    balance: Millionths,
    credit_limit: Millionths,
    amount: Millionths,
    outcome: Millionths | type[DaybookError],
) -> None:
    """A draft of a kind gives the new balance, or the first of the errors that apply."""
    state, draft = account(balance, credit_limit), Draft(kind, "test", amount)
    if isinstance(outcome, int):
        after, posting = post(state, draft, NOW)
        assert after.balance == posting.balance_after == outcome
        return
    before = replace(state)
    with pytest.raises(DaybookError) as refusal:
        post(state, draft, NOW)
    assert type(refusal.value) is outcome
    assert state == before


@pytest.mark.parametrize(
    ("kind", "amount", "problem"),
    [
        (Transaction.GRANT, -1, "must be above 0 for a GRANT"),
        (Transaction.CHARGE, 1, "must be below 0 for a CHARGE"),
        (Transaction.ADJUSTMENT, 0, "must not be 0"),
    ],
)
def test_a_wrong_sign_names_the_field(kind: Kind, amount: Millionths, problem: str) -> None:
    """An amount of the wrong sign is told by the field's name and what it must be."""
    with pytest.raises(FieldInvalid) as refusal:
        post(account(), Draft(kind, "test", amount), NOW)
    assert (refusal.value.field, refusal.value.problem) == ("transaction.amount", problem)


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
    with pytest.raises(InsufficientCredits) as refusal:
        post(account(balance, credit_limit), Draft(Transaction.CHARGE, "test", -4_000_000), NOW)
    assert refusal.value.metadata == {
        "account": "accounts/acme",
        "available_amount": available_amount,
        "amount": "-4",
    }


def test_a_posting_says_what_was_posted() -> None:
    """A posting holds its draft, the next sequence, its time and the balance after it, as the new state does."""
    state = account(10 * ONE, sequence=41, last_create_time=NOW - 1)
    draft = Draft(Transaction.CHARGE, "booking", -3 * ONE)
    after, posting = post(state, draft, NOW)
    assert (posting.draft, posting.sequence, posting.create_time, posting.balance_after) == (draft, 42, NOW, 7 * ONE)
    assert after == replace(state, balance=7 * ONE, sequence=42, last_create_time=NOW)


def test_the_first_sequence_is_1() -> None:
    """The first transaction of an account has sequence 1."""
    assert post(account(), Draft(Transaction.GRANT, "purchase", 1), NOW)[1].sequence == 1


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
def test_time_never_decreases(last_create_time: Instant, now: Instant, create_time: Instant) -> None:
    """A transaction gets the time of the clock, or of its predecessor where the clock went back."""
    state = account(last_create_time=last_create_time)
    after, posting = post(state, Draft(Transaction.GRANT, "purchase", 1), now)
    assert posting.create_time == after.last_create_time == create_time


@pytest.mark.parametrize(
    ("window", "draft", "now", "after"),
    [
        pytest.param(None, usage(-3), NOW + 5, UsageWindow(1, NOW, 3, 0), id="the first window has number 1"),
        pytest.param(
            None, usage(-3, "serverless"), NOW, UsageWindow(1, NOW, 0, 3), id="serverless has a sum of its own"
        ),
        pytest.param(
            UsageWindow(4, NOW, 10, 20),
            usage(-3),
            NOW + HOUR - 1,
            UsageWindow(4, NOW, 13, 20),
            id="the hour's last instant",
        ),
        pytest.param(
            UsageWindow(4, NOW, 10, 20),
            usage(-3, "serverless"),
            NOW,
            UsageWindow(4, NOW, 10, 23),
            id="the hour's first",
        ),
        pytest.param(
            UsageWindow(4, NOW, 10, 20), usage(-3), NOW + HOUR, UsageWindow(5, NOW + HOUR, 3, 0), id="the next hour"
        ),
        pytest.param(
            UsageWindow(4, NOW, 10, 20),
            usage(-3),
            NOW + 99 * HOUR + 1,
            UsageWindow(5, NOW + 99 * HOUR, 3, 0),
            id="hours without usage take no number",
        ),
        pytest.param(
            UsageWindow(4, NOW, 10, 20),
            usage(-3, "inference"),
            NOW + HOUR,
            UsageWindow(4, NOW, 10, 20),
            id="another category",
        ),
        pytest.param(None, usage(-3, "computing_time"), NOW, None, id="a category that only begins alike"),
        pytest.param(
            UsageWindow(4, NOW, 10, 20),
            Draft(Transaction.CHARGE, "computing", -3),
            NOW,
            UsageWindow(4, NOW, 10, 20),
            id="a charge without a usage subject",
        ),
        pytest.param(None, Draft(Transaction.GRANT, "computing", 3), NOW, None, id="a grant of the category"),
    ],
)
def test_usage_windows(window: UsageWindow | None, draft: Draft, now: Instant, after: UsageWindow | None) -> None:
    """Usage of the two categories is added, as a positive amount, to the window of its hour, and nothing else is."""
    assert post(account(100, window=window), draft, now)[0].window == after


def test_windows_go_by_the_time_of_the_transaction() -> None:
    """Where the clock went back an hour, usage is added to the window of the create_time, not of the clock."""
    state = account(100, last_create_time=NOW + 1, window=UsageWindow(4, NOW, 10, 0))
    assert post(state, usage(-3), NOW - 1)[0].window == UsageWindow(4, NOW, 13, 0)


def test_windows_go_by_the_anchor_of_the_account() -> None:
    """The hour of an account begins at its anchor, also where that lies in the future."""
    state = account(100, hour_anchor=NOW + 10 * HOUR + 600)
    assert post(state, usage(-3), NOW + 599)[0].window == UsageWindow(1, NOW + 600 - HOUR, 3, 0)
    assert post(state, usage(-3), NOW + 600)[0].window == UsageWindow(1, NOW + 600, 3, 0)


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (account(), "balance"),
        (UsageWindow(1, 0), "computing"),
        (usage(-1), "amount"),
        (post(account(), Draft(Transaction.GRANT, "purchase", 1), NOW)[1], "sequence"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_states_and_postings_cannot_change(value: object, field: str) -> None:
    """What the rules take and give is frozen, so a refused draft can't leave a trace in it."""
    with pytest.raises(FrozenInstanceError):
        setattr(value, field, 5)


def test_posting_leaves_the_state_before_it_alone() -> None:
    """The state that was given is the same after a posting as before it."""
    state = account(100, window=UsageWindow(4, NOW, 10, 20))
    before = replace(state)
    assert post(state, usage(-3), NOW)[0] != before
    assert state == before


class Posting(RuleBasedStateMachine):
    """Posts anything at any time, and keeps books of its own the simplest way."""

    @initialize(credit_limit=st.integers(0, 50) | st.just(LARGEST), hour_anchor=st.integers(-3 * HOUR, 3 * HOUR))
    def open_account(self, credit_limit: Millionths, hour_anchor: Instant) -> None:
        """Opens the account, with empty books."""
        self.hour_anchor = hour_anchor
        self.state = account(credit_limit=credit_limit, hour_anchor=hour_anchor)
        self.clock = NOW
        self.amounts: list[Millionths] = []
        self.sequences: list[int] = []
        self.times: list[Instant] = []
        self.hours: dict[int, dict[str, Millionths]] = defaultdict(lambda: {"computing": 0, "serverless": 0})
        self.windows: dict[int, UsageWindow] = {}

    @rule(elapsed=st.integers(-2 * HOUR, 3 * HOUR) | st.integers(-5, 5) | st.sampled_from((HOUR, -HOUR, HOUR - 1)))
    def move_the_clock(self, elapsed: Instant) -> None:
        """Moves the clock, also backwards."""
        self.clock += elapsed

    @rule(limit=st.integers(0, 50))
    def change_the_limit(self, limit: Millionths) -> None:
        """Changes the credit limit, also to less than what is used already."""
        self.state = replace(self.state, credit_limit=limit)

    @rule(
        kind=st.sampled_from((Transaction.GRANT, Transaction.CHARGE, Transaction.ADJUSTMENT)),
        size=st.integers(0, 100) | st.integers(LARGEST - 5, LARGEST),
        negative=st.booleans(),
        category=st.sampled_from(("computing", "serverless", "inference")),
        is_usage=st.booleans(),
    )
    def post_a_draft(self, kind: Kind, size: Millionths, negative: bool, category: str, is_usage: bool) -> None:
        """Posts a draft, and expects what the books say must come of it."""
        amount = -size if negative else size
        is_usage = is_usage and kind == Transaction.CHARGE
        fits: dict[Kind, bool] = {
            Transaction.GRANT: amount > 0,
            Transaction.CHARGE: amount < 0,
            Transaction.ADJUSTMENT: amount != 0,
        }
        expected: type[DaybookError] | None = None
        balance = sum(self.amounts) + amount
        if not fits[kind]:
            expected = FieldInvalid
        elif amount < 0 and balance < -self.state.credit_limit:
            expected = InsufficientCredits
        elif balance > LARGEST:
            expected = BalanceOutOfRange
        try:
            after, posting = post(self.state, Draft(kind, category, amount, is_usage), self.clock)
        except DaybookError as error:
            assert type(error) is expected  # noqa: PT017  # Which error, or whether one, depends on the draw.
            return
        assert expected is None
        if amount < 0:
            assert after.balance >= -self.state.credit_limit
        self.state = after
        self.amounts.append(amount)
        self.sequences.append(posting.sequence)
        self.times.append(posting.create_time)
        if is_usage and category in ("computing", "serverless"):
            self.hours[(posting.create_time - self.hour_anchor) // HOUR][category] -= amount
        if after.window is not None:
            self.windows[after.window.number] = after.window

    @invariant()
    def balance_is_the_sum(self) -> None:
        """The balance is the sum of all amounts."""
        assert self.state.balance == sum(self.amounts)
        assert self.state.available == min(max(0, sum(self.amounts) + self.state.credit_limit), LARGEST)

    @invariant()
    def sequences_have_no_gap(self) -> None:
        """Sequences are 1, 2, 3, and the state has the last of them."""
        assert self.sequences == list(range(1, len(self.amounts) + 1))
        assert self.state.sequence == len(self.amounts)

    @invariant()
    def times_never_decrease(self) -> None:
        """Times are in the order of the sequences."""
        assert self.times == sorted(self.times)

    @invariant()
    def windows_are_the_sums_of_their_hours(self) -> None:
        """There is one window per hour with usage, numbered 1, 2, 3 by time, with that hour's sums."""
        assert [
            (number, window.start, window.computing, window.serverless)
            for number, window in sorted(self.windows.items())
        ] == [
            (number, self.hour_anchor + hour * HOUR, sums["computing"], sums["serverless"])
            for number, (hour, sums) in enumerate(sorted(self.hours.items()), start=1)
        ]


TestPosting = Posting.TestCase
TestPosting.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(
    st.integers(-LARGEST, LARGEST),
    st.integers(0, LARGEST),
    st.integers(-LARGEST, LARGEST),
    st.sampled_from((Transaction.GRANT, Transaction.CHARGE, Transaction.ADJUSTMENT)),
)
def test_nothing_that_removes_goes_below_the_limit(
    balance: Millionths, credit_limit: Millionths, amount: Millionths, kind: Kind
) -> None:
    """Whatever the state, a posting that removes ends at minus the credit limit or above, and all end in range."""
    try:
        after, _ = post(account(balance, credit_limit), Draft(kind, "test", amount), NOW)
    except DaybookError:
        return
    assert after.balance == balance + amount
    assert abs(after.balance) <= LARGEST
    assert amount > 0 or after.balance >= -credit_limit
