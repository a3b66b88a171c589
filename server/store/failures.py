"""What callers are told of what goes wrong with a database, whoever noticed it."""

from __future__ import annotations

import sqlite3
from typing import cast

import asyncpg
import structlog
from sqlalchemy.exc import DBAPIError, EmulatedDBAPIException, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from server.ledger.errors import ServiceUnavailable

log = structlog.get_logger(__name__)

# PostgreSQL: serialization_failure, deadlock_detected, unique_violation. The last is what
# the slower of two writers of one new row gets; when it looks again, the row is there.
_CONFLICT_STATES = ("40001", "40P01", "23505")
# PostgreSQL can't be reached as it was told, has no room, is being stopped or started, fails
# itself, or took too long over a lock, a statement or a transaction: nothing that the caller
# did wrong.
_OUTAGE_STATES = ("08", "25P03", "25P04", "28", "3D", "53", "55P03", "57", "58")
"""Beginnings of codes, which are classes of errors where they have two characters."""


class Conflict(Exception):
    """Another writer was in the way; the same work may succeed if it is done again."""


class _OnlyKnownErrors:
    """Lets only errors out of a block that callers know. A class, for what a generator costs a list shows."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, Exception) and (known := _known(error)) is not error:
            raise known from error


ONLY_KNOWN_ERRORS = _OnlyKnownErrors()


def _known(error: Exception) -> Exception:
    """What callers see in the place of what went wrong: an error of ours, or itself if it is no outage."""
    if isinstance(error, EmulatedDBAPIException):
        # From a connection that could not be made: SQLAlchemy's own Engine.connect() takes it on.
        error = error.driver_exception
    if isinstance(error, DBAPIError):
        state = getattr(error.orig, "sqlstate", None) or ""
        if state in _CONFLICT_STATES:
            return Conflict()
        is_outage = error.connection_invalidated or state.startswith(_OUTAGE_STATES)
        if not is_outage and not isinstance(error, InterfaceError | OperationalError):
            # Where it was, the traceback says; what was to be stored is not for the log.
            error.statement = error.params = None
            return error
    # The drivers' own come from the fast path, and from connections that are not made yet.
    elif isinstance(error, asyncpg.PostgresError):
        if not (error.sqlstate or "").startswith(_OUTAGE_STATES):
            return cast("Exception", error)
    elif not isinstance(
        error, PoolTimeout | OSError | asyncpg.InterfaceError | asyncpg.InternalClientError | sqlite3.OperationalError
    ):
        return error
    # What the system says of a file has its path in it.
    words = (error.strerror if isinstance(error, OSError) else None) or str(getattr(error, "orig", error))
    log.warning("database unavailable", error=words)
    return ServiceUnavailable()
