"""A clock that stands still until a test moves it."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp

from server.ledger.instants import SECOND, Instant, parse, to_timestamp

NOON = parse("2024-10-10T12:00:00Z")


def after(seconds: float) -> Timestamp:
    """Returns the time at `seconds` after NOON."""
    return to_timestamp(NOON + round(seconds * SECOND))


class Clock:
    """A clock for a ledger."""

    def __init__(self, now: Instant = NOON) -> None:
        self.now = now

    def __call__(self) -> Instant:
        """Returns the current time of the clock."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Moves the clock, also backwards."""
        self.now += round(seconds * SECOND)
