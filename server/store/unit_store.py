"""Loads a unit of work and saves it: one statement for each table, however many calls."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from uuid import UUID

from sqlalchemy import Connection, Dialect, Table, insert, select
from sqlalchemy.dialects import postgresql, sqlite

from server.ledger.bodies import read_allocations
from server.ledger.instants import Instant
from server.ledger.lots import CREDIT_LINE, Lot
from server.ledger.names import RandomBytes, post_time, transaction_name
from server.ledger.refunds import Charge
from server.store.lookups import in_parts, with_keys
from server.store.open_lots import OpenLots, load_bodies
from server.store.requests import AnswerKey, first_answers
from server.store.states import LOT_COLUMNS, load, lock, to_lot
from server.store.tables import account_states, accounts, lots, metadata, refunds, requests, transactions, usage_windows
from server.store.unit import Block, Changes, Known, RefundTotal, Row, StoredCharge, Unit

STATEMENTS_CACHED_MAX = 256
ROWS_AT_ONCE = 256
"""How many rows one statement writes, a power of two; engines bound the parameters of a statement."""


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
        open_lots=OpenLots(connection),
    )


def load_openers(connection: Connection, unit: Unit, now: Instant) -> None:
    """Loads what opened the lots that are past: their expirations tell whose credits these were."""
    unit.openers.update(
        load_bodies(
            connection, {(number, lot.opened_by) for (number, _), lot in unit.lots.items() if lot.terms.are_past(now)}
        )
    )


def load_known(connection: Connection, account_numbers: Collection[int]) -> Known:
    """All that posting history to these accounts depends on, as far as they exist; nothing is locked."""
    states = load(connection, account_numbers)
    openers = {
        (number, lot.opened_by)
        for number, stored in states.items()
        for lot in stored.state.lots
        if lot.terms.expire_time is not None
    }
    return Known(states, load_bodies(connection, openers))


def _load_charges(connection: Connection, keys: Collection[tuple[int, UUID]]) -> dict[tuple[int, UUID], StoredCharge]:
    charges: dict[tuple[int, UUID], StoredCharge] = {}
    for some in in_parts(sorted(keys)):
        charges |= _load_some_charges(connection, some)
    return charges


def _load_some_charges(
    connection: Connection, keys: Collection[tuple[int, UUID]]
) -> dict[tuple[int, UUID], StoredCharge]:
    statement = select(
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
    ).join(accounts, accounts.c.number == transactions.c.account_number)
    stored_keys = [(number, uid.bytes) for number, uid in keys]
    key = transactions.c["account_number", "uid"]
    rows = connection.execute(with_keys(statement, key, stored_keys, connection.dialect))
    charges = {}
    for row in rows:
        uid = UUID(bytes=bytes(row.uid))
        charge = Charge(
            name=transaction_name(row.id, uid),
            kind=row.kind,
            state=row.state,
            amount=row.amount,
            post_time=post_time(bytes(row.uid), row.create_time),
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
        for some in in_parts(numbers):
            rows = connection.execute(
                select(*LOT_COLUMNS).where(lots.c.account_number == account_number, lots.c.number.in_(some))
            )
            found |= {(account_number, row.number): to_lot(*row) for row in rows}
    return found


def _load_refunds(
    connection: Connection, charges: dict[tuple[int, UUID], StoredCharge]
) -> dict[tuple[int, int], RefundTotal]:
    keys = sorted((number, stored.sequence) for (number, _), stored in charges.items())
    found: dict[tuple[int, int], RefundTotal] = {}
    for some in in_parts(keys):
        key = refunds.c["account_number", "sequence"]
        rows = connection.execute(with_keys(select(refunds), key, some, connection.dialect))
        found |= {(row.account_number, row.sequence): RefundTotal(row.amount, row.last_create_time) for row in rows}
    return found


def save_unit(connection: Connection, unit: Unit) -> None:
    """Writes what changed. The caller commits."""
    changes = unit.changes
    for block in (*changes.blocks, *new_rows(changes)):
        _execute(connection, block, is_update=False)
    _save_lots(connection, unit, changes)
    _save_windows(connection, unit, changes)
    _save_refunds(connection, unit, changes)
    _save_states(connection, changes)


def new_rows(changes: Changes) -> Iterator[Block]:
    """The transactions and requests among the changes, ready to be written."""
    # In the order of the key, so that neighbours on disk are written together.
    yield from _blocks(transactions, Row._fields, sorted(changes.rows.values()))
    yield from _blocks(
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
        (
            "account_number",
            "balance",
            "debt",
            "lot_count",
            "sequence",
            "last_hash",
            "last_create_time",
            "window_number",
            "import_time",
            "open_lot_count",
            "expiring",
            "counted_sequence",
        ),
        [
            (
                number,
                stored.state.balance,
                stored.state.debt,
                stored.state.lot_count,
                stored.state.sequence,
                stored.last_hash,
                stored.state.last_create_time,
                stored.state.window.number if stored.state.window else 0,
                stored.state.import_time,
                stored.state.open_lot_count,
                stored.state.expiring,
                stored.state.sequence,
            )
            for number, stored in sorted(changes.states.items(), key=lambda item: item[0])
        ],
    )


def _save_lots(connection: Connection, unit: Unit, changes: Changes) -> None:
    names = ("account_number", "number", "opened_by", "expire_time", "priority", "amount", "remaining")
    opened: list[Sequence[object]] = []
    moved: list[Sequence[object]] = []
    for key, lot in changes.lots.items():
        rows = moved if key in unit.lots else opened
        rows.append((*key, lot.opened_by, *lot.terms, lot.amount, lot.remaining))
    _insert(connection, lots, names, opened)
    _update(connection, lots, names, moved)


def _save_windows(connection: Connection, unit: Unit, changes: Changes) -> None:
    names = ("account_number", "number", "start", "computing", "serverless")
    opened: list[Sequence[object]] = []
    moved: list[Sequence[object]] = []
    for (account_number, number), window in changes.windows.items():
        newest = unit.states[account_number].state.window
        rows = moved if newest is not None and newest.number == number else opened
        rows.append((account_number, number, window.start, window.computing, window.serverless))
    _insert(connection, usage_windows, names, opened)
    _update(connection, usage_windows, names, moved)


def _save_refunds(connection: Connection, unit: Unit, changes: Changes) -> None:
    names = ("account_number", "sequence", "amount", "last_create_time")
    first: list[Sequence[object]] = []
    further: list[Sequence[object]] = []
    for key, total in changes.refunds.items():
        rows = further if key in unit.refunds else first
        rows.append((*key, total.amount, total.last_create_time))
    _insert(connection, refunds, names, first)
    _update(connection, refunds, names, further)


def _insert(connection: Connection, table: Table, names: tuple[str, ...], rows: Sequence[Sequence[object]]) -> None:
    """Inserts rows that are new; the values of each are in the order of the names."""
    for block in _blocks(table, names, rows):
        _execute(connection, block, is_update=False)


def _update(connection: Connection, table: Table, names: tuple[str, ...], rows: Sequence[Sequence[object]]) -> None:
    """Writes rows that exist, every column of them."""
    for block in _blocks(table, names, rows):
        _execute(connection, block, is_update=True)


def _blocks(table: Table, names: tuple[str, ...], rows: Sequence[Sequence[object]]) -> Iterator[Block]:
    """Rows in as few blocks as there can be, whose lengths are powers of two, so that few statements serve them all."""
    start = 0
    while start < len(rows):
        count = min(ROWS_AT_ONCE, 1 << (len(rows) - start).bit_length() - 1)
        yield Block(str(table.name), names, count, tuple(chain.from_iterable(rows[start : start + count])))
        start += count


def _execute(connection: Connection, block: Block, *, is_update: bool) -> None:
    """Writes a block by one statement.

    A fast path: the statements are compiled once and the values go to the driver as they
    are, because SQLAlchemy costs more for each row than the database does. A driver's thread
    that steps from row to row has to wait for the interpreter at each, so many rows make one
    statement.
    """
    table = metadata.tables[block.table]
    statement = _statement(table, block.columns, block.row_count, connection.dialect, is_update)
    connection.exec_driver_sql(statement, block.values)


@lru_cache(STATEMENTS_CACHED_MAX)
def _statement(table: Table, names: tuple[str, ...], row_count: int, dialect: Dialect, is_update: bool) -> str:
    """Its parameters are the names for each row."""
    values = [dict.fromkeys(names)] * row_count
    if not is_update:
        # Else SQLite keeps a copy of every page that a statement of many rows changes, to undo that
        # statement alone: half of all that it writes. Here the whole transaction is undone.
        return str(insert(table).prefix_with("OR FAIL", dialect="sqlite").values(values).compile(dialect=dialect))
    kind = sqlite if dialect.name == "sqlite" else postgresql
    statement = kind.insert(table).values(values)
    key = [column.name for column in table.primary_key]
    # An update of many rows with a value each is, on either engine, an insert that finds them there.
    statement = statement.on_conflict_do_update(
        index_elements=key, set_={name: statement.excluded[name] for name in names if name not in key}
    )
    return str(statement.compile(dialect=dialect))
