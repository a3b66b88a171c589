"""Converts messages to frozen dataclasses, and plain values to messages.

A field of a dataclass has the name of the message's field. Its type determines the conversion: Decimal, UUID, datetime,
StrEnum, a nested dataclass, a tuple, a mapping. A field `message` holds the message itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from functools import cache, partial
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints
from uuid import UUID

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

T = TypeVar("T")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MESSAGE = "message"


def to_value(kind: type[T], message: Message) -> T:
    """Returns the dataclass of a message."""
    classes: Any = (kind, type(message))
    readers = _readers(*classes)
    return kind(**{name: read(message) for name, read in readers})


@cache
def _readers(kind: Any, message: Any) -> Sequence[tuple[str, Callable[[Any], Any]]]:
    hints = get_type_hints(kind)
    return [(name, _reader(name, hints[name], message)) for name in _names(kind)]


def _names(kind: Any) -> Iterator[str]:
    return (each.name for each in fields(kind))


def _reader(name: str, hint: Any, message: Any) -> Callable[[Any], Any]:
    if name == _MESSAGE:
        return lambda message: message
    field = message.DESCRIPTOR.fields_by_name[name]
    if get_origin(hint) is not UnionType:
        convert = _converter(hint, field)
        return lambda message: convert(getattr(message, name))
    convert_present = _converter(get_args(hint)[0], field)
    if field.has_presence:
        return lambda message: convert_present(getattr(message, name)) if message.HasField(name) else None
    return lambda message: convert_present(value) if (value := getattr(message, name)) else None


def _converter(hint: Any, field: FieldDescriptor) -> Callable[[Any], Any]:
    if get_origin(hint) is tuple:
        convert = _converter(get_args(hint)[0], field)
        return lambda values: tuple(map(convert, values))
    if get_origin(hint) is Mapping:
        return MessageToDict if field.message_type is Struct.DESCRIPTOR else dict
    if isinstance(hint, type) and is_dataclass(hint):
        return partial(to_value, hint)
    if hint is Decimal:
        return lambda text: Decimal(text or 0)
    if hint is datetime:
        return to_datetime
    if issubclass(hint, StrEnum):
        assert field.enum_type is not None, "the field has an enumeration"
        members = {number: hint(name) for name, number in _numbers(field.enum_type).items() if name in hint.__members__}
        return lambda number: members.get(number, hint("UNKNOWN"))
    assert hint in (UUID, str, int, bool), hint
    return hint  # type: ignore[no-any-return]  # the class converts


def _numbers(enum: EnumDescriptor) -> Mapping[str, int]:
    """The numbers of an enumeration by the names of its values, without a prefix that repeats the enumeration's."""
    prefix = "TRANSACTION_VIEW_" if enum.name == "TransactionView" else ""
    return {each.name.removeprefix(prefix): each.number for each in enum.values}


def to_datetime(timestamp: Timestamp) -> datetime:
    """Returns an aware datetime in UTC. Fractions of a microsecond are truncated."""
    return _EPOCH + timedelta(seconds=timestamp.seconds, microseconds=timestamp.nanos // 1000)


def fill(message: Message, values: Mapping[str, Any]) -> None:
    """Sets the fields of a message from plain values; None leaves a field unset.

    Raises TypeError for a float where a decimal is due, and ValueError for a naive datetime.
    """
    for name, value in values.items():
        if value is not None:
            _set(message, name, value)


def _set(message: Message, name: str, value: Any) -> None:
    field: Any = message.DESCRIPTOR.fields_by_name[name]
    present: Any = getattr(message, name)
    if isinstance(value, Mapping):
        present.update(value)
    elif field.is_repeated:
        present.extend(value)
    elif is_dataclass(value):
        # Also sets a message without fields.
        present.SetInParent()
        fill(present, {name: getattr(value, name) for name in _names(value)})
    elif isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError(f"{name} must be an aware datetime")
        since = value - _EPOCH
        present.seconds, present.nanos = since.days * 86_400 + since.seconds, since.microseconds * 1000
    elif isinstance(value, timedelta):
        present.FromTimedelta(value)
    elif field.enum_type is not None:
        setattr(message, name, _number(field.enum_type, value))
    elif field.type == FieldDescriptor.TYPE_STRING:
        setattr(message, name, _text(name, value))
    else:
        setattr(message, name, value)


def _number(enum: EnumDescriptor, name: str) -> int:
    numbers = _numbers(enum)
    if name not in numbers:
        known = [each for each in numbers if not each.endswith("_UNSPECIFIED")]
        raise ValueError(f"{name} is not one of {', '.join(known)}")
    return numbers[name]


def _text(name: str, value: object) -> str:
    if isinstance(value, float):
        raise TypeError(f"{name} must be a Decimal, an int or a str: a float is not exact")
    return f"{value:f}" if isinstance(value, Decimal) else str(value)
