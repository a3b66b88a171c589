"""Records the statements that a ledger sends during a block."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from server.book import Book
from server.store.database_tracer import DatabaseTracer


class Statements(DatabaseTracer):
    """Records statements, and counts those that read a table."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def statement(self, system: str, text: str) -> Callable[[BaseException | None], None]:
        """Records a statement."""
        self.texts.append(text)
        return super().statement(system, text)

    @property
    def reads_of_transactions(self) -> int:
        """The number of statements that read transactions."""
        return self.reads_of("transactions")

    def reads_of(self, *tables: str) -> int:
        """Returns the number of statements that read any of the tables."""
        return sum(bool(re.search(rf"\b(FROM|JOIN) ({'|'.join(tables)})\b", text)) for text in self.texts)


@contextmanager
def statements(book: Book) -> Iterator[Statements]:
    """Records the statements of the block, also those of background work, such as readiness checks."""
    found = Statements()
    with book.database.tracing_with(found):
        yield found
