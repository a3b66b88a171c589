"""OpenTelemetry traces: a span for each call, for the database work in it, and for each group of the poster.

Imported only if a collector is configured. A thread exports spans from a bounded queue; spans
are dropped when it is full, so no call waits for a collector.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from importlib.metadata import version
from urllib.parse import urlsplit

import grpc
from opentelemetry import context as contexts
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, Tracer, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from structlog.typing import EventDict, WrappedLogger

from server.posting.poster import PosterObserver
from server.store.database_tracer import DatabaseTracer
from server.transport.addresses import proxy_options
from server.transport.call_metadata import Metadata
from server.transport.observation import Trace

SERVICE = "daybook"
SPANS_WAITING_MAX = 2048
SPANS_AT_ONCE = 512
SEND_MILLISECONDS = 1000
"""Longest delay of a span for its batch, in milliseconds."""
EXPORT_SECONDS_MAX = 5.0
FLUSH_SECONDS_MAX = 5.0
"""Timeout of the export of the remaining spans at shutdown, in seconds."""
ATTRIBUTE_CHARACTERS_MAX = 1000
LINKS_MAX = 128

_TRACE_HEADERS = ("traceparent", "tracestate")
_FAULTS_OF_THE_SERVER = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)
"""Statuses with which a server span is an error, by the semantic conventions of OpenTelemetry."""
_propagator = TraceContextTextMapPropagator()


class Tracing:
    """Creates the spans of one server process."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self.database: DatabaseTracer = _DatabaseSpans(tracer)

    def of_method(self, method: str) -> Trace:
        """Starts a span for each call of a method, as a child of the span in the header `traceparent`."""
        service, _, short_name = method.partition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": short_name}

        def trace(metadata: Metadata) -> Callable[[grpc.StatusCode, str], None]:
            carrier = {name: value for name, value in metadata if name in _TRACE_HEADERS and isinstance(value, str)}
            parent = _propagator.extract(carrier, contexts.Context())
            span = self._tracer.start_span(method, parent, SpanKind.SERVER, attributes)
            # Stays current until the call's task ends; the task does nothing else.
            contexts.attach(set_span_in_context(span, parent))

            def end(code: grpc.StatusCode, reason: str) -> None:
                span.set_attribute("rpc.grpc.status_code", code.value[0])
                if reason:
                    span.set_attribute("error.type", reason)
                if code in _FAULTS_OF_THE_SERVER:
                    span.set_status(Status(StatusCode.ERROR))
                span.end()

            return end

        return trace

    def of_poster(self, inner: PosterObserver) -> PosterObserver:
        """An observer that creates a span for each group of calls, and then calls the inner observer."""
        return _PosterSpans(self._tracer, inner)


@asynccontextmanager
async def tracing(endpoint: str, ratio: float) -> AsyncIterator[Tracing]:
    """Sends spans to a collector (OTLP over gRPC, `http://host:port`) until the end of the block.

    Samples the fraction `ratio` of the calls without a sampling decision of the caller. At the
    end the remaining spans are exported within FLUSH_SECONDS_MAX.
    """
    provider = TracerProvider(
        ParentBased(TraceIdRatioBased(ratio)),
        Resource.create({SERVICE_NAME: SERVICE, SERVICE_VERSION: version("daybook")}),
        shutdown_on_exit=False,
        span_limits=SpanLimits(max_attribute_length=ATTRIBUTE_CHARACTERS_MAX, max_links=LINKS_MAX),
    )
    exporter = OTLPSpanExporter(
        endpoint,
        insecure=True,
        timeout=EXPORT_SECONDS_MAX,
        channel_options=tuple(proxy_options(urlsplit(endpoint).hostname or "")),  # type: ignore[arg-type]  # also numbers
    )
    provider.add_span_processor(
        BatchSpanProcessor(
            exporter,
            max_queue_size=SPANS_WAITING_MAX,
            max_export_batch_size=SPANS_AT_ONCE,
            schedule_delay_millis=SEND_MILLISECONDS,
        )
    )
    try:
        yield Tracing(provider.get_tracer(SERVICE, version("daybook")))
    finally:
        # A daemon thread, so that a slow collector does not delay the end of the process.
        flush = threading.Thread(target=provider.shutdown, name="flush traces", daemon=True)
        flush.start()
        await asyncio.to_thread(flush.join, FLUSH_SECONDS_MAX)


def add_trace_ids(_logger: WrappedLogger, _method: str, line: EventDict) -> EventDict:
    """Adds the ids of the current span to a log line."""
    here = get_current_span().get_span_context()
    if here.is_valid:
        line["trace_id"], line["span_id"] = f"{here.trace_id:032x}", f"{here.span_id:016x}"
    return line


class _DatabaseSpans(DatabaseTracer):
    """Creates spans for the database work of traced calls and groups, none for background work."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def work(self, name: str) -> AbstractContextManager[None]:
        if not get_current_span().is_recording():
            return nullcontext()
        return _current(self._tracer.start_span(f"database {name}"))

    def statement(self, system: str, text: str) -> Callable[[BaseException | None], None]:
        if not get_current_span().is_recording():
            return _untraced
        operation = text.lstrip().partition(" ")[0].upper()
        attributes = {
            "db.system.name": system,
            "db.operation.name": operation,
            "db.query.text": text[:ATTRIBUTE_CHARACTERS_MAX],
        }
        span = self._tracer.start_span(operation, kind=SpanKind.CLIENT, attributes=attributes)

        def end(failure: BaseException | None) -> None:
            if failure is not None:
                _fail(span, failure)
            span.end()

        return end


class _PosterSpans(PosterObserver):
    def __init__(self, tracer: Tracer, inner: PosterObserver) -> None:
        self._tracer = tracer
        self._inner = inner

    def origin(self) -> Span:
        return get_current_span()

    def refused(self) -> None:
        self._inner.refused()

    @contextmanager
    def posting(self, origins: Sequence[Span | None]) -> Iterator[None]:
        """The span of the group belongs to the trace of its first call, and is linked with all calls.

        Commands that were queued before tracing started have no origin.
        """
        calls = [origin for origin in origins if origin is not None and origin.is_recording()]
        with self._inner.posting(origins):
            if not calls:
                yield
                return
            span = self._tracer.start_span(
                "post group",
                set_span_in_context(calls[0], contexts.Context()),
                attributes={"daybook.group.calls": len(origins)},
                links=[Link(call.get_span_context()) for call in calls],
            )
            for call in calls:
                call.add_link(span.get_span_context())
            with _current(span):
                yield


@contextmanager
def _current(span: Span) -> Iterator[None]:
    """Makes a span the current one until the end of the block, and then ends it.

    The previous context is restored by its value: an abandoned stream is closed in another
    task, where OpenTelemetry's tokens are not valid.
    """
    previous = contexts.get_current()
    contexts.attach(set_span_in_context(span, previous))
    try:
        yield
    except BaseException as failure:
        _fail(span, failure)
        raise
    finally:
        contexts.attach(previous)
        span.end()


def _fail(span: Span, failure: BaseException) -> None:
    """Sets a span's status to failed, with the type of the error only: its text may quote values."""
    span.set_attribute("error.type", type(failure).__name__)
    span.set_status(Status(StatusCode.ERROR))


def _untraced(_failure: BaseException | None) -> None:
    """The end of a statement without a span."""
