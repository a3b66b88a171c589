"""Rows by the million: past the poster, in one database transaction.

For books that are made elsewhere by the rules of posting. Everything is committed
together, so whatever goes wrong leaves the database as it was.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from functools import lru_cache

from sqlalchemy import Dialect, Index, Table, insert, select, text
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.schema import CreateIndex, DropIndex

from server.ledger.accounts import AccountRecord
from server.ledger.instants import Instant
from server.store.database import Database
from server.store.distribute import ONE_CONNECTION_PER_NODE
from server.store.tables import accounts, metadata, tenants, transactions
from server.store.units import Rows

INDEX_MEMORY_MEBIBYTES = 256
"""What PostgreSQL may use to sort an index."""


class BulkLoad:
    """Writes a tenant of its own, its accounts, and their rows, into one database transaction."""

    def __init__(self, connection: AsyncConnection, dropped: Collection[Index]) -> None:
        self._connection = connection
        self._dropped = dropped

    async def add_tenant(self, *, slug: str, uid: str, display_name: str, create_time: Instant) -> int:
        """Adds a tenant; answers with its number. Raises ValueError if there is one of this slug."""
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
        """Adds accounts without their states; answers with their numbers, by id."""
        rows = await self._connection.execute(
            insert(accounts).returning(accounts.c.id, accounts.c.number),
            [
                {
                    "tenant_number": tenant_number,
                    "id": record.id,
                    "kind": record.kind,
                    "display_name": record.display_name,
                    "credit_limit": record.credit_limit,
                    "hour_anchor": record.hour_anchor,
                    "profile": record.profile,
                    "create_time": record.create_time,
                    "update_time": record.update_time,
                }
                for record in records
            ],
        )
        return {row.id: row.number for row in rows}

    async def add(self, rows: Rows) -> None:
        """Adds rows of the big tables, past SQLAlchemy: it costs more for each than the database does."""
        raw = (await self._connection.get_raw_connection()).driver_connection
        assert raw is not None
        for name, values in rows.items():
            table = metadata.tables[name]
            if self._connection.dialect.name == "postgresql":
                columns = table.columns.keys()
                await raw.copy_records_to_table(name, records=values, columns=columns)
            else:
                await raw.executemany(_insert_statement(table, self._connection.dialect), values)

    async def build_indexes(self) -> AsyncGenerator[str, None]:
        """Makes the indexes that were put off, and tells the name of each before it is made."""
        for index in self._dropped:
            yield str(index.name)
            await self._connection.execute(CreateIndex(index))
        if self._connection.dialect.name == "postgresql":
            # The planner would wait for statistics until some time after the commit.
            await self._connection.execute(text("ANALYZE"))


@asynccontextmanager
async def bulk_load(database: Database) -> AsyncIterator[BulkLoad]:
    """A load that is committed at the end, or undone by an exception.

    Where there are no transactions yet their indexes are put off, and it takes
    `build_indexes` to have them again. In PostgreSQL everybody else waits for the table
    then; of SQLite nobody else may have the file open, or it raises ValueError.
    """
    async with database.alone() as connection:
        is_postgresql = connection.dialect.name == "postgresql"
        if is_postgresql:
            await connection.execute(ONE_CONNECTION_PER_NODE)
        is_empty = await connection.scalar(select(transactions.c.sequence).limit(1)) is None
        put_off = sorted(transactions.indexes, key=lambda index: str(index.name)) if is_empty else []
        for index in put_off:
            await connection.execute(DropIndex(index))
        if is_postgresql:
            await connection.execute(text(f"SET LOCAL maintenance_work_mem = '{INDEX_MEMORY_MEBIBYTES}MB'"))
        yield BulkLoad(connection, put_off)


@lru_cache
def _insert_statement(table: Table, dialect: Dialect) -> str:
    return str(insert(table).compile(dialect=dialect))
