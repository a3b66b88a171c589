"""Helpers for REST: JSON values that protobuf lacks, parameters, and failed streams."""

from __future__ import annotations

import re

from google.api.annotations_pb2 import http
from google.api.httpbody_pb2 import HttpBody
from google.protobuf.descriptor_pool import Default
from google.protobuf.struct_pb2 import NULL_VALUE, Value

ECHOED_CHARACTERS_MAX = 64

# 30 digits are more than any valid parameter has; the bounds of the parameter refuse such a number.
_INTEGER = re.compile(r"-?[0-9]{1,30}", re.ASCII)
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", re.ASCII)


def cut_of(method: str) -> bytes | None:
    """The message with which the gateway cuts off the file that a method streams over REST; None for other methods.

    `method` is `package.Service/Method`. The gateway would end the response to a failed stream like a complete one.
    The message has a malformed HttpBody, at which the gateway resets the response, so that its client notices.
    """
    descriptor = Default().FindMethodByName(method.replace("/", "."))
    field = descriptor.output_type.fields_by_name.get(descriptor.GetOptions().Extensions[http].response_body)
    if field is None or field.message_type is None or field.message_type.full_name != HttpBody.DESCRIPTOR.full_name:
        return None
    # A field of two bytes, which begin a tag that never ends.
    return bytes((field.number << 3 | 2, 2, 0xFF, 0xFF))


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
