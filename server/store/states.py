"""The states of accounts: all that the next posting depends on."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from sqlalchemy import Connection, func, select, text

from server.ledger.instants import EARLIEST, Instant
from server.ledger.lots import Lot, Terms, sort_lots
from server.ledger.posting import AccountState
from server.ledger.usage import UsageWindow
from server.store.tables import account_states, accounts, lots, usage_windows


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
    numbers = sorted(account_numbers)
    open_lots: dict[int, list[Lot]] = {}
    for account_number, *columns in connection.execute(
        select(lots.c.account_number, *LOT_COLUMNS).where(lots.c.account_number.in_(numbers), lots.c.remaining > 0)
    ):
        open_lots.setdefault(account_number, []).append(to_lot(*columns))
    windows = {
        account_number: UsageWindow(*columns)
        for account_number, *columns in connection.execute(
            select(usage_windows.c.account_number, *usage_windows.c["number", "start", "computing", "serverless"])
            .join(
                account_states,
                (account_states.c.account_number == usage_windows.c.account_number)
                & (account_states.c.window_number == usage_windows.c.number),
            )
            .where(account_states.c.account_number.in_(numbers))
        )
    }
    rows = connection.execute(
        select(
            account_states.c.account_number,
            accounts.c.id,
            accounts.c.tenant_number,
            accounts.c.credit_limit,
            accounts.c.hour_anchor,
            account_states.c.balance,
            account_states.c.debt,
            account_states.c.lot_count,
            account_states.c.sequence,
            account_states.c.last_create_time,
            account_states.c.import_time,
            account_states.c.last_hash,
        )
        .join(accounts, accounts.c.number == account_states.c.account_number)
        .where(account_states.c.account_number.in_(numbers))
    )
    return {
        row.account_number: StoredState(
            AccountState(
                account_number=row.account_number,
                account_id=row.id,
                tenant_number=row.tenant_number,
                credit_limit=row.credit_limit,
                hour_anchor=row.hour_anchor,
                balance=row.balance,
                debt=row.debt,
                lots=sort_lots(open_lots.get(row.account_number, ())),
                lot_count=row.lot_count,
                sequence=row.sequence,
                # The column can't say "never": history may go back before 1970.
                last_create_time=row.last_create_time if row.sequence else EARLIEST,
                window=windows.get(row.account_number),
                import_time=row.import_time,
            ),
            bytes(row.last_hash),
        )
        for row in rows
    }
