"""Errors of a database, whatever its engine."""

from __future__ import annotations

import structlog
from sqlalchemy.exc import DBAPIError, EmulatedDBAPIException, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from server.ledger.errors import ServiceUnavailable

log = structlog.get_logger(__name__)


class DatabaseBroken(ValueError):
    """The file is not a SQLite database, or is corrupt."""


class Conflict(Exception):
    """Another writer got in the way; the same work may succeed if it is done again."""


class ReplicaUnfit(Exception):
    """The replica can't serve a read now; the primary serves it."""


class UnexpectedDatabaseError(Exception):
    """An error that neither the caller nor an outage explains. Its message has no values of statements in it."""


def driver_error(error: BaseException) -> BaseException:
    """The driver's own error inside SQLAlchemy's, or the error itself."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    # Its Engine.connect() raises this one for a connection that could not be made.
    if isinstance(error, EmulatedDBAPIException) and error.orig is not None:
        error = error.orig
    return error


def translate_common(error: Exception) -> Exception:
    """The error that callers see in place of one that is about the connection; other errors as they are."""
    driver = driver_error(error)
    if isinstance(driver, OSError):
        # The system's own words about a file have its path in them.
        return unavailable(driver.strerror or str(driver))
    if isinstance(driver, PoolTimeout):
        return unavailable(str(driver))
    if isinstance(error, DBAPIError):
        if error.connection_invalidated or isinstance(error, InterfaceError | OperationalError):
            return unavailable(str(driver))
        # The traceback says where it was; values that were to be stored must not be logged.
        error.statement = error.params = None
    return error


def unavailable(words: str, sqlstate: str | None = None) -> ServiceUnavailable:
    """Logs why the database is unavailable."""
    log.warning("database unavailable", error=words, **({"sqlstate": sqlstate} if sqlstate else {}))
    return ServiceUnavailable()
