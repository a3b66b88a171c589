"""A cache of the first page of an account's transactions, newest first."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from sqlalchemy import ARRAY, BigInteger, Select, bindparam, func, select

from server.caching import ByteLRU
from server.ledger.paging import EVERYTHING, NEWEST_FIRST, Page, TransactionKey, TransactionList, TransactionRow
from server.store.data_loader import DataLoader
from server.store.database import Database
from server.store.query import Query
from server.store.tables import account_states

PAGES_BYTES_MAX = 33_554_432
"""The largest size of the cache, in bytes: about 1,500 typical pages."""
ROW_BYTES = 250
"""The approximate size of a row without its body, in bytes."""


class FirstPages:
    """Caches the first page of an account, which clients request most.

    The head of an account covers its whole history, because each hash covers its predecessor's. A
    page is therefore valid while the account has the same head, whichever process posts, and also
    after the database was restored.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._pages: ByteLRU[tuple[int, int], tuple[bytes, Page[TransactionRow, TransactionKey]]] = ByteLRU(
            PAGES_BYTES_MAX, lambda _, cached: sum(ROW_BYTES + len(row.body) for row in cached[1].rows)
        )
        self._read_head: Callable[[int], Awaitable[bytes]] = self._read_one_head
        if database.primary.has_round_trips:
            self._read_head = DataLoader(self._read_heads)

    @staticmethod
    def has(query: TransactionList) -> bool:
        """Whether a list is cached."""
        first = TransactionList(query.tenant_number, query.account_number, EVERYTHING, NEWEST_FIRST, None, query.limit)
        return query.account_number is not None and query == first

    async def page(
        self, query: TransactionList, read: Callable[[TransactionList], Awaitable[Page[TransactionRow, TransactionKey]]]
    ) -> Page[TransactionRow, TransactionKey]:
        """The page, from the cache or from `read`."""
        number = query.account_number
        assert number is not None, "`has` is False for a list without an account"
        head = await self._read_head(number)
        cached = self._pages.get((number, query.limit))
        if cached is not None and cached[0] == head:
            return cached[1]
        page = await read(query)
        # If the head has changed, the page may belong to either head.
        if page.rows and await self._read_head(number) == head:
            self._pages.put((number, query.limit), (head, page))
        return page

    async def _read_one_head(self, account_number: int) -> bytes:
        ((head,),) = await self._database.lists.fetch(_HEAD, {"account_number": account_number})
        return bytes(head)

    async def _read_heads(self, account_numbers: Collection[int]) -> Mapping[int, bytes]:
        rows = await self._database.lists.fetch(_HEADS, {"account_numbers": list(account_numbers)})
        return {number: bytes(head) for number, head in rows}


def head_statement() -> Select[Any]:
    """The head of an account: the hash of its newest transaction, empty before the first."""
    columns = account_states.c
    return select(columns.last_hash).where(columns.account_number == bindparam("account_number"))


def heads_statement() -> Select[Any]:
    """The heads of several accounts, each after the account's number. For PostgreSQL."""
    columns = account_states.c
    numbers = bindparam("account_numbers", type_=ARRAY(BigInteger))
    return select(columns.account_number, columns.last_hash).where(columns.account_number == func.any(numbers))


_HEAD, _HEADS = Query(head_statement()), Query(heads_statement())
