"""A cache of what facades render.

Parsing and rendering a stored transaction costs more than everything else that a page does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from server.caching import ByteLRU

RENDERED_BYTES_MAX = 8_388_608
"""The largest size of the cache of one facade: about 10,000 rows of the usual length."""
ENTRY_BYTES_MAX = 8192
"""A larger entry is rendered each time."""
INTEGER_BYTES = 32

Arguments = ParamSpec("Arguments")


def keep_rendered(render: Callable[Arguments, bytes]) -> Callable[Arguments, bytes]:
    """Caches a pure function of stored bytes, texts and integers.

    An entry is found by all of its arguments, so it is never out of date.
    """
    kept: ByteLRU[tuple[object, ...], bytes] = ByteLRU(RENDERED_BYTES_MAX, _size)

    @wraps(render)
    def rendered(*args: Arguments.args, **kwargs: Arguments.kwargs) -> bytes:
        found = kept.get(args)
        if found is None:
            found = render(*args, **kwargs)
            if _size(args, found) <= ENTRY_BYTES_MAX:
                kept.put(args, found)
        return found

    return rendered


def _size(arguments: tuple[object, ...], rendered: bytes) -> int:
    return len(rendered) + sum(len(each) if isinstance(each, bytes | str) else INTEGER_BYTES for each in arguments)
