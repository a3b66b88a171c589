"""The keys that seal page tokens: every process has the same, and they can be rotated.

A new key seals only once every process has had the time to see it, so that a token of one
opens in all; and a key that was replaced still opens for a day, so that whoever reads a
list when it happens comes to its end.

The keys are in the database, unless whoever runs the server sets them: then they say which
one seals, and for how long others open.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

import structlog
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from server.ledger.errors import DaybookError
from server.ledger.instants import HOUR, SECOND, Clock, Instant
from server.store.credentials import CredentialStore, TokenKey

log = structlog.get_logger(__name__)

REFRESH_SECONDS = 10.0
"""How often a process looks whether there is a new key."""
SPREAD: Instant = 60 * SECOND
"""How old a key is when it begins to seal: several times what a process needs to see it."""
OPENS_FOR: Instant = 24 * HOUR
"""How long a key still opens after its successor has begun to seal."""


KEY_BYTES = 32
CONFIGURED_KEYS_MAX = 16
"""How many keys may be set. A token that was made up is tried with each."""


class SealingKeys(Protocol):
    """One key that seals, and those that open."""

    @property
    def sealing(self) -> AESGCM:
        """The key that seals."""
        ...

    @property
    def opening(self) -> list[AESGCM]:
        """Every key whose tokens are good."""
        ...


class ConfiguredTokenKeys:
    """Keys that whoever runs the server has set: the first seals, all open."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        """At least one key."""
        self.opening = [AESGCM(key) for key in keys]
        self.sealing = self.opening[0]


def parse_token_keys(text: str) -> list[bytes]:
    """Reads keys, with white space or commas between them. Raises ValueError, which says nothing of them."""
    words = text.replace(",", " ").split()
    if not 1 <= len(words) <= CONFIGURED_KEYS_MAX:
        raise ValueError(f"must be 1 to {CONFIGURED_KEYS_MAX} keys")
    keys = [_parse_key(number, word) for number, word in enumerate(words, start=1)]
    if len(set(keys)) < len(keys):
        raise ValueError("must not have a key twice")
    return keys


def _parse_key(number: int, word: str) -> bytes:
    with contextlib.suppress(ValueError):
        if len(word) == 2 * KEY_BYTES:
            return bytes.fromhex(word)
        key = base64.b64decode(word + "=" * (-len(word) % 4), altchars=b"-_", validate=True)
        if len(key) == KEY_BYTES:
            return key
    raise ValueError(f"key {number} must be {KEY_BYTES} bytes, in hex or base64")


class TokenKeys:
    """The keys of the database: one seals, and some open."""

    def __init__(self, keys: Sequence[TokenKey], clock: Clock) -> None:
        """The keys, newest first; at least one."""
        self._clock = clock
        self.replace(keys)

    def replace(self, keys: Sequence[TokenKey]) -> None:
        """Takes other keys from now on, newest first; at least one."""
        self._keys = [(AESGCM(each.key), each.create_time) for each in keys]

    @property
    def sealing(self) -> AESGCM:
        """The newest key that every process has seen; the first of all needs no waiting."""
        seen = self._clock() - SPREAD
        return next((cipher for cipher, create_time in self._keys if create_time <= seen), self._keys[-1][0])

    @property
    def opening(self) -> list[AESGCM]:
        """Every key whose tokens are still good, newest first."""
        long_ago = self._clock() - SPREAD - OPENS_FOR
        successors = [create_time for _, create_time in self._keys]
        older = zip(self._keys[1:], successors, strict=False)
        return [self._keys[0][0], *(cipher for (cipher, _), successor in older if successor > long_ago)]


@contextlib.asynccontextmanager
async def refreshed_token_keys(store: CredentialStore, clock: Clock) -> AsyncIterator[TokenKeys]:
    """The stored keys, of which there must be one; those that are added later come in until the end of the block."""
    keys = TokenKeys(await store.token_keys(), clock)
    task = asyncio.create_task(_refresh_for_ever(keys, store))
    try:
        yield keys
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _refresh_for_ever(keys: TokenKeys, store: CredentialStore) -> None:
    while True:
        await asyncio.sleep(REFRESH_SECONDS)
        try:
            keys.replace(await store.token_keys())
        except DaybookError as error:
            log.warning("keys of page tokens not refreshed", reason=error.reason)
        except Exception:
            log.exception("keys of page tokens not refreshed")
