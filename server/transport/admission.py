"""Admission: how many calls may be under way at once in this process, and how credentials share them.

A call is admitted by its headers, before its body is read. The places are divided by one
rule: a credential may hold at most as many as are free. So a credential that calls alone
gets half of them, two credentials a third each, and one more finds room beside any number
of others that take all they may.

A call for which there is no place waits a while for one, and is then refused. While it
waits, its client can't retry it: aggressive retries slow down, and take no time from the
calls that were admitted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from server.transport.deadlines import Deadlines

WAITING_CALLS_MAX = 5000
"""How many calls wait for a place. Beyond it a call is refused at once."""


class Admission:
    """Counts the calls under way, in total and of each credential. For one event loop."""

    def __init__(self, places: int, wait_seconds: float = 0, waiting_max: int = WAITING_CALLS_MAX) -> None:
        """`places` is how many calls may be under way together, at least 1; `wait_seconds` may be 0."""
        self.places = places
        self.under_way = 0
        self.refused = 0
        """How many calls were refused so far."""
        self._wait_seconds = wait_seconds
        self._waiting_max = waiting_max
        self.waiting = 0
        self._held: dict[str, int] = {}
        # The calls that wait, by their credentials; the credential whose turn is next stands first.
        self._queues: dict[str, dict[asyncio.Future[bool], None]] = {}

    def enter(self, holder: str) -> bool:
        """Takes a place for a call of a credential; False, taking none, if the call must wait."""
        # No call overtakes an older one of the same credential.
        if holder in self._queues or not self._has_room(holder):
            return False
        self._take(holder)
        return True

    async def wait(self, holder: str) -> bool:
        """Takes a place as soon as there is one; False, taking none, if there is none in time."""
        if not self._wait_seconds or self.waiting >= self._waiting_max:
            self.refused += 1
            return False
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[bool] = loop.create_future()
        timer = loop.call_later(self._wait_seconds, partial(self._refuse, holder, turn))
        self._queues.setdefault(holder, {})[turn] = None
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

    def hold(self, holder: str, bounds: Sequence[Deadlines]) -> None:
        """Begins the time of the current task, which has a place, and gives the place back when the task ends.

        The task ends however the call does, also where its body never comes.
        """
        task = asyncio.current_task()
        assert task is not None, "gRPC makes one for each call"
        for bound in bounds:
            bound.begin(task)

        def leave(task: asyncio.Task[Any]) -> None:
            self.leave(holder)
            for bound in bounds:
                bound.end(task)

        task.add_done_callback(leave)

    def leave(self, holder: str) -> None:
        """Gives the place of a call back, and to those that wait what is free now."""
        self.under_way -= 1
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
        """Refuses all calls that wait, and from now on every call for which there is no place, at once."""
        self._wait_seconds = 0
        for holder, queue in list(self._queues.items()):
            for turn in list(queue):
                self._refuse(holder, turn)

    def _has_room(self, holder: str) -> bool:
        return self._held.get(holder, 0) < self.places - self.under_way

    def _take(self, holder: str) -> None:
        self._held[holder] = self._held.get(holder, 0) + 1
        self.under_way += 1

    def _with_room(self) -> Iterator[str]:
        """The credentials of calls that wait and may have a place, each in turn, until none may."""
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
        """Takes a call out of its queue, unless it is out already."""
        queue = self._queues.get(holder, {})
        if turn not in queue:
            return
        self.waiting -= 1
        del queue[turn]
        if not queue:
            del self._queues[holder]


@dataclass(frozen=True, slots=True)
class Admissions:
    """The admission of every call of a process.

    Streams, which may take an hour, have places of their own and take none from short calls.
    """

    calls: Admission
    """Calls of one request and one answer."""
    streams: Admission
