"""Prints resources as tables for people, and as JSON or CSV for programs.

The JSON is that of the REST API. The CSV has a column for each field, in the order of the contract; for transactions it
has the columns of an export.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import islice
from typing import Annotated, Any, NamedTuple, Protocol

import typer
from daybook.v1.account_pb2 import Account
from daybook.v1.ledger_service_pb2 import ExportTransactionsRequest
from daybook.v1.transaction_pb2 import Lot, Transaction
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.table import Table
from rich.text import Text

from daybook_client import Pages
from server.cli.values import printable
from server.rpc.export_files import FORMS, defuse, write_csv, write_time
from server.rpc.protobuf_json import write_map, write_message

PAGE_SIZE = 1000
TABLE_ROWS = 100
"""The number of rows of a table without --limit."""


class Output(StrEnum):
    """The form of the output of a command."""

    TABLE = "table"
    JSON = "json"
    NDJSON = "ndjson"
    CSV = "csv"


OutputForm = Annotated[Output, typer.Option("--output", help="Form of the output: table, json, ndjson or csv.")]
Limit = Annotated[
    int | None,
    typer.Option(help="Largest number of rows; by default, 100 of a table and all of other forms.", min=1),
]


class Result(Protocol):
    """A value of the client, with the message it was made from."""

    @property
    def message(self) -> Message:
        """The message."""


class Columns(NamedTuple):
    """The columns of a table."""

    texts: Mapping[str, Callable[[Any], str]]
    """The cell of each column, from a message."""
    numbers: Sequence[str]
    """The columns to align to the right."""


TABLES: Mapping[type[Message], Columns] = {
    Account: Columns(
        {
            "account": lambda each: _last(each.name),
            "kind": lambda each: _cell(each, "kind"),
            "display name": lambda each: each.display_name,
            "credit limit": lambda each: each.credit_limit,
            "created (UTC)": lambda each: _seconds(each.create_time),
        },
        ["credit limit"],
    ),
    Transaction: Columns(
        {
            "time (UTC)": lambda each: _seconds(each.create_time),
            "transaction": lambda each: "/".join(each.name.split("/")[1::2]),
            "kind": lambda each: _cell(each, "kind"),
            "state": lambda each: _cell(each, "state"),
            "category": lambda each: each.category,
            "amount": lambda each: each.amount,
            "balance": lambda each: each.balance_after,
            "description": lambda each: each.description,
        },
        ["amount", "balance"],
    ),
    Lot: Columns(
        {
            "lot": lambda each: _last(each.name),
            "amount": lambda each: each.amount,
            "remaining": lambda each: each.remaining_amount,
            "expires (UTC)": lambda each: _seconds(each.expire_time) if each.HasField("expire_time") else "never",
            "priority": lambda each: str(each.priority),
        },
        ["amount", "remaining", "priority"],
    ),
}
_CSV = FORMS[ExportTransactionsRequest.CSV]
_DECIMALS = {"amount", "remaining_amount", "expiring_amount", "permanent_amount", "available_amount", "credit_limit"}
"""Columns with a number, which may begin with a minus sign and is no formula."""


def print_one(output: Output, result: Result) -> None:
    """Prints one resource: as a table of its fields, a JSON object, or CSV with one row."""
    message = result.message
    match output:
        case Output.TABLE:
            fields = Table.grid(padding=(0, 2))
            for field in message.DESCRIPTOR.fields:
                if text := _cell(message, field.name):
                    fields.add_row(Text(field.name, style="bold"), Text(printable(text)))
            console().print(fields)
        case Output.CSV:
            _write_lines(_csv_lines(type(message), [message]), "\r\n")
        case _:
            typer.echo(write_message(message))


def print_list(output: Output, kind: type[Message], results: Iterable[Result], limit: int | None = None) -> None:
    """Prints rows as they come: as a JSON array, JSON lines or CSV; as a table, when there are all."""
    messages: Iterator[Message] = (each.message for each in results)
    if output is Output.TABLE:
        limit = limit or TABLE_ROWS
        rows = list(islice(messages, limit + 1))
        _print_table(TABLES[kind], rows[:limit])
        if len(rows) > limit:
            typer.echo("more rows follow: --limit shows more, and the other forms of --output show all", err=True)
        return
    messages = islice(messages, limit)
    match output:
        case Output.JSON:
            separator = "[\n"
            for message in messages:
                sys.stdout.write(separator + write_message(message))
                separator = ",\n"
            sys.stdout.write("[]\n" if separator == "[\n" else "\n]\n")
        case Output.NDJSON:
            _write_lines(map(write_message, messages), "\n")
        case _:
            _write_lines(_csv_lines(kind, messages), "\r\n")


def read_list(pages: Callable[[int], Pages[Any]], output: Output, limit: int | None) -> Iterable[Result]:
    """The rows of a list; `pages` makes the list from a page size that suits the limit."""
    if limit is None and output is Output.TABLE:
        limit = TABLE_ROWS
    return pages(PAGE_SIZE if limit is None else min(limit + 1, PAGE_SIZE))


def console(*, stderr: bool = False) -> Console:
    """Standard output, or standard error, with colors and a width only if it is a terminal. Honors NO_COLOR."""
    found = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    # Without a terminal nothing is folded or cut off.
    return found if found.is_terminal else Console(stderr=stderr, highlight=False, markup=False, width=100_000)


def _print_table(columns: Columns, messages: Sequence[Message]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns.texts:
        table.add_column(name, justify="right" if name in columns.numbers else "left", overflow="fold")
    for message in messages:
        cells = ((name, printable(text(message))) for name, text in columns.texts.items())
        table.add_row(
            *(Text(cell, "red" if name in columns.numbers and cell.startswith("-") else "") for name, cell in cells)
        )
    console().print(table)


def _csv_lines(kind: type[Message], messages: Iterable[Message]) -> Iterable[str]:
    if kind is Transaction:
        # Without the byte order mark, which is for spreadsheets.
        yield _CSV.header.removeprefix("\ufeff")
        for message in messages:
            assert isinstance(message, Transaction)
            yield _CSV.write(message)
        return
    names = [field.name for field in kind.DESCRIPTOR.fields]
    yield write_csv(names)
    for message in messages:
        cells = ((name, _cell(message, name)) for name in names)
        yield write_csv([text if name in _DECIMALS else defuse(text) for name, text in cells])


def _write_lines(lines: Iterable[str], line_break: str) -> None:
    for line in lines:
        sys.stdout.write(line + line_break)


def _cell(message: Message, name: str) -> str:
    """A field as text: a time in RFC 3339, a nested message or a map as JSON, empty if it is unset."""
    field: Any = message.DESCRIPTOR.fields_by_name[name]
    value: Any = getattr(message, name)
    if field.has_presence and not message.HasField(name):
        return ""
    if isinstance(value, Timestamp):
        return write_time(value)
    if field.is_repeated:
        if not value:
            return ""
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        return write_map(value) if is_map else "[" + ",".join(map(write_message, value)) + "]"
    if isinstance(value, Message):
        return write_message(value)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return str(value) if known is None else known.name
    return str(value)


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _seconds(moment: Timestamp) -> str:
    return write_time(moment)[:19].replace("T", " ")
