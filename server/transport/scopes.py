"""The scopes that a method requires of a credential, as its contract declares them."""

from __future__ import annotations

from daybook.v1.scope_pb2 import scope
from google.protobuf.descriptor_pool import Default

from server.ledger.access import SUFFICIENT


def declared_scopes(method: str) -> tuple[str, ...]:
    """The scopes of a method, given as `package.Service/Method`. Any one of them suffices.

    Raises AssertionError if the method declares no scope or an unknown one.
    """
    options = Default().FindMethodByName(method.replace("/", ".")).GetOptions()
    scopes = tuple(options.Extensions[scope])
    if not scopes or not SUFFICIENT.keys() >= set(scopes):
        raise AssertionError(f"{method} declares the scopes {scopes}")
    return scopes
