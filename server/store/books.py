"""Reads the books for an audit, a part at a time."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from daybook.v1.transaction_pb2 import Transaction
from google.protobuf.message import DecodeError
from sqlalchemy import ColumnElement, Select, Table, func, select, union_all
from sqlalchemy.ext.asyncio import AsyncConnection

from server.ledger.audit import Answer, Entry
from server.ledger.instants import Instant, from_timestamp
from server.ledger.lots import Lot
from server.ledger.money import Millionths
from server.ledger.names import uid_text
from server.ledger.usage import UsageWindow
from server.store.database import Database
from server.store.lookups import in_parts
from server.store.states import LOT_COLUMNS, StoredState, has_remaining, load_states, to_lot
from server.store.tables import DISTRIBUTED, LABELS, accounts, lots, refunds, requests, transactions, usage_windows
from server.store.uninterrupted import rows_of, uninterrupted

ENTRIES_AT_ONCE = 1000
REFUNDS_AT_ONCE = 500
_ENTRY_COLUMNS = [column for column in transactions.columns if column.name != "account_number"]


@dataclass(frozen=True, slots=True)
class AccountKey:
    """An account to be audited."""

    number: int
    id: str
    tenant_number: int


@dataclass(frozen=True, slots=True)
class StoredRefund:
    """The stored total of the refunds of a charge."""

    sequence: int
    """The sequence of the charge."""
    uid: str | None
    """The uid of the charge; None if there is no transaction with this sequence."""
    amount: Millionths
    last_create_time: Instant
    is_dated_by_a_refund: bool
    """Whether a refund of the charge was posted at `last_create_time`."""


class Books:
    """The stored books of one account, all of one snapshot."""

    def __init__(self, connection: AsyncConnection, account_number: int) -> None:
        self._connection = connection
        self._number = account_number

    async def _rows(self, statement: Select[Any]) -> Sequence[Any]:
        return await rows_of(self._connection, statement)

    async def state(self) -> StoredState | None:
        """The account's state; None if its row is missing."""
        return (await uninterrupted(self._connection.run_sync(load_states, [self._number]))).get(self._number)

    async def entries(self) -> AsyncGenerator[list[Entry], None]:
        """The transactions by sequence, in parts."""
        statement = select(*_ENTRY_COLUMNS).where(transactions.c.account_number == self._number)
        after = 0
        while rows := await self._rows(_page(statement, transactions.c.sequence, after, ENTRIES_AT_ONCE)):
            yield [_to_entry(row) for row in rows]
            after = rows[-1].sequence

    async def lots(self, first: int, last: int) -> dict[int, Lot]:
        """The lots with these numbers, by number."""
        rows = await self._rows(
            select(*LOT_COLUMNS).where(
                lots.c.account_number == self._number, lots.c.number >= first, lots.c.number <= last
            )
        )
        return {row.number: to_lot(*row) for row in rows}

    async def open_lots(self) -> dict[int, Millionths]:
        """The remaining amount of each open lot, by number."""
        remaining: dict[int, Millionths] = {}
        statement = select(lots.c.number, lots.c.remaining).where(lots.c.account_number == self._number, has_remaining)
        after = 0
        while rows := await self._rows(_page(statement, lots.c.number, after, ENTRIES_AT_ONCE)):
            remaining.update((row.number, row.remaining) for row in rows)
            after = rows[-1].number
        return remaining

    async def windows(self, first: int, last: int) -> dict[int, UsageWindow]:
        """The hour windows with these numbers, by number."""
        rows = await self._rows(
            select(*usage_windows.c["number", "start", "computing", "serverless"]).where(
                usage_windows.c.account_number == self._number,
                usage_windows.c.number >= first,
                usage_windows.c.number <= last,
            )
        )
        return {row.number: UsageWindow(*row) for row in rows}

    async def answers(self, request_ids: Collection[str]) -> dict[str, Answer]:
        """The stored answers to these requests, by request_id."""
        found: dict[str, Answer] = {}
        for some in in_parts(sorted(request_ids)):
            rows = await self._rows(
                select(*requests.c["request_id", "sequence", "response"]).where(
                    requests.c.account_number == self._number, requests.c.request_id.in_(some)
                )
            )
            found |= {row.request_id: Answer(row.sequence, bytes(row.response or b"")) for row in rows}
        return found

    async def refund_totals(self) -> AsyncGenerator[list[StoredRefund], None]:
        """The stored totals of refunds, in parts."""
        is_charge = (transactions.c.account_number == refunds.c.account_number) & (
            transactions.c.sequence == refunds.c.sequence
        )
        statement = select(refunds, transactions.c.uid).outerjoin(transactions, is_charge)
        statement = statement.where(refunds.c.account_number == self._number)
        after = 0
        while rows := await self._rows(_page(statement, refunds.c.sequence, after, REFUNDS_AT_ONCE)):
            bodies = await self._rows(
                select(transactions.c.body).where(
                    transactions.c.account_number == self._number,
                    transactions.c.create_time.in_({row.last_create_time for row in rows}),
                    transactions.c.kind == Transaction.REFUND,
                )
            )
            refunded = {key for (body,) in bodies if (key := _refund_key(body)) is not None}
            stored = []
            for row in rows:
                uid = None if row.uid is None else uid_text(row.uid)
                is_dated = (uid, row.last_create_time) in refunded
                stored.append(StoredRefund(row.sequence, uid, row.amount, row.last_create_time, is_dated))
            yield stored
            after = rows[-1].sequence

    async def totals(self) -> tuple[int, int, int]:
        """The numbers of lots, of hour windows, and of requests answered with a transaction."""

        async def count(table: Table, *conditions: ColumnElement[bool]) -> int:
            counted = select(func.count()).select_from(table)
            ((number,),) = await self._rows(counted.where(table.c.account_number == self._number, *conditions))
            return int(number)

        return await count(lots), await count(usage_windows), await count(requests, requests.c.sequence.is_not(None))


def _page(statement: Select[Any], key: ColumnElement[int], after: int, limit: int) -> Select[Any]:
    """The next rows of a statement by keyset pagination: those whose key, above 0, follows `after`."""
    return statement.where(key > after).order_by(key).limit(limit)


def _to_entry(row: Any) -> Entry:
    values = row._asdict()
    labels = {name: value for name in LABELS if (value := values.pop(name)) is not None}
    return Entry(labels=labels, **values)


def _refund_key(body: bytes) -> tuple[str, Instant] | None:
    """The uid of the refunded charge, and the create_time of the refund; None if the bytes are not a Transaction."""
    try:
        refund = Transaction.FromString(body)
    except DecodeError:
        return None
    return refund.refund_of.rpartition("/")[2], from_timestamp(refund.create_time)


class BookStore:
    """Lists accounts and opens their books."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def counts(self, tenant_number: int | None) -> tuple[int, int]:
        """The numbers of accounts and transactions of a tenant, or of all tenants for None."""
        counts = []
        async with self._database.primary.snapshot() as connection:
            for table in (accounts, transactions):
                statement = select(func.count()).select_from(table)
                if tenant_number is not None:
                    statement = statement.where(table.c.tenant_number == tenant_number)
                ((count,),) = await rows_of(connection, statement)
                counts.append(int(count))
        return counts[0], counts[1]

    async def accounts(self, tenant_number: int | None) -> AsyncGenerator[AccountKey, None]:
        """The accounts of a tenant, or of all tenants for None, by number. Each page has its own snapshot."""
        statement = select(*accounts.c["number", "id", "tenant_number"])
        if tenant_number is not None:
            statement = statement.where(accounts.c.tenant_number == tenant_number)
        after: int | None = 0
        while after is not None:
            async with self._database.primary.snapshot() as connection:
                rows = await rows_of(connection, _page(statement, accounts.c.number, after, ENTRIES_AT_ONCE))
            for row in rows:
                yield AccountKey(*row)
            after = rows[-1].number if rows else None

    async def orphan(self, after: int, before: int | None) -> int | None:
        """The first account number between `after` and `before` that has rows in the distributed tables.

        None if there is none. None for `before` is no upper bound.
        """
        firsts = []
        for table in DISTRIBUTED:
            number = table.c.account_number
            first = select(func.min(number).label("number")).where(number > after)
            firsts.append(first if before is None else first.where(number < before))
        found = union_all(*firsts).subquery()
        async with self._database.primary.snapshot() as connection:
            ((orphan,),) = await rows_of(connection, select(func.min(found.c.number)))
        return None if orphan is None else int(orphan)

    @asynccontextmanager
    async def open(self, account_number: int) -> AsyncIterator[Books]:
        """The books of an account in a snapshot taken now."""
        async with self._database.primary.snapshot() as connection:
            yield Books(connection, account_number)
