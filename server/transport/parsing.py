"""Parses requests. Refuses malformed messages, texts that are too long, and fields that the contract lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any, Literal, NamedTuple, TypeAlias

import grpc
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
"""Which name of a field error messages use."""
Parse: TypeAlias = Callable[[bytes], Message | InvalidArgument]
"""Returns the error instead of raising it: the caller's rights are checked first, and if it is a deserializer of gRPC,
gRPC would answer an exception with an error of its own."""

VALUES_MAX = 10_000
"""Maximum number of values to search for the path of an unknown field."""

# The fields with their own bounds and errors; the bound of every other text is TEXT_CHARACTERS_MAX.
# Validation checks the lower bounds of a resource's fields, so that SubmitTransactions can refuse a single item.
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
    """The parser of a method's requests, which refuses texts with more than `characters_max` characters.

    Refuses a field that the message lacks, for instance of a newer contract, because it would be
    ignored.
    """
    assert deserialize is not None, "generated code always has a deserializer"
    message_type: Any = deserialize.__self__  # type: ignore[attr-defined]  # a class method of the message
    texts = _Texts(message_type.DESCRIPTOR, naming, characters_max)

    def parse(request: bytes) -> Message | InvalidArgument:
        try:
            message: Message = message_type.FromString(request)
        except DecodeError:
            return FieldInvalid("request", "is not a valid message of its type, or holds text that is not UTF-8")
        # No text is longer than the whole request.
        if len(request) > texts.shortest and (refusal := texts.refusal(message)) is not None:
            return refusal
        size = message.ByteSize()
        message.DiscardUnknownFields()
        if message.ByteSize() == size:
            return message
        owner = _owner_of_unknown(message_type.FromString(request))
        return FieldInvalid(
            owner.write(naming) if owner else "request", "has a field that this server's version of the contract lacks"
        )

    return parse


async def read_request(context: grpc.aio.ServicerContext[Any, Any], parse: Parse) -> Message | InvalidArgument:
    """The only message of a request. Returns an InvalidArgument if there is none, or the parser returned one."""
    request = await context.read()
    return FieldInvalid("request", "is missing") if request is grpc.aio.EOF else parse(request)


def parsed(request: Any) -> Any:
    """The request. Raises the InvalidArgument that a parser returned in its place."""
    if isinstance(request, InvalidArgument):
        raise request
    return request


class _Texts:
    """The bounds of all texts of a request, in characters."""

    def __init__(self, request: Descriptor, naming: Naming, characters_max: int) -> None:
        self._naming = naming
        self._bounds = dict.fromkeys(_text_fields(request, set()), characters_max)
        for name in self._bounds.keys() & PAGE_TOKENS:
            # The server made the token, so a lower `characters_max` doesn't apply.
            self._bounds[name] = TOKEN_CHARACTERS_MAX
        if FILTER in self._bounds:
            self._bounds[FILTER] = min(characters_max, FILTER_CHARACTERS_MAX)
        self.shortest = min(self._bounds.values(), default=characters_max)
        """The lowest bound. A message with at most this many bytes has no text that is too long."""

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
        # check_metadata bounds a Struct as a whole.
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
    """The path of a value, written only for an error, because a request may have many values."""

    outer: _Path | None
    field: FieldDescriptor
    key: str | int | None
    """The index in a list, or the key in a map."""

    def write(self, naming: Naming) -> str:
        """The path for an error message."""
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

    Reads only as many values of a list or map as a valid request may have; validation refuses a
    longer one.
    """
    entries_max = BATCH_SIZE_MAX if outer is None else LABELS_MAX
    for field, value in message.ListFields():
        found: Iterable[tuple[str | int | None, FieldDescriptor, Any]]
        if not field.is_repeated:
            found = ((None, field, value),)
        elif not isinstance(value, Mapping):
            found = ((index, field, each) for index, each in enumerate(islice(value, entries_max)))
        else:
            assert field.message_type is not None, "the entries of a map are messages"
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
