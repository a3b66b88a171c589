"""The poster: the one place that commits transactions.

Whatever calls are waiting become one database transaction, because a durable commit costs
the same for one call as for hundreds. Each call still succeeds or is refused by itself,
and gets its answer only after the commit.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any, Generic, TypeVar
from uuid import UUID

import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from server.ledger.errors import DaybookError, InternalFailure, NotStorable, ServiceUnavailable, TooBusy
from server.ledger.instants import EARLIEST, SECOND, Clock, Instant
from server.ledger.names import RandomBytes, in_blocks
from server.store.database import Database
from server.store.failures import Conflict
from server.store.requests import AnswerKey
from server.store.unit import Attempt, ExpirationsFirst, Unit
from server.store.unit_store import load_openers, load_unit, save_unit

log = structlog.get_logger(__name__)

AHEAD_SECONDS = 60
"""How far an account's newest create_time may be ahead of the clock before that is logged, in seconds."""
LINE_CALLS_MAX = 2048
"""How many calls may wait; the next one is told to come again."""
GROUP_TRANSACTIONS_MAX = 2048
"""How many transactions one commit has at most, unless a single call brings more."""

_POSTPONED = object()
"""The outcome of a call that waits for the next database transaction."""
EACH_SECONDS_MAX = 5.0
"""How long the calls of a group that failed together are tried one by one, in seconds."""

Result = TypeVar("Result")


class Command(ABC, Generic[Result]):
    """A call that posts."""

    @property
    @abstractmethod
    def account_numbers(self) -> Collection[int]:
        """The accounts that it posts to."""

    @property
    def answer_keys(self) -> Collection[AnswerKey]:
        """The requests that it may have been before."""
        return ()

    @property
    def fresh_keys(self) -> Collection[AnswerKey]:
        """The requests that it is not likely to have been before: looked for once it could not be committed."""
        return ()

    @property
    def charge_keys(self) -> Collection[tuple[int, UUID]]:
        """The transactions that it wants refunded, by account and uid."""
        return ()

    @property
    def transaction_count(self) -> int:
        """How many transactions it posts, about."""
        return 1

    @abstractmethod
    def run(self, attempt: Attempt, now: Instant) -> Result:
        """Applies the rules. What it raises, the caller gets, and nothing of it stays."""


class PosterObserver:
    """Told what the poster does. This one takes no notice; others override what they want to know."""

    def origin(self) -> Any:
        """A call enters the line; what this gives, `posting` is told of it."""

    def refused(self) -> None:
        """The line was too full for a call."""

    def posting(self, origins: Sequence[Any]) -> AbstractContextManager[None]:
        """Entered while a group of calls is posted and committed; left with an exception if it could not be."""
        del origins
        return nullcontext()


@dataclass(frozen=True, slots=True)
class _Call:
    command: Command[Any]
    outcome: asyncio.Future[Any]
    origin: Any


def _may_be_of_one_call(error: Exception) -> bool:
    """Whether the other calls of a group may succeed without the one that the error is about."""
    if isinstance(error, ServiceUnavailable):
        return error.is_partial
    return not isinstance(error, DaybookError) or isinstance(error, NotStorable)


class Poster:
    """Posts what calls hand in, in the order in which they come."""

    def __init__(self, database: Database, clock: Clock, random_bytes: RandomBytes) -> None:
        """The clock may raise ClockSkewed, by which a group is refused."""
        self._database = database
        self._clock = clock
        self._random_bytes = in_blocks(random_bytes)
        self.observer = PosterObserver()
        self.newest_create_time: Instant = EARLIEST
        """The newest create_time that an account had when it was posted to."""
        self._line: asyncio.Queue[_Call | None] = asyncio.Queue(LINE_CALLS_MAX)
        self._is_closing = False

    @property
    def line_length(self) -> int:
        """How many calls wait, beside those that are being posted."""
        return self._line.qsize()

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Posts until the end of the block; what is in the line by then is still posted."""
        worker = asyncio.create_task(self._work())
        try:
            yield
        finally:
            self._is_closing = True
            await self._line.put(None)
            await worker

    @contextmanager
    def observed(self, observer: PosterObserver) -> Iterator[None]:
        """Tells another observer of everything until the end of the block."""
        before, self.observer = self.observer, observer
        try:
            yield
        finally:
            self.observer = before

    async def submit(self, command: Command[Result]) -> Result:
        """Waits until the command is posted and on disk, and gives its result.

        Raises what the command refuses, TooBusy if the line is full, ClockSkewed, and
        ServiceUnavailable.
        A caller who goes away doesn't call the command back.
        """
        if self._is_closing:
            raise ServiceUnavailable
        call = _Call(command, asyncio.get_running_loop().create_future(), self.observer.origin())
        try:
            self._line.put_nowait(call)
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
            while is_open and transaction_count < GROUP_TRANSACTIONS_MAX and not (group and self._line.empty()):
                call = await self._line.get()
                if call is None:
                    is_open = False
                    break
                group.append(call)
                transaction_count += call.command.transaction_count
            if group:
                postponed = await self._post(group)

    async def _post(self, group: list[_Call]) -> list[_Call]:
        """Answers the calls once they are committed; gives those that wait for the next database transaction."""
        tries = count()
        may_be_committed = False

        def run(connection: Connection) -> list[Any]:
            nonlocal may_be_committed
            may_be_committed = False
            outcomes = self._run(connection, group, is_first_try=next(tries) == 0)
            may_be_committed = True
            return outcomes

        try:
            with self.observer.posting([call.origin for call in group]):
                outcomes = await self._database.transact(run)
        except Exception as error:
            if not isinstance(error, DaybookError):
                log.exception("group failed", calls=len(group))
            if may_be_committed:
                # To post these again could post them twice. Callers repeat them by their request ids.
                outcomes = [ServiceUnavailable()] * len(group)
            elif len(group) > 1 and _may_be_of_one_call(error):
                return await self._post_each(group)
            else:
                outcomes = [error if isinstance(error, DaybookError) else InternalFailure()] * len(group)
        postponed = []
        for call, outcome in zip(group, outcomes, strict=True):
            if outcome is _POSTPONED:
                postponed.append(call)
                continue
            if call.outcome.done():
                continue
            if isinstance(outcome, Exception):
                call.outcome.set_exception(outcome)
            else:
                call.outcome.set_result(outcome)
        return postponed

    async def _post_each(self, group: list[_Call]) -> list[_Call]:
        """Posts each call in a database transaction of its own, so that one does not take the others down with it.

        Gives the calls that wait for the next database transaction. Refuses what is left after
        EACH_SECONDS_MAX, because all other calls wait meanwhile.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + EACH_SECONDS_MAX
        postponed: list[_Call] = []
        busy: set[int] = set()
        for call in group:
            numbers = call.command.account_numbers
            if not busy.isdisjoint(numbers):
                # Behind an earlier call of the same account.
                postponed.append(call)
                busy.update(numbers)
            elif loop.time() < end:
                if await self._post([call]):
                    postponed.append(call)
                    busy.update(numbers)
            elif not call.outcome.done():
                call.outcome.set_exception(ServiceUnavailable())
        return postponed

    def _note_newest(self, unit: Unit, now: Instant) -> None:
        """Logs one warning when an account is ahead of the clock, and the next only after the clock has passed it."""
        newest = max((stored.state.last_create_time for stored in unit.states.values()), default=EARLIEST)
        before, ahead = self.newest_create_time, now + AHEAD_SECONDS * SECOND
        if before <= ahead < newest:
            log.warning(
                "an account's newest transaction is ahead of the clock: its new ones repeat that create_time",
                ahead_seconds=(newest - now) / SECOND,
            )
        self.newest_create_time = max(newest, before)

    def _run(self, connection: Connection, group: list[_Call], *, is_first_try: bool) -> list[Any]:
        """Gives each call's result or refusal, or _POSTPONED. They hold once the caller has committed."""
        commands = [call.command for call in group]
        answer_keys = {key for command in commands for key in command.answer_keys}
        if not is_first_try:
            answer_keys.update(key for command in commands for key in command.fresh_keys)
        unit = load_unit(
            connection,
            {number for command in commands for number in command.account_numbers},
            answer_keys,
            {key for command in commands for key in command.charge_keys},
            self._random_bytes,
        )
        # Read only now that the accounts are locked: what was posted to them before has an earlier time.
        now = self._clock()
        self._note_newest(unit, now)
        load_openers(connection, unit, now)
        outcomes: list[Any] = []
        # Accounts with calls that are postponed; later calls of theirs stay behind those.
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
                # As many as one database transaction posts, beside the calls of other accounts.
                attempt = Attempt(unit)
                attempt.expire(overdue.account_number, overdue.time)
                attempt.accept()
            else:
                attempt.accept()
        try:
            save_unit(connection, unit)
        except IntegrityError:
            if is_first_try and any(command.fresh_keys for command in commands):
                # A request that was not looked for was there before.
                raise Conflict from None
            raise
        return outcomes
