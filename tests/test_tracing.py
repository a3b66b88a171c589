"""Traces in one process: groups of calls, and unresponsive collectors."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, closing
from pathlib import Path

import grpc
import pytest
import yaml
from daybook.v1.admin_service_pb2 import VerifyAccountsRequest
from daybook.v1.ledger_service_pb2 import CreateTransactionRequest, GetAccountRequest
from daybook.v1.transaction_pb2 import Transaction
from pydantic import ValidationError

from server import tracing
from server.app import serving
from server.book import Book
from server.config import Settings, collector_address
from server.gateway.configuration import write_deployment
from server.transport.addresses import NO_PROXY
from tests.support.callers import Client, Server
from tests.support.databases import database_occupied
from tests.support.gateways import http_manager
from tests.support.markers import only_sqlite
from tests.support.otel_collector import collecting

CALLER_SPAN_ID = "00f067aa0ba902b7"


def traceparent(trace_id: str, flags: str = "01") -> tuple[str, str]:
    """Returns the metadata that makes a call part of a trace."""
    return "traceparent", f"00-{trace_id}-{CALLER_SPAN_ID}-{flags}"


@pytest.fixture(autouse=True)
def _no_exporter_thread_remains() -> Iterator[None]:
    """Waits for threads that still send spans, so that they don't disturb other tests."""
    yield
    for thread in threading.enumerate():
        if thread.name == "flush traces" or thread.name.startswith("Otel"):
            thread.join(60)


async def create_client(book: Book, channel: grpc.aio.Channel) -> Client:
    """Creates an admin of a new tenant with the account `acme`."""
    server = Server(book, channel)
    client = await server.client(await server.create_tenant("house"), scopes={"admin"})
    await client.create_account("acme")
    await client.post("acme", Transaction.GRANT, "1")
    return client


async def test_group_and_its_calls_are_linked(book: Book) -> None:
    """Each sampled call links to the group that posted it. The group links to all its calls, below the first."""
    grant = CreateTransactionRequest(
        parent="accounts/acme", transaction=Transaction(kind=Transaction.GRANT, category="test", amount="1")
    )
    method = "daybook.v1.Ledger/CreateTransaction"
    sampled, unsampled = [uuid.uuid4().hex for _ in range(6)], uuid.uuid4().hex
    with collecting() as (collector, endpoint):
        async with (
            serving(book, Settings(port=0, otlp_endpoint=endpoint, trace_ratio=0)) as port,
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            client = await create_client(book, channel)
            parents = [*map(traceparent, sampled[:3]), traceparent(unsampled, "00"), *map(traceparent, sampled[3:])]
            await asyncio.gather(
                *(client.ledger.CreateTransaction(grant, metadata=(*client.metadata, each)) for each in parents)
            )
        # The shutdown has flushed all spans. assert collector.trace_ids == set(sampled)
        spans = [span for trace_id in sampled for span in collector.spans(trace_id, method)]
    calls = {(span.trace_id, span.span_id): span for span in spans if span.name == method}
    groups = {(span.trace_id, span.span_id): span for span in spans if span.name == "post group"}
    assert len(calls) == len(sampled)
    assert sorted(link for group in groups.values() for link in group.links) == sorted(calls)
    for key, group in groups.items():
        assert all(calls[link].links == (key,) for link in group.links)
        assert (group.trace_id, group.parent_id) == group.links[0]
    # The unsampled call was posted with some of the others, or alone.
    assert sum(group.attributes["daybook.group.calls"] for group in groups.values()) in {6, 7}


@only_sqlite
async def test_background_tasks_have_no_spans(book: Book) -> None:
    """Work of the server without a call, such as a sweep, has no spans."""
    with collecting() as (collector, endpoint):
        async with serving(book, Settings(port=0, otlp_endpoint=endpoint)):
            await book.expirations.sweep()
            assert await book.credentials.token_keys()
    assert collector.trace_ids == set()


@only_sqlite
async def test_cancelled_stream_ends_its_spans(book: Book, caplog: pytest.LogCaptureFixture) -> None:
    """If a stream is cancelled, its span and all child spans end without an error in the log."""
    trace_id, method = uuid.uuid4().hex, "daybook.v1.Admin/VerifyAccounts"
    with collecting() as (collector, endpoint):
        async with (
            serving(book, Settings(port=0, otlp_endpoint=endpoint)) as port,
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            client = await create_client(book, channel)
            call = client.admin.VerifyAccounts(
                VerifyAccountsRequest(), metadata=(*client.metadata, traceparent(trace_id))
            )
            await call.read()
            call.cancel()
            spans = await asyncio.to_thread(collector.spans, trace_id, method, "database snapshot")
    (span,) = [each for each in spans if each.name == method]
    assert span.attributes["rpc.grpc.status_code"] in {0, 1}
    assert not caplog.records


@only_sqlite
async def test_collector_on_loopback_is_reached_without_a_proxy(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans for a collector on loopback bypass the proxy of the environment."""
    trace_id = uuid.uuid4().hex
    for name in ("http_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    with collecting() as (collector, endpoint):
        async with (
            serving(book, Settings(port=0, otlp_endpoint=endpoint)) as port,
            grpc.aio.insecure_channel(f"127.0.0.1:{port}", NO_PROXY) as channel,
        ):
            client = await create_client(book, channel)
            request = GetAccountRequest(name="accounts/acme")
            await client.ledger.GetAccount(request, metadata=(*client.metadata, traceparent(trace_id)))
        # The shutdown has flushed all spans.
        assert trace_id in collector.trace_ids


@only_sqlite
async def test_calls_queued_before_tracing_starts_are_posted(book: Book) -> None:
    """A call that is queued when tracing starts is posted without a span."""
    with collecting() as (collector, endpoint):
        async with serving(book, Settings(port=0)) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            client = await create_client(book, channel)
            async with database_occupied(book):
                waiting = asyncio.create_task(client.post("acme", Transaction.GRANT, "1"))
                async with asyncio.timeout(30):
                    # Otherwise the poster may take both calls at once, and none is queued.
                    while not book.database.pools["write"].waiting:
                        await asyncio.sleep(0.01)
                    also_waiting = asyncio.create_task(client.post("acme", Transaction.GRANT, "1"))
                    while not book.poster.queue_length:
                        await asyncio.sleep(0.01)
                stack = AsyncExitStack()
                traces = await stack.enter_async_context(tracing.tracing(endpoint, 1))
                stack.enter_context(book.poster.observed(traces.of_poster(book.poster.observer)))
            async with stack:
                assert {(await waiting).sequence, (await also_waiting).sequence} == {2, 3}
    assert collector.trace_ids == set()


@pytest.fixture
async def silent() -> AsyncIterator[str]:
    """The endpoint of a collector that accepts connections and never responds."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


async def test_unresponsive_collector_delays_neither_calls_nor_shutdown(
    silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More spans than the queue holds are created without delay, and the shutdown waits at most FLUSH_SECONDS_MAX."""
    monkeypatch.setattr(tracing, "FLUSH_SECONDS_MAX", 0.3)
    # After the shutdown the exporter's thread continues until each batch times out.
    monkeypatch.setattr(tracing, "EXPORT_SECONDS_MAX", 2.0)
    monkeypatch.setattr(tracing, "SPANS_WAITING_MAX", 2 * tracing.SPANS_AT_ONCE)
    started = time.monotonic()
    async with tracing.tracing(silent, 1) as traces:
        trace = traces.of_method("daybook.v1.Ledger/GetAccount")
        for _ in range(tracing.SPANS_WAITING_MAX + 500):
            trace(())(grpc.StatusCode.OK, "")
        finished = time.monotonic()
    # Creating spans takes microseconds; waiting for the collector would take seconds.
    assert finished - started < tracing.EXPORT_SECONDS_MAX
    assert time.monotonic() - finished < tracing.EXPORT_SECONDS_MAX


@pytest.mark.parametrize(
    ("endpoint", "address"),
    [
        ("http://127.0.0.1:4317", ("127.0.0.1", 4317)),
        ("http://collector.internal:4317/", ("collector.internal", 4317)),
        ("http://[::1]:4317", ("::1", 4317)),
        ("https://127.0.0.1:4317", None),
        ("http://127.0.0.1", None),
        ("http://127.0.0.1:port", None),
        ("http://127.0.0.1:70000", None),
        ("http://user:secret@127.0.0.1:4317", None),
        ("http://127.0.0.1:4317/v1/traces", None),
        ("127.0.0.1:4317", None),
        ("http://:4317", None),
        ("", None),
    ],
)
def test_endpoint_is_host_and_port(endpoint: str, address: tuple[str, int] | None) -> None:
    """A collector's endpoint has only a host and a port; other parts are refused rather than ignored."""
    assert collector_address(endpoint) == address
    if address is None:
        with pytest.raises(ValidationError, match="otlp_endpoint"):
            Settings(otlp_endpoint=endpoint)
    else:
        assert Settings(otlp_endpoint=endpoint).otlp_endpoint == endpoint


def test_deployed_gateway_sends_spans(tmp_path: Path) -> None:
    """`daybook gateway-config` configures Envoy to send spans to the collector of the settings, like `daybook up`."""
    settings = Settings(otlp_endpoint="http://collector:4317", trace_ratio=0.5)
    write_deployment(settings, tmp_path, [("server-1", 50051)])
    written = yaml.safe_load((tmp_path / "envoy.yaml").read_text())
    manager = http_manager(written)
    assert manager["tracing"]["random_sampling"] == {"value": 50}
    assert manager["request_id_extension"]["typed_config"]["use_request_id_for_trace_sampling"] is False
    (locality,) = written["static_resources"]["clusters"][1]["load_assignment"]["endpoints"]
    assert locality["lb_endpoints"][0]["endpoint"]["address"]["socket_address"] == {
        "address": "collector",
        "port_value": 4317,
    }
