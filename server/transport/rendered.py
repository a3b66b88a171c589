"""What a facade makes of rows, kept for the next page that shows them.

A fast path. To parse a stored transaction and to render it costs more than all else that a
page does, and most pages that are asked for are first ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar

ROWS_CACHED_MAX = 4096
"""How many rows a facade keeps, those that were shown last."""
ROW_BYTES_MAX = 2048
"""A stored row that is longer is rendered each time, so that the rows kept take 20 MiB at most, and 3 as a rule."""

Rendered = TypeVar("Rendered")


def keep_rendered(render: Callable[[bytes], Rendered]) -> Callable[[bytes], Rendered]:
    """Keeps what a function makes of stored transactions.

    They are told apart by all of their bytes, and nothing else may have a part in what is made
    of them: so nothing that is kept can ever be out of date.
    """
    kept = lru_cache(ROWS_CACHED_MAX)(render)

    @wraps(render)
    def rendered(body: bytes) -> Rendered:
        return kept(body) if len(body) <= ROW_BYTES_MAX else render(body)

    return rendered
