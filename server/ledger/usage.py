"""Hour windows: the usage of an account in each of its hours."""

from __future__ import annotations

from typing import NamedTuple

from server.ledger.instants import Instant, window_start
from server.ledger.money import Millionths

USAGE_CATEGORIES = ("computing", "serverless")
"""The categories of usage that are summed."""


class UsageWindow(NamedTuple):
    """The usage of an account in one of its hours. Hours without usage have no window."""

    number: int
    """1, 2, 3 and so on in the account, without gaps."""
    start: Instant
    computing: Millionths = 0
    serverless: Millionths = 0

    @property
    def total(self) -> Millionths:
        """The whole usage of the hour."""
        return self.computing + self.serverless


def add_usage(
    newest: UsageWindow | None, hour_anchor: Instant, category: str, used: Millionths, time: Instant
) -> UsageWindow | None:
    """The newest window after a charge of usage; unchanged for other categories."""
    if category not in USAGE_CATEGORIES:
        return newest
    start = window_start(hour_anchor, time)
    if newest is None or newest.start != start:
        # Times never decrease within an account, so another start is a later one.
        newest = UsageWindow(newest.number + 1 if newest else 1, start)
    number, start, computing, serverless = newest
    if category == "computing":
        return UsageWindow(number, start, computing + used, serverless)
    return UsageWindow(number, start, computing, serverless + used)
