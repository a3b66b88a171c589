"""The facts of the contracts that the gateway needs, read from their descriptor set."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from google.api.annotations_pb2 import http
from google.api.http_pb2 import HttpRule
from google.protobuf.descriptor_pb2 import FileDescriptorSet, MethodDescriptorProto

DESCRIPTORS = Path(__file__).resolve().parent / "descriptors.binpb"
"""The descriptor set of all contracts; in a checkout, a link to the file in gen/."""
NATIVE = "daybook.v1"
"""The package of the native API. Every other service is a facade's."""

_VARIABLE = re.compile(r"\{([a-z0-9_.]+)(?:=([^}]*))?\}")


@dataclass(frozen=True, slots=True)
class Route:
    """A path of the native API and its HTTP methods."""

    path: str
    """A regular expression."""
    methods: Sequence[str]
    """Ordered by name; HEAD is included with GET."""


@dataclass(frozen=True, slots=True)
class Contracts:
    """The services and paths of all contracts."""

    native_services: Sequence[str]
    facade_services: Sequence[str]
    native_bound: Sequence[str]
    """Fields that a path of the native API binds, in both spellings that a query may use."""
    facade_bound: Sequence[str]
    """Fields that a path of a facade binds, in both spellings."""
    free_fields: Sequence[str]
    """Fields of native requests with free keys: maps and Structs."""
    routes: Sequence[Route]
    files: Sequence[str]
    """Regular expressions of the native paths whose response is a file, which may be streamed for long."""


def read_contracts() -> Contracts:
    """Reads the generated descriptor set."""
    descriptors = FileDescriptorSet.FromString(DESCRIPTORS.read_bytes())
    services = [
        (file.package, f"{file.package}.{service.name}", service.method)
        for file in descriptors.file
        for service in file.service
    ]
    native = [rule for package, _, methods in services if package == NATIVE for rule in _rules(methods)]
    facades = [rule for package, _, methods in services if package != NATIVE for rule in _rules(methods)]
    return Contracts(
        native_services=[name for package, name, _ in services if package == NATIVE],
        facade_services=[name for package, name, _ in services if package != NATIVE],
        native_bound=_bound(native),
        facade_bound=_bound(facades),
        free_fields=_free_fields(descriptors),
        routes=_routes(native),
        files=[_pattern(_verb_and_path(rule)[1]) + "/?" for rule in native if rule.response_body],
    )


def _rules(methods: Iterable[MethodDescriptorProto]) -> Iterator[HttpRule]:
    for method in methods:
        # A method without a rule has no path, only gRPC.
        if method.options.HasExtension(http):
            rule = method.options.Extensions[http]
            yield rule
            yield from rule.additional_bindings


def _verb_and_path(rule: HttpRule) -> tuple[str, str]:
    verb = rule.WhichOneof("pattern")
    assert verb is not None, "protoc refuses a rule without a path"
    return verb.upper(), str(getattr(rule, verb))


def _bound(rules: Iterable[HttpRule]) -> Sequence[str]:
    names = {name for rule in rules for name, _ in _VARIABLE.findall(_verb_and_path(rule)[1])}
    return sorted(names | {re.sub("_([a-z])", lambda letter: letter[1].upper(), name) for name in names})


def _routes(rules: Iterable[HttpRule]) -> Sequence[Route]:
    methods: dict[str, set[str]] = {}
    for rule in rules:
        verb, path = _verb_and_path(rule)
        methods.setdefault(_pattern(path), set()).update(["GET", "HEAD"] if verb == "GET" else [verb])
    return [Route(f"{path}/?", sorted(allowed)) for path, allowed in sorted(methods.items())]


def _pattern(path: str) -> str:
    """A regular expression of the path: `/v1/{name=apiKeys/*}:revoke` as `/v1/apiKeys/[^/:]+:revoke`."""
    plain = _VARIABLE.sub(lambda variable: variable[2] or "*", path)
    # A colon ends the last segment; the verb of a custom method follows it.
    return re.escape(plain).replace(r"\*/", "[^/]+/").replace(r"\*", "[^/:]+")


def _free_fields(descriptors: FileDescriptorSet) -> Sequence[str]:
    messages = [message for file in descriptors.file if file.package == NATIVE for message in file.message_type]
    maps = {
        f".{NATIVE}.{message.name}.{nested.name}"
        for message in messages
        for nested in message.nested_type
        if nested.options.map_entry
    }
    free = {*maps, ".google.protobuf.Struct"}
    return sorted({field.name for message in messages for field in message.field if field.type_name in free})
