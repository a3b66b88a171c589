"""Checks metadata, the JSON that a tenant keeps with a transaction or a company."""

from __future__ import annotations

import math

from google.protobuf.struct_pb2 import Struct, Value

from server.ledger.errors import FieldInvalid
from server.transport.rest import echo

METADATA_BYTES_MAX = 8192
METADATA_NUMBER_MAX = 2**53 - 1
"""The largest whole number that a double tells from its neighbours. A Struct has doubles only."""
METADATA_DEPTH_MAX = 20
"""How many structs and lists may be inside each other. Each is up to three messages, and nobody's
parser goes deeper than a hundred: one row that nobody can read would end every list with it."""
METADATA_PATH_CHARACTERS_MAX = 256
"""Of a path in metadata, as an error names it."""


def check_metadata(place: str, struct: Struct) -> None:
    """Raises FieldInvalid, which names the key at fault, or all of the metadata where it is too large or too deep."""
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
    """The path of a key. One that is too long to be told ends at its beginning."""
    return f"{place}.{echo(key)}" if len(place) <= METADATA_PATH_CHARACTERS_MAX else place


def _check_value(place: str, value: Value) -> None:
    """Refuses what JSON lacks, since one such value would make every list with it impossible to print.

    A larger number than METADATA_NUMBER_MAX may have been rounded on its way here, which can't be told any more.
    """
    match value.WhichOneof("kind"):
        case "number_value":
            number = value.number_value
            if not math.isfinite(number):
                raise FieldInvalid(place, "is a number that JSON lacks")
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
