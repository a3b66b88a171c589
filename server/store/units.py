"""Loads and saves units of work: few statements per table for any number of calls.

server/posting/unit.py defines units of work.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple, TypeAlias
from uuid import UUID

from sqlalchemy import Connection, Table, insert, select

from server.ledger.bodies import read_allocations
from server.ledger.idempotency import Answer, AnswerKey
from server.ledger.instants import Instant
from server.ledger.lots import CREDIT_LINE, Lot
from server.ledger.money import Millionths
from server.ledger.names import post_time, transaction_name, uid_text
from server.ledger.posting import Kind, State
from server.ledger.refunds import Charge, RefundTotal, StoredCharge
from server.ledger.usage import UsageWindow
from server.store.answers import load_answers
from server.store.engine import Engine, engine_of
from server.store.lookups import in_parts
from server.store.open_lots import OpenLots, load_bodies
from server.store.states import LOT_COLUMNS, StoredState, load_states, to_lot
from server.store.tables import account_states, accounts, lots, metadata, refunds, requests, transactions, usage_windows

STATEMENTS_CACHED_MAX = 256
ROWS_PER_STATEMENT_MAX = 256
"""A power of two. Engines limit the parameters of a statement."""

LotKey: TypeAlias = tuple[int, int]
"""The number of an account, and the number of one of its lots."""
TransactionKey: TypeAlias = tuple[int, int]
"""The number of an account, and the sequence of one of its transactions."""
DatabaseTransaction: TypeAlias = Connection
"""The connection of a database transaction that is under way."""
Rows: TypeAlias = dict[str, list[tuple[object, ...]]]
"""Rows by the name of their table. Each row has the values of all columns, in the order of the table."""


class PostedRow(NamedTuple):
    """A new row of the table transactions."""

    account_number: int
    sequence: int
    tenant_number: int
    uid: bytes
    create_time: Instant
    month: int
    kind: Kind
    category: str
    state: State
    amount: Millionths
    balance_after: Millionths
    location: str | None
    membership: str | None
    company: str | None
    body: bytes
    allocations: bytes
    hash: bytes


@dataclass(slots=True)
class Loaded:
    """The rows that a unit of work needs from the database."""

    states: dict[int, StoredState] = field(default_factory=dict)
    lots: dict[LotKey, Lot] = field(default_factory=dict)
    """Open lots, and the lots of charges to be refunded."""
    charges: Mapping[tuple[int, UUID], StoredCharge] = field(default_factory=dict)
    """Transactions to be refunded, by account and uid."""
    refunds: Mapping[TransactionKey, RefundTotal] = field(default_factory=dict)
    """By the charge."""
    answers: Mapping[AnswerKey, Answer] = field(default_factory=dict)
    openers: dict[TransactionKey, bytes] = field(default_factory=dict)
    """The bodies of the transactions that opened expired lots."""
    open_lots: OpenLots | None = None
    """Reads further open lots; None if all of them are loaded."""


@dataclass(slots=True)
class Changes:
    """The rows that a unit of work writes."""

    states: dict[int, StoredState] = field(default_factory=dict)
    posted: dict[TransactionKey, PostedRow] = field(default_factory=dict)
    """New transactions, in the order of posting."""
    lots: dict[LotKey, Lot] = field(default_factory=dict)
    windows: dict[tuple[int, int], UsageWindow] = field(default_factory=dict)
    """By account and number of the window."""
    refunds: dict[TransactionKey, RefundTotal] = field(default_factory=dict)
    answers: dict[AnswerKey, Answer] = field(default_factory=dict)
    lots_read: dict[int, int] = field(default_factory=dict)
    """The number of lots read in spending order, by account. Not written to the database."""

    def update(self, later: Changes) -> None:
        """Adds later changes."""
        self.states.update(later.states)
        self.posted.update(later.posted)
        self.lots.update(later.lots)
        self.windows.update(later.windows)
        self.refunds.update(later.refunds)
        self.answers.update(later.answers)
        self.lots_read.update(later.lots_read)


def load(
    connection: DatabaseTransaction,
    account_numbers: Collection[int],
    answer_keys: Collection[AnswerKey],
    charge_keys: Collection[tuple[int, UUID]],
) -> Loaded:
    """Locks the accounts until the database transaction ends, and loads the rows of a unit of work.

    `openers` stays empty: see `load_openers`.
    """
    engine_of(connection).lock_accounts(connection, account_numbers)
    states = load_states(connection, account_numbers)
    open_lots = {(number, lot.number): lot for number, stored in states.items() for lot in stored.state.lots}
    charges = _load_charges(connection, charge_keys) if charge_keys else {}
    return Loaded(
        states=states,
        lots=open_lots | _load_lots(connection, charges, open_lots),
        charges=charges,
        refunds=_load_refunds(connection, charges) if charges else {},
        answers=load_answers(connection, answer_keys),
        open_lots=OpenLots(connection),
    )


def load_openers(connection: DatabaseTransaction, loaded: Loaded, now: Instant) -> None:
    """Loads the bodies of the transactions that opened expired lots: an expiration repeats their labels and owner."""
    expired = {(number, lot.opened_by) for (number, _), lot in loaded.lots.items() if lot.terms.have_expired(now)}
    loaded.openers.update(load_bodies(connection, expired))


def _load_charges(connection: Connection, keys: Collection[tuple[int, UUID]]) -> dict[tuple[int, UUID], StoredCharge]:
    statement = select(
        *transactions.c[
            "account_number", "uid", "sequence", "kind", "state", "amount", "create_time", "allocations", "body"
        ],
        accounts.c.id,
    ).join(accounts, accounts.c.number == transactions.c.account_number)
    charges: dict[tuple[int, UUID], StoredCharge] = {}
    for some in in_parts(sorted(keys)):
        stored_keys = [(number, uid.bytes) for number, uid in some]
        key = transactions.c["account_number", "uid"]
        for row in connection.execute(engine_of(connection).with_keys(statement, key, stored_keys)):
            charges[row.account_number, UUID(bytes=row.uid)] = to_charge(row.id, row)
    return charges


def to_charge(account_id: str, row: Any) -> StoredCharge:
    """A transaction to be refunded, without its lots and its refunds, from its row."""
    charge = Charge(
        name=transaction_name(account_id, uid_text(row.uid)),
        kind=row.kind,
        state=row.state,
        amount=row.amount,
        post_time=post_time(row.uid, row.create_time),
        allocations=read_allocations(row.allocations),
        lots={},
    )
    return StoredCharge(row.sequence, charge, row.body)


def _load_lots(
    connection: Connection, charges: Mapping[tuple[int, UUID], StoredCharge], open_lots: Mapping[LotKey, Lot]
) -> dict[LotKey, Lot]:
    """The lots of the charges that are no longer open."""
    missing = {
        (number, each.lot_number)
        for (number, _), stored in charges.items()
        for each in stored.charge.allocations
        if each.lot_number != CREDIT_LINE and (number, each.lot_number) not in open_lots
    }
    found: dict[LotKey, Lot] = {}
    for account_number in sorted({number for number, _ in missing}):
        numbers = sorted(lot for number, lot in missing if number == account_number)
        for some in in_parts(numbers):
            rows = connection.execute(
                select(*LOT_COLUMNS).where(lots.c.account_number == account_number, lots.c.number.in_(some))
            )
            found |= {(account_number, row.number): to_lot(*row) for row in rows}
    return found


def _load_refunds(
    connection: Connection, charges: Mapping[tuple[int, UUID], StoredCharge]
) -> dict[TransactionKey, RefundTotal]:
    keys = sorted((number, stored.sequence) for (number, _), stored in charges.items())
    found: dict[TransactionKey, RefundTotal] = {}
    for some in in_parts(keys):
        key = refunds.c["account_number", "sequence"]
        rows = connection.execute(engine_of(connection).with_keys(select(refunds), key, some))
        found |= {(row.account_number, row.sequence): RefundTotal(row.amount, row.last_create_time) for row in rows}
    return found


def save(connection: DatabaseTransaction, loaded: Loaded, changes: Changes) -> None:
    """Writes the changes. The caller commits."""
    for name, rows in posted_rows(changes).items():
        _write(connection, metadata.tables[name], rows, is_update=False)
    stored_keys: dict[str, Collection[tuple[object, ...]]] = {
        account_states.name: {(number,) for number in loaded.states},
        lots.name: loaded.lots.keys(),
        usage_windows.name: {
            (number, stored.state.window.number) for number, stored in loaded.states.items() if stored.state.window
        },
        refunds.name: loaded.refunds.keys(),
    }
    for name, rows in state_rows(changes).items():
        table = metadata.tables[name]
        key_length, keys = len(table.primary_key), stored_keys[name]
        _write(connection, table, [row for row in rows if row[:key_length] not in keys], is_update=False)
        _write(connection, table, [row for row in rows if row[:key_length] in keys], is_update=True)


def posted_rows(changes: Changes) -> Rows:
    """The rows that never change: transactions and answers."""
    return {
        transactions.name: list(changes.posted.values()),
        requests.name: [
            (
                number,
                request_id,
                answer.request.fingerprint,
                answer.sequence,
                answer.response if answer.sequence is None else None,
            )
            for (number, request_id), answer in changes.answers.items()
        ],
    }


def state_rows(changes: Changes) -> Rows:
    """The rows that posting updates: states, lots, hour windows and totals of refunds."""
    return {
        account_states.name: [
            (
                number,
                state.balance,
                state.debt,
                state.lot_count,
                state.sequence,
                last_hash,
                state.last_create_time,
                state.window.number if state.window else 0,
                state.import_time,
                state.open_lot_count,
                state.expiring,
                state.sequence,
            )
            for number, (state, last_hash) in changes.states.items()
        ],
        lots.name: [(*key, lot.opened_by, *lot.terms, lot.amount, lot.remaining) for key, lot in changes.lots.items()],
        usage_windows.name: [
            (*key, window.start, window.computing, window.serverless) for key, window in changes.windows.items()
        ],
        refunds.name: [(*key, total.amount, total.last_create_time) for key, total in changes.refunds.items()],
    }


def _write(connection: Connection, table: Table, rows: Sequence[tuple[object, ...]], *, is_update: bool) -> None:
    """Writes whole rows; all of them are new, or all of them are stored already.

    Statements are compiled once and the values go directly to the driver: SQLAlchemy costs
    more per row than the database. The numbers of rows per statement are powers of two, so that
    few statements are compiled.
    """
    # Rows that are neighbours on disk are written together. Keys are unique, so only keys are compared.
    rows = sorted(rows)
    start = 0
    while start < len(rows):
        count = min(ROWS_PER_STATEMENT_MAX, 1 << (len(rows) - start).bit_length() - 1)
        statement = _statement(table, count, engine_of(connection), is_update)
        connection.exec_driver_sql(statement, tuple(chain.from_iterable(rows[start : start + count])))
        start += count


@lru_cache(STATEMENTS_CACHED_MAX)
def _statement(table: Table, row_count: int, engine: Engine, is_update: bool) -> str:
    """The statement for `row_count` rows; its parameters are the values of each row in turn."""
    names = table.columns.keys()
    values = [dict.fromkeys(names)] * row_count
    if not is_update:
        # Without OR FAIL, SQLite journals every page that the statement changes, to be able to undo the
        # statement alone: half of all its writes. Here a failure rolls back the whole transaction.
        statement = insert(table).prefix_with("OR FAIL", dialect="sqlite").values(values)
        return str(statement.compile(dialect=engine.dialect))
    statement = engine.insert(table).values(values)
    key = [column.name for column in table.primary_key]
    # An upsert is the one statement that updates many rows, each with its own values, on both engines.
    statement = statement.on_conflict_do_update(
        index_elements=key, set_={name: statement.excluded[name] for name in names if name not in key}
    )
    return str(statement.compile(dialect=engine.dialect))
