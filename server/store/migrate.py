"""Brings the database to the schema of this version, with alembic."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import structlog
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, false, func, select

from server.store.database import Database
from server.store.failures import Conflict
from server.store.tables import api_keys

log = structlog.get_logger(__name__)

MIGRATIONS = Path(__file__).parent / "migrations"
MIGRATION_LOCK = 0x0DA1_B00C
"""The number of the PostgreSQL advisory lock that processes take turns on; chosen once."""


WAIT_SECONDS = 0.2
"""How soon the end of another process's migration is noticed."""
WORD_SECONDS = 5.0
"""How often the log says that it is still waited for."""
_COMPATIBLE = re.compile(r"[0-9]{4}_since_([0-9]{4})")


class SchemaTooNew(Exception):
    """A later version migrated the database to a schema that this version can't use."""


def _is_fit(connection: Connection) -> bool:
    """Whether this version can use the schema as it is; False if migrations are missing. Raises SchemaTooNew.

    The name of a migration after which servers of earlier versions still work says so:
    `0009_since_0007` leaves to servers whose newest migration is 0007 or 0008 what they need.
    """
    found = MigrationContext.configure(connection).get_current_revision()
    if found is None or found in _revisions():
        return found == _revisions()[0]
    compatible = _COMPATIBLE.fullmatch(found)
    if compatible is None or compatible[1] > _revisions()[0][:4]:
        raise SchemaTooNew(
            f"the database was migrated to {found} by a later version, which this version can't use; "
            f"it knows migrations up to {_revisions()[0]}: start the later version"
        )
    return True


def _upgrade(connection: Connection) -> None:
    if connection.dialect.name == "postgresql" and not connection.scalar(
        select(func.pg_try_advisory_xact_lock(MIGRATION_LOCK))
    ):
        raise Conflict
    if _is_fit(connection):
        return
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


async def is_fit(database: Database) -> bool:
    """Whether no migration is missing. Raises SchemaTooNew and ServiceUnavailable."""
    return await database.look(_is_fit)


async def migrate(database: Database) -> None:
    """Applies the migrations that are missing, all of them or none.

    Safe to run at every start, by any number of processes: SQLite's lock for writers, or
    PostgreSQL's advisory lock, makes them take turns. The wait for another process has no
    bound, is logged, and ends soon after a cancellation. Raises SchemaTooNew, DatabaseUnfit
    and ServiceUnavailable.
    """
    await database.check()
    waited_seconds = 0.0
    while True:
        try:
            return await database.transact_unhurried(_upgrade)
        except Conflict:
            if waited_seconds % WORD_SECONDS < WAIT_SECONDS:
                log.info("waiting for another process that migrates or writes to the database")
            await asyncio.sleep(WAIT_SECONDS)
            waited_seconds += WAIT_SECONDS


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
    """Whether this version can use the schema, which a later version may have migrated meanwhile.

    Raises ServiceUnavailable.
    """
    try:
        return await is_fit(database)
    except SchemaTooNew:
        return False


@cache
def _revisions() -> Sequence[str]:
    """The migrations that this version knows, newest first."""
    return [script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()]
