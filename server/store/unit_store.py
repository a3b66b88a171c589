"""Loads a unit of work and saves it: one statement for each table, however many calls."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import Any
from uuid import UUID

from sqlalchemy import Dialect, Table, bindparam, insert, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from server.ledger.bodies import read_allocations
from server.ledger.instants import Instant
from server.ledger.lots import CREDIT_LINE, Lot
from server.ledger.names import RandomBytes, transaction_name
from server.ledger.refunds import Charge
from server.store.requests import AnswerKey, first_answers, in_parts
from server.store.states import LOT_COLUMNS, load, lock, to_lot
from server.store.tables import account_states, accounts, lots, refunds, requests, transactions, usage_windows
from server.store.unit import Changes, RefundTotal, StoredCharge, Unit

STATEMENTS_CACHED_MAX = 64


async def load_unit(
    connection: AsyncConnection,
    account_numbers: Collection[int],
    answer_keys: Collection[AnswerKey],
    charge_keys: Collection[tuple[int, UUID]],
    random_bytes: RandomBytes,
) -> Unit:
    """Locks the accounts and loads all that the group needs."""
    await lock(connection, account_numbers)
    states = await load(connection, account_numbers)
    known = {(number, lot.number): lot for number, stored in states.items() for lot in stored.state.lots}
    charges = await _load_charges(connection, charge_keys) if charge_keys else {}
    known |= await _load_lots(connection, charges, known)
    return Unit(
        states=states,
        lots=known,
        charges=charges,
        refunds=await _load_refunds(connection, charges) if charges else {},
        answers=await first_answers(connection, answer_keys),
        random_bytes=random_bytes,
    )


async def load_openers(connection: AsyncConnection, unit: Unit, now: Instant) -> None:
    """Loads what opened the lots that are past: their expirations tell whose credits these were."""
    # Nothing in the unit is posted later than this, even if the clock went back.
    latest = max([now, *(stored.state.last_create_time for stored in unit.states.values())])
    keys = {(number, lot.opened_by) for (number, _), lot in unit.lots.items() if lot.terms.are_past(latest)}
    openers: dict[tuple[int, int], bytes] = {}
    for some in in_parts(sorted(keys)):
        rows = await connection.execute(
            select(transactions.c.account_number, transactions.c.sequence, transactions.c.body).where(
                tuple_(transactions.c.account_number, transactions.c.sequence).in_(some)
            )
        )
        openers |= {(row.account_number, row.sequence): bytes(row.body) for row in rows}
    unit.openers = openers


async def _load_charges(
    connection: AsyncConnection, keys: Collection[tuple[int, UUID]]
) -> dict[tuple[int, UUID], StoredCharge]:
    charges: dict[tuple[int, UUID], StoredCharge] = {}
    for some in in_parts(sorted(keys)):
        charges |= await _load_some_charges(connection, some)
    return charges


async def _load_some_charges(
    connection: AsyncConnection, keys: Collection[tuple[int, UUID]]
) -> dict[tuple[int, UUID], StoredCharge]:
    rows = await connection.execute(
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


async def _load_lots(
    connection: AsyncConnection,
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
        rows = await connection.execute(
            select(*LOT_COLUMNS).where(lots.c.account_number == account_number, lots.c.number.in_(numbers))
        )
        found |= {(account_number, row.number): to_lot(*row) for row in rows}
    return found


async def _load_refunds(
    connection: AsyncConnection, charges: dict[tuple[int, UUID], StoredCharge]
) -> dict[tuple[int, int], RefundTotal]:
    keys = sorted((number, stored.sequence) for (number, _), stored in charges.items())
    found: dict[tuple[int, int], RefundTotal] = {}
    for some in in_parts(keys):
        rows = await connection.execute(
            select(refunds).where(tuple_(refunds.c.account_number, refunds.c.sequence).in_(some))
        )
        found |= {(row.account_number, row.sequence): RefundTotal(row.amount, row.last_create_time) for row in rows}
    return found


async def save_unit(connection: AsyncConnection, unit: Unit) -> None:
    """Writes what changed. The caller commits."""
    changes = unit.changes
    await _insert(connection, transactions, list(changes.rows.values()))
    await _save_lots(connection, unit, changes)
    await _save_windows(connection, unit, changes)
    await _save_refunds(connection, unit, changes)
    await _update(
        connection,
        account_states,
        ("account_number",),
        [
            {
                "account_number": number,
                "balance": stored.state.balance,
                "debt": stored.state.debt,
                "lot_count": stored.state.lot_count,
                "sequence": stored.state.sequence,
                "last_hash": stored.last_hash,
                "last_create_time": stored.state.last_create_time,
                "window_number": stored.state.window.number if stored.state.window else 0,
                "import_time": stored.state.import_time,
            }
            for number, stored in changes.states.items()
        ],
    )
    await _insert(
        connection,
        requests,
        [
            {
                "account_number": number,
                "request_id": request_id,
                "fingerprint": answer.request.fingerprint,
                "sequence": answer.sequence,
                "response": answer.response if answer.sequence is None else None,
            }
            for (number, request_id), answer in changes.answers.items()
        ],
    )


async def _save_lots(connection: AsyncConnection, unit: Unit, changes: Changes) -> None:
    opened: list[dict[str, Any]] = []
    moved: list[dict[str, Any]] = []
    for (number, lot_number), lot in changes.lots.items():
        if (number, lot_number) in unit.lots:
            moved.append({"account_number": number, "number": lot_number, "remaining": lot.remaining})
        else:
            opened.append(
                {
                    "account_number": number,
                    "number": lot_number,
                    "opened_by": lot.opened_by,
                    "expire_time": lot.terms.expire_time,
                    "priority": lot.terms.priority,
                    "amount": lot.amount,
                    "remaining": lot.remaining,
                }
            )
    await _insert(connection, lots, opened)
    await _update(connection, lots, ("account_number", "number"), moved)


async def _save_windows(connection: AsyncConnection, unit: Unit, changes: Changes) -> None:
    opened: list[dict[str, Any]] = []
    moved: list[dict[str, Any]] = []
    for (number, window_number), window in changes.windows.items():
        newest = unit.states[number].state.window
        row = {
            "account_number": number,
            "number": window_number,
            "computing": window.computing,
            "serverless": window.serverless,
        }
        if newest is not None and newest.number == window_number:
            moved.append(row)
        else:
            opened.append({**row, "start": window.start})
    await _insert(connection, usage_windows, opened)
    await _update(connection, usage_windows, ("account_number", "number"), moved)


async def _save_refunds(connection: AsyncConnection, unit: Unit, changes: Changes) -> None:
    first: list[dict[str, Any]] = []
    further: list[dict[str, Any]] = []
    for (number, sequence), total in changes.refunds.items():
        row = {
            "account_number": number,
            "sequence": sequence,
            "amount": total.amount,
            "last_create_time": total.last_create_time,
        }
        (further if (number, sequence) in unit.refunds else first).append(row)
    await _insert(connection, refunds, first)
    await _update(connection, refunds, ("account_number", "sequence"), further)


async def _insert(connection: AsyncConnection, table: Table, rows: list[dict[str, Any]]) -> None:
    """A fast path: the statement is compiled once, and the rows go to the driver as they are.

    Executing through SQLAlchemy costs more for each row than the database does.
    """
    if rows:
        names = tuple(column.name for column in table.columns if column.name in rows[0])
        statement = _insert_statement(table, names, connection.dialect)
        await connection.exec_driver_sql(statement, [tuple(row[name] for name in names) for row in rows])


async def _update(connection: AsyncConnection, table: Table, key: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    """Writes rows that exist, found by their key; a fast path like `_insert`."""
    if rows:
        names = tuple(column.name for column in table.columns if column.name in rows[0] and column.name not in key)
        statement = _update_statement(table, key, names, connection.dialect)
        await connection.exec_driver_sql(statement, [tuple(row[name] for name in (*names, *key)) for row in rows])


@lru_cache(STATEMENTS_CACHED_MAX)
def _insert_statement(table: Table, names: tuple[str, ...], dialect: Dialect) -> str:
    """Its parameters are in the order of the names, which is that of the table's columns."""
    return str(insert(table).compile(dialect=dialect, column_keys=list(names)))


@lru_cache(STATEMENTS_CACHED_MAX)
def _update_statement(table: Table, key: tuple[str, ...], names: tuple[str, ...], dialect: Dialect) -> str:
    """Its parameters are the names, in the order of the table's columns, and then the key."""
    # A parameter of the key must not have the name of a column.
    found = update(table).where(*(table.c[name] == bindparam(f"key_{name}") for name in key))
    return str(found.compile(dialect=dialect, column_keys=list(names)))
