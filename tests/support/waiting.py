"""Waiting for an event with a deadline, instead of sleeping for a time."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable

SECONDS_MAX = 60.0
"""A deadline that a busy machine does not reach; no test waits for it to pass."""
_POLL_SECONDS = 0.02


def wait_until(happened: Callable[[], bool], what: str) -> None:
    """Returns as soon as it happened; fails at the deadline, with what did not happen."""
    deadline = time.monotonic() + SECONDS_MAX
    while not happened():
        assert time.monotonic() < deadline, f"{what}: not within {SECONDS_MAX:.0f} seconds"
        time.sleep(_POLL_SECONDS)


async def until(happened: Callable[[], Awaitable[object] | object]) -> None:
    """Returns as soon as it happened, while the event loop runs on; TimeoutError at the deadline."""
    async with asyncio.timeout(SECONDS_MAX):
        while True:
            found = happened()
            if await found if inspect.isawaitable(found) else found:
                return
            await asyncio.sleep(_POLL_SECONDS / 2)
