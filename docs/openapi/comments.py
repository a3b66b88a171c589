"""The comments of the contracts, by the full name of the element."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TypeAlias

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    ServiceDescriptorProto,
)

from docs.generate import described

Place: TypeAlias = tuple[int, ...]
"""The path of an element in the descriptor of its file: field numbers and indexes, alternately."""

# Field numbers in descriptor.proto, where the comment of an element is stored by its place.
_PACKAGE: Place = (2,)
_MESSAGES, _ENUMS, _SERVICES, _EXTENSIONS = 4, 5, 6, 7
_FIELDS, _NESTED_MESSAGES, _NESTED_ENUMS, _ONEOFS = 2, 3, 4, 8
_METHODS, _VALUES = 2, 2


@cache
def comments() -> Mapping[str, str]:
    """Returns the comment of each element of the contracts and their imports, as Markdown.

    The name of a package has the comment of the file that has one.
    """
    found: dict[str, str] = {}
    for file in described():
        texts = {tuple(each.path): each.leading_comments for each in file.source_code_info.location}
        for name, place in _elements(file):
            if texts.get(place):
                text = _markdown(texts[place])
                # The comments of Google's types have examples of other services.
                found[name] = text if name.startswith("daybook.") else f"{summary(text)}."
    return found


def summary(comment: str) -> str:
    """Returns the first sentence of a comment, without its full stop."""
    return re.split(r"\.(?:\s|$)", " ".join(comment.split()), maxsplit=1)[0]


def _markdown(comment: str) -> str:
    """Joins the lines of each paragraph and of each item of a list."""
    paragraphs = comment.strip().split("\n\n")
    return "\n\n".join(
        re.sub(r"\n(?!- )", " ", "\n".join(line.strip() for line in each.splitlines())) for each in paragraphs
    )


def _elements(file: FileDescriptorProto) -> Iterator[tuple[str, Place]]:
    """Yields the full name and the place of each element of a file."""
    yield file.package, _PACKAGE
    for index, message in enumerate(file.message_type):
        yield from _elements_of_message(file.package, message, (_MESSAGES, index))
    for index, enum in enumerate(file.enum_type):
        yield from _elements_of_enum(file.package, enum, (_ENUMS, index))
    for index, service in enumerate(file.service):
        yield from _elements_of_service(file.package, service, (_SERVICES, index))
    for index, extension in enumerate(file.extension):
        yield f"{file.package}.{extension.name}", (_EXTENSIONS, index)


def _elements_of_message(outer: str, message: DescriptorProto, place: Place) -> Iterator[tuple[str, Place]]:
    name = f"{outer}.{message.name}"
    yield name, place
    for index, field in enumerate(message.field):
        yield f"{name}.{field.name}", (*place, _FIELDS, index)
    for index, oneof in enumerate(message.oneof_decl):
        yield f"{name}.{oneof.name}", (*place, _ONEOFS, index)
    for index, nested in enumerate(message.nested_type):
        yield from _elements_of_message(name, nested, (*place, _NESTED_MESSAGES, index))
    for index, enum in enumerate(message.enum_type):
        yield from _elements_of_enum(name, enum, (*place, _NESTED_ENUMS, index))


def _elements_of_enum(outer: str, enum: EnumDescriptorProto, place: Place) -> Iterator[tuple[str, Place]]:
    # In C++ and so in protobuf, the values of an enum are siblings of the enum.
    yield f"{outer}.{enum.name}", place
    for index, value in enumerate(enum.value):
        yield f"{outer}.{value.name}", (*place, _VALUES, index)


def _elements_of_service(outer: str, service: ServiceDescriptorProto, place: Place) -> Iterator[tuple[str, Place]]:
    name = f"{outer}.{service.name}"
    yield name, place
    for index, method in enumerate(service.method):
        yield f"{name}.{method.name}", (*place, _METHODS, index)
