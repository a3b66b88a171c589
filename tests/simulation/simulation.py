"""One simulation: the servers, clients and faults of one seed."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from contextvars import Context
from dataclasses import dataclass, replace
from functools import cache
from random import Random
from typing import Any
from unittest.mock import patch

from daybook.v1.account_pb2 import Account
from daybook.v1.transaction_pb2 import Transaction
from structlog.testing import capture_logs

from server.book import composed
from server.ledger.access import ADMIN, Caller
from server.ledger.accounts import AccountRecord
from server.ledger.audit import Finding
from server.ledger.idempotency import Request
from server.ledger.instants import Instant
from server.ledger.money import Millionths
from server.ledger.names import RandomBytes
from server.ledger.posting import Draft
from server.store.migrate import migrate
from server.transport.auth import KEY_CACHED_SECONDS_MAX
from server.usecases import transactions
from server.usecases.transactions import NewTransaction
from tests.simulation.books import HOUR_ANCHOR, CommitTimes, Effect, Violation
from tests.simulation.client import CASH_KEY, MAIN_KEY, Client
from tests.simulation.disk import Disk
from tests.simulation.faults import PROFILES, FaultInjector
from tests.simulation.keys import KEYS, KeyInUse, check_key
from tests.simulation.loop import SimulatedLoop, Stuck
from tests.simulation.model import Intent, Model
from tests.simulation.process import Process, SimulatedDatabase, is_killed
from tests.simulation.reads import READS
from tests.simulation.writes import GRANT, WRITES
from tests.support.clock import NOON

LIMITS: dict[str, Millionths] = {"cash": 0, "credit": 40_000_000, "small": 10_000_000}
"""The accounts that exist at the start, with their credit limits."""
OPENING: Millionths = 40_000_000
"""The balance of each account at the start."""
SECONDS_WITHOUT_FAULTS_MAX = 600
"""Virtual seconds within which every client finishes once faults have ended."""
DISTURBANCES_MAX = 12


@dataclass(frozen=True)
class Outcome:
    """The end of a simulation."""

    seed: int
    digest: str
    """Covers the schedule, the order of all callbacks, and all stored books."""
    problem: str | None
    """The violated invariant, or the error that no injected fault explains; None if there is neither."""
    is_crash: bool
    """Whether the problem is such an error."""
    schedule: list[tuple[Any, ...]]
    """The events: each with its time in microseconds."""
    commits: int


@cache
def _prepared() -> tuple[Disk, bytes]:
    """The one database of this process, and its content at the start of every simulation."""
    disk = Disk()
    loop = SimulatedLoop(Random(0), disorder=0, step_microseconds=0)
    loop.run_until_complete(_prepare(disk, Random(0).randbytes))
    loop.close()
    return disk, disk.image()


async def _prepare(disk: Disk, random_bytes: RandomBytes) -> None:
    """Creates the schema, a tenant, its API key and its accounts."""
    database = SimulatedDatabase(disk)
    await migrate(database)
    async with composed(database, lambda: NOON, random_bytes) as book:
        tenant = await book.credentials.create_tenant(slug="house", uid="house", display_name="House", create_time=NOON)
        await book.credentials.ensure_token_key(random_bytes(32), NOON)
        caller = Caller(tenant, "house", "", scopes=frozenset({ADMIN}))
        for name, limit in LIMITS.items():
            record = AccountRecord(name, Account.SPACE, f"account {name}", limit, b"")
            await book.accounts.create(caller, record, Request("", b""), hour_anchor=HOUR_ANCHOR)
            details = Transaction(description=f"opening of {name}")
            draft = Draft(GRANT, "credit_package", OPENING)
            await book.transactions.create(caller, NewTransaction(name, draft, details, Request("", b"")))
        cash = await book.accounts.get(caller, "cash")
        for key, account_number in ((MAIN_KEY, None), (CASH_KEY, cash.number)):
            key_id, _, secret = key.partition(".")
            await book.credentials.create_api_key(
                key_id=key_id,
                secret_hash=hashlib.sha256(secret.encode()).digest(),
                tenant_number=tenant,
                account_number=account_number,
                create_time=NOON,
                scopes={ADMIN},
            )


class Simulation:
    """The servers, clients and faults of one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random = Random(seed)
        self.disk, image = _prepared()
        self.disk.load(image)
        self.loop = SimulatedLoop(
            Random(random.getrandbits(64)),
            disorder=random.choice((0.0, 0.2, 0.9)),
            step_microseconds=random.choice((0, 1, 1, 150)),
        )
        self.loop.is_killed = is_killed
        self._schedule: list[tuple[Any, ...]] = []
        self._problem: str | None = None
        self._is_crash = False
        self._commits = 0
        self.pace = random.choice((0.001, 0.05, 0.5, 0.5, 4.0))
        """The average time between two actions of a client, in seconds."""
        profile = random.choice(tuple(PROFILES))
        interleaves = random.random() < 0.6
        self.faults = FaultInjector(
            Random(random.getrandbits(64)),
            PROFILES[profile],
            self.note,
            interleaves=interleaves,
            delay_seconds_max=3 * min(1.0, self.pace),
        )
        self.names = ["A", "B", "C"][: random.choice((2, 2, 3))]
        """The names of the servers."""
        self.processes: dict[str, Process] = {}
        """The newest process of each server."""
        self._ended_processes: list[Process] = []
        self.clock_error_max: Instant = random.choice((0, 0, 300_000, 4_000_000))
        """How far the clocks of servers are off at most."""
        self._clock_errors = dict.fromkeys(self.names, 0)
        openings = [Intent(f"opening of {name}", name, "", (Effect(name, GRANT, OPENING),)) for name in LIMITS]
        accounts = [Intent(f"account {name}", name, "", (), limit) for name, limit in LIMITS.items()]
        self.model = Model(self.disk, NOON, [*accounts, *openings])
        self.keys: list[KeyInUse] = []
        """API keys that clients created."""
        self.faults_ended = False
        self._is_over = False
        self.note("seed", seed, "faults", profile, "servers", *self.names, "interleaved" if interleaves else "in turn")

    @property
    def now(self) -> Instant:
        """The time of the simulation."""
        return NOON + self.loop.microseconds

    def clock(self, name: str) -> Instant:
        """The time that the clock of a server shows."""
        return self.now + self._clock_errors[name]

    def note(self, *event: object) -> None:
        """Adds an event to the schedule."""
        self._schedule.append((self.loop.microseconds, *event))

    def _fail(self, problem: str, *, is_crash: bool = False) -> None:
        if self._problem is None and not self._is_over:
            self._problem, self._is_crash = problem, is_crash
            self.note("VIOLATION", problem)
        self.loop.stop()

    def crash(self, error: Exception) -> None:
        """Ends the simulation because of an error that no injected fault explains."""
        self._fail(f"an error that no injected fault explains: {error!r}", is_crash=True)

    @contextmanager
    def checking(self) -> Iterator[None]:
        """Ends the simulation at a Violation, and at an error of the simulation itself."""
        try:
            yield
        except Violation as violation:
            self._fail(str(violation))
        except Exception as error:
            self.crash(error)

    def run(self) -> Outcome:
        """Runs to the end, or to the first problem."""
        try:
            self.loop.run_until_complete(self._play())
        except Stuck as stuck:
            self._fail(str(stuck))
        except RuntimeError:
            # The loop was stopped at a problem.
            if self._problem is None:
                raise
        digest = hashlib.sha256(repr((self.loop.digest, self._schedule)).encode())
        for table in ("transactions", "lots", "requests", "account_states"):
            digest.update(repr(self.disk.rows(f"SELECT * FROM {table}")).encode())  # noqa: S608  # names of tables
        self._is_over = True
        for process in (*self._ended_processes, *self.processes.values()):
            process.is_halted = True
        self.loop.close()
        return Outcome(self.seed, digest.hexdigest(), self._problem, self._is_crash, self._schedule, self._commits)

    async def _play(self) -> None:
        for name in self.names:
            self._start(name)
        clients = [Client(self, f"client-{i}") for i in range(self.random.randint(2, 4))]
        actions = (*WRITES, *READS, *KEYS)
        working = [asyncio.create_task(client.work(self.random.randint(3, 8), actions)) for client in clients]
        disturbing = asyncio.create_task(self._disturb())
        await asyncio.wait(working, timeout=40 * self.pace)
        disturbing.cancel()
        self.note("faults end")
        self.faults_ended = True
        self.faults.stop()
        _, pending = await asyncio.wait(working, timeout=SECONDS_WITHOUT_FAULTS_MAX)
        if pending:
            self._fail(f"{len(pending)} clients get no answer")
        with self.checking():
            await self._finish(clients)

    async def _disturb(self) -> None:
        """Kills and stops servers, adds page-token keys, starts sweeps and steps clocks."""
        random, dies = self.random, self.faults.rates.dies
        for _ in range(DISTURBANCES_MAX):
            await asyncio.sleep(random.random() * 4 * self.pace)
            process = self.processes[random.choice(self.names)]
            match random.randrange(6):
                case 0 if random.random() < 10 * dies:
                    process.kill("by an operator")
                case 1 if dies and process.serving is not None:
                    self.note(process.name, "is stopped by an operator")
                    process.stop()
                case 2 if process.serving is not None and random.random() < 0.3:
                    self.note(process.name, "adds a page-token key")
                    credentials = process.serving.book.credentials
                    process.run_apart(credentials.add_token_key(random.randbytes(32), process.clock()))
                case 3 if process.serving is not None:
                    process.run_apart(process.serving.book.expirations.sweep())
                case 4 if not process.transactions:
                    error = random.randint(-self.clock_error_max, self.clock_error_max)
                    self._clock_errors[process.name] = error

    async def _finish(self, clients: Sequence[Client]) -> None:
        """Checks what holds at the end: by the model, by calls of a client, and by the ledger's own audit."""
        await asyncio.sleep(KEY_CACHED_SECONDS_MAX)
        process = self.processes[self.names[0]]
        while process.serving is None:
            await asyncio.sleep(0.1)
            process = self.processes[self.names[0]]
        last_client = Client(self, "last-client")
        for key in (*self.keys, *self.keys):
            await check_key(last_client, key)
        for client in clients:
            for mutation in tuple(client.acknowledged):
                await client.mutate(mutation)
        for read in READS:
            await last_client.work(1, [read])
        now = process.clock()
        await process.serving.book.expirations.sweep()
        self.model.finish(now)
        async with aclosing(process.serving.book.verification.verify_all(None)) as events:
            async for event in events:
                if isinstance(event, Finding):
                    raise Violation(f"the audit finds {event}")

    def _start(self, name: str) -> None:
        if self._is_over:
            return
        self.processes[name] = Process(self, name)

    def ended(self, process: Process) -> None:
        """Starts a new process of a server after a while."""
        self._ended_processes.append(process)
        self.loop.call_later(self.random.random() * 4 * self.pace, self._start, process.name, context=Context())

    def committed(self, process: Process, began: Instant, began_by_clock: Instant) -> None:
        """Checks a commit; the transaction began at this time of the simulation and of the server's clock."""
        clock = process.clock()
        self._commits += 1
        with self.checking():
            self.model.follow(CommitTimes(min(began_by_clock, clock), max(began_by_clock, clock), began, self.now))


def simulate(seed: int) -> Outcome:
    """Runs the simulation of a seed."""
    # So small that an export takes several reads, between which others post.
    with patch.object(transactions, "EXPORTED_AT_ONCE", 3), capture_logs() as logs:
        simulation = Simulation(seed)
        outcome = simulation.run()
    errors = [entry for entry in logs if entry["log_level"] == "error"]
    if outcome.problem is None and errors and not simulation.faults.explains_internal_failures:
        return replace(
            outcome, problem=f"a server logs an error that no injected fault explains: {errors[0]}", is_crash=True
        )
    return outcome
