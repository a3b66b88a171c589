"""A cache of the rows that facades render.

Parsing and rendering stored transactions is the largest cost of a page.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVarTuple, Unpack

from server.caching import ByteLRU

RENDERED_BYTES_MAX = 33_554_432
"""Maximum size of the cache of all facades, in bytes: about 30,000 typical rows."""
ENTRY_BYTES_MAX = 8192
"""Maximum size of an entry, in bytes. A larger one is rendered each time."""
INTEGER_BYTES = 32

Arguments = TypeVarTuple("Arguments")


def cache_rendered(render: Callable[[Unpack[Arguments]], bytes]) -> Callable[[Unpack[Arguments]], bytes]:
    """Caches a pure function of stored bytes, texts and integers.

    All arguments are the key, so an entry is never stale.
    """

    @wraps(render)
    def rendered(*args: *Arguments) -> bytes:
        key = (render, *args)
        found = _cache.get(key)
        if found is None:
            found = render(*args)
            if _size(key, found) <= ENTRY_BYTES_MAX:
                _cache.put(key, found)
        return found

    return rendered


def _size(key: tuple[object, ...], rendered: bytes) -> int:
    return len(rendered) + sum(len(each) if isinstance(each, bytes | str) else INTEGER_BYTES for each in key)


_cache: ByteLRU[tuple[object, ...], bytes] = ByteLRU(RENDERED_BYTES_MAX, _size)
