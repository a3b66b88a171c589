"""Background tasks: work that repeats until the end of a block."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import structlog

from server.ledger.errors import DaybookError

log = structlog.get_logger(__name__)

Work = Callable[[], Awaitable[object]]


@contextlib.asynccontextmanager
async def repeating(work: Work, seconds: float, failure: str, *, at_once: bool = False) -> AsyncIterator[None]:
    """Runs `work` every `seconds` in a background task until the end of the block.

    The first run begins after `seconds`, or immediately with `at_once`. A failed run is logged
    as `failure` and does not stop the next one. At the end of the block, the current run is
    cancelled and awaited.
    """
    task = asyncio.create_task(_repeat(work, seconds, failure, at_once))
    try:
        yield
    finally:
        task.cancel()
        # Unlike `await task`, this doesn't swallow a cancellation of the caller.
        await asyncio.wait([task])


async def attempt(work: Work, failure: str) -> None:
    """Runs `work` once, and logs an error as `failure` instead of raising it."""
    try:
        await work()
    except DaybookError as error:
        log.warning(failure, reason=error.reason)
    except Exception:
        log.exception(failure)


async def _repeat(work: Work, seconds: float, failure: str, at_once: bool) -> None:
    if at_once:
        await attempt(work, failure)
    while True:
        await asyncio.sleep(seconds)
        await attempt(work, failure)
