"""How often one credential may call: a token bucket for each.

A bucket holds at most `burst` tokens, a call takes one, and they come back at a steady
rate. What is kept of a bucket is one number, the moment at which it is full again (this
is the generic cell rate algorithm); a bucket that nobody has is full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from cachetools import LRUCache

from server.ledger.errors import RateLimited

Stopwatch: TypeAlias = Callable[[], int]
"""Nanoseconds since some moment, whatever the clock on the wall is set to."""

BUCKETS_MAX = 100_000
"""How many buckets are kept. Beyond it the one that was used longest ago is forgotten, and so is full."""

_SECOND = 1_000_000_000


@dataclass(slots=True)
class _Bucket:
    full_time: int
    """In nanoseconds of the stopwatch."""


class RateLimiter:
    """Counts the calls of each credential in this process.

    Integers throughout: a sum of fractions would refuse the last call of a burst.
    """

    def __init__(self, calls_per_second: float, burst: int, stopwatch: Stopwatch) -> None:
        self._token_time = round(_SECOND / calls_per_second)
        self._capacity = burst * self._token_time
        self._stopwatch = stopwatch
        self._buckets: LRUCache[str, _Bucket] = LRUCache(BUCKETS_MAX)

    def take(self, credential_id: str) -> None:
        """Takes a token for one call. Raises RateLimited if there is none; that takes nothing."""
        now = self._stopwatch()
        empty_time = now + self._capacity
        bucket = self._buckets.get(credential_id)
        if bucket is None:
            bucket = self._buckets[credential_id] = _Bucket(now)
        # No bucket is fuller than full or, where the stopwatch went back, emptier than empty.
        bucket.full_time = min(max(bucket.full_time, now), empty_time)
        missing = bucket.full_time + self._token_time - empty_time
        if missing > 0:
            raise RateLimited(missing / _SECOND)
        bucket.full_time += self._token_time
