"""Posts what has expired of accounts that nobody touches."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import structlog

from server.ledger.errors import DaybookError
from server.ledger.instants import SECOND, Clock, Instant
from server.posting.commands import Expire
from server.posting.poster import Poster
from server.store.accounts import AccountStore

log = structlog.get_logger(__name__)

SWEEP_SECONDS = 20.0
"""How long the sweep rests. What expires is posted within a minute."""
LOTS_AT_ONCE = 500
IMPORT_REST: Instant = 10 * 60 * SECOND
"""How long an account into which history was imported is left alone: more of it may come, and
must not be before an expiration."""


class Expirations:
    """Looks for lots that are past and has them posted."""

    def __init__(self, accounts: AccountStore, poster: Poster, clock: Clock) -> None:
        self._accounts = accounts
        self._poster = poster
        self._clock = clock
        self.last_sweep: Instant | None = None
        """When the last sweep began that came to its end."""
        self.lot_count = 0
        """How many lots were expired by sweeps."""

    async def sweep(self) -> int:
        """Posts every expiration that is due now; gives how many lots that were."""
        now = self._clock()
        total = 0
        while numbers := await self._accounts.due_accounts(now, IMPORT_REST, LOTS_AT_ONCE):
            expired = await asyncio.gather(*(self._poster.submit(Expire(number)) for number in numbers))
            total += sum(expired)
            self.lot_count += sum(expired)
            if not any(expired):
                # Another process was quicker, or this clock is behind; next time then.
                break
        self.last_sweep = now
        return total

    @contextlib.asynccontextmanager
    async def sweeping(self) -> AsyncIterator[None]:
        """Sweeps now and then until the end of the block."""
        task = asyncio.create_task(self._sweep_for_ever())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _sweep_for_ever(self) -> None:
        while True:
            try:
                lots = await self.sweep()
                if lots:
                    log.info("expired", lots=lots)
            except DaybookError as error:
                log.warning("sweep failed", reason=error.reason)
            except Exception:
                log.exception("sweep failed")
            await asyncio.sleep(SWEEP_SECONDS)
