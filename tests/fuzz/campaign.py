"""Sends inputs of a kind, many at once, and counts their statuses."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from random import Random
from typing import Any, Protocol

from tests.fuzz import byte_streams
from tests.fuzz.byte_streams import ByteStreams, Port
from tests.fuzz.requests import Messages, RestRequests
from tests.fuzz.target import Target, Tenant

SENDERS = 32
FAILURES_MAX = 20
"""Failures that are described; the others are only counted."""


class Sender(AbstractAsyncContextManager[Any], Protocol):
    """Draws and sends inputs of one kind, one after the other."""

    def draw(self, random: Random, /) -> Any:
        """Draws an input; the same for the same state of `random` in the same tenant."""

    async def send(self, drawn: Any, /) -> list[str]:
        """Sends it; returns the statuses in its answer."""

    def is_fault(self, status: str, /) -> bool:
        """Whether a status blames the server."""


def _streams(port: Port, stream: Callable[[Random, bytes], bytes]) -> Callable[[Target, Tenant], Sender]:
    return lambda target, tenant: ByteStreams(target, tenant, port, stream)


KINDS: dict[str, Callable[[Target, Tenant], Sender]] = {
    "messages": Messages,
    "rest": RestRequests,
    "http1-server": _streams("server", byte_streams.http1),
    "http1-gateway": _streams("gateway", byte_streams.http1),
    "http2-server": _streams("server", byte_streams.http2),
    "http2-gateway": _streams("gateway", byte_streams.http2),
}
"""The kinds of inputs."""


@dataclasses.dataclass
class Figures:
    """What inputs of a kind did. Times are in seconds."""

    inputs: int = 0
    statuses: Counter[str] = dataclasses.field(default_factory=Counter)
    slowest: float = 0.0
    slowest_number: int = 0
    """The number of the slowest input."""
    seconds: float = 0.0
    failure_count: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: Figures) -> None:
        """Adds the figures of another batch."""
        self.inputs += other.inputs
        self.statuses += other.statuses
        self.slowest, self.slowest_number = max(
            (self.slowest, self.slowest_number), (other.slowest, other.slowest_number)
        )
        self.seconds += other.seconds
        self.failure_count += other.failure_count
        self.failures = (self.failures + other.failures)[:FAILURES_MAX]


async def run(make: Callable[[], Sender], name: str, numbers: range, seed: int) -> Figures:
    """Sends the inputs with these numbers. Input N of a kind is drawn from the seed and N alone."""
    figures, queue, begun = Figures(), iter(numbers), time.monotonic()
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        for _ in range(min(SENDERS, len(numbers))):
            sender = await stack.enter_async_context(make())
            group.create_task(_send_all(sender, name, queue, seed, figures))
        # Waits for the senders before their connections close.
    figures.seconds = time.monotonic() - begun
    return figures


async def _send_all(sender: Sender, name: str, queue: Any, seed: int, figures: Figures) -> None:
    for number in queue:
        drawn = sender.draw(Random(f"{seed}-{name}-{number}"))
        begun = time.monotonic()
        try:
            statuses = await sender.send(drawn)
        # An exception is a finding, not the end of the run.
        except Exception as error:
            statuses, faults = [type(error).__name__], [repr(error)]
        else:
            faults = [each for each in statuses if sender.is_fault(each)]
        figures.slowest, figures.slowest_number = max(
            (figures.slowest, figures.slowest_number), (time.monotonic() - begun, number)
        )
        figures.inputs += 1
        figures.statuses.update(statuses)
        if faults:
            figures.failure_count += 1
            if len(figures.failures) < FAILURES_MAX:
                figures.failures.append(f"{name} {number}: {', '.join(faults)}: {drawn!r:.2000}")
