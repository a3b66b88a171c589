"""The meaning of errors of PostgreSQL, for the caller and for the session."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto

import asyncpg
import structlog

from server.ledger.errors import DaybookError, NotStorable, ServiceUnavailable
from server.store.failures import (
    Conflict,
    ReplicaUnfit,
    UnexpectedDatabaseError,
    driver_error,
    translate_common,
    unavailable,
)

log = structlog.get_logger(__name__)


class Meaning(Enum):
    """The meaning of an error of PostgreSQL."""

    CONFLICT = auto()
    """A conflict with another writer: the work is retried."""
    BUSY = auto()
    """UNAVAILABLE: the server lacks a resource at the moment, or timed out. The session is usable."""
    DISCONNECTED = auto()
    """UNAVAILABLE: the session is ending or in the wrong state. It is replaced."""
    WRONG_SERVER = auto()
    """UNAVAILABLE: the server can't write. Every session of this process is replaced."""
    NOT_STORABLE = auto()
    """FAILED_PRECONDITION: the database can't hold a value of the request."""
    UNEXPECTED = auto()
    """INTERNAL: a fault of this program or of the schema. The log has the SQLSTATE."""


MEANINGS: Mapping[str, Meaning] = {
    "08": Meaning.DISCONNECTED,  # connection exception
    "0B": Meaning.DISCONNECTED,  # invalid transaction initiation
    "22": Meaning.NOT_STORABLE,  # data exception: a number out of range, a character that the encoding lacks
    # Of two writers of the same new row, the slower gets this; its retry finds the row.
    "23505": Meaning.CONFLICT,  # unique violation
    "24": Meaning.DISCONNECTED,  # invalid cursor state
    # The session has an unexpected transaction or lacks one, or was ended for that.
    "25": Meaning.DISCONNECTED,  # invalid transaction state
    "25006": Meaning.WRONG_SERVER,  # read-only transaction: a standby, or default_transaction_read_only
    # A pooler gave the session, and its prepared statements, to another client.
    "26": Meaning.DISCONNECTED,  # invalid statement name
    "28": Meaning.DISCONNECTED,  # invalid authorization, at connecting
    "2D": Meaning.DISCONNECTED,  # invalid transaction termination
    "34": Meaning.DISCONNECTED,  # invalid cursor name
    "3B": Meaning.DISCONNECTED,  # savepoint exception
    "3D": Meaning.DISCONNECTED,  # no such database, at connecting
    "40": Meaning.CONFLICT,  # transaction rollback: serialization failure, deadlock
    "40003": Meaning.DISCONNECTED,  # statement completion unknown
    "42P05": Meaning.DISCONNECTED,  # duplicate prepared statement: as 26
    "53": Meaning.BUSY,  # insufficient resources: connections, memory, disk
    "55000": Meaning.WRONG_SERVER,  # among others: recovery is in progress
    "55006": Meaning.BUSY,  # object in use
    "55P03": Meaning.BUSY,  # lock not available
    "57": Meaning.DISCONNECTED,  # operator intervention: shutdown, start, end of an idle session
    "57014": Meaning.BUSY,  # query canceled: statement_timeout
    "58": Meaning.DISCONNECTED,  # system error: input or output of the server
    "72": Meaning.BUSY,  # snapshot too old
}
"""The meanings of classes of SQLSTATEs, two characters, and of codes that differ from their class.

All other classes are UNEXPECTED.
"""


def meaning_of(sqlstate: str) -> Meaning:
    """The meaning of an SQLSTATE, five characters."""
    return MEANINGS.get(sqlstate) or MEANINGS.get(sqlstate[:2]) or Meaning.UNEXPECTED


def sqlstate_of(error: BaseException) -> str:
    """The SQLSTATE of an error that PostgreSQL itself sent; empty for any other error."""
    driver = driver_error(error)
    return (driver.sqlstate or "") if isinstance(driver, asyncpg.PostgresError) else ""


def _is_about_node(error: BaseException, sqlstate: str) -> bool:
    """Whether the server reports that it lost a Citus node and rolled back. Its own session continues.

    An error that ends the session has the severity FATAL.
    """
    return sqlstate.startswith("08") and getattr(driver_error(error), "severity_en", None) == "ERROR"


def leaves_session_sound(error: BaseException) -> bool:
    """Whether a session of PostgreSQL can be reused after this error.

    True only if the server sent the error and it concerns the statement alone, or if this program
    raised it between statements. After any other error the server may still run the statement, or
    be in a transaction that the driver does not track.
    """
    if isinstance(error, DaybookError | Conflict | ReplicaUnfit):
        return True
    sqlstate = sqlstate_of(error)
    if _is_about_node(error, sqlstate):
        return True
    return bool(sqlstate) and meaning_of(sqlstate) not in {Meaning.DISCONNECTED, Meaning.WRONG_SERVER}


def translate(error: Exception) -> Exception:
    """The error for callers in place of one of PostgreSQL or its driver; other errors unchanged."""
    driver = driver_error(error)
    sqlstate = sqlstate_of(error)
    if not sqlstate:
        if isinstance(driver, asyncpg.InterfaceError | asyncpg.InternalClientError):
            return unavailable(str(driver))
        return translate_common(error)
    if _is_about_node(error, sqlstate):
        log.warning("database node unavailable", sqlstate=sqlstate)
        return ServiceUnavailable(is_partial=True)
    # The message names tables and constraints; values are in the detail, which is left out.
    message = str(next(iter(driver.args), ""))
    match meaning_of(sqlstate):
        case Meaning.CONFLICT:
            return Conflict()
        case Meaning.BUSY | Meaning.DISCONNECTED | Meaning.WRONG_SERVER:
            return unavailable(message, sqlstate)
        case Meaning.NOT_STORABLE:
            # The message of this error quotes the value, so it is not logged.
            log.warning("value not storable", sqlstate=sqlstate)
            return NotStorable()
        case Meaning.UNEXPECTED:
            return UnexpectedDatabaseError(f"SQLSTATE {sqlstate}: {message}")
