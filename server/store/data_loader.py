"""A data loader: batches the reads that callers request while another read is under way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")

WAIT_SECONDS_MAX = 0.05
"""Time limit of a batch's wait for its predecessor, in seconds. Bounds the delay by a connection that hangs."""


class DataLoader(Generic[Key, Value]):
    """Reads values by key, one batch at a time; calls that arrive during a batch share the next one.

    For a database behind a socket, where a round trip costs more than reading the rows.
    A lone caller is not delayed. A caller never receives a value read before it asked.
    """

    def __init__(self, read: Callable[[Collection[Key]], Awaitable[Mapping[Key, Value]]]) -> None:
        """`read` returns the values of a batch of keys."""
        self._read = read
        self._in_flight: asyncio.Task[Mapping[Key, Value]] | None = None
        self._next: tuple[list[Key], asyncio.Task[Mapping[Key, Value]]] | None = None

    async def __call__(self, key: Key) -> Value:
        """The value of a key. Raises KeyError if there is none, and the errors of `read`."""
        if self._next is None:
            keys: list[Key] = []
            self._next = (keys, asyncio.create_task(self._run(keys)))
        keys, values = self._next
        keys.append(key)
        # A caller that is cancelled does not cancel the batch of the others.
        return (await asyncio.shield(values))[key]

    async def _run(self, keys: Sequence[Key]) -> Mapping[Key, Value]:
        if self._in_flight is not None:
            await asyncio.wait([self._in_flight], timeout=WAIT_SECONDS_MAX)
        self._next, self._in_flight = None, asyncio.current_task()
        return await self._read(set(keys))
