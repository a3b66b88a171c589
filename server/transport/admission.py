"""Admission control: limits the concurrent calls of this process, and shares them among credentials.

A call is admitted by its headers, before its body is read. A credential may hold at most as
many places as are free: a lone credential gets half of them, two get a third each, and a new
credential always gets one.

A call without a place waits for one for a limited time, and is then refused. So a burst is
absorbed. If an older call of its credential already waits for too long, this is no burst: the
call is refused immediately.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from server.transport.deadlines import Deadlines

WAITING_CALLS_MAX = 2000
"""Maximum number of calls that wait for a place. Further calls are refused immediately."""
BURST_PART = 0.1
"""The part of the longest wait after which a waiting call causes younger calls of its credential to be refused."""


class Admission:
    """Counts running calls, in total and per credential. For one event loop."""

    def __init__(self, places: int, wait_seconds: float = 0, waiting_max: int = WAITING_CALLS_MAX) -> None:
        """`places` is the maximum number of running calls, at least 1; `wait_seconds` may be 0."""
        self.places = places
        self.in_flight = 0
        self.refused = 0
        """The number of calls refused so far."""
        self._wait_seconds = wait_seconds
        self._waiting_max = waiting_max
        self.waiting = 0
        self._held: dict[str, int] = {}
        # The queue of each credential, beginning with the credential whose turn is next.
        # A queue has the arrival of each call, in seconds of the loop's clock.
        self._queues: dict[str, dict[asyncio.Future[bool], float]] = {}

    def enter(self, holder: str) -> bool:
        """Takes a place for a call of a credential. Returns False if the call must wait."""
        # No call overtakes an older one of the same credential.
        if holder in self._queues or not self._has_room(holder):
            return False
        self._take(holder)
        return True

    async def wait(self, holder: str) -> bool:
        """Waits for a place and takes it. Returns False if none becomes free in time."""
        loop = asyncio.get_running_loop()
        if not self._wait_seconds or self.waiting >= self._waiting_max or self._is_overloaded(holder, loop.time()):
            self.refused += 1
            return False
        turn: asyncio.Future[bool] = loop.create_future()
        timer = loop.call_later(self._wait_seconds, partial(self._refuse, holder, turn))
        self._queues.setdefault(holder, {})[turn] = loop.time()
        self.waiting += 1
        try:
            entered = await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._remove(holder, turn)
            elif turn.result():
                self.leave(holder)
            raise
        finally:
            timer.cancel()
        self.refused += not entered
        return entered

    def hold(self, holder: str, bounds: Sequence[Deadlines]) -> Callable[[], None]:
        """Starts the deadlines of the current task, which has a place, and frees the place when the task ends.

        The deadlines also end a task whose request body never arrives. Returns a function that frees the place earlier.
        """
        task = asyncio.current_task()
        assert task is not None, "gRPC runs each call in a task"
        for bound in bounds:
            bound.begin(task)

        def leave(task: asyncio.Task[Any]) -> None:
            self.leave(holder)
            for bound in bounds:
                bound.end(task)

        def leave_early() -> None:
            task.remove_done_callback(leave)
            leave(task)

        task.add_done_callback(leave)
        return leave_early

    def leave(self, holder: str) -> None:
        """Frees the place of a call, and gives free places to waiting calls."""
        self.in_flight -= 1
        held = self._held[holder] - 1
        if held:
            self._held[holder] = held
        else:
            del self._held[holder]
        for waiting in self._with_room():
            turn = next(iter(self._queues[waiting]))
            self._remove(waiting, turn)
            # A call that is being cancelled is still in its queue until its task runs.
            if not turn.done():
                self._take(waiting)
                turn.set_result(True)

    def end_waiting(self) -> None:
        """Refuses all waiting calls. From now on a call without a place is refused immediately."""
        self._wait_seconds = 0
        for holder, queue in list(self._queues.items()):
            for turn in list(queue):
                self._refuse(holder, turn)

    def _has_room(self, holder: str) -> bool:
        return self._held.get(holder, 0) < self.places - self.in_flight

    def _is_overloaded(self, holder: str, now: float) -> bool:
        """Whether the oldest waiting call of a credential has waited too long for a burst."""
        oldest = next(iter(self._queues.get(holder, {}).values()), now)
        return now - oldest > self._wait_seconds * BURST_PART

    def _take(self, holder: str) -> None:
        self._held[holder] = self._held.get(holder, 0) + 1
        self.in_flight += 1

    def _with_room(self) -> Iterator[str]:
        """Yields the credentials whose next waiting call may take a place, in turn, until none may."""
        while True:
            holder = next(filter(self._has_room, self._queues), None)
            if holder is None:
                return
            self._queues[holder] = self._queues.pop(holder)
            yield holder

    def _refuse(self, holder: str, turn: asyncio.Future[bool]) -> None:
        if not turn.done():
            turn.set_result(False)
            self._remove(holder, turn)

    def _remove(self, holder: str, turn: asyncio.Future[bool]) -> None:
        """Removes a call from its queue if it is still there."""
        queue = self._queues.get(holder, {})
        if turn not in queue:
            return
        self.waiting -= 1
        del queue[turn]
        if not queue:
            del self._queues[holder]


@dataclass(frozen=True, slots=True)
class Admissions:
    """The admission of all calls of a process.

    Streams have separate places, because a stream may take an hour.
    """

    calls: Admission
    """Of calls with one request and one answer."""
    streams: Admission
