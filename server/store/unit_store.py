"""Loads a unit of work and saves it: one statement for each table, however many calls."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from itertools import chain
from uuid import UUID

from sqlalchemy import Connection, Dialect, Table, bindparam, insert, select, tuple_, update

from server.ledger.bodies import read_allocations
from server.ledger.instants import Instant
from server.ledger.lots import CREDIT_LINE, Lot
from server.ledger.names import RandomBytes, transaction_name
from server.ledger.refunds import Charge
from server.store.requests import AnswerKey, first_answers, in_parts
from server.store.states import LOT_COLUMNS, load, lock, to_lot
from server.store.tables import account_states, accounts, lots, refunds, requests, transactions, usage_windows
from server.store.unit import Changes, RefundTotal, Row, StoredCharge, Unit

STATEMENTS_CACHED_MAX = 64
ROWS_AT_ONCE = 250
"""How many rows one statement inserts; engines bound the parameters of a statement."""


def load_unit(
    connection: Connection,
    account_numbers: Collection[int],
    answer_keys: Collection[AnswerKey],
    charge_keys: Collection[tuple[int, UUID]],
    random_bytes: RandomBytes,
) -> Unit:
    """Locks the accounts and loads all that the group needs."""
    lock(connection, account_numbers)
    states = load(connection, account_numbers)
    known = {(number, lot.number): lot for number, stored in states.items() for lot in stored.state.lots}
    charges = _load_charges(connection, charge_keys) if charge_keys else {}
    known |= _load_lots(connection, charges, known)
    return Unit(
        states=states,
        lots=known,
        charges=charges,
        refunds=_load_refunds(connection, charges) if charges else {},
        answers=first_answers(connection, answer_keys),
        random_bytes=random_bytes,
    )


def load_openers(connection: Connection, unit: Unit, now: Instant) -> None:
    """Loads what opened the lots that are past: their expirations tell whose credits these were."""
    # Nothing in the unit is posted later than this, even if the clock went back.
    latest = max([now, *(stored.state.last_create_time for stored in unit.states.values())])
    keys = {(number, lot.opened_by) for (number, _), lot in unit.lots.items() if lot.terms.are_past(latest)}
    openers: dict[tuple[int, int], bytes] = {}
    for some in in_parts(sorted(keys)):
        rows = connection.execute(
            select(transactions.c.account_number, transactions.c.sequence, transactions.c.body).where(
                tuple_(transactions.c.account_number, transactions.c.sequence).in_(some)
            )
        )
        openers |= {(row.account_number, row.sequence): bytes(row.body) for row in rows}
    unit.openers = openers


def _load_charges(connection: Connection, keys: Collection[tuple[int, UUID]]) -> dict[tuple[int, UUID], StoredCharge]:
    charges: dict[tuple[int, UUID], StoredCharge] = {}
    for some in in_parts(sorted(keys)):
        charges |= _load_some_charges(connection, some)
    return charges


def _load_some_charges(
    connection: Connection, keys: Collection[tuple[int, UUID]]
) -> dict[tuple[int, UUID], StoredCharge]:
    rows = connection.execute(
        select(
            transactions.c.account_number,
            transactions.c.uid,
            transactions.c.sequence,
            transactions.c.kind,
            transactions.c.state,
            transactions.c.amount,
            transactions.c.create_time,
            transactions.c.allocations,
            transactions.c.body,
            accounts.c.id,
        )
        .join(accounts, accounts.c.number == transactions.c.account_number)
        .where(
            tuple_(transactions.c.account_number, transactions.c.uid).in_([(number, uid.bytes) for number, uid in keys])
        )
    )
    charges = {}
    for row in rows:
        uid = UUID(bytes=bytes(row.uid))
        charge = Charge(
            name=transaction_name(row.id, uid),
            kind=row.kind,
            state=row.state,
            amount=row.amount,
            create_time=row.create_time,
            allocations=read_allocations(row.allocations),
            lots={},
        )
        charges[row.account_number, uid] = StoredCharge(row.sequence, charge, bytes(row.body))
    return charges


def _load_lots(
    connection: Connection,
    charges: dict[tuple[int, UUID], StoredCharge],
    known: dict[tuple[int, int], Lot],
) -> dict[tuple[int, int], Lot]:
    """Those lots of the charges that are not open any more."""
    missing = {
        (number, each.lot_number)
        for (number, _), stored in charges.items()
        for each in stored.charge.allocations
        if each.lot_number != CREDIT_LINE and (number, each.lot_number) not in known
    }
    found: dict[tuple[int, int], Lot] = {}
    for account_number in sorted({number for number, _ in missing}):
        numbers = sorted(lot for number, lot in missing if number == account_number)
        rows = connection.execute(
            select(*LOT_COLUMNS).where(lots.c.account_number == account_number, lots.c.number.in_(numbers))
        )
        found |= {(account_number, row.number): to_lot(*row) for row in rows}
    return found


def _load_refunds(
    connection: Connection, charges: dict[tuple[int, UUID], StoredCharge]
) -> dict[tuple[int, int], RefundTotal]:
    keys = sorted((number, stored.sequence) for (number, _), stored in charges.items())
    found: dict[tuple[int, int], RefundTotal] = {}
    for some in in_parts(keys):
        rows = connection.execute(select(refunds).where(tuple_(refunds.c.account_number, refunds.c.sequence).in_(some)))
        found |= {(row.account_number, row.sequence): RefundTotal(row.amount, row.last_create_time) for row in rows}
    return found


def save_unit(connection: Connection, unit: Unit) -> None:
    """Writes what changed. The caller commits."""
    changes = unit.changes
    # In the order of the key, so that neighbours on disk are written together.
    _insert(connection, transactions, Row._fields, sorted(changes.rows.values()))
    _save_lots(connection, unit, changes)
    _save_windows(connection, unit, changes)
    _save_refunds(connection, unit, changes)
    _save_states(connection, changes)
    _insert(
        connection,
        requests,
        ("account_number", "request_id", "fingerprint", "sequence", "response"),
        [
            (
                number,
                request_id,
                answer.request.fingerprint,
                answer.sequence,
                answer.response if answer.sequence is None else None,
            )
            for (number, request_id), answer in sorted(changes.answers.items(), key=lambda item: item[0])
        ],
    )


def _save_states(connection: Connection, changes: Changes) -> None:
    _update(
        connection,
        account_states,
        ("account_number",),
        (
            "balance",
            "debt",
            "lot_count",
            "sequence",
            "last_hash",
            "last_create_time",
            "window_number",
            "import_time",
        ),
        [
            (
                stored.state.balance,
                stored.state.debt,
                stored.state.lot_count,
                stored.state.sequence,
                stored.last_hash,
                stored.state.last_create_time,
                stored.state.window.number if stored.state.window else 0,
                stored.state.import_time,
                number,
            )
            for number, stored in changes.states.items()
        ],
    )


def _save_lots(connection: Connection, unit: Unit, changes: Changes) -> None:
    opened: list[Sequence[object]] = []
    moved: list[Sequence[object]] = []
    for (account_number, number), lot in changes.lots.items():
        if (account_number, number) in unit.lots:
            moved.append((lot.remaining, account_number, number))
        else:
            terms = lot.terms
            opened.append(
                (account_number, number, lot.opened_by, terms.expire_time, terms.priority, lot.amount, lot.remaining)
            )
    names = ("account_number", "number", "opened_by", "expire_time", "priority", "amount", "remaining")
    _insert(connection, lots, names, opened)
    _update(connection, lots, ("account_number", "number"), ("remaining",), moved)


def _save_windows(connection: Connection, unit: Unit, changes: Changes) -> None:
    opened: list[Sequence[object]] = []
    moved: list[Sequence[object]] = []
    for (account_number, number), window in changes.windows.items():
        newest = unit.states[account_number].state.window
        if newest is not None and newest.number == number:
            moved.append((window.computing, window.serverless, account_number, number))
        else:
            opened.append((account_number, number, window.start, window.computing, window.serverless))
    names = ("account_number", "number", "start", "computing", "serverless")
    _insert(connection, usage_windows, names, opened)
    _update(connection, usage_windows, ("account_number", "number"), ("computing", "serverless"), moved)


def _save_refunds(connection: Connection, unit: Unit, changes: Changes) -> None:
    first: list[Sequence[object]] = []
    further: list[Sequence[object]] = []
    for (account_number, sequence), total in changes.refunds.items():
        if (account_number, sequence) in unit.refunds:
            further.append((total.amount, total.last_create_time, account_number, sequence))
        else:
            first.append((account_number, sequence, total.amount, total.last_create_time))
    key, totals = ("account_number", "sequence"), ("amount", "last_create_time")
    _insert(connection, refunds, (*key, *totals), first)
    _update(connection, refunds, key, totals, further)


def _insert(connection: Connection, table: Table, names: tuple[str, ...], rows: Sequence[Sequence[object]]) -> None:
    """Inserts rows, the values of each in the order of the names, which is that of the columns.

    A fast path: the statements are compiled once and the values go to the driver as they
    are, because SQLAlchemy costs more for each row than the database does. Many rows make
    one statement, because a driver's thread that steps from row to row has to wait for the
    interpreter at each.
    """
    whole = len(rows) - len(rows) % ROWS_AT_ONCE
    for start in range(0, whole, ROWS_AT_ONCE):
        statement = _insert_statement(table, names, ROWS_AT_ONCE, connection.dialect)
        values = chain.from_iterable(rows[start : start + ROWS_AT_ONCE])
        connection.exec_driver_sql(statement, tuple(values))
    if whole < len(rows):
        statement = _insert_statement(table, names, 1, connection.dialect)
        connection.exec_driver_sql(statement, list(map(tuple, rows[whole:])))


def _update(
    connection: Connection,
    table: Table,
    key: tuple[str, ...],
    names: tuple[str, ...],
    rows: list[Sequence[object]],
) -> None:
    """Writes rows that exist: of each the values of the names and then of the key. A fast path like `_insert`."""
    if rows:
        statement = _update_statement(table, key, names, connection.dialect)
        connection.exec_driver_sql(statement, list(map(tuple, rows)))


@lru_cache(STATEMENTS_CACHED_MAX)
def _insert_statement(table: Table, names: tuple[str, ...], row_count: int, dialect: Dialect) -> str:
    """Its parameters are the names, which are in the order of the table's columns, for each row."""
    if row_count == 1:
        return str(insert(table).compile(dialect=dialect, column_keys=list(names)))
    return str(insert(table).values([dict.fromkeys(names)] * row_count).compile(dialect=dialect))


@lru_cache(STATEMENTS_CACHED_MAX)
def _update_statement(table: Table, key: tuple[str, ...], names: tuple[str, ...], dialect: Dialect) -> str:
    """Its parameters are the names, in the order of the table's columns, and then the key."""
    # A parameter of the key must not have the name of a column.
    found = update(table).where(*(table.c[name] == bindparam(f"key_{name}") for name in key))
    return str(found.compile(dialect=dialect, column_keys=list(names)))
