"""Several server processes on one database: the books stay correct under concurrency and database restarts."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import AsyncExitStack
from typing import Any, Literal

import grpc
import pytest
import pytest_asyncio
from daybook.v1.admin_service_pb2 import CreateApiKeyRequest, RevokeApiKeyRequest
from daybook.v1.api_key_pb2 import ApiKey
from daybook.v1.ledger_service_pb2 import GetAccountRequest, ListTransactionsRequest, TransferCreditsRequest
from daybook.v1.transaction_pb2 import Transaction
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from server.transport.auth import KEY_CACHED_SECONDS_MAX
from server.transport.readiness import ANSWER_SECONDS_MAX, CHECK_SECONDS
from tests.support.callers import Client
from tests.support.databases import PostgreSQL
from tests.support.ledgers import prepare
from tests.support.processes import Daybook, Ports, environment
from tests.support.refusals import read_refusal
from tests.support.waiting import SECONDS_MAX

GRANT, CHARGE = Transaction.GRANT, Transaction.CHARGE
CALLERS = 32
"""Concurrent callers of each process."""
CHARGES = 4
"""Charges of each caller on the shared account."""
AFFORDABLE = 100
PATIENCE_SECONDS = 20.0
"""Timeout of a call on a busy machine, in seconds. Longer than any wait in the server."""
WRITERS, READERS = 12, 4
MIGRATE = """
import asyncio, sys
from server.store.database import Database
from server.store.migrate import is_migrated, migrate

async def work():
    database = Database(sys.argv[1])
    print("ready", flush=True)
    sys.stdin.read()
    await migrate(database)
    assert await is_migrated(database)
    await database.close()

asyncio.run(work())
"""


def test_concurrent_starts_migrate_once(database_url: str) -> None:
    """Four processes that find an empty database at the same moment all succeed, and migrate it once."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MIGRATE, database_url],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(4)
    ]
    try:
        for each in processes:
            assert each.stdout is not None
            assert each.stdout.readline() == b"ready\n"
        for each in processes:
            assert each.stdin is not None
            each.stdin.close()
            each.stdin = None
        ends = [each.communicate(timeout=SECONDS_MAX) for each in processes]
    finally:
        for each in processes:
            each.kill()
            each.wait()
    assert [each.returncode for each in processes] == [0] * 4
    for printed, errors in ends:
        lines = [line for line in (printed + errors).splitlines() if b"waiting for migration lock" not in line]
        assert not lines


@pytest.fixture(scope="module")
def daybooks(postgresql: PostgreSQL, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Daybook], str]]:
    """Two processes that serve one PostgreSQL database, and a key with the scope `admin`."""
    name = f"test_{uuid.uuid4().hex}"
    postgresql.execute(f"CREATE DATABASE {name}")
    key = asyncio.run(prepare(postgresql.url(name)))
    folder = tmp_path_factory.mktemp("processes")
    started: list[Daybook] = []
    try:
        for number in range(2):
            ports = Ports.free()
            flags = ("--database-url", postgresql.url(name), "--port", str(ports.server))
            started.append(Daybook.start("serve", *flags, folder=folder / str(number), ports=ports))
        for each in started:
            each.wait_for(" serving ")
        yield started, key
        for each in started:
            assert each.stop() == 0
            assert "Traceback" not in each.stderr
    finally:
        for each in started:
            each.kill()
        postgresql.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest_asyncio.fixture
async def clients(daybooks: tuple[list[Daybook], str]) -> AsyncIterator[list[Client]]:
    """A caller of each process, with the same key."""
    started, key = daybooks
    async with AsyncExitStack() as stack:
        addresses = [f"127.0.0.1:{each.ports.server}" for each in started]
        channels = [await stack.enter_async_context(grpc.aio.insecure_channel(address)) for address in addresses]
        yield [Client(channel, key) for channel in channels]


async def outcome(call: Awaitable[Transaction]) -> Transaction | str:
    """The posted transaction, or the reason of the refusal."""
    try:
        return await asyncio.wait_for(call, PATIENCE_SECONDS)
    except grpc.aio.AioRpcError as error:
        return read_refusal(error).reason


async def test_concurrent_charges_across_processes(clients: list[Client]) -> None:
    """64 callers of two processes charge one account: exactly as many as it can afford succeed, and no update is lost.

    Meanwhile pairs of callers send the same request to both processes at once, which posts once.
    """
    await clients[0].post("b", GRANT, str(AFFORDABLE))

    async def charge(client: Client) -> list[Transaction | str]:
        return [await outcome(client.post("b", CHARGE, "-1")) for _ in range(CHARGES)]

    async def grant(client: Client, number: int) -> Transaction | str:
        return await outcome(client.post("cd"[number % 2], GRANT, "1", request_id=f"twin {number}"))

    charging = asyncio.gather(*(charge(client) for client in clients for _ in range(CALLERS)))
    granting = asyncio.gather(*(grant(client, number) for number in range(CALLERS) for client in clients))
    charges = [each for some in await charging for each in some]
    grants = await granting

    posted = [each for each in charges if isinstance(each, Transaction)]
    assert len(posted) == AFFORDABLE
    assert Counter(each for each in charges if isinstance(each, str)) == {
        "INSUFFICIENT_CREDITS": 2 * CALLERS * CHARGES - AFFORDABLE
    }
    assert sorted(each.sequence for each in posted) == list(range(2, AFFORDABLE + 2))
    assert sorted(float(each.balance_after) for each in posted) == list(range(AFFORDABLE))
    assert grants[::2] == grants[1::2]
    assert len({each.name for each in grants if isinstance(each, Transaction)}) == CALLERS
    for client in clients:
        assert (await client.balance("b")).amount == "0"
        assert {(await client.balance(each)).amount for each in "cd"} == {str(CALLERS // 2)}
        assert await client.verify() == []


async def test_crossing_transfers(clients: list[Client]) -> None:
    """Concurrent transfers in both directions, at two processes, are all posted without a deadlock."""
    for account_id in ("left", "right"):
        await clients[0].create_account(account_id)
        await clients[0].post(account_id, GRANT, str(CALLERS))

    async def cross(client: Client, number: int) -> str:
        source, destination = ("left", "right") if number % 2 else ("right", "left")
        request = TransferCreditsRequest(name=f"accounts/{source}", destination=f"accounts/{destination}", amount="1")
        call = client.ledger.TransferCredits(request, metadata=client.metadata)
        return (await asyncio.wait_for(call, PATIENCE_SECONDS)).outgoing.amount

    moved = await asyncio.gather(*(cross(client, number) for number in range(CALLERS) for client in clients))
    assert moved == ["-1"] * 2 * CALLERS
    assert [(await clients[1].balance(each)).amount for each in ("left", "right")] == [str(CALLERS)] * 2
    assert await clients[1].verify() == []


async def test_page_token_is_valid_at_the_other_process(clients: list[Client]) -> None:
    """A list that begins at one process continues at the other, page by page."""
    for _ in range(3):
        await clients[0].post("e", GRANT, "1")
    request = ListTransactionsRequest(parent="accounts/e", page_size=1)
    seen: list[int] = []
    for client in (*clients, clients[0]):
        page = await client.ledger.ListTransactions(request, metadata=client.metadata)
        seen += [row.sequence for row in page.transactions]
        request.page_token = page.next_page_token
    assert (seen, request.page_token) == ([3, 2, 1], "")


async def test_revoked_key_is_refused_by_both(clients: list[Client]) -> None:
    """A key that one process revokes is refused by both within a few seconds."""
    created = await clients[0].admin.CreateApiKey(
        CreateApiKeyRequest(api_key=ApiKey(scopes=["accounts.readonly"])), metadata=clients[0].metadata
    )
    holders = [Client(client.channel, created.key_string) for client in clients]
    request = GetAccountRequest(name="accounts/a")
    for holder in holders:
        await holder.ledger.GetAccount(request, metadata=holder.metadata)
    await clients[0].admin.RevokeApiKey(RevokeApiKeyRequest(name=created.api_key.name), metadata=clients[0].metadata)
    revoked = time.monotonic()
    for holder in holders:
        while await outcome_of_read(holder) != "CREDENTIAL_INVALID":
            # The cache time plus two seconds for the call itself on a busy machine.
            assert time.monotonic() - revoked < KEY_CACHED_SECONDS_MAX + 2
            await asyncio.sleep(0.2)


async def outcome_of_read(client: Client) -> str:
    """OK, or the reason of the refusal."""
    try:
        await client.ledger.GetAccount(GetAccountRequest(name="accounts/a"), metadata=client.metadata)
    except grpc.aio.AioRpcError as error:
        return read_refusal(error).reason
    return "OK"


class Load:
    """Callers that keep posting and reading, and retry while the service is unavailable, until `stop` is called."""

    def __init__(self, clients: list[Client], name: str) -> None:
        self.acknowledged: dict[str, Transaction] = {}
        self.failures: Counter[int] = Counter()
        """The number of UNAVAILABLE answers, by caller."""
        self.successes: Counter[int] = Counter()
        self._clients = clients
        self._name = name
        self._is_over = False

    async def run(self) -> None:
        """Sends one call after the other, for every caller."""
        await asyncio.gather(*(self._keep_calling(number) for number in range(WRITERS + READERS)))

    def stop(self) -> None:
        """Lets each caller finish its current call, retries included."""
        self._is_over = True

    async def _keep_calling(self, number: int) -> None:
        client = self._clients[number % len(self._clients)]
        count = 0
        while not self._is_over:
            count += 1
            request_id = f"{self._name} {number} {count}"
            while not await self._try(number, client, request_id):
                await asyncio.sleep(0.1)

    async def _try(self, number: int, client: Client, request_id: str) -> bool:
        began = time.monotonic()
        try:
            if number < WRITERS:
                self.acknowledged[request_id] = await client.post("e", GRANT, "1", request_id=request_id)
            else:
                await client.history("e")
        except grpc.aio.AioRpcError as error:
            if read_refusal(error).verdict != ("UNAVAILABLE", "SERVICE_UNAVAILABLE"):
                raise
            self.failures[number] += 1
            return False
        finally:
            assert time.monotonic() - began < PATIENCE_SECONDS
        self.successes[number] += 1
        return True

    async def until_each(self, count: Counter[int], more: int) -> None:
        """Returns once the count of every caller has grown by `more`."""
        targets = {number: count[number] + more for number in range(WRITERS + READERS)}
        async with asyncio.timeout(SECONDS_MAX):
            while any(count[number] < target for number, target in targets.items()):
                await asyncio.sleep(0.05)


async def health(client: Client, service: str) -> int:
    """The status that the standard health service reports."""
    stub: Any = HealthStub(client.channel)
    return int((await stub.Check(HealthCheckRequest(service=service))).status)


async def until_health(clients: list[Client], status: int, seconds: float) -> None:
    """Returns once both processes report this status of the ledger; fails after `seconds`."""
    async with asyncio.timeout(seconds):
        for client in clients:
            while await health(client, "daybook.v1.Ledger") != status:
                await asyncio.sleep(0.1)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_postgresql_is_restarted_under_load(
    clients: list[Client], postgresql: PostgreSQL, mode: Literal["fast", "immediate"]
) -> None:
    """While the database is down calls are UNAVAILABLE and no server is ready; afterwards nothing is lost."""
    load = Load(clients, mode)
    calling = asyncio.create_task(load.run())
    try:
        await load.until_each(load.successes, 2)
        await asyncio.to_thread(postgresql.halt, mode)
        await until_health(clients, HealthCheckResponse.NOT_SERVING, CHECK_SECONDS + ANSWER_SECONDS_MAX + 2)
        assert {await health(client, "") for client in clients} == {HealthCheckResponse.SERVING}
        await load.until_each(load.failures, 1)
    finally:
        await asyncio.to_thread(postgresql.start)
    await load.until_each(load.successes, 2)
    await until_health(clients, HealthCheckResponse.SERVING, CHECK_SECONDS + ANSWER_SECONDS_MAX + 2)
    load.stop()
    await asyncio.wait_for(calling, SECONDS_MAX)

    for client in clients:
        stored = {row.request_id: row for row in await client.history("e") if row.request_id.startswith(mode)}
        assert stored == load.acknowledged
        assert await client.verify() == []
