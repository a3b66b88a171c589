"""Cancels reads of PostgreSQL at every step, like callers that disconnect."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

from sqlalchemy import text

from server.store.engine import Reader
from server.store.query import Query

ISOLATION = Query(text("SELECT current_setting('transaction_isolation')"))


async def cancel_at_every_step(read: Callable[[], Awaitable[Any]], check: Callable[[], Awaitable[None]]) -> int:
    """Repeats a read and cancels it one iteration of the event loop later each time, until it completes.

    Runs `check` after each cancellation. Returns the number of cancellations.
    """
    for turns in count():
        work = asyncio.ensure_future(read())
        for _ in range(turns):
            await asyncio.sleep(0)
        if work.done():
            await work
            return turns
        work.cancel()
        await asyncio.wait([work])
        await check()
    raise AssertionError("the read never completes")


async def check_no_transaction(reader: Reader) -> None:
    """Fails if a cancelled read left its connection in a transaction, whose snapshot a later read would see."""
    assert await reader.fetch(ISOLATION, {}) == [("read committed",)]
