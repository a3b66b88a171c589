"""apsw behind the interface of the standard library's sqlite3.

The server keeps its driver. A test replaces `sqlite3.connect` for one file, so that SQLite reaches the file through a
VFS of the test. Errors are those of sqlite3, with the same class, result code and message.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

import apsw

_CHECKPOINT_PRAGMA = "PRAGMA wal_autocheckpoint = "
# As in CPython's set_error_from_code(); all other codes are OperationalError.
_ERRORS: dict[int, type[sqlite3.Error]] = {
    apsw.SQLITE_INTERNAL: sqlite3.InternalError,
    apsw.SQLITE_NOTFOUND: sqlite3.InternalError,
    apsw.SQLITE_CORRUPT: sqlite3.DatabaseError,
    apsw.SQLITE_NOTADB: sqlite3.DatabaseError,
    apsw.SQLITE_TOOBIG: sqlite3.DataError,
    apsw.SQLITE_CONSTRAINT: sqlite3.IntegrityError,
    apsw.SQLITE_MISMATCH: sqlite3.IntegrityError,
    apsw.SQLITE_MISUSE: sqlite3.InterfaceError,
    apsw.SQLITE_RANGE: sqlite3.InterfaceError,
}
# SQLite's messages for the errors of a VFS, which apsw leaves out.
_MESSAGES = {
    apsw.SQLITE_IOERR: "disk I/O error",
    apsw.SQLITE_FULL: "database or disk is full",
    apsw.SQLITE_READONLY: "attempt to write a readonly database",
}


@contextmanager
def _errors_of_sqlite3() -> Iterator[None]:
    try:
        yield
    except apsw.Error as error:
        # apsw's types lack these attributes.
        code: int = getattr(error, "result", apsw.SQLITE_MISUSE)
        raised = _ERRORS.get(code, sqlite3.OperationalError)(str(error) or _MESSAGES.get(code, ""))
        raised.sqlite_errorcode = getattr(error, "extendedresult", code)
        raise raised from error


class Cursor:
    """The part of sqlite3.Cursor that the server and its libraries use."""

    def __init__(self, connection: Connection) -> None:
        self.arraysize = 1
        self.rowcount = -1
        self.description: tuple[tuple[str, None, None, None, None, None, None], ...] | None = None
        self._connection = connection
        self._cursor = connection.inner.cursor()
        self._is_readonly = True
        # A statement without rows is complete after its execution, and then has no description any more.
        self._cursor.exec_trace = self._describe

    def _describe(self, cursor: apsw.Cursor, _statement: str, _bindings: object) -> bool:
        names = [each[0] for each in cursor.get_description()]
        self.description = tuple((name, None, None, None, None, None, None) for name in names) or None
        self._is_readonly = cursor.is_readonly
        return True

    @property
    def lastrowid(self) -> int:
        """The number of the newest row of this connection."""
        return self._connection.inner.last_insert_rowid()

    def execute(self, statement: str, parameters: Sequence[Any] = ()) -> Cursor:
        """Executes a statement up to its first row."""
        if statement.startswith(_CHECKPOINT_PRAGMA):
            self._connection.checkpoint_pages = int(statement.removeprefix(_CHECKPOINT_PRAGMA))
            return self
        with _errors_of_sqlite3():
            self._cursor.execute(statement, parameters)
        self.rowcount = -1 if self._is_readonly else self._connection.inner.changes()
        return self

    def executemany(self, statement: str, parameters: Iterable[Sequence[Any]]) -> Cursor:
        """Executes a statement for each of the parameters."""
        self.rowcount = sum(self.execute(statement, each).rowcount for each in parameters)
        return self

    def fetchall(self) -> list[Any]:
        """The rows left."""
        with _errors_of_sqlite3():
            return self._cursor.fetchall()

    def fetchone(self) -> Any:
        """The next row; None if there is none."""
        with _errors_of_sqlite3():
            return self._cursor.fetchone()

    def fetchmany(self, size: int | None = None) -> list[Any]:
        """At most so many rows."""
        with _errors_of_sqlite3():
            return list(islice(self._cursor, size or self.arraysize))

    def close(self) -> None:
        """Ends the statement."""
        self._cursor.close(True)


class Connection:
    """The part of sqlite3.Connection that the server and its libraries use, in autocommit mode."""

    def __init__(self, connection: apsw.Connection, timeout: float) -> None:
        self.isolation_level: str | None = ""
        self.inner = connection
        """The connection of apsw."""
        self.checkpoint_pages = 1000
        """Length of the write-ahead log at which it is checkpointed, in pages."""
        connection.set_busy_timeout(round(timeout * 1000))
        connection.set_wal_hook(self._checkpoint)

    def _checkpoint(self, connection: apsw.Connection, database: str, pages: int) -> int:
        """Does what SQLite does after each commit, which is to pass over the errors of a checkpoint.

        In SQLite's own hook apsw would raise the VFS's error, although the commit succeeded.
        """
        if pages >= self.checkpoint_pages:
            with suppress(apsw.Error):
                connection.wal_checkpoint(database)
        return apsw.SQLITE_OK

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        return self.inner.in_transaction

    def cursor(self) -> Cursor:
        """A new cursor."""
        with _errors_of_sqlite3():
            return Cursor(self)

    def execute(self, statement: str, parameters: Sequence[Any] = ()) -> Cursor:
        """Executes a statement with a new cursor."""
        return self.cursor().execute(statement, parameters)

    def commit(self) -> None:
        """Commits the transaction, if one is open."""
        if self.in_transaction:
            self.execute("COMMIT")

    def rollback(self) -> None:
        """Rolls back the transaction, if one is open."""
        if self.in_transaction:
            self.execute("ROLLBACK")

    def create_function(self, name: str, count: int, function: Callable[..., Any], **options: bool) -> None:
        """Registers a scalar function."""
        self.inner.create_scalar_function(name, function, count, **options)

    def close(self) -> None:
        """Closes the connection; like SQLite, passes over the errors of the last checkpoint."""
        with suppress(apsw.Error):
            self.inner.close(True)


def connect(file: str, vfs: str, timeout: float) -> Connection:
    """Opens a file through a VFS. `timeout` is that of locks, in seconds."""
    with _errors_of_sqlite3():
        return Connection(apsw.Connection(file, vfs=vfs), timeout)
