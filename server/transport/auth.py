"""Authentication: API keys as Bearer, as X-API-Key or as Basic, and access tokens as Bearer.

A key has the form `{id}.{secret}`; with Basic the id is the user name and the secret the
password. server/ledger/access.py makes keys, and access_tokens.py verifies access tokens.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, TypeAlias

from server.ledger.access import ApiKeyRecord, Caller, hash_secret, is_active
from server.ledger.errors import CredentialInvalid, CredentialMissing
from server.ledger.instants import Clock, Instant
from server.ledger.names import is_api_key_id
from server.store.credentials import CredentialStore

CREDENTIALS_CACHED_MAX = 10_000
IDS_CACHED_MAX = 10_000
"""Maximum number of cached credential ids, by which admission shares places. Each takes about 200 bytes."""
KEY_CACHED_SECONDS_MAX = 5.0
"""Longest time that a credential works after its API key was revoked or its signing key removed, in seconds."""
CREDENTIAL_CHARACTERS_MAX = 8192
"""Longest credential, in characters: half of the gateway's limit for all headers, for tokens with many claims."""


class Scheme(Enum):
    """The form in which a credential is sent."""

    BEARER = "bearer"
    BASIC = "basic"
    API_KEY = "x-api-key"


@dataclass(frozen=True, slots=True)
class Authentication:
    """A caller, and the form of its credential."""

    caller: Caller
    scheme: Scheme


authentication: ContextVar[Authentication] = ContextVar("authentication")
"""The authentication of the current call. Set by server.transport.calls before a servicer runs."""


def current_caller() -> Caller:
    """The caller of the current call."""
    return authentication.get().caller


@dataclass(frozen=True, slots=True)
class Opened:
    """The caller of a valid credential, and its expire_time."""

    caller: Caller
    expire_time: Instant | None


OpenToken: TypeAlias = Callable[[str], Awaitable[Opened]]
"""Verifies an access token. Raises CredentialInvalid, or ServiceUnavailable while no key can be fetched."""


class _Cached(NamedTuple):
    """A cached authentication."""

    authentication: Authentication
    expire_time: Instant | None
    """The expire_time of the credential."""
    key_id: str | None
    """None for an access token."""
    until: float
    """The expiry of the entry, in seconds of the stopwatch."""


@dataclass(frozen=True, slots=True)
class _Credential:
    scheme: Scheme
    key_id: str | None
    """None for an access token."""
    secret: str = field(repr=False)
    """The secret of the key, or the whole token."""


class Authenticator:
    """Finds the caller of a call by the credential in its metadata."""

    def __init__(
        self,
        store: CredentialStore,
        clock: Clock,
        note_use: Callable[[str], None],
        stopwatch: Callable[[], float] = time.monotonic,
        open_token: OpenToken | None = None,
    ) -> None:
        """`note_use` is called with the id of each API key that authenticates a call; `stopwatch` gives seconds.

        Without `open_token` every access token is invalid.
        """
        self._store = store
        self._clock = clock
        self._note_use = note_use
        self._open_token = open_token
        self._stopwatch = stopwatch
        # Both caches have the digest of a header as key: headers are secret, and may be long.
        # Ordered by expiry, except that a slow read puts its credential further back.
        self._cached: dict[bytes, _Cached] = {}
        # The least recently authenticated first.
        self._ids: dict[bytes, str] = {}

    async def authenticate(self, metadata: Iterable[tuple[str, str | bytes]]) -> Authentication:
        """Finds the caller. Raises CredentialMissing, CredentialInvalid or ServiceUnavailable, which are not cached."""
        header = _header(metadata)
        digest = _digest(*header)
        found = self._cached.get(digest)
        if found is None or found.until <= self._stopwatch():
            found = await self._authenticate_uncached(digest, _credential(*header))
        elif found.expire_time is not None and not is_active(None, found.expire_time, self._clock()):
            raise CredentialInvalid
        if found.key_id is not None:
            self._note_use(found.key_id)
        return found.authentication

    def cached_credential_id(self, metadata: Iterable[tuple[str, str | bytes]]) -> str:
        """The id of the credential in metadata if this process has authenticated it before; otherwise empty.

        Admission uses the id to share places; it doesn't authenticate the call. The id doesn't
        expire, so that a key keeps its share while it is looked up again.
        """
        for name, value in metadata:
            if name in ("authorization", "x-api-key"):
                # A longer header is refused, so it is not worth hashing.
                is_bounded = len(value) <= CREDENTIAL_CHARACTERS_MAX
                return self._ids.get(_digest(name, str(value)), "") if is_bounded else ""
        return ""

    async def _authenticate_uncached(self, digest: bytes, credential: _Credential) -> _Cached:
        # Before the read: a slow one must not prolong the use of a key that is revoked meanwhile.
        began = self._stopwatch()
        opened = await self._open(credential)
        self._make_room()
        self._cache_id(digest, opened.caller.credential_id)
        found = self._cached[digest] = _Cached(
            Authentication(opened.caller, credential.scheme),
            opened.expire_time,
            credential.key_id,
            began + KEY_CACHED_SECONDS_MAX,
        )
        return found

    def _cache_id(self, digest: bytes, credential_id: str) -> None:
        self._ids.pop(digest, None)
        if len(self._ids) >= IDS_CACHED_MAX:
            del self._ids[next(iter(self._ids))]
        self._ids[digest] = credential_id

    def _make_room(self) -> None:
        """Evicts the expired entries, and the oldest one if the cache is full."""
        now = self._stopwatch()
        while self._cached:
            digest, first = next(iter(self._cached.items()))
            if first.until > now and len(self._cached) < CREDENTIALS_CACHED_MAX:
                return
            del self._cached[digest]

    async def _open(self, credential: _Credential) -> Opened:
        if credential.key_id is not None:
            return await self._open_key(credential.key_id, credential.secret)
        if self._open_token is None:
            raise CredentialInvalid
        return await self._open_token(credential.secret)

    async def _open_key(self, key_id: str, secret: str) -> Opened:
        record = await self._store.api_key(key_id)
        if record is None:
            raise CredentialInvalid
        expire_time = await self._expire_time(record, hash_secret(secret))
        if not is_active(record.revoke_time, expire_time, self._clock()):
            raise CredentialInvalid
        scopes = frozenset(record.scopes.split())
        caller = Caller(record.tenant_number, record.tenant_uid, record.id, record.account_id, scopes)
        return Opened(caller, expire_time)

    async def _expire_time(self, record: ApiKeyRecord, secret_hash: bytes) -> Instant | None:
        """The expire_time of a secret of a key. A rotated secret expires with its grace period, if not before."""
        if hmac.compare_digest(record.secret_hash, secret_hash):
            return record.expire_time
        for retired in await self._store.retired_secrets(record.id):
            if hmac.compare_digest(retired.secret_hash, secret_hash):
                return min(time for time in (retired.expire_time, record.expire_time) if time is not None)
        raise CredentialInvalid


def _digest(name: str, value: str) -> bytes:
    return hashlib.sha256(f"{name}:{value}".encode()).digest()


def _header(metadata: Iterable[tuple[str, str | bytes]]) -> tuple[str, str]:
    """The first header that may hold a credential."""
    for name, value in metadata:
        if name in ("authorization", "x-api-key") and isinstance(value, str):
            # gRPC decodes bytes that aren't UTF-8 as Latin-1; a credential is ASCII.
            if len(value) > CREDENTIAL_CHARACTERS_MAX or not value.isascii():
                raise CredentialInvalid
            return name, value
    raise CredentialMissing


def _credential(name: str, value: str) -> _Credential:
    return _parse_authorization(value) if name == "authorization" else _parse_key(Scheme.API_KEY, value)


def _parse_authorization(value: str) -> _Credential:
    scheme, _, text = value.partition(" ")
    match scheme.lower():
        case "bearer":
            # A token has three segments. The first is JSON in base64, whose capital letters no key id has.
            if text.count(".") == 2 and not is_api_key_id(text.lstrip(" ").partition(".")[0]):
                return _Credential(Scheme.BEARER, None, text.strip(" "))
            return _parse_key(Scheme.BEARER, text)
        case "basic":
            try:
                key_id, separator, secret = base64.b64decode(text.strip(" "), validate=True).decode().partition(":")
            except ValueError:
                raise CredentialInvalid from None
            if separator:
                return _checked(Scheme.BASIC, key_id, secret)
    raise CredentialInvalid


def _parse_key(scheme: Scheme, text: str) -> _Credential:
    key_id, _, secret = text.strip(" ").partition(".")
    return _checked(scheme, key_id, secret)


def _checked(scheme: Scheme, key_id: str, secret: str) -> _Credential:
    if not is_api_key_id(key_id) or not secret:
        raise CredentialInvalid
    return _Credential(scheme, key_id, secret)
