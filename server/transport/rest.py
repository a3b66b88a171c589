"""Helpers of facades: JSON values that protobuf lacks, and parameters."""

from __future__ import annotations

import re

from google.protobuf.struct_pb2 import NULL_VALUE, Value

ECHOED_CHARACTERS_MAX = 64

# 30 digits are more than any valid parameter has; the bounds of the parameter refuse such a number.
_INTEGER = re.compile(r"-?[0-9]{1,30}", re.ASCII)
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", re.ASCII)


def null() -> Value:
    """A JSON null. An unset field would be left out."""
    return Value(null_value=NULL_VALUE)


def text_or_null(text: str) -> Value:
    """A JSON string, or null for an empty text."""
    return Value(string_value=text) if text else null()


def number_or_null(number: float | None) -> Value:
    """A JSON number, or null for None."""
    return null() if number is None else Value(number_value=number)


def echo(text: str) -> str:
    """A text of a caller, shortened for an error message."""
    return text if len(text) <= ECHOED_CHARACTERS_MAX else f"{text[:ECHOED_CHARACTERS_MAX]}..."


def read_integer(text: str) -> int | None:
    """The integer of a query parameter; None if the text is not an integer."""
    return int(text) if _INTEGER.fullmatch(text) else None


def is_uuid(text: str) -> bool:
    """Whether a text is a UUID with hyphens, in either case."""
    return _UUID.fullmatch(text) is not None
