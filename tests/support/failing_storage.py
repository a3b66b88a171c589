"""The storage of a SQLite file, which a test lets fail, and the files that a power cut could leave.

A VFS of apsw lies between SQLite and the real files. Within the block, every connection of this process to the file
goes through it, because two SQLite libraries in one process would release each other's locks.
"""

from __future__ import annotations

import sqlite3
import threading
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum, auto
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import apsw
import pytest

from tests.support import apsw_driver

SECTOR_BYTES = 512
"""The unit that a disk writes completely or not at all."""


class Kind(Enum):
    """The kind of an operation on a file."""

    READ = auto()
    WRITE = auto()
    TRUNCATE = auto()
    DELETE = auto()
    SYNC = auto()
    FAILED_SYNC = auto()
    """Changes since the last sync may be lost for good: a later sync succeeds without them, as on Linux."""


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation of SQLite on a file."""

    kind: Kind
    name: str
    """The file, without its folder."""
    offset: int = 0
    """Where a write begins; the new size of a truncated file."""
    content: bytes = b""
    """What was written."""


class Damage(Enum):
    """How an operation fails: SQLite's result code, and the kinds of operations that can fail so."""

    ERROR = apsw.SQLITE_IOERR, frozenset({Kind.WRITE, Kind.TRUNCATE, Kind.DELETE})
    UNREADABLE = apsw.SQLITE_IOERR_READ, frozenset({Kind.READ})
    NOT_SYNCED = apsw.SQLITE_IOERR_FSYNC, frozenset({Kind.SYNC})
    FULL = apsw.SQLITE_FULL, frozenset({Kind.WRITE})
    READ_ONLY = apsw.SQLITE_READONLY, frozenset({Kind.WRITE, Kind.TRUNCATE, Kind.DELETE})
    TORN = apsw.SQLITE_IOERR_WRITE, frozenset({Kind.WRITE})
    """The first half of the write's sectors is written."""


DAMAGES_OF_WRITERS = [each for each in Damage if each is not Damage.UNREADABLE]

_ERROR_CODES = {
    Kind.WRITE: apsw.SQLITE_IOERR_WRITE,
    Kind.TRUNCATE: apsw.SQLITE_IOERR_TRUNCATE,
    Kind.DELETE: apsw.SQLITE_IOERR_DELETE,
}


class Fault:
    """Fails one operation of those that can fail so, or all of them."""

    def __init__(self, damage: Damage, at: int | None) -> None:
        self._damage, self._at = damage, at
        self._count = 0
        self.struck: Operation | None = None
        """The last operation that failed."""

    def strike(self, operation: Operation, perform: Callable[[Operation], None]) -> None:
        """Raises the error of apsw if the operation fails. `perform` performs what it did before."""
        code, kinds = self._damage.value
        if operation.kind not in kinds:
            return
        self._count += 1
        if self._at is not None and self._count != self._at + 1:
            return
        self.struck = operation
        if self._damage is Damage.ERROR:
            code = _ERROR_CODES[operation.kind]
        if self._damage is Damage.NOT_SYNCED:
            perform(replace(operation, kind=Kind.FAILED_SYNC))
        if self._damage is Damage.TORN:
            sectors = _sectors(operation)
            perform(replace(operation, content=b"".join(each.content for each in sectors[: len(sectors) // 2])))
        raise apsw.exception_for(code)


class FailingStorage(apsw.VFS):
    """The storage of one SQLite file, with its log and its journal."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.operations: list[Operation] = []
        """The operations in order, without reads; of a failed one, what it did before."""
        self._initial = {file.name: file.read_bytes()} if file.exists() else {}
        self._vfs = f"failing-{uuid.uuid4().hex}"
        self._fault: Fault | None = None
        self._sync_begins, self._sync_may_end = threading.Event(), threading.Event()
        self._sync_may_end.set()
        super().__init__(self._vfs, "unix")

    @contextmanager
    def connected(self) -> Iterator[FailingStorage]:
        """Opens every connection to the file through this storage until the end of the block."""
        connect_really = sqlite3.connect

        def connect(database: Any, timeout: float = 5.0, **options: Any) -> Any:
            if Path(database) == self.file:
                return apsw_driver.connect(str(database), self._vfs, timeout)
            return connect_really(database, timeout=timeout, **options)

        with pytest.MonkeyPatch.context() as patch:
            # SQLAlchemy calls the second one.
            patch.setattr(sqlite3, "connect", connect)
            patch.setattr(sqlite3.dbapi2, "connect", connect)
            yield self
        self.unregister()

    @contextmanager
    def failing(self, damage: Damage, at: int | None = None) -> Iterator[Fault]:
        """Fails the operation of this number, counted from 0 and among those that can fail so; all of them for None."""
        self._fault = fault = Fault(damage, at)
        try:
            yield fault
        finally:
            self._fault = None

    @contextmanager
    def held_syncs(self) -> Iterator[threading.Event]:
        """Holds every sync until the end of the block. The event is set once one has begun."""
        self._sync_begins.clear()
        self._sync_may_end.clear()
        try:
            yield self._sync_begins
        finally:
            self._sync_may_end.set()

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:
        """Opens a file. A temporary file has no name, and never fails."""
        return apsw.VFSFile("unix", name, flags) if name is None else _File(self, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        """Deletes a file."""
        delete = super().xDelete
        self.perform(Operation(Kind.DELETE, Path(filename).name), lambda _: delete(filename, syncdir))
        if syncdir:
            self.operations.append(Operation(Kind.SYNC, Path(filename).name))

    def fail_if_due(self, operation: Operation, perform: Callable[[Operation], None] = lambda _: None) -> None:
        """Raises the error of the fault. `perform` performs what the operation did before."""
        if self._fault is not None:
            self._fault.strike(operation, perform)

    def perform(self, operation: Operation, do: Callable[[Operation], None]) -> None:
        """Performs and records an operation, unless it fails."""

        def perform(operation: Operation) -> None:
            do(operation)
            self.operations.append(operation)

        self.fail_if_due(operation, perform)
        if operation.kind is Kind.SYNC:
            self._sync_begins.set()
            self._sync_may_end.wait()
        perform(operation)

    def after_power_cut(self, count: int, random: Random) -> Mapping[str, bytes]:
        """The files that a power cut after the first operations could leave, by name.

        What a file got before its last sync is there. Of what came later each sector was written or not.
        """
        files = {name: bytearray(content) for name, content in self._initial.items()}
        pending: defaultdict[str, list[Operation]] = defaultdict(list)
        share_written = random.random()

        def write(operations: list[Operation]) -> None:
            for operation in operations:
                for sector in _sectors(operation):
                    if random.random() < share_written:
                        _apply(sector, files)

        for operation in self.operations[:count]:
            match operation.kind:
                case Kind.SYNC:
                    for each in pending.pop(operation.name, ()):
                        _apply(each, files)
                case Kind.FAILED_SYNC:
                    write(pending.pop(operation.name, []))
                case _:
                    pending[operation.name].append(operation)
        for operations in pending.values():
            write(operations)
        return {name: bytes(content) for name, content in files.items()}


class _File(apsw.VFSFile):
    """A real file, whose changes go through the storage."""

    def __init__(self, storage: FailingStorage, name: str | apsw.URIFilename, flags: list[int]) -> None:
        self._name = Path(name.filename() if isinstance(name, apsw.URIFilename) else name).name
        self._storage = storage
        super().__init__("unix", name, flags)

    def xRead(self, amount: int, offset: int) -> bytes:
        """Reads a part of the file."""
        self._storage.fail_if_due(Operation(Kind.READ, self._name, offset))
        return super().xRead(amount, offset)

    def xWrite(self, data: Any, offset: int) -> None:
        """Writes a part of the file."""
        write = super().xWrite
        operation = Operation(Kind.WRITE, self._name, offset, bytes(data))
        self._storage.perform(operation, lambda operation: write(operation.content, operation.offset))

    def xTruncate(self, newsize: int) -> None:
        """Cuts the file."""
        truncate = super().xTruncate
        operation = Operation(Kind.TRUNCATE, self._name, newsize)
        self._storage.perform(operation, lambda operation: truncate(operation.offset))

    def xSync(self, flags: int) -> None:
        """Makes what was written durable."""
        sync = super().xSync

        def do(operation: Operation) -> None:
            if operation.kind is Kind.SYNC:
                sync(flags)

        self._storage.perform(Operation(Kind.SYNC, self._name), do)


def _sectors(operation: Operation) -> list[Operation]:
    """A write as one operation for each sector; any other operation alone."""
    if operation.kind is not Kind.WRITE:
        return [operation]
    end = operation.offset + len(operation.content)
    bounds = [operation.offset, *range((operation.offset // SECTOR_BYTES + 1) * SECTOR_BYTES, end, SECTOR_BYTES), end]
    return [
        Operation(Kind.WRITE, operation.name, first, operation.content[first - bounds[0] : last - bounds[0]])
        for first, last in pairwise(bounds)
    ]


def _apply(operation: Operation, files: dict[str, bytearray]) -> None:
    """Changes the content of a file as the operation does."""
    match operation.kind:
        case Kind.WRITE:
            content = files.setdefault(operation.name, bytearray())
            content.extend(bytes(max(0, operation.offset - len(content))))
            content[operation.offset : operation.offset + len(operation.content)] = operation.content
        case Kind.TRUNCATE:
            del files.setdefault(operation.name, bytearray())[operation.offset :]
        case Kind.DELETE:
            files.pop(operation.name, None)
