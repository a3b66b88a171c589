"""Page tokens: opaque, sealed, and good for one list only.

A token is a daybook.internal.v1.PageToken, encrypted and authenticated with AES-256-GCM,
as URL-safe base64 without padding. It names its method, its tenant and a hash of every
argument of the call except the page's size, so that it can't be moved to another list.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from daybook.internal.v1.page_token_pb2 import PageToken
from google.protobuf.message import DecodeError, Message

from server.ledger.access import Caller
from server.ledger.errors import PageTokenInvalid, PageTokenMismatch
from server.ledger.names import RandomBytes
from server.ledger.paging import ApiKeyKey, TransactionKey
from server.transport.token_keys import SealingKeys

NONCE_BYTES = 12
TOKEN_CHARACTERS_MAX = 1024
LISTINGS_CACHED_MAX = 4096
"""How many requests for pages are kept as they were read."""
TOKENS_CACHED_MAX = 4096
"""How many tokens are given again where the same page is asked for again."""


class Listing(NamedTuple):
    """A list of which pages are asked for: what a token must agree with."""

    method: str
    tenant_number: int
    arguments_hash: bytes
    token_field: str
    """What callers call the token, for messages."""

    @classmethod
    def of(cls, method: str, caller: Caller, request: Message, paging: tuple[str, str]) -> Listing:
        """The list that a request asks for; `paging` names its fields for the token and the size."""
        parse = type(request).FromString
        return _listing(method, caller.tenant_number, parse, request.SerializeToString(), paging)


@lru_cache(LISTINGS_CACHED_MAX)
def _listing(
    method: str, tenant_number: int, parse: Callable[[bytes], Message], request: bytes, paging: tuple[str, str]
) -> Listing:
    token_field, size_field = paging
    arguments = parse(request)
    arguments.ClearField(token_field)
    arguments.ClearField(size_field)
    digest = hashlib.sha256(arguments.SerializeToString(deterministic=True)).digest()
    public_name = arguments.DESCRIPTOR.fields_by_name[token_field]
    # Native requests are documented in snake case, facades in the vendor's JSON names.
    shown = token_field if method.startswith("daybook.v1.") else public_name.json_name
    return Listing(method, tenant_number, digest[:16], shown)


class PageTokens:
    """Seals and opens page tokens."""

    def __init__(self, keys: SealingKeys, random_bytes: RandomBytes) -> None:
        self._keys = keys
        self._random_bytes = random_bytes
        # The first page of a list is asked for again and again, and seldom changes in between.
        self._sealed_transaction = lru_cache(TOKENS_CACHED_MAX)(self._seal_transaction)

    def seal_transaction(self, listing: Listing, last: TransactionKey) -> str:
        """The token of the page behind a transaction."""
        return self._sealed_transaction(self._keys.sealing, listing, last)

    def _seal_transaction(self, cipher: AESGCM, listing: Listing, last: TransactionKey) -> str:
        body = self._body(listing)
        key = body.v1.transaction
        key.position, key.account_number, key.sequence = last
        return self._seal(body, cipher)

    def seal_account(self, listing: Listing, last: str) -> str:
        """The token of the page behind an account."""
        body = self._body(listing)
        body.v1.account_id = last
        return self._seal(body)

    def seal_lot(self, listing: Listing, last: int) -> str:
        """The token of the page behind a lot."""
        body = self._body(listing)
        body.v1.lot_number = last
        return self._seal(body)

    def seal_api_key(self, listing: Listing, last: ApiKeyKey) -> str:
        """The token of the page behind an API key."""
        body = self._body(listing)
        body.v1.api_key.create_time = last.create_time
        body.v1.api_key.id = last.id
        return self._seal(body)

    def open_api_key(self, listing: Listing, token: str) -> ApiKeyKey | None:
        """The API key behind which the page begins; None for the first page.

        Raises PageTokenInvalid, PageTokenMismatch.
        """
        if not token:
            return None
        key = self._open(listing, token).api_key
        return ApiKeyKey(key.create_time, key.id)

    def open_lot(self, listing: Listing, token: str) -> int:
        """The number of the lot behind which the page begins; 0 for the first page.

        Raises PageTokenInvalid, PageTokenMismatch.
        """
        return self._open(listing, token).lot_number if token else 0

    def open_transaction(self, listing: Listing, token: str) -> TransactionKey | None:
        """The transaction behind which the page begins; None for the first page.

        Raises PageTokenInvalid, PageTokenMismatch.
        """
        if not token:
            return None
        key = self._open(listing, token).transaction
        return TransactionKey(key.position, key.account_number, key.sequence)

    def open_account(self, listing: Listing, token: str) -> str | None:
        """The account behind which the page begins; None for the first page.

        Raises PageTokenInvalid, PageTokenMismatch.
        """
        return self._open(listing, token).account_id if token else None

    @staticmethod
    def _body(listing: Listing) -> PageToken:
        body = PageToken()
        version = body.v1
        version.method, version.tenant_number = listing.method, listing.tenant_number
        version.arguments_hash = listing.arguments_hash
        return body

    def _seal(self, body: PageToken, cipher: AESGCM | None = None) -> str:
        nonce = self._random_bytes(NONCE_BYTES)
        return _encode(nonce + (cipher or self._keys.sealing).encrypt(nonce, body.SerializeToString(), None))

    def _open(self, listing: Listing, token: str) -> PageToken.V1:
        try:
            body = PageToken.FromString(self._unseal(_decode(token)))
        except (ValueError, InvalidTag, DecodeError):
            raise PageTokenInvalid(listing.token_field) from None
        sealed_for = (body.v1.method, body.v1.tenant_number, body.v1.arguments_hash)
        if sealed_for != (listing.method, listing.tenant_number, listing.arguments_hash):
            raise PageTokenMismatch(listing.token_field)
        return body.v1

    def _unseal(self, sealed: bytes) -> bytes:
        """What was sealed. Raises InvalidTag, and ValueError for what is too short."""
        for cipher in self._keys.opening:
            with contextlib.suppress(InvalidTag):
                return cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], None)
        raise InvalidTag


def _encode(sealed: bytes) -> str:
    return base64.urlsafe_b64encode(sealed).decode().rstrip("=")


def _decode(token: str) -> bytes:
    """The bytes of a token. Raises ValueError for a text that none is spelled like."""
    if len(token) > TOKEN_CHARACTERS_MAX:
        raise ValueError("too long")
    sealed = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
    # The last character has bits that decoding ignores; a token has one spelling.
    if _encode(sealed) != token:
        raise ValueError("another spelling")
    return sealed
