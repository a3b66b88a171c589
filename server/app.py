"""The gRPC server of a ledger: composes the book, the servicers and the handler that every call passes through."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from daybook.v1.admin_service_pb2_grpc import add_AdminServicer_to_server
from daybook.v1.ledger_service_pb2_grpc import add_LedgerServicer_to_server
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.book import Book, check_demo
from server.config import CannotStart, Settings
from server.facades import Dependencies, all_facades
from server.ledger.instants import SECOND, Stopwatch
from server.rpc.admin import Admin
from server.rpc.ledger import Ledger
from server.rpc.reflection import add_reflection_to_server
from server.store.migrate import can_serve
from server.transport.addresses import AddressUnusable, bound, host_and_port, reason_of
from server.transport.admission import Admission, Admissions
from server.transport.auth import Authenticator, OpenToken
from server.transport.calls import CallHandler, StartingHandler
from server.transport.deadlines import CallBounds
from server.transport.lasting_server import Services, lasting_server
from server.transport.limits import RateLimiter
from server.transport.observation import Observation
from server.transport.open_services import OPEN_SERVICES
from server.transport.page_tokens import PageTokens
from server.transport.readiness import Health, watched_health
from server.transport.token_keys import KEY_BYTES, ConfiguredTokenKeys, SealingKeys, refreshed_token_keys
from server.transport.validation import Sizes

if TYPE_CHECKING:
    # The type only: certificates are loaded only for TLS.
    from server.transport.certificates import ServerCertificates

log = structlog.get_logger(__name__)

ANSWER_BYTES_MAX = 4 * 1024 * 1024
"""Largest answer, in bytes: twice the largest page or batch, and the default limit of gRPC clients."""

PENDING_CALLS_MAX = 5_000
"""Maximum number of calls that wait in gRPC before admission. Each takes up to 45 KiB."""

FACADES = {facade.VENDOR.service: facade.render_error for facade in all_facades()}
"""The error renderer of each facade, by the full name of its service."""
LEDGER = "daybook.v1.Ledger"
SERVICES = (LEDGER, "daybook.v1.Admin", *FACADES)


@asynccontextmanager
async def serving(
    book: Book,
    settings: Settings,
    stopwatch: Stopwatch = time.monotonic_ns,
    own_port: int | None = None,
    drain_seconds: Callable[[], float] = lambda: 0.0,
) -> AsyncIterator[int]:
    """Serves the book over gRPC until the end of the block, and yields the port.

    A worker also listens on `own_port`, and shares the port of the settings with the other
    workers; see server/supervisor.py.

    At the end the server is not ready but still takes calls for `drain_seconds`; then it takes
    no new calls, and running calls get the grace period of the settings.

    Raises CannotStart if a port is taken, a certificate or the JWK Set file is unusable, or
    demo data would be served beyond loopback.
    """
    certificates = _certificates(settings)
    await check_demo(book, settings.host)
    admissions = Admissions(
        Admission(settings.calls_in_flight_max, settings.admission_seconds_max),
        Admission(settings.streams_in_flight_max),
    )
    async with (
        _token_keys(book, settings) as token_keys,
        _observed(book, settings, admissions) as observation,
        _access_tokens(book, settings) as open_token,
        nullcontext() if book.posting_clock is None else book.posting_clock.checking(),
    ):
        authenticator = Authenticator(book.credentials, book.clock, book.api_key_uses.note, open_token=open_token)
        limiter = _limiter(settings, stopwatch)
        health = Health()
        handler = CallHandler(
            _services(book, settings, PageTokens(token_keys, book.random_bytes), health),
            authenticator,
            limiter,
            FACADES,
            CallBounds(settings.call_seconds_max, settings.stream_seconds_max, settings.stream_idle_seconds_max),
            admissions,
            observation,
            settings.text_characters_max,
        )

        def create(port: int) -> tuple[grpc.aio.Server, int]:
            server = grpc.aio.server(options=_options(settings, is_shared=own_port is not None))
            server.add_generic_rpc_handlers((handler,))
            port = _listen(server, settings.host, port, certificates)
            if own_port is not None:
                _listen(server, settings.host, own_port, certificates)
            return server, port

        async with (
            lasting_server(create, settings.port, settings.shutdown_grace_seconds, settings.stream_seconds_max) as port,
            _ready(health, admissions, book, drain_seconds),
        ):
            log.info("serving", host=settings.host, port=port, tls=certificates is not None)
            yield port
        log.info("stopped")


@asynccontextmanager
async def serving_health(settings: Settings) -> AsyncIterator[None]:
    """Answers only health checks until the end of the block: SERVING for the process, NOT_SERVING for every service.

    Raises CannotStart. A liveness probe would otherwise end a long migration.
    """
    health = Health()
    for service in SERVICES:
        health.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)
    services: Any = Services()
    health_pb2_grpc.add_HealthServicer_to_server(health, services)

    def create(port: int) -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server(options=_options(settings, is_shared=False))
        server.add_generic_rpc_handlers((*services, StartingHandler(FACADES)))
        return server, _listen(server, settings.host, port, _certificates(settings))

    async with lasting_server(create, settings.port, 0) as port:
        log.info("migration started", host=settings.host, port=port)
        yield


@asynccontextmanager
async def _observed(book: Book, settings: Settings, admissions: Admissions) -> AsyncIterator[Observation]:
    """The metrics and traces that the settings enable."""
    measuring = tracing = None
    async with AsyncExitStack() as stack:
        if settings.metrics_port is not None:
            # Loaded only if metrics are served.
            from server.metrics import Metrics  # noqa: PLC0415

            metrics = Metrics(book, admissions)
            try:
                port = stack.enter_context(metrics.served(settings.metrics_host, settings.metrics_port))
            except OSError as error:
                address = host_and_port(settings.metrics_host, settings.metrics_port)
                raise CannotStart(f"can't listen on {address} for metrics: {reason_of(error)}") from None
            log.info("metrics enabled", host=settings.metrics_host, port=port)
            stack.enter_context(book.poster.observed(metrics.poster))
            measuring = metrics.of_method
        if settings.otlp_endpoint is not None:
            # Loaded only if traces are exported.
            from server.tracing import tracing as traces  # noqa: PLC0415

            spans = await stack.enter_async_context(traces(settings.otlp_endpoint, settings.trace_ratio))
            stack.enter_context(book.database.tracing_with(spans.database))
            stack.enter_context(book.poster.observed(spans.of_poster(book.poster.observer)))
            tracing = spans.of_method
        yield Observation(measuring, tracing)


@asynccontextmanager
async def _token_keys(book: Book, settings: Settings) -> AsyncIterator[SealingKeys]:
    configured = settings.configured_token_keys()
    if configured is not None:
        yield ConfiguredTokenKeys(configured)
        return
    await book.credentials.ensure_token_key(book.random_bytes(KEY_BYTES), book.clock())
    async with refreshed_token_keys(book.credentials, book.clock) as token_keys:
        yield token_keys


@asynccontextmanager
async def _access_tokens(book: Book, settings: Settings) -> AsyncIterator[OpenToken | None]:
    if not settings.oauth2_issuer:
        yield None
        return
    # Loaded only if access tokens are accepted.
    from server.transport.access_tokens import AccessTokens, TokenRules  # noqa: PLC0415
    from server.transport.signing_keys import FetchFailed, signing_keys  # noqa: PLC0415

    rules = TokenRules(
        issuer=settings.oauth2_issuer,
        audience=settings.oauth2_audience,
        algorithms=settings.oauth2_algorithms,
        tenant_claim=settings.oauth2_tenant_claim,
        scope_claim=settings.oauth2_scope_claim,
        account_claim=settings.oauth2_account_claim or None,
        clock_skew=settings.oauth2_clock_skew_seconds * SECOND,
    )
    try:
        async with signing_keys(settings.oauth2_jwks, rules.algorithms, settings.oauth2_jwks_refresh_seconds) as keys:
            yield AccessTokens(rules, keys, book.credentials, book.clock).open
    except FetchFailed as error:
        raise CannotStart(f"oauth2_jwks: {error}") from None


def _options(settings: Settings, *, is_shared: bool) -> Sequence[tuple[str, int]]:
    return [
        # By default, two servers could share a port by accident.
        ("grpc.so_reuseport", int(is_shared)),
        ("grpc.max_receive_message_length", settings.message_bytes_max),
        # An answer may be larger than the limit on requests.
        ("grpc.max_send_message_length", max(ANSWER_BYTES_MAX, settings.message_bytes_max)),
        ("grpc.max_concurrent_streams", settings.concurrent_streams_max),
        # At the hard limit gRPC refuses every call with a status of its own; from the soft limit on, random calls.
        ("grpc.server.max_pending_requests", PENDING_CALLS_MAX),
        ("grpc.server.max_pending_requests_hard_limit", PENDING_CALLS_MAX),
        # More than the gateway's limit, so that the gateway refuses first.
        ("grpc.max_metadata_size", settings.metadata_bytes_max),
        ("grpc.absolute_max_metadata_size", 2 * settings.metadata_bytes_max),
        *_connection_bounds(settings),
    ]


def _services(book: Book, settings: Settings, page_tokens: PageTokens, health: Health) -> Services:
    services = Services()
    # Generated code expects a grpc.aio.Server.
    server: Any = services
    sizes = Sizes(settings.page_size_max, settings.batch_size_max)
    add_LedgerServicer_to_server(Ledger(book.accounts, book.transactions, page_tokens, sizes), server)
    add_AdminServicer_to_server(Admin(book.imports, book.verification, book.api_keys, page_tokens, sizes), server)
    dependencies = Dependencies(book.accounts, book.transactions, book.usage, page_tokens)
    for facade in all_facades():
        facade.add_to_server(server, dependencies)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    add_reflection_to_server((*SERVICES, *OPEN_SERVICES), server)
    return services


@asynccontextmanager
async def _ready(
    health: Health, admissions: Admissions, book: Book, drain_seconds: Callable[[], float]
) -> AsyncIterator[None]:
    """Runs background tasks and the check of readiness until the end of the block."""
    try:
        async with (
            book.expirations.sweeping(),
            book.database.using_replica(),
            watched_health(health, SERVICES, partial(_is_ready, book), drain_seconds),
        ):
            yield
    finally:
        admissions.calls.end_waiting()


async def _is_ready(book: Book) -> bool:
    """Whether the server can answer every call. Raises ServiceUnavailable."""
    return (book.posting_clock is None or book.posting_clock.is_right) and await can_serve(book.database)


def _listen(server: grpc.aio.Server, host: str, port: int, certificates: ServerCertificates | None) -> int:
    address = host_and_port(host, port)
    try:
        if certificates is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, certificates.credentials())
    except RuntimeError:
        # gRPC doesn't say why; binding the port without gRPC does.
        try:
            with bound(host, port):
                raise CannotStart(f"can't listen on {address}") from None
        except AddressUnusable as error:
            raise CannotStart(str(error)) from None


def _certificates(settings: Settings) -> ServerCertificates | None:
    if not settings.uses_tls:
        return None
    # Loaded only for TLS.
    from server.tls import server_certificates  # noqa: PLC0415

    return server_certificates(settings)


def _connection_bounds(settings: Settings) -> Sequence[tuple[str, int]]:
    """gRPC's options for the lifetime of a connection, in milliseconds."""
    seconds = {
        "grpc.server_handshake_timeout_ms": settings.handshake_seconds_max,
        "grpc.max_connection_idle_ms": settings.connection_idle_seconds_max,
        "grpc.max_connection_age_ms": settings.connection_age_seconds_max,
        # No call lasts longer than a stream.
        "grpc.max_connection_age_grace_ms": settings.stream_seconds_max,
        "grpc.keepalive_time_ms": settings.keepalive_seconds,
        "grpc.keepalive_timeout_ms": settings.keepalive_timeout_seconds,
        "grpc.http2.ping_timeout_ms": settings.keepalive_timeout_seconds,
    }
    # Also pings a connection without a call.
    return [("grpc.keepalive_permit_without_calls", 1), *((name, round(1000 * each)) for name, each in seconds.items())]


def _limiter(settings: Settings, stopwatch: Stopwatch) -> RateLimiter | None:
    if not settings.rate_limit_calls_per_second:
        return None
    return RateLimiter(settings.rate_limit_calls_per_second, settings.rate_limit_burst, stopwatch)
