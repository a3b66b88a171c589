"""When keys were last used: kept in memory, and written now and then."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import structlog

from server.ledger.errors import DaybookError
from server.ledger.instants import Clock, Instant
from server.store.credentials import CredentialStore

log = structlog.get_logger(__name__)

FLUSH_SECONDS = 30.0
"""How long uses rest in memory. What a list shows is late by that and a little more."""
KEYS_MAX = 10_000
"""How many keys are remembered between two writes; further ones wait for a use after it."""


class ApiKeyUses:
    """Remembers the last use of each key, so that no call has to write it."""

    def __init__(self, store: CredentialStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._latest: dict[str, Instant] = {}

    def note(self, key_id: str) -> None:
        """Remembers that a key is used now."""
        if key_id in self._latest or len(self._latest) < KEYS_MAX:
            self._latest[key_id] = self._clock()

    async def flush(self) -> None:
        """Writes what is remembered. What can't be written is remembered on."""
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
        """Writes now and then until the end of the block, and once more there."""
        task = asyncio.create_task(self._flush_for_ever())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await self._try_to_flush()

    async def _flush_for_ever(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            await self._try_to_flush()

    async def _try_to_flush(self) -> None:
        try:
            await self.flush()
        except DaybookError as error:
            log.warning("uses of keys not written", reason=error.reason)
        except Exception:
            log.exception("uses of keys not written")
