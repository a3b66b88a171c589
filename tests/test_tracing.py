"""Traces in one process: groups of calls, and collectors that don't answer."""

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
    """What says that a call is part of a trace."""
    return "traceparent", f"00-{trace_id}-{CALLER_SPAN_ID}-{flags}"


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Waits for threads that still try to send spans: no other test is to have them beside it."""
    yield
    for thread in threading.enumerate():
        if thread.name == "flush traces" or thread.name.startswith("Otel"):
            thread.join(60)


async def a_client(book: Book, channel: grpc.aio.Channel) -> Client:
    """A caller who may do everything in a tenant of their own, with the account `acme`."""
    server = Server(book, channel)
    client = await server.client(await server.create_tenant("house"), scopes={"admin"})
    await client.create_account("acme")
    await client.post("acme", Transaction.GRANT, "1")
    return client


async def test_group_is_linked_with_each_of_its_calls(book: Book) -> None:
    """Each traced call is linked with the one group that posted it, and that with all of them, below the first."""
    grant = CreateTransactionRequest(
        parent="accounts/acme", transaction=Transaction(kind=Transaction.GRANT, category="test", amount="1")
    )
    method = "daybook.v1.Ledger/CreateTransaction"
    traced, untraced = [uuid.uuid4().hex for _ in range(6)], uuid.uuid4().hex
    with collecting() as (collector, endpoint):
        async with (
            serving(book, Settings(port=0, otlp_endpoint=endpoint, trace_ratio=0)) as port,
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            client = await a_client(book, channel)
            parents = [*map(traceparent, traced[:3]), traceparent(untraced, "00"), *map(traceparent, traced[3:])]
            await asyncio.gather(
                *(client.ledger.CreateTransaction(grant, metadata=(*client.metadata, each)) for each in parents)
            )
        # The stop has sent all that there was.
        assert collector.trace_ids == set(traced)
        spans = [span for trace_id in traced for span in collector.spans(trace_id, method)]
    calls = {(span.trace_id, span.span_id): span for span in spans if span.name == method}
    groups = {(span.trace_id, span.span_id): span for span in spans if span.name == "post group"}
    assert len(calls) == len(traced)
    assert sorted(link for group in groups.values() for link in group.links) == sorted(calls)
    for key, group in groups.items():
        assert all(calls[link].links == (key,) for link in group.links)
        assert (group.trace_id, group.parent_id) == group.links[0]
    # The one that is not traced was posted with some of the others, or alone.
    assert sum(group.attributes["daybook.group.calls"] for group in groups.values()) in {6, 7}


@only_sqlite
async def test_what_the_server_does_of_itself_has_no_spans(book: Book) -> None:
    """Sweeps, looks for keys and the like are in no trace, and begin none."""
    with collecting() as (collector, endpoint):
        async with serving(book, Settings(port=0, otlp_endpoint=endpoint)):
            await book.expirations.sweep()
            assert await book.credentials.token_keys()
    assert collector.trace_ids == set()


@only_sqlite
async def test_stream_that_nobody_reads_to_its_end_leaves_no_span_behind(
    book: Book, caplog: pytest.LogCaptureFixture
) -> None:
    """A call that is given up in the middle of a stream has its span, and all below it ends without complaint."""
    trace_id, method = uuid.uuid4().hex, "daybook.v1.Admin/VerifyAccounts"
    with collecting() as (collector, endpoint):
        async with (
            serving(book, Settings(port=0, otlp_endpoint=endpoint)) as port,
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            client = await a_client(book, channel)
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
async def test_collector_on_this_machine_is_reached_past_a_proxy(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that the environment names can't reach this machine, so spans for it don't go there."""
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
            client = await a_client(book, channel)
            request = GetAccountRequest(name="accounts/acme")
            await client.ledger.GetAccount(request, metadata=(*client.metadata, traceparent(trace_id)))
        # The stop has sent all that there was.
        assert trace_id in collector.trace_ids


@only_sqlite
async def test_calls_that_wait_while_tracing_begins_are_posted(book: Book) -> None:
    """A call that is in the line when a collector is named is posted like any other, without a span."""
    with collecting() as (collector, endpoint):
        async with serving(book, Settings(port=0)) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            client = await a_client(book, channel)
            async with database_occupied(book):
                waiting = asyncio.create_task(client.post("acme", Transaction.GRANT, "1"))
                async with asyncio.timeout(30):
                    # Else the poster may take both at once, and none is in the line.
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
    """The endpoint of a collector that takes connections and never says a word."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


async def test_collector_that_is_silent_holds_nobody_up(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More spans than can wait are made in no time, and the stop is not kept waiting for longer than it should be."""
    monkeypatch.setattr(tracing, "FLUSH_SECONDS_MAX", 0.3)
    # The exporter's thread goes on after the stop until it gives up, a batch after the other.
    monkeypatch.setattr(tracing, "EXPORT_SECONDS_MAX", 1.0)
    monkeypatch.setattr(tracing, "SPANS_WAITING_MAX", 2 * tracing.SPANS_AT_ONCE)
    started = time.monotonic()
    async with tracing.tracing(silent, 1) as traces:
        trace = traces.of_method("daybook.v1.Ledger/GetAccount")
        for _ in range(tracing.SPANS_WAITING_MAX + 500):
            trace(())(grpc.StatusCode.OK, "")
        made = time.monotonic()
    # A span takes microseconds; a wait for the collector would take seconds.
    assert made - started < tracing.EXPORT_SECONDS_MAX
    assert time.monotonic() - made < tracing.EXPORT_SECONDS_MAX


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
    """A collector is given by a host and a port, and nothing else that would be dropped in silence."""
    assert collector_address(endpoint) == address
    if address is None:
        with pytest.raises(ValidationError, match="otlp_endpoint"):
            Settings(otlp_endpoint=endpoint)
    else:
        assert Settings(otlp_endpoint=endpoint).otlp_endpoint == endpoint


def test_gateway_elsewhere_traces_too(tmp_path: Path) -> None:
    """`daybook gateway-config` sends Envoy's spans to the collector of the settings, like `daybook up`."""
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
