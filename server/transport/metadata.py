"""Validates metadata, the JSON that a tenant stores with a transaction or a company."""

from __future__ import annotations

import math

from google.protobuf.struct_pb2 import Struct, Value

from server.ledger.errors import FieldInvalid
from server.transport.rest import echo

METADATA_BYTES_MAX = 8192
METADATA_NUMBER_MAX = 2**53 - 1
"""The largest integer that a double, the only number of a Struct, represents exactly."""
METADATA_DEPTH_MAX = 20
"""Maximum nesting of structs and lists. Each level is up to three nested messages, and protobuf parsers refuse more
than 100, so every list with a deeper row would be unreadable."""
METADATA_PATH_CHARACTERS_MAX = 256
"""Maximum length of a path in an error."""


def check_metadata(place: str, struct: Struct) -> None:
    """Checks metadata. Raises FieldInvalid for an invalid key, or for the whole if it is too large or too deep."""
    if struct.ByteSize() > METADATA_BYTES_MAX:
        raise FieldInvalid(place, f"must take at most {METADATA_BYTES_MAX} bytes")
    if any(_depth_of(value) >= METADATA_DEPTH_MAX for value in struct.fields.values()):
        raise FieldInvalid(place, f"must be at most {METADATA_DEPTH_MAX} levels deep")
    for key, value in struct.fields.items():
        _check_value(_inner(place, key), value)


def _depth_of(value: Value) -> int:
    inside = value.struct_value.fields.values() if value.HasField("struct_value") else value.list_value.values
    return int(value.WhichOneof("kind") in ("struct_value", "list_value")) + max(map(_depth_of, inside), default=0)


def _inner(place: str, key: str) -> str:
    """The path of a key, cut off if it is too long."""
    return f"{place}.{echo(key)}" if len(place) <= METADATA_PATH_CHARACTERS_MAX else place


def _check_value(place: str, value: Value) -> None:
    """Refuses values without a JSON form, with which every list would fail to render.

    A number above METADATA_NUMBER_MAX may already have been rounded by the client.
    """
    match value.WhichOneof("kind"):
        case "number_value":
            number = value.number_value
            if not math.isfinite(number):
                raise FieldInvalid(place, "must be a finite number")
            if abs(number) > METADATA_NUMBER_MAX:
                raise FieldInvalid(
                    place, f"is a number beyond {METADATA_NUMBER_MAX}, which can't be kept exactly: send it as text"
                )
        case "struct_value":
            for key, inner in value.struct_value.fields.items():
                _check_value(_inner(place, key), inner)
        case "list_value":
            for index, inner in enumerate(value.list_value.values):
                _check_value(f"{place}[{index}]", inner)
        case None:
            raise FieldInvalid(place, "must have a value")
