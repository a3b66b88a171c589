"""An OpenTelemetry collector that stores the spans it receives."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanMessage


@dataclass(frozen=True, slots=True)
class Span:
    """A received span."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: str
    is_error: bool
    attributes: dict[str, Any]
    links: tuple[tuple[str, str], ...]
    """The trace id and the span id of each link."""
    seconds: float


class Collector(TraceServiceServicer):
    """Receives spans over gRPC."""

    def __init__(self) -> None:
        self._arrival = threading.Condition()
        self._spans: list[Span] = []
        self.raw = b""
        """All received bytes."""

    def Export(self, request: ExportTraceServiceRequest, context: grpc.ServicerContext) -> ExportTraceServiceResponse:
        """Stores the spans."""
        with self._arrival:
            self.raw += request.SerializeToString()
            for resource in request.resource_spans:
                service = _attributes(resource.resource.attributes)["service.name"]
                self._spans += [_read(service, span) for scope in resource.scope_spans for span in scope.spans]
            self._arrival.notify_all()
        return ExportTraceServiceResponse()

    def spans(self, trace_id: str, *names: str) -> list[Span]:
        """Waits for spans of these names. Returns all spans of the trace. Fails at a deadline."""

        def found() -> list[Span]:
            return [span for span in self._spans if span.trace_id == trace_id]

        with self._arrival:
            done = self._arrival.wait_for(lambda: set(names) <= {span.name for span in found()}, timeout=30)
            assert done, f"only {sorted(span.name for span in found())} arrived"
            return found()

    @property
    def trace_ids(self) -> set[str]:
        """The ids of all received traces."""
        with self._arrival:
            return {span.trace_id for span in self._spans}


def _read(service: str, span: SpanMessage) -> Span:
    return Span(
        service=service,
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        kind=SpanMessage.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        is_error=span.status.code == span.status.STATUS_CODE_ERROR,
        attributes=_attributes(span.attributes),
        links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
        seconds=(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    def value(pair: KeyValue) -> Any:
        return getattr(pair.value, pair.value.WhichOneof("value") or "string_value")

    return {pair.key: value(pair) for pair in pairs}


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    """Runs a collector until the end of the block. Yields it and its endpoint."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]  # generated
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
