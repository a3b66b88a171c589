"""Draws messages and JSON bodies of the contracts: plausible enough to reach the ledger, and often wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, TypeAlias

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

Pools: TypeAlias = Mapping[str, Sequence[str]]

ODD_TEXTS = (
    "",
    "-",
    "*",
    "\0",
    "a\0b",
    "a/b",
    "..",
    "../a",
    "%2F",
    "é",
    "\u202e\ufeff",
    "\U0010ffff",
    "x" * 129,
    "x" * 3000,
    "0",
    "-0",
    "1e9",
    "NaN",
    "9" * 40,
    "0.0000001",
    "true",
    "null",
    "2024-02-30T00:00:00Z",
    "9999-12-31T23:59:59.999999999Z",
    "0001-01-01T00:00:00Z",
    "2024-13",
    "(" * 500,
    "NOT kind = CHARGE",
    'category = "' + "\\" * 99,
    "amount desc, amount",
    "accounts//transactions/",
    "accounts/a/transactions/00000000-0000-0000-0000-000000000000",
    "' OR 1=1 --",
)
AMOUNTS = ("1", "-1", "0.5", "-0.000001", "3", "-2", "999999999999.999999", "-999999999999.999999", "1000000000000")
FILTERS = (
    "kind = CHARGE",
    'kind = GRANT AND category = "test"',
    'category = "a" OR category = "b"',
    'create_time >= "2024-10-01T00:00:00Z"',
    'labels.location = "x"',
    "state = SUCCEEDED AND (kind = CHARGE OR kind = REFUND)",
)
INTEGERS = (0, 1, 2, 3, 50, 1000, 1001, -1, 2**31 - 1, -(2**31))
LONG_INTEGERS = (*INTEGERS, 2**53, 2**63 - 1, -(2**63), 253_402_300_799, -62_135_596_800, 1_728_000_000)
MONTHS = ("2024-10", "2026-11", "0001-01", "9999-12")
_OTHER_NAMES = {
    "parent": "account",
    "destination": "account",
    "account": "account",
    "order_by": "order",
    "cost_usd": "amount",
    "credit_limit": "amount",
    "org": "account_id",
    "space_id": "account_id",
    "cursor": "page_token",
    "next_page_token": "page_token",
    "idempotency_key": "request_id",
}
_DEPTH_MAX = 6


@dataclass(frozen=True, slots=True)
class Drawer:
    """Draws values for one input."""

    random: Random
    pools: Pools
    """Good texts by the name of the field."""

    def text(self, name: str) -> str:
        """A text for a field: usually a good one."""
        random = self.random
        pool = self.pools.get(_OTHER_NAMES.get(name, name))
        if pool and random.random() < 0.85:
            return random.choice(pool)
        if random.random() < 0.5:
            return random.choice(random.choice(list(self.pools.values())))
        if random.random() < 0.8:
            return random.choice(ODD_TEXTS)
        return "".join(chr(random.choice((random.randrange(1, 127), random.randrange(0xD800)))) for _ in range(9))

    def message(self, descriptor: Descriptor, depth: int = 0) -> Message:
        """A message of a type."""
        message: Any = GetMessageClass(descriptor)()
        for field in descriptor.fields:
            if not self._is_present(depth):
                continue
            if field.message_type is not None and field.message_type.GetOptions().map_entry:
                self._fill_map(getattr(message, field.name), field, depth)
            elif field.is_repeated:
                count = self.random.choice((0, 1, 1, 2, 3))
                getattr(message, field.name).extend(self._value(field, depth) for _ in range(count))
            elif field.message_type is not None:
                getattr(message, field.name).CopyFrom(self._value(field, depth))
            else:
                setattr(message, field.name, self._value(field, depth))
        found: Message = message
        return found

    def json(self, descriptor: Descriptor, depth: int = 0) -> dict[str, Any]:
        """A JSON object for a message of a type; some members have another type or an unknown name."""
        drawn: dict[str, Any] = {}
        for field in descriptor.fields:
            if self._is_present(depth):
                name = field.json_name if self.random.random() < 0.9 else field.name
                drawn[name] = self._json_member(field, depth)
        if self.random.random() < 0.05:
            drawn[self.text("")] = self.any_json()
        return drawn

    def any_json(self, depth: int = 0) -> Any:
        """Any value of JSON."""
        match self.random.randrange(8 if depth < _DEPTH_MAX else 6):
            case 0:
                return None
            case 1:
                return self.random.random() < 0.5
            case 2:
                return self.random.choice(LONG_INTEGERS)
            case 3:
                return self.random.choice((0.1, -1e-9, 1e308, float("nan"), float("inf")))
            case 4 | 5:
                return self.text("")
            case 6:
                return [self.any_json(depth + 1) for _ in range(self.random.randrange(4))]
            case _:
                return {self.text(""): self.any_json(depth + 1) for _ in range(self.random.randrange(4))}

    def _is_present(self, depth: int) -> bool:
        return self.random.random() < (0.7, 0.5, 0.25, 0.1)[min(depth, 3)]

    def _value(self, field: FieldDescriptor, depth: int) -> Any:
        match field.cpp_type:
            case FieldDescriptor.CPPTYPE_MESSAGE:
                descriptor = field.message_type
                assert descriptor is not None
                return GetMessageClass(descriptor)() if depth > _DEPTH_MAX else self.message(descriptor, depth + 1)
            case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
                return self.random.randbytes(self.random.randrange(9))
            case FieldDescriptor.CPPTYPE_STRING:
                return self.text(field.name)
            case FieldDescriptor.CPPTYPE_BOOL:
                return self.random.random() < 0.5
            case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
                return self.random.choice((0.0, -0.0, 0.5, 1e308, float("nan"), float("inf")))
            case FieldDescriptor.CPPTYPE_ENUM:
                return self._enum(field)
            case FieldDescriptor.CPPTYPE_INT32:
                return self.random.choice(INTEGERS)
            case FieldDescriptor.CPPTYPE_UINT32:
                return abs(self.random.choice(INTEGERS))
            case FieldDescriptor.CPPTYPE_UINT64:
                return abs(self.random.choice(LONG_INTEGERS))
            case _:
                return self.random.choice(LONG_INTEGERS)

    def _enum(self, field: FieldDescriptor) -> int:
        assert field.enum_type is not None
        numbers = [value.number for value in field.enum_type.values]
        return self.random.choice(numbers if self.random.random() < 0.9 else INTEGERS)

    def _fill_map(self, entries: Any, field: FieldDescriptor, depth: int) -> None:
        assert field.message_type is not None
        value = field.message_type.fields_by_name["value"]
        for _ in range(self.random.randrange(3)):
            key = self.text("label")
            if value.message_type is None:
                entries[key] = self._value(value, depth + 1)
            elif depth <= _DEPTH_MAX:
                entries[key].CopyFrom(self.message(value.message_type, depth + 1))

    def _json_member(self, field: FieldDescriptor, depth: int) -> Any:
        if self.random.random() < 0.05 or depth > _DEPTH_MAX:
            return self.any_json()
        descriptor = field.message_type
        if descriptor is not None and descriptor.GetOptions().map_entry:
            return {self.text("label"): self.any_json() for _ in range(self.random.randrange(3))}
        count = self.random.choice((0, 1, 1, 2, 3))
        return (
            [self._json_value(field, depth) for _ in range(count)]
            if field.is_repeated
            else self._json_value(field, depth)
        )

    def _json_value(self, field: FieldDescriptor, depth: int) -> Any:
        match field.cpp_type:
            case FieldDescriptor.CPPTYPE_MESSAGE:
                descriptor = field.message_type
                assert descriptor is not None
                match descriptor.full_name:
                    case "google.protobuf.Timestamp":
                        return self.text("time")
                    case "google.protobuf.Duration":
                        return self.random.choice(("60s", "0.5s", "-1s", "1e3s", "315576000001s", "s", ""))
                    case "google.protobuf.Struct" | "google.protobuf.Value":
                        return self.any_json()
                    case "google.protobuf.FieldMask":
                        return self.random.choice(("displayName", "display_name,user", "*", "user.name", ",", "x.y"))
                return self.json(descriptor, depth + 1)
            case FieldDescriptor.CPPTYPE_ENUM:
                assert field.enum_type is not None
                number = self._enum(field)
                known = field.enum_type.values_by_number.get(number)
                return number if known is None or self.random.random() < 0.1 else known.name
            case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
                return self.text("page_token")
            case FieldDescriptor.CPPTYPE_INT64 | FieldDescriptor.CPPTYPE_UINT64:
                number = self.random.choice(LONG_INTEGERS)
                return number if self.random.random() < 0.5 else str(number)
        return self._value(field, depth)
