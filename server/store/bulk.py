"""Bulk loads: millions of rows in one database transaction, without the poster.

The rows must follow the rules of posting. A failure leaves the database unchanged.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager

from sqlalchemy import Index, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.schema import CreateIndex, DropIndex

from server.ledger.accounts import AccountRecord
from server.ledger.instants import Instant
from server.store.accounts import new_account_row
from server.store.database import Database
from server.store.engine import Engine
from server.store.tables import accounts, metadata, tenants, transactions
from server.store.units import Rows


class BulkLoad:
    """Writes a new tenant, its accounts and their rows in one database transaction."""

    def __init__(self, engine: Engine, connection: AsyncConnection, dropped: Collection[Index]) -> None:
        self._engine = engine
        self._connection = connection
        self._dropped = dropped

    async def add_tenant(self, *, slug: str, uid: str, display_name: str, create_time: Instant) -> int:
        """Adds a tenant; returns its number. Raises ValueError if the slug is taken."""
        if await self._connection.scalar(select(tenants.c.number).where(tenants.c.slug == slug)) is not None:
            raise ValueError(f"a tenant {slug!r} exists already")
        number: int = (
            await self._connection.execute(
                insert(tenants).returning(tenants.c.number),
                {"slug": slug, "uid": uid, "display_name": display_name, "create_time": create_time, "demo": 0},
            )
        ).scalar_one()
        return number

    async def add_accounts(self, tenant_number: int, records: Sequence[AccountRecord]) -> dict[str, int]:
        """Adds accounts without their states; returns their numbers, by id."""
        rows = await self._connection.execute(
            insert(accounts).returning(accounts.c.id, accounts.c.number),
            [new_account_row(tenant_number, record) for record in records],
        )
        return {row.id: row.number for row in rows}

    async def add(self, rows: Rows) -> None:
        """Adds rows of the distributed tables without SQLAlchemy, which costs more per row than the database."""
        for name, values in rows.items():
            await self._engine.insert_bulk(self._connection, metadata.tables[name], values)

    async def build_indexes(self) -> AsyncGenerator[str, None]:
        """Rebuilds the dropped indexes; yields the name of each before it is built."""
        for index in self._dropped:
            yield str(index.name)
            await self._connection.execute(CreateIndex(index))


@asynccontextmanager
async def bulk_load(database: Database) -> AsyncIterator[BulkLoad]:
    """A load that is committed at the end of the block, or rolled back by an exception.

    If the table transactions is empty, drops its indexes; `build_indexes` rebuilds them. Other
    sessions of PostgreSQL wait for the table meanwhile. Raises ValueError if another
    process has SQLite's file open.
    """
    async with database.primary.bulk_transaction() as connection:
        is_empty = await connection.scalar(select(transactions.c.sequence).limit(1)) is None
        dropped = sorted(transactions.indexes, key=lambda index: str(index.name)) if is_empty else []
        for index in dropped:
            await connection.execute(DropIndex(index))
        yield BulkLoad(database.primary, connection, dropped)
