"""Who is calling: API keys as Bearer, as X-API-Key or as Basic.

A key reads `{id}.{secret}`; with Basic the id is the user name and the secret the
password. Only a SHA-256 of the secret is stored: the secret is 256 random bits, so
there is nothing to guess that a slow hash would protect.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum

from cachetools import TTLCache

from server.ledger.access import Caller
from server.ledger.errors import CredentialInvalid, CredentialMissing
from server.ledger.names import RandomBytes
from server.store.credentials import CredentialStore

KEYS_CACHED_MAX = 10_000
KEY_CACHED_SECONDS_MAX = 5.0
"""How long a key may still open after it has gone from the database."""
CREDENTIAL_CHARACTERS_MAX = 4096

_KEY_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,63}", re.ASCII)


class Scheme(Enum):
    """How a credential was given."""

    BEARER = "bearer"
    BASIC = "basic"
    API_KEY = "x-api-key"


@dataclass(frozen=True, slots=True)
class Authentication:
    """A caller, and how they proved who they are."""

    caller: Caller
    scheme: Scheme


authentication: ContextVar[Authentication] = ContextVar("authentication")
"""That of the call under way. Set by server.transport.calls before a servicer runs."""


def current_caller() -> Caller:
    """Who made the call under way."""
    return authentication.get().caller


@dataclass(frozen=True, slots=True)
class _Credential:
    scheme: Scheme
    key_id: str
    secret: str


@dataclass(frozen=True, slots=True)
class NewApiKey:
    """A key just made. The text is shown once and stored nowhere."""

    key_id: str
    text: str
    secret_hash: bytes


def new_api_key(random_bytes: RandomBytes) -> NewApiKey:
    """Makes an API key out of 80 random bits for the id and 256 for the secret."""
    key_id = random_bytes(10).hex()
    secret = base64.urlsafe_b64encode(random_bytes(32)).decode().rstrip("=")
    return NewApiKey(key_id, f"{key_id}.{secret}", hash_secret(secret))


def hash_secret(secret: str) -> bytes:
    """What is stored of a secret."""
    return hashlib.sha256(secret.encode()).digest()


class Authenticator:
    """Finds the caller of a call by the credential in its metadata."""

    def __init__(self, store: CredentialStore) -> None:
        self._store = store
        self._callers: TTLCache[_Credential, Caller] = TTLCache(KEYS_CACHED_MAX, KEY_CACHED_SECONDS_MAX)

    async def authenticate(self, metadata: Iterable[tuple[str, str | bytes]]) -> Authentication:
        """Raises CredentialMissing or CredentialInvalid. A wrong key is not cached."""
        credential = _credential(metadata)
        caller = self._callers.get(credential)
        if caller is None:
            caller = await self._look_up(credential)
            self._callers[credential] = caller
        return Authentication(caller, credential.scheme)

    async def _look_up(self, credential: _Credential) -> Caller:
        record = await self._store.api_key(credential.key_id)
        secret_hash = hash_secret(credential.secret)
        if record is None or not hmac.compare_digest(record.secret_hash, secret_hash):
            raise CredentialInvalid
        scopes = frozenset(record.scopes.split())
        return Caller(record.tenant_number, record.tenant_uid, record.id, record.account_id, scopes)


def _credential(metadata: Iterable[tuple[str, str | bytes]]) -> _Credential:
    for name, value in metadata:
        if name in ("authorization", "x-api-key") and isinstance(value, str):
            if len(value) > CREDENTIAL_CHARACTERS_MAX:
                raise CredentialInvalid
            return _parse_authorization(value) if name == "authorization" else _parse_key(Scheme.API_KEY, value)
    raise CredentialMissing


def _parse_authorization(value: str) -> _Credential:
    scheme, _, text = value.partition(" ")
    match scheme.lower():
        case "bearer":
            return _parse_key(Scheme.BEARER, text)
        case "basic":
            try:
                key_id, separator, secret = base64.b64decode(text.strip(), validate=True).decode().partition(":")
            except ValueError:
                raise CredentialInvalid from None
            if separator:
                return _checked(Scheme.BASIC, key_id, secret)
    raise CredentialInvalid


def _parse_key(scheme: Scheme, text: str) -> _Credential:
    key_id, _, secret = text.strip().partition(".")
    return _checked(scheme, key_id, secret)


def _checked(scheme: Scheme, key_id: str, secret: str) -> _Credential:
    if not _KEY_ID.fullmatch(key_id) or not secret:
        raise CredentialInvalid
    return _Credential(scheme, key_id, secret)
