"""A clock that stands still until a test moves it."""

from __future__ import annotations

from server.ledger.instants import SECOND, Instant, parse

NOON = parse("2024-10-10T12:00:00Z")


class Clock:
    """Stands still until a test moves it."""

    def __init__(self, now: Instant = NOON) -> None:
        self.now = now

    def __call__(self) -> Instant:
        """The time at which it stands."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Moves the clock, also backwards."""
        self.now += round(seconds * SECOND)
