"""Errors of any database engine."""

from __future__ import annotations

import structlog
from sqlalchemy.exc import DBAPIError, EmulatedDBAPIException, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from server.ledger.errors import ServiceUnavailable

log = structlog.get_logger(__name__)


class DatabaseBroken(ValueError):
    """The file is not a SQLite database, or is corrupt."""


class Conflict(Exception):
    """A conflict with another writer; a retry of the same work may succeed."""


class ReplicaUnfit(Exception):
    """The replica can't serve a read now; the primary serves it."""


class UnexpectedDatabaseError(Exception):
    """An error caused by neither the caller nor an outage. Its message shows no values of statements."""


def driver_error(error: BaseException) -> BaseException:
    """The driver's own error inside SQLAlchemy's, or the error itself."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    # SQLAlchemy's Engine.connect() raises this one if it can't connect.
    if isinstance(error, EmulatedDBAPIException) and error.orig is not None:
        error = error.orig
    return error


def translate_common(error: Exception) -> Exception:
    """ServiceUnavailable for an error of the connection; other errors unchanged."""
    driver = driver_error(error)
    if isinstance(driver, OSError):
        # The full message of an OSError contains the path of a file.
        return unavailable(driver.strerror or str(driver))
    if isinstance(driver, PoolTimeout):
        return unavailable(str(driver))
    if isinstance(error, DBAPIError):
        if error.connection_invalidated or isinstance(error, InterfaceError | OperationalError):
            return unavailable(str(driver))
        # The traceback shows the statement's place in the code; values must not be logged.
        error.statement = error.params = None
    return error


def unavailable(problem: str, sqlstate: str | None = None) -> ServiceUnavailable:
    """Logs why the database is unavailable; returns the error for callers."""
    log.warning("database unavailable", error=problem, **({"sqlstate": sqlstate} if sqlstate else {}))
    return ServiceUnavailable()
