"""The public keys of the issuer of access tokens: a JWK Set (RFC 7517), from a URL or a file.

The set is cached. It is fetched again when it is old or when a token names a missing key, but
at most once every FETCH_AGAIN_SECONDS, so that forged key ids can't flood the issuer. While the
issuer is unavailable, the last valid set stays in use.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import httpx
import structlog
from jwt import PyJWK, PyJWTError

from server.ledger.errors import ServiceUnavailable
from server.transport.addresses import is_loopback
from server.transport.signing_algorithms import KEY_TYPES

log = structlog.get_logger(__name__)

FETCH_SECONDS_MAX = 5.0
"""Maximum duration of a fetch, and so of a call's wait for one, in seconds."""
FETCH_AGAIN_SECONDS = 10.0
"""Minimum time between the starts of two fetches, in seconds, whether or not the first succeeded."""
KEPT_SECONDS = 3600.0
"""Time that overdue keys stay in use while the issuer is unavailable, in seconds. Few tokens live longer."""
SET_BYTES_MAX = 256 * 1024
SET_KEYS_MAX = 100

Fetch: TypeAlias = Callable[[], Awaitable[bytes]]
"""Fetches a JWK Set. Any exception means that the fetch failed."""


class FetchFailed(Exception):
    """A JWK Set could not be fetched. The message is for the log."""


class NoSuchKey(Exception):
    """No key of the issuer matches, or several do. The message is for the log."""


class SigningKeys:
    """The keys of one issuer, fetched again when they are due."""

    def __init__(
        self,
        fetch: Fetch,
        algorithms: Sequence[str],
        refresh_seconds: float,
        stopwatch: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keys are due after `refresh_seconds`; `stopwatch` gives seconds. Keys of other `algorithms` are ignored."""
        self._fetch = fetch
        self._algorithms = algorithms
        self._refresh_seconds = refresh_seconds
        self._stopwatch = stopwatch
        self._keys: Sequence[PyJWK] = ()
        self._fetch_started_at = -math.inf
        self._fetched_at = -math.inf
        """The start of the fetch of the current keys. Equals _fetch_started_at unless a later fetch failed."""
        self._fetching: asyncio.Task[None] | None = None

    async def find(self, algorithm: str, key_id: str | None) -> PyJWK:
        """The key with this id, or the only key if the id is None, that verifies signatures of this algorithm.

        Raises NoSuchKey if there is none or more than one, and ServiceUnavailable if the issuer
        is unavailable and the key is not cached.
        """
        if self._age() >= self._refresh_seconds:
            # The first call after the keys are due waits for new ones. If the fetch fails, later calls don't wait.
            await self.refresh(wait=not self._last_fetch_failed() or self._have_expired())
        found = self._matching(algorithm, key_id)
        if not found:
            await self.refresh()
            found = self._matching(algorithm, key_id)
        if self._have_expired() or (not found and self._last_fetch_failed()):
            raise ServiceUnavailable
        if len(found) != 1:
            raise NoSuchKey("more than one key matches" if found else "the issuer has no such key")
        return found[0]

    async def refresh(self, *, wait: bool = True) -> None:
        """Fetches the keys, unless a fetch started recently; joins a running fetch. Never raises.

        Without `wait` the fetch runs in the background.
        """
        now = self._stopwatch()
        if self._fetching is None and now - self._fetch_started_at >= FETCH_AGAIN_SECONDS:
            self._fetch_started_at = now
            self._fetching = asyncio.create_task(self._replace())
        if wait and self._fetching is not None:
            # A cancelled caller doesn't cancel the fetch, for which other callers may wait.
            await asyncio.shield(self._fetching)

    async def close(self) -> None:
        """Cancels a running fetch."""
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.wait([self._fetching])

    def has_any(self) -> bool:
        """Whether there is a key to verify with."""
        return bool(self._keys) and not self._have_expired()

    async def _replace(self) -> None:
        fetch_started_at = self._fetch_started_at
        try:
            async with asyncio.timeout(FETCH_SECONDS_MAX):
                content = await self._fetch()
            keys = read_keys(content, self._algorithms)
        except Exception as error:
            # Messages of other exceptions may quote the response of the issuer.
            problem = str(error) if isinstance(error, FetchFailed) else type(error).__name__
            log.warning("signing key fetch failed", problem=problem)
        else:
            self._keys, self._fetched_at = keys, fetch_started_at
            if not keys:
                log.warning("no usable signing key")
        finally:
            self._fetching = None

    def _matching(self, algorithm: str, key_id: str | None) -> list[PyJWK]:
        return [
            key for key in self._keys if key.algorithm_name == algorithm and (key_id is None or key.key_id == key_id)
        ]

    def _age(self) -> float:
        return self._stopwatch() - self._fetched_at

    def _have_expired(self) -> bool:
        return self._age() >= self._refresh_seconds + KEPT_SECONDS

    def _last_fetch_failed(self) -> bool:
        return self._fetched_at != self._fetch_started_at


@contextlib.asynccontextmanager
async def signing_keys(
    location: str,
    algorithms: Sequence[str],
    refresh_seconds: float,
    stopwatch: Callable[[], float] = time.monotonic,
) -> AsyncIterator[SigningKeys]:
    """The keys at a URL or in a file, until the end of the block.

    A file is read again every FETCH_AGAIN_SECONDS. Raises FetchFailed if it holds no usable key;
    an issuer at a URL may be unavailable at first.
    """
    remote = is_url(location)
    source = from_url(location) if remote else contextlib.nullcontext(from_file(Path(location)))
    async with source as fetch:
        keys = SigningKeys(fetch, algorithms, refresh_seconds if remote else FETCH_AGAIN_SECONDS, stopwatch)
        try:
            await keys.refresh(wait=not remote)
            if not remote and not keys.has_any():
                raise FetchFailed("the file holds no usable key")
            yield keys
        finally:
            await keys.close()


def is_url(location: str) -> bool:
    """Whether a JWK Set is fetched over the network."""
    return "://" in location


@contextlib.asynccontextmanager
async def from_url(url: str) -> AsyncIterator[Fetch]:
    """Opens an HTTP client; yields a function that fetches the JWK Set at a URL. Redirects are not followed."""
    client = httpx.AsyncClient(
        follow_redirects=False,
        timeout=FETCH_SECONDS_MAX,
        # For https, the environment may name a proxy and certificate authorities.
        trust_env=url.startswith("https://"),
        # A proxy can't reach loopback addresses of this machine.
        mounts={"https://": None} if is_loopback(urlsplit(url).hostname or "") else None,
        # A small compressed answer could expand to a very large one.
        headers={"accept": "application/json", "accept-encoding": "identity", "user-agent": "daybook"},
    )

    async def fetch() -> bytes:
        content = bytearray()
        async with client.stream("GET", url) as response:
            if response.status_code != httpx.codes.OK:
                raise FetchFailed(f"the issuer answers with {response.status_code}")
            async for chunk in response.aiter_raw():
                content += chunk
                _require_size(len(content))
        return bytes(content)

    async with client:
        yield fetch


def from_file(path: Path) -> Fetch:
    """A function that reads the JWK Set in a file."""

    def read() -> bytes:
        # Reading a pipe might never end.
        if not path.is_file():
            raise FetchFailed("there is no such file")
        with path.open("rb") as file:
            content = file.read(SET_BYTES_MAX + 1)
        _require_size(len(content))
        return content

    async def fetch() -> bytes:
        return await asyncio.to_thread(read)

    return fetch


def _require_size(count: int) -> None:
    if count > SET_BYTES_MAX:
        raise FetchFailed(f"the JWK Set has more than {SET_BYTES_MAX} bytes")


def read_keys(content: bytes, algorithms: Sequence[str]) -> list[PyJWK]:
    """The keys of a JWK Set for these algorithms; a key appears once for each algorithm that it can be used with.

    Other keys are ignored (RFC 7517, 5); a set without a usable key revokes all earlier ones. Raises
    FetchFailed if the content is not a JWK Set.
    """
    try:
        jwk_set = json.loads(content)
    except (ValueError, RecursionError):
        raise FetchFailed("the JWK Set is not JSON") from None
    if not isinstance(jwk_set, dict) or not isinstance(jwk_set.get("keys"), list):
        raise FetchFailed("the JWK Set has no keys")
    if len(jwk_set["keys"]) > SET_KEYS_MAX:
        raise FetchFailed(f"the JWK Set has more than {SET_KEYS_MAX} keys")
    jwks = [jwk for jwk in jwk_set["keys"] if isinstance(jwk, dict) and _is_for_signatures(jwk)]
    return [key for jwk in jwks for algorithm in algorithms if (key := _read_key(jwk, algorithm)) is not None]


def _is_for_signatures(jwk: dict[str, Any]) -> bool:
    """Whether a key is public and for signatures (RFC 7517, 4.2 and 4.3)."""
    operations = jwk.get("key_ops", ["verify"])
    return jwk.get("use", "sig") == "sig" and isinstance(operations, list) and "verify" in operations and "d" not in jwk


def _read_key(jwk: dict[str, Any], algorithm: str) -> PyJWK | None:
    if jwk.get("kty") != KEY_TYPES[algorithm] or jwk.get("alg", algorithm) != algorithm:
        return None
    try:
        key = PyJWK(jwk, algorithm)
        # PyJWT compares the curve with the algorithm here.
        key.Algorithm.prepare_key(key.key)
    except (PyJWTError, TypeError, ValueError):
        return None
    # `check_key_length` returns a message for an RSA key of less than 2,048 bits.
    return None if key.Algorithm.check_key_length(key.key) else key
