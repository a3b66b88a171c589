"""The states of accounts: all that the next posting depends on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from sqlalchemy import BindParameter, Connection, Dialect, Select, bindparam, func, literal_column, select, text

from server.ledger.instants import EARLIEST, Instant
from server.ledger.lots import Lot, Terms, sort_lots
from server.ledger.posting import AccountState
from server.ledger.usage import UsageWindow
from server.store.query import Query
from server.store.tables import account_states, accounts, lots, usage_windows

QUERIES_CACHED_MAX = 256


class StoredState(NamedTuple):
    """The state of an account, and the end of its chain."""

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
    """A lot out of LOT_COLUMNS."""
    return Lot(number, opened_by, Terms(expire_time, priority), amount, remaining)


# A loop inside the database costs no way there and back for each account. One SELECT of them
# all would be refused by a sharded PostgreSQL, which locks the rows of one account at a time,
# and one UPDATE locks in whatever order its plan has.
_LOCK_EACH = text("""
    DO $$
    DECLARE
        each bigint;
    BEGIN
        FOREACH each IN ARRAY current_setting('daybook.accounts')::bigint[] LOOP
            PERFORM FROM account_states WHERE account_number = each FOR UPDATE;
        END LOOP;
    END $$
""")


def lock(connection: Connection, account_numbers: Collection[int]) -> None:
    """Keeps others from posting to these accounts until the database transaction ends.

    One by one in ascending order, so that two writers never wait for each other, but with two
    statements however many there are. SQLite has one writer.
    """
    if connection.dialect.name == "sqlite":
        return
    numbers = sorted(account_numbers)
    if len(numbers) == 1:
        connection.execute(
            select(account_states.c.account_number)
            .where(account_states.c.account_number == numbers[0])
            .with_for_update()
        )
        return
    # DO takes no parameters.
    connection.execute(select(func.set_config("daybook.accounts", f"{{{','.join(map(str, numbers))}}}", True)))
    connection.execute(_LOCK_EACH)


def load(connection: Connection, account_numbers: Collection[int]) -> dict[int, StoredState]:
    """The states of those of the accounts that exist, by number."""
    open_lots, rest = _statements(sorted(account_numbers))
    return put_together(connection.execute(open_lots), connection.execute(rest))


@lru_cache(QUERIES_CACHED_MAX)
def state_queries(count: int, dialect: Dialect) -> tuple[Query, Query]:
    """What `put_together` needs of so many accounts, whose numbers are the parameters `account_parameters` gives.

    To be asked at one instant.
    """
    open_lots, rest = _statements([bindparam(name) for name in account_parameters(range(count))])
    return Query.of(open_lots, dialect), Query.of(rest, dialect)


def account_parameters(account_numbers: Iterable[int]) -> dict[str, int]:
    """Account numbers as parameters."""
    return {f"account_{i}": number for i, number in enumerate(account_numbers)}


def put_together(open_lots: Iterable[Sequence[Any]], rest: Iterable[Sequence[Any]]) -> dict[int, StoredState]:
    """States by account number, out of the rows of both queries."""
    lots_of: dict[int, list[Lot]] = {}
    for account_number, *columns in open_lots:
        lots_of.setdefault(account_number, []).append(to_lot(*columns))
    return {row[0]: _to_state(lots_of.get(row[0], ()), *row) for row in rest}


def _statements(numbers: Sequence[int] | Sequence[BindParameter[int]]) -> tuple[Select[Any], Select[Any]]:
    # A 0 that SQLite reads for itself: for one that it is given it compiles the statement anew each time,
    # because an index depends on it.
    open_lots = (
        select(lots.c.account_number, *LOT_COLUMNS)
        .where(lots.c.account_number.in_(numbers), lots.c.remaining > literal_column("0"))
        # By itself it would take the primary key, and go through all lots that an account ever had.
        .with_hint(lots, "INDEXED BY lots_open", "sqlite")
    )
    newest_window = (usage_windows.c.account_number == account_states.c.account_number) & (
        usage_windows.c.number == account_states.c.window_number
    )
    rest = (
        select(
            account_states.c.account_number,
            *accounts.c["id", "tenant_number", "credit_limit", "hour_anchor"],
            *account_states.c[
                "balance", "debt", "lot_count", "sequence", "last_create_time", "import_time", "last_hash"
            ],
            *usage_windows.c["number", "start", "computing", "serverless"],
        )
        .join_from(account_states, accounts, accounts.c.number == account_states.c.account_number)
        .outerjoin(usage_windows, newest_window)
        .where(account_states.c.account_number.in_(numbers))
    )
    return open_lots, rest


def _to_state(
    open_lots: Iterable[Lot],
    account_number: int,
    account_id: str,
    tenant_number: int,
    credit_limit: int,
    hour_anchor: Instant,
    balance: int,
    debt: int,
    lot_count: int,
    sequence: int,
    last_create_time: Instant,
    import_time: Instant,
    last_hash: bytes,
    *window: int,
) -> StoredState:
    state = AccountState(
        account_number=account_number,
        account_id=account_id,
        tenant_number=tenant_number,
        credit_limit=credit_limit,
        hour_anchor=hour_anchor,
        balance=balance,
        debt=debt,
        lots=sort_lots(open_lots),
        lot_count=lot_count,
        sequence=sequence,
        # The column can't say "never": history may go back before 1970.
        last_create_time=last_create_time if sequence else EARLIEST,
        window=UsageWindow(*window) if window[0] is not None else None,
        import_time=import_time,
    )
    return StoredState(state, bytes(last_hash))
