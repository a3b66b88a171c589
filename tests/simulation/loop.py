"""An event loop whose order a seed decides and whose time is virtual: a sleep costs nothing."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeVar, TypeVarTuple

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")

STEPS_MAX = 100_000
"""Number of callbacks after which a simulation counts as an endless loop. A correct one has a few thousand."""


class Stuck(Exception):
    """The simulation makes no progress: nothing is left to run, or it runs for too long."""


@dataclass(order=True, slots=True)
class _Callback:
    """A callback that waits for its time or for its turn."""

    when: int
    number: int
    handle: asyncio.Handle = field(compare=False)
    call: Callable[..., object] = field(compare=False)
    arguments: tuple[Any, ...] = field(compare=False)
    context: Context = field(compare=False)


class SimulatedLoop(asyncio.BaseEventLoop):
    """Runs ready callbacks in an order that `random` picks, and moves the time when none is ready.

    Overrides public methods of BaseEventLoop only. It has no threads, sockets or processes: a simulation that
    waits for one is Stuck.
    """

    def __init__(self, random: Random, *, disorder: float, step_microseconds: int) -> None:
        """`disorder` is the share of callbacks that are picked at random instead of in the order of their arrival.

        Each callback takes `step_microseconds` of virtual time.
        """
        self._is_running = False
        self._is_stopping = False
        super().__init__()
        self._random = random
        self._disorder = disorder
        self._step = step_microseconds
        self._ready_callbacks: list[_Callback] = []
        self._timers: list[_Callback] = []
        self._count = 0
        self.microseconds = 0
        """The virtual time since the start."""
        self.steps = 0
        """Number of callbacks so far."""
        self.digest = 0
        """Covers the order of all callbacks so far, and their times."""
        self.tasks: dict[asyncio.Task[Any], None] = {}
        """Tasks that are not done, in the order of their creation. asyncio itself keeps weak references only."""
        self.is_killed: Callable[[Context], bool] = lambda _: False
        """Whether the callbacks of a context don't run, because its simulated process was killed."""
        self._held_back: list[_Callback] = []
        """Callbacks of killed processes."""

    def time(self) -> float:
        """The virtual time, in seconds."""
        return self.microseconds / 1_000_000

    def call_soon(
        self, callback: Callable[[*Arguments], object], *args: *Arguments, context: Context | None = None
    ) -> asyncio.Handle:
        """Queues a callback."""
        context = copy_context() if context is None else context
        handle = asyncio.Handle(callback, args, self, context)
        self._count += 1
        self._ready_callbacks.append(_Callback(self.microseconds, self._count, handle, callback, args, context))
        return handle

    def call_at(
        self, when: float, callback: Callable[[*Arguments], object], *args: *Arguments, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Queues a callback for a virtual time."""
        context = copy_context() if context is None else context
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._count += 1
        due = max(self.microseconds, round(when * 1_000_000))
        heapq.heappush(self._timers, _Callback(due, self._count, handle, callback, args, context))
        return handle

    def create_task(
        self, coro: Generator[Any, None, Result] | Coroutine[Any, Any, Result], **options: Any
    ) -> asyncio.Task[Result]:
        """Creates a task, and keeps it until it is done, also if its process is killed."""
        task = super().create_task(coro, **options)
        self.tasks[task] = None
        task.add_done_callback(lambda done: self.tasks.pop(done, None))
        return task

    def run_forever(self) -> None:
        """Runs until `stop`. Raises Stuck."""
        self._is_running, self._is_stopping = True, False
        asyncio._set_running_loop(self)  # Part of asyncio's interface for event loops.
        try:
            while not self._is_stopping:
                self._run_one()
        finally:
            asyncio._set_running_loop(None)
            self._is_running = False

    def _run_one(self) -> None:
        ready, timers = self._ready_callbacks, self._timers
        if not ready:
            if not timers:
                raise Stuck("nothing is left to run")
            self.microseconds = max(self.microseconds, timers[0].when)
        while timers and timers[0].when <= self.microseconds:
            ready.append(heapq.heappop(timers))
        place = 0
        if len(ready) > 1 and self._random.random() < self._disorder:
            place = int(self._random.random() * len(ready))
        chosen = ready.pop(place)
        self.steps += 1
        if self.steps > STEPS_MAX:
            raise Stuck(f"no end after {STEPS_MAX} steps")
        # Python's hash of integers is the same in every process.
        self.digest = hash((self.digest, self.microseconds, place, chosen.number))
        if chosen.handle.cancelled():
            return
        if self.is_killed(chosen.context):
            self._held_back.append(chosen)
            return
        self.microseconds += self._step
        chosen.context.run(chosen.call, *chosen.arguments)

    def close(self) -> None:
        """Cancels every task that is left, also those of killed processes, and closes the loop."""
        self.is_killed = lambda _: False
        self._ready_callbacks += self._held_back
        self.steps = 0
        while self.tasks:
            for task in self.tasks:
                task.cancel()
            self.call_later(0.5, self.stop, context=Context())
            self.run_forever()
        super().close()

    def stop(self) -> None:
        """Ends `run_forever` after the current callback."""
        self._is_stopping = True

    def is_running(self) -> bool:
        """Whether `run_forever` runs."""
        return self._is_running

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Ignores what asyncio would log, such as errors of killed processes that no caller retrieves."""
