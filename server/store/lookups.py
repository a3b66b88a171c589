"""Splits lists of keys into parts for one statement each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

KEYS_AT_ONCE_MAX = 512
"""The largest number of keys of one statement: engines limit its parameters."""

Key = TypeVar("Key")


def in_parts(keys: Iterable[Key]) -> Iterator[list[Key]]:
    """Keys in parts of at most KEYS_AT_ONCE_MAX."""
    remaining = iter(keys)
    while some := list(islice(remaining, KEYS_AT_ONCE_MAX)):
        yield some
