"""Reads that many ask for at a time, asked of the database together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")

COMPANY_SECONDS = 0.001
"""How long a read waits for others where the one before was for several: about what it takes by itself."""
GATHERED_SECONDS_MAX = 0.05
"""How long a read waits for the one before. One whose connection hangs holds up nobody for longer."""


class Gathered(Generic[Key, Value]):
    """Reads values by their keys: one after the other, and each for all who came while the one before was under way.

    A fast path for a database that is asked over a socket, where the way there and back costs
    more than what is read. Who asks alone waits for nobody. Nobody is told what was read before
    they came.
    """

    def __init__(self, read: Callable[[Collection[Key]], Awaitable[Mapping[Key, Value]]]) -> None:
        """`read` gives the values of keys."""
        self._read = read
        self._under_way: asyncio.Task[Mapping[Key, Value]] | None = None
        self._next: tuple[list[Key], asyncio.Task[Mapping[Key, Value]]] | None = None
        self._had_company = False

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
        if self._had_company:
            # gRPC brings calls one by one, however many are under way. Those that are answered in
            # one go also cost it less, by more than their reads.
            await asyncio.sleep(COMPANY_SECONDS)
        self._next, self._under_way = None, asyncio.current_task()
        self._had_company = len(keys) > 1
        return await self._read(set(keys))
