"""The strategies for reading a list of transactions: which index is scanned, and how.

A strategy depends only on the shape of a list, never on the values of its parameters, so its
statements are compiled once. Pages are found by keyset, never by OFFSET.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

from daybook.v1.transaction_pb2 import Transaction
from sqlalchemy import (
    BigInteger,
    BindParameter,
    ColumnElement,
    FromClause,
    Integer,
    Select,
    bindparam,
    literal,
    or_,
    select,
    tuple_,
    union_all,
)

from server.ledger.instants import Instant, month_bounds
from server.ledger.paging import OrderField, TransactionFilter, TransactionList
from server.ledger.posting import Kind
from server.store.tables import LABELS, account_states, transactions

ROWS_READ_MAX = 10_000
"""The largest number of rows that a page reads if the index serves only part of the filter."""
SCANS_MAX = 64
"""The largest number of scans that a list is merged from. Each makes the statement slower to compile."""
ALL_KINDS = tuple(Transaction.Kind.values())[1:]
ALL_STATES = tuple(Transaction.State.values())[1:]


@dataclass(frozen=True, slots=True)
class RangeScan:
    """A scan of a range of one index, in the order of the list."""

    equals: tuple[str, ...]
    """Columns that are equal to a parameter of the same name."""
    bounds: tuple[str, ...]
    """The bounds of the range, out of `create_time_from` and `create_time_before`."""
    order: tuple[str, ...]
    """The columns of the order, unique together in this range. Within an account, times never decrease with the
    sequence, so the sequence, the order of the table itself, alone orders a list by time."""
    position: str
    """The column of a key's position."""
    descending: bool
    is_continued: bool
    """Whether the range begins after the key of the previous page."""

    @property
    def key(self) -> tuple[str, ...]:
        """The columns of a TransactionKey."""
        return (self.position, "account_number", "sequence")

    def rows(self, *names: str) -> Select[Any]:
        """These columns of the rows of the range, in order."""
        columns = transactions.c
        conditions: list[ColumnElement[bool]] = [columns[name] == bindparam(name) for name in self.equals]
        conditions += _within_bounds(columns.create_time, self.bounds)
        if self.is_continued:
            here = tuple_(*(columns[name] for name in self.order))
            last = tuple_(*(bindparam(f"after_{name}") for name in self.order))
            conditions.append(here < last if self.descending else here > last)
        return self.sort(select(*(columns[name] for name in names)).where(*conditions), transactions)

    def sort(self, statement: Select[Any], source: FromClause) -> Select[Any]:
        """The statement in the order of the list, by the columns of `source`."""
        columns = [source.c[name] for name in self.order]
        return statement.order_by(*(column.desc() if self.descending else column.asc() for column in columns))

    def with_bodies(self, keys: Select[Any]) -> Select[Any]:
        """The rows of a page, in order, from their keys."""
        page = keys.subquery()
        is_row = (transactions.c.account_number == page.c.account_number) & (transactions.c.sequence == page.c.sequence)
        rows = select(*(page.c[name] for name in self.key), transactions.c.body).join_from(page, transactions, is_row)
        if "account_number" in self.equals:
            # Without it Citus does not route the statement to one shard.
            rows = rows.where(transactions.c.account_number == bindparam("account_number"))
        return self.sort(rows, page)


@dataclass(frozen=True, slots=True)
class IndexScan:
    """One scan of an index that serves the whole filter.

    For an account by sequence, by a range of times or by amount, and for a tenant, with or without
    one label, by time.
    """

    scan: RangeScan

    def page(self) -> Select[Any]:
        """Reads keys and bodies."""
        return self.scan.rows(*self.scan.key, "body").limit(_LIMIT)


@dataclass(frozen=True, slots=True)
class MergedScans:
    """Merges one short scan for each kind, category and state of an account. The index serves the whole filter."""

    scan: RangeScan
    pairs: int
    """The number of pairs of a kind and a category."""
    states: int
    """0 for a filter without states."""

    def page(self) -> Select[Any]:
        """Reads keys and bodies. Merges the keys first, so that only the bodies of the page are read."""
        rows = self.scan.rows(*self.scan.key)
        states: list[BindParameter[int] | int] = [bindparam(f"state_{i}") for i in range(self.states)]
        scans = [
            rows.where(_is_of_pair(transactions, i), transactions.c.state == state).limit(_LIMIT).subquery()
            for i, state in product(range(self.pairs), states or ALL_STATES)
        ]
        merged = union_all(*map(select, scans)).subquery()
        return self.scan.with_bodies(self.scan.sort(select(merged), merged).limit(_LIMIT))


@dataclass(frozen=True, slots=True)
class ResidualFilter:
    """The part of a filter that the index of a scan does not serve."""

    pairs: int
    kinds: int
    states: int
    equals: tuple[str, ...]
    bounds: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of its conditions."""
        of_pairs = ("kind", "category") if self.pairs else ()
        of_kinds = ("kind",) if self.kinds else ()
        of_states = ("state",) if self.states else ()
        of_bounds = ("create_time",) if self.bounds else ()
        return of_pairs + of_kinds + of_states + self.equals + of_bounds

    def conditions(self, source: FromClause) -> list[ColumnElement[bool]]:
        """The conditions for the rows of a source that has these columns."""
        columns = source.c
        conditions = [columns[name] == bindparam(name) for name in self.equals]
        if self.bounds:
            conditions += _within_bounds(columns.create_time, self.bounds)
        if self.pairs:
            # For a list of pairs SQLite would build a table at every page.
            conditions.append(or_(*(_is_of_pair(source, i) for i in range(self.pairs))))
        if self.kinds:
            conditions.append(columns.kind.in_([bindparam(f"kind_{i}") for i in range(self.kinds)]))
        if self.states:
            conditions.append(columns.state.in_([bindparam(f"state_{i}") for i in range(self.states)]))
        return conditions


@dataclass(frozen=True, slots=True)
class SequenceRangeScan:
    """A filtered scan of an account by sequence. Sequences have no gaps, so a range of them bounds the rows read."""

    scan: RangeScan
    residual: ResidualFilter

    def page(self) -> Select[Any]:
        """Reads keys and bodies."""
        sequence, last = transactions.c.sequence, self._last()
        is_within = sequence >= last if self.scan.descending else sequence <= last
        rows = self.scan.rows(*self.scan.key, "body")
        return rows.where(is_within, *self.residual.conditions(transactions)).limit(_LIMIT)

    def boundary(self) -> Select[Any]:
        """Reads the key of the last row that the scan may read; no row if the account has none."""
        return self.scan.rows(*self.scan.key).where(transactions.c.sequence == self._last())

    def _last(self) -> ColumnElement[int]:
        states = account_states.c
        begin: ColumnElement[int] = literal(0)
        if self.scan.is_continued:
            begin = bindparam("after_sequence", type_=BigInteger)
        elif self.scan.descending:
            is_account = states.account_number == bindparam("account_number", type_=BigInteger)
            begin = select(states.sequence + 1).where(is_account).scalar_subquery()
        return begin - _ROWS_READ if self.scan.descending else begin + _ROWS_READ


@dataclass(frozen=True, slots=True)
class FilteredScan:
    """A filter around a scan of a bounded number of rows.

    For a tenant: its indexes contain kind, category and state, so only rows of the page are
    fetched. Also for an account by a range of times or by amount.
    """

    scan: RangeScan
    residual: ResidualFilter

    def page(self) -> Select[Any]:
        """Reads keys and bodies.

        The SELECT around the scan has no ORDER BY, because SQLite would then sort the whole scan before
        the first row. Without it both engines keep the order of the scan and stop at the limit.
        """
        names = dict.fromkeys((*self.scan.key, *self.residual.columns))
        scanned = self.scan.rows(*names).limit(_ROWS_READ).subquery()
        found = select(*(scanned.c[name] for name in self.scan.key)).where(*self.residual.conditions(scanned))
        return self.scan.with_bodies(found.limit(_LIMIT))

    def boundary(self) -> Select[Any]:
        """Reads the key of the last row that the scan may read; no row if the index ends earlier."""
        return self.scan.rows(*self.scan.key).limit(1).offset(_ROWS_READ - 1)


BoundedStrategy: TypeAlias = SequenceRangeScan | FilteredScan
"""Strategies whose page may end early, at the boundary of the scan."""
Strategy: TypeAlias = IndexScan | MergedScans | BoundedStrategy


def strategy_of(query: TransactionList) -> Strategy:
    """Chooses the strategy of a list."""
    criteria, by_time = query.filter, query.order.field is OrderField.CREATE_TIME
    pairs, states = len(_pairs_of(criteria)), len(criteria.states)
    labels = tuple(_labels_of(criteria))
    times = tuple(_times_of(query))
    if query.account_number is None:
        return _scan(query, ("tenant_number", *labels[:1]), times, residual_equals=labels[1:])
    # The index by category and time serves any range of times; the index by category and amount only whole months.
    month = () if by_time or criteria.month is None else ("month",)
    is_indexed = by_time or (month and not times)
    if 0 < pairs * (states or len(ALL_STATES)) <= SCANS_MAX and is_indexed and not labels:
        columns = (query.order.field.value, "sequence")
        return MergedScans(_range(query, ("account_number", *month), times, columns), pairs, states)
    if by_time:
        return _scan(query, ("account_number",), times, residual_equals=labels)
    return _scan(query, ("account_number",), (), residual_equals=(*month, *labels), residual_bounds=times)


def parameters_of(query: TransactionList) -> dict[str, object]:
    """The parameters of every statement of a list except `rows_read`. The limit has one extra row: see `Page.of`."""
    criteria = query.filter
    parameters: dict[str, object] = {
        "tenant_number": query.tenant_number,
        "account_number": query.account_number,
        "month": criteria.month,
        "limit": query.limit + 1,
        **_labels_of(criteria),
        **_times_of(query),
        **{f"kind_{i}": kind for i, kind in enumerate(criteria.kinds)},
        **{f"state_{i}": state for i, state in enumerate(criteria.states)},
    }
    for i, (kind, category) in enumerate(_pairs_of(criteria)):
        parameters[f"pair_kind_{i}"], parameters[f"pair_category_{i}"] = kind, category
    if query.after is not None:
        parameters[f"after_{query.order.field.value}"] = query.after.position
        parameters["after_account_number"] = query.after.account_number
        parameters["after_sequence"] = query.after.sequence
    return parameters


_LIMIT = bindparam("limit", type_=Integer)
_ROWS_READ = bindparam("rows_read", type_=BigInteger)
"""The largest number of rows to scan if the index serves only part of the filter."""


def _scan(
    query: TransactionList,
    equals: tuple[str, ...],
    bounds: tuple[str, ...],
    residual_equals: tuple[str, ...],
    residual_bounds: tuple[str, ...] = (),
) -> IndexScan | SequenceRangeScan | FilteredScan:
    """One scan of the index of these columns, with a residual filter for conditions that the index does not serve."""
    criteria, field = query.filter, query.order.field
    columns: tuple[str, ...] = (field.value, "account_number", "sequence")
    if query.account_number is not None:
        columns = ("sequence",) if field is OrderField.CREATE_TIME and not bounds else (field.value, "sequence")
    scan = _range(query, equals, bounds, columns)
    pairs = len(_pairs_of(criteria))
    kinds = 0 if pairs else len(criteria.kinds)
    residual = ResidualFilter(pairs, kinds, len(criteria.states), residual_equals, residual_bounds)
    if not (pairs or kinds or criteria.states or residual_equals or residual_bounds):
        return IndexScan(scan)
    return SequenceRangeScan(scan, residual) if columns == ("sequence",) else FilteredScan(scan, residual)


def _range(
    query: TransactionList, equals: tuple[str, ...], bounds: tuple[str, ...], columns: tuple[str, ...]
) -> RangeScan:
    order = query.order
    return RangeScan(equals, bounds, columns, order.field.value, order.descending, query.after is not None)


def _pairs_of(criteria: TransactionFilter) -> tuple[tuple[Kind, str], ...]:
    """The pairs of a kind and a category that a filter selects; none for a filter without categories."""
    if criteria.kind_categories or not criteria.categories:
        return criteria.kind_categories
    return tuple(product(criteria.kinds or ALL_KINDS, criteria.categories))


def _labels_of(criteria: TransactionFilter) -> dict[str, str]:
    return {name: value for name in LABELS if (value := getattr(criteria, name)) is not None}


def _times_of(query: TransactionList) -> Mapping[str, Instant]:
    """The bounds of create_time, by the names of their parameters, without a bound that the previous page implies.

    With both conditions on one side, an engine would begin at the bound and read every earlier page again.
    """
    lower, upper = query.filter.create_time_from, query.filter.create_time_before
    if query.order.field is OrderField.CREATE_TIME:
        if query.filter.month is not None:
            month_from, month_before = month_bounds(query.filter.month)
            lower = month_from if lower is None else max(lower, month_from)
            upper = month_before if upper is None else min(upper, month_before)
        if query.after is not None:
            lower, upper = (lower, None) if query.order.descending else (None, upper)
    bounds = {"create_time_from": lower, "create_time_before": upper}
    return {name: value for name, value in bounds.items() if value is not None}


def _within_bounds(create_time: ColumnElement[int], bounds: tuple[str, ...]) -> list[ColumnElement[bool]]:
    return [
        create_time >= bindparam(name) if name == "create_time_from" else create_time < bindparam(name)
        for name in bounds
    ]


def _is_of_pair(source: FromClause, i: int) -> ColumnElement[bool]:
    columns = source.c
    return (columns.kind == bindparam(f"pair_kind_{i}")) & (columns.category == bindparam(f"pair_category_{i}"))
