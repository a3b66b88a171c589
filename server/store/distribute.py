"""Spreads the tables over the nodes of a sharded PostgreSQL (Citus)."""

from __future__ import annotations

from sqlalchemy import Connection, func, select, text

from server.store.database import Database
from server.store.migrate import MIGRATION_LOCK
from server.store.tables import COPIED, DISTRIBUTED, DISTRIBUTION_COLUMN


async def distribute(database: Database) -> list[str]:
    """Distributes the big tables by account and copies the small ones; answers with the names of those it did.

    What is distributed already is left as it is, so it may be repeated. All or nothing.
    Raises ValueError for a database that can't be distributed.
    """
    if database.url.get_backend_name() != "postgresql":
        raise ValueError("only PostgreSQL can be distributed, with the extension citus; this database is SQLite")

    def work(connection: Connection) -> list[str]:
        if connection.scalar(text("SELECT 1 FROM pg_extension WHERE extname = 'citus'")) is None:
            raise ValueError("the database has no extension citus; nothing was distributed")
        # Processes take turns, with those that migrate too.
        connection.execute(select(func.pg_advisory_xact_lock(MIGRATION_LOCK)))
        # Tables that refer to each other are to be copied over one connection to each node.
        connection.execute(text("SET LOCAL citus.multi_shard_modify_mode TO 'sequential'"))
        rows = connection.execute(text("SELECT logicalrelid::text FROM pg_dist_partition"))
        done = set(rows.scalars())
        missing = {name: call for name, call in _calls().items() if name not in done}
        for call in missing.values():
            connection.execute(text(f"SELECT {call}"))
        return list(missing)

    return await database.transact_unhurried(work)


def _calls() -> dict[str, str]:
    """What is called for each table, in this order."""
    calls = {table.name: f"create_reference_table('{table.name}')" for table in COPIED}
    for table in DISTRIBUTED:
        # All rows of an account on one node, whatever their table: joins and commits stay there.
        group = "none" if table is DISTRIBUTED[0] else DISTRIBUTED[0].name
        calls[table.name] = (
            f"create_distributed_table('{table.name}', '{DISTRIBUTION_COLUMN}', colocate_with => '{group}')"
        )
    return calls
