"""Faults: the seed decides what each operation on the database and each call suffers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from server.ledger.errors import ServiceUnavailable
from server.store.failures import Conflict, UnexpectedDatabaseError
from tests.simulation.disk import Transaction


@dataclass(frozen=True)
class FaultRates:
    """The share of operations that suffer each fault."""

    delayed: float = 0
    fails: float = 0
    """Of reads and transactions. The transaction fails at one of its statements or at its commit."""
    conflicts: float = 0
    """Of transactions that are rolled back because of a write conflict."""
    lost: float = 0
    """Of transactions that are committed, but whose answer is lost."""
    dies: float = 0
    """Of operations at which the process dies; half of the transactions are committed then."""
    cancelled: float = 0
    """Of calls that their client cancels."""


PROFILES = {
    "none": FaultRates(),
    "slow": FaultRates(delayed=0.3, cancelled=0.05),
    "few": FaultRates(delayed=0.1, fails=0.04, conflicts=0.04, lost=0.04, dies=0.01, cancelled=0.05),
    "many": FaultRates(delayed=0.3, fails=0.12, conflicts=0.1, lost=0.12, dies=0.03, cancelled=0.15),
    "deaths": FaultRates(delayed=0.1, lost=0.02, dies=0.08, cancelled=0.05),
}
"""One of these applies to a whole simulation."""


class FaultInjector:
    """Draws the faults of one simulation."""

    def __init__(
        self,
        random: Random,
        rates: FaultRates,
        note: Callable[..., None],
        *,
        interleaves: bool,
        delay_seconds_max: float,
    ) -> None:
        """`note` adds an event to the schedule; `interleaves` says whether transactions run interleaved."""
        self.random = random
        self.rates = rates
        self.note = note
        self._interleaves = interleaves
        self._delay_seconds_max = delay_seconds_max
        self.explains_internal_failures = False
        """Whether an injected error makes a server answer INTERNAL_FAILURE."""

    def stop(self) -> None:
        """Injects no fault from now on."""
        self.rates = FaultRates()

    def happens(self, share: float) -> bool:
        """Draws one number for any share, so that profiles differ in nothing else."""
        return self.random.random() < share

    async def delay(self) -> None:
        """Perhaps waits, mostly for less than a millisecond."""
        if self.happens(self.rates.delayed):
            await asyncio.sleep(self.random.random() * self._delay_seconds_max * 10 ** self.random.uniform(-5.5, 0))

    def _pause_seconds(self) -> float | None:
        return self.random.random() * 0.01 if self.happens(0.4) else None

    def transaction(self, process: str) -> Transaction:
        """A database transaction of a process, with the fault that it suffers."""
        drawn = Transaction(self._pause_seconds if self._interleaves else None)
        if self.happens(self.rates.fails):
            drawn.failure = self.random.choice(
                (ServiceUnavailable(), ServiceUnavailable(is_partial=True), UnexpectedDatabaseError("simulated"))
            )
            drawn.fails_at = self.random.choice((1, 2, 3, 4, 6, 8, None))
            self.explains_internal_failures |= isinstance(drawn.failure, UnexpectedDatabaseError)
        elif self.happens(self.rates.conflicts):
            drawn.failure = Conflict()
            drawn.fails_at = self.random.choice((1, 4, None))
        if drawn.failure is not None:
            where = "its commit" if drawn.fails_at is None else f"statement {drawn.fails_at}"
            self.note(process, "will fail at", where, "with", type(drawn.failure).__name__)
        return drawn
