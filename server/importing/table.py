"""Reads a CSV file by a mapping of its columns to the fields of a transaction."""

from __future__ import annotations

import csv
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from daybook_client import NewTransaction, PastTransaction, TransactionKind, TransactionState, User
from server.importing.found import Found, Problem, Row, RowInvalid
from server.ledger import instants

FIELDS = (
    "account",
    "amount",
    "charged_amount",
    "create_time",
    "kind",
    "category",
    "state",
    "description",
    "owner",
    "creator",
    "receipt_uri",
    "expire_time",
    "priority",
    "request_id",
)
"""The fields of a mapping. `charged_amount` is an amount that is above 0 for a charge; `label.NAME` is a label."""
REQUIRED = ("account", "create_time", "category")
LABEL = "label."
GROUP_SEPARATORS = {".": " \u00a0\u202f", ",": " \u00a0\u202f."}
"""The characters that may separate thousands, by the decimal separator."""
_AMOUNTS = {
    decimal: re.compile(
        rf"[+-]?(\d{{1,3}}([{separators}]\d{{3}})+|\d*)({re.escape(decimal)}\d*)?(e[+-]?\d+)?",
        re.ASCII | re.IGNORECASE,
    )
    for decimal, separators in GROUP_SEPARATORS.items()
}
_PRIORITY = re.compile(r"-?\d{1,9}", re.ASCII)


def _check_field(name: str) -> str:
    if name not in FIELDS and not name.startswith(LABEL):
        raise ValueError(f"there is no field {name!r}; the fields are {', '.join(FIELDS)} and {LABEL}NAME")
    return name


FieldName = Annotated[str, AfterValidator(_check_field)]


class Format(BaseModel, extra="forbid", frozen=True):
    """How a file writes cells, amounts and times."""

    delimiter: Annotated[str, Field(pattern=r'^[^"\r\n]$')] = ","
    decimal: Literal[".", ","] = "."
    time: str = ""
    """The format of times, as of strptime; empty for RFC 3339."""
    time_zone: ZoneInfo = ZoneInfo("UTC")
    """The time zone of times without an offset."""


class ColumnMapping(BaseModel, extra="forbid", frozen=True):
    """How columns become fields."""

    columns: dict[str, FieldName] = {}
    """The field of each column; a column without an entry is ignored."""
    constants: dict[FieldName, str] = {}
    """The value of each field that is the same in all rows."""
    values: dict[FieldName, dict[str, str]] = {}
    """For some fields, the value for each text of the file."""
    format: Format = Format()


def read_mapping(file: Path | None, columns: Sequence[str], constants: Sequence[str]) -> ColumnMapping:
    """Makes a mapping from a TOML file, and from texts like `column=field` and `field=value`, which override it.

    Raises ValueError if it is invalid, and OSError if the file can't be read.
    """
    content: dict[str, Any] = {}
    if file is not None:
        try:
            content = tomllib.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    found = _validated(content, f"{file}: ")
    for text in (*columns, *constants):
        if "=" not in text:
            raise ValueError(f"{text!r} has no `=`")
    # A column may contain `=`, and so may a value. A field does not.
    more = {
        "columns": found.columns | {column: name for column, _, name in (each.rpartition("=") for each in columns)},
        "constants": found.constants | {name: value for name, _, value in (each.partition("=") for each in constants)},
    }
    return _validated(found.model_dump() | more)


def _validated(content: Mapping[str, Any], place: str = "") -> ColumnMapping:
    try:
        return ColumnMapping.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        path = ".".join(str(each) for each in problem["loc"] if each != "[key]")
        raise ValueError(f"{place}{path}: {problem['msg'].removeprefix('Value error, ')}") from None


def rows(file: Path, mapping: ColumnMapping) -> Iterator[Found]:
    """Reads the rows of a file, which has a header. Raises ValueError for a file that is no such CSV file."""
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=mapping.format.delimiter, strict=True)
        try:
            header = next(reader, [])
            table = _Table(header, mapping)
            for cells in reader:
                # The number of the line that ends the row: a quoted cell may contain line breaks.
                yield from table.read(f"line {reader.line_num}", cells)
        except csv.Error as error:
            raise ValueError(f"{file}, line {reader.line_num}: {error}") from None
        except UnicodeDecodeError:
            raise ValueError(f"{file}: is not UTF-8") from None


def columns_of(mapping: ColumnMapping) -> Mapping[str, str]:
    """The column of each field, for problems."""
    columns = {name: column for column, name in mapping.columns.items()} or {name: name for name in FIELDS}
    if "charged_amount" in columns:
        columns.setdefault("amount", columns["charged_amount"])
    return columns


class _Table:
    def __init__(self, header: Sequence[str], mapping: ColumnMapping) -> None:
        self._mapping, self._width = mapping, len(header)
        # Without a mapping, columns have the names of fields.
        columns = mapping.columns or {name: name for name in header if name in FIELDS or name.startswith(LABEL)}
        if repeated := {name for name in header if name in columns and header.count(name) > 1}:
            raise ValueError(f"there are several columns {', '.join(sorted(repeated))}")
        if missing := columns.keys() - set(header):
            raise ValueError(f"there is no column {', '.join(sorted(missing))}; the columns are {', '.join(header)}")
        self._fields = [(index, name, columns[name]) for index, name in enumerate(header) if name in columns]
        known = {*columns.values(), *mapping.constants}
        if unmapped := [name for name in REQUIRED if name not in known]:
            raise ValueError(f"no column or constant is mapped to {', '.join(unmapped)}")
        if not known & {"amount", "charged_amount"}:
            raise ValueError("no column is mapped to amount or charged_amount")

    def read(self, place: str, cells: Sequence[str]) -> Iterator[Found]:
        if not cells:
            return
        if len(cells) != self._width:
            yield Problem(place, f"has {len(cells)} cells; the header has {self._width}")
            return
        texts = dict(self._mapping.constants)
        columns: dict[str, str] = {}
        for index, column, name in self._fields:
            if text := cells[index].strip():
                texts[name], columns[name] = text, column
        for name, table in self._mapping.values.items():
            if name in texts:
                texts[name] = table.get(texts[name], texts[name])
        fields = _Fields(texts, self._mapping)
        try:
            past = fields.past()
        except RowInvalid as error:
            column = columns.get(fields.reading, "")
            yield Problem(f"{place}, column {column}" if column else place, f"{fields.reading} {error}")
            return
        yield Row(past, place=place)


class _Fields:
    """The fields of one row."""

    def __init__(self, texts: Mapping[str, str], mapping: ColumnMapping) -> None:
        self._texts, self._mapping = texts, mapping
        self.reading = ""
        """The field that was read last, to which a RowInvalid belongs."""

    def past(self) -> PastTransaction:
        """The transaction. Raises RowInvalid."""
        account, time, category = self._required("account"), self._time("create_time"), self._required("category")
        assert time is not None, "it is required"
        amount = -self._amount("charged_amount") if "charged_amount" in self._texts else self._amount("amount")
        by_sign = TransactionKind.GRANT if amount > 0 else TransactionKind.CHARGE
        kind = self._one_of("kind", TransactionKind) or by_sign
        state = self._one_of("state", TransactionState) or TransactionState.SUCCEEDED
        priority = self._get("priority") or "0"
        if not _PRIORITY.fullmatch(priority):
            raise RowInvalid("must be a whole number")
        transaction = NewTransaction(
            kind,
            category,
            amount,
            state=state,
            description=self._get("description"),
            owner=User(id=id_) if (id_ := self._get("owner")) else None,
            creator=User(id=id_) if (id_ := self._get("creator")) else None,
            receipt_uri=self._get("receipt_uri"),
            labels={name.removeprefix(LABEL): text for name, text in self._texts.items() if name.startswith(LABEL)},
            expire_time=self._time("expire_time"),
            priority=int(priority),
        )
        return PastTransaction(f"accounts/{account}", transaction, time, self._get("request_id"))

    def _get(self, name: str) -> str:
        self.reading = name
        return self._texts.get(name, "")

    def _required(self, name: str) -> str:
        text = self._get(name)
        if not text:
            raise RowInvalid("is missing")
        return text

    def _amount(self, name: str) -> Decimal:
        text, decimal = self._required(name), self._mapping.format.decimal
        is_exact = False
        if _AMOUNTS[decimal].fullmatch(text):
            digits = text.translate(dict.fromkeys(map(ord, GROUP_SEPARATORS[decimal]))).replace(decimal, ".")
            try:
                amount = Decimal(digits)
                is_exact = amount == round(amount, 6)
            except InvalidOperation:
                pass
        if not is_exact:
            raise RowInvalid(f"must be a number with at most 6 digits after `{decimal}`, not {text!r}")
        return round(amount, 6)

    def _one_of(self, name: str, kind: Any) -> Any:
        text = self._get(name)
        if not text:
            return None
        if text.upper() not in kind.__members__ or text.upper() == "UNKNOWN":
            raise RowInvalid(f"must be one of {', '.join(each for each in kind if each != 'UNKNOWN')}, not {text!r}")
        return kind(text.upper())

    def _time(self, name: str) -> datetime | None:
        text = self._required(name) if name in REQUIRED else self._get(name)
        if not text:
            return None
        form = self._mapping.format
        try:
            if not form.time:
                return instants.to_datetime(instants.parse(text))
            moment = datetime.strptime(text, form.time)  # noqa: DTZ007  # the mapping's zone follows
            found = (moment if moment.tzinfo else moment.replace(tzinfo=form.time_zone)).astimezone(UTC)
            is_skipped = moment.tzinfo is None and found.astimezone(form.time_zone).replace(tzinfo=None) != moment
        except (ValueError, OverflowError):
            expected = form.time or "2025-01-31T12:00:00Z"
            raise RowInvalid(f"must be a time like {expected}, not {text!r}") from None
        if is_skipped:
            raise RowInvalid(f"{text!r} does not exist in {form.time_zone}, where the clocks were put forward")
        return found
