"""Posts expirations of accounts that receive no other transaction."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import structlog

from server.background import repeating
from server.ledger.instants import SECOND, Clock, Instant
from server.posting.commands import Expire
from server.posting.poster import Poster
from server.store.accounts import AccountStore

log = structlog.get_logger(__name__)

SWEEP_SECONDS = 20.0
"""Time between two sweeps, in seconds, so that an expiration is posted within a minute."""
LOTS_AT_ONCE = 500
IMPORT_PAUSE: Instant = 10 * 60 * SECOND
"""Time for which sweeps skip an account after an import. More rows of its history may follow, and
an expiration posted now would refuse those older than it."""


class Expirations:
    """Finds expired lots and posts their expirations."""

    def __init__(self, accounts: AccountStore, poster: Poster, clock: Clock) -> None:
        self._accounts = accounts
        self._poster = poster
        self._clock = clock
        self.last_sweep: Instant | None = None
        """When the last complete sweep began."""
        self.lot_count = 0
        """Number of lots that sweeps have expired."""

    async def sweep(self) -> int:
        """Posts every expiration that is due now; returns the number of lots expired."""
        now = self._clock()
        total = 0
        while numbers := await self._accounts.due_accounts(now, IMPORT_PAUSE, LOTS_AT_ONCE):
            expired = await asyncio.gather(*(self._poster.submit(Expire(number)) for number in numbers))
            total += sum(expired)
            self.lot_count += sum(expired)
            if not any(expired):
                # Another process was quicker, or this clock is behind: the next sweep tries again.
                break
        self.last_sweep = now
        return total

    @contextlib.asynccontextmanager
    async def sweeping(self) -> AsyncIterator[None]:
        """Sweeps now, and then every SWEEP_SECONDS until the end of the block."""
        async with repeating(self._sweep_and_log, SWEEP_SECONDS, "sweep failed", at_once=True):
            yield

    async def _sweep_and_log(self) -> None:
        if lots := await self.sweep():
            log.info("expirations posted", lots=lots)
