"""Input outside of the message: the header Idempotency-Key, and input that the gateway's transcoder drops silently.

Envoy's gRPC-JSON transcoder ignores keys of a body that the message lacks, a query parameter that the
path binds, one without `=`, and all values of a parameter but the last. The gateway therefore sends the
target of the request and the keys of its body along, in headers that no caller can set, and the server
compares them with the contract of the method.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import unquote, unquote_plus

from google.api.annotations_pb2 import http
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pool import Default

from server.ledger.errors import FieldInvalid
from server.transport.query_names import TARGET_HEADER
from server.transport.rest import echo
from server.transport.validation import REQUEST_ID_CHARACTERS_MAX

IDEMPOTENCY_KEY = "Idempotency-Key"
KEYS_HEADER = "x-daybook-body-keys"
"""The path of each key of a body, once: names joined by dots, without the keys inside free maps."""
REPEATED_HEADER = "x-daybook-body-repeated"
"""The path of a key that occurs twice in one object of a body."""
MALFORMED_HEADER = "x-daybook-body-malformed"
"""Present if a body is not JSON, although the transcoder may accept it."""

_NAMES = frozenset((IDEMPOTENCY_KEY.lower(), KEYS_HEADER, REPEATED_HEADER, MALFORMED_HEADER, TARGET_HEADER))
_KEY = re.compile(rf"[\x20-\x7e]{{1,{REQUEST_ID_CHARACTERS_MAX}}}", re.ASCII)
_BOUND = re.compile(r"\{([a-z_.]+)[=}]")


class Inputs:
    """Checks the input of one method outside of its message."""

    def __init__(self, method: str) -> None:
        """`method` is the full name of a method of the native API, `package.Service/Method`."""
        descriptor = Default().FindMethodByName(method.replace("/", "."))
        rule = descriptor.GetOptions().Extensions[http]
        pattern = rule.WhichOneof("pattern")
        self._name: str = descriptor.name
        self._request_type: Descriptor = descriptor.input_type
        self._is_read = pattern == "get"
        self._has_request_id = "request_id" in self._request_type.fields_by_name
        self._bound = frozenset(_BOUND.findall(getattr(rule, pattern))) if pattern else frozenset()
        self._body = "" if rule.body == "*" else rule.body

    def complete(self, request: Any, metadata: Iterable[tuple[str, str | bytes]]) -> Any:
        """The request, or a copy with the header Idempotency-Key as its request_id.

        The request of a stream is None. Raises FieldInvalid for input that would be dropped.
        """
        headers = [(name, value) for name, value in metadata if name in _NAMES]
        if not headers:
            return request
        keys = [value for name, value in headers if name == IDEMPOTENCY_KEY.lower()]
        given = {name: value for name, value in headers if isinstance(value, str)}
        if MALFORMED_HEADER in given:
            raise FieldInvalid("request", "is not JSON, or is nested too deeply")
        seen = self._check_query(given.get(TARGET_HEADER, "").partition("?")[2])
        self._check_body(given.get(KEYS_HEADER, ""), given.get(REPEATED_HEADER, ""), seen)
        # A method that only reads is safe to repeat without a key.
        return self._with_request_id(request, keys) if keys and not self._is_read else request

    def _with_request_id(self, request: Any, keys: Sequence[str | bytes]) -> Any:
        if not self._has_request_id:
            raise FieldInvalid(IDEMPOTENCY_KEY, f"is not possible with {self._name}, {self._instead()}")
        if len(keys) > 1:
            raise FieldInvalid(IDEMPOTENCY_KEY, "is given more than once")
        (key,) = keys
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise FieldInvalid(
                IDEMPOTENCY_KEY, f"must have 1 to {REQUEST_ID_CHARACTERS_MAX} characters, all of them printable ASCII"
            )
        if request.request_id not in ("", key):
            raise FieldInvalid(
                "request_id",
                f"is {echo(request.request_id)!r}, but the header {IDEMPOTENCY_KEY} is {echo(key)!r}: send only one",
            )
        copied = type(request)(request_id=key)
        copied.MergeFrom(request)
        return copied

    def _instead(self) -> str:
        for field in self._request_type.fields:
            if field.message_type is not None and "request_id" in field.message_type.fields_by_name:
                return f"where each of {field.name} may have a request_id of its own"
        return "which has no request_id"

    def _check_query(self, query: str) -> Collection[str]:
        """The paths of the fields in a query. Raises FieldInvalid."""
        seen: set[str] = set()
        for parameter in query.split("&"):
            if not parameter:
                continue
            name, equals, _ = parameter.partition("=")
            name = unquote_plus(name)
            fields = [field for _, _, field in _walk(self._request_type, name.split("."))]
            path = ".".join(field.name for field in fields if field) if fields[-1] else echo(name)
            if path in self._bound:
                raise FieldInvalid(path, "is part of the path, so it must not be in the query")
            if fields[-1] is None:
                raise FieldInvalid(path, f"is not a parameter of {self._name}")
            if not equals:
                raise FieldInvalid(path, f"has no value: write {name}=VALUE")
            if path in seen and not fields[-1].is_repeated:
                raise FieldInvalid(path, "is given more than once")
            seen.add(path)
        return seen

    def _check_body(self, keys: str, repeated: str, in_query: Collection[str]) -> None:
        root = self._request_type.fields_by_name[self._body].message_type if self._body else self._request_type
        assert root is not None, "a body is a message"
        for key in keys.split(",") if keys else ():
            path = self._require_field(root, key.split("."))
            if path in in_query:
                raise FieldInvalid(path, "is given in the query and in the body")
        if repeated:
            raise FieldInvalid(self._shown(root, repeated.split(".")), "is given more than once")

    def _require_field(self, root: Descriptor, names: Sequence[str]) -> str:
        """The path of a field of a body. Raises FieldInvalid if there is no such field."""
        path = [self._body] if self._body else []
        for depth, (owner, name, field) in enumerate(_walk(root, names), start=1):
            if field is None:
                raise FieldInvalid(self._shown(root, names[:depth]), self._unknown(owner or root, unquote(name)))
            path.append(field.name)
        return ".".join(path)

    def _unknown(self, owner: Descriptor, name: str) -> str:
        problem = f"is not a field of {owner.name}"
        elsewhere = _field(self._request_type, name) if self._body else None
        if elsewhere is None or elsewhere.name == self._body or elsewhere.name in self._bound:
            return problem
        if elsewhere.name == "request_id":
            return f"{problem}: send it as the header {IDEMPOTENCY_KEY}, or in the query as ?{elsewhere.json_name}="
        return f"{problem}: send it in the query as ?{elsewhere.json_name}="

    def _shown(self, root: Descriptor, names: Sequence[str]) -> str:
        """A path for an error message, with the contract's name of each field that it has."""
        shown = [self._body] if self._body else []
        for _, name, field in _walk(root, names):
            shown.append(unquote(name) if field is None else field.name + "[]" * field.is_repeated)
        return ".".join(shown)


def _field(descriptor: Descriptor, name: str) -> FieldDescriptor | None:
    """The field of this name, which may be its JSON name."""
    return descriptor.fields_by_name.get(name) or descriptor.fields_by_camelcase_name.get(name)


def _walk(root: Descriptor, names: Iterable[str]) -> Iterator[tuple[Descriptor | None, str, FieldDescriptor | None]]:
    """The message, the name and the field of each step of a path; None for a message or field that doesn't exist."""
    owner: Descriptor | None = root
    for name in names:
        field = _field(owner, name) if owner is not None else None
        yield owner, name, field
        owner = field.message_type if field is not None else None
