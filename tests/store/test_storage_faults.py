"""Storage of SQLite that fails, stalls or loses power: what was acknowledged is there once, and service goes on."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import pytest
from daybook.v1.ledger_service_pb2 import CreateTransactionRequest, GetAccountRequest
from daybook.v1.transaction_pb2 import Transaction, Usage
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.app import serving
from server.book import open_book
from server.config import Settings
from server.ledger.errors import ServiceUnavailable
from server.posting import poster
from server.store import sqlite
from server.store.engine import DatabaseLimits
from tests.store.other_process import other_process
from tests.support.callers import Client, Server
from tests.support.clock import Clock
from tests.support.failing_storage import DAMAGES_OF_WRITERS, Damage, FailingStorage
from tests.support.ledgers import prepare
from tests.support.processes import sqlite_url
from tests.support.refusals import Refusal, read_refusal, refusal_of
from tests.support.waiting import SECONDS_MAX, until

GRANT, CHARGE = Transaction.GRANT, Transaction.CHARGE
UNAVAILABLE = ("UNAVAILABLE", "SERVICE_UNAVAILABLE")
DRIVER_WORDS = ("disk", "full", "readonly", "locked", "sqlite", ".db", "wal")
FREE_PORT = Settings(port=0, shutdown_grace_seconds=1)


@pytest.fixture
def storage(tmp_path: Path, migrated_file: Path) -> Iterator[FailingStorage]:
    """The storage of an empty ledger."""
    file = tmp_path / "daybook.db"
    shutil.copyfile(migrated_file, file)
    with FailingStorage(file).connected() as storage:
        yield storage


@pytest.fixture
def database_url(storage: FailingStorage) -> str:
    """The ledger on the failing storage, for the fixtures of a server and its callers."""
    return sqlite_url(storage.file)


def check_unavailable(refusal: Refusal) -> None:
    """Checks that a refusal says that the service is unavailable, and nothing about the storage."""
    assert refusal.verdict == UNAVAILABLE
    assert not [word for word in DRIVER_WORDS if word in refusal.message.lower()]


async def charge(client: Client, request_id: str, account_id: str = "acme") -> Transaction:
    """A charge that writes to every table to which a charge can."""
    return await client.post(
        account_id,
        CHARGE,
        "-1",
        request_id=request_id,
        category="computing",
        usage=Usage(model="m"),
        labels={"location": "l"},
    )


async def is_serving(server: Server) -> bool:
    """The answer of the health check."""
    health: Any = health_pb2_grpc.HealthStub(server.channel)
    checked = await health.Check(health_pb2.HealthCheckRequest(service="daybook.v1.Ledger"))
    return bool(checked.status == health_pb2.HealthCheckResponse.SERVING)


@pytest.fixture
def checkpoint_each_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every commit longer than the write-ahead log may be."""
    monkeypatch.setattr(sqlite, "LOG_PAGES_MAX", 1)


@pytest.mark.usefixtures("checkpoint_each_commit")
@pytest.mark.parametrize("damage", DAMAGES_OF_WRITERS)
async def test_each_operation_of_a_posting_can_fail(
    storage: FailingStorage, client: Client, admin: Client, damage: Damage
) -> None:
    """Whichever write or sync fails: a refused posting left nothing and succeeds when repeated, and others go on.

    Each commit is followed by a checkpoint, whose failures no caller notices.
    """
    for account_id in ("acme", "other"):
        await client.create_account(account_id, credit_limit="1000")
    struck: Counter[tuple[str, bool]] = Counter()
    for at in count():
        with storage.failing(damage, at) as fault:
            try:
                posted = await charge(client, f"{at}")
                is_refused = False
            except grpc.aio.AioRpcError as error:
                check_unavailable(read_refusal(error))
                is_refused = True
        if fault.struck is None:
            break
        struck[fault.struck.name, is_refused] += 1
        found = [row for row in await client.history() if row.request_id == f"{at}"]
        assert found == ([] if is_refused else [posted])
        assert (await charge(client, "", "other")).sequence == at + 1
        repeated = await charge(client, f"{at}")
        assert is_refused or repeated == posted
        assert repeated.sequence == at + 1
    assert struck["daybook.db-wal", True] > (0 if damage is Damage.NOT_SYNCED else 10)
    assert struck["daybook.db", False] > (0 if damage is Damage.NOT_SYNCED else 5)
    assert set(struck) <= {("daybook.db-wal", True), ("daybook.db-wal", False), ("daybook.db", False)}
    assert [row.request_id for row in await client.history()] == [f"{number}" for number in range(at + 1)]
    assert (await client.balance()).amount == f"-{at + 1}"
    assert await admin.verify() == []


@pytest.mark.parametrize("damage", [Damage.FULL, Damage.READ_ONLY, Damage.ERROR, Damage.NOT_SYNCED])
async def test_storage_that_refuses_every_write(
    storage: FailingStorage, server: Server, client: Client, admin: Client, damage: Damage
) -> None:
    """While the disk is full, read-only or broken, postings are refused and reads go on; then all succeed."""
    await client.create_account("acme", credit_limit="1000")
    before = [await charge(client, f"{number}") for number in range(3)]
    with storage.failing(damage):
        for refusal in await asyncio.gather(*(refusal_of(charge(client, f"late {number}")) for number in range(8))):
            check_unavailable(refusal)
        check_unavailable(await refusal_of(client.create_account("other")))
        assert await client.history() == before
        assert (await client.balance()).amount == "-3"
        assert await is_serving(server)
    after = await asyncio.gather(*(charge(client, f"late {number}") for number in range(8)))
    assert await client.history() == before + sorted(after, key=lambda row: row.sequence)
    await client.create_account("other")
    assert await admin.verify() == []


@pytest.mark.parametrize(("damage", "step"), [(Damage.NOT_SYNCED, 1), (Damage.FULL, 15)])
async def test_first_start_can_fail(tmp_path: Path, clock: Clock, damage: Damage, step: int) -> None:
    """If creating the database fails at some operation, the start fails clearly, and the next one succeeds."""
    failed = 0
    for at in count(step=step):
        with FailingStorage(tmp_path / f"{at}.db").connected() as storage:
            with storage.failing(damage, at) as fault:
                try:
                    async with open_book(sqlite_url(storage.file), clock):
                        pass
                except ServiceUnavailable:
                    failed += 1
            async with open_book(sqlite_url(storage.file), clock) as book:
                assert not await book.credentials.has_tenant()
        if fault.struck is None:
            break
    assert failed > 2


async def test_reads_can_fail(storage: FailingStorage, client: Client) -> None:
    """A read of an unreadable file is refused, and succeeds when repeated."""
    await client.create_account("acme")
    posted = await client.post("acme", GRANT, "1")
    reads: list[Callable[[], Awaitable[object]]] = [
        client.balance,
        client.history,
        lambda: client.history("-"),
        lambda: client.full(posted.name),
        lambda: client.ledger.GetAccount(GetAccountRequest(name="accounts/acme"), metadata=client.metadata),
    ]
    for number, read in enumerate(reads):
        sound = await read()
        # Without a commit, pages and lists may be cached.
        await client.create_account(f"new-{number}")
        with storage.failing(Damage.UNREADABLE) as fault:
            check_unavailable(await refusal_of(read()))
        assert fault.struck is not None
        assert await read() == sound


@pytest.fixture
def short_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets few commands wait."""
    monkeypatch.setattr(poster, "QUEUE_LENGTH_MAX", 4)


@pytest.mark.usefixtures("short_queue")
async def test_slow_disk(storage: FailingStorage, server: Server, client: Client, admin: Client) -> None:
    """While a sync takes long: reads and health answer, a deadline holds, the queue is bounded, and no call is lost."""
    await client.create_account("acme", credit_limit="1000")
    grant = CreateTransactionRequest(
        parent="accounts/acme", transaction=Transaction(kind=GRANT, amount="1", category="test"), request_id="late"
    )
    with storage.held_syncs() as sync_begins:
        posting = [asyncio.create_task(charge(client, "first"))]
        assert await asyncio.to_thread(sync_begins.wait, SECONDS_MAX)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.ledger.CreateTransaction(grant, metadata=client.metadata, timeout=0.2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        posting += [asyncio.create_task(charge(client, f"{number}")) for number in range(3)]
        await until(lambda: server.book.poster.queue_length == 4)
        assert (await refusal_of(charge(client, "one too many"))).verdict == ("RESOURCE_EXHAUSTED", "TOO_BUSY")
        assert (await client.balance()).amount == "0"
        assert await client.history() == []
        assert await is_serving(server)
        assert not any(each.done() for each in posting)
    posted = await asyncio.gather(*posting)
    late = await client.ledger.CreateTransaction(grant, metadata=client.metadata)
    assert await client.history() == sorted([*posted, late], key=lambda row: row.sequence)
    assert await admin.verify() == []


async def test_locked_file(tmp_path: Path, clock: Clock) -> None:
    """While another process holds the write lock for longer than the timeout, postings are refused and reads go on."""
    file = tmp_path / "daybook.db"
    key = await prepare(sqlite_url(file))
    async with (
        open_book(sqlite_url(file), clock, limits=DatabaseLimits(lock_seconds=0.2)) as book,
        serving(book, FREE_PORT) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        client = Client(channel, key)
        granted = await client.post("b", GRANT, "10")
        with other_process(file) as other:
            other.do("BEGIN IMMEDIATE")
            check_unavailable(await refusal_of(charge(client, "id", "b")))
            assert await client.history("b") == [granted]
            assert await is_serving(Server(book, channel))
        # The end of the process releases the lock.
        charged = await charge(client, "id", "b")
        assert await client.history("b") == [granted, charged]
        assert await client.verify() == []
