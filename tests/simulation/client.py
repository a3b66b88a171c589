"""A client: it repeats calls of unknown outcome until it has an answer, and checks each answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, TypeAlias

from daybook.v1.ledger_service_pb2 import GetBalanceRequest

from server.ledger.errors import CredentialInvalid, DaybookError, InternalFailure
from server.ledger.instants import Instant
from server.store.failures import UnexpectedDatabaseError
from tests.simulation.books import Violation
from tests.simulation.model import Intent
from tests.simulation.process import ConnectionLost

if TYPE_CHECKING:
    from tests.simulation.simulation import Simulation

MAIN_KEY = "11111111111111111111.main-secret"
"""The API key that clients use; it has every scope and is never revoked."""
CASH_KEY = "22222222222222222222.cash-secret"
"""An API key of the account `cash` alone, as Nebula Block's clients have."""
CALLS_WITHOUT_FAULTS_MAX = 150
"""Number of calls that a client makes at most once faults have ended: it has little left to do then."""
LACKS = ("INSUFFICIENT_CREDITS", "REFUND_EXCEEDS_CHARGE")
"""Reasons of refusals that depend on the state of the account."""
UNKNOWN = ("SERVICE_UNAVAILABLE", "INTERNAL_FAILURE")
"""Reasons that leave the outcome of a call unknown."""

Bodies: TypeAlias = Callable[[bytes], Iterable[bytes]]
"""The serialized transactions in an answer."""


class Refused(Exception):
    """The ledger refuses a call for a reason of its contract."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Unknown(Exception):
    """The outcome of a call is unknown."""


@dataclass(frozen=True)
class Mutation:
    """A mutation as a client calls it."""

    intent: Intent
    method: str
    request: Any
    bodies: Bodies
    check: Callable[[Instant], None] | None = None
    """Checks a refusal of a call that began at this time against the state of the account."""


class Client:
    """One client, which does one thing after the other."""

    def __init__(self, world: Simulation, name: str) -> None:
        self.world = world
        self.name = name
        self.random = Random(world.random.getrandbits(64))
        self.acknowledged: list[Mutation] = []
        """Mutations with a request_id that have an answer."""
        self.count = 0
        """Number of tags."""
        self._calls_without_faults = 0

    async def work(self, count: int, actions: Sequence[tuple[Callable[[Client], Awaitable[None]], int]]) -> None:
        """Does `count` of the actions, picked by their weights."""
        choices, weights = zip(*actions, strict=True)
        for _ in range(count):
            await self.rest()
            (action,) = self.random.choices(choices, weights)
            with self.world.checking():
                try:
                    await action(self)
                except Refused as refusal:
                    raise Violation(f"{action.__name__} is refused for {refusal.reason}") from None

    async def rest(self) -> None:
        """Waits for a random time."""
        await asyncio.sleep(self.random.random() * 2 * self.world.pace)

    def new_tag(self) -> str:
        """A text that is unique within the simulation."""
        self.count += 1
        return f"{self.name}.{self.count}"

    def pick_account(self) -> str:
        """One of the accounts that all clients share."""
        return self.random.choice(("cash", "credit", "small"))

    async def call(self, service: str, method: str, request: Any, key: str = MAIN_KEY) -> bytes:
        """Calls any server; gives the serialized answer. Raises Refused, Unknown and Violation.

        A function in place of the request makes it.
        """
        world, faults = self.world, self.world.faults
        process = world.processes[self.random.choice(world.names)]
        if world.faults_ended:
            self._calls_without_faults += 1
            if self._calls_without_faults > CALLS_WITHOUT_FAULTS_MAX:
                raise Violation(f"{method} gets no answer although there are no faults")
        await faults.delay()
        cancel_after = None
        if faults.happens(faults.rates.cancelled):
            cancel_after = self.random.random() * 10 ** self.random.uniform(-6, 0)
        try:
            answer = await process.call(service, method, request() if callable(request) else request, key, cancel_after)
        except ConnectionLost:
            world.note(self.name, method, "loses its connection to", process.name)
            raise Unknown from None
        except DaybookError as error:
            world.note(self.name, method, error.message, "by", process.name)
            if error.reason == InternalFailure.reason and not faults.explains_internal_failures:
                world.crash(error)
            if error.reason in UNKNOWN:
                raise Unknown from None
            raise Refused(error.reason) from None
        except Exception as error:
            world.note(self.name, method, "fails at", process.name)
            if not isinstance(error, UnexpectedDatabaseError) or not faults.explains_internal_failures:
                world.crash(error)
            raise Unknown from None
        await faults.delay()
        world.note(self.name, method, "is answered by", process.name)
        return answer

    async def read(self, service: str, method: str, request: Any, key: str = MAIN_KEY) -> bytes:
        """Calls until there is an answer. Raises Refused."""
        while True:
            try:
                return await self.call(service, method, request, key)
            except Unknown:
                await self.rest()

    async def accepts(self, key: str) -> bool | None:
        """Whether a server accepts an API key; None if the outcome is unknown."""
        try:
            await self.call("Ledger", "GetBalance", GetBalanceRequest(name="accounts/cash/balance"), key)
        except Unknown:
            return None
        except Refused as refusal:
            if refusal.reason != CredentialInvalid.reason:
                raise
            return False
        return True

    async def mutate(self, mutation: Mutation) -> None:
        """Calls until the outcome is known. A mutation without a request_id is called once."""
        world, model, intent = self.world, self.world.model, mutation.intent
        while True:
            start = world.now
            intent.open_calls += 1
            try:
                answer = await self.call("Ledger", mutation.method, mutation.request)
            except Unknown:
                if not intent.request_id:
                    return
                await self.rest()
                continue
            except Refused as refusal:
                intent.open_calls -= 1
                model.refuse(intent, refusal.reason, start)
                check_reason(refusal.reason, intent, mutation.method)
                if mutation.check is not None and refusal.reason in LACKS:
                    mutation.check(start)
                if world.faults_ended or (not intent.open_calls and self.random.random() < 0.7):
                    return
                await self.rest()
                continue
            intent.open_calls -= 1
            model.acknowledge(intent, answer, mutation.bodies(answer))
            if intent.request_id:
                self.acknowledged.append(mutation)
            return


def check_reason(reason: str, intent: Intent, method: str) -> None:
    """Raises Violation for a reason that a method does not have."""
    allowed = {"INSUFFICIENT_CREDITS", "REQUEST_ID_REUSED"}
    if method == "RefundTransaction":
        allowed = {"REFUND_EXCEEDS_CHARGE"}
    if any(effect.expire_time is not None for effect in intent.effects):
        # Its expire_time may have come meanwhile.
        allowed.add("FIELD_INVALID")
    if reason not in allowed:
        raise Violation(f"{intent.tag}: {method} is refused for {reason}")
