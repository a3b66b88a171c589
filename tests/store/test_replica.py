"""Lists served by a streaming standby of a real primary show the same as at the primary."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import grpc
import pytest
import pytest_asyncio
from daybook.v1.ledger_service_pb2 import ListAccountsRequest, ListTransactionsRequest
from daybook.v1.transaction_pb2 import Transaction, Usage
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs
from typer.testing import CliRunner

from server import cli
from server.app import serving
from server.book import open_book
from server.cli import options
from server.config import Settings
from server.ledger.access import Caller
from server.ledger.paging import TransactionFilter
from server.metrics import Metrics
from server.store import engine, replica
from server.store.database import Database
from server.store.engine import DatabaseLimits, DatabaseUrlInvalid, Rows
from server.store.failures import ReplicaUnfit
from server.store.query import Query
from server.store.replica import COMMITTED, Replica
from server.transport.admission import Admission, Admissions
from tests.support.callers import Client, Server
from tests.support.cancellation import ISOLATION, cancel_at_every_step, check_no_transaction
from tests.support.clock import Clock
from tests.support.databases import PostgreSQL
from tests.support.postgresql_proxy import PostgreSQLProxy
from tests.support.postgresql_standby import Standby, standby_of
from tests.support.refusals import refusal_of

SECONDS_MAX = 60
LIMITS = DatabaseLimits(replica_wait_seconds=1)
"""A long wait, so that the standby serves its lists even on a busy machine."""
PASSWORD = "hunter2-of-the-replica"

module_loop = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def standby(postgresql: PostgreSQL) -> Iterator[Standby]:
    """A standby of the tests' PostgreSQL."""
    with standby_of(postgresql) as standby:
        yield standby


@asynccontextmanager
async def served(url: str, replica_url: str, clock: Clock, limits: DatabaseLimits = LIMITS) -> AsyncIterator[Server]:
    """A server with a replica that it already uses."""
    async with (
        open_book(url, clock, limits=limits, replica_url=replica_url) as book,
        serving(book, Settings(port=0, shutdown_grace_seconds=1)) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        server = Server(book, channel)
        await until_used(server)
        yield server


@dataclass(frozen=True)
class Deployment:
    """Two servers that share only the database and its replica, as processes on two machines do."""

    first: Server
    second: Server
    caller: Caller
    client: Client
    """A client of the first server."""
    second_client: Client
    """A client of the second server with the same key."""
    clock: Clock


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def deployment(postgresql: PostgreSQL, standby: Standby) -> AsyncIterator[Deployment]:
    """A ledger with rows in every kind of list."""
    postgresql.execute("CREATE DATABASE replicated")
    postgresql.execute("ALTER DATABASE replicated SET log_statement = 'all'")
    url, replica_url, clock = postgresql.url("replicated"), standby.url("replicated"), Clock()
    async with AsyncExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).setattr(replica, "CHECK_SECONDS", 0.05)
        first = await stack.enter_async_context(served(url, replica_url, clock))
        second = await stack.enter_async_context(served(url, replica_url, clock))
        tenant_number = await first.create_tenant("house")
        client = await first.client(tenant_number)
        await client.create_account("acme")
        await client.post("acme", Transaction.GRANT, "1000000")
        await spend(client)
        yield Deployment(
            first, second, Caller(tenant_number, "", "test"), client, Client(second.channel, client.key), clock
        )
    postgresql.execute("DROP DATABASE replicated WITH (FORCE)")


def replica_of(server: Server) -> Replica:
    """The replica of a server that has one."""
    found = server.book.database.replica
    assert found is not None
    return found


@contextlib.contextmanager
def reads(*servers: Server) -> Iterator[Counter[str]]:
    """Counts the reads of lists in the block by server, `replica` or `primary`; filled at the end of the block."""
    before = [Counter(replica_of(server).reads) for server in servers]
    found = Counter[str]()
    yield found
    for server, each in zip(servers, before, strict=True):
        found += replica_of(server).reads - each


async def until(condition: Callable[[], object]) -> None:
    """Waits until the condition holds."""
    async with asyncio.timeout(SECONDS_MAX):
        while not condition():
            await asyncio.sleep(0.01)


async def until_used(*servers: Server) -> None:
    """Waits until each server uses its replica."""
    await until(lambda: all(replica_of(server)._is_used for server in servers))


async def spend(client: Client) -> Transaction:
    """Posts a charge, which appears in every kind of list."""
    return await client.post("acme", Transaction.CHARGE, "-1", category="computing", usage=Usage(model="m"))


async def list_page(client: Client, parent: str = "accounts/acme", **fields: Any) -> tuple[list[str], str]:
    """The names of a page of transactions, and the token of the next one."""
    request = ListTransactionsRequest(parent=parent, **fields)
    page = await client.ledger.ListTransactions(request, metadata=client.metadata)
    return [row.name for row in page.transactions], page.next_page_token


async def list_all(clients: Iterator[Client], **fields: Any) -> list[str]:
    """The names of all pages of a list; each page is read by the next client."""
    names, token = await list_page(next(clients), **fields)
    while token:
        more, token = await list_page(next(clients), page_token=token, **fields)
        names += more
    return names


@dataclass(frozen=True)
class Reader:
    """Reads every kind of list from one server."""

    server: Server
    client: Client
    caller: Caller

    async def of_account(self) -> object:
        """An account's transactions, in an order that is not cached."""
        return (await list_page(self.client, order_by="amount"))[0]

    async def of_tenant(self) -> object:
        """A tenant's transactions."""
        return (await list_page(self.client, "accounts/-"))[0]

    async def by_filter(self) -> object:
        """A list whose filter no index serves, which also reads its boundary."""
        return (await list_page(self.client, filter="kind = CHARGE"))[0]

    async def accounts(self) -> object:
        """A tenant's accounts."""
        answer = await self.client.ledger.ListAccounts(ListAccountsRequest(), metadata=self.client.metadata)
        return [account.name for account in answer.accounts]

    async def lots(self) -> object:
        """An account's lots."""
        return [str(lot) for lot in await self.client.lots()]

    async def slice_and_refunds(self) -> object:
        """The reads of the facade Paged, and those of Spacebring: a page and its refunds."""
        transactions = self.server.book.transactions
        page = await transactions.slice(self.caller, "acme", 0, 10)
        return page, await transactions.list_network(self.caller, TransactionFilter(), None, 10)

    async def usage(self) -> object:
        """The reads of Nebula Block's list."""
        return await self.server.book.usage.history(self.caller, "acme", 0, 10)


LISTS: dict[Callable[[Reader], Awaitable[object]], int] = {
    Reader.of_account: 1,
    Reader.of_tenant: 1,
    Reader.by_filter: 2,
    Reader.accounts: 1,
    Reader.lots: 1,
    Reader.slice_and_refunds: 3,
    Reader.usage: 2,
}
"""Every kind of list, with its number of reads."""


def lists_in(log: Path) -> int:
    """The number of statements for lists of transactions in the log of a PostgreSQL."""
    return len(re.findall(r"(?:FROM|JOIN) transactions\b", log.read_text()))


@module_loop
async def test_lists_are_served_by_the_standby(
    deployment: Deployment, standby: Standby, postgresql: PostgreSQL
) -> None:
    """Every kind of list is read from the standby only, according to the logs of both servers."""
    await until_used(deployment.first)
    at_primary, at_standby = lists_in(postgresql.log), lists_in(standby.log)
    reader = Reader(deployment.first, deployment.client, deployment.caller)
    for each, number in LISTS.items():
        with reads(deployment.first) as found:
            await each(reader)
        assert found == {"replica": number}, each.__name__
    # The account, the tenant, a filter and its boundary, a slice, and the page of the network.
    assert lists_in(standby.log) - at_standby == 6
    assert lists_in(postgresql.log) == at_primary


@module_loop
async def test_lists_show_all_answered_writes(deployment: Deployment, standby: Standby) -> None:
    """Lists of both servers show a write that was answered before, even if the standby has not replayed it."""
    await until_used(deployment.first, deployment.second)
    with standby.paused():
        posted = await spend(deployment.client)
        with reads(deployment.first, deployment.second) as found:
            for client in (deployment.client, deployment.second_client):
                assert (await list_page(client))[0][0] == posted.name
        assert found["replica"] == 0
        await deployment.client.create_account("newcomer")
        await deployment.client.post("acme", Transaction.GRANT, "1")
        first, second = (
            Reader(server, client, deployment.caller)
            for server, client in ((deployment.first, deployment.client), (deployment.second, deployment.second_client))
        )
        for each in LISTS:
            assert await each(first) == await each(second)
        assert await second.accounts() == ["accounts/acme", "accounts/newcomer"]
        assert len(await deployment.second_client.lots()) == 2


@module_loop
async def test_lists_wait_for_a_standby_that_keeps_up(deployment: Deployment) -> None:
    """The standby serves lists that are read from another server right after each posting."""
    await until_used(deployment.first, deployment.second)
    with reads(deployment.second) as found:
        for _ in range(50):
            posted = await spend(deployment.client)
            assert (await list_page(deployment.second_client, page_size=1))[0] == [posted.name]
    assert found["replica"] >= 45


@module_loop
async def test_lists_do_not_wait_for_a_lagging_standby(deployment: Deployment, standby: Standby) -> None:
    """Once lists find the standby lagging, the primary serves immediately until it has caught up."""
    await until_used(deployment.first)
    with standby.paused(), capture_logs() as logs:
        await spend(deployment.client)
        await list_page(deployment.client)
        await until(lambda: not replica_of(deployment.first)._is_used)
        started = time.monotonic()
        with reads(deployment.first) as found:
            await asyncio.gather(*(list_page(deployment.client) for _ in range(20)))
        assert set(found) == {"primary"}
        assert time.monotonic() - started < 20 * LIMITS.replica_wait_seconds / 4
        # Long enough for several checks; the log has one line.
        await until(lambda: (replica_of(deployment.first).lag_seconds or 0) > 1.5)
    events = [(each["event"], each.get("reason")) for each in logs if "replica" in each["event"]]
    assert Counter(events) == {("replica disabled", "is behind"): len({deployment.first, deployment.second})}
    await until_used(deployment.first, deployment.second)
    with reads(deployment.first) as found:
        await list_page(deployment.client)
    assert found == {"replica": 1}


@module_loop
async def test_queued_lists_do_not_wait_for_a_lagging_standby(deployment: Deployment, standby: Standby) -> None:
    """Of many concurrent lists, only those with a connection wait for a lagging standby."""
    waiting: list[int] = []

    class Observed(Replica):
        async def _reach(self, session: Any, committed: int) -> None:
            waiting.append(committed)
            await super()._reach(session, committed)

    primary = deployment.first.book.database.primary
    observed = Observed(replica_of(deployment.first).server, primary, LIMITS.replica_wait_seconds)
    await observed.check()
    waiting.clear()
    with standby.paused():
        await spend(deployment.client)
        await asyncio.gather(*(observed.fetch(ISOLATION, {}) for _ in range(10 * LIMITS.connections)))
    assert observed.reads == {"primary": 10 * LIMITS.connections}
    # Twice, because a list may get the connection of one that is just giving up.
    assert 0 < len(waiting) <= 2 * LIMITS.connections


@module_loop
@pytest.mark.parametrize("order_by", ["", "create_time", "amount", "amount desc"])
async def test_pages_of_replica_and_primary_are_one_list(
    deployment: Deployment, standby: Standby, order_by: str
) -> None:
    """A list that begins at the replica and continues at the primary is complete, and vice versa."""
    await until_used(deployment.first, deployment.second)
    account = f"pages-{order_by.replace(' ', '-') or 'newest'}"
    parent = f"accounts/{account}"
    await deployment.client.create_account(account)
    posted = [(await deployment.client.post(account, Transaction.GRANT, "1")).name for _ in range(4)]
    with reads(deployment.first, deployment.second) as found:
        first, token = await list_page(deployment.client, parent, order_by=order_by, page_size=2)
    assert set(found) == {"replica"}
    with standby.paused():
        later = [(await deployment.client.post(account, Transaction.GRANT, "1")).name for _ in range(4)]
        # Begun at the standby, the list continues at the primary, through another server.
        with reads(deployment.first, deployment.second) as found:
            more, _ = await list_page(
                deployment.second_client, parent, order_by=order_by, page_size=1000, page_token=token
            )
        assert found["replica"] == 0
        assert len(first + more) == len({*first, *more})
        assert {*posted} <= {*first, *more}
        # Begun at the primary, the list continues at the primary, and then at the standby.
        first, token = await list_page(deployment.client, parent, order_by=order_by, page_size=2)
        second, token = await list_page(
            deployment.second_client, parent, order_by=order_by, page_size=2, page_token=token
        )
    await until_used(deployment.second)
    with reads(deployment.second) as found:
        rest, token = await list_page(
            deployment.second_client, parent, order_by=order_by, page_size=1000, page_token=token
        )
    assert found == {"replica": 1}
    assert not token
    assert sorted([*first, *second, *rest]) == sorted(posted + later)


@module_loop
async def test_pages_are_complete_during_postings(deployment: Deployment, standby: Standby) -> None:
    """All pages, read from both servers, have every row once that was posted before the first page."""
    await until_used(deployment.first, deployment.second)
    account = "busy"
    await deployment.client.create_account(account)
    answered: list[str] = []
    ended = asyncio.Event()

    async def post(client: Client, amounts: Iterator[int]) -> None:
        while not ended.is_set():
            answered.append((await client.post(account, Transaction.GRANT, str(next(amounts)))).name)
            deployment.clock.advance(0.5)
            await asyncio.sleep(0.01)

    async def pause_periodically() -> None:
        while not ended.is_set():
            with standby.paused():
                await asyncio.sleep(2 * LIMITS.replica_wait_seconds)
            await until_used(deployment.first, deployment.second)
            await asyncio.sleep(LIMITS.replica_wait_seconds)

    def have_both_served() -> bool:
        since = Counter[str]()
        for server in (deployment.first, deployment.second):
            since += replica_of(server).reads
        return all(since[each] > before[each] + 50 for each in ("replica", "primary"))

    async def read(parent: str, order_by: str) -> None:
        clients = cycle((deployment.client, deployment.second_client))
        while not ended.is_set():
            expected = set(answered)
            names = await list_all(clients, parent=parent, order_by=order_by, page_size=7)
            assert len(names) == len(set(names))
            assert expected <= set(names)

    before = replica_of(deployment.first).reads + replica_of(deployment.second).reads
    async with asyncio.TaskGroup() as working:
        working.create_task(post(deployment.client, count(1)))
        working.create_task(post(deployment.second_client, count(1)))
        working.create_task(pause_periodically())
        for order_by in ("", "create_time", "amount"):
            working.create_task(read(f"accounts/{account}", order_by))
        working.create_task(read("accounts/-", ""))
        await until(have_both_served)
        ended.set()


@module_loop
@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_lists_survive_a_restart_of_the_standby(
    deployment: Deployment, standby: Standby, mode: Literal["fast", "immediate"]
) -> None:
    """While the standby stops and starts, no list fails and servers stay ready; then it serves again."""
    await until_used(deployment.first, deployment.second)
    ended = asyncio.Event()

    async def read(client: Client) -> int:
        number = 0
        while not ended.is_set():
            assert (await list_page(client, page_size=5))[0]
            number += 1
        return number

    reading = [
        asyncio.create_task(read(client)) for client in (deployment.client, deployment.second_client) for _ in range(3)
    ]
    await asyncio.to_thread(standby.halt, mode)
    with reads(deployment.first, deployment.second) as found:
        posted = await spend(deployment.client)
        assert (await list_page(deployment.second_client, page_size=1))[0] == [posted.name]
        stub: Any = HealthStub(deployment.first.channel)
        health = await stub.Check(HealthCheckRequest(service="daybook.v1.Ledger"))
        assert health.status == HealthCheckResponse.SERVING
    assert found["primary"] > 0
    assert found["replica"] == 0
    await asyncio.to_thread(standby.start)
    await until_used(deployment.first, deployment.second)
    with reads(deployment.first, deployment.second) as found:
        assert (await list_page(deployment.second_client, page_size=1))[0] == [posted.name]
    ended.set()
    assert min(await asyncio.gather(*reading)) > 0
    assert found["replica"] > 0


@module_loop
async def test_primary_serves_while_the_standby_hangs(
    deployment: Deployment, standby: Standby, postgresql: PostgreSQL
) -> None:
    """Lists under way time out at a hanging standby and go to the primary; later ones go there immediately."""
    short = DatabaseLimits(wait_seconds=0.5, connect_seconds=0.5, statement_seconds=0.5)
    async with served(postgresql.url("replicated"), standby.url("replicated"), deployment.clock, short) as server:
        client = Client(server.channel, deployment.client.key)
        newest, _ = await list_page(client, page_size=1)

        async def list_eight() -> None:
            for names, _ in await asyncio.gather(*(list_page(client, page_size=1) for _ in range(8))):
                assert names == newest

        with standby.frozen():
            async with asyncio.timeout(15):
                await list_eight()
            await until(lambda: not replica_of(server)._is_used)
            with reads(server) as found:
                await list_eight()
            assert set(found) == {"primary"}
        await until_used(server)
        with reads(server) as found:
            await list_eight()
        assert set(found) == {"replica"}


@module_loop
async def test_cancelled_read_leaves_no_transaction(deployment: Deployment, standby: Standby) -> None:
    """A read cancelled at any step leaves no transaction, and so no old snapshot, on the standby's connection."""
    limits = replace(LIMITS, connections=1)
    database = Database(deployment.first.book.database.url.render_as_string(), limits, standby.url("replicated"))
    standing_by = database.replica
    assert standing_by is not None

    async def check() -> None:
        await until(lambda: standing_by._is_used)
        await check_no_transaction(database.lists)

    async with database.using_replica():
        await check()
        assert await cancel_at_every_step(partial(database.lists.fetch, ISOLATION, {}), check) > 1
    assert standing_by.reads["replica"] > standing_by.reads["primary"]
    await database.close()


@module_loop
async def test_read_cancelled_at_any_message_leaves_no_transaction(deployment: Deployment, standby: Standby) -> None:
    """A read cancelled before any message of the standby, or a step after it, leaves no transaction."""
    folder = standby.url("x").partition("?host=")[2]
    with TemporaryDirectory(prefix="daybook-proxy-") as name:
        proxy = PostgreSQLProxy(Path(name), folder)
        async with proxy.listening():
            url = deployment.first.book.database.url.render_as_string()
            database = Database(url, replace(LIMITS, connections=1), proxy.url("replicated"))
            read = partial(database.lists.fetch, ISOLATION, {})
            assert await cancel_at_every_message(proxy, database, read) > 5
            await database.close()


async def cancel_at_every_message(
    proxy: PostgreSQLProxy, database: Database, read: Callable[[], Awaitable[object]]
) -> int:
    """Cancels a read at each message of the standby; returns the number of messages."""
    standing_by = database.replica
    assert standing_by is not None
    for at in count():
        for is_late in (False, True):
            proxy.cut()
            # One explicit check, because periodic ones would use the only connection.
            await standing_by.check()
            proxy.hold_at(at)
            task = asyncio.ensure_future(read())
            arrived = asyncio.ensure_future(proxy.arrived.wait())
            await asyncio.wait([task, arrived], return_when=asyncio.FIRST_COMPLETED)
            if not arrived.done():
                arrived.cancel()
                await task
                return at
            if is_late:
                proxy.release()
                await asyncio.sleep(0)
            task.cancel()
            proxy.release()
            await asyncio.wait([task])
            await check_no_transaction(database.lists)
            assert standing_by._is_used, "the standby answered"
    raise AssertionError("it never ends")


@module_loop
async def test_keys_balances_and_accounts_are_read_from_the_primary(deployment: Deployment, standby: Standby) -> None:
    """While the standby is paused, a revoked key is refused and a new account is found."""
    tenant_number = deployment.caller.tenant_number
    revoked = Client(deployment.second.channel, (await deployment.first.client(tenant_number)).key)
    key_id = revoked.key.partition(".")[0]
    with standby.paused():
        await deployment.first.book.credentials.revoke_api_key(tenant_number, key_id, deployment.clock())
        assert (await refusal_of(list_page(revoked))).reason == "CREDENTIAL_INVALID"
        await deployment.client.create_account("fresh")
        await deployment.client.post("fresh", Transaction.GRANT, "7")
        assert (await deployment.second_client.balance("fresh")).amount == "7"


@module_loop
async def test_other_servers_are_not_used_as_replica(
    deployment: Deployment, standby: Standby, postgresql: PostgreSQL
) -> None:
    """The primary itself, and another or a missing database of the standby, are refused as replica."""
    url = postgresql.url("replicated")
    for replica_url, problem in {
        url: "is not a standby",
        standby.url("postgres"): "is not a copy of the primary's database",
        standby.url("nowhere"): 'database "nowhere" does not exist',
    }.items():
        async with open_book(url, deployment.clock, limits=LIMITS, replica_url=replica_url) as book:
            found = book.database.replica
            assert found is not None
            with capture_logs() as logs, pytest.raises(ReplicaUnfit):
                await found.check()
            assert [(each["event"], each["reason"]) for each in logs] == [("replica disabled", problem)]
            # The primary serves lists.
            assert (await book.transactions.slice(deployment.caller, "acme", 0, 1))[1] > 0


@module_loop
async def test_a_standby_ahead_of_the_primary_is_not_used(deployment: Deployment) -> None:
    """A standby of a lost primary is not used if it has more WAL than the new primary, a promoted standby."""
    standing_by, primary = replica_of(deployment.first).server, deployment.first.book.database.primary

    # Read once, because the WAL may grow between reads of the standby and of the primary.
    ((committed,),) = await primary.fetch(COMMITTED, {})

    class PrimaryBehind(engine.Reader):
        async def fetch(self, query: Query, parameters: Mapping[str, object]) -> Rows:
            return [(committed - 1,)] if query is COMMITTED else await primary.fetch(query, parameters)

    of_this_primary, of_another = (Replica(standing_by, each, 5) for each in (primary, PrimaryBehind()))
    await of_this_primary.check()
    assert of_this_primary._is_used
    with pytest.raises(ReplicaUnfit, match="is ahead of the primary"):
        await of_another.check()
    assert not of_another._is_used


@module_loop
async def test_metrics_show_reads_lag_and_connections_of_the_replica(deployment: Deployment, standby: Standby) -> None:
    """The metrics have the reads by server, the lag of the replica, and its connections."""
    book = deployment.first.book
    metrics = Metrics(book, Admissions(Admission(1), Admission(1)))

    def scrape() -> dict[tuple[str, str], float]:
        families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
        samples = [sample for family in families for sample in family.samples]
        return {(sample.name, "".join(sample.labels.values())): sample.value for sample in samples}

    await until_used(deployment.first)
    before = scrape()
    # Metrics are served in another thread.
    assert 0 <= (await asyncio.to_thread(scrape))["daybook_database_replica_lag_seconds", ""] < 60
    await list_page(deployment.client, order_by="amount")
    with standby.paused():
        await spend(deployment.client)
        await list_page(deployment.client, order_by="amount")
        await until(lambda: scrape()["daybook_database_replica_lag_seconds", ""] > 0.6)
    after = scrape()
    assert {
        by: after["daybook_database_list_reads_total", by] - before["daybook_database_list_reads_total", by]
        for by in ("replica", "primary")
    } == {"replica": 1, "primary": 1}
    assert after["daybook_database_connections_limit", "replica"] == LIMITS.connections
    assert after["daybook_database_connections_in_use", "replica"] <= 1


@pytest.mark.parametrize(
    ("url", "replica_url", "problem"),
    [
        (
            "sqlite+aiosqlite:///{folder}/daybook.db",
            f"postgresql+asyncpg://user:{PASSWORD}@h/d",
            "can be set only where",
        ),
        ("postgresql+asyncpg://h/d", "sqlite+aiosqlite:///{folder}/replica.db", "must begin with postgresql"),
        ("postgresql+asyncpg://h/d", f"postgresql://user:{PASSWORD}@h/d", "must begin with postgresql"),
        ("postgresql+asyncpg://h/d", f"postgresql+asyncpg://user:{PASSWORD}@[::1/d", "can't be read"),
        ("postgresql+asyncpg://h/d", PASSWORD, "can't be read"),
    ],
)
def test_invalid_replica_url_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, replica_url: str, problem: str
) -> None:
    """The error at the start is one line that names the setting and shows nothing of the URL."""
    monkeypatch.setenv("DAYBOOK_DATABASE_URL", url.format(folder=tmp_path))
    monkeypatch.setenv("DAYBOOK_DATABASE_REPLICA_URL", replica_url.format(folder=tmp_path))
    monkeypatch.setattr(options, "configure_logs", lambda _settings: None)
    with pytest.raises(DatabaseUrlInvalid, match=f"^database_replica_url {problem}"):
        Database(url.format(folder=tmp_path), None, replica_url.format(folder=tmp_path))
    result = CliRunner().invoke(cli.app, ["serve", "--port", "0"])
    assert result.exit_code == 1
    assert result.output.startswith(f"daybook: database_replica_url {problem}")
    assert result.output.count("\n") == 1
    assert PASSWORD not in result.output + repr(Settings())
    assert not (tmp_path / "replica.db").exists()


@module_loop
async def test_a_promoted_standby_is_not_used(deployment: Deployment, standby: Standby) -> None:
    """A promoted standby is not used, although it has all data. Runs last, because it ends the standby."""
    await until_used(deployment.first, deployment.second)
    with capture_logs() as logs:
        standby.ask("SELECT pg_promote()")
        await until(lambda: not replica_of(deployment.first)._is_used)
        with reads(deployment.first) as found:
            assert len((await list_page(deployment.client, page_size=1))[0]) == 1
    assert set(found) == {"primary"}
    assert {"is not a standby"} <= {each["reason"] for each in logs if each["event"] == "replica disabled"}
