"""Traces through the real gateway: one trace id from the caller through Envoy and the server to the database."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import grpc
import pytest
from daybook.v1.account_pb2 import Account
from daybook.v1.ledger_service_pb2 import CreateAccountRequest, GetAccountRequest

from tests.support.callers import credential, ledger_stub
from tests.support.http_client import Answer, send
from tests.support.ledgers import create_key
from tests.support.otel_collector import Collector, Span, collecting
from tests.support.processes import Daybook, Ports, sqlite_url
from tests.support.waiting import wait_until

CALLER_SPAN_ID = "00f067aa0ba902b7"
GATEWAY, SERVER = "daybook-gateway", "daybook"


@dataclass(frozen=True, slots=True)
class TracedDaybook:
    """A `daybook up` with the account `acme`, which sends its spans to the test's collector."""

    daybook: Daybook
    collector: Collector
    key: str
    metrics_port: int

    def call(self, path: str, trace_id: str, *, flags: str = "01", body: bytes = b"", **headers: str) -> Answer:
        """Sends a request with the trace id and the span id of its caller."""
        return send(
            self.daybook.origin,
            path,
            method="POST" if body else "GET",
            headers={
                "authorization": f"Bearer {self.key}",
                "traceparent": f"00-{trace_id}-{CALLER_SPAN_ID}-{flags}",
                **headers,
            },
            body=body,
        )

    def lines(self, trace_id: str) -> list[dict[str, str]]:
        """The server's log lines of a trace."""
        lines = [json.loads(line) for line in self.daybook.stderr.splitlines()]
        return [line for line in lines if line.get("trace_id") == trace_id]


@pytest.fixture(scope="module")
def tracing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TracedDaybook]:
    """The gateway, the server and the collector, for all tests of this module."""
    folder, ports, metrics_port = tmp_path_factory.mktemp("tracing"), Ports.free(), Ports.free().server
    url = sqlite_url(folder / "daybook.db")
    key = asyncio.run(create_key(url, {"transactions", "accounts"}))
    with collecting() as (collector, endpoint):
        daybook = Daybook.start(
            *("up", "--database-url", url, "--otlp-endpoint", endpoint, "--metrics-port", str(metrics_port)),
            *("--log-format", "json", "--log-level", "debug"),
            *ports.flags,
            folder=folder,
            ports=ports,
        )
        try:
            daybook.wait_for('"event": "gateway started"')
            with grpc.insecure_channel(f"127.0.0.1:{ports.gateway}") as channel:
                ledger_stub(channel).CreateAccount(
                    CreateAccountRequest(account_id="acme", account=Account(kind=Account.USER)),
                    metadata=credential(key),
                )
            yield TracedDaybook(daybook, collector, key, metrics_port)
            assert daybook.stop() == 0
            assert key.partition(".")[2].encode() not in collector.raw
        finally:
            daybook.kill()


def only(spans: list[Span], service: str, name: str) -> Span:
    """The only span of a service and a name."""
    (span,) = [span for span in spans if (span.service, span.name) == (service, name)]
    return span


def test_spans_of_a_rest_call_form_one_trace(tracing: TracedDaybook) -> None:
    """All spans of a list over REST have the caller's trace id, and each is a child of the span that caused it."""
    trace_id = uuid.uuid4().hex
    answer = tracing.call("/v1/accounts/acme/transactions", trace_id)
    assert answer.status == 200
    method = "daybook.v1.Ledger/ListTransactions"
    spans = tracing.collector.spans(trace_id, "database read", "ingress", method)
    (gateway,) = [span for span in spans if span.service == GATEWAY]
    assert (gateway.kind, gateway.parent_id) == ("SERVER", CALLER_SPAN_ID)
    server = only(spans, SERVER, method)
    assert (server.kind, server.parent_id, server.is_error) == ("SERVER", gateway.span_id, False)
    assert server.attributes == {
        "rpc.system": "grpc",
        "rpc.service": "daybook.v1.Ledger",
        "rpc.method": "ListTransactions",
        "rpc.grpc.status_code": 0,
    }
    selects = [span for span in spans if span.name == "SELECT"]
    assert selects
    reads = {span.span_id: span for span in spans if span.name == "database read"}
    for select in selects:
        assert select.kind == "CLIENT"
        assert reads[select.parent_id].parent_id == server.span_id
        assert select.attributes["db.system.name"] == "sqlite"
        assert select.attributes["db.operation.name"] == "SELECT"
    assert any("FROM transactions" in select.attributes["db.query.text"] for select in selects)
    assert not any("acme" in select.attributes["db.query.text"] for select in selects)


def test_spans_of_a_posting_are_in_its_calls_trace(tracing: TracedDaybook) -> None:
    """The span of a group with one call is a child of the call and linked with it; database spans are its children."""
    trace_id = uuid.uuid4().hex
    body = b'{"kind": "GRANT", "category": "secretive", "amount": "3"}'
    answer = tracing.call("/v1/accounts/acme/transactions", trace_id, body=body, **{"content-type": "application/json"})
    assert answer.status == 200
    method = "daybook.v1.Ledger/CreateTransaction"
    spans = tracing.collector.spans(trace_id, method, "post group")
    server, group = only(spans, SERVER, method), only(spans, SERVER, "post group")
    assert group.parent_id == server.span_id
    assert group.links == ((trace_id, server.span_id),)
    assert server.links == ((trace_id, group.span_id),)
    assert group.attributes["daybook.group.calls"] == 1
    write = only(spans, SERVER, "database write")
    assert write.parent_id == group.span_id
    written = [span for span in spans if span.parent_id == write.span_id]
    assert {span.name for span in written} == {"BEGIN", "SELECT", "INSERT"}
    assert b"secretive" not in tracing.collector.raw


def test_native_call_keeps_the_callers_trace(tracing: TracedDaybook) -> None:
    """A native gRPC call through the gateway has the caller's trace id."""
    trace_id = uuid.uuid4().hex
    with grpc.insecure_channel(f"127.0.0.1:{tracing.daybook.ports.gateway}") as channel:
        traceparent = ("traceparent", f"00-{trace_id}-{CALLER_SPAN_ID}-01")
        ledger_stub(channel).GetAccount(
            GetAccountRequest(name="accounts/acme"), metadata=(*credential(tracing.key), traceparent)
        )
    method = "daybook.v1.Ledger/GetAccount"
    spans = tracing.collector.spans(trace_id, "ingress", method)
    assert only(spans, SERVER, method).parent_id == only(spans, GATEWAY, "ingress").span_id


def test_span_of_a_refusal_has_its_reason_and_no_error(tracing: TracedDaybook) -> None:
    """The span of a refused call has its status and reason, and is not an error of the server."""
    trace_id = uuid.uuid4().hex
    assert tracing.call("/v1/accounts/unknown", trace_id).status == 404
    method = "daybook.v1.Ledger/GetAccount"
    server = only(tracing.collector.spans(trace_id, method), SERVER, method)
    assert server.attributes["rpc.grpc.status_code"] == 5
    assert server.attributes["error.type"] == "ACCOUNT_NOT_FOUND"
    assert not server.is_error


def test_call_without_traceparent_gets_a_trace(tracing: TracedDaybook) -> None:
    """A call without traceparent gets a trace that begins at the gateway, also if its x-request-id is no UUID."""
    known = tracing.collector.trace_ids
    headers = {"authorization": f"Bearer {tracing.key}", "x-request-id": "order 66?"}
    assert send(tracing.daybook.origin, "/v1/accounts/acme/balance", headers=headers).status == 200
    (line,) = [line for line in map(json.loads, tracing.daybook.stderr.splitlines()) if "order" in str(line)]
    assert line["request_id"] == "order?66?"
    assert line["trace_id"] not in known
    method = "daybook.v1.Ledger/GetBalance"
    spans = tracing.collector.spans(line["trace_id"], "ingress", method)
    gateway, server = only(spans, GATEWAY, "ingress"), only(spans, SERVER, method)
    assert (gateway.parent_id, server.parent_id) == ("", gateway.span_id)
    assert line["span_id"] == server.span_id


def test_unsampled_call_has_no_spans(tracing: TracedDaybook) -> None:
    """A call with the sampled flag off has no spans, and its log lines still have the trace id."""
    unsampled, later = uuid.uuid4().hex, uuid.uuid4().hex
    assert tracing.call("/v1/accounts/acme", unsampled, flags="00").status == 200
    assert tracing.call("/v1/accounts/acme", later).status == 200
    # Spans are exported in order, so spans of the first call would have arrived before these.
    tracing.collector.spans(later, "ingress", "daybook.v1.Ledger/GetAccount")
    assert unsampled not in tracing.collector.trace_ids
    (line,) = tracing.lines(unsampled)
    assert (line["event"], line["method"]) == ("call finished", "daybook.v1.Ledger/GetAccount")


def test_log_line_has_request_id_and_span_id(tracing: TracedDaybook) -> None:
    """A call's log line has the x-request-id of the answer and the span id of the server."""
    trace_id = uuid.uuid4().hex
    answer = tracing.call("/v1/accounts/acme", trace_id)
    method = "daybook.v1.Ledger/GetAccount"
    server = only(tracing.collector.spans(trace_id, method), SERVER, method)
    (line,) = tracing.lines(trace_id)
    assert line["request_id"] == dict(answer.headers)["x-request-id"]
    assert line["span_id"] == server.span_id


def test_gateway_logs_the_trace_id_of_a_failure(tracing: TracedDaybook) -> None:
    """The gateway's log line of a 5xx answer has the ids of the server's line, and both spans are errors."""
    trace_id = uuid.uuid4().hex
    file = tracing.daybook.folder / "daybook.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("ALTER TABLE transactions RENAME TO away")
    try:
        answer = tracing.call("/v1/accounts/acme/transactions", trace_id)
    finally:
        with closing(sqlite3.connect(file)) as connection:
            connection.execute("ALTER TABLE away RENAME TO transactions")
    assert answer.status == 503
    method = "daybook.v1.Ledger/ListTransactions"
    spans = tracing.collector.spans(trace_id, "ingress", method, "SELECT")
    # The gateway retries reads.
    attempts = [span for span in spans if (span.service, span.name) == (SERVER, method)]
    assert {(span.is_error, span.attributes["error.type"]) for span in attempts} == {(True, "SERVICE_UNAVAILABLE")}
    assert only(spans, GATEWAY, "ingress").is_error
    failures = [span.attributes["error.type"] for span in spans if span.name == "SELECT" and span.is_error]
    assert set(failures) == {"OperationalError"}
    wait_until(lambda: trace_id in tracing.daybook.stdout, "the gateway logs the call")
    (line,) = [line for line in tracing.daybook.stdout.splitlines() if trace_id in line]
    assert json.loads(line)["trace_id"] == trace_id
    assert {line["request_id"] for line in tracing.lines(trace_id)} == {json.loads(line)["request_id"]}


def test_metrics_have_a_port_of_their_own(tracing: TracedDaybook) -> None:
    """Metrics are served on their own port, and not through the gateway."""
    assert tracing.call("/v1/accounts/acme", uuid.uuid4().hex).status == 200
    answer = send(f"http://127.0.0.1:{tracing.metrics_port}", "/metrics")
    assert answer.status == 200
    series = b'daybook_rpc_duration_seconds_count{code="OK",method="daybook.v1.Ledger/GetAccount"} '
    (line,) = [line for line in answer.body.splitlines() if line.startswith(series)]
    assert float(line.removeprefix(series)) >= 1
    # The clock's reference is the same machine, so the skew is small.
    (skew,) = [line for line in answer.body.splitlines() if line.startswith(b"daybook_clock_skew_seconds ")]
    assert abs(float(skew.split()[1])) < 5
    assert tracing.call("/metrics", uuid.uuid4().hex).status == 404
