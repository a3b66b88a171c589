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
class Traced:
    """A `daybook up` that sends its spans to a collector of the test's, with the account `acme`."""

    daybook: Daybook
    collector: Collector
    key: str
    metrics_port: int

    def call(self, path: str, trace_id: str, *, flags: str = "01", body: bytes = b"", **headers: str) -> Answer:
        """Sends a request as a caller whose own span is part of a trace."""
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
        """What the server logged of a trace."""
        lines = [json.loads(line) for line in self.daybook.stderr.splitlines()]
        return [line for line in lines if line.get("trace_id") == trace_id]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    """The gateway, the server and the collector, for all tests of this module."""
    folder, ports, metrics_port = tmp_path_factory.mktemp("traced"), Ports.free(), Ports.free().server
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
            yield Traced(daybook, collector, key, metrics_port)
            assert daybook.stop() == 0
            assert key.partition(".")[2].encode() not in collector.raw
        finally:
            daybook.kill()


def only(spans: list[Span], service: str, name: str) -> Span:
    """The one span of this service and name."""
    (span,) = [span for span in spans if (span.service, span.name) == (service, name)]
    return span


def test_rest_call_is_one_trace(traced: Traced) -> None:
    """A list over REST has the caller's trace id everywhere, and each span hangs below the one that caused it."""
    trace_id = uuid.uuid4().hex
    answer = traced.call("/v1/accounts/acme/transactions", trace_id)
    assert answer.status == 200
    method = "daybook.v1.Ledger/ListTransactions"
    spans = traced.collector.spans(trace_id, "database read", "ingress", method)
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


def test_posting_is_in_the_trace_of_its_call(traced: Traced) -> None:
    """The group of a lonely call hangs below it and is linked with it; what is written hangs below the group."""
    trace_id = uuid.uuid4().hex
    body = b'{"kind": "GRANT", "category": "secretive", "amount": "3"}'
    answer = traced.call("/v1/accounts/acme/transactions", trace_id, body=body, **{"content-type": "application/json"})
    assert answer.status == 200
    method = "daybook.v1.Ledger/CreateTransaction"
    spans = traced.collector.spans(trace_id, method, "post group")
    server, group = only(spans, SERVER, method), only(spans, SERVER, "post group")
    assert group.parent_id == server.span_id
    assert group.links == ((trace_id, server.span_id),)
    assert server.links == ((trace_id, group.span_id),)
    assert group.attributes["daybook.group.calls"] == 1
    write = only(spans, SERVER, "database write")
    assert write.parent_id == group.span_id
    written = [span for span in spans if span.parent_id == write.span_id]
    assert {span.name for span in written} == {"BEGIN", "SELECT", "INSERT"}
    assert b"secretive" not in traced.collector.raw


def test_native_call_is_traced(traced: Traced) -> None:
    """Native gRPC through the gateway keeps the caller's trace, too."""
    trace_id = uuid.uuid4().hex
    with grpc.insecure_channel(f"127.0.0.1:{traced.daybook.ports.gateway}") as channel:
        traceparent = ("traceparent", f"00-{trace_id}-{CALLER_SPAN_ID}-01")
        ledger_stub(channel).GetAccount(
            GetAccountRequest(name="accounts/acme"), metadata=(*credential(traced.key), traceparent)
        )
    method = "daybook.v1.Ledger/GetAccount"
    spans = traced.collector.spans(trace_id, "ingress", method)
    assert only(spans, SERVER, method).parent_id == only(spans, GATEWAY, "ingress").span_id


def test_refusal_is_told_and_is_no_fault_of_the_server(traced: Traced) -> None:
    """The span of a refused call has status and reason, and did not fail: the caller did."""
    trace_id = uuid.uuid4().hex
    assert traced.call("/v1/accounts/nobody", trace_id).status == 404
    method = "daybook.v1.Ledger/GetAccount"
    server = only(traced.collector.spans(trace_id, method), SERVER, method)
    assert server.attributes["rpc.grpc.status_code"] == 5
    assert server.attributes["error.type"] == "ACCOUNT_NOT_FOUND"
    assert not server.is_error


def test_call_without_a_trace_gets_one(traced: Traced) -> None:
    """Whoever names no trace gets one that begins at the gateway, whatever text their request id is."""
    before = traced.collector.trace_ids
    headers = {"authorization": f"Bearer {traced.key}", "x-request-id": "order 66?"}
    assert send(traced.daybook.origin, "/v1/accounts/acme/balance", headers=headers).status == 200
    (line,) = [line for line in map(json.loads, traced.daybook.stderr.splitlines()) if "order" in str(line)]
    assert line["request_id"] == "order?66?"
    assert line["trace_id"] not in before
    method = "daybook.v1.Ledger/GetBalance"
    spans = traced.collector.spans(line["trace_id"], "ingress", method)
    gateway, server = only(spans, GATEWAY, "ingress"), only(spans, SERVER, method)
    assert (gateway.parent_id, server.parent_id) == ("", gateway.span_id)
    assert line["span_id"] == server.span_id


def test_caller_may_ask_for_no_spans(traced: Traced) -> None:
    """A call that its caller doesn't have traced leaves no span, and its lines have the trace id all the same."""
    untraced, later = uuid.uuid4().hex, uuid.uuid4().hex
    assert traced.call("/v1/accounts/acme", untraced, flags="00").status == 200
    assert traced.call("/v1/accounts/acme", later).status == 200
    # Whatever there was to be sent of the first was sent no later than this.
    traced.collector.spans(later, "ingress", "daybook.v1.Ledger/GetAccount")
    assert untraced not in traced.collector.trace_ids
    (line,) = traced.lines(untraced)
    assert (line["event"], line["method"]) == ("call finished", "daybook.v1.Ledger/GetAccount")


def test_lines_of_a_call_name_its_request_and_span(traced: Traced) -> None:
    """A log line of the server can be found by the id that the gateway answers with, and by the span."""
    trace_id = uuid.uuid4().hex
    answer = traced.call("/v1/accounts/acme", trace_id)
    method = "daybook.v1.Ledger/GetAccount"
    server = only(traced.collector.spans(trace_id, method), SERVER, method)
    (line,) = traced.lines(trace_id)
    assert line["request_id"] == dict(answer.headers)["x-request-id"]
    assert line["span_id"] == server.span_id


def test_gateway_logs_the_trace_of_a_failure(traced: Traced) -> None:
    """The gateway's line of an answer of 500 or more has the same ids as the server's, and both spans failed."""
    trace_id = uuid.uuid4().hex
    file = traced.daybook.folder / "daybook.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("ALTER TABLE transactions RENAME TO away")
    try:
        answer = traced.call("/v1/accounts/acme/transactions", trace_id)
    finally:
        with closing(sqlite3.connect(file)) as connection:
            connection.execute("ALTER TABLE away RENAME TO transactions")
    assert answer.status == 503
    method = "daybook.v1.Ledger/ListTransactions"
    spans = traced.collector.spans(trace_id, "ingress", method, "SELECT")
    # The gateway tries a read again.
    tries = [span for span in spans if (span.service, span.name) == (SERVER, method)]
    assert {(span.is_error, span.attributes["error.type"]) for span in tries} == {(True, "SERVICE_UNAVAILABLE")}
    assert only(spans, GATEWAY, "ingress").is_error
    failures = [span.attributes["error.type"] for span in spans if span.name == "SELECT" and span.is_error]
    assert set(failures) == {"OperationalError"}
    wait_until(lambda: trace_id in traced.daybook.stdout, "the gateway's line")
    (line,) = [line for line in traced.daybook.stdout.splitlines() if trace_id in line]
    assert json.loads(line)["trace_id"] == trace_id
    assert {line["request_id"] for line in traced.lines(trace_id)} == {json.loads(line)["request_id"]}


def test_metrics_have_a_port_of_their_own(traced: Traced) -> None:
    """`daybook up` counts beside its traces, and what it counts is not to be had through the gateway."""
    assert traced.call("/v1/accounts/acme", uuid.uuid4().hex).status == 200
    answer = send(f"http://127.0.0.1:{traced.metrics_port}", "/metrics")
    assert answer.status == 200
    series = b'daybook_rpc_duration_seconds_count{code="OK",method="daybook.v1.Ledger/GetAccount"} '
    (line,) = [line for line in answer.body.splitlines() if line.startswith(series)]
    assert float(line.removeprefix(series)) >= 1
    # The command checks its clock, which is no further from itself than it may be.
    (skew,) = [line for line in answer.body.splitlines() if line.startswith(b"daybook_clock_skew_seconds ")]
    assert abs(float(skew.split()[1])) < 5
    assert traced.call("/metrics", uuid.uuid4().hex).status == 404
