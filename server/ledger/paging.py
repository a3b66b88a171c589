"""What a list of transactions is asked for, and where its pages begin.

A list is ordered by a position (create_time or amount) and then, because positions can
be equal, by account number and sequence, which together are unique. The last row's
key is therefore enough to go on from, whatever was inserted meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from typing import Generic, NamedTuple, TypeVar

from daybook.v1.transaction_pb2 import Transaction

from server.ledger.instants import Instant
from server.ledger.posting import Kind

PAGE_BYTES_MAX = 2 * 1024 * 1024
"""What the rows of a page take at most: an answer must fit into a message."""

Row = TypeVar("Row")
Key = TypeVar("Key")


class OrderField(Enum):
    """What a list of transactions can be ordered by."""

    CREATE_TIME = "create_time"
    AMOUNT = "amount"


@dataclass(frozen=True, slots=True)
class Order:
    """The order of a list; newest first by default."""

    field: OrderField = OrderField.CREATE_TIME
    descending: bool = True


class TransactionKey(NamedTuple):
    """The place of a transaction in a list."""

    position: int
    """The create_time or the amount, whichever the list is ordered by."""
    account_number: int
    sequence: int


@dataclass(frozen=True, slots=True)
class ApiKeyKey:
    """The place of an API key in a list."""

    create_time: Instant
    id: str


@dataclass(frozen=True, slots=True)
class TransactionFilter:
    """Which transactions a list shows. An empty or None field lets all pass."""

    kinds: tuple[Kind, ...] = ()
    categories: tuple[str, ...] = ()
    kind_categories: tuple[tuple[Kind, str], ...] = ()
    """Pairs of a kind and a category, for facades, instead of the two above."""
    states: tuple[Transaction.State.ValueType, ...] = ()
    create_time_from: Instant | None = None
    """Inclusive."""
    create_time_before: Instant | None = None
    """Exclusive."""
    month: int | None = None
    """A month of the UTC calendar, 202410."""
    location: str | None = None
    membership: str | None = None
    company: str | None = None


EVERYTHING = TransactionFilter()
"""The filter that lets all pass."""


@dataclass(frozen=True, slots=True)
class Page(Generic[Row, Key]):
    """Some rows of a list, and the key to go on from; None on the last page."""

    rows: list[Row]
    next_key: Key | None

    @classmethod
    def of(cls, rows: list[Row], limit: int, key: Callable[[Row], Key]) -> Page[Row, Key]:
        """The page out of `limit` + 1 rows: the one too many tells that there are more."""
        if len(rows) <= limit:
            return cls(rows, None)
        return cls(rows[:limit], key(rows[limit - 1]))

    def within(self, bytes_max: int, size: Callable[[Row], int], key: Callable[[Row], Key]) -> Page[Row, Key]:
        """The page, cut short where its rows take more bytes; it keeps at least one row."""
        sizes = [size(row) for row in self.rows]
        if sum(sizes) <= bytes_max or len(sizes) == 1:
            return self
        count = max(1, sum(total <= bytes_max for total in accumulate(sizes)))
        return Page(self.rows[:count], key(self.rows[count - 1]))
