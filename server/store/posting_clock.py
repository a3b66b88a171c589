"""The clock for postings: the system clock, while it agrees with a reference.

A create_time is permanent, and a wrong time expires credits. So a server must not post after its
clock jumps until the clock is right again. Reads use the earlier time meanwhile: a balance must
not lack credits, nor a key be refused, because a clock is wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator

import structlog
from sqlalchemy import func, select

from server.background import repeating
from server.ledger.errors import ClockSkewed, DaybookError, ServiceUnavailable
from server.ledger.instants import SECOND, Clock, Instant, Stopwatch, from_datetime
from server.store.database import Database
from server.store.query import Query

log = structlog.get_logger(__name__)

CHECK_SECONDS = 2.0
"""Time between two checks, in seconds."""
ANSWER_SECONDS_MAX = 2.0
"""Timeout of a read of the database's clock, in seconds."""
SETTLE_SECONDS = 60
"""Time for which the clock of a SQLite server must run evenly after a jump to be trusted, in seconds."""
_CLOCK = Query(select(func.clock_timestamp()))


def boot_stopwatch() -> int:
    """Nanoseconds since an arbitrary moment. On Linux they include the time for which the machine was suspended."""
    if sys.platform == "linux":
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    return time.monotonic_ns()


class PostingClock:
    """Returns the time for postings, or raises ClockSkewed.

    The reference is a time plus the stopwatch's count since, so it does not follow changes to the
    system clock. On PostgreSQL it is the database's time, which all servers share, read every
    CHECK_SECONDS. SQLite has no clock of its own: the reference is the system clock at the last
    check at which it was right. A clock that jumped and then ran evenly for SETTLE_SECONDS was
    corrected by an operator or by NTP, and becomes the reference.
    """

    def __init__(self, database: Database, clock: Clock, stopwatch: Stopwatch, skew_max: Instant) -> None:
        self._database = database
        self._clock = clock
        self._stopwatch = stopwatch
        self._skew_max = skew_max
        self._reference_start = clock() - self._elapsed()
        """The reference time when the stopwatch was at 0."""
        self._has_reference = not database.primary.has_clock
        """Whether there is a reference. On PostgreSQL there is none before the first read of the database's clock."""
        self._jump: tuple[Instant, Instant] | None = None
        """After a jump on SQLite: the skew, and the count of the stopwatch when the skew was first measured."""
        self._was_right = True

    def __call__(self) -> Instant:
        """The time of the system clock.

        Raises ClockSkewed if it is too far from the reference, and ServiceUnavailable while there is
        no reference.
        """
        if not self._has_reference:
            raise ServiceUnavailable
        now = self._clock()
        skew = now - self._reference
        if abs(skew) > self._skew_max:
            raise ClockSkewed(skew / SECOND)
        return now

    def time_of_reads(self) -> Instant:
        """The time of the system clock; if it is too far from the reference, the earlier of both.

        So nothing expires early, whichever is wrong: the database's clock may be, too.
        """
        now, reference = self._clock(), self._reference
        return min(now, reference) if self._has_reference and abs(now - reference) > self._skew_max else now

    @property
    def skew(self) -> Instant:
        """The time by which the clock is ahead of the reference; below 0 if it is behind."""
        return self._clock() - self._reference

    @property
    def is_right(self) -> bool:
        """Whether the clock can be used for postings."""
        return self._has_reference and abs(self.skew) <= self._skew_max

    @contextlib.asynccontextmanager
    async def checking(self) -> AsyncIterator[None]:
        """Checks the clock now, and then every CHECK_SECONDS until the end of the block."""
        await self.check()
        async with repeating(self.check, CHECK_SECONDS, "clock check failed"):
            yield

    async def check(self) -> None:
        """Updates the reference, and logs when the clock becomes wrong or right."""
        if self._database.primary.has_clock:
            await self._ask_database()
        else:
            self._follow_clock()
        if self.is_right != self._was_right:
            self._was_right = not self._was_right
            if self._was_right:
                log.info("clock skew within limit")
            else:
                log.error("clock skew too large", skew_seconds=self.skew / SECOND)

    def _follow_clock(self) -> None:
        skew, elapsed = self.skew, self._elapsed()
        if abs(skew) <= self._skew_max:
            # The reference follows small changes, so that NTP slews do not add up to a skew.
            self._reference_start += skew
            self._jump = None
        elif self._jump is None or abs(skew - self._jump[0]) > self._skew_max:
            self._jump = (skew, elapsed)
        elif elapsed - self._jump[1] >= SETTLE_SECONDS * SECOND:
            log.warning("clock step accepted", skew_seconds=skew / SECOND)
            self._reference_start += skew
            self._jump = None

    async def _ask_database(self) -> None:
        sent = self._elapsed()
        try:
            async with asyncio.timeout(ANSWER_SECONDS_MAX):
                ((database_time,),) = await self._database.primary.fetch(_CLOCK, {})
        except (DaybookError, TimeoutError):
            # The stopwatch continues from the last answer.
            return
        round_trip = self._elapsed() - sent
        # The database reads its clock at some point of the round trip, so a long round trip is too imprecise.
        if round_trip <= self._skew_max:
            self._reference_start = from_datetime(database_time) - sent - round_trip // 2
            self._has_reference = True

    @property
    def _reference(self) -> Instant:
        return self._reference_start + self._elapsed()

    def _elapsed(self) -> Instant:
        return self._stopwatch() // 1000
