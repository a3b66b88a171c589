"""The poster: the one place that commits transactions.

All waiting commands become one database transaction (group commit), because a durable commit
costs the same for one command as for hundreds. Each command still succeeds or is refused
independently, and is answered only after the commit.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from uuid import UUID

import structlog

from server.ledger.errors import DaybookError, InternalFailure, NotStorable, ServiceUnavailable, TooBusy
from server.ledger.idempotency import AnswerKey
from server.ledger.instants import EARLIEST, SECOND, Clock, Instant
from server.ledger.names import RandomBytes, in_blocks
from server.posting.unit import Attempt, ExpirationsFirst, Unit
from server.store.database import Database
from server.store.units import DatabaseTransaction, load, load_openers, save

log = structlog.get_logger(__name__)

AHEAD_SECONDS = 60
"""The lead of an account's newest create_time over the clock above which a warning is logged, in seconds."""
QUEUE_LENGTH_MAX = 2048
"""The largest number of waiting commands; a further command is refused with TooBusy."""
GROUP_TRANSACTIONS_MAX = 2048
"""The largest number of transactions of one commit, unless a single command has more."""
EACH_SECONDS_MAX = 5.0
"""Time limit for posting the commands of a failed group one by one, in seconds."""

_POSTPONED = object()
"""The outcome of a command that waits for the next database transaction."""

Result = TypeVar("Result")


class Command(ABC, Generic[Result]):
    """A mutation of accounts."""

    @property
    @abstractmethod
    def account_numbers(self) -> Collection[int]:
        """The accounts that it posts to."""

    @property
    def answer_keys(self) -> Collection[AnswerKey]:
        """The requests whose stored answers it needs."""
        return ()

    @property
    def charge_keys(self) -> Collection[tuple[int, UUID]]:
        """The transactions that it refunds, by account and uid."""
        return ()

    @property
    def transaction_count(self) -> int:
        """The approximate number of transactions that it posts."""
        return 1

    @abstractmethod
    def run(self, attempt: Attempt, now: Instant) -> Result:
        """Applies the rules. An exception drops the attempt, and is the caller's refusal."""


class PosterObserver:
    """Hooks for metrics and traces; no-ops by default."""

    def origin(self) -> Any:
        """A command enters the queue. The value is passed to `posting`."""

    def refused(self) -> None:
        """The queue was full."""

    def posting(self, origins: Sequence[Any]) -> AbstractContextManager[None]:
        """Entered while a group of commands is posted and committed; left with an exception if that fails."""
        del origins
        return nullcontext()


@dataclass(frozen=True, slots=True)
class _Call:
    command: Command[Any]
    outcome: asyncio.Future[Any]
    origin: Any

    def settle(self, outcome: Any) -> None:
        """Answers the caller, unless it was cancelled."""
        if self.outcome.done():
            return
        if isinstance(outcome, Exception):
            self.outcome.set_exception(outcome)
        else:
            self.outcome.set_result(outcome)


def _may_be_of_one_call(error: Exception) -> bool:
    """Whether one call may have caused the error of a group, so that the others may succeed without it."""
    if isinstance(error, ServiceUnavailable):
        return error.is_partial
    return not isinstance(error, DaybookError) or isinstance(error, NotStorable)


class Poster:
    """Posts commands in the order of their arrival."""

    def __init__(self, database: Database, clock: Clock, random_bytes: RandomBytes) -> None:
        """The clock may raise ClockSkewed, which refuses the group."""
        self._database = database
        self._clock = clock
        self._random_bytes = in_blocks(random_bytes)
        self.observer = PosterObserver()
        self.newest_create_time: Instant = EARLIEST
        """The newest create_time of the accounts posted to since the start."""
        self._queue: asyncio.Queue[_Call | None] = asyncio.Queue(QUEUE_LENGTH_MAX)
        self._is_closing = False

    @property
    def queue_length(self) -> int:
        """The number of commands that wait, without the group that is being posted."""
        return self._queue.qsize()

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Posts until the end of the block, and then the commands left in the queue."""
        worker = asyncio.create_task(self._work())
        try:
            yield
        finally:
            self._is_closing = True
            await self._queue.put(None)
            await worker

    @contextmanager
    def observed(self, observer: PosterObserver) -> Iterator[None]:
        """Replaces the observer until the end of the block."""
        replaced, self.observer = self.observer, observer
        try:
            yield
        finally:
            self.observer = replaced

    async def submit(self, command: Command[Result]) -> Result:
        """Returns the command's result once it is on disk.

        Raises the command's refusals, TooBusy if the queue is full, ClockSkewed, and
        ServiceUnavailable. A cancelled caller does not cancel the command.
        """
        if self._is_closing:
            raise ServiceUnavailable
        call = _Call(command, asyncio.get_running_loop().create_future(), self.observer.origin())
        try:
            self._queue.put_nowait(call)
        except asyncio.QueueFull:
            self.observer.refused()
            raise TooBusy from None
        result: Result = await call.outcome
        return result

    async def _work(self) -> None:
        is_open = True
        postponed: list[_Call] = []
        while is_open or postponed:
            group, postponed = postponed, []
            transaction_count = sum(call.command.transaction_count for call in group)
            while is_open and transaction_count < GROUP_TRANSACTIONS_MAX and not (group and self._queue.empty()):
                call = await self._queue.get()
                if call is None:
                    is_open = False
                    break
                group.append(call)
                transaction_count += call.command.transaction_count
            if group:
                postponed = await self._post(group)

    async def _post(self, group: list[_Call]) -> list[_Call]:
        """Settles the calls once they are committed; returns those that wait for the next database transaction."""
        may_be_committed = False

        def run(connection: DatabaseTransaction) -> list[Any]:
            nonlocal may_be_committed
            may_be_committed = False
            outcomes = self._run(connection, [call.command for call in group])
            may_be_committed = True
            return outcomes

        try:
            with self.observer.posting([call.origin for call in group]):
                outcomes = await self._database.transact(run)
        except Exception as error:
            if not isinstance(error, DaybookError):
                log.exception("group commit failed", calls=len(group))
            if may_be_committed:
                # A second attempt could post these twice. Callers repeat them with the same request_id.
                outcomes = [ServiceUnavailable()] * len(group)
            elif len(group) > 1 and _may_be_of_one_call(error):
                return await self._post_each(group)
            else:
                outcomes = [error if isinstance(error, DaybookError) else InternalFailure()] * len(group)
        postponed = []
        for call, outcome in zip(group, outcomes, strict=True):
            if outcome is _POSTPONED:
                postponed.append(call)
            else:
                call.settle(outcome)
        return postponed

    async def _post_each(self, group: list[_Call]) -> list[_Call]:
        """Posts each call in a database transaction of its own, so that one can't make the others fail.

        Returns the calls that wait for the next database transaction. Refuses the calls left after
        EACH_SECONDS_MAX, because the whole queue waits meanwhile.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + EACH_SECONDS_MAX
        postponed: list[_Call] = []
        busy: set[int] = set()
        for call in group:
            numbers = call.command.account_numbers
            if not busy.isdisjoint(numbers):
                # An earlier call of the same account waits.
                postponed.append(call)
                busy.update(numbers)
            elif loop.time() < end:
                if await self._post([call]):
                    postponed.append(call)
                    busy.update(numbers)
            else:
                call.settle(ServiceUnavailable())
        return postponed

    def _run(self, connection: DatabaseTransaction, commands: Sequence[Command[Any]]) -> list[Any]:
        """Returns each command's result, refusal or _POSTPONED. They are valid once the caller has committed."""
        loaded = load(
            connection,
            {number for command in commands for number in command.account_numbers},
            {key for command in commands for key in command.answer_keys},
            {key for command in commands for key in command.charge_keys},
        )
        unit = Unit(loaded, self._random_bytes)
        # Read after the accounts are locked: their earlier transactions read the clock earlier.
        now = self._clock()
        self._warn_if_ahead(unit, now)
        load_openers(connection, loaded, now)
        outcomes: list[Any] = []
        # Accounts with postponed commands, whose later commands must wait too.
        busy: set[int] = set()
        for command in commands:
            if not busy.isdisjoint(command.account_numbers):
                busy.update(command.account_numbers)
                outcomes.append(_POSTPONED)
                continue
            attempt = Attempt(unit)
            try:
                outcomes.append(command.run(attempt, now))
            except DaybookError as refusal:
                outcomes.append(refusal)
            except ExpirationsFirst as overdue:
                busy.update(command.account_numbers)
                outcomes.append(_POSTPONED)
                # Posts some of the expirations now, with the commands of other accounts.
                attempt = Attempt(unit)
                attempt.expire(overdue.account_number, overdue.time)
                attempt.accept()
            else:
                attempt.accept()
        save(connection, loaded, unit.changes)
        return outcomes

    def _warn_if_ahead(self, unit: Unit, now: Instant) -> None:
        """Logs a warning if an account is ahead of the clock; the next one only after the clock has caught up."""
        newest = max((stored.state.last_create_time for stored in unit.loaded.states.values()), default=EARLIEST)
        ahead = now + AHEAD_SECONDS * SECOND
        if self.newest_create_time <= ahead < newest:
            log.warning("account ahead of clock", ahead_seconds=(newest - now) / SECOND)
        self.newest_create_time = max(newest, self.newest_create_time)
