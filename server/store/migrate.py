"""Brings the database to the schema of this version, with alembic."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, func, select

from server.store.database import Database

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
    PostgreSQL's advisory lock, makes them take turns.
    """
    await database.transact_unhurried(_upgrade)


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
