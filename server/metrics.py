"""Prometheus metrics of one server process, on a separate port.

Labels have few values, all from the contracts: methods, statuses and reasons. No label holds
a tenant, an account, a key or any other input of a caller.
"""

from __future__ import annotations

import math
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import grpc
import prometheus_client
import structlog
from prometheus_client import CollectorRegistry, Counter, GCCollector, Histogram, ProcessCollector, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.book import Book
from server.ledger.instants import EARLIEST, SECOND
from server.posting.poster import QUEUE_LENGTH_MAX, PosterObserver
from server.transport.admission import Admissions
from server.transport.observation import Measure

log = structlog.get_logger(__name__)

DURATIONS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
"""Histogram buckets of durations, in seconds."""
GROUP_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Histogram buckets of calls per group commit."""
SCRAPE_SECONDS_MAX = 5.0
"""Longest duration of a scrape, from its connection to the last byte, in seconds."""
SCRAPERS_MAX = 64
"""Maximum number of open connections of scrapers. At the limit the oldest is closed."""
POLL_SECONDS = 0.1
"""Time between two checks for the end of the server and for scrapes that take too long, in seconds."""


class Metrics:
    """The metrics of one server process."""

    def __init__(self, book: Book, admissions: Admissions) -> None:
        # The `_created` series would double the number of series.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.registry.register(_State(book, admissions))
        self._calls = Histogram(
            "daybook_rpc_duration_seconds",
            "Duration of calls, by method and status.",
            ("method", "code"),
            registry=self.registry,
            buckets=DURATIONS,
        )
        self._refusals = Counter(
            "daybook_rpc_refusals", "Refused and failed calls, by reason.", ("reason",), registry=self.registry
        )
        self.poster = _PosterMetrics(self.registry)

    def of_method(self, method: str) -> Measure:
        """Measures the calls of a method."""
        # Looking up a series costs as much as an observation, so the series of OK is looked up once.
        observe_ok = self._calls.labels(method, grpc.StatusCode.OK.name).observe

        def measure(code: grpc.StatusCode, reason: str, seconds: float) -> None:
            if code is grpc.StatusCode.OK:
                observe_ok(seconds)
                return
            self._calls.labels(method, code.name).observe(seconds)
            if reason:
                self._refusals.labels(reason).inc()

        return measure

    @contextmanager
    def served(self, host: str, port: int) -> Iterator[int]:
        """Serves the metrics page in a thread until the end of the block, and yields the port. Raises OSError."""
        server = _Server(host, port)
        server.set_app(make_wsgi_app(self.registry))
        thread = threading.Thread(target=server.serve_forever, args=(POLL_SECONDS,), name="metrics", daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            server.server_close()


class _PosterMetrics(PosterObserver):
    def __init__(self, registry: CollectorRegistry) -> None:
        self._refused = Counter(
            "daybook_poster_refused_calls", "Calls refused because the posting queue was full.", registry=registry
        )
        self._sizes = Histogram(
            "daybook_poster_group_calls",
            "Calls per group commit.",
            registry=registry,
            buckets=GROUP_SIZES,
        )
        self._durations = Histogram(
            "daybook_poster_group_duration_seconds",
            "Duration of a group commit, with its wait for a connection.",
            registry=registry,
            buckets=DURATIONS,
        )
        self._failed = Counter("daybook_poster_failed_groups", "Group commits that failed.", registry=registry)

    def refused(self) -> None:
        self._refused.inc()

    @contextmanager
    def posting(self, origins: Sequence[Any]) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        except Exception:
            self._failed.inc()
            raise
        self._sizes.observe(len(origins))
        self._durations.observe(time.perf_counter() - started)


class _State(Collector):
    """Reads the state of the server's parts at each scrape."""

    def __init__(self, book: Book, admissions: Admissions) -> None:
        self._book = book
        self._admissions = admissions

    def collect(self) -> Iterator[Metric]:
        yield from self._of_book()
        yield from self._of_admission()

    def _of_book(self) -> Iterator[Metric]:
        book, poster, database = self._book, self._book.poster, self._book.database
        yield _gauge(
            "daybook_info", "Always 1; the label is the version that runs.", {version("daybook"): 1}, "version"
        )
        yield _gauge("daybook_poster_queue_calls", "Length of the posting queue, in calls.", poster.queue_length)
        yield _gauge(
            "daybook_poster_queue_limit_calls", "Maximum length of the posting queue, in calls.", QUEUE_LENGTH_MAX
        )
        sizes = {pool: use.size for pool, use in database.pools.items()}
        yield _gauge("daybook_database_connections_limit", "Maximum number of connections of a pool.", sizes, "pool")
        in_use = {pool: use.in_use for pool, use in database.pools.items()}
        yield _gauge("daybook_database_connections_in_use", "Connections that are checked out.", in_use, "pool")
        waiting = {pool: use.waiting for pool, use in database.pools.items()}
        yield _gauge("daybook_database_connections_waiting", "Requests that wait for a connection.", waiting, "pool")
        yield _counter(
            "daybook_database_conflicts",
            "Database transactions repeated after a conflict with another writer.",
            database.conflict_count,
        )
        replica = database.replica
        yield _counter(
            "daybook_database_list_reads",
            "Reads of lists while a replica is configured, by the server that answered.",
            {} if replica is None else {by: replica.reads[by] for by in ("replica", "primary")},
            "by",
        )
        lag = None if replica is None else replica.lag_seconds
        yield _gauge("daybook_database_replica_lag_seconds", "Replication lag of the replica.", lag)
        yield _counter(
            "daybook_api_key_lookups",
            "API keys looked up in the database because they were not cached.",
            book.credentials.lookup_count,
        )
        yield _counter("daybook_expired_lots", "Lots whose expiration a sweep posted.", book.expirations.lot_count)
        last_sweep, clock, newest = book.expirations.last_sweep, book.posting_clock, poster.newest_create_time
        yield _gauge(
            "daybook_last_sweep_timestamp_seconds",
            "Start of the last completed sweep for expired lots.",
            None if last_sweep is None else last_sweep / SECOND,
        )
        yield _gauge(
            "daybook_clock_skew_seconds",
            "Difference between this machine's clock and its reference; negative if behind.",
            None if clock is None else clock.skew / SECOND,
        )
        yield _gauge(
            "daybook_newest_create_time_timestamp_seconds",
            "Newest create_time among the accounts that were posted to.",
            newest / SECOND if newest > EARLIEST else None,
        )

    def _of_admission(self) -> Iterator[Metric]:
        admissions = (("call", self._admissions.calls), ("stream", self._admissions.streams))
        in_flight = {kind: admission.in_flight for kind, admission in admissions}
        yield _gauge("daybook_rpc_in_flight_calls", "Running calls.", in_flight, "kind")
        places = {kind: admission.places for kind, admission in admissions}
        yield _gauge("daybook_rpc_in_flight_limit_calls", "Maximum number of running calls.", places, "kind")
        refused = {kind: admission.refused for kind, admission in admissions}
        yield _counter("daybook_rpc_rejected_calls", "Calls refused because too many were running.", refused, "kind")
        yield _gauge("daybook_rpc_waiting_calls", "Calls that wait for admission.", self._admissions.calls.waiting)


def _family(
    kind: type[GaugeMetricFamily | CounterMetricFamily],
    name: str,
    documentation: str,
    value: float | Mapping[str, float] | None,
    label: str = "",
) -> Metric:
    """A metric with one value, none, or one for each value of its label."""
    if not isinstance(value, Mapping):
        return kind(name, documentation, value) if value is not None else kind(name, documentation, labels=[])
    family = kind(name, documentation, labels=[label])
    for labelled, each in value.items():
        family.add_metric([labelled], each)
    return family


_gauge = partial(_family, GaugeMetricFamily)
_counter = partial(_family, CounterMetricFamily)


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """Serves each scraper in a thread, for at most SCRAPE_SECONDS_MAX. Closes the oldest of more than SCRAPERS_MAX.

    The standard library bounds the request: 64 KiB per line, 100 headers.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = SCRAPERS_MAX

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # Connections, oldest first, with their deadlines.
        self._ends: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        # Skips the reverse DNS query of HTTPServer.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Called for each new connection."""
        with self._lock:
            if len(self._ends) >= SCRAPERS_MAX:
                _cut_off(next(iter(self._ends)))
            self._ends[request] = time.monotonic() + SCRAPE_SECONDS_MAX
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Called every POLL_SECONDS: closes the connections past their deadline."""
        self._cut_off_until(time.monotonic())

    def shutdown_request(self, request: Any) -> None:
        """Called at the end of each connection."""
        with self._lock:
            self._ends.pop(request, None)
            super().shutdown_request(request)

    def server_close(self) -> None:
        """Closes the port and every connection."""
        super().server_close()
        self._cut_off_until(math.inf)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Called for an exception in a thread. A scraper that disconnected isn't logged."""
        if not isinstance(sys.exception(), OSError):
            log.error("scrape failed", exc_info=sys.exception())

    def _cut_off_until(self, moment: float) -> None:
        with self._lock:
            for connection in [each for each, end in self._ends.items() if end <= moment]:
                _cut_off(connection)


def _cut_off(connection: socket.socket) -> None:
    """Ends the reads and writes of a thread, which then closes the connection."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002  # the name of the overridden method's parameter
        """Scrapes aren't logged."""
