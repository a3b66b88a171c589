"""Maximum durations of calls, independent of their callers' deadlines.

Asyncio's own timeouts cost a timer for each call. Calls with the same bound end in the order
in which they began, so one timer, for the first of them, is enough.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, TypeAlias

Work: TypeAlias = "asyncio.Task[Any]"


@dataclass(frozen=True, slots=True)
class CallBounds:
    """Maximum durations of calls, in seconds, independent of their callers' deadlines."""

    call: float
    """Of a call with one request and one answer."""
    stream: float
    """Of a whole stream."""
    idle: float
    """Between two messages of a stream, in either direction."""


class Deadlines:
    """Cancels tasks that take too long. For one event loop."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        # Ordered by deadline.
        self._ends: dict[Work, float] = {}
        self._cancelled: set[Work] = set()
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, work: Work) -> None:
        """Starts the deadline of a task, which is cancelled unless `end` or `restart` is called in time."""
        loop = work.get_loop()
        self._ends[work] = loop.time() + self._seconds
        if self._timer is None:
            self._timer = loop.call_later(self._seconds, self._expire, loop)

    def end(self, work: Work) -> bool:
        """Ends the deadline of a task. Returns whether it has cancelled the task."""
        if self._ends.pop(work, None) is not None:
            return False
        was_cancelled = work in self._cancelled
        self._cancelled.discard(work)
        return was_cancelled

    def restart(self, work: Work) -> None:
        """Restarts the deadline of a task that isn't cancelled yet."""
        if self._ends.pop(work, None) is not None:
            self._ends[work] = work.get_loop().time() + self._seconds

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        self._timer = None
        while self._ends:
            work, end = next(iter(self._ends.items()))
            if end > now:
                self._timer = loop.call_at(end, self._expire, loop)
                return
            del self._ends[work]
            self._cancelled.add(work)
            work.cancel()
