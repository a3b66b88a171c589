"""Lists that a streaming standby serves, of a real primary: they show what the primary would show."""

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
LIMITS = DatabaseLimits(replica_wait_seconds=0.4)
"""So long that a machine that is busy gets no list served by the primary that the standby could serve."""
PASSWORD = "hunter2-of-the-replica"

in_the_house = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def standby(postgresql: PostgreSQL) -> Iterator[Standby]:
    """A standby of the server of the tests."""
    with standby_of(postgresql) as standby:
        yield standby


@asynccontextmanager
async def served(url: str, replica_url: str, clock: Clock, limits: DatabaseLimits = LIMITS) -> AsyncIterator[Server]:
    """A server of the ledger with a replica, which it uses by then."""
    async with (
        open_book(url, clock, limits=limits, replica_url=replica_url) as book,
        serving(book, Settings(port=0, shutdown_grace_seconds=1)) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        server = Server(book, channel)
        await until_used(server)
        yield server


@dataclass(frozen=True)
class House:
    """Two servers that share nothing but the database and its replica, as processes of any two machines do."""

    here: Server
    there: Server
    caller: Caller
    client: Client
    """A caller at the one."""
    stranger: Client
    """A caller with the same key at the other."""
    clock: Clock


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(postgresql: PostgreSQL, standby: Standby) -> AsyncIterator[House]:
    """A ledger with something of each kind that is listed."""
    postgresql.execute("CREATE DATABASE replicated")
    postgresql.execute("ALTER DATABASE replicated SET log_statement = 'all'")
    url, replica_url, clock = postgresql.url("replicated"), standby.url("replicated"), Clock()
    async with AsyncExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).setattr(replica, "WATCH_SECONDS", 0.05)
        here = await stack.enter_async_context(served(url, replica_url, clock))
        there = await stack.enter_async_context(served(url, replica_url, clock))
        tenant_number = await here.create_tenant("house")
        client = await here.client(tenant_number)
        await client.create_account("acme")
        await client.post("acme", Transaction.GRANT, "1000000")
        await spend(client)
        yield House(here, there, Caller(tenant_number, "", "test"), client, Client(there.channel, client.key), clock)
    postgresql.execute("DROP DATABASE replicated WITH (FORCE)")


def replica_of(server: Server) -> Replica:
    """The replica of a server that has one."""
    found = server.book.database.replica
    assert found is not None
    return found


@contextlib.contextmanager
def reads(*servers: Server) -> Iterator[Counter[str]]:
    """How many reads of lists were served by whom in the block, once it has ended."""
    before = [Counter(replica_of(server).reads) for server in servers]
    found = Counter[str]()
    yield found
    for server, each in zip(servers, before, strict=True):
        found += replica_of(server).reads - each


async def until(happened: Callable[[], object]) -> None:
    """Waits until something has happened."""
    async with asyncio.timeout(SECONDS_MAX):
        while not happened():
            await asyncio.sleep(0.01)


async def until_used(*servers: Server) -> None:
    """Waits until each server lets its replica serve."""
    await until(lambda: all(replica_of(server)._is_used for server in servers))


async def spend(client: Client) -> Transaction:
    """Posts a charge that shows in lists of every kind."""
    return await client.post("acme", Transaction.CHARGE, "-1", category="computing", usage=Usage(model="m"))


async def list_page(client: Client, parent: str = "accounts/acme", **fields: Any) -> tuple[list[str], str]:
    """The names of a page of transactions, and the token of the next one."""
    request = ListTransactionsRequest(parent=parent, **fields)
    page = await client.ledger.ListTransactions(request, metadata=client.metadata)
    return [row.name for row in page.transactions], page.next_page_token


async def list_all(clients: Iterator[Client], **fields: Any) -> list[str]:
    """The names of all pages of a list, each asked of the next client."""
    names, token = await list_page(next(clients), **fields)
    while token:
        more, token = await list_page(next(clients), page_token=token, **fields)
        names += more
    return names


@dataclass(frozen=True)
class Reader:
    """Reads lists of every kind, of one server."""

    server: Server
    client: Client
    caller: Caller

    async def of_account(self) -> object:
        """By gRPC, in an order of which nothing is remembered."""
        return (await list_page(self.client, order_by="amount"))[0]

    async def of_tenant(self) -> object:
        """By gRPC."""
        return (await list_page(self.client, "accounts/-"))[0]

    async def by_filter(self) -> object:
        """A list that no index serves, so that its end is looked for first."""
        return (await list_page(self.client, filter="kind = CHARGE"))[0]

    async def accounts(self) -> object:
        """By gRPC."""
        answer = await self.client.ledger.ListAccounts(ListAccountsRequest(), metadata=self.client.metadata)
        return [account.name for account in answer.accounts]

    async def lots(self) -> object:
        """By gRPC."""
        return [str(lot) for lot in await self.client.lots()]

    async def slice_and_refunds(self) -> object:
        """The reads of the paged list, and those of Spacebring's: a page and its refunds."""
        transactions = self.server.book.transactions
        page = await transactions.slice(self.caller, "acme", 0, 10)
        return page, await transactions.list_network(self.caller, TransactionFilter(), None, 10)

    async def usage(self) -> object:
        """What Nebula Block's list reads."""
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
"""Every kind of list, and how many reads it takes."""


def lists_in(log: Path) -> int:
    """How many statements of lists of transactions a PostgreSQL has run, by its own log."""
    return len(re.findall(r"(?:FROM|JOIN) transactions\b", log.read_text()))


@in_the_house
async def test_lists_are_served_by_the_standby(house: House, standby: Standby, postgresql: PostgreSQL) -> None:
    """Every kind of list is read there, as the standby itself says, and none of it at the primary."""
    await until_used(house.here)
    at_primary, at_standby = lists_in(postgresql.log), lists_in(standby.log)
    reader = Reader(house.here, house.client, house.caller)
    for each, number in LISTS.items():
        with reads(house.here) as found:
            await each(reader)
        assert found == {"replica": number}, each.__name__
    # The account, the tenant, a filter and its boundary, a slice, and the page of the network.
    assert lists_in(standby.log) - at_standby == 6
    assert lists_in(postgresql.log) == at_primary


@in_the_house
async def test_what_was_written_is_listed_by_everybody(house: House, standby: Standby) -> None:
    """A list shows what was answered before, by whichever server, while the standby shows nothing of it."""
    await until_used(house.here, house.there)
    with standby.paused():
        posted = await spend(house.client)
        with reads(house.here, house.there) as found:
            for client in (house.client, house.stranger):
                assert (await list_page(client))[0][0] == posted.name
        assert found["replica"] == 0
        await house.client.create_account("newcomer")
        await house.client.post("acme", Transaction.GRANT, "1")
        here, there = (
            Reader(server, client, house.caller)
            for server, client in ((house.here, house.client), (house.there, house.stranger))
        )
        for each in LISTS:
            assert await each(here) == await each(there)
        assert await there.accounts() == ["accounts/acme", "accounts/newcomer"]
        assert len(await house.stranger.lots()) == 2


@in_the_house
async def test_a_standby_that_follows_is_waited_for(house: House) -> None:
    """Each list comes right behind a posting, to another server, and the standby serves it all the same."""
    await until_used(house.here, house.there)
    with reads(house.there) as found:
        for _ in range(50):
            posted = await spend(house.client)
            assert (await list_page(house.stranger, page_size=1))[0] == [posted.name]
    assert found["replica"] >= 45


@in_the_house
async def test_a_standby_that_is_behind_is_not_waited_for(house: House, standby: Standby) -> None:
    """The first lists find out; from then on the primary serves at once, until the standby has caught up."""
    await until_used(house.here)
    with standby.paused(), capture_logs() as logs:
        await spend(house.client)
        await list_page(house.client)
        await until(lambda: not replica_of(house.here)._is_used)
        started = time.monotonic()
        with reads(house.here) as found:
            await asyncio.gather(*(list_page(house.client) for _ in range(20)))
        assert set(found) == {"primary"}
        assert time.monotonic() - started < 20 * LIMITS.replica_wait_seconds / 4
        # It is looked at several times, and its log has it once.
        await until(lambda: (replica_of(house.here).lag_seconds or 0) > 1.5)
    told = [(each["event"], each.get("reason")) for each in logs if "replica" in each["event"]]
    assert Counter(told) == {("replica disabled", "is behind"): len({house.here, house.there})}
    await until_used(house.here, house.there)
    with reads(house.here) as found:
        await list_page(house.client)
    assert found == {"replica": 1}


@in_the_house
async def test_those_in_line_do_not_wait_for_it_either(house: House, standby: Standby) -> None:
    """Of many lists at a time only those that have a connection wait for a standby that is behind."""
    waiting: list[int] = []

    class Observed(Replica):
        async def _reach(self, session: Any, committed: int) -> None:
            waiting.append(committed)
            await super()._reach(session, committed)

    primary = house.here.book.database.primary
    observed = Observed(replica_of(house.here).server, primary, LIMITS.replica_wait_seconds)
    await observed.check()
    waiting.clear()
    with standby.paused():
        await spend(house.client)
        await asyncio.gather(*(observed.fetch(ISOLATION, {}) for _ in range(10 * LIMITS.connections)))
    assert observed.reads == {"primary": 10 * LIMITS.connections}
    # And perhaps who is given the connection of one that is just giving up.
    assert 0 < len(waiting) <= 2 * LIMITS.connections


@in_the_house
@pytest.mark.parametrize("order_by", ["", "create_time", "amount", "amount desc"])
async def test_pages_of_both_are_one_list(house: House, standby: Standby, order_by: str) -> None:
    """A list that begins at the one and goes on at the other is complete, in both directions."""
    await until_used(house.here, house.there)
    account = f"pages-{order_by.replace(' ', '-') or 'newest'}"
    parent = f"accounts/{account}"
    await house.client.create_account(account)
    posted = [(await house.client.post(account, Transaction.GRANT, "1")).name for _ in range(4)]
    with reads(house.here, house.there) as found:
        first, token = await list_page(house.client, parent, order_by=order_by, page_size=2)
    assert set(found) == {"replica"}
    with standby.paused():
        later = [(await house.client.post(account, Transaction.GRANT, "1")).name for _ in range(4)]
        # What was begun at the standby goes on at the primary, at another server.
        with reads(house.here, house.there) as found:
            more, _ = await list_page(house.stranger, parent, order_by=order_by, page_size=1000, page_token=token)
        assert found["replica"] == 0
        assert len(first + more) == len({*first, *more})
        assert {*posted} <= {*first, *more}
        # What is begun at the primary goes on where all of it is.
        first, token = await list_page(house.client, parent, order_by=order_by, page_size=2)
        second, token = await list_page(house.stranger, parent, order_by=order_by, page_size=2, page_token=token)
    await until_used(house.there)
    with reads(house.there) as found:
        rest, token = await list_page(house.stranger, parent, order_by=order_by, page_size=1000, page_token=token)
    assert found == {"replica": 1}
    assert not token
    assert sorted([*first, *second, *rest]) == sorted(posted + later)


@in_the_house
async def test_pages_while_others_post(house: House, standby: Standby) -> None:
    """Whoever reads all pages, of whichever server, gets each row once that was there when they began."""
    await until_used(house.here, house.there)
    account = "busy"
    await house.client.create_account(account)
    answered: list[str] = []
    ended = asyncio.Event()

    async def post(client: Client, amounts: Iterator[int]) -> None:
        while not ended.is_set():
            answered.append((await client.post(account, Transaction.GRANT, str(next(amounts)))).name)
            house.clock.advance(0.5)
            await asyncio.sleep(0.01)

    async def pause_now_and_then() -> None:
        while not ended.is_set():
            with standby.paused():
                await asyncio.sleep(2 * LIMITS.replica_wait_seconds)
            await until_used(house.here, house.there)
            await asyncio.sleep(LIMITS.replica_wait_seconds)

    def have_both_served() -> bool:
        since = Counter[str]()
        for server in (house.here, house.there):
            since += replica_of(server).reads
        return all(since[each] > before[each] + 50 for each in ("replica", "primary"))

    async def read(parent: str, order_by: str) -> None:
        clients = cycle((house.client, house.stranger))
        while not ended.is_set():
            there = set(answered)
            names = await list_all(clients, parent=parent, order_by=order_by, page_size=7)
            assert len(names) == len(set(names))
            assert there <= set(names)

    before = replica_of(house.here).reads + replica_of(house.there).reads
    async with asyncio.TaskGroup() as working:
        working.create_task(post(house.client, count(1)))
        working.create_task(post(house.stranger, count(1)))
        working.create_task(pause_now_and_then())
        for order_by in ("", "create_time", "amount"):
            working.create_task(read(f"accounts/{account}", order_by))
        working.create_task(read("accounts/-", ""))
        await until(have_both_served)
        ended.set()


@in_the_house
@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_a_standby_that_stops_under_load(
    house: House, standby: Standby, mode: Literal["fast", "immediate"]
) -> None:
    """No list fails while it goes, is away, and comes; then it serves again. Servers are ready throughout."""
    await until_used(house.here, house.there)
    ended = asyncio.Event()

    async def read(client: Client) -> int:
        number = 0
        while not ended.is_set():
            assert (await list_page(client, page_size=5))[0]
            number += 1
        return number

    reading = [asyncio.create_task(read(client)) for client in (house.client, house.stranger) for _ in range(3)]
    await asyncio.to_thread(standby.halt, mode)
    with reads(house.here, house.there) as found:
        posted = await spend(house.client)
        assert (await list_page(house.stranger, page_size=1))[0] == [posted.name]
        stub: Any = HealthStub(house.here.channel)
        health = await stub.Check(HealthCheckRequest(service="daybook.v1.Ledger"))
        assert health.status == HealthCheckResponse.SERVING
    assert found["primary"] > 0
    assert found["replica"] == 0
    await asyncio.to_thread(standby.start)
    await until_used(house.here, house.there)
    with reads(house.here, house.there) as found:
        assert (await list_page(house.stranger, page_size=1))[0] == [posted.name]
    ended.set()
    assert min(await asyncio.gather(*reading)) > 0
    assert found["replica"] > 0


@in_the_house
async def test_a_standby_that_hangs(house: House, standby: Standby, postgresql: PostgreSQL) -> None:
    """The primary soon serves the lists that it keeps, and the next ones at once."""
    short = DatabaseLimits(wait_seconds=0.5, connect_seconds=0.5, statement_seconds=0.5)
    async with served(postgresql.url("replicated"), standby.url("replicated"), house.clock, short) as server:
        client = Client(server.channel, house.client.key)
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


@in_the_house
async def test_reads_that_are_given_up(house: House, standby: Standby) -> None:
    """Whenever that is, the one connection to the standby lies in no transaction that it would read of from then on."""
    limits = replace(LIMITS, connections=1)
    database = Database(house.here.book.database.url.render_as_string(), limits, standby.url("replicated"))
    standing_by = database.replica
    assert standing_by is not None

    async def check() -> None:
        await until(lambda: standing_by._is_used)
        await check_no_transaction(database.lists)

    async with database.replica_watched():
        await check()
        assert await cancel_at_every_step(partial(database.lists.fetch, ISOLATION, {}), check) > 1
    assert standing_by.reads["replica"] > standing_by.reads["primary"]
    await database.close()


@in_the_house
async def test_reads_that_are_given_up_at_every_message(house: House, standby: Standby) -> None:
    """A caller leaves before a message of the standby arrives, or in the turn after: the next one isn't affected."""
    folder = standby.url("x").partition("?host=")[2]
    with TemporaryDirectory(prefix="daybook-proxy-") as name:
        proxy = PostgreSQLProxy(Path(name), folder)
        async with proxy.listening():
            url = house.here.book.database.url.render_as_string()
            database = Database(url, replace(LIMITS, connections=1), proxy.url("replicated"))
            read = partial(database.lists.fetch, ISOLATION, {})
            assert await give_up_at_every_message(proxy, database, read) > 5
            await database.close()


async def give_up_at_every_message(
    proxy: PostgreSQLProxy, database: Database, read: Callable[[], Awaitable[object]]
) -> int:
    """Leaves a read at each message that the standby sends; tells how many there are."""
    standing_by = database.replica
    assert standing_by is not None
    for at in count():
        for is_late in (False, True):
            proxy.cut()
            # Once, by hand: a watch would use the one connection too.
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
            assert standing_by._is_used, "it was the standby that answered"
    raise AssertionError("it never ends")


@in_the_house
async def test_keys_balances_and_names_are_of_the_primary(house: House, standby: Standby) -> None:
    """While the standby shows nothing new, a key that was revoked is refused, and an account that is new is found."""
    tenant_number = house.caller.tenant_number
    revoked = Client(house.there.channel, (await house.here.client(tenant_number)).key)
    key_id = revoked.key.partition(".")[0]
    with standby.paused():
        await house.here.book.credentials.revoke_api_key(tenant_number, key_id, house.clock())
        assert (await refusal_of(list_page(revoked))).reason == "CREDENTIAL_INVALID"
        await house.client.create_account("fresh")
        await house.client.post("fresh", Transaction.GRANT, "7")
        assert (await house.stranger.balance("fresh")).amount == "7"


@in_the_house
async def test_what_is_no_standby_of_the_primary(house: House, standby: Standby, postgresql: PostgreSQL) -> None:
    """The primary itself, another database of the cluster, and what has more than the primary, serve nothing."""
    url = postgresql.url("replicated")
    for replica_url, problem in {
        url: "is no standby",
        standby.url("postgres"): "is no copy of the primary's database",
        standby.url("nowhere"): 'database "nowhere" does not exist',
    }.items():
        async with open_book(url, house.clock, limits=LIMITS, replica_url=replica_url) as book:
            found = book.database.replica
            assert found is not None
            with capture_logs() as logs, pytest.raises(ReplicaUnfit):
                await found.check()
            assert [(each["event"], each["reason"]) for each in logs] == [("replica disabled", problem)]
            # Lists are served all the same.
            assert (await book.transactions.slice(house.caller, "acme", 0, 1))[1] > 0


@in_the_house
async def test_a_standby_that_has_more_than_the_primary(house: House) -> None:
    """It followed a primary that is lost; the one of now was made of another standby, which had less."""
    standing_by, primary = replica_of(house.here).server, house.here.book.database.primary

    # Once and for all: the log grows by itself, too, between a look at the standby and one at the primary.
    ((committed,),) = await primary.fetch(COMMITTED, {})

    class WithLess(engine.Reader):
        async def fetch(self, query: Query, parameters: Mapping[str, object]) -> Rows:
            return [(committed - 1,)] if query is COMMITTED else await primary.fetch(query, parameters)

    of_this_primary, of_another = (Replica(standing_by, each, 5) for each in (primary, WithLess()))
    await of_this_primary.check()
    assert of_this_primary._is_used
    with pytest.raises(ReplicaUnfit, match="has what the primary has not"):
        await of_another.check()
    assert not of_another._is_used


@in_the_house
async def test_metrics_of_the_replica(house: House, standby: Standby) -> None:
    """Reads by who served them, how far the replica is behind, and its connections."""
    book = house.here.book
    metrics = Metrics(book, Admissions(Admission(1), Admission(1)))

    def scrape() -> dict[tuple[str, str], float]:
        families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
        samples = [sample for family in families for sample in family.samples]
        return {(sample.name, "".join(sample.labels.values())): sample.value for sample in samples}

    await until_used(house.here)
    before = scrape()
    # A scraper is answered in another thread.
    assert 0 <= (await asyncio.to_thread(scrape))["daybook_database_replica_lag_seconds", ""] < 60
    await list_page(house.client, order_by="amount")
    with standby.paused():
        await spend(house.client)
        await list_page(house.client, order_by="amount")
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
def test_urls_that_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, replica_url: str, problem: str
) -> None:
    """The start is refused in one line that names the setting and says nothing of the URL."""
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


@in_the_house
async def test_a_standby_that_is_promoted(house: House, standby: Standby) -> None:
    """What is no standby any more is left alone, though it has all that the primary had: the end of the standby."""
    await until_used(house.here, house.there)
    with capture_logs() as logs:
        standby.ask("SELECT pg_promote()")
        await until(lambda: not replica_of(house.here)._is_used)
        with reads(house.here) as found:
            assert len((await list_page(house.client, page_size=1))[0]) == 1
    assert set(found) == {"primary"}
    assert {"is no standby"} <= {each["reason"] for each in logs if each["event"] == "replica disabled"}
