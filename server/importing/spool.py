"""Sorts any number of rows by time with bounded memory, through temporary files."""

from __future__ import annotations

import heapq
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

from daybook.v1.admin_service_pb2 import ImportTransactionsRequest

from daybook_client import PastTransaction
from daybook_client.conversion import fill
from server.importing.found import Row

RUN_ROWS = 50_000
"""The number of rows that are sorted in memory and then written to a file of their own."""

_Numbered: TypeAlias = tuple[datetime, int, bytes]
"""The time of a row, the order of its arrival, and the pickled row, which is smaller."""


class Spool:
    """Rows, sorted by time. A context manager, which removes its files.

    Rows of one time keep their order, or the reverse of it if the source lists newest rows first. A row whose
    request_id an earlier row of the same time has is left out: the source was read while it changed. A row without a
    request_id gets one, made from its content and the number of equal rows before it.
    """

    def __init__(self, vendor: str, *, newest_first: bool) -> None:
        self._vendor, self._newest_first = vendor, newest_first
        self._rows: list[_Numbered] = []
        self._runs: list[Path] = []
        self._count = 0
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="daybook-import-")))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self, row: Row) -> None:
        """Adds a row."""
        self._rows.append((row.past.create_time, self._count, pickle.dumps(row, pickle.HIGHEST_PROTOCOL)))
        self._count += 1
        if len(self._rows) == RUN_ROWS:
            self._write()

    def __iter__(self) -> Iterator[Row]:
        return self.rows(lambda _row: None)

    def rows(self, conflict: Callable[[Row], None]) -> Iterator[Row]:
        """All rows; may be called again, and not after another `add`.

        Calls `conflict` with each row that is left out and differs from the one that has its request_id.
        """
        if self._runs and self._rows:
            self._write()
        if self._runs:
            with ExitStack() as stack:
                runs = [_read(stack, run) for run in self._runs]
                yield from self._ordered(heapq.merge(*runs, key=_position), conflict)
        else:
            self._rows.sort(key=_position)
            yield from self._ordered(iter(self._rows), conflict)

    def _write(self) -> None:
        self._rows.sort(key=_position)
        run = self._folder / str(len(self._runs))
        try:
            with run.open("wb") as file:
                for numbered in self._rows:
                    pickle.dump(numbered, file, pickle.HIGHEST_PROTOCOL)
        except OSError as error:
            # A failed write does not name its file.
            error.filename = str(run)
            raise
        self._runs.append(run)
        self._rows = []

    def _ordered(self, numbered: Iterator[_Numbered], conflict: Callable[[Row], None]) -> Iterator[Row]:
        for _, group in groupby(numbered, key=lambda each: each[0]):
            distinct: dict[tuple[str, str], Row] = {}
            equal: dict[str, int] = {}
            for _, _, pickled in group:
                row: Row = pickle.loads(pickled)  # noqa: S301  # this process pickled it
                request_id = row.past.request_id
                if not request_id:
                    content = _digest(row.past)
                    equal[content] = equal.get(content, 0) + 1
                    request_id = f"{self._vendor}:{content}-{equal[content]}"
                key = (row.past.account, request_id)
                if key not in distinct:
                    distinct[key] = _with_request_id(row, request_id)
                elif _digest(row.past) != _digest(distinct[key].past):
                    conflict(row)
            rows = list(distinct.values())
            yield from reversed(rows) if self._newest_first else rows


def _digest(past: PastTransaction) -> str:
    """Identifies the content of a row. Fields that it lacks, such as those of later versions, do not count."""
    item = ImportTransactionsRequest.Item()
    fill(item, {"parent": past.account, "transaction": past.transaction, "create_time": past.create_time})
    return sha256(item.SerializeToString(deterministic=True)).hexdigest()[:40]


def _with_request_id(row: Row, request_id: str) -> Row:
    if row.past.request_id == request_id:
        return row
    return replace(row, past=replace(row.past, request_id=request_id))


def _position(numbered: _Numbered) -> tuple[datetime, int]:
    return numbered[:2]


def _read(stack: ExitStack, run: Path) -> Iterator[_Numbered]:
    file = stack.enter_context(run.open("rb"))
    while True:
        try:
            yield pickle.load(file)  # noqa: S301  # this process wrote the file
        except EOFError:
            return
