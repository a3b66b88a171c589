"""Records the statements that a ledger sends during a block."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from server.book import Book
from server.store.database_tracer import DatabaseTracer


class Statements(DatabaseTracer):
    """Counts the statements that read bodies, and all others."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def statement(self, system: str, text: str) -> Callable[[BaseException | None], None]:
        """Records a statement."""
        self.texts.append(text)
        return super().statement(system, text)

    @property
    def of_bodies(self) -> int:
        """How many read rows of transactions."""
        return self.of("transactions")

    def of(self, table: str) -> int:
        """How many read rows of a table."""
        return sum(bool(re.search(rf"\b(FROM|JOIN) {table}\b", text)) for text in self.texts)


@contextmanager
def statements(book: Book) -> Iterator[Statements]:
    """The statements of the block."""
    found = Statements()
    with book.database.traced(found):
        yield found
