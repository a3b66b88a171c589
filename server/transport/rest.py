"""What facades share: values that JSON has and protobuf lacks."""

from __future__ import annotations

import re

from google.protobuf.struct_pb2 import NULL_VALUE, Value

ECHOED_CHARACTERS_MAX = 64

# More digits than any number that a facade takes; it is only told that it is out of bounds.
_INTEGER = re.compile(r"-?[0-9]{1,30}", re.ASCII)
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", re.ASCII)


def null() -> Value:
    """A JSON null. An unset field would be left out."""
    return Value(null_value=NULL_VALUE)


def text_or_null(text: str) -> Value:
    """A JSON string, or null where there is nothing to say."""
    return Value(string_value=text) if text else null()


def number_or_null(number: float | None) -> Value:
    """A JSON number, or null where there is none."""
    return null() if number is None else Value(number_value=number)


def echo(text: str) -> str:
    """What a caller sent, short enough to be told back to them."""
    return text if len(text) <= ECHOED_CHARACTERS_MAX else f"{text[:ECHOED_CHARACTERS_MAX]}..."


def read_integer(text: str) -> int | None:
    """A whole number out of a query, or None where the text is none."""
    return int(text) if _INTEGER.fullmatch(text) else None


def is_uuid(text: str) -> bool:
    """Whether a text is a uuid in its usual spelling, in either case."""
    return _UUID.fullmatch(text) is not None
