"""Database work that a cancellation doesn't interrupt."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from sqlalchemy import Select
from sqlalchemy.ext.asyncio import AsyncConnection

Result = TypeVar("Result")


async def uninterrupted(work: Coroutine[Any, Any, Result]) -> Result:
    """Awaits work of a bounded length; a cancellation is raised once the work has ended.

    A streaming read needs this: if a statement is abandoned between its execution and the fetch
    of its rows, SQLite keeps its snapshot until the garbage collector frees the driver's cursor, even
    if the connection is closed. Until then no checkpoint passes the snapshot.
    """
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        raise


async def rows_of(connection: AsyncConnection, statement: Select[Any]) -> Sequence[Any]:
    """All rows of a statement that returns few; a cancellation is raised once they are read."""
    result = await uninterrupted(connection.execute(statement))
    return list(result)
