"""Reads of transactions and hour windows. What a filtered list is read by is in list_statements.py."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import lru_cache, partial
from itertools import chain
from typing import Any, NamedTuple, TypeAlias
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Dialect,
    Integer,
    Select,
    bindparam,
    column,
    func,
    select,
    values,
)

from server.ledger.instants import Instant
from server.ledger.paging import Order, TransactionFilter, TransactionKey
from server.ledger.posting import AccountState
from server.ledger.refunds import RefundTotal
from server.ledger.usage import UsageWindow
from server.store.data_loader import DataLoader
from server.store.database import Database
from server.store.list_statements import (
    ROWS_READ_MAX,
    STATEMENTS_CACHED_MAX,
    ListQueries,
    list_queries,
    shape_of,
    until_parameters,
)
from server.store.query import Query
from server.store.states import account_parameters, holdings_query, to_holding
from server.store.tables import account_states, refunds, transactions, usage_windows

READ_AHEAD = 4
"""How many rows a page may read at first for each that it shows, where its index doesn't serve all of its filter."""
SPARSE_AHEAD = 16
"""How many times as many as before it may read where none of those fit."""
_BEHIND_ALL = 2**62
"""An offset behind every row, with which a statement can still reckon."""


class TransactionRow(NamedTuple):
    """A transaction in a list."""

    position: int
    account_number: int
    sequence: int
    body: bytes
    """The serialized Transaction."""

    @property
    def key(self) -> TransactionKey:
        """Where the transaction stands in the list."""
        return TransactionKey(self.position, self.account_number, self.sequence)


Refunds: TypeAlias = Mapping[tuple[int, int], RefundTotal]
"""What was given back, by the account and the sequence of what it was given back of."""
Heads: TypeAlias = Mapping[int, bytes]
"""Hashes of the newest transactions of accounts, by the accounts' numbers. Each stands for all of its account."""


class TransactionStore:
    """Reads transactions and hour windows."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._head_query = Query.of(head_statement(), database.dialect)
        self.head: Callable[[int], Awaitable[bytes]] = (
            self._read_head if database.dialect.name == "sqlite" else DataLoader(self._read_heads)
        )
        """The hash of an account's newest transaction, which stands for all of them; empty before the first."""

    async def page(
        self,
        tenant_number: int,
        account_number: int | None,
        wanted: TransactionFilter,
        order: Order,
        after: TransactionKey | None,
        limit: int,
    ) -> tuple[list[TransactionRow], TransactionKey | None]:
        """At most `limit` transactions of an account, or of the tenant if it is None.

        It reads ROWS_READ_MAX rows along an index at most, and tells where that made it stop.
        None where it didn't: the rows are then all that there are, or as many as were asked for.
        """
        shape, parameters = shape_of(tenant_number, account_number, wanted, order, after, limit)
        queries = list_queries(shape, self._database.dialect)
        if not queries.boundaries:
            return await self._rows(queries.page, parameters), None
        rows: list[TransactionRow] = []
        passed = 0
        # To find the last row that may be read costs about as much as to walk there, except
        # along an account's rows, which are numbered.
        reach = ROWS_READ_MAX if queries.by_sequence else min(READ_AHEAD * limit, ROWS_READ_MAX)
        while True:
            until = await self._boundary(queries, parameters, order, reach)
            if until is None:
                rows += await self._rows(queries.page, parameters)
            else:
                rows += await self._rows(queries.page_until, parameters | until_parameters(until))
            passed += reach
            if until is None or len(rows) == limit or passed == ROWS_READ_MAX:
                return rows, until
            reach = min(_next_reach(passed, len(rows), limit), ROWS_READ_MAX - passed)
            shape, parameters = shape_of(tenant_number, account_number, wanted, order, until, limit - len(rows))
            queries = list_queries(shape, self._database.dialect)

    async def _rows(self, query: Query, parameters: Mapping[str, object]) -> list[TransactionRow]:
        # What `_make` does, without the call of it that each row would cost.
        return list(map(partial(tuple.__new__, TransactionRow), await self._database.fetch(query, parameters)))

    async def _boundary(
        self, queries: ListQueries, parameters: Mapping[str, object], order: Order, reach: int
    ) -> TransactionKey | None:
        """The key `reach` rows on, None for a list that ends before.

        The page is to be asked for until this key, and the next one goes on from it.
        """
        found = [
            TransactionKey(*row)
            for query in queries.boundaries
            for row in await self._database.fetch(query, {**parameters, "reach": reach})
        ]
        places = [(each.position, each.account_number, each.sequence) for each in found]
        # The nearest, so that no index is walked farther than it allows.
        return TransactionKey(*(max(places) if order.descending else min(places))) if places else None

    async def _read_head(self, account_number: int) -> bytes:
        ((head,),) = await self._database.fetch(self._head_query, {"account_number": account_number})
        return bytes(head)

    async def _read_heads(self, account_numbers: Collection[int]) -> Heads:
        query = _heads_query(self._database.dialect)
        rows = await self._database.fetch(query, {"account_numbers": list(account_numbers)})
        return {number: bytes(head) for number, head in rows}

    async def first_bodies(self, account_number: int, limit: int, *, descending: bool) -> tuple[bytes, list[bytes]]:
        """An account's head, and at most `limit` of its serialized transactions in the order of time, from the first.

        Both at one instant.
        """
        rows = await self._database.fetch(
            _first_bodies_query(descending, self._database.dialect), {"account_number": account_number, "limit": limit}
        )
        return (bytes(rows[0][1]) if rows else b""), [body for body, _ in rows]

    async def bodies(self, account_number: int, after: int, limit: int, *, descending: bool) -> list[bytes]:
        """At most `limit` serialized transactions of an account behind a sequence, in the order of time.

        As they lie on disk, and nothing beside them: each value of a row costs as much to fetch
        as a short body.
        """
        rows = await self._database.fetch(
            _bodies_query(descending, self._database.dialect),
            {"account_number": account_number, "after_sequence": after, "limit": limit},
        )
        return [body for (body,) in rows]

    async def get(self, account_number: int, uid: UUID) -> tuple[bytes, bytes] | None:
        """A transaction's body and allocations, or None if the account has none of this uid."""
        statement = select(transactions.c.body, transactions.c.allocations).where(
            transactions.c.account_number == account_number, transactions.c.uid == uid.bytes
        )
        row = await self._database.look(lambda connection: connection.execute(statement).one_or_none())
        return None if row is None else (bytes(row.body), bytes(row.allocations))

    async def refunds(self, charges: Collection[tuple[int, int]]) -> tuple[Refunds, Heads]:
        """What was given back of those of the charges that were refunded, and their accounts' heads at that instant."""
        count = len(charges)
        parameters = dict(zip(_refunds_names(count), chain.from_iterable(charges), strict=True))
        rows = await self._database.fetch(_refunds_query(count, self._database.dialect), parameters)
        totals = {(number, sequence): RefundTotal(*total) for number, sequence, *total, _ in rows}
        return totals, {number: head for number, *_, head in rows}

    async def slice(self, account_number: int, offset: int, limit: int) -> tuple[list[TransactionRow], int]:
        """A page of an account's transactions, newest first, and their total, both at one instant.

        They are numbered without a gap, so that any offset costs the same.
        """
        rows = await self._database.fetch(
            _slice_query(self._database.dialect),
            {"account_number": account_number, "offset": min(offset, _BEHIND_ALL), "limit": limit},
        )
        # One row without a transaction tells the total of a page that has none.
        return [TransactionRow(*row) for _, *row in rows if row[0] is not None], rows[0][0]

    async def windows(
        self, account_number: int, offset: int, limit: int, now: Instant
    ) -> tuple[AccountState, list[UsageWindow], int]:
        """An account's state with no lots known, a page of its hour windows, newest first, and their total.

        All three at one instant; what has expired by `now` is not in the state. Windows are
        numbered without a gap, so that any offset costs the same.
        """
        dialect = self._database.dialect
        parameters = {"account_number": account_number, "offset": min(offset, _BEHIND_ALL), "limit": limit}
        rows, (row,) = await self._database.fetch_together(
            (_windows_query(dialect), holdings_query(1, dialect)),
            parameters | account_parameters([account_number]) | {"now": now},
            at_replica=True,
        )
        state = to_holding(row)[0].state
        return state, [UsageWindow(*row) for row in rows], state.window.number if state.window else 0


def head_statement() -> Select[Any]:
    """The hash of an account's newest transaction."""
    columns = account_states.c
    return select(columns.last_hash).where(columns.account_number == bindparam("account_number"))


def heads_statement() -> Select[Any]:
    """The number of each of some accounts, and the hash of its newest transaction. Of PostgreSQL."""
    columns = account_states.c
    numbers = bindparam("account_numbers", type_=ARRAY(BigInteger))
    return select(columns.account_number, columns.last_hash).where(columns.account_number == func.any(numbers))


@lru_cache(STATEMENTS_CACHED_MAX)
def _heads_query(dialect: Dialect) -> Query:
    return Query.of(heads_statement(), dialect)


def first_bodies_statement(*, descending: bool) -> Select[Any]:
    """At most `limit` bodies of an account, each with the hash of the account's newest transaction."""
    return _bodies(descending=descending).add_columns(head_statement().scalar_subquery())


@lru_cache(STATEMENTS_CACHED_MAX)
def _first_bodies_query(descending: bool, dialect: Dialect) -> Query:
    return Query.of(first_bodies_statement(descending=descending), dialect)


def bodies_statement(*, descending: bool) -> Select[Any]:
    """At most `limit` bodies of an account behind a sequence."""
    sequence, after = transactions.c.sequence, bindparam("after_sequence", type_=BigInteger)
    return _bodies(descending=descending).where(sequence < after if descending else sequence > after)


@lru_cache(STATEMENTS_CACHED_MAX)
def _bodies_query(descending: bool, dialect: Dialect) -> Query:
    return Query.of(bodies_statement(descending=descending), dialect)


def _bodies(*, descending: bool) -> Select[Any]:
    columns = transactions.c
    return (
        select(columns.body)
        .where(columns.account_number == bindparam("account_number"))
        .order_by(columns.sequence.desc() if descending else columns.sequence)
        .limit(bindparam("limit", type_=Integer))
    )


def _next_reach(passed: int, found: int, limit: int) -> int:
    """How many rows more to read where `found` ones of those passed fit: enough for the rest, if as many go on fitting.

    Half as many again, so that it is rarely asked a third time.
    """
    if not found:
        return passed * SPARSE_AHEAD
    return limit + 3 * (limit - found) * passed // (2 * found)


def slice_statement() -> Select[Any]:
    """The total of an account's transactions, and with it each of at most `limit` behind the `offset` newest."""
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


@lru_cache(STATEMENTS_CACHED_MAX)
def _slice_query(dialect: Dialect) -> Query:
    return Query.of(slice_statement(), dialect)


def windows_statement() -> Select[Any]:
    """At most `limit` hour windows of an account behind the `offset` newest."""
    columns = usage_windows.c
    newest = account_states.c.window_number - bindparam("offset", type_=BigInteger)
    return (
        select(*columns["number", "start", "computing", "serverless"])
        .join(account_states, account_states.c.account_number == columns.account_number)
        .where(
            account_states.c.account_number == bindparam("account_number"),
            columns.number <= newest,
            columns.number > newest - bindparam("limit", type_=BigInteger),
        )
        .order_by(columns.number.desc())
    )


@lru_cache(STATEMENTS_CACHED_MAX)
def _windows_query(dialect: Dialect) -> Query:
    return Query.of(windows_statement(), dialect)


def refunds_statement(count: int) -> Select[Any]:
    """What was given back of so many charges, each looked up by itself.

    To compare pairs with a list of them SQLite would read all refunds, and PostgreSQL
    would plan longer than it reads.
    """
    numbers = [bindparam(name, type_=BigInteger) for name in _refunds_names(count)]
    pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
    charges = (
        values(column("account_number", BigInteger), column("sequence", BigInteger), name="charges").data(pairs).cte()
    )
    columns = refunds.c
    is_of_charge = (columns.account_number == charges.c.account_number) & (columns.sequence == charges.c.sequence)
    shown = columns["account_number", "sequence", "amount", "last_create_time"]
    is_of_account = account_states.c.account_number == columns.account_number
    return (
        select(*shown, account_states.c.last_hash)
        .join_from(charges, refunds, is_of_charge)
        .join(account_states, is_of_account)
    )


@lru_cache(STATEMENTS_CACHED_MAX)
def _refunds_query(count: int, dialect: Dialect) -> Query:
    return Query.of(refunds_statement(count), dialect)


@lru_cache(STATEMENTS_CACHED_MAX)
def _refunds_names(count: int) -> tuple[str, ...]:
    """The names of the parameters of so many charges: account and sequence of each."""
    return tuple(f"{name}_{i}" for i in range(count) for name in ("account", "sequence"))
