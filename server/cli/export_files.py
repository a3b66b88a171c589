"""The files of `daybook export`: their form on disk, and where an incomplete one is continued.

An incomplete file has the ending `.part`, and is renamed when it is complete. It has the form of the server's files: a
line break precedes each line but the first, and the last one is written at the end of the export.
"""

from __future__ import annotations

import csv
import fcntl
import importlib.util
import io
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO

from daybook.v1.ledger_service_pb2 import ExportTransactionsRequest

from daybook_client import Transaction
from server.cli.connection import Failure
from server.rpc.export_files import FORMS, FileForm

BUFFER_BYTES = 1 << 18
AMOUNT_DIGITS, AMOUNT_FRACTION_DIGITS = 18, 6
FREE_TEXTS = ("description", "receipt_uri", "request_id")
"""The columns whose texts are preceded by an apostrophe if a spreadsheet would take them for formulas."""
TIMES = ("create_time", "expire_time")
AMOUNTS = ("amount", "expiring_amount", "permanent_amount", "balance_after")


class Format(StrEnum):
    """The format of a file."""

    CSV = "csv"
    NDJSON = "ndjson"
    PARQUET = "parquet"

    @property
    def form(self) -> FileForm:
        """The form of the rows; those of a Parquet file are kept as CSV until they are complete."""
        formats = ExportTransactionsRequest
        return FORMS[formats.NDJSON if self is Format.NDJSON else formats.CSV]


@dataclass
class Rows:
    """Writes rows to a file, from its beginning or after the rows that it has."""

    form: FileForm
    file: BinaryIO
    count: int = 0
    """The number of rows in the file."""
    last: str = ""
    """The name of the last transaction in the file."""
    separator: str = ""
    """The text before the next row."""

    def begin(self) -> None:
        """Writes the header to an empty file."""
        self.file.write(self.form.header.encode())
        self.separator = self.form.line_break if self.form.header else ""

    def write(self, transactions: Iterable[Transaction]) -> Iterator[int]:
        """Writes transactions, and yields the number of rows after each."""
        for transaction in transactions:
            self.file.write((self.separator + self.form.write(transaction.message)).encode())
            self.separator = self.form.line_break
            self.count += 1
            yield self.count

    def end(self) -> None:
        """Writes the last line break, which marks the file as complete."""
        self.file.write(self.separator.encode())


@contextmanager
def partial_rows(path: Path, form: FileForm, *, resume: bool) -> Iterator[Rows]:
    """Opens an incomplete file at its end. Deletes it after a failure if it has no rows.

    Raises Failure if it exists and `resume` is False, if another process writes to it, or if it is no export.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | (0 if resume else os.O_EXCL), 0o666)
    except FileExistsError:
        raise Failure(f"{path} exists: continue it with --resume, or remove it") from None
    with os.fdopen(descriptor, "r+b", buffering=BUFFER_BYTES) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failure(f"another export is writing to {path}") from None
        rows = Rows(form, file)
        end = _find_end(rows, path)
        file.seek(end)
        file.truncate()
        try:
            if end == 0:
                rows.begin()
            yield rows
            rows.end()
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            if not rows.count:
                path.unlink()
            raise


def _find_end(rows: Rows, path: Path) -> int:
    """Finds the end of the last row that has its line break, and sets `count` and `last`. Raises Failure."""
    header, line_break = rows.form.header.encode(), rows.form.line_break.encode()
    end, record, last = 0, b"", b""
    for line in rows.file:
        record += line
        # A line break within quotes belongs to a cell of CSV. JSON has none.
        if not line.endswith(line_break) or (header and record.count(b'"') % 2):
            continue
        if header and end == 0:
            if record != header + line_break:
                raise Failure(f"{path} has other columns than this version exports: remove it")
        else:
            rows.count, last = rows.count + 1, record
        end, record = end + len(record), b""
    if rows.count:
        try:
            rows.last = _name_in(last.decode(), is_csv=bool(header))
        except (ValueError, LookupError, TypeError):
            raise Failure(f"{path} is no export: its last row has no name") from None
    return end


def _name_in(row: str, *, is_csv: bool) -> str:
    name: str = next(csv.reader(io.StringIO(row, newline="")))[0] if is_csv else json.loads(row)["name"]
    if not name.startswith("accounts/"):
        raise ValueError(name)
    return name


def require_parquet() -> None:
    """Raises Failure if the library for Parquet is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise Failure("Parquet requires pyarrow, which is not installed: pip install 'daybook[parquet]'")


def convert_to_parquet(rows: Path, path: Path) -> None:
    """Converts a complete CSV file to Parquet, in constant memory."""
    # Optional, and loaded only for Parquet.
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.compute  # noqa: PLC0415
    import pyarrow.csv  # noqa: PLC0415
    import pyarrow.parquet  # noqa: PLC0415

    names = Format.PARQUET.form.header.removeprefix("\ufeff").split(",")
    types: dict[str, Any] = dict.fromkeys(names, pa.string())
    types |= dict.fromkeys(AMOUNTS, pa.decimal128(AMOUNT_DIGITS, AMOUNT_FRACTION_DIGITS))
    types |= dict.fromkeys(TIMES, pa.timestamp("us", "UTC"))
    types |= {"sequence": pa.int64(), "priority": pa.int32()}
    batches = pa.csv.open_csv(
        rows,
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(column_types=types),
    )
    with path.open("wb") as file:
        with pa.parquet.ParquetWriter(file, pa.schema(list(types.items()))) as writer:
            for batch in batches:
                plain = batch
                for name in FREE_TEXTS:
                    texts = pa.compute.replace_substring_regex(batch.column(name), "^'", "", max_replacements=1)
                    plain = plain.set_column(names.index(name), name, texts)
                writer.write_batch(plain)
        file.flush()
        os.fsync(file.fileno())
