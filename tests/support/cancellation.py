"""Reads of PostgreSQL that are given up at any moment, as those of callers who go away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

from sqlalchemy import text

from server.store.engine import Reader
from server.store.query import Query

ISOLATION = Query(text("SELECT current_setting('transaction_isolation')"))


async def give_up_at_every_step(read: Callable[[], Awaitable[Any]], check: Callable[[], Awaitable[None]]) -> int:
    """Begins a read again and again and cancels it each time one turn of the loop later; tells how often.

    After each it is checked what is left behind.
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
    raise AssertionError("it never ends")


async def check_no_transaction(reader: Reader) -> None:
    """A read sees what is committed when it is asked for, and not what some transaction saw that was left behind."""
    assert await reader.fetch(ISOLATION, {}) == [("read committed",)]
