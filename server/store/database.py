"""The database of a ledger: opens the engines of its URLs, and chooses the engine for each kind of read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import structlog
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, InvalidRequestError, NoSuchModuleError

from server.ledger.errors import ServiceUnavailable
from server.store.database_tracer import DatabaseTracer
from server.store.engine import DatabaseLimits, DatabaseUrlInvalid, Engine, PoolUse, Reader, Result, Work
from server.store.failures import Conflict

if TYPE_CHECKING:
    from server.store.replica import Replica

log = structlog.get_logger(__name__)

TRIES_MAX = 8
"""Number of attempts of a transaction that conflicts with another writer."""
_SQLITE, _POSTGRESQL = "sqlite+aiosqlite", "postgresql+asyncpg"


class Database:
    """The engines of a ledger.

    `primary` serves all transactions, and reads that never use a replica, such as credentials and
    balances. `lists` serves lists: the replica if there is one, or the primary.
    """

    def __init__(self, url: str, limits: DatabaseLimits | None = None, replica_url: str | None = None) -> None:
        """Connects to nothing yet. Raises DatabaseUrlInvalid."""
        limits = limits or DatabaseLimits()
        self.conflict_count = 0
        """Number of transactions rolled back because of a conflict with another writer."""
        with _without_values_of_the_url("database_url"):
            self.url: URL = make_url(url)
            self.primary: Engine = _open(self.url, limits)
        self.lists: Reader = self.primary
        self.replica: Replica | None = None
        if replica_url:
            with _without_values_of_the_url("database_replica_url"):
                self.lists = self.replica = self._open_replica(make_url(replica_url), limits)

    def _open_replica(self, url: URL, limits: DatabaseLimits) -> Replica:
        if url.drivername != _POSTGRESQL:
            raise DatabaseUrlInvalid(f"must begin with {_POSTGRESQL}:")
        if self.url.drivername != _POSTGRESQL:
            raise DatabaseUrlInvalid(f"can be set only where database_url begins with {_POSTGRESQL}:")
        # Imported only if a replica is configured.
        from server.store.replica import Replica  # noqa: PLC0415

        return Replica.of(url, limits, self.primary)

    async def transact(self, work: Work[Result]) -> Result:
        """Does work in one transaction: committed durably at the end, rolled back if the work raises.

        Retries after a conflict with another writer, so the work must have no effect outside the
        database. Raises ServiceUnavailable after TRIES_MAX conflicts, and the errors of the work.
        """
        for _ in range(TRIES_MAX):
            try:
                return await self.primary.transact(work)
            except Conflict:
                self.conflict_count += 1
                log.info("transaction conflict")
        raise ServiceUnavailable

    @property
    def pools(self) -> Mapping[str, PoolUse]:
        """The connection pools by name; `replica` is the pool of the replica, if there is one."""
        pools = self.primary.pools
        return pools if self.replica is None else {**pools, "replica": self.replica.server.pools["read"]}

    @contextmanager
    def tracing_with(self, tracer: DatabaseTracer) -> Iterator[None]:
        """Calls the tracer's hooks until the end of the block."""
        engines = [self.primary] if self.replica is None else [self.primary, self.replica.server]
        previous = self.primary.tracer
        for engine in engines:
            engine.tracer = tracer
        try:
            yield
        finally:
            for engine in engines:
                engine.tracer = previous

    def checking_replica(self) -> AbstractAsyncContextManager[None]:
        """Lets the replica, if there is one, serve lists until the end of the block."""
        return nullcontext() if self.replica is None else self.replica.checking()

    async def close(self) -> None:
        """Closes every connection, after the transaction under way."""
        await self.primary.close()
        if self.replica is not None:
            await self.replica.server.close()


def _open(url: URL, limits: DatabaseLimits) -> Engine:
    # Only the engine in use is imported.
    match url.drivername:
        case "sqlite+aiosqlite":
            from server.store.sqlite import SQLite  # noqa: PLC0415

            return SQLite(url, limits)
        case "postgresql+asyncpg":
            from server.store.postgresql import PostgreSQL  # noqa: PLC0415

            return PostgreSQL(url, limits)
    raise DatabaseUrlInvalid("must begin with sqlite+aiosqlite: or postgresql+asyncpg:")


@contextmanager
def _without_values_of_the_url(setting: str) -> Iterator[None]:
    """Replaces errors that quote the setting's value with DatabaseUrlInvalid, which names the setting."""
    try:
        yield
    except DatabaseUrlInvalid as error:
        raise DatabaseUrlInvalid(error.problem, setting) from None
    except (NoSuchModuleError, InvalidRequestError, ImportError):
        raise DatabaseUrlInvalid("must begin with sqlite+aiosqlite: or postgresql+asyncpg:", setting) from None
    except (ArgumentError, ValueError):
        raise DatabaseUrlInvalid(
            "can't be read; in a password all but letters and digits are percent-encoded", setting
        ) from None
    except OSError as error:
        raise DatabaseUrlInvalid(f"names a folder that can't be made: {error.strerror}", setting) from None
