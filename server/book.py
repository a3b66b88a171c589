"""The ledger in a database, without a server: composes stores and use cases."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass

from server.config import CannotStart, Settings
from server.ledger.instants import Clock, Instant, Stopwatch
from server.ledger.names import RandomBytes
from server.posting.poster import Poster
from server.store.accounts import AccountStore
from server.store.books import BookStore
from server.store.credentials import CredentialStore
from server.store.database import Database
from server.store.engine import DatabaseLimits
from server.store.migrate import is_fit, migrate
from server.store.posting_clock import PostingClock, boot_stopwatch
from server.store.transactions import TransactionStore
from server.transport.addresses import is_loopback
from server.usecases.accounts import Accounts
from server.usecases.api_key_uses import ApiKeyUses
from server.usecases.api_keys import ApiKeys
from server.usecases.expirations import Expirations
from server.usecases.imports import Imports
from server.usecases.transactions import Transactions
from server.usecases.usage import Usage
from server.usecases.verification import Verification


def system_clock() -> Instant:
    """The time of this machine, in microseconds since 1970."""
    return time.time_ns() // 1000


@dataclass(frozen=True, slots=True)
class Book:
    """A ledger in a database, without a server: stores and use cases."""

    database: Database
    poster: Poster
    credentials: CredentialStore
    api_keys: ApiKeys
    api_key_uses: ApiKeyUses
    account_store: AccountStore
    accounts: Accounts
    transactions: Transactions
    imports: Imports
    usage: Usage
    verification: Verification
    expirations: Expirations
    clock: Clock
    """The time for reads and for credentials."""
    posting_clock: PostingClock | None
    random_bytes: RandomBytes


@asynccontextmanager
async def open_book(
    database_url: str,
    clock: Clock = system_clock,
    random_bytes: RandomBytes = secrets.token_bytes,
    limits: DatabaseLimits | None = None,
    replica_url: str | None = None,
    clock_skew_max: Instant | None = None,
    stopwatch: Stopwatch = boot_stopwatch,
    while_migrating: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
) -> AsyncIterator[Book]:
    """Opens the ledger in a database, and creates or migrates the schema first if necessary.

    With `clock_skew_max`, nothing is posted while the clock deviates by more than that from
    its reference; see server/store/posting_clock.py. A migration, and the wait for the
    migration of another process, runs within `while_migrating`. Raises SchemaTooNew and
    ServiceUnavailable.
    """
    database = Database(database_url, limits, replica_url)
    try:
        if not await is_fit(database):
            async with while_migrating():
                await migrate(database)
        async with composed(database, clock, random_bytes, clock_skew_max, stopwatch) as book:
            yield book
    finally:
        await database.close()


@asynccontextmanager
async def composed(
    database: Database,
    clock: Clock,
    random_bytes: RandomBytes,
    clock_skew_max: Instant | None = None,
    stopwatch: Stopwatch = boot_stopwatch,
) -> AsyncIterator[Book]:
    """Builds the ledger on a database that has its schema, as `open_book` does. The caller closes the database."""
    account_store = AccountStore(database)
    transaction_store = TransactionStore(database)
    posting_clock, checked_clock = None, clock
    if clock_skew_max is not None:
        checked_clock = posting_clock = PostingClock(database, clock, stopwatch, clock_skew_max)
        clock = posting_clock.time_of_reads
    poster = Poster(database, checked_clock, random_bytes)
    credentials = CredentialStore(database)
    api_key_uses = ApiKeyUses(credentials, checked_clock)
    async with poster.working(), api_key_uses.flushing():
        yield Book(
            database=database,
            poster=poster,
            credentials=credentials,
            api_keys=ApiKeys(credentials, account_store, clock, checked_clock, random_bytes),
            api_key_uses=api_key_uses,
            account_store=account_store,
            accounts=Accounts(account_store, clock, checked_clock),
            transactions=Transactions(account_store, transaction_store, poster, clock),
            imports=Imports(account_store, poster),
            usage=Usage(account_store, transaction_store, clock),
            verification=Verification(account_store, BookStore(database)),
            expirations=Expirations(account_store, poster, checked_clock),
            clock=clock,
            posting_clock=posting_clock,
            random_bytes=random_bytes,
        )


def database_limits(settings: Settings) -> DatabaseLimits:
    """The settings of the database."""
    return DatabaseLimits(
        connections=settings.database_pool_size,
        wait_seconds=settings.database_pool_wait_seconds,
        recycle_seconds=settings.database_pool_recycle_seconds,
        connect_seconds=settings.database_connect_timeout_seconds,
        lock_seconds=settings.database_lock_timeout_seconds,
        statement_seconds=settings.database_statement_timeout_seconds,
        idle_transaction_seconds=settings.database_idle_transaction_timeout_seconds,
        replica_wait_seconds=settings.database_replica_wait_seconds,
        pooler_mode=settings.database_pooler_mode,
    )


async def check_demo(book: Book, host: str) -> None:
    """Raises CannotStart if the book holds demo data and `host` is not a loopback address."""
    if await book.credentials.has_demo_tenant() and not is_loopback(host):
        raise CannotStart(
            f"the database holds demo data, whose keys are public: it is not served on {host}, only on loopback"
        )
