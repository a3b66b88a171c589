"""What a facade makes of rows, kept for the next page that shows them.

A fast path. To parse a stored transaction and to render it costs more than all else that a
page does, and most pages that are asked for are first ones.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache, wraps
from typing import Generic, TypeAlias, TypeVar

from server.ledger.paging import Page, TransactionKey
from server.store.transactions import TransactionRow

ROWS_CACHED_MAX = 4096
"""How many rows a facade keeps, those that were shown last."""
ROW_BYTES_MAX = 2048
"""A stored row that is longer is rendered each time, so that the rows kept take 20 MiB at most, and 3 as a rule."""

PAGES_CACHED_MAX = 128
"""How many pages a facade keeps. Beyond it the one goes that was asked for first."""
PAGE_ROWS_BYTES_MAX = 65_536
"""A page whose stored rows are longer is not kept, so that all of them take 16 MiB at most, and 8 as a rule."""

Rendered = TypeVar("Rendered")
TransactionPage: TypeAlias = Page[TransactionRow, TransactionKey]


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


class KeptPages(Generic[Rendered]):
    """What a facade makes of pages, kept for as long as the same question finds the same rows."""

    def __init__(self, render: Callable[[TransactionPage], Rendered]) -> None:
        self._render = render
        self._pages: dict[Hashable, tuple[TransactionPage, Rendered]] = {}

    def of(self, question: Hashable, page: TransactionPage) -> Rendered:
        """What is made of a page that was asked for so.

        Pages are compared by all of their bytes, so nothing that is kept can ever be out of
        date. That is quicker than to find each row by its bytes.
        """
        kept = self._pages.get(question)
        if kept is not None and kept[0] == page:
            return kept[1]
        rendered = self._render(page)
        if sum(len(row.body) for row in page.rows) <= PAGE_ROWS_BYTES_MAX:
            if len(self._pages) >= PAGES_CACHED_MAX and question not in self._pages:
                del self._pages[next(iter(self._pages))]
            self._pages[question] = (page, rendered)
        return rendered
