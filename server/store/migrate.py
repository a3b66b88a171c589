"""Migrates the database to the schema of this version."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import structlog
from sqlalchemy import Connection, column, false, inspect, select, table

from server.ledger.errors import SchemaTooNew
from server.store.database import Database
from server.store.engine import engine_of
from server.store.failures import Conflict
from server.store.query import Query
from server.store.tables import api_keys

log = structlog.get_logger(__name__)

MIGRATIONS = Path(__file__).parent / "migrations"
WAIT_SECONDS = 0.2
"""Time between two attempts while another process migrates, in seconds."""
LOG_SECONDS = 5.0
"""Time between two log lines of that wait, in seconds."""

_FILE = re.compile(r"(?P<revision>[0-9]{4}(_since_[0-9]{4})?)_[a-z_]+\.py")
_COMPATIBLE = re.compile(r"[0-9]{4}_since_([0-9]{4})")
# Locks no row, but PostgreSQL refuses it if it would refuse a write.
_REQUIRE_WRITABLE = Query(select(api_keys.c.id).where(false()).with_for_update())
_version = table("alembic_version", column("version_num"))
_VERSION = Query(select(_version.c.version_num))


def _is_usable(found: str | None) -> bool:
    """Whether this version can use a schema without a migration. Raises SchemaTooNew.

    The name of a migration that keeps the schema usable for earlier versions has the oldest one:
    `0009_since_0007` serves versions whose newest migration is 0007 or 0008.
    """
    if found is None or found in _revisions():
        return found == _revisions()[0]
    compatible = _COMPATIBLE.fullmatch(found)
    if compatible is None or compatible[1] > _revisions()[0][:4]:
        raise SchemaTooNew(
            f"the database was migrated to {found} by a later version, which this version can't use; "
            f"its newest migration is {_revisions()[0]}: start the later version"
        )
    return True


def _upgrade(connection: Connection) -> None:
    if not engine_of(connection).try_migration_lock(connection):
        raise Conflict
    has_version = inspect(connection).has_table(_version.name)
    if _is_usable(connection.scalar(select(_version.c.version_num)) if has_version else None):
        return
    # Imported only if migrations are missing.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


async def is_fit(database: Database) -> bool:
    """Whether no migration is missing. Raises SchemaTooNew and ServiceUnavailable."""
    engine = database.primary
    has_version = await engine.fetch(engine.has_table, {"name": _version.name})
    rows = await engine.fetch(_VERSION, {}) if has_version else []
    return _is_usable(rows[0][0] if rows else None)


async def migrate(database: Database) -> None:
    """Applies the missing migrations, all or none.

    Safe at every start, for any number of processes: SQLite's write lock, or PostgreSQL's
    advisory lock, serializes them. The wait for another process is unbounded; it is logged and
    can be cancelled. Raises SchemaTooNew, DatabaseUnfit and ServiceUnavailable.
    """
    await database.primary.check()
    waited_seconds = 0.0
    while True:
        try:
            return await database.primary.transact_without_timeouts(_upgrade)
        except Conflict:
            if waited_seconds % LOG_SECONDS < WAIT_SECONDS:
                log.info("waiting for migration lock")
            await asyncio.sleep(WAIT_SECONDS)
            waited_seconds += WAIT_SECONDS


async def can_serve(database: Database) -> bool:
    """Whether calls can be served: the schema is usable, and the database accepts writes of this process.

    Raises ServiceUnavailable, also if the database has become read-only.
    """
    if not await is_migrated(database):
        return False
    await database.primary.fetch(_REQUIRE_WRITABLE, {})
    return True


async def is_migrated(database: Database) -> bool:
    """Whether this version can use the schema, which a later version may have migrated. Raises ServiceUnavailable."""
    try:
        return await is_fit(database)
    except SchemaTooNew:
        return False


@cache
def _revisions() -> Sequence[str]:
    """The migrations of this version, newest first, by the names of their files."""
    names = (_FILE.fullmatch(file.name) for file in (MIGRATIONS / "versions").iterdir())
    return sorted((name["revision"] for name in names if name), reverse=True)
