"""Distributes the tables over the nodes of a sharded PostgreSQL (Citus)."""

from __future__ import annotations

from sqlalchemy import Connection, func, select, text

from server.store.database import Database
from server.store.postgresql import MIGRATION_LOCK, ONE_CONNECTION_PER_NODE, PostgreSQL
from server.store.tables import DISTRIBUTED, DISTRIBUTION_COLUMN, REFERENCE


async def distribute(database: Database) -> list[str]:
    """Distributes tables by account and copies the reference tables; returns the names of the tables changed.

    Skips tables that are distributed already, so it may be repeated. Distributes all tables or none.
    Raises ValueError for a database that can't be distributed.
    """
    if not isinstance(database.primary, PostgreSQL):
        problem = "only PostgreSQL can be distributed, with the extension citus; this database is SQLite"
        raise ValueError(problem)  # noqa: TRY004  # a wrong setting, not a wrong type

    def work(connection: Connection) -> list[str]:
        if connection.scalar(text("SELECT 1 FROM pg_extension WHERE extname = 'citus'")) is None:
            raise ValueError("the database has no extension citus; nothing was distributed")
        # Waits for other processes that distribute or migrate.
        connection.execute(select(func.pg_advisory_xact_lock(MIGRATION_LOCK)))
        connection.execute(ONE_CONNECTION_PER_NODE)
        # citus_tables lists local tables too.
        rows = connection.execute(
            text("SELECT table_name::text FROM citus_tables WHERE citus_table_type IN ('distributed', 'reference')")
        )
        done = set(rows.scalars())
        missing = {name: call for name, call in _calls().items() if name not in done}
        for call in missing.values():
            connection.execute(text(f"SELECT {call}"))
        return list(missing)

    return await database.primary.transact_without_timeouts(work)


def _calls() -> dict[str, str]:
    """The SQL function call that distributes each table, by the table's name. They must run in this order."""
    calls = {table.name: f"create_reference_table('{table.name}')" for table in REFERENCE}
    for table in DISTRIBUTED:
        # All rows of an account are on one node, in every table: joins and commits stay there.
        group = "none" if table is DISTRIBUTED[0] else DISTRIBUTED[0].name
        calls[table.name] = (
            f"create_distributed_table('{table.name}', '{DISTRIBUTION_COLUMN}', colocate_with => '{group}')"
        )
    return calls
