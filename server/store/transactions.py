"""Reads transactions, refunds and hour windows. The statements of lists are in list_statements.py."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import BigInteger, BindParameter, Select, bindparam, column, select, values

from server.caching import ByteLRU
from server.ledger.instants import Instant
from server.ledger.paging import Heads, Order, OrderField, Page, TransactionKey, TransactionList, TransactionRow
from server.ledger.posting import AccountState
from server.ledger.refunds import Refunds, RefundTotal
from server.ledger.usage import UsageWindow
from server.store.database import Database
from server.store.first_pages import FirstPages
from server.store.list_statements import ROWS_READ_MAX, BoundedStrategy, Strategy, parameters_of, strategy_of
from server.store.query import Query
from server.store.states import QUERIES_CACHED_MAX, account_parameters, current_states_query, to_current_state
from server.store.tables import account_states, accounts, refunds, transactions, usage_windows
from server.store.uninterrupted import rows_of

QUERIES_BYTES_MAX = 8_388_608
"""The largest size of the cache of compiled list statements, in bytes. The longest has about 70,000."""
PARAMETER_BYTES = 150
"""The approximate size of a parameter of a compiled statement, in bytes."""
HEADS_AT_ONCE = 10_000
"""The number of accounts whose heads one statement reads."""
_OFFSET_MAX = 2**62
"""The largest offset that cannot overflow BIGINT arithmetic."""


class _ListQueries(NamedTuple):
    """The compiled statements of a list."""

    page: Query
    boundary: Query | None
    """Reads the key at which the scan had to stop; None if the index serves the whole filter."""


_TRANSACTION = Query(
    select(transactions.c.body, transactions.c.allocations).where(
        transactions.c.account_number == bindparam("account_number"), transactions.c.uid == bindparam("uid")
    )
)

_SEQUENCE = Query(
    select(account_states.c.sequence).where(account_states.c.account_number == bindparam("account_number"))
)
_KEY = Query(
    select(*transactions.c["create_time", "amount", "sequence"]).where(
        transactions.c.account_number == bindparam("account_number"), transactions.c.uid == bindparam("uid")
    )
)


class TransactionStore:
    """Reads transactions, refunds and hour windows."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._queries: ByteLRU[Strategy, _ListQueries] = ByteLRU(QUERIES_BYTES_MAX, self._size)
        self._first_pages = FirstPages(database)

    async def get(self, account_number: int, uid: UUID) -> tuple[bytes, bytes] | None:
        """A transaction's body and allocations, or None if no transaction of the account has this uid."""
        rows = await self._database.primary.fetch(_TRANSACTION, {"account_number": account_number, "uid": uid.bytes})
        return tuple(rows[0]) if rows else None

    async def key(self, account_number: int, uid: UUID, order: Order) -> TransactionKey | None:
        """The place of a transaction in a list of this order, or None if the account has no such transaction."""
        rows = await self._database.primary.fetch(_KEY, {"account_number": account_number, "uid": uid.bytes})
        if not rows:
            return None
        create_time, amount, sequence = rows[0]
        position = create_time if order.field is OrderField.CREATE_TIME else amount
        return TransactionKey(position, account_number, sequence)

    async def heads(self, tenant_number: int, account_number: int | None) -> Heads:
        """The newest sequence of an account, or of every account of a tenant for None. All are of one snapshot."""
        heads = Heads()
        if account_number is not None:
            ((sequence,),) = await self._database.primary.fetch(_SEQUENCE, {"account_number": account_number})
            heads.add(account_number, sequence)
            return heads
        statement = sequences_statement(tenant_number)
        after: int | None = 0
        async with self._database.primary.snapshot() as connection:
            while after is not None:
                rows = await rows_of(connection, statement.where(accounts.c.number > after).limit(HEADS_AT_ONCE))
                for row in rows:
                    heads.add(*row)
                after = rows[-1].number if len(rows) == HEADS_AT_ONCE else None
        return heads

    async def refunds(self, charges: Collection[tuple[int, int]]) -> Refunds:
        """The refund totals of the refunded ones among these charges (account number, sequence)."""
        if not charges:
            return {}
        count = len(charges)
        parameters = dict(zip(_refunds_names(count), chain.from_iterable(charges), strict=True))
        rows = await self._database.lists.fetch(_refunds_query(count), parameters)
        return {(number, sequence): RefundTotal(*total) for number, sequence, *total in rows}

    async def slice(self, account_number: int, offset: int, limit: int) -> tuple[list[TransactionRow], int]:
        """At most `limit` transactions of an account after the `offset` newest ones, newest first, and their total.

        Both are of one snapshot. Sequences have no gaps, so any offset costs the same.
        """
        rows = await self._database.lists.fetch(
            _SLICE,
            {"account_number": account_number, "offset": min(offset, _OFFSET_MAX), "limit": limit},
        )
        # For an empty page, one row has the total and no transaction.
        return [TransactionRow(*row) for _, *row in rows if row[0] is not None], rows[0][0]

    async def windows(
        self, account_number: int, offset: int, limit: int, now: Instant
    ) -> tuple[AccountState, list[UsageWindow], int]:
        """An account's state without its lots, a page of its hour windows, newest first, and their total.

        All three are consistent with each other. The state is without credits that have expired by `now`.
        Numbers of windows have no gaps, so any offset costs the same.
        """
        parameters = {**account_parameters([account_number]), "now": now}
        (row,) = await self._database.lists.fetch(current_states_query(1), parameters)
        state = to_current_state(row)
        if state.window is None:
            return state, [], 0
        total = state.window.number
        last = total - min(offset, _OFFSET_MAX)
        numbers = {"account_number": account_number, "last": last, "limit": limit}
        rows = await self._database.lists.fetch(_WINDOWS, numbers)
        # The two reads need no common snapshot: only the newest window changes, and the state has it.
        return state, [state.window if row[0] == total else UsageWindow(*row) for row in rows], total

    async def list(self, query: TransactionList) -> Page[TransactionRow, TransactionKey]:
        """A page of a list.

        For a filter that no index serves, reads at most ROWS_READ_MAX rows. The page may then have fewer
        rows than the limit, or none, and still a next page.
        """
        if self._first_pages.has(query):
            return await self._first_pages.page(query, self._read)
        return await self._read(query)

    async def _read(self, query: TransactionList) -> Page[TransactionRow, TransactionKey]:
        page = await self._read_rows(query)
        if query.bytes_max is None:
            return page
        return page.within(query.bytes_max, size=lambda row: len(row.body), key=lambda row: row.key)

    async def _read_rows(self, query: TransactionList) -> Page[TransactionRow, TransactionKey]:
        queries = self._queries_of(strategy_of(query))
        parameters = {**parameters_of(query), "rows_read": ROWS_READ_MAX}
        rows = [TransactionRow._make(row) for row in await self._database.lists.fetch(queries.page, parameters)]
        page = Page.of(rows, query.limit, key=lambda row: row.key)
        if queries.boundary is None or page.next_key is not None:
            return page
        boundaries = [
            TransactionKey._make(row) for row in await self._database.lists.fetch(queries.boundary, parameters)
        ]
        if not boundaries:
            # Rows are never deleted: if the index ends before the boundary now, it did so at the first read.
            return page
        # The two reads need no common snapshot. Rows inserted in between can only move the boundary to before
        # the end of the scan. The next page then filters some rows again, but begins after the last row
        # of this page, so it repeats none.
        reached = [*boundaries, *(row.key for row in rows[-1:])]
        return Page(rows, min(reached) if query.order.descending else max(reached))

    def _queries_of(self, strategy: Strategy) -> _ListQueries:
        queries = self._queries.get(strategy)
        if queries is None:
            boundary = Query(strategy.boundary) if isinstance(strategy, BoundedStrategy) else None
            queries = _ListQueries(Query(strategy.page), boundary)
            self._queries.put(strategy, queries)
        return queries

    def _size(self, _strategy: Strategy, queries: _ListQueries) -> int:
        compiled = [query.compiled(self._database.primary.dialect) for query in queries if query is not None]
        return sum(len(query.text) + PARAMETER_BYTES * len(query.names) for query in compiled)


def sequences_statement(tenant_number: int) -> Select[Any]:
    """The account numbers of a tenant in ascending order, each with the account's newest sequence."""
    return (
        select(accounts.c.number, account_states.c.sequence)
        .join_from(accounts, account_states, account_states.c.account_number == accounts.c.number)
        .where(accounts.c.tenant_number == tenant_number)
        .order_by(accounts.c.number)
    )


def slice_statement() -> Select[Any]:
    """At most `limit` transactions of an account after the `offset` newest ones, each with the total of all."""
    columns = transactions.c
    total = account_states.c.sequence
    newest = total - bindparam("offset", type_=BigInteger)
    shown = (
        (columns.account_number == account_states.c.account_number)
        & (columns.sequence <= newest)
        & (columns.sequence > newest - bindparam("limit", type_=BigInteger))
    )
    return (
        select(total, *columns["create_time", "account_number", "sequence", "body"])
        .join_from(account_states, transactions, shown, isouter=True)
        .where(account_states.c.account_number == bindparam("account_number"))
        .order_by(columns.sequence.desc())
    )


_SLICE = Query(slice_statement())


def windows_statement() -> Select[Any]:
    """At most `limit` hour windows of an account up to the number `last`."""
    columns = usage_windows.c
    last: BindParameter[int] = bindparam("last", type_=BigInteger)
    return (
        select(*columns["number", "start", "computing", "serverless"])
        .where(
            columns.account_number == bindparam("account_number"),
            columns.number <= last,
            columns.number > last - bindparam("limit", type_=BigInteger),
        )
        .order_by(columns.number.desc())
    )


_WINDOWS = Query(windows_statement())


def refunds_statement(count: int) -> Select[Any]:
    """The totals of the refunds of `count` charges, each looked up by its primary key.

    With a list of pairs in the condition, SQLite would read all refunds, and PostgreSQL would
    take longer to plan than to read.
    """
    numbers = [bindparam(name, type_=BigInteger) for name in _refunds_names(count)]
    pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
    charges = (
        values(column("account_number", BigInteger), column("sequence", BigInteger), name="charges").data(pairs).cte()
    )
    columns = refunds.c
    is_of_charge = (columns.account_number == charges.c.account_number) & (columns.sequence == charges.c.sequence)
    shown = columns["account_number", "sequence", "amount", "last_create_time"]
    return select(*shown).join_from(charges, refunds, is_of_charge)


@lru_cache(QUERIES_CACHED_MAX)
def _refunds_query(count: int) -> Query:
    return Query(refunds_statement(count))


@lru_cache(QUERIES_CACHED_MAX)
def _refunds_names(count: int) -> tuple[str, ...]:
    """The names of the parameters of `count` charges: account and sequence of each."""
    return tuple(f"{name}_{i}" for i in range(count) for name in ("account", "sequence"))
