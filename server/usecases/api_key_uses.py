"""The last use of each API key: collected in memory, and written to the database periodically."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from server.background import attempt, repeating
from server.ledger.errors import DaybookError
from server.ledger.instants import Clock, Instant
from server.store.credentials import CredentialStore

FLUSH_SECONDS = 30.0
"""Time between two writes, in seconds. A listed last_use_time is at most slightly older."""
KEYS_MAX = 10_000
"""Maximum number of keys collected between two writes; a use of a further key is not recorded."""
_FAILURE = "key use flush failed"


class ApiKeyUses:
    """Collects the last use of each key, so that no call has to write it."""

    def __init__(self, store: CredentialStore, checked_clock: Clock) -> None:
        """`checked_clock` may raise ClockSkewed or ServiceUnavailable; the use is not recorded then."""
        self._store = store
        self._checked_clock = checked_clock
        self._latest: dict[str, Instant] = {}

    def note(self, key_id: str) -> None:
        """Records that a key is used now."""
        if key_id in self._latest or len(self._latest) < KEYS_MAX:
            # A stored time is only replaced by a later one, so one in the future would stay.
            with contextlib.suppress(DaybookError):
                self._latest[key_id] = self._checked_clock()

    async def flush(self) -> None:
        """Writes the collected uses. Keeps them for the next write if this one fails or is cancelled."""
        uses, self._latest = self._latest, {}
        if not uses:
            return
        try:
            await self._store.record_uses(uses)
        except BaseException:
            self._latest = {**uses, **self._latest}
            raise

    @contextlib.asynccontextmanager
    async def flushing(self) -> AsyncIterator[None]:
        """Writes every FLUSH_SECONDS until the end of the block, and a last time there."""
        try:
            async with repeating(self.flush, FLUSH_SECONDS, _FAILURE):
                yield
        finally:
            await attempt(self.flush, _FAILURE)
