"""Lists and their pages.

A list of transactions is ordered by a position (create_time or amount) and then, because
positions can be equal, by account number and sequence, which together are unique. The next page
therefore begins after the key of the last row, whatever was inserted in between.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from typing import Generic, NamedTuple, TypeVar

from daybook.v1.transaction_pb2 import Transaction

from server.ledger.instants import Instant
from server.ledger.posting import Kind

PAGE_BYTES_MAX = 2 * 1024 * 1024
"""The largest size of the rows of a page: a response must fit into a message."""

Row = TypeVar("Row")
Key = TypeVar("Key")


class OrderField(Enum):
    """The fields that a list of transactions can be ordered by."""

    CREATE_TIME = "create_time"
    AMOUNT = "amount"


@dataclass(frozen=True, slots=True)
class Order:
    """The order of a list; newest first by default."""

    field: OrderField = OrderField.CREATE_TIME
    descending: bool = True

    def reaches(self, key: TransactionKey, end: TransactionKey) -> bool:
        """Whether a list of this order has come to `end`, or passed it, with the row `key`."""
        return key <= end if self.descending else key >= end


class TransactionKey(NamedTuple):
    """The place of a transaction in a list. Keys compare in the ascending order of the list."""

    position: int
    """The value of the field that orders the list: the create_time or the amount."""
    account_number: int
    sequence: int


class TransactionRow(NamedTuple):
    """A transaction in a list."""

    position: int
    account_number: int
    sequence: int
    body: bytes
    """The serialized Transaction."""

    @property
    def key(self) -> TransactionKey:
        """The place of the transaction in the list."""
        return TransactionKey(self.position, self.account_number, self.sequence)


class Heads:
    """The newest sequence of each account at one moment, which says which transactions existed then.

    Sequences have no gaps and rows are never deleted, so this is a snapshot that holds no resource
    of the database. It takes 16 bytes for each account.
    """

    def __init__(self) -> None:
        self._account_numbers = array("q")
        self._sequences = array("q")

    def add(self, account_number: int, sequence: int) -> None:
        """Adds the newest sequence of an account, after accounts with lower numbers."""
        self._account_numbers.append(account_number)
        self._sequences.append(sequence)

    def cover(self, row: TransactionRow) -> bool:
        """Whether the transaction existed."""
        place = bisect_left(self._account_numbers, row.account_number)
        return (
            place < len(self._account_numbers)
            and self._account_numbers[place] == row.account_number
            and row.sequence <= self._sequences[place]
        )


@dataclass(frozen=True, slots=True)
class ApiKeyKey:
    """The place of an API key in a list."""

    create_time: Instant
    id: str


@dataclass(frozen=True, slots=True)
class TransactionFilter:
    """Selects the transactions of a list. An empty or None field selects all."""

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
"""The filter that selects every transaction."""
NEWEST_FIRST = Order()


@dataclass(frozen=True, slots=True)
class TransactionList:
    """A list of transactions and the page of it to read."""

    tenant_number: int
    account_number: int | None
    """None lists the whole tenant."""
    filter: TransactionFilter
    order: Order
    after: TransactionKey | None
    """The page begins after this key; None reads the first page."""
    limit: int
    """In rows."""
    bytes_max: int | None = PAGE_BYTES_MAX
    """The largest size of the bodies of the page; None for no bound. A page has at least one row."""


@dataclass(frozen=True, slots=True)
class Page(Generic[Row, Key]):
    """Consecutive rows of a list, and the key after which the next page begins; None on the last page."""

    rows: list[Row]
    next_key: Key | None

    @classmethod
    def of(cls, rows: list[Row], limit: int, key: Callable[[Row], Key]) -> Page[Row, Key]:
        """Makes a page out of at most `limit` + 1 rows. The extra row shows that there is a next page."""
        if len(rows) <= limit:
            return cls(rows, None)
        return cls(rows[:limit], key(rows[limit - 1]))

    def within(self, bytes_max: int, size: Callable[[Row], int], key: Callable[[Row], Key]) -> Page[Row, Key]:
        """The page, truncated to at most `bytes_max` bytes of rows, but to no fewer than one row."""
        sizes = [size(row) for row in self.rows]
        if sum(sizes) <= bytes_max or len(sizes) == 1:
            return self
        count = max(1, sum(total <= bytes_max for total in accumulate(sizes)))
        return Page(self.rows[:count], key(self.rows[count - 1]))
