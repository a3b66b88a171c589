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
from server.store.tables import (
    LABELS,
    account_states,
    accounts,
    lots,
    refunds,
    requests,
    transactions,
    usage_windows,
)
from server.store.uninterrupted import rows_of, uninterrupted

ENTRIES_AT_ONCE = 1000
REFUNDS_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class AccountKey:
    """An account that is to be audited."""

    number: int
    id: str
    tenant_number: int


@dataclass(frozen=True, slots=True)
class StoredRefund:
    """What was given back of a charge, as it is stored."""

    sequence: int
    """The charge's."""
    uid: str | None
    """The charge's; None if there is no transaction of this sequence."""
    amount: Millionths
    last_create_time: Instant
    is_dated_by_a_refund: bool
    """Whether a refund of the charge was posted at that time."""


class Books:
    """The stored books of one account, all of one snapshot."""

    def __init__(self, connection: AsyncConnection, account_number: int) -> None:
        self._connection = connection
        self._number = account_number

    async def _rows(self, statement: Select[Any]) -> Sequence[Any]:
        return await rows_of(self._connection, statement)

    async def state(self) -> StoredState | None:
        """The account's state; None if there is no row of it."""
        return (await uninterrupted(self._connection.run_sync(load_states, [self._number]))).get(self._number)

    async def entries(self) -> AsyncGenerator[list[Entry], None]:
        """The transactions in their order, in parts."""
        after = 0
        columns = transactions.c
        while True:
            rows = await self._rows(
                select(transactions)
                .where(columns.account_number == self._number, columns.sequence > after)
                .order_by(columns.sequence)
                .limit(ENTRIES_AT_ONCE)
            )
            if not rows:
                return
            yield [
                Entry(
                    sequence=row.sequence,
                    tenant_number=row.tenant_number,
                    uid=bytes(row.uid),
                    create_time=row.create_time,
                    month=row.month,
                    kind=row.kind,
                    category=row.category,
                    state=row.state,
                    amount=row.amount,
                    balance_after=row.balance_after,
                    labels={name: value for name in LABELS if (value := getattr(row, name)) is not None},
                    body=bytes(row.body),
                    allocations=bytes(row.allocations),
                    hash=bytes(row.hash),
                )
                for row in rows
            ]
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
        """What remains of each open lot, by number."""
        remaining: dict[int, Millionths] = {}
        after = 0
        while True:
            rows = await self._rows(
                select(lots.c.number, lots.c.remaining)
                .where(lots.c.account_number == self._number, lots.c.number > after, has_remaining)
                .order_by(lots.c.number)
                .limit(ENTRIES_AT_ONCE)
            )
            if not rows:
                return remaining
            remaining.update((row.number, row.remaining) for row in rows)
            after = rows[-1].number

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
        """What was given back of charges, in parts."""
        after = 0
        while True:
            rows = await self._rows(
                select(refunds, transactions.c.uid)
                .outerjoin(
                    transactions,
                    (transactions.c.account_number == refunds.c.account_number)
                    & (transactions.c.sequence == refunds.c.sequence),
                )
                .where(refunds.c.account_number == self._number, refunds.c.sequence > after)
                .order_by(refunds.c.sequence)
                .limit(REFUNDS_AT_ONCE)
            )
            if not rows:
                return
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
                uid = None if row.uid is None else uid_text(bytes(row.uid))
                is_known = (uid, row.last_create_time) in refunded
                stored.append(StoredRefund(row.sequence, uid, row.amount, row.last_create_time, is_known))
            yield stored
            after = rows[-1].sequence

    async def totals(self) -> tuple[int, int, int]:
        """How many lots, hour windows, and requests answered with a transaction there are."""

        async def count(table: Table, *conditions: ColumnElement[bool]) -> int:
            counted = select(func.count()).select_from(table)
            ((number,),) = await self._rows(counted.where(table.c.account_number == self._number, *conditions))
            return int(number)

        return await count(lots), await count(usage_windows), await count(requests, requests.c.sequence.is_not(None))


def _refund_key(body: bytes) -> tuple[str, Instant] | None:
    """The uid of the charge that a refund gave back, and when it did; None for no transaction."""
    try:
        refund = Transaction.FromString(body)
    except DecodeError:
        return None
    return refund.refund_of.rpartition("/")[2], from_timestamp(refund.create_time)


class BookStore:
    """Opens the books."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def counts(self, tenant_number: int | None) -> tuple[int, int]:
        """How many accounts and transactions a tenant has, or everybody if it is None."""
        account_count = select(func.count()).select_from(accounts)
        transaction_count = select(func.count()).select_from(transactions)
        if tenant_number is not None:
            account_count = account_count.where(accounts.c.tenant_number == tenant_number)
            transaction_count = transaction_count.where(transactions.c.tenant_number == tenant_number)
        async with self._database.primary.snapshot() as connection:
            ((account_total,),) = await rows_of(connection, account_count)
            ((transaction_total,),) = await rows_of(connection, transaction_count)
        return account_total, transaction_total

    async def accounts(self, tenant_number: int | None) -> AsyncGenerator[AccountKey, None]:
        """The accounts of a tenant, or of everybody if it is None, by number."""
        after = 0
        while True:
            statement = select(accounts.c.number, accounts.c.id, accounts.c.tenant_number).where(
                accounts.c.number > after
            )
            if tenant_number is not None:
                statement = statement.where(accounts.c.tenant_number == tenant_number)
            async with self._database.primary.snapshot() as connection:
                rows = await rows_of(connection, statement.order_by(accounts.c.number).limit(ENTRIES_AT_ONCE))
            if not rows:
                return
            for row in rows:
                yield AccountKey(*row)
            after = rows[-1].number

    async def orphan(self, after: int, before: int | None) -> int | None:
        """The first account number in between that has rows of its own and no row in accounts."""
        firsts = []
        for table in (account_states, transactions, lots, refunds, usage_windows, requests):
            number = table.c.account_number
            first = select(func.min(number).label("number")).where(number > after)
            firsts.append(first if before is None else first.where(number < before))
        found = union_all(*firsts).subquery()
        async with self._database.primary.snapshot() as connection:
            ((orphan,),) = await rows_of(connection, select(func.min(found.c.number)))
        return None if orphan is None else int(orphan)

    @asynccontextmanager
    async def open(self, account_number: int) -> AsyncIterator[Books]:
        """The books of an account as they are now, whatever is posted meanwhile."""
        async with self._database.primary.snapshot() as connection:
            yield Books(connection, account_number)
