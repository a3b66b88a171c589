"""Metrics, scraped over HTTP after real calls."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from daybook.v1.admin_service_pb2 import ImportTransactionsRequest
from daybook.v1.error_reason_pb2 import ErrorReason
from daybook.v1.ledger_service_pb2 import CreateTransactionRequest, GetAccountRequest, ListTransactionsRequest
from daybook.v1.transaction_pb2 import Transaction
from google.protobuf.descriptor_pool import Default

from server import metrics
from server.app import SERVICES, serving
from server.book import Book, open_book
from server.config import CannotStart, Settings
from server.gateway.envoy import require_free_ports
from server.ledger.instants import SECOND, to_timestamp
from server.ledger.names import RandomBytes
from server.store.failures import Conflict
from tests.support.callers import Client, Server
from tests.support.clock import NOON, Clock
from tests.support.databases import database_occupied, writing
from tests.support.markers import only_sqlite
from tests.support.metrics import Measured
from tests.support.processes import Daybook, Ports, free_port, sqlite_url
from tests.support.refusals import refusal_of

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/reference/metrics.md"


@pytest.fixture
async def measured(book: Book) -> AsyncIterator[Measured]:
    """A server with metrics on a free port."""
    metrics_port = free_port()
    settings = Settings(port=0, metrics_port=metrics_port, shutdown_grace_seconds=1)
    async with serving(book, settings) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Measured(Server(book, channel), metrics_port)


@pytest.fixture
async def client(measured: Measured) -> Client:
    """A caller with every scope in its own tenant."""
    return await measured.server.client(await measured.server.create_tenant("house"), scopes={"admin"})


@only_sqlite
async def test_every_call_is_counted_by_method_and_status(measured: Measured, client: Client) -> None:
    """Rate, errors and durations count each call once, whatever its outcome."""
    await client.create_account("acme")
    for _ in range(3):
        await client.post("acme", Transaction.GRANT, "1")
    await refusal_of(client.post("acme", Transaction.CHARGE, "-100"))
    await refusal_of(client.post("acme", Transaction.CHARGE, "a few"))
    for _ in range(2):
        await refusal_of(client.ledger.GetAccount(GetAccountRequest(name="accounts/unknown"), metadata=client.metadata))
    await refusal_of(client.ledger.GetAccount(GetAccountRequest(name="accounts/acme")))
    for token in ("x", "y"):
        request = ListTransactionsRequest(parent="accounts/acme", page_token=token)
        await refusal_of(client.ledger.ListTransactions(request, metadata=client.metadata))
    with pytest.raises(grpc.aio.AioRpcError):
        await client.raw_call("NoSuchMethod", b"")
    assert await client.verify() == []
    found = await measured.scrape()
    counts = {
        ("OK", "daybook.v1.Ledger/CreateAccount"): 1,
        ("OK", "daybook.v1.Ledger/CreateTransaction"): 3,
        ("FAILED_PRECONDITION", "daybook.v1.Ledger/CreateTransaction"): 1,
        ("INVALID_ARGUMENT", "daybook.v1.Ledger/CreateTransaction"): 1,
        ("OK", "daybook.v1.Ledger/GetAccount"): 0,
        ("NOT_FOUND", "daybook.v1.Ledger/GetAccount"): 2,
        ("UNAUTHENTICATED", "daybook.v1.Ledger/GetAccount"): 1,
        ("OK", "daybook.v1.Ledger/ListTransactions"): 0,
        ("INVALID_ARGUMENT", "daybook.v1.Ledger/ListTransactions"): 2,
        ("OK", "daybook.v1.Admin/VerifyAccounts"): 1,
    }
    assert found.of("daybook_rpc_duration_seconds_count") == counts
    for (code, method), count in counts.items():
        assert found.one("daybook_rpc_duration_seconds_bucket", code=code, method=method, le="+Inf") == count
        assert (found.one("daybook_rpc_duration_seconds_sum", code=code, method=method) > 0) == (count > 0)
    assert found.of("daybook_rpc_refusals_total") == {
        ("INSUFFICIENT_CREDITS",): 1,
        ("FIELD_INVALID",): 1,
        ("ACCOUNT_NOT_FOUND",): 2,
        ("CREDENTIAL_MISSING",): 1,
        ("PAGE_TOKEN_INVALID",): 2,
    }


@only_sqlite
async def test_import_counts_as_one_call(measured: Measured, client: Client, clock: Clock) -> None:
    """An import of several messages counts as one call."""
    await client.create_account("acme")

    item = ImportTransactionsRequest.Item(
        parent="accounts/acme",
        transaction=Transaction(kind=Transaction.GRANT, category="test", amount="1"),
        create_time=to_timestamp(clock() - SECOND),
    )

    async def history() -> AsyncIterator[ImportTransactionsRequest]:
        for _ in range(2):
            yield ImportTransactionsRequest(items=[item, item])

    await client.admin.ImportTransactions(history(), metadata=client.metadata)
    found = await measured.scrape()
    assert found.of("daybook_rpc_duration_seconds_count")["OK", "daybook.v1.Admin/ImportTransactions"] == 1


async def test_metrics_of_waiting_and_cancelled_calls(measured: Measured, client: Client) -> None:
    """The metrics show the queue and the pool while the poster waits, then the outcomes and groups of the calls."""
    await client.create_account("acme")
    # The credential and the account are cached from now on; only the poster needs the database.
    await client.post("acme", Transaction.GRANT, "1")
    grant = CreateTransactionRequest(
        parent="accounts/acme", transaction=Transaction(kind=Transaction.GRANT, category="test", amount="1")
    )
    pools = measured.server.book.database.pools
    pool = "write" if "write" in pools else "all"
    method = "daybook.v1.Ledger/CreateTransaction"
    async with database_occupied(measured.server.book):
        answered = client.ledger.CreateTransaction(grant, metadata=client.metadata)
        waiting = await measured.until(lambda found: found.one("daybook_database_connections_waiting", pool=pool) == 1)
        assert waiting.one("daybook_poster_queue_calls") == 0
        assert waiting.one("daybook_database_connections_in_use", pool=pool) == pools[pool].size
        cancelled = client.ledger.CreateTransaction(grant, metadata=client.metadata)
        late = client.ledger.CreateTransaction(grant, metadata=client.metadata, timeout=1)
        await measured.until(lambda found: found.one("daybook_poster_queue_calls") == 2)
        cancelled.cancel()
        with pytest.raises(grpc.aio.AioRpcError, match="DEADLINE_EXCEEDED"):
            await late
        calls = "daybook_rpc_duration_seconds_count"
        await measured.until(
            lambda found: {("CANCELLED", method), ("DEADLINE_EXCEEDED", method)} <= found.of(calls).keys()
        )
    await answered
    found = await measured.until(lambda found: found.one("daybook_poster_group_calls_count") == 3)
    assert {code: count for (code, each), count in found.of(calls).items() if each == method} == {
        "OK": 2,
        "CANCELLED": 1,
        "DEADLINE_EXCEEDED": 1,
    }
    # Two groups of one call, and one of the two calls that waited together and whose callers had left.
    assert found.one("daybook_poster_group_calls_sum") == 4
    assert found.one("daybook_poster_group_calls_bucket", le="1.0") == 2
    assert found.one("daybook_poster_group_duration_seconds_count") == 3
    assert found.one("daybook_poster_queue_calls") == 0
    for name in ("in_use", "waiting"):
        assert not any(found.of(f"daybook_database_connections_{name}").values())
    assert found.of("daybook_database_connections_limit") == {
        (name,): use.size for name, use in measured.server.book.database.pools.items()
    }


@only_sqlite
async def test_full_queue_and_failed_group_are_counted(
    measured: Measured, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that is refused by a full queue and a group that fails to commit are counted."""
    await client.create_account("acme")
    await client.post("acme", Transaction.GRANT, "1")
    poster = measured.server.book.poster
    async with database_occupied(measured.server.book):
        first = asyncio.create_task(client.post("acme", Transaction.GRANT, "1"))
        await measured.until(lambda found: found.one("daybook_database_connections_waiting", pool="write") == 1)
        monkeypatch.setattr(poster._queue, "_maxsize", 1)
        second = asyncio.create_task(client.post("acme", Transaction.GRANT, "1"))
        await measured.until(lambda found: found.one("daybook_poster_queue_calls") == 1)
        assert (await refusal_of(client.post("acme", Transaction.GRANT, "1"))).reason == "TOO_BUSY"
    await asyncio.gather(first, second)
    assert (await measured.scrape()).one("daybook_poster_refused_calls_total") == 1
    async with writing(measured.server.book.database) as connection:
        await connection.exec_driver_sql("DROP TABLE refunds")
        await connection.exec_driver_sql("DROP TABLE account_states")
    assert (await refusal_of(client.post("acme", Transaction.GRANT, "1"))).code is grpc.StatusCode.UNAVAILABLE
    found = await measured.scrape()
    assert found.one("daybook_poster_failed_groups_total") == 1
    assert found.one("daybook_rpc_refusals_total", reason="TOO_BUSY") == 1
    assert found.one("daybook_rpc_refusals_total", reason="SERVICE_UNAVAILABLE") == 1


async def test_conflicts_are_counted(measured: Measured) -> None:
    """Each rollback of a database transaction because of a conflict counts."""
    tries = Counter[str]()

    def work(_connection: object) -> str:
        tries["work"] += 1
        if tries["work"] < 3:
            raise Conflict
        return "done"

    assert await measured.server.book.database.transact(work) == "done"
    assert (await measured.scrape()).one("daybook_database_conflicts_total") == 2


@only_sqlite
async def test_metrics_of_clocks(database_url: str, clock: Clock, random_bytes: RandomBytes) -> None:
    """The metrics have the clock's skew, and the newest create_time of a posting."""
    settings = Settings(port=0, metrics_port=free_port(), shutdown_grace_seconds=1)
    async with (
        # A stopwatch that stands still, like the clock of the tests.
        open_book(database_url, clock, random_bytes, clock_skew_max=5 * SECOND, stopwatch=lambda: 0) as book,
        serving(book, settings) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        assert settings.metrics_port is not None
        measured = Measured(Server(book, channel), settings.metrics_port)
        client = await measured.server.client(await measured.server.create_tenant("house"))
        await client.create_account("acme")
        await client.post("acme", Transaction.GRANT, "1")
        assert not (await measured.scrape()).of("daybook_newest_create_time_timestamp_seconds")
        clock.advance(6)
        found = await measured.scrape()
        assert found.one("daybook_clock_skew_seconds") == 6
        assert (await refusal_of(client.post("acme", Transaction.GRANT, "1"))).reason == "CLOCK_SKEWED"
        clock.advance(-12)
        assert (await measured.scrape()).one("daybook_clock_skew_seconds") == -6
        clock.advance(6)
        await client.post("acme", Transaction.GRANT, "1")
        found = await measured.scrape()
        assert found.one("daybook_clock_skew_seconds") == 0
        assert found.one("daybook_newest_create_time_timestamp_seconds") == NOON / SECOND
        assert found.one("daybook_rpc_refusals_total", reason="CLOCK_SKEWED") == 1


@only_sqlite
async def test_metrics_of_sweeps(measured: Measured, client: Client, clock: Clock) -> None:
    """The metrics have the start of the last complete sweep, and the number of expired lots."""
    await measured.until(lambda found: ("daybook_last_sweep_timestamp_seconds", ()) in found)
    await client.create_account("acme")
    for _ in range(2):
        await client.post("acme", Transaction.GRANT, "1", ttl={"seconds": 60})
    clock.advance(61)
    await measured.server.book.expirations.sweep()
    found = await measured.scrape()
    assert found.one("daybook_expired_lots_total") == 2
    assert found.one("daybook_last_sweep_timestamp_seconds") == clock() / SECOND


@only_sqlite
async def test_keys_are_looked_up_once(measured: Measured, client: Client) -> None:
    """Many calls with one key look it up once."""
    for account_id in ("acme", "other", "third"):
        await client.create_account(account_id)
    assert (await measured.scrape()).one("daybook_api_key_lookups_total") == 1


@only_sqlite
async def test_labels_come_from_the_contracts(measured: Measured, client: Client) -> None:
    """No label has a caller's text, so the number of series is bounded by methods and statuses."""
    account_id = "private-account"
    await client.create_account(account_id)
    await client.post(account_id, Transaction.GRANT, "1", request_id="private-request")
    await refusal_of(client.post("unknown-account", Transaction.GRANT, "1"))
    found = await measured.scrape()
    values: dict[str, set[str]] = {}
    for _, labels in found:
        for name, value in labels:
            values.setdefault(name, set()).add(value)
    assert values.pop("method") <= {
        f"{service}/{method.name}" for service in SERVICES for method in Default().FindServiceByName(service).methods
    }
    assert values.pop("code") <= {code.name for code in grpc.StatusCode}
    assert values.pop("reason") <= set(ErrorReason.keys())
    assert values.pop("pool") == {"read", "write"}
    assert values.pop("kind") == {"call", "stream"}
    assert values.keys() <= {"le", "generation", "version"}


@only_sqlite
async def test_documents_name_every_metric(measured: Measured) -> None:
    """The table of docs/reference/metrics.md has exactly the metrics of a scrape, with their types."""
    exported = re.findall(r"^# TYPE (\S+) (\S+)$", await measured.text(), re.MULTILINE)
    rows = re.findall(r"^\| `(daybook_[a-z_]+)` \| (counter|gauge|histogram) \|", DOCUMENT.read_text(), re.MULTILINE)
    families = tuple(re.findall(r"`([a-z_]+_)\*`", DOCUMENT.read_text()))
    assert sorted(rows) == sorted(each for each in exported if not each[0].startswith(families))
    assert all(any(name.startswith(family) for name, _ in exported) for family in families)


@only_sqlite
async def test_taken_port_prevents_the_start(book: Book) -> None:
    """If the metrics port is taken the server doesn't start, and the error names the port and its purpose."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotStart, match=rf"127\.0\.0\.1:{port} for metrics"):
            async with serving(book, Settings(port=0, metrics_port=port)):
                raise AssertionError("the server started")
        server, gateway, admin = (free_port() for _ in range(3))
        with pytest.raises(CannotStart, match=rf"127\.0\.0\.1:{port} for metrics: the port is taken"):
            require_free_ports(Settings(metrics_port=port, port=server, gateway_port=gateway, gateway_admin_port=admin))


@asynccontextmanager
async def slow_scrapers(port: int, count: int) -> AsyncIterator[list[asyncio.StreamReader]]:
    """Scrapers that send their request one byte at a time, and never complete it."""
    connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(count)]

    async def drip() -> None:
        for number in itertools.count():
            for _, writer in connections:
                writer.write(b"GET /metrics HTTP/1.1\r\nx: "[number : number + 1] or b"x")
            await asyncio.sleep(0.1)

    dripping = asyncio.create_task(drip())
    try:
        yield [reader for reader, _ in connections]
    finally:
        dripping.cancel()
        for _, writer in connections:
            writer.transport.abort()


@only_sqlite
@pytest.mark.parametrize("count", [50, 2 * metrics.SCRAPERS_MAX])
async def test_slow_scrapers_delay_no_other(measured: Measured, count: int) -> None:
    """Any number of slow scrapers delays no other scrape."""
    async with slow_scrapers(measured.metrics_port, count):
        started = time.monotonic()
        assert "daybook_info" in await measured.text()
        assert time.monotonic() - started < metrics.SCRAPE_SECONDS_MAX / 2


@only_sqlite
async def test_slow_scraper_is_cut_off(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scrape ends at its time limit, even if bytes still arrive."""
    assert 0 < metrics.SCRAPE_SECONDS_MAX <= 5
    monkeypatch.setattr(metrics, "SCRAPE_SECONDS_MAX", 0.5)
    async with slow_scrapers(measured.metrics_port, 3) as readers, asyncio.timeout(30):
        for reader in readers:
            with contextlib.suppress(ConnectionError):
                assert b"200 OK" not in await reader.read()


async def test_slow_scrapers_delay_no_shutdown(tmp_path: Path) -> None:
    """SIGTERM ends a process within its grace period, whatever scrapers are connected."""
    ports, port = Ports.free(), free_port()
    daybook = Daybook.start(
        *("serve", "--port", str(ports.server), "--metrics-port", str(port), "--shutdown-grace-seconds", "1"),
        *("--database-url", sqlite_url(tmp_path / "daybook.db")),
        folder=tmp_path / "output",
        ports=ports,
    )
    try:
        await asyncio.to_thread(daybook.wait_for, " serving ")
        async with slow_scrapers(port, 50):
            started = time.monotonic()
            assert await asyncio.to_thread(daybook.stop, signal.SIGTERM) == 0
            assert time.monotonic() - started < 5
    finally:
        daybook.kill()


@only_sqlite
async def test_port_closes_with_the_server(book: Book) -> None:
    """At the stop the port is closed, and the poster has its previous observer again."""
    port, before = free_port(), book.poster.observer
    async with serving(book, Settings(port=0, metrics_port=port, shutdown_grace_seconds=0)):
        assert book.poster.observer is not before
    assert book.poster.observer is before
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    # Without the setting nothing is served.
    async with serving(book, Settings(port=0, shutdown_grace_seconds=0)):
        assert book.poster.observer is before
        assert not [thread for thread in threading.enumerate() if thread.name == "metrics"]
