"""Hour windows: the hour to which usage belongs, and its sums."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.ledger.instants import HOUR, Instant
from server.ledger.money import LARGEST, Millionths
from server.ledger.usage import USAGE_CATEGORIES, UsageWindow, add_usage

NOON: Instant = 480_000 * HOUR
NEWEST = UsageWindow(4, NOON, 10, 20)


@pytest.mark.parametrize(
    ("newest", "anchor", "category", "used", "time", "after"),
    [
        pytest.param(None, 0, "computing", 3, NOON + 5, UsageWindow(1, NOON, 3, 0), id="the first"),
        pytest.param(None, 0, "serverless", 3, NOON + 5, UsageWindow(1, NOON, 0, 3), id="a sum for each category"),
        pytest.param(NEWEST, 0, "computing", 3, NOON, UsageWindow(4, NOON, 13, 20), id="the hour's first instant"),
        pytest.param(NEWEST, 0, "computing", 3, NOON + HOUR - 1, UsageWindow(4, NOON, 13, 20), id="its last"),
        pytest.param(NEWEST, 0, "computing", 3, NOON + HOUR, UsageWindow(5, NOON + HOUR, 3, 0), id="the next hour"),
        pytest.param(NEWEST, 0, "serverless", 3, NOON, UsageWindow(4, NOON, 10, 23), id="the other sum"),
        pytest.param(
            NEWEST, 0, "computing", 3, NOON + 99 * HOUR + 1, UsageWindow(5, NOON + 99 * HOUR, 3, 0), id="without a gap"
        ),
        pytest.param(NEWEST, 0, "inference", 3, NOON + HOUR, NEWEST, id="another category opens no window"),
        pytest.param(None, 0, "inference", 3, NOON, None, id="another category opens no first window"),
        pytest.param(NEWEST, 0, "computing_time", 3, NOON, NEWEST, id="a category with a usage category as prefix"),
        pytest.param(NEWEST, 0, "", 3, NOON, NEWEST, id="no category"),
        pytest.param(
            None, 600, "computing", 3, NOON + 599, UsageWindow(1, NOON + 600 - HOUR, 3, 0), id="before anchor"
        ),
        pytest.param(None, 600, "computing", 3, NOON + 600, UsageWindow(1, NOON + 600, 3, 0), id="at the anchor"),
        pytest.param(
            None,
            NOON + 9 * HOUR + 1,
            "computing",
            3,
            NOON,
            UsageWindow(1, NOON + 1 - HOUR, 3, 0),
            id="anchor in the future",
        ),
        pytest.param(None, -1, "computing", 3, NOON, UsageWindow(1, NOON - 1, 3, 0), id="anchor before 1970"),
        pytest.param(None, 0, "computing", 3, -1, UsageWindow(1, -HOUR, 3, 0), id="time before 1970"),
        pytest.param(
            NEWEST, 0, "computing", LARGEST, NOON, UsageWindow(4, NOON, LARGEST + 10, 20), id="the largest amount"
        ),
    ],
)
def test_usage_is_added_to_its_window(
    newest: UsageWindow | None,
    anchor: Instant,
    category: str,
    used: Millionths,
    time: Instant,
    after: UsageWindow | None,
) -> None:
    """Usage is added to the window of its hour, which gets the next number if it is new."""
    assert add_usage(newest, anchor, category, used, time) == after


@given(
    st.integers(-3 * HOUR, 3 * HOUR),
    st.lists(
        st.tuples(
            st.integers(0, 2 * HOUR) | st.sampled_from((0, 1, HOUR - 1, HOUR)),
            st.sampled_from((*USAGE_CATEGORIES, "inference")),
            st.integers(1, 100),
        )
    ),
)
def test_windows_sum_all_usage(anchor: Instant, steps: list[tuple[Instant, str, Millionths]]) -> None:
    """For any usage in chronological order, each hour's window sums exactly the usage of that hour."""
    windows: dict[int, UsageWindow] = {}
    newest, time = None, NOON
    used: Counter[tuple[int, str]] = Counter()
    for elapsed, category, amount in steps:
        time += elapsed
        newest = add_usage(newest, anchor, category, amount, time)
        if newest is not None:
            windows[newest.number] = newest
        if category in USAGE_CATEGORIES:
            used[(time - anchor) // HOUR, category] += amount
    hours = sorted({hour for hour, _ in used})
    assert windows == {
        number: UsageWindow(number, anchor + hour * HOUR, used[hour, "computing"], used[hour, "serverless"])
        for number, hour in enumerate(hours, 1)
    }
