"""The composition root: the only place that knows how the parts fit together."""

from __future__ import annotations

import ipaddress
import logging
import secrets
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
import structlog
from daybook.facades.dreadnode.v1.credits_service_pb2_grpc import add_CreditsServicer_to_server
from daybook.facades.nebulablock.v1.users_service_pb2_grpc import add_UsersServicer_to_server
from daybook.facades.paged.v1.statements_service_pb2_grpc import add_StatementsServicer_to_server
from daybook.facades.spacebring.v1.transactions_service_pb2_grpc import add_TransactionsServicer_to_server
from daybook.facades.teable.v1.billing_service_pb2_grpc import add_BillingServicer_to_server
from daybook.v1.admin_service_pb2_grpc import add_AdminServicer_to_server
from daybook.v1.ledger_service_pb2_grpc import add_LedgerServicer_to_server
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from server.config import Settings
from server.facades import dreadnode, nebulablock, paged, spacebring, teable
from server.ledger.instants import Clock, Instant
from server.ledger.names import RandomBytes
from server.rpc.admin import Admin
from server.rpc.ledger import Ledger
from server.store.accounts import AccountStore
from server.store.books import BookStore
from server.store.credentials import CredentialStore
from server.store.database import Database
from server.store.migrate import migrate
from server.store.poster import Poster
from server.store.transactions import TransactionStore
from server.transport.auth import Authenticator
from server.transport.calls import OPEN_SERVICES, CallBounds, CallInterceptor
from server.transport.certificates import CertificateFiles, CertificateUnusable, ServerCertificates
from server.transport.limits import RateLimiter, Stopwatch
from server.transport.page_tokens import KEY_BYTES, PageTokens
from server.transport.token_keys import refreshed_token_keys
from server.usecases.accounts import Accounts
from server.usecases.api_key_uses import ApiKeyUses
from server.usecases.api_keys import ApiKeys
from server.usecases.expirations import Expirations
from server.usecases.transactions import Transactions
from server.usecases.usage import Usage
from server.usecases.verification import Verification

log = structlog.get_logger(__name__)

METADATA_BYTES_MAX = 32_768

FACADES = {
    teable.SERVICE: teable.render_error,
    nebulablock.SERVICE: nebulablock.render_error,
    spacebring.SERVICE: spacebring.render_error,
    dreadnode.SERVICE: dreadnode.render_error,
    paged.SERVICE: paged.render_error,
}
"""Each facade's service, and how it words errors."""
SERVICES = ("daybook.v1.Ledger", "daybook.v1.Admin", *FACADES)


class CannotStart(Exception):
    """Why the server can't start, in words for whoever starts it."""


def system_clock() -> Instant:
    """The time of this machine."""
    return time.time_ns() // 1000


@dataclass(frozen=True, slots=True)
class Book:
    """A ledger in a database, without a server: stores and use cases."""

    database: Database
    credentials: CredentialStore
    api_keys: ApiKeys
    api_key_uses: ApiKeyUses
    account_store: AccountStore
    accounts: Accounts
    transactions: Transactions
    usage: Usage
    verification: Verification
    expirations: Expirations
    clock: Clock
    random_bytes: RandomBytes


@asynccontextmanager
async def open_book(
    database_url: str, clock: Clock = system_clock, random_bytes: RandomBytes = secrets.token_bytes
) -> AsyncIterator[Book]:
    """Opens the ledger in a database, which is created and migrated if need be."""
    database = Database(database_url)
    try:
        await migrate(database)
        account_store = AccountStore(database)
        transaction_store = TransactionStore(database)
        poster = Poster(database, clock, random_bytes)
        credentials = CredentialStore(database)
        api_key_uses = ApiKeyUses(credentials, clock)
        async with poster.working(), api_key_uses.flushing():
            yield Book(
                database=database,
                credentials=credentials,
                api_keys=ApiKeys(credentials, account_store, clock, random_bytes),
                api_key_uses=api_key_uses,
                account_store=account_store,
                accounts=Accounts(account_store, clock),
                transactions=Transactions(account_store, transaction_store, poster),
                usage=Usage(account_store, transaction_store, clock),
                verification=Verification(account_store, BookStore(database)),
                expirations=Expirations(account_store, poster, clock),
                clock=clock,
                random_bytes=random_bytes,
            )
    finally:
        await database.close()


@asynccontextmanager
async def serving(book: Book, settings: Settings, stopwatch: Stopwatch = time.monotonic_ns) -> AsyncIterator[int]:
    """Serves the book over gRPC; gives the port. Calls under way at the end may finish.

    Raises CannotStart if the port is taken or the certificate can't be used, or for a demo
    database on an address that others can reach.
    """
    certificates = server_certificates(settings)
    await _check_demo(book, settings.host)
    await book.credentials.ensure_token_key(book.random_bytes(KEY_BYTES), book.clock())
    async with (
        refreshed_token_keys(book.credentials, book.clock) as token_keys,
        _serving(book, settings, stopwatch, PageTokens(token_keys, book.random_bytes), certificates) as port,
    ):
        yield port


@asynccontextmanager
async def _serving(
    book: Book,
    settings: Settings,
    stopwatch: Stopwatch,
    page_tokens: PageTokens,
    certificates: ServerCertificates | None,
) -> AsyncIterator[int]:
    authenticator = Authenticator(book.credentials, book.clock, book.api_key_uses.note)
    bounds = CallBounds(settings.call_seconds_max, settings.stream_seconds_max, settings.stream_idle_seconds_max)
    server = grpc.aio.server(
        interceptors=[CallInterceptor(authenticator, _limiter(settings, stopwatch), FACADES, bounds)],
        options=[
            # Without this two servers could share a port by accident.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", settings.message_bytes_max),
            ("grpc.max_send_message_length", settings.message_bytes_max),
            ("grpc.max_concurrent_streams", settings.concurrent_streams_max),
            # More than the gateway lets through, so that it is the gateway that refuses.
            ("grpc.max_metadata_size", METADATA_BYTES_MAX),
            ("grpc.absolute_max_metadata_size", 2 * METADATA_BYTES_MAX),
            *_connection_bounds(settings),
        ],
    )
    add_LedgerServicer_to_server(Ledger(book.accounts, book.transactions, page_tokens), server)
    add_AdminServicer_to_server(Admin(book.transactions, book.verification, book.api_keys, page_tokens), server)
    add_BillingServicer_to_server(teable.Billing(book.transactions, page_tokens), server)
    add_UsersServicer_to_server(nebulablock.Users(book.usage), server)
    add_TransactionsServicer_to_server(
        spacebring.CreditsTransactions(book.transactions, book.accounts, page_tokens), server
    )
    add_CreditsServicer_to_server(dreadnode.Credits(book.transactions), server)
    add_StatementsServicer_to_server(paged.Statements(book.transactions), server)
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection((*SERVICES, *OPEN_SERVICES), server)
    address = f"{settings.host}:{settings.port}"
    try:
        if certificates is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, certificates.credentials())
    except RuntimeError:
        raise CannotStart(f"can't listen on {address}: is the port taken?") from None
    await server.start()
    for service in ("", *SERVICES):
        await health.set(service, health_pb2.HealthCheckResponse.SERVING)
    log.info("serving", host=settings.host, port=port, tls=certificates is not None)
    try:
        async with book.expirations.sweeping():
            yield port
    finally:
        await health.enter_graceful_shutdown()
        await server.stop(settings.shutdown_grace_seconds)
        log.info("stopped")


def _connection_bounds(settings: Settings) -> Sequence[tuple[str, int]]:
    """How long a connection is kept, for gRPC, which counts in milliseconds."""
    seconds = {
        "grpc.server_handshake_timeout_ms": settings.handshake_seconds_max,
        "grpc.max_connection_idle_ms": settings.connection_idle_seconds_max,
        "grpc.max_connection_age_ms": settings.connection_age_seconds_max,
        # No call takes longer than a stream may.
        "grpc.max_connection_age_grace_ms": settings.stream_seconds_max,
        "grpc.keepalive_time_ms": settings.keepalive_seconds,
        "grpc.keepalive_timeout_ms": settings.keepalive_timeout_seconds,
        "grpc.http2.ping_timeout_ms": settings.keepalive_timeout_seconds,
    }
    # One that has no call is asked too.
    return [("grpc.keepalive_permit_without_calls", 1), *((name, round(1000 * each)) for name, each in seconds.items())]


def server_certificates(settings: Settings) -> ServerCertificates | None:
    """What the server shows to whoever connects; None if it speaks without TLS.

    Raises CannotStart, naming the setting, for what can't be used.
    """
    files = CertificateFiles("tls_", settings.tls_certificate_file, settings.tls_key_file, settings.tls_client_ca_file)
    try:
        files.require_complete()
        return ServerCertificates(files) if files.certificate_file else None
    except CertificateUnusable as error:
        raise CannotStart(str(error)) from None


def _limiter(settings: Settings, stopwatch: Stopwatch) -> RateLimiter | None:
    if not settings.rate_limit_calls_per_second:
        return None
    return RateLimiter(settings.rate_limit_calls_per_second, settings.rate_limit_burst, stopwatch)


async def _check_demo(book: Book, host: str) -> None:
    if await book.credentials.has_demo_tenant() and not is_loopback(host):
        raise CannotStart(
            f"the database holds demo data, whose keys everybody knows: it is not served on {host}, only on loopback"
        )


def is_loopback(host: str) -> bool:
    """Whether an address can only be reached from this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _renderers(settings: Settings) -> list[structlog.types.Processor]:
    # Plain tracebacks: decorated ones take seconds, and show local variables.
    if settings.log_format == "json":
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    plain = structlog.dev.plain_traceback
    return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]


def configure_logs(settings: Settings) -> None:
    """Structured logs to stderr: for people, or as JSON lines."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *_renderers(settings),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(settings.log_level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
