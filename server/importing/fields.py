"""Reads fields of a vendor's JSON. Each function raises RowInvalid, with the name of the field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

from server.importing.found import RowInvalid, SourceInvalid
from server.ledger import instants
from server.ledger.names import is_account_id

ZERO_SHOWN = Decimal("0.000001")
"""The smallest amount of the ledger."""
ROUNDING_ERROR = Decimal("1e-9")
"""The largest error of a number that a program has computed in floating point, such as 0.30000000000000004."""
DIGITS_MAX = 15
"""The largest number of digits before the point."""


def rows_of(place: str, value: Any) -> Sequence[Any]:
    """The rows of a page. Raises SourceInvalid if the value is not a list."""
    if not isinstance(value, list):
        raise SourceInvalid(f"{place}: is not a page of this API")
    return value


def member(value: Any, name: str) -> Any:
    """A member of an object; None if it is absent or the value is no object."""
    return value.get(name) if isinstance(value, dict) else None


def text(row: Any, name: str) -> str:
    """A text; empty if it is absent or null."""
    value = member(row, name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowInvalid(f"{name} must be a text")
    return value


def next_token(content: Any, name: str, token: str) -> str:
    """The token of the next page; empty on the last. Raises SourceInvalid if it is the token of this page."""
    value = text(content, name)
    if value and value == token:
        raise SourceInvalid(f"{name} is the same on two pages, so the list has no end")
    return value


def required(row: Any, name: str) -> str:
    """A text that is not empty."""
    value = text(row, name)
    if not value:
        raise RowInvalid(f"{name} is missing")
    return value


def number(row: Any, name: str) -> Decimal | None:
    """A number with at most 6 fraction digits, apart from a rounding error; None if it is absent or null."""
    value = member(row, name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise RowInvalid(f"{name} must be a number")
    exact = Decimal(value)
    if exact.adjusted() >= DIGITS_MAX:
        raise RowInvalid(f"{name} has more than {DIGITS_MAX} digits before the point")
    rounded = round(exact, 6)
    if abs(exact - rounded) > ROUNDING_ERROR:
        raise RowInvalid(f"{name} has more than 6 digits after the point: {value}")
    return rounded


def required_number(row: Any, name: str) -> Decimal:
    """A number with at most 6 fraction digits."""
    value = number(row, name)
    if value is None:
        raise RowInvalid(f"{name} is missing")
    return value


def integer(row: Any, name: str) -> int | None:
    """A whole number; None if it is absent or null."""
    value = number(row, name)
    if value is None:
        return None
    if value != int(value):
        raise RowInvalid(f"{name} must be a whole number")
    return int(value)


def time(row: Any, name: str) -> datetime | None:
    """An RFC 3339 time; None if it is absent or null."""
    written = text(row, name)
    if not written:
        return None
    try:
        return instants.to_datetime(instants.parse(written))
    except ValueError:
        raise RowInvalid(f"{name} must be a time like 2025-01-31T12:00:00Z") from None


def required_time(row: Any, name: str) -> datetime:
    """An RFC 3339 time."""
    value = time(row, name)
    if value is None:
        raise RowInvalid(f"{name} is missing")
    return value


def one_of(row: Any, name: str, known: Mapping[str, Any]) -> Any:
    """The entry of a table for a text."""
    value = required(row, name)
    if value not in known:
        raise RowInvalid(f"{name} {value!r} is unknown")
    return known[value]


def account_id(value: str) -> str:
    """An id that an account may have."""
    if not is_account_id(value):
        raise RowInvalid(f"{value!r} can't be the id of an account")
    return value
