"""An LRU cache whose bound is in bytes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from operator import itemgetter
from typing import Generic, TypeVar

from cachetools import LRUCache

ENTRY_BYTES = 256
"""Approximate overhead of an entry, in bytes, beside the size that the caller counts."""

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class ByteLRU(Generic[Key, Value]):
    """Values by key. Evicts the least recently used entries when full. Not thread-safe."""

    def __init__(self, bytes_max: int, size: Callable[[Key, Value], int]) -> None:
        """`size` counts the variable parts of an entry, in bytes. An entry larger than the cache is not stored."""
        self._size = size
        self._entries: LRUCache[Key, tuple[Value, int]] = LRUCache(bytes_max, getsizeof=itemgetter(1))

    @property
    def bytes(self) -> int:
        """The counted size of all entries."""
        return int(self._entries.currsize)

    def get(self, key: Key) -> Value | None:
        """The value of a key, or None."""
        try:
            return self._entries[key][0]
        except KeyError:
            return None

    def put(self, key: Key, value: Value) -> None:
        """Stores a value, in place of the key's previous one."""
        size = ENTRY_BYTES + self._size(key, value)
        if size <= self._entries.maxsize:
            self._entries[key] = (value, size)
        else:
            self._entries.pop(key, None)
