"""JSON Schemas of messages, as the gateway reads and writes them in JSON."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import Enum
from typing import Any, TypeAlias

from google.api.field_behavior_pb2 import IDENTIFIER, INPUT_ONLY, OUTPUT_ONLY, REQUIRED, field_behavior
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.struct_pb2 import Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp

from docs.openapi.comments import comments

Schema: TypeAlias = dict[str, Any]

_WELL_KNOWN: Mapping[str, Schema] = {
    AnyMessage.DESCRIPTOR.full_name: {
        "type": "object",
        "required": ["@type"],
        "properties": {"@type": {"type": "string"}},
    },
    Duration.DESCRIPTOR.full_name: {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]{1,9})?s$"},
    FieldMask.DESCRIPTOR.full_name: {"type": "string"},
    Struct.DESCRIPTOR.full_name: {"type": "object"},
    Timestamp.DESCRIPTOR.full_name: {"type": "string", "format": "date-time"},
    Value.DESCRIPTOR.full_name: {},
}
"""The messages that protobuf's JSON writes in a form of their own."""

_SCALARS: Mapping[int, Schema] = {
    FieldDescriptor.TYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.TYPE_DOUBLE: {"type": "number"},
    FieldDescriptor.TYPE_INT32: {"type": "integer", "format": "int32"},
    # A JSON number could lose digits.
    FieldDescriptor.TYPE_INT64: {"type": "string", "format": "int64", "pattern": "^-?[0-9]+$"},
    FieldDescriptor.TYPE_STRING: {"type": "string"},
}


class Use(Enum):
    """How a message is used, which decides its fields. The value ends the name of its schema."""

    ANSWER = ""
    """Has every field but those for input only. Fields without presence are always there."""
    REQUEST = "Input"
    """Lacks the fields that only Daybook sets."""
    PATCH = "Patch"
    """The resource of an update, which may be sent back as it was read, or with any of its fields."""


class Schemas:
    """The schemas of a document: those of all messages and enums that its operations use."""

    def __init__(
        self, facts: Mapping[str, Schema], optional: Collection[str] = (), always: Collection[str] = ()
    ) -> None:
        """`facts` has what a contract states only in comments, by the full name of a field.

        `optional` are fields that may be absent although they are REQUIRED or have no presence, and `always` are
        messages that an answer always has.
        """
        self.components: dict[str, Schema] = {}
        self._facts = facts
        self._optional = frozenset(optional)
        self._always = frozenset(always)

    def message(self, message: Descriptor, use: Use, without: Collection[str] = ()) -> Schema:
        """Returns a reference to the schema of a message, `without` the fields with these names."""
        name = _name(message)
        if use is not Use.ANSWER and not name.endswith("Request"):
            name += use.value
        if name not in self.components:
            self.components[name] = {}  # Ends the recursion of a message that contains itself.
            fields = [each for each in message.fields if each.name not in without and _has(each, use)]
            required = [each.json_name for each in fields if self._is_required(each, use)]
            schema: Schema = {
                "type": "object",
                "description": _describe(message),
                "properties": {each.json_name: self.field(each, use) for each in fields},
            }
            if required:
                schema["required"] = required
            if use is not Use.ANSWER:
                schema["additionalProperties"] = False
            self.components[name] = schema
        return {"$ref": f"#/components/schemas/{name}"}

    def field(self, field: FieldDescriptor, use: Use) -> Schema:
        """Returns the schema of a field, with its description."""
        fact = self._facts.get(f"{field.full_name}:{use.name}") or self._facts.get(field.full_name, {})
        schema = fact if "type" in fact else {**self._any_number(field, use), **fact}
        return {**schema, "description": comments()[field.full_name]}

    def _any_number(self, field: FieldDescriptor, use: Use) -> Schema:
        message = field.message_type
        if message is not None and message.GetOptions().map_entry:
            return {"type": "object", "additionalProperties": self._one(message.fields_by_name["value"], use)}
        return {"type": "array", "items": self._one(field, use)} if field.is_repeated else self._one(field, use)

    def _one(self, field: FieldDescriptor, use: Use) -> Schema:
        if field.enum_type is not None:
            return self.enum(field.enum_type)
        if field.message_type is None:
            return dict(_SCALARS[field.type])
        if field.message_type.full_name in _WELL_KNOWN:
            return dict(_WELL_KNOWN[field.message_type.full_name])
        return self.message(field.message_type, Use.REQUEST if use is Use.PATCH else use)

    def enum(self, enum: EnumDescriptor) -> Schema:
        """Returns a reference to the schema of an enum. Its value 0 means that the field is unset."""
        values = [value for value in enum.values if value.number]
        prefix = enum.full_name.removesuffix(enum.name)
        meanings = "\n".join(f"- `{value.name}`: {_item(comments()[prefix + value.name])}" for value in values)
        self.components[_name(enum)] = {
            "type": "string",
            "enum": [value.name for value in values],
            "description": f"{comments()[enum.full_name]}\n\n{meanings}",
        }
        return {"$ref": f"#/components/schemas/{_name(enum)}"}

    def _is_required(self, field: FieldDescriptor, use: Use) -> bool:
        if use is Use.PATCH or field.full_name in self._optional:
            return False
        if use is Use.REQUEST:
            return REQUIRED in _behaviors(field)
        is_value = field.message_type is not None and field.message_type.full_name == Value.DESCRIPTOR.full_name
        return not field.has_presence or is_value or field.full_name in self._always


def _has(field: FieldDescriptor, use: Use) -> bool:
    behaviors = _behaviors(field)
    if use is Use.ANSWER:
        return INPUT_ONLY not in behaviors
    return use is Use.PATCH or not behaviors & {OUTPUT_ONLY, IDENTIFIER}


def _behaviors(field: FieldDescriptor) -> set[int]:
    return set(field.GetOptions().Extensions[field_behavior])


def _name(element: Descriptor | EnumDescriptor) -> str:
    """The name of a schema: `BookingResource` for `daybook.v1.Booking.Resource`."""
    return element.full_name.removeprefix(f"{element.file.package}.").replace(".", "")


def _describe(message: Descriptor) -> str:
    """The comment of a message, with the choices that its oneofs allow."""
    parts = [comments().get(message.full_name, "")]
    for oneof in message.oneofs:
        if len(oneof.fields) > 1:
            choices = ", ".join(f"`{field.json_name}`" for field in oneof.fields)
            parts.append(f"At most one of {choices}: {comments()[f'{message.full_name}.{oneof.name}']}")
    return "\n\n".join(parts)


def _item(comment: str) -> str:
    return " ".join(comment.split())
