"""The files of ExportTransactions. docs/export.md describes them for users.

A line break precedes each line but the first, and follows the last line of a complete file only. So
a file without a line break at its end is incomplete, whatever interrupted it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import NamedTuple

from daybook.v1.ledger_service_pb2 import ExportTransactionsRequest
from daybook.v1.transaction_pb2 import Transaction
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from server.ledger import instants
from server.ledger.paging import TransactionRow
from server.rpc.protobuf_json import write_map, write_message

PART_CHARACTERS = 32_768
"""The size from which a part of a file is sent. Rendering it takes about two milliseconds, which other calls wait."""

CSV_BREAK = "\r\n"
_DEFUSED = tuple("=+-@\t\r\n'")
"""Spreadsheets take a text that begins with one of these characters, except the apostrophe, for a formula."""


class FileForm(NamedTuple):
    """The form of a file."""

    content_type: str
    ending: str
    """The ending of its name."""
    header: str
    """Its first line, empty if it has none."""
    line_break: str
    write: Callable[[Transaction], str]
    """Writes a transaction as a line."""


async def file_parts(
    form: FileForm, parts: AsyncIterator[Sequence[TransactionRow]], *, with_header: bool
) -> AsyncGenerator[str, None]:
    """Yields a file with these rows, in parts of whole lines.

    Yields nothing before the first row, so that an error until then is the answer of the call. Later an empty list of
    rows yields a part, which may be empty, because the server and the gateway end a silent stream.
    """
    lines = [form.header] if with_header and form.header else []
    line_break = form.line_break if lines else ""
    size, has_rows = 0, False
    async for rows in parts:
        for row in rows:
            line = form.write(Transaction.FromString(row.body))
            lines.append(line_break + line)
            line_break, has_rows = form.line_break, True
            size += len(line)
            if size >= PART_CHARACTERS:
                yield "".join(lines)
                lines, size = [], 0
        if has_rows and not rows:
            yield "".join(lines)
            lines, size = [], 0
    yield "".join(lines) + line_break


def write_csv(cells: Sequence[object]) -> str:
    """A line of a CSV file, without its line break."""
    line = io.StringIO()
    # The writer quotes a cell with a character of its line terminator.
    csv.writer(line, lineterminator=CSV_BREAK).writerow(cells)
    return line.getvalue().removesuffix(CSV_BREAK)


def defuse(text: str) -> str:
    """The text with an apostrophe before it if a spreadsheet would take it for a formula."""
    return f"'{text}" if text.startswith(_DEFUSED) else text


def write_time(moment: Timestamp) -> str:
    """A time in RFC 3339, in UTC, with six digits of a fraction."""
    return instants.write(instants.from_timestamp(moment))


def _write_optional(transaction: Transaction, name: str) -> str:
    if not transaction.HasField(name):  # type: ignore[arg-type]  # each is a field of Transaction
        return ""
    field: Message = getattr(transaction, name)
    return write_time(field) if isinstance(field, Timestamp) else write_message(field)


CSV_COLUMNS: Mapping[str, Callable[[Transaction], object]] = {
    "name": lambda each: each.name,
    "account": lambda each: each.name.split("/")[1],
    "uid": lambda each: each.uid,
    "sequence": lambda each: each.sequence,
    "create_time": lambda each: write_time(each.create_time),
    "kind": lambda each: Transaction.Kind.Name(each.kind),
    "category": lambda each: each.category,
    "state": lambda each: Transaction.State.Name(each.state),
    "amount": lambda each: each.amount,
    "expiring_amount": lambda each: each.expiring_amount,
    "permanent_amount": lambda each: each.permanent_amount,
    "balance_after": lambda each: each.balance_after,
    "description": lambda each: defuse(each.description),
    "owner": lambda each: _write_optional(each, "owner"),
    "creator": lambda each: _write_optional(each, "creator"),
    "labels": lambda each: write_map(each.labels) if each.labels else "",
    "receipt_uri": lambda each: defuse(each.receipt_uri),
    "metadata": lambda each: _write_optional(each, "metadata"),
    "request_id": lambda each: defuse(each.request_id),
    "refund_of": lambda each: each.refund_of,
    "transfer_peer": lambda each: each.transfer_peer,
    "expire_time": lambda each: _write_optional(each, "expire_time"),
    "priority": lambda each: each.priority,
    "booking": lambda each: _write_optional(each, "booking"),
    "order": lambda each: _write_optional(each, "order"),
    "event_ticket": lambda each: _write_optional(each, "event_ticket"),
    "usage": lambda each: _write_optional(each, "usage"),
}
"""The columns of a CSV file, which is stable: a new column comes last."""

_CELLS = tuple(CSV_COLUMNS.values())

FORMS: Mapping[ExportTransactionsRequest.Format.ValueType, FileForm] = {
    ExportTransactionsRequest.NDJSON: FileForm("application/x-ndjson", "ndjson", "", "\n", write_message),
    ExportTransactionsRequest.CSV: FileForm(
        "text/csv; charset=utf-8",
        "csv",
        # Without the byte order mark, Excel takes the file for one of an older encoding.
        "\ufeff" + ",".join(CSV_COLUMNS),
        CSV_BREAK,
        lambda transaction: write_csv([cell(transaction) for cell in _CELLS]),
    ),
}
