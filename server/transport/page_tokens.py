"""Page tokens: opaque, sealed, and valid for one list only.

A token is a daybook.internal.v1.PageToken, encrypted and authenticated with AES-256-GCM,
as URL-safe base64 without padding. It contains its method, its tenant and a hash of every
argument of the call except the page size, so that it is refused by any other list.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
from typing import NamedTuple, TypeAlias, TypeVar

from cryptography.exceptions import InvalidTag
from daybook.internal.v1.page_token_pb2 import PageToken
from google.protobuf.message import DecodeError, Message

from server.ledger.access import Caller
from server.ledger.errors import PageTokenInvalid, PageTokenMismatch
from server.ledger.names import RandomBytes
from server.ledger.paging import ApiKeyKey, TransactionKey
from server.transport.token_keys import SealingKeys

NONCE_BYTES = 12
TOKEN_CHARACTERS_MAX = 1024

RowKey: TypeAlias = TransactionKey | ApiKeyKey | str | int
"""The key of the last row of a page: an id in a list of accounts, a number in a list of lots."""
_Key = TypeVar("_Key", bound=RowKey)


class Listing(NamedTuple):
    """The list that a request asks for, which a token must match."""

    method: str
    tenant_number: int
    arguments_hash: bytes
    token_field: str
    """The name of the token's field in error messages."""

    @classmethod
    def of(cls, method: str, caller: Caller, request: Message, paging: tuple[str, str]) -> Listing:
        """The list that a request asks for. `paging` has the names of its fields for the token and the page size."""
        token_field, size_field = paging
        arguments = type(request)()
        arguments.CopyFrom(request)
        arguments.ClearField(token_field)
        arguments.ClearField(size_field)
        digest = hashlib.sha256(arguments.SerializeToString(deterministic=True)).digest()
        # Native requests are documented in snake case, facades in the vendor's JSON names.
        is_native = method.startswith("daybook.v1.")
        shown = token_field if is_native else request.DESCRIPTOR.fields_by_name[token_field].json_name
        return cls(method, caller.tenant_number, digest[:16], shown)


class PageTokens:
    """Seals and opens page tokens."""

    def __init__(self, keys: SealingKeys, random_bytes: RandomBytes) -> None:
        self._keys = keys
        self._random_bytes = random_bytes

    def seal(self, listing: Listing, last: RowKey) -> str:
        """The token of the page that begins after the row `last`."""
        version = PageToken.V1(
            method=listing.method, tenant_number=listing.tenant_number, arguments_hash=listing.arguments_hash
        )
        match last:
            case TransactionKey():
                version.transaction.position, version.transaction.account_number, version.transaction.sequence = last
            case ApiKeyKey():
                version.api_key.create_time, version.api_key.id = last.create_time, last.id
            case str():
                version.account_id = last
            case int():
                version.lot_number = last
        return self._seal(PageToken(v1=version))

    def open(self, listing: Listing, token: str, key_type: type[_Key]) -> _Key | None:
        """The key of the row after which the page begins; None for the first page, whose token is empty.

        Raises PageTokenInvalid, PageTokenMismatch.
        """
        if not token:
            return None
        try:
            version = PageToken.FromString(self._unseal(_decode(token))).v1
        except (ValueError, InvalidTag, DecodeError):
            raise PageTokenInvalid(listing.token_field) from None
        sealed_for = (version.method, version.tenant_number, version.arguments_hash)
        if sealed_for != (listing.method, listing.tenant_number, listing.arguments_hash):
            raise PageTokenMismatch(listing.token_field)
        key = _read_key(version)
        if not isinstance(key, key_type):
            raise PageTokenInvalid(listing.token_field)
        return key

    def _seal(self, body: PageToken) -> str:
        nonce = self._random_bytes(NONCE_BYTES)
        return _encode(nonce + self._keys.sealing.encrypt(nonce, body.SerializeToString(), None))

    def _unseal(self, sealed: bytes) -> bytes:
        """Decrypts with the matching key. Raises InvalidTag, and ValueError for too few bytes."""
        for cipher in self._keys.opening:
            with contextlib.suppress(InvalidTag):
                return cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], None)
        raise InvalidTag


def _read_key(version: PageToken.V1) -> RowKey | None:
    match version.WhichOneof("last"):
        case "transaction":
            key = version.transaction
            return TransactionKey(key.position, key.account_number, key.sequence)
        case "api_key":
            return ApiKeyKey(version.api_key.create_time, version.api_key.id)
        case "account_id":
            return version.account_id
        case "lot_number":
            return version.lot_number
    return None


def _encode(sealed: bytes) -> str:
    return base64.urlsafe_b64encode(sealed).decode().rstrip("=")


def _decode(token: str) -> bytes:
    """The bytes of a token. Raises ValueError for any text but the canonical encoding of some bytes."""
    sealed = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
    # Decoding ignores some bits of the last character.
    if _encode(sealed) != token:
        raise ValueError("not canonical")
    return sealed
