"""Runs a scenario: callers under load, a process that ends again and again, and the checks afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from random import Random

import grpc

from tests.chaos.journal import Journal, Send, over_grpc, over_rest
from tests.chaos.stages import Stage
from tests.support.callers import OWN_CONNECTION, Client
from tests.support.waiting import until

CALLERS = 64
CONNECTIONS = 8
READS = 0.1
"""The part of the calls that read a page."""
REST_EVERY = 8
"""Behind the gateway one of so many callers posts over REST."""
END_SECONDS_MAX = 60.0
"""Mean time that an end may take, with its recovery. Beyond it the scenario fails."""
ANSWERS_BETWEEN = (50, 500)
"""Answers between the recovery from an end and the next end: a range to draw from."""
ANSWERS_RECOVERED = 50
"""Answers after a restart until the service counts as recovered."""
REPETITIONS = 200
CHANNEL_OPTIONS = (
    *OWN_CONNECTION,
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.min_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 100),
)
"""A client that connects again at once, so that its backoff doesn't count as time without service."""


@dataclass(frozen=True)
class Figures:
    """What a scenario measured. Times are in seconds."""

    ends: int
    acknowledged: int
    refused: int
    repeated: int
    """Postings that were sent again because an attempt got no answer."""
    repeated_reads: int
    """Attempts of reads that got no answer."""
    unserved: Sequence[float]
    """The longest time without an answer to any posting around each end."""
    slowest: float
    """The longest time from the first attempt of a call to its answer."""
    duration: float


async def run(stage: Stage, ends: int, seed: int, callers: int = CALLERS) -> Figures:
    """Ends the victims in turn, so many times in all, under load. AssertionError if the books are wrong."""
    random, journal, begun = Random(seed), Journal(), time.monotonic()
    stopping = asyncio.Event()
    async with AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{stage.port}", CHANNEL_OPTIONS))
            for _ in range(CONNECTIONS)
        ]
        clients = [Client(channel, stage.key) for channel in channels]
        async with asyncio.timeout(ends * END_SECONDS_MAX), asyncio.TaskGroup() as group:
            for number in range(callers):
                client, caller = clients[number % CONNECTIONS], Random(f"{seed}-{number}")
                is_rest = stage.has_gateway and number % REST_EVERY == 0
                send_once = over_rest(f"http://127.0.0.1:{stage.port}", client) if is_rest else over_grpc(client)
                group.create_task(_keep_calling(client, send_once, journal, caller, stopping))
            unserved = [await _end_once(stage, number, journal, random) for number in range(ends)]
            stopping.set()
        await journal.check(clients[0])
        await journal.check_repetitions(clients[0], random, REPETITIONS)
        await journal.check(clients[0])
    return Figures(
        ends=ends,
        acknowledged=len(journal.acknowledged),
        refused=len(journal.refused),
        repeated=len(journal.repeated),
        repeated_reads=journal.repeated_reads,
        unserved=unserved,
        slowest=journal.slowest,
        duration=time.monotonic() - begun,
    )


async def _keep_calling(
    client: Client, send_once: Send, journal: Journal, random: Random, stopping: asyncio.Event
) -> None:
    """One caller: one call after the other until the end of the scenario."""
    while not stopping.is_set():
        if random.random() < READS:
            await journal.read(client, random)
        else:
            await journal.perform(send_once, journal.next_call(random), random)


async def _end_once(stage: Stage, number: int, journal: Journal, random: Random) -> float:
    """Ends a victim and waits for the recovery; returns the longest time without an answer, in seconds."""
    victim, times = stage.victims[number % len(stage.victims)], journal.answer_times
    await _answers(journal, random.randint(*ANSWERS_BETWEEN))
    first = len(times) - 1
    await asyncio.to_thread(victim.end)
    await asyncio.to_thread(victim.start)
    await _answers(journal, ANSWERS_RECOVERED)
    return max(later - earlier for earlier, later in zip(times[first:], times[first + 1 :], strict=False))


async def _answers(journal: Journal, count: int) -> None:
    """Waits for so many more answers."""
    target = len(journal.answer_times) + count
    await until(lambda: len(journal.answer_times) >= target)
