"""Database work that a cancellation doesn't interrupt."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


async def uninterrupted(work: Coroutine[Any, Any, Result]) -> Result:
    """Awaits work of a bounded length; a cancellation is raised once the work has ended.

    A streaming read needs this: SQLite keeps the snapshot of a statement that was left between
    its execution and the fetch of its rows, also when its connection is closed, until the
    garbage collector finds the driver's cursor. Until then no checkpoint passes the snapshot.
    """
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        raise
