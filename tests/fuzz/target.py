"""The server and the gateway under attack, the tenant that the inputs name, and the checks between batches."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import psutil
from daybook.v1.admin_service_pb2 import CreateApiKeyRequest, ListApiKeysRequest
from daybook.v1.api_key_pb2 import ApiKey
from daybook.v1.ledger_service_pb2 import ListAccountsRequest, ListLotsRequest, ListTransactionsRequest
from daybook.v1.transaction_pb2 import Transaction
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from server.app import LEDGER
from server.book import open_book
from server.ledger.access import new_api_key
from tests.fuzz.drawing import AMOUNTS, FILTERS, MONTHS, ODD_TEXTS, Pools
from tests.support.callers import OWN_CONNECTION, Client
from tests.support.http_client import send
from tests.support.processes import Daybook, Ports, sqlite_url
from tests.support.waiting import SECONDS_MAX, until

ACCOUNT_IDS = ("a", "b", "c")
DESCRIPTORS_GROWTH_MAX = 8
"""Open files that a process may have more than before: connections between gateway and server, and of the checks."""
GROWTH_BYTES_MAX = 256 << 20
"""Growth of a process that is not a leak: caches have bounds of their own, and the allocator keeps freed pages."""
FLOOD_GROWTH_BYTES_MAX = 512 << 20
"""The same after long floods of resets: the calls that may wait in gRPC (PENDING_CALLS_MAX) take up to 45 KiB each,
and the allocator keeps that memory."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant with a few rows."""

    uid: str
    key: str
    """A key with the scope `admin`."""
    pools: Pools
    """Texts that mean something in this tenant, by the name of a field."""


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a process."""

    descriptors: int
    resident_bytes: int


@dataclass
class Target:
    """A running `daybook up`."""

    daybook: Daybook

    def __post_init__(self) -> None:
        self._processes = [psutil.Process(self.daybook.process.pid), *self.daybook.family()]
        assert len(self._processes) == 2, "a server and a gateway"

    @property
    def _database_url(self) -> str:
        return sqlite_url(self.daybook.folder / "daybook.db")

    async def new_tenant(self) -> Tenant:
        """Creates a tenant, with rows through the gRPC port."""
        uid = str(uuid.uuid4())
        async with open_book(self._database_url) as book:
            key = new_api_key(book.random_bytes)
            number = await book.credentials.create_tenant(
                slug=f"fuzz-{uid}", uid=uid, display_name="Fuzz", create_time=book.clock()
            )
            await book.credentials.create_api_key(
                key_id=key.key_id,
                secret_hash=key.secret_hash,
                tenant_number=number,
                account_number=None,
                create_time=book.clock(),
                scopes={"admin"},
            )
        async with self._channel(self.daybook.ports.server) as channel:
            return Tenant(uid, key.text, await _furnish(Client(channel, key.text), uid))

    def sizes(self) -> Sequence[Size]:
        """The sizes of the server and the gateway."""
        return [Size(each.num_fds(), each.memory_info().rss) for each in self._processes]

    def require_alive(self) -> None:
        """AssertionError unless both processes are alive."""
        assert all(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in self._processes)

    async def check(self, tenant: Tenant) -> None:
        """AssertionError unless both processes are alive, ready and serve both ports."""
        self.require_alive()
        # An input may have ended the server's connections a moment ago.
        await until(self._is_ready)
        for port in (self.daybook.ports.server, self.daybook.ports.gateway):
            await until(partial(self._is_serving, port, tenant))

    async def _is_ready(self) -> bool:
        return (await asyncio.to_thread(send, self.daybook.origin, "/readyz")).status == 200

    async def _is_serving(self, port: int, tenant: Tenant) -> bool:
        """Whether a port answers a health check, and posts."""
        account_id = f"check-{uuid.uuid4()}"
        async with self._channel(port) as channel:
            stub: Any = HealthStub(channel)
            client = Client(channel, tenant.key)
            try:
                health = await stub.Check(HealthCheckRequest(service=LEDGER), timeout=SECONDS_MAX)
                await client.create_account(account_id)
                posted = await client.post(account_id, Transaction.GRANT, "1")
            except grpc.aio.AioRpcError:
                return False
            return health.status == HealthCheckResponse.SERVING and posted.sequence == 1

    async def check_sizes(self, before: Sequence[Size], growth_bytes_max: int = GROWTH_BYTES_MAX) -> None:
        """AssertionError unless open files come back, and memory stays within a bound."""
        await until(
            lambda: all(
                now.descriptors <= then.descriptors + DESCRIPTORS_GROWTH_MAX
                for now, then in zip(self.sizes(), before, strict=True)
            )
        )
        for now, then in zip(self.sizes(), before, strict=True):
            assert now.resident_bytes < then.resident_bytes + growth_bytes_max, f"{then} grew to {now}"

    def check_log(self) -> None:
        """AssertionError if the gateway logged a 5xx, or the server a defect.

        A 503 is right for a stream that gRPC refuses during a flood of resets, and for /readyz if
        it refuses two health checks.
        """
        lines = [line for line in self.daybook.stdout.splitlines() if line.startswith("{")]
        right = ("remote_refused_stream_reset", "health_check_failed_cluster_unhealthy")
        faults = [line for line in lines if not any(each in line for each in right)]
        assert not faults, faults[:5]
        assert "Traceback" not in self.daybook.stderr
        assert "[error" not in self.daybook.stderr

    @asynccontextmanager
    async def _channel(self, port: int) -> AsyncIterator[grpc.aio.Channel]:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", OWN_CONNECTION) as channel:
            yield channel


@contextmanager
def target_in(folder: Path) -> Iterator[Target]:
    """Runs `daybook up` on an empty database until the end of the block; it must end in order."""
    ports = Ports.free()
    flags = ("up", "--database-url", sqlite_url(folder / "daybook.db"), *ports.flags)
    daybook = Daybook.start(*flags, folder=folder, ports=ports)
    try:
        daybook.wait_for("gateway started")
        target = Target(daybook)
        yield target
        target.check_log()
        assert daybook.stop() == 0
    finally:
        daybook.kill()


async def _furnish(client: Client, uid: str) -> Pools:
    """Posts a few rows and collects their names and page tokens."""
    names = []
    for account_id in ACCOUNT_IDS:
        await client.create_account(account_id, credit_limit="1000")
        for _ in range(3):
            await client.post(account_id, Transaction.GRANT, "5")
            names.append((await client.post(account_id, Transaction.CHARGE, "-1")).name)
    made = CreateApiKeyRequest(api_key=ApiKey(scopes=["transactions"]))
    key = await client.admin.CreateApiKey(made, metadata=client.metadata)
    await client.admin.CreateApiKey(made, metadata=client.metadata)
    pages = (
        await client.ledger.ListTransactions(
            ListTransactionsRequest(parent="accounts/a", page_size=1), metadata=client.metadata
        ),
        await client.ledger.ListTransactions(
            ListTransactionsRequest(parent="accounts/-", page_size=1), metadata=client.metadata
        ),
        await client.ledger.ListAccounts(ListAccountsRequest(page_size=1), metadata=client.metadata),
        await client.ledger.ListLots(ListLotsRequest(parent="accounts/a", page_size=1), metadata=client.metadata),
        await client.admin.ListApiKeys(ListApiKeysRequest(page_size=1), metadata=client.metadata),
    )
    accounts = [f"accounts/{each}" for each in ACCOUNT_IDS]
    return {
        "name": (*accounts, *names, "accounts/a/balance", key.api_key.name),
        "account": (*accounts, "accounts/-"),
        "account_id": (*ACCOUNT_IDS, "new"),
        "transaction": names,
        "page_token": ("", *(each.next_page_token for each in pages)),
        "amount": AMOUNTS,
        "filter": ("", *FILTERS),
        "order": ("", "amount", "create_time desc", "amount desc"),
        "category": ("test", "booking", "ai_chat"),
        "request_id": ("", "id-1", "id-2"),
        "label": ("location", "membership", "company", "x"),
        "time": ("2024-10-10T00:00:00Z", "2027-01-31T12:00:00.000001+02:00", "2100-01-01T00:00:00Z"),
        "month": MONTHS,
        "uid": (uid,),
        "odd": ODD_TEXTS,
    }
