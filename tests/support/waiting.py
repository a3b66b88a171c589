"""Waits for conditions with a deadline, instead of sleeping."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable

SECONDS_MAX = 60.0
"""A deadline, in seconds, that even a busy machine does not reach. No test waits for it to pass."""
_POLL_SECONDS = 0.02


def wait_until(happened: Callable[[], bool], what: str) -> None:
    """Returns when a condition holds. Fails at the deadline with its description `what`."""
    deadline = time.monotonic() + SECONDS_MAX
    while not happened():
        assert time.monotonic() < deadline, f"{what}: not within {SECONDS_MAX:.0f} seconds"
        time.sleep(_POLL_SECONDS)


async def until(happened: Callable[[], Awaitable[object] | object]) -> None:
    """Returns when a condition holds, without blocking the event loop. Raises TimeoutError at the deadline."""
    async with asyncio.timeout(SECONDS_MAX):
        while True:
            found = happened()
            if await found if inspect.isawaitable(found) else found:
                return
            await asyncio.sleep(_POLL_SECONDS / 2)
