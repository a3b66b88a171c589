"""The keys that seal page tokens. All processes have the same keys, which can be rotated.

A new key seals only after every process has had time to load it, so that each process opens
the tokens of all others. A replaced key still opens tokens for a day, so that clients can
finish reading their lists.

The keys are in the database, unless the operator configures them. Then the first configured
key seals, and all of them open.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Protocol

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from server.background import repeating
from server.ledger.instants import HOUR, SECOND, Clock, Instant

if TYPE_CHECKING:
    # The settings need this module without the store.
    from server.store.credentials import CredentialStore, TokenKey

REFRESH_SECONDS = 10.0
"""Time between two reads of the stored keys, in seconds."""
SPREAD: Instant = 60 * SECOND
"""The age at which a key begins to seal, in microseconds: several times REFRESH_SECONDS."""
OPENS_FOR: Instant = 24 * HOUR
"""Time that a key still opens after its successor has begun to seal, in microseconds."""


KEY_BYTES = 32
CONFIGURED_KEYS_MAX = 16
"""Maximum number of configured keys. A forged token is tried with each of them."""


class SealingKeys(Protocol):
    """The key that seals page tokens, and the keys that open them."""

    @property
    def sealing(self) -> AESGCM:
        """The key that seals."""
        ...

    @property
    def opening(self) -> list[AESGCM]:
        """Every key whose tokens are valid."""
        ...


class ConfiguredTokenKeys:
    """Keys from the settings: the first seals, all open."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        """`keys` has at least one."""
        self.opening = [AESGCM(key) for key in keys]
        self.sealing = self.opening[0]


def parse_token_keys(text: str) -> list[bytes]:
    """Parses keys separated by white space or commas. Raises ValueError, whose message contains no part of a key."""
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
    """The keys in the database."""

    def __init__(self, keys: Sequence[TokenKey], clock: Clock) -> None:
        """`keys` has at least one, newest first."""
        self._clock = clock
        self.replace(keys)

    def replace(self, keys: Sequence[TokenKey]) -> None:
        """Replaces all keys. There is at least one; the newest is first."""
        self._keys = [(AESGCM(each.key), each.create_time) for each in keys]

    @property
    def sealing(self) -> AESGCM:
        """The newest key that every process has loaded; the first key ever seals immediately."""
        loaded = self._clock() - SPREAD
        return next((cipher for cipher, create_time in self._keys if create_time <= loaded), self._keys[-1][0])

    @property
    def opening(self) -> list[AESGCM]:
        """Every key whose tokens are still valid, newest first."""
        long_ago = self._clock() - SPREAD - OPENS_FOR
        successors = [create_time for _, create_time in self._keys]
        older = zip(self._keys[1:], successors, strict=False)
        return [self._keys[0][0], *(cipher for (cipher, _), successor in older if successor > long_ago)]


@contextlib.asynccontextmanager
async def refreshed_token_keys(store: CredentialStore, clock: Clock) -> AsyncIterator[TokenKeys]:
    """The stored keys, refreshed until the end of the block. There must be at least one."""
    keys = TokenKeys(await store.token_keys(), clock)

    async def refresh() -> None:
        keys.replace(await store.token_keys())

    async with repeating(refresh, REFRESH_SECONDS, "page token key refresh failed"):
        yield keys
