"""Refuses misspelled query parameters of facades.

The vendors and the gateway ignore unknown parameters. A misspelled filter must not be ignored,
because the caller would take a list of everything for a filtered one.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

from google.protobuf.descriptor import Descriptor
from google.protobuf.descriptor_pool import Default

from server.ledger.errors import FieldInvalid
from server.transport.rest import echo

TARGET_HEADER = "x-envoy-original-path"
"""The metadata with the path and query of a REST request. Only the gateway can set it."""

_HEAD = re.compile(r"[A-Za-z0-9_-]*", re.ASCII)
_NEITHER_LETTER_NOR_DIGIT = re.compile(r"[^a-z0-9]")


class QueryNames:
    """The query parameters of a method, given as `package.Service/Method`."""

    def __init__(self, method: str) -> None:
        request: Descriptor = Default().FindMethodByName(method.replace("/", ".")).input_type
        # Fields that the path binds have no presence.
        names = {field.json_name for field in request.fields if field.has_presence or field.is_repeated}
        self._documented = frozenset(names)
        self._plain = {_plain(name) for name in names} | {_plain(_head(name)) for name in names}
        # `createDate` of `createDate[gte]`.
        self._families = tuple(_plain(_head(name)) for name in names if _head(name) != name)

    def check(self, target: str) -> None:
        """Raises FieldInvalid for the first misspelled parameter in the query of a target.

        A misspelled name has the letters and digits of a documented one, in any case and with any
        signs between them. A bracket, a dot or another sign may follow, with any text (`Limit`,
        `page-size`, `transaction_type[]`). If a documented name has brackets, every name with the
        same beginning is misspelled (`createDateFrom`). A name without `=` is not a parameter.
        """
        for pair in target.partition("?")[2].split("&"):
            escaped, equals, _ = pair.partition("=")
            name = unquote(escaped)
            if equals and name not in self._documented and self._is_like_documented(name):
                names = ", ".join(sorted(self._documented))
                raise FieldInvalid(echo(name), f"is not a parameter of this list, whose parameters are {names}")

    def _is_like_documented(self, name: str) -> bool:
        plain = _plain(name)
        return plain in self._plain or _plain(_head(name)) in self._plain or plain.startswith(self._families)


def _head(name: str) -> str:
    """A name up to its first bracket, dot or other sign."""
    match = _HEAD.match(name)
    return match[0] if match else ""


def _plain(name: str) -> str:
    return _NEITHER_LETTER_NOR_DIGIT.sub("", name.lower())
