"""Requests that are no messages: what a caller is told instead of the parser's own words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.unknown_fields import UnknownFieldSet

from server.ledger.errors import FieldInvalid

Naming: TypeAlias = Literal["name", "json_name"]
"""By which of its names a field is called."""


def unless_malformed(deserialize: Callable[[bytes], Any] | None, naming: Naming) -> Callable[[bytes], Any]:
    """Lets a FieldInvalid stand for a request that can't be parsed.

    It is returned, for an exception would end in an error of gRPC's own. A field that the message
    lacks is refused too: a caller with a newer contract would otherwise have it ignored.
    """
    assert deserialize is not None, "generated code always names one"

    def parse(request: bytes) -> Any:
        try:
            message: Message = deserialize(request)
            message.DiscardUnknownFields()
            if message.ByteSize() == len(request):
                return message
            # Something was discarded, or is written in another form than ours.
            path = _owner_of_unknown(deserialize(request), naming)
            if path is None:
                return message
            return FieldInvalid(path or "request", "has a field that this version of the contract lacks")
        except DecodeError:
            message_type = deserialize.__self__  # type: ignore[attr-defined]  # a class method of the message
            field = _field_that_is_no_text(message_type, request, naming)
            if field is None:
                return FieldInvalid("request", "is no message of its type, or holds text that is not UTF-8")
            return FieldInvalid(field, "is not UTF-8")

    return parse


def _owner_of_unknown(message: Message, naming: Naming) -> str | None:
    """The path of the message that lacks it: empty for the outermost; None if no message lacks any."""
    if len(UnknownFieldSet(message)):
        return ""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        name: str = getattr(field, naming)
        if field.message_type.GetOptions().map_entry:
            inner = {f"{name}.{key}": each for key, each in value.items() if isinstance(each, Message)}
        elif field.is_repeated:
            inner = {f"{name}[{index}]": each for index, each in enumerate(value)}
        else:
            inner = {name: value}
        for place, each in inner.items():
            path = _owner_of_unknown(each, naming)
            if path is not None:
                return f"{place}.{path}" if path else place
    return None


def unless_too_long(parse: Callable[[bytes], Any], naming: Naming, characters_max: int) -> Callable[[bytes], Any]:
    """Lets a FieldInvalid stand for a request with a longer text than an operator wants to take."""

    def parse_bounded(request: bytes) -> Any:
        message = parse(request)
        # No text is longer than all of the request.
        if len(request) <= characters_max or isinstance(message, FieldInvalid):
            return message
        field = _field_that_is_too_long(message, naming, characters_max)
        return message if field is None else FieldInvalid(field, f"must have at most {characters_max} characters")

    return parse_bounded


def _field_that_is_too_long(message: Message, naming: Naming, characters_max: int) -> str | None:
    """The first text that is longer, or None. A Struct is not looked at: it has a bound for all of it."""
    for field, value in message.ListFields():
        name: str = getattr(field, naming)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            values = {f"{name}.{key}": each for key, each in value.items()}
        elif field.is_repeated:
            values = {f"{name}[{index}]": each for index, each in enumerate(value)}
        else:
            values = {name: value}
        for place, each in values.items():
            if isinstance(each, str) and len(each) > characters_max:
                return place
            if isinstance(each, Message) and not isinstance(each, Struct):
                inner = _field_that_is_too_long(each, naming, characters_max)
                if inner is not None:
                    return f"{place}.{inner}"
    return None


def _field_that_is_no_text(message_type: type[Message], request: bytes, naming: Naming) -> str | None:
    """The first text of a request that is not UTF-8, or None. What is inside other messages is not looked at."""
    try:
        # Its stub lacks that it can be iterated.
        values: Any = UnknownFieldSet(Empty.FromString(request))
    except DecodeError:
        return None
    fields = message_type.DESCRIPTOR.fields_by_number
    for value in values:
        field = fields.get(value.field_number)
        if field is not None and field.type == FieldDescriptor.TYPE_STRING and isinstance(value.data, bytes):
            try:
                value.data.decode()
            except UnicodeDecodeError:
                name: str = getattr(field, naming)
                return name
    return None
