"""Loads the states of accounts, on which their next postings depend."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

from sqlalchemy import (
    BigInteger,
    BindParameter,
    ColumnElement,
    Connection,
    Select,
    bindparam,
    case,
    cast,
    func,
    literal_column,
    or_,
    select,
)

from server.ledger.instants import EARLIEST, Instant
from server.ledger.lots import NEVER, Lot, SpendingOrder, Terms, sort_lots
from server.ledger.posting import AccountState
from server.ledger.usage import UsageWindow
from server.store.query import Query
from server.store.tables import account_states, accounts, lots, usage_windows

QUERIES_CACHED_MAX = 256
WHOLE_LOTS_MAX = 64
"""The largest number of open lots that are loaded with the state of an account."""


class StoredState(NamedTuple):
    """The state of an account, and the newest hash of its chain."""

    state: AccountState
    last_hash: bytes


LOT_COLUMNS = (
    lots.c.number,
    lots.c.opened_by,
    lots.c.expire_time,
    lots.c.priority,
    lots.c.amount,
    lots.c.remaining,
)


def to_lot(number: int, opened_by: int, expire_time: Instant | None, priority: int, amount: int, remaining: int) -> Lot:
    """A lot from the values of LOT_COLUMNS."""
    return Lot(number, opened_by, Terms(expire_time, priority), amount, remaining)


def load_states(connection: Connection, account_numbers: Collection[int]) -> dict[int, StoredState]:
    """The states of the accounts that exist, by number.

    An account with more than WHOLE_LOTS_MAX open lots gets none of them; see server/store/open_lots.py.
    """
    rows = connection.execute(STATES, {"numbers": sorted(account_numbers), "whole_lots_max": WHOLE_LOTS_MAX}).all()
    whole = [row.account_number for row in rows if 0 < row.open_lot_count <= WHOLE_LOTS_MAX]
    lots_of: dict[int, list[Lot]] = {}
    if whole:
        for account_number, *columns in connection.execute(OPEN_LOTS, {"numbers": whole}):
            lots_of.setdefault(account_number, []).append(to_lot(*columns))
    return {
        row.account_number: _to_state(
            row[:-1],
            lots=sort_lots(lots_of.get(row.account_number, ())),
            edge=None if row.open_lot_count <= WHOLE_LOTS_MAX else (),
            horizon=NEVER if row.horizon is None else row.horizon,
        )
        for row in rows
    }


@lru_cache(QUERIES_CACHED_MAX)
def current_states_query(count: int, *more: ColumnElement[Any]) -> Query:
    """Reads the current states of `count` accounts: rows for `to_current_state`, each followed by the columns `more`.

    The parameters are those of `account_parameters` and `now`. Expired lots are not counted.
    """
    numbers: Numbers = [bindparam(name) for name in account_parameters(range(count))]
    expired = _of_lots(_sum_of(lots.c.remaining), numbers, lots.c.expire_time <= bindparam("now"))
    return Query(_states(numbers, expired.scalar_subquery(), *more))


def account_parameters(account_numbers: Iterable[int]) -> dict[str, int]:
    """The parameters for these account numbers: `account_0`, `account_1` and so on."""
    return {f"account_{i}": number for i, number in enumerate(account_numbers)}


def to_current_state(row: Sequence[Any]) -> AccountState:
    """A state without its lots and without expired credits."""
    *columns, expired = row
    state, _ = _to_state(columns, lots=(), edge=(), horizon=EARLIEST)
    return state._replace(balance=state.balance - expired, expiring=state.expiring - expired)


has_remaining = lots.c.remaining > literal_column("0")
"""The 0 is literal, because SQLite does not use a partial index for a condition with a parameter."""
# During a rollout, servers of an older version post without updating these columns.
_is_counted = account_states.c.counted_sequence == account_states.c.sequence

Numbers: TypeAlias = BindParameter[Any] | Sequence[BindParameter[int]]
"""The account numbers of a statement, as its parameters."""


def _of_lots(value: ColumnElement[Any], numbers: Numbers, *conditions: ColumnElement[bool]) -> Select[Any]:
    """A subquery: a value of the open lots of each account of the enclosing query."""
    return (
        select(value)
        .select_from(lots)
        .where(
            has_remaining,
            lots.c.account_number == account_states.c.account_number,
            # Without this condition Citus queries every shard: it does not derive it from the enclosing query.
            lots.c.account_number.in_(numbers),
            *conditions,
        )
        .correlate(account_states)
    )


def _sum_of(column: ColumnElement[int]) -> ColumnElement[int]:
    return cast(func.coalesce(func.sum(column), 0), BigInteger)


def _open_lot_count(numbers: Numbers) -> ColumnElement[int]:
    # Without the hint SQLite would scan all lots that the account ever had.
    counted = _of_lots(func.count(), numbers).with_hint(lots, "INDEXED BY lots_open", "sqlite")
    return case((_is_counted, account_states.c.open_lot_count), else_=counted.scalar_subquery())


def _expiring(numbers: Numbers) -> ColumnElement[int]:
    summed = _of_lots(_sum_of(lots.c.remaining), numbers, lots.c.expire_time.is_not(None))
    summed = summed.with_hint(lots, "INDEXED BY lots_expiring", "sqlite")
    return case((_is_counted, account_states.c.expiring), else_=summed.scalar_subquery())


def _states(numbers: Numbers, *more: ColumnElement[Any]) -> Select[Any]:
    newest_window = (usage_windows.c.account_number == account_states.c.account_number) & (
        usage_windows.c.number == account_states.c.window_number
    )
    return (
        select(
            account_states.c.account_number,
            *accounts.c["id", "tenant_number", "credit_limit", "hour_anchor"],
            *account_states.c[
                "balance", "debt", "lot_count", "sequence", "last_create_time", "import_time", "last_hash"
            ],
            _open_lot_count(numbers).label("open_lot_count"),
            _expiring(numbers).label("expiring"),
            *usage_windows.c["number", "start", "computing", "serverless"],
            *more,
        )
        .join_from(account_states, accounts, accounts.c.number == account_states.c.account_number)
        .outerjoin(usage_windows, newest_window)
        .where(account_states.c.account_number.in_(numbers))
    )


_numbers: BindParameter[Any] = bindparam("numbers", expanding=True)
_first_expire_time = _of_lots(func.min(lots.c.expire_time), _numbers, lots.c.expire_time.is_not(None))
STATES = _states(
    _numbers,
    case(
        (
            or_(~_is_counted, account_states.c.open_lot_count > bindparam("whole_lots_max")),
            _first_expire_time.scalar_subquery(),
        )
    ).label("horizon"),
)
OPEN_LOTS = (
    select(lots.c.account_number, *LOT_COLUMNS)
    .where(lots.c.account_number.in_(_numbers), has_remaining)
    # Without the hint SQLite scans the primary key, over all lots that the accounts ever had.
    .with_hint(lots, "INDEXED BY lots_open", "sqlite")
)


def _to_state(
    row: Sequence[Any], *, lots: tuple[Lot, ...], edge: SpendingOrder | None, horizon: Instant
) -> StoredState:
    """A state from the columns of `_states`."""
    *first, lot_count, sequence, last_create_time, import_time, last_hash, open_lot_count, expiring = row[:-4]
    window = UsageWindow(*row[-4:]) if row[-1] is not None else None
    # Before the first transaction the column has 0, which is later than history before 1970.
    newest = last_create_time if sequence else EARLIEST
    # In the order of AccountState; `first` has the fields up to the debt.
    fields = (*first, lots, lot_count, sequence, newest, window, import_time, open_lot_count, expiring, edge, horizon)
    return StoredState(AccountState._make(fields), bytes(last_hash))
