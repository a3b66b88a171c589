"""Parses requests: refuses what is no message, a text that is too long, and fields that the contract lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any, Literal, NamedTuple, TypeAlias

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import DecodeError, Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.unknown_fields import UnknownFieldSet

from server.ledger.errors import FieldInvalid, FilterInvalid, InvalidArgument, PageTokenInvalid
from server.transport.filters import FILTER_CHARACTERS_MAX
from server.transport.page_tokens import TOKEN_CHARACTERS_MAX
from server.transport.rest import echo
from server.transport.validation import BATCH_SIZE_MAX, LABELS_MAX, TEXT_CHARACTERS_MAX

Naming: TypeAlias = Literal["name", "json_name"]
"""Which of its names a field has in error messages."""
Parse: TypeAlias = Callable[[bytes], Message | InvalidArgument]
"""Returns the error instead of raising it: gRPC would answer an exception with an error of its own."""

VALUES_MAX = 10_000
"""Maximum number of values among which an unknown field is searched for its path."""

# The fields with their own bounds and errors; the bound of every other text is TEXT_CHARACTERS_MAX.
# A field of a resource may have a lower bound, which its validation checks: in a SubmitTransactionsRequest that
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
        size = message.ByteSize()
        message.DiscardUnknownFields()
        if message.ByteSize() == size:
            return message
        owner = _owner_of_unknown(message_type.FromString(request))
        return FieldInvalid(
            owner.write(naming) if owner else "request", "has a field that this version of the contract lacks"
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
        for path, field, value in _values(message, self._may_refuse):
            if isinstance(value, str) and len(value) > self._bounds[field.full_name]:
                place, name = path.write(self._naming), field.full_name
                if name in PAGE_TOKENS:
                    return PageTokenInvalid(place)
                problem = f"must have at most {self._bounds[name]} characters"
                return FilterInvalid(place, problem) if name == FILTER else FieldInvalid(place, problem)
        return None

    def _may_refuse(self, inner: Message) -> bool:
        # A Struct has a bound for all of it, see check_metadata.
        return not isinstance(inner, Struct) and inner.ByteSize() > self.shortest


def _text_fields(message: Descriptor, seen: set[str]) -> Iterator[str]:
    """The full name of each field with a text, at any depth, except those inside a Struct."""
    seen |= {message.full_name, Struct.DESCRIPTOR.full_name}
    for field in message.fields:
        if field.type == FieldDescriptor.TYPE_STRING:
            yield field.full_name
        elif field.message_type is not None and field.message_type.full_name not in seen:
            yield from _text_fields(field.message_type, seen)


class _Path(NamedTuple):
    """The path of a value. It is written only for an error: a request may have very many values."""

    outer: _Path | None
    field: FieldDescriptor
    key: str | int | None
    """The index in a list, or the key in a map."""

    def write(self, naming: Naming) -> str:
        """The path as errors name it."""
        outer = self.outer.write(naming) if self.outer else ""
        if self.field.containing_type is FieldMask.DESCRIPTOR:
            # In JSON a mask is a single text.
            return outer
        key = f"[{self.key}]" if isinstance(self.key, int) else f".{echo(self.key)}" if self.key is not None else ""
        return f"{outer}{'.' * bool(outer)}{getattr(self.field, naming)}{key}"


def _values(
    message: Message, descends: Callable[[Message], bool], outer: _Path | None = None
) -> Iterator[tuple[_Path, FieldDescriptor, Any]]:
    """Each value of a message, at any depth, with its path and the field that bounds it.

    Reads the first values of a list or a map only, as many as a valid request may have: validation
    refuses a longer one.
    """
    entries_max = BATCH_SIZE_MAX if outer is None else LABELS_MAX
    for field, value in message.ListFields():
        found: Iterable[tuple[str | int | None, FieldDescriptor, Any]]
        if not field.is_repeated:
            found = ((None, field, value),)
        elif not isinstance(value, Mapping):
            found = ((index, field, each) for index, each in enumerate(islice(value, entries_max)))
        else:
            assert field.message_type is not None, "that of the entries"
            of_key, of_value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
            entries = islice(value.items(), entries_max)
            found = chain.from_iterable(((None, of_key, key), (key, of_value, each)) for key, each in entries)
        for key, bounding, each in found:
            path = _Path(outer, field, key)
            yield path, bounding, each
            if isinstance(each, Message) and descends(each):
                yield from _values(each, descends, path)


def _owner_of_unknown(message: Message) -> _Path | None:
    """The path of the first inner message with an unknown field; None if the message itself has one."""
    if len(UnknownFieldSet(message)):
        return None
    inner = ((path, value) for path, _, value in _values(message, lambda _: True) if isinstance(value, Message))
    return next((path for path, value in islice(inner, VALUES_MAX) if len(UnknownFieldSet(value))), None)
