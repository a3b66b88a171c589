"""The rate limit: a token bucket for each credential.

A bucket holds at most `burst` tokens, a call takes one, and tokens return at a steady rate.
Only the time at which a bucket is full again is stored (generic cell rate algorithm); a
missing bucket is full.
"""

from __future__ import annotations

from collections import OrderedDict

from server.ledger.errors import RateLimited
from server.ledger.instants import Stopwatch

BUCKETS_MAX = 100_000
"""Maximum number of stored buckets. Evicts the least recently used, which then counts as full."""

_SECOND = 1_000_000_000


class RateLimiter:
    """Counts the calls of each credential in this process.

    Uses integers: the rounding of floats could refuse the last call of a burst.
    """

    def __init__(self, calls_per_second: float, burst: int, stopwatch: Stopwatch) -> None:
        self._token_time = round(_SECOND / calls_per_second)
        self._capacity = burst * self._token_time
        self._stopwatch = stopwatch
        # When each bucket is full again, in nanoseconds of the stopwatch; the most recently used is last.
        self._full_times: OrderedDict[str, int] = OrderedDict()

    def take(self, credential_id: str) -> None:
        """Takes a token for one call. Raises RateLimited, without an effect, if there is none."""
        now = self._stopwatch()
        empty_time = now + self._capacity
        full_time = self._full_times.get(credential_id)
        if full_time is None:
            full_time = now
            if len(self._full_times) >= BUCKETS_MAX:
                self._full_times.popitem(last=False)
        else:
            self._full_times.move_to_end(credential_id)
        # The bucket is at most full and, if the stopwatch went back, at least empty.
        full_time = min(max(full_time, now), empty_time)
        missing = full_time + self._token_time - empty_time
        self._full_times[credential_id] = full_time if missing > 0 else full_time + self._token_time
        if missing > 0:
            raise RateLimited(missing / _SECOND)
