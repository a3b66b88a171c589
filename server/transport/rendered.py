"""A cache of what facades render.

Parsing and rendering a stored transaction costs more than everything else that a page does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVarTuple, Unpack

from server.caching import ByteLRU

RENDERED_BYTES_MAX = 33_554_432
"""The largest size of the cache of all facades: about 30,000 rows of the usual length."""
ENTRY_BYTES_MAX = 8192
"""A larger entry is rendered each time."""
INTEGER_BYTES = 32

Arguments = TypeVarTuple("Arguments")


def keep_rendered(render: Callable[[Unpack[Arguments]], bytes]) -> Callable[[Unpack[Arguments]], bytes]:
    """Caches a pure function of stored bytes, texts and integers.

    An entry is found by all of its arguments, so it is never out of date.
    """

    @wraps(render)
    def rendered(*args: *Arguments) -> bytes:
        key = (render, *args)
        found = _kept.get(key)
        if found is None:
            found = render(*args)
            if _size(key, found) <= ENTRY_BYTES_MAX:
                _kept.put(key, found)
        return found

    return rendered


def _size(key: tuple[object, ...], rendered: bytes) -> int:
    return len(rendered) + sum(len(each) if isinstance(each, bytes | str) else INTEGER_BYTES for each in key)


_kept: ByteLRU[tuple[object, ...], bytes] = ByteLRU(RENDERED_BYTES_MAX, _size)
