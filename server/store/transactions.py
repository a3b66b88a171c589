"""Lists of transactions and hour windows: every statement that reads the big tables.

A list's statement depends only on its shape, so it is built once per shape and used
with other parameters from then on. Pages are found by keyset: never by OFFSET, whose
cost grows with the depth and which skips rows when others are inserted.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain, product
from typing import Any, NamedTuple
from uuid import UUID

from daybook.v1.transaction_pb2 import Transaction
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Dialect,
    Integer,
    Select,
    bindparam,
    column,
    literal,
    select,
    tuple_,
    union_all,
    values,
)

from server.ledger.instants import month_bounds
from server.ledger.paging import EVERYTHING, Order, OrderField, TransactionFilter, TransactionKey
from server.ledger.posting import AccountState, Kind
from server.ledger.usage import UsageWindow
from server.store.database import Database, Query
from server.store.states import account_parameters, put_together, state_queries
from server.store.tables import LABELS, account_states, refunds, transactions, usage_windows
from server.store.unit import RefundTotal

STATEMENTS_CACHED_MAX = 512
ROWS_READ_MAX = 10_000
"""How many rows a page may read along an index, if the index doesn't serve all of the filter."""
READ_AHEAD = 16
"""How many rows such a page reads at first for each one that it shows, if it needs them."""
_BEHIND_ALL = 2**62
"""An offset behind every row, with which a statement can still reckon."""
WALKS_MAX = 64
"""From how many walks a list is merged at most: a statement grows with them, and so does the time to build it."""
ALL_KINDS = tuple(Transaction.Kind.values())[1:]
ALL_STATES = tuple(Transaction.State.values())[1:]


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


@dataclass(frozen=True, slots=True)
class _Shape:
    """All that a statement depends on, beside the values of its parameters."""

    of_account: bool
    order: Order
    pairs: int
    """How many pairs of kind and category the list is put together from; 0 for no such filter."""
    kinds: int
    states: int
    month: bool
    create_time_from: bool
    create_time_before: bool
    labels: tuple[str, ...]
    after: bool
    until: bool
    keys_only: bool = False
    """Whether only keys are read, for which an index is smaller than the rows."""

    @property
    def is_merged(self) -> bool:
        """Whether each pair has a walk of its own for each state, along an index that serves all the rest."""
        is_ranged = self.create_time_from or self.create_time_before
        has_index = self.order.field is OrderField.CREATE_TIME or (self.month and not is_ranged)
        walks = self.pairs * (self.states or len(ALL_STATES))
        return self.of_account and 0 < walks <= WALKS_MAX and not self.labels and has_index

    @property
    def passes_over(self) -> bool:
        """Whether a walk along the index reads rows that the list does not show."""
        if self.is_merged:
            return False
        is_ranged = self.month or self.create_time_from or self.create_time_before
        return (
            self.pairs + self.kinds + self.states > 0
            or len(self.labels) > (0 if self.of_account else 1)
            or (is_ranged and self.order.field is OrderField.AMOUNT)
        )

    @property
    def picks_in_index(self) -> bool:
        """Whether the index tells of each row whether the list shows it: then rows are fetched for the page alone."""
        return self.passes_over and not self.of_account and len(self.labels) <= 1

    @property
    def by_sequence(self) -> bool:
        """Whether the list is one walk along the account's rows as they lie on disk.

        Times never decrease within an account, so the order of sequence is that of time. A
        range of times needs the index by time to begin with.
        """
        return (
            self.of_account
            and not self.keys_only
            and self.order.field is OrderField.CREATE_TIME
            and not (self.is_merged or self.create_time_from or self.create_time_before)
        )


class TransactionStore:
    """Reads transactions and hour windows."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def page(
        self,
        tenant_number: int,
        account_number: int | None,
        wanted: TransactionFilter,
        order: Order,
        after: TransactionKey | None,
        limit: int,
        until: TransactionKey | None = None,
    ) -> list[TransactionRow]:
        """At most `limit` transactions of an account, or of the tenant if it is None; none behind `until`."""
        shape, parameters = _shape(tenant_number, account_number, wanted, order, after, limit, until)
        query = _query(shape, self._database.dialect)
        # What `_make` does, without the call of it that each row would cost.
        return list(map(partial(tuple.__new__, TransactionRow), await self._database.fetch(query, parameters)))

    async def page_within_bounds(
        self,
        tenant_number: int,
        account_number: int | None,
        wanted: TransactionFilter,
        order: Order,
        after: TransactionKey | None,
        limit: int,
    ) -> tuple[list[TransactionRow], TransactionKey | None]:
        """Like `page`, but reads ROWS_READ_MAX rows along an index at most, and tells where that made it stop.

        None where it didn't: the rows are then all that there are, or as many as were asked for.
        """
        if not (shape := _shape(tenant_number, account_number, wanted, order, after, limit, None)[0]).passes_over:
            return await self.page(tenant_number, account_number, wanted, order, after, limit), None
        rows: list[TransactionRow] = []
        passed, begin = 0, after
        # To find the last row that may be read costs about as much as to walk there, except
        # along an account's rows, which are numbered.
        reach = ROWS_READ_MAX if shape.by_sequence else min(READ_AHEAD * limit, ROWS_READ_MAX)
        while True:
            until = await self._boundary(tenant_number, account_number, wanted, order, begin, reach)
            rows += await self.page(tenant_number, account_number, wanted, order, begin, limit - len(rows), until)
            passed += reach
            if until is None or len(rows) == limit or passed == ROWS_READ_MAX:
                return rows, until
            begin = until
            reach = min(_next_reach(passed, len(rows), limit), ROWS_READ_MAX - passed)

    async def _boundary(
        self,
        tenant_number: int,
        account_number: int | None,
        wanted: TransactionFilter,
        order: Order,
        after: TransactionKey | None,
        reach: int,
    ) -> TransactionKey | None:
        """The key `reach` rows on, None for a list that ends before.

        The page is to be asked for until this key, and the next one goes on from it.
        """
        found = [
            TransactionKey(*row)
            for shape, parameters in _boundary_shapes(tenant_number, account_number, wanted, order, after, reach)
            for row in await self._database.fetch(_boundary_query(shape, self._database.dialect), parameters)
        ]
        places = [(each.position, each.account_number, each.sequence) for each in found]
        # The nearest, so that no index is walked farther than it allows.
        return TransactionKey(*(max(places) if order.descending else min(places))) if places else None

    async def head(self, account_number: int) -> bytes:
        """The hash of an account's newest transaction, which stands for all of them; empty before the first."""
        (row,) = await self._database.fetch(_head_query(self._database.dialect), {"account_number": account_number})
        return bytes(row[0])

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

    async def refunds(self, charges: Collection[tuple[int, int]]) -> dict[tuple[int, int], RefundTotal]:
        """What was given back of those of the charges that were refunded, by account and sequence."""
        count = len(charges)
        parameters = dict(zip(_refunds_names(count), chain.from_iterable(charges), strict=True))
        rows = await self._database.fetch(_refunds_query(count, self._database.dialect), parameters)
        return {(account_number, sequence): RefundTotal(*total) for account_number, sequence, *total in rows}

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
        self, account_number: int, offset: int, limit: int
    ) -> tuple[AccountState, list[UsageWindow], int]:
        """An account's state, a page of its hour windows, newest first, and their total.

        All three at one instant. Windows are numbered without a gap, so that any offset
        costs the same.
        """
        dialect = self._database.dialect
        parameters = {"account_number": account_number, "offset": min(offset, _BEHIND_ALL), "limit": limit}
        rows, *states = await self._database.fetch_together(
            (_windows_query(dialect), *state_queries(1, dialect)),
            parameters | account_parameters([account_number]),
            at_replica=True,
        )
        state = put_together(*states)[account_number].state
        return state, [UsageWindow(*row) for row in rows], state.window.number if state.window else 0


def head_statement() -> Select[Any]:
    """The hash of an account's newest transaction."""
    columns = account_states.c
    return select(columns.last_hash).where(columns.account_number == bindparam("account_number"))


@lru_cache(STATEMENTS_CACHED_MAX)
def _head_query(dialect: Dialect) -> Query:
    return Query.of(head_statement(), dialect)


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
        return passed * READ_AHEAD
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
    return select(*shown).join_from(charges, refunds, is_of_charge)


@lru_cache(STATEMENTS_CACHED_MAX)
def _refunds_query(count: int, dialect: Dialect) -> Query:
    return Query.of(refunds_statement(count), dialect)


@lru_cache(STATEMENTS_CACHED_MAX)
def _refunds_names(count: int) -> tuple[str, ...]:
    """The names of the parameters of so many charges: account and sequence of each."""
    return tuple(f"{name}_{i}" for i in range(count) for name in ("account", "sequence"))


def boundary_statements(
    tenant_number: int,
    account_number: int | None,
    wanted: TransactionFilter,
    order: Order,
    after: TransactionKey | None,
) -> list[tuple[Select[Any], dict[str, object]]]:
    """Statements of the last row that a page may read, and their parameters: one for each index that may be walked.

    None for a list whose index serves its filter.
    """
    shapes = _boundary_shapes(tenant_number, account_number, wanted, order, after, ROWS_READ_MAX)
    return [(_boundary_statement(shape), parameters) for shape, parameters in shapes]


def _boundary_shapes(
    tenant_number: int,
    account_number: int | None,
    wanted: TransactionFilter,
    order: Order,
    after: TransactionKey | None,
    reach: int,
) -> list[tuple[_Shape, dict[str, object]]]:
    shape, _ = _shape(tenant_number, account_number, wanted, order, after, 0, None)
    if not shape.passes_over:
        return []
    if shape.by_sequence:
        numbered, parameters = _shape(tenant_number, account_number, EVERYTHING, order, after, 0, None)
        return [(numbered, parameters | {"reach": reach})]
    served = TransactionFilter()
    if order.field is OrderField.CREATE_TIME:
        served = TransactionFilter(
            create_time_from=wanted.create_time_from, create_time_before=wanted.create_time_before, month=wanted.month
        )
    labels = [{name: getattr(wanted, name)} for name in shape.labels] if account_number is None else []
    shapes = []
    for label in labels or [{}]:
        walked, parameters = _shape(
            tenant_number, account_number, replace(served, **label), order, after, reach - 1, None
        )
        shapes.append((replace(walked, keys_only=True), parameters))
    return shapes


def _boundary_by_number(shape: _Shape) -> Select[Any]:
    """The last row that a page along an account's rows may read: they are numbered without a gap."""
    account_number, reach = bindparam("account_number", type_=BigInteger), bindparam("reach", type_=BigInteger)
    states, columns = account_states.c, transactions.c
    begin: ColumnElement[int] = literal(0)
    if shape.after:
        begin = bindparam("after_sequence", type_=BigInteger)
    elif shape.order.descending:
        begin = select(states.sequence + 1).where(states.account_number == account_number).scalar_subquery()
    return select(columns.create_time, columns.account_number, columns.sequence).where(
        columns.account_number == account_number,
        columns.sequence == (begin - reach if shape.order.descending else begin + reach),
    )


def list_statement(
    tenant_number: int,
    account_number: int | None,
    wanted: TransactionFilter,
    order: Order,
    after: TransactionKey | None,
    limit: int,
    until: TransactionKey | None = None,
) -> tuple[Select[Any], dict[str, object]]:
    """The statement of a list and its parameters."""
    shape, parameters = _shape(tenant_number, account_number, wanted, order, after, limit, until)
    return _statement(shape), parameters


def _shape(
    tenant_number: int,
    account_number: int | None,
    wanted: TransactionFilter,
    order: Order,
    after: TransactionKey | None,
    limit: int,
    until: TransactionKey | None,
) -> tuple[_Shape, dict[str, object]]:
    pairs = wanted.kind_categories or tuple(
        product(wanted.kinds or ALL_KINDS, wanted.categories) if wanted.categories else ()
    )
    labels = {name: value for name in LABELS if (value := getattr(wanted, name)) is not None}
    # The key of the page before lies inside the range, so it implies the bound on its side;
    # with both, an index walk would begin at the bound again and pass over every page before.
    is_bounded_by_key = after is not None and order.field is OrderField.CREATE_TIME
    lower, upper = wanted.create_time_from, wanted.create_time_before
    month = wanted.month if order.field is OrderField.AMOUNT else None
    if wanted.month is not None and month is None:
        month_from, month_before = month_bounds(wanted.month)
        lower = month_from if lower is None else max(lower, month_from)
        upper = month_before if upper is None else min(upper, month_before)
    if is_bounded_by_key and order.descending:
        upper = None
    elif is_bounded_by_key:
        lower = None
    if until is not None and order.field is OrderField.CREATE_TIME:
        # It lies inside the range as well.
        lower, upper = (None, upper) if order.descending else (lower, None)
    shape = _Shape(
        of_account=account_number is not None,
        order=order,
        pairs=len(pairs),
        kinds=0 if pairs else len(wanted.kinds),
        states=len(wanted.states),
        month=month is not None,
        create_time_from=lower is not None,
        create_time_before=upper is not None,
        labels=tuple(labels),
        after=after is not None,
        until=until is not None,
    )
    parameters: dict[str, object] = {
        "limit": limit,
        **labels,
        **{f"state_{i}": state for i, state in enumerate(wanted.states)},
        **_pair_parameters(pairs),
    }
    if account_number is not None:
        parameters["account_number"] = account_number
    else:
        parameters["tenant_number"] = tenant_number
    if not pairs:
        parameters |= {f"kind_{i}": kind for i, kind in enumerate(wanted.kinds)}
    if lower is not None:
        parameters["create_time_from"] = lower
    if upper is not None:
        parameters["create_time_before"] = upper
    if month is not None:
        parameters["month"] = month
    if after is not None:
        parameters["after_position"] = after.position
        parameters["after_sequence"] = after.sequence
        if account_number is None:
            parameters["after_account_number"] = after.account_number
    if until is not None:
        parameters["until_position"] = until.position
        parameters["until_sequence"] = until.sequence
        if account_number is None:
            parameters["until_account_number"] = until.account_number
    return shape, parameters


@lru_cache(STATEMENTS_CACHED_MAX)
def _pair_parameters(pairs: tuple[tuple[Kind, str], ...]) -> dict[str, object]:
    kinds = {f"pair_kind_{i}": kind for i, (kind, _) in enumerate(pairs)}
    return {**kinds, **{f"pair_category_{i}": category for i, (_, category) in enumerate(pairs)}}


@lru_cache(STATEMENTS_CACHED_MAX)
def _query(shape: _Shape, dialect: Dialect) -> Query:
    return Query.of(_statement(shape), dialect)


@lru_cache(STATEMENTS_CACHED_MAX)
def _boundary_query(shape: _Shape, dialect: Dialect) -> Query:
    return Query.of(_boundary_statement(shape), dialect)


@lru_cache(STATEMENTS_CACHED_MAX)
def _boundary_statement(shape: _Shape) -> Select[Any]:
    if shape.by_sequence:
        return _boundary_by_number(shape)
    position = transactions.c[shape.order.field.value]
    key = (position, transactions.c.account_number, transactions.c.sequence)
    walk = _ordered(select(*key).where(*_conditions(shape, position)), shape, *key)
    # An offset over a bounded number of keys, in the index alone.
    return walk.limit(1).offset(bindparam("limit", type_=Integer))


@lru_cache(STATEMENTS_CACHED_MAX)
def _statement(shape: _Shape) -> Select[Any]:
    position = transactions.c[shape.order.field.value]
    key = (position, transactions.c.account_number, transactions.c.sequence)
    limit = bindparam("limit", type_=Integer)
    conditions = _conditions(shape, position)
    if not shape.is_merged:
        if shape.pairs:
            conditions.append(
                tuple_(transactions.c.kind, transactions.c.category).in_(
                    [tuple_(bindparam(f"pair_kind_{i}"), bindparam(f"pair_category_{i}")) for i in range(shape.pairs)]
                )
            )
        walk = _ordered(select(*key).where(*conditions), shape, *key).limit(limit)
        return _with_bodies(walk, shape) if shape.picks_in_index else walk.add_columns(transactions.c.body)
    # One short walk along the index for each pair and state, merged; the bodies are fetched
    # only for the rows of the page.
    states: Sequence[object] = [bindparam(f"state_{i}") for i in range(shape.states)] or ALL_STATES
    walks = [
        _ordered(
            select(*key).where(
                *conditions,
                transactions.c.kind == bindparam(f"pair_kind_{i}"),
                transactions.c.category == bindparam(f"pair_category_{i}"),
                transactions.c.state == state,
            ),
            shape,
            *key,
        )
        .limit(limit)
        .subquery()
        for i, state in product(range(shape.pairs), states)
    ]
    merged = union_all(*(select(walk) for walk in walks)).subquery()
    merged_key = tuple(merged.c)
    return _with_bodies(_ordered(select(*merged_key), shape, *merged_key).limit(limit), shape)


def _with_bodies(keys: Select[Any], shape: _Shape) -> Select[Any]:
    """The rows of these keys, which come in their order."""
    page = keys.subquery()
    page_key = tuple(page.c)
    return _ordered(
        select(*page_key, transactions.c.body).join_from(
            page,
            transactions,
            (transactions.c.account_number == page_key[1]) & (transactions.c.sequence == page_key[2]),
        ),
        shape,
        *page_key,
    )


def _conditions(shape: _Shape, position: ColumnElement[int]) -> list[ColumnElement[bool]]:
    columns = transactions.c
    conditions: list[ColumnElement[bool]] = []
    if shape.of_account:
        conditions.append(columns.account_number == bindparam("account_number"))
    else:
        conditions.append(columns.tenant_number == bindparam("tenant_number"))
    if shape.month:
        conditions.append(columns.month == bindparam("month"))
    if shape.create_time_from:
        conditions.append(columns.create_time >= bindparam("create_time_from"))
    if shape.create_time_before:
        conditions.append(columns.create_time < bindparam("create_time_before"))
    conditions += [columns[name] == bindparam(name) for name in shape.labels]
    if shape.kinds:
        conditions.append(columns.kind.in_([bindparam(f"kind_{i}") for i in range(shape.kinds)]))
    if shape.states and not shape.is_merged:
        conditions.append(columns.state.in_([bindparam(f"state_{i}") for i in range(shape.states)]))
    place = _place(shape, position, columns.account_number, columns.sequence)
    here = tuple_(*place.values())
    if shape.after:
        last = tuple_(*(bindparam(f"after_{name}") for name in place))
        conditions.append(here < last if shape.order.descending else here > last)
    if shape.until:
        end = tuple_(*(bindparam(f"until_{name}") for name in place))
        conditions.append(here >= end if shape.order.descending else here <= end)
    return conditions


def _ordered(
    statement: Select[Any],
    shape: _Shape,
    position: ColumnElement[int],
    account_number: ColumnElement[int],
    sequence: ColumnElement[int],
) -> Select[Any]:
    by = _place(shape, position, account_number, sequence).values()
    return statement.order_by(*(column.desc() if shape.order.descending else column.asc() for column in by))


def _place(
    shape: _Shape, position: ColumnElement[int], account_number: ColumnElement[int], sequence: ColumnElement[int]
) -> dict[str, ColumnElement[int]]:
    """What a list is ordered by, by the names that the parts of a TransactionKey have."""
    place: dict[str, ColumnElement[int]] = {} if shape.by_sequence else {"position": position}
    if not shape.of_account:
        place["account_number"] = account_number
    return place | {"sequence": sequence}
