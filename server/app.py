"""The composition root: the only place that knows how the parts fit together."""

from __future__ import annotations

import ipaddress
import logging
import secrets
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import grpc
import structlog
from daybook.facades.dreadnode.v1.credits_service_pb2_grpc import add_CreditsServicer_to_server
from daybook.facades.nebulablock.v1.users_service_pb2_grpc import add_UsersServicer_to_server
from daybook.facades.paged.v1.statements_service_pb2_grpc import add_StatementsServicer_to_server
from daybook.facades.spacebring.v1.transactions_service_pb2_grpc import add_TransactionsServicer_to_server
from daybook.facades.teable.v1.billing_service_pb2_grpc import add_BillingServicer_to_server
from daybook.v1.admin_service_pb2_grpc import add_AdminServicer_to_server
from daybook.v1.ledger_service_pb2_grpc import add_LedgerServicer_to_server
from grpc_health.v1 import health_pb2_grpc
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
from server.store.database import Database, DatabaseLimits
from server.store.migrate import is_migrated, migrate
from server.store.poster import Poster
from server.store.transactions import TransactionStore
from server.transport.auth import Authenticator
from server.transport.calls import OPEN_SERVICES, CallInterceptor
from server.transport.limits import RateLimiter, Stopwatch
from server.transport.page_tokens import KEY_BYTES, PageTokens
from server.transport.readiness import watched_health
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
    database_url: str,
    clock: Clock = system_clock,
    random_bytes: RandomBytes = secrets.token_bytes,
    limits: DatabaseLimits | None = None,
) -> AsyncIterator[Book]:
    """Opens the ledger in a database, which is created and migrated if need be."""
    database = Database(database_url, limits)
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


def database_limits(settings: Settings) -> DatabaseLimits:
    """What the settings say of the database."""
    return DatabaseLimits(
        connections=settings.database_pool_size,
        wait_seconds=settings.database_pool_wait_seconds,
        recycle_seconds=settings.database_pool_recycle_seconds,
        connect_seconds=settings.database_connect_timeout_seconds,
        lock_seconds=settings.database_lock_timeout_seconds,
        statement_seconds=settings.database_statement_timeout_seconds,
        idle_transaction_seconds=settings.database_idle_transaction_timeout_seconds,
    )


@asynccontextmanager
async def serving(
    book: Book, settings: Settings, stopwatch: Stopwatch = time.monotonic_ns, own_port: int | None = None
) -> AsyncIterator[int]:
    """Serves the book over gRPC; gives the port. Calls under way at the end may finish.

    With a port of its own it serves on both, and shares the other with its siblings: see
    server/supervisor.py. Raises CannotStart if a port is taken, or for a demo database on
    an address that others can reach.
    """
    await check_demo(book, settings.host)
    await book.credentials.ensure_token_key(book.random_bytes(KEY_BYTES), book.clock())
    async with (
        refreshed_token_keys(book.credentials, book.clock) as token_keys,
        _serving(book, settings, stopwatch, PageTokens(token_keys, book.random_bytes), own_port) as port,
    ):
        yield port


@asynccontextmanager
async def _serving(
    book: Book, settings: Settings, stopwatch: Stopwatch, page_tokens: PageTokens, own_port: int | None
) -> AsyncIterator[int]:
    authenticator = Authenticator(book.credentials, book.clock, book.api_key_uses.note)
    server = grpc.aio.server(
        interceptors=[CallInterceptor(authenticator, _limiter(settings, stopwatch), FACADES)],
        options=[
            # Else two servers could share a port by accident.
            ("grpc.so_reuseport", int(own_port is not None)),
            ("grpc.max_receive_message_length", settings.message_bytes_max),
            ("grpc.max_send_message_length", settings.message_bytes_max),
            ("grpc.max_concurrent_streams", settings.concurrent_streams_max),
            # More than the gateway lets through, so that it is the gateway that refuses.
            ("grpc.max_metadata_size", METADATA_BYTES_MAX),
            ("grpc.absolute_max_metadata_size", 2 * METADATA_BYTES_MAX),
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
    port = _listen(server, settings.host, settings.port)
    if own_port is not None:
        _listen(server, settings.host, own_port)
    await server.start()
    log.info("serving", host=settings.host, port=port)
    try:
        async with book.expirations.sweeping(), watched_health(health, SERVICES, partial(is_migrated, book.database)):
            yield port
    finally:
        await server.stop(settings.shutdown_grace_seconds)
        log.info("stopped")


def _listen(server: grpc.aio.Server, host: str, port: int) -> int:
    try:
        return server.add_insecure_port(f"{host}:{port}")
    except RuntimeError:
        raise CannotStart(f"can't listen on {host}:{port}: is the port taken?") from None


def _limiter(settings: Settings, stopwatch: Stopwatch) -> RateLimiter | None:
    if not settings.rate_limit_calls_per_second:
        return None
    return RateLimiter(settings.rate_limit_calls_per_second, settings.rate_limit_burst, stopwatch)


async def check_demo(book: Book, host: str) -> None:
    """Raises CannotStart for demo data at an address that others can reach."""
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
