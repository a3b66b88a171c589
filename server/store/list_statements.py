"""The statements of lists of transactions: which index a list walks along, and from where to where.

A statement depends only on the list's shape, so it is built once per shape and used with
other parameters from then on. Pages are found by keyset: never by OFFSET, whose cost grows
with the depth and which skips rows when others are inserted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

from daybook.v1.transaction_pb2 import Transaction
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Dialect,
    Integer,
    Select,
    bindparam,
    literal,
    or_,
    select,
    tuple_,
    union_all,
)

from server.ledger.instants import month_bounds
from server.ledger.paging import Order, OrderField, TransactionFilter, TransactionKey
from server.ledger.posting import Kind
from server.store.query import Query
from server.store.tables import LABELS, account_states, transactions

STATEMENTS_CACHED_MAX = 512
ROWS_READ_MAX = 10_000
"""How many rows a page may read along an index, if the index doesn't serve all of the filter."""
WALKS_MAX = 64
"""From how many walks a list is merged at most: a statement grows with them, and so does the time to build it."""
ALL_KINDS = tuple(Transaction.Kind.values())[1:]
ALL_STATES = tuple(Transaction.State.values())[1:]


@dataclass(frozen=True, slots=True)
class ListShape:
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
    until: bool = False
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


@dataclass(frozen=True, slots=True)
class ListQueries:
    """What reads a list, as the driver takes it."""

    page: Query
    """Reads keys and bodies."""
    page_until: Query
    """The same as far as a key."""
    boundaries: tuple[Query, ...]
    """Each reads the key so many rows on, along an index that may be walked. None where the index serves the filter."""
    by_sequence: bool


@lru_cache(STATEMENTS_CACHED_MAX)
def list_queries(shape: ListShape, dialect: Dialect) -> ListQueries:
    """The queries of a list."""
    page = Query.of(_statement(shape), dialect)
    return ListQueries(
        page=page,
        page_until=Query.of(_statement(_until(shape)), dialect) if shape.passes_over else page,
        boundaries=tuple(Query.of(_boundary_statement(walk), dialect) for walk in _walks_of(shape)),
        by_sequence=shape.by_sequence,
    )


def until_parameters(until: TransactionKey) -> dict[str, object]:
    """What `page_until` is to be told of the key, beside the parameters of the list."""
    return {
        "until_position": until.position,
        "until_sequence": until.sequence,
        "until_account_number": until.account_number,
    }


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
    shape, parameters = shape_of(tenant_number, account_number, wanted, order, after, 0)
    return [(_boundary_statement(walk), parameters | {"reach": ROWS_READ_MAX}) for walk in _walks_of(shape)]


def _until(shape: ListShape) -> ListShape:
    """The same list as far as a key."""
    if shape.order.field is not OrderField.CREATE_TIME:
        return replace(shape, until=True)
    # The key lies inside the range of times, so it implies the bound on its side, as the other does in `shape_of`.
    if shape.order.descending:
        return replace(shape, until=True, create_time_from=False)
    return replace(shape, until=True, create_time_before=False)


def _walks_of(shape: ListShape) -> list[ListShape]:
    """The lists of keys that a page is a part of, each along an index that may be walked for it."""
    if not shape.passes_over:
        return []
    everything = replace(shape, pairs=0, kinds=0, states=0, labels=())
    if shape.by_sequence:
        return [everything]
    keys = replace(everything, keys_only=True)
    if shape.order.field is not OrderField.CREATE_TIME:
        return [replace(keys, month=False, create_time_from=False, create_time_before=False)]
    labels = () if shape.of_account else shape.labels
    return [replace(keys, labels=(label,)) for label in labels] or [keys]


def _boundary_by_number(shape: ListShape) -> Select[Any]:
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
    """The statement of a list, as far as a key if one is given, and its parameters."""
    shape, parameters = shape_of(tenant_number, account_number, wanted, order, after, limit)
    if until is None:
        return _statement(shape), parameters
    return _statement(_until(shape)), parameters | until_parameters(until)


def shape_of(
    tenant_number: int,
    account_number: int | None,
    wanted: TransactionFilter,
    order: Order,
    after: TransactionKey | None,
    limit: int,
) -> tuple[ListShape, dict[str, object]]:
    """The shape of a list of an account, or of the tenant if it is None, and its parameters.

    It has at most `limit` rows behind `after`.
    """
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
    shape = ListShape(
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
    return shape, parameters


@lru_cache(STATEMENTS_CACHED_MAX)
def _pair_parameters(pairs: tuple[tuple[Kind, str], ...]) -> dict[str, object]:
    kinds = {f"pair_kind_{i}": kind for i, (kind, _) in enumerate(pairs)}
    return {**kinds, **{f"pair_category_{i}": category for i, (_, category) in enumerate(pairs)}}


def _boundary_statement(shape: ListShape) -> Select[Any]:
    if shape.by_sequence:
        return _boundary_by_number(shape)
    position = transactions.c[shape.order.field.value]
    key = (position, transactions.c.account_number, transactions.c.sequence)
    walk = _ordered(select(*key).where(*_conditions(shape, position)), shape, *key)
    # An offset over a bounded number of keys, in the index alone.
    return walk.limit(1).offset(bindparam("reach", type_=Integer) - 1)


def _statement(shape: ListShape) -> Select[Any]:
    position = transactions.c[shape.order.field.value]
    key = (position, transactions.c.account_number, transactions.c.sequence)
    limit = bindparam("limit", type_=Integer)
    conditions = _conditions(shape, position)
    if not shape.is_merged:
        if shape.pairs:
            # Of a list of pairs SQLite would make a table, for each page anew.
            conditions.append(or_(*(_is_of_pair(i) for i in range(shape.pairs))))
        body = _body_of_row() if shape.picks_in_index else transactions.c.body
        return _ordered(select(*key, body).where(*conditions), shape, *key).limit(limit)
    # One short walk along the index for each pair and state, merged; the bodies are fetched
    # only for the rows of the page.
    states: Sequence[object] = [bindparam(f"state_{i}") for i in range(shape.states)] or ALL_STATES
    walks = [
        _ordered(
            select(*key).where(
                *conditions,
                _is_of_pair(i),
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


def _is_of_pair(i: int) -> ColumnElement[bool]:
    columns = transactions.c
    return (columns.kind == bindparam(f"pair_kind_{i}")) & (columns.category == bindparam(f"pair_category_{i}"))


def _body_of_row() -> ColumnElement[bytes]:
    """The body of a row that the list shows, fetched from where it lies.

    Were it read as a column, each row that the walk passes over would be fetched for it too: SQLite
    goes to the row as soon as a statement wants more of it than the index has.
    """
    stored = transactions.alias("stored")
    return (
        select(stored.c.body)
        .where(
            stored.c.account_number == transactions.c.account_number,
            stored.c.sequence == transactions.c.sequence,
        )
        .scalar_subquery()
    )


def _with_bodies(keys: Select[Any], shape: ListShape) -> Select[Any]:
    """The rows of these keys of one account, in their order."""
    page = keys.subquery()
    page_key = tuple(page.c)
    rows = select(*page_key, transactions.c.body).join_from(
        page,
        transactions,
        (transactions.c.account_number == page_key[1]) & (transactions.c.sequence == page_key[2]),
    )
    # Without the condition Citus doesn't route the statement: it asks every shard for its transactions.
    return _ordered(rows.where(transactions.c.account_number == bindparam("account_number")), shape, *page_key)


def _conditions(shape: ListShape, position: ColumnElement[int]) -> list[ColumnElement[bool]]:
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
    shape: ListShape,
    position: ColumnElement[int],
    account_number: ColumnElement[int],
    sequence: ColumnElement[int],
) -> Select[Any]:
    by = _place(shape, position, account_number, sequence).values()
    return statement.order_by(*(column.desc() if shape.order.descending else column.asc() for column in by))


def _place(
    shape: ListShape, position: ColumnElement[int], account_number: ColumnElement[int], sequence: ColumnElement[int]
) -> dict[str, ColumnElement[int]]:
    """What a list is ordered by, by the names that the parts of a TransactionKey have."""
    place: dict[str, ColumnElement[int]] = {} if shape.by_sequence else {"position": position}
    if not shape.of_account:
        place["account_number"] = account_number
    return place | {"sequence": sequence}
