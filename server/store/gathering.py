"""Reads that many ask for at a time, asked of the database together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")

GATHERED_MAX = 64
"""With how many a read doesn't wait for more. Others may still come with it, until it begins."""
GATHERED_SECONDS_MAX = 0.05
"""How long a read waits for the one before. One whose connection hangs holds up nobody for longer."""


class Gathered(Generic[Key, Value]):
    """Reads values by their keys: one after the other, and each for all who came while the one before was under way.

    A fast path for a database that is asked over a socket, where the way there and back costs
    more than what is read. Nobody is told what was read before they came.
    """

    def __init__(self, read: Callable[[Collection[Key]], Awaitable[Mapping[Key, Value]]]) -> None:
        """`read` gives the values of keys."""
        self._read = read
        self._under_way: asyncio.Task[Mapping[Key, Value]] | None = None
        self._next: tuple[list[Key], asyncio.Task[Mapping[Key, Value]]] | None = None

    async def __call__(self, key: Key) -> Value:
        """The value of a key. Raises KeyError if there is none, and what reading raises."""
        if self._next is None:
            keys: list[Key] = []
            self._next = (keys, asyncio.create_task(self._run(keys)))
        keys, values = self._next
        keys.append(key)
        # Who goes away doesn't take it from the others.
        return (await asyncio.shield(values))[key]

    async def _run(self, keys: Sequence[Key]) -> Mapping[Key, Value]:
        if self._under_way is not None:
            await asyncio.wait([self._under_way], timeout=GATHERED_SECONDS_MAX)
        # Calls come in bursts: while there are newcomers each time that all who are ready have
        # had their turn, there is one more such round for others.
        known = 0
        while known < len(keys) < GATHERED_MAX:
            known = len(keys)
            await asyncio.sleep(0)
        self._next, self._under_way = None, asyncio.current_task()
        return await self._read(set(keys))
