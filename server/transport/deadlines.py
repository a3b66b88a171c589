"""A bound on how long a call may take, whatever its caller asks for.

Asyncio's own timeouts cost a timer for each call. Calls with the same bound end in the order
in which they began, so one timer for the first of them does.
"""

from __future__ import annotations

import asyncio
from typing import Any, TypeAlias

Work: TypeAlias = "asyncio.Task[Any]"


class Deadlines:
    """Cancels what is under way for too long. For one event loop."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        # In the order in which they end.
        self._ends: dict[Work, float] = {}
        self._cancelled: set[Work] = set()
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, work: Work) -> None:
        """Cancels a task so many seconds from now, unless it ends or begins anew before."""
        loop = work.get_loop()
        self._ends[work] = loop.time() + self._seconds
        if self._timer is None:
            self._timer = loop.call_later(self._seconds, self._expire, loop)

    def end(self, work: Work) -> bool:
        """Leaves a task alone from now on. Tells whether it was this that cancelled it."""
        if self._ends.pop(work, None) is not None:
            return False
        was_cancelled = work in self._cancelled
        self._cancelled.discard(work)
        return was_cancelled

    def begin_anew(self, work: Work) -> None:
        """Gives a task that is not cancelled yet all of its seconds again."""
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
