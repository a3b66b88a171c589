"""Brings the database to the schema of this version, with alembic."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, false, func, select

from server.store.database import Database
from server.store.tables import api_keys

MIGRATIONS = Path(__file__).parent / "migrations"
MIGRATION_LOCK = 0x0DA1_B00C
"""The number of the PostgreSQL advisory lock that processes take turns on; chosen once."""


def _upgrade(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(MIGRATION_LOCK)))
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


async def migrate(database: Database) -> None:
    """Applies the migrations that are missing, all of them or none.

    Safe to run at every start, by any number of processes: SQLite's lock for writers, or
    PostgreSQL's advisory lock, makes them take turns. Raises DatabaseUnfit and
    ServiceUnavailable.
    """
    await database.check()
    await database.transact_unhurried(_upgrade)


async def can_serve(database: Database) -> bool:
    """Whether calls can be answered: the schema is known, and the database lets this process write.

    Raises ServiceUnavailable, among others where the server has become read-only.
    """

    def is_writable(connection: Connection) -> None:
        # Locks no row, and PostgreSQL refuses it where it would refuse to write one.
        connection.execute(select(api_keys.c.id).where(false()).with_for_update()).close()

    if not await is_migrated(database):
        return False
    await database.look(is_writable)
    return True


async def is_migrated(database: Database) -> bool:
    """Whether the schema is the one of this version, or of a later one that this one doesn't know.

    A later one came while this process runs, from a process of a later version, whose
    migrations leave to this one what it needs. Raises ServiceUnavailable.
    """
    found = await database.look(lambda connection: MigrationContext.configure(connection).get_current_heads())
    return bool(found) and _older_revisions().isdisjoint(found)


@cache
def _older_revisions() -> frozenset[str]:
    scripts = ScriptDirectory(str(MIGRATIONS))
    return frozenset({script.revision for script in scripts.walk_revisions()} - set(scripts.get_heads()))
