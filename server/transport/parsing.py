"""Parses requests: refuses what is no message, a text that is too long, and fields that the contract lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeAlias

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import DecodeError, Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.unknown_fields import UnknownFieldSet

from server.ledger.errors import FieldInvalid, FilterInvalid, InvalidArgument, PageTokenInvalid
from server.transport.filters import FILTER_CHARACTERS_MAX
from server.transport.page_tokens import TOKEN_CHARACTERS_MAX
from server.transport.rest import echo
from server.transport.validation import TEXT_CHARACTERS_MAX

Naming: TypeAlias = Literal["name", "json_name"]
"""Which of its names a field has in error messages."""
Parse: TypeAlias = Callable[[bytes], Message | InvalidArgument]
"""Returns the error instead of raising it: gRPC would answer an exception with an error of its own."""

# The fields with their own bounds and errors; the bound of every other text is TEXT_CHARACTERS_MAX.
# A field of a resource may have a lower bound, which its validation checks: in a bulk request that
# concerns one item alone.
FILTER = "daybook.v1.ListTransactionsRequest.filter"
PAGE_TOKENS = frozenset(
    (
        "daybook.v1.ListTransactionsRequest.page_token",
        "daybook.v1.ListAccountsRequest.page_token",
        "daybook.v1.ListLotsRequest.page_token",
        "daybook.v1.ListApiKeysRequest.page_token",
        "daybook.facades.teable.v1.GetSpaceCreditHistoryRequest.cursor",
        "daybook.facades.spacebring.v1.GetCreditsTransactionsRequest.next_page_token",
    )
)


def parser(
    deserialize: Callable[[bytes], Any] | None, naming: Naming, characters_max: int = TEXT_CHARACTERS_MAX
) -> Parse:
    """How a method parses its requests. A text with more than `characters_max` characters is refused.

    A field that the message lacks is refused, because it would be ignored otherwise: the caller
    may have a newer contract.
    """
    assert deserialize is not None, "generated code always names one"
    message_type: Any = deserialize.__self__  # type: ignore[attr-defined]  # a class method of the message
    texts = _Texts(message_type.DESCRIPTOR, naming, characters_max)

    def parse(request: bytes) -> Message | InvalidArgument:
        try:
            message: Message = message_type.FromString(request)
        except DecodeError:
            return FieldInvalid("request", "is no message of its type, or holds text that is not UTF-8")
        # No text is longer than the whole request.
        if len(request) > texts.shortest and (refusal := texts.refusal(message)) is not None:
            return refusal
        known = message_type()
        known.CopyFrom(message)
        known.DiscardUnknownFields()
        if known.ByteSize() == message.ByteSize():
            return message
        return FieldInvalid(
            _owner_of_unknown(message, naming) or "request", "has a field that this version of the contract lacks"
        )

    return parse


class _Texts:
    """The bounds of all texts of a request, in characters."""

    def __init__(self, request: Descriptor, naming: Naming, characters_max: int) -> None:
        self._naming = naming
        self._bounds = dict.fromkeys(_text_fields(request, set()), characters_max)
        for name in self._bounds.keys() & PAGE_TOKENS:
            # The server made the token, so a lower `characters_max` doesn't concern it.
            self._bounds[name] = TOKEN_CHARACTERS_MAX
        if FILTER in self._bounds:
            self._bounds[FILTER] = min(characters_max, FILTER_CHARACTERS_MAX)
        self.shortest = min(self._bounds.values(), default=characters_max)
        """A message with at most so many bytes has no text that is too long."""

    def refusal(self, message: Message) -> InvalidArgument | None:
        """The error of the first text that is too long; None if there is none."""
        found = self._find(message)
        if found is None:
            return None
        path, name = found
        if name in PAGE_TOKENS:
            return PageTokenInvalid(path)
        problem = f"must have at most {self._bounds[name]} characters"
        return FilterInvalid(path, problem) if name == FILTER else FieldInvalid(path, problem)

    def _find(self, message: Message) -> tuple[str, str] | None:
        """The path and the full name of the first field whose text is too long."""
        for field, value in message.ListFields():
            for place, name, each in _values(field, value, self._naming):
                if isinstance(each, str):
                    if len(each) > self._bounds[name]:
                        return place, name
                # A Struct has a bound for all of it, see check_metadata.
                elif isinstance(each, Message) and not isinstance(each, Struct) and each.ByteSize() > self.shortest:
                    inner = self._find(each)
                    if inner is not None:
                        # In JSON a mask is a single text.
                        return place if isinstance(each, FieldMask) else f"{place}.{inner[0]}", inner[1]
        return None


def _text_fields(message: Descriptor, seen: set[str]) -> Iterator[str]:
    """The full name of each field with a text, at any depth, except those inside a Struct."""
    seen |= {message.full_name, Struct.DESCRIPTOR.full_name}
    for field in message.fields:
        if field.type == FieldDescriptor.TYPE_STRING:
            yield field.full_name
        elif field.message_type is not None and field.message_type.full_name not in seen:
            yield from _text_fields(field.message_type, seen)


def _values(field: FieldDescriptor, value: Any, naming: Naming) -> Iterable[tuple[str, str, Any]]:
    """Each value of a field that is set, with its path and the full name of the field that bounds it."""
    name: str = getattr(field, naming)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        for key, each in value.items():
            yield name, f"{field.message_type.full_name}.key", key
            yield f"{name}.{echo(str(key))}", f"{field.message_type.full_name}.value", each
    elif field.is_repeated:
        for index, each in enumerate(value):
            yield f"{name}[{index}]", field.full_name, each
    else:
        yield name, field.full_name, value


def _owner_of_unknown(message: Message, naming: Naming) -> str | None:
    """The path of the message with an unknown field: empty for the outermost; None if there is no such field."""
    if len(UnknownFieldSet(message)):
        return ""
    for field, value in message.ListFields():
        for place, _, each in _values(field, value, naming):
            if isinstance(each, Message) and (path := _owner_of_unknown(each, naming)) is not None:
                return f"{place}.{path}" if path else place
    return None
