"""The database of a ledger: the engine of the primary, and the engine that serves lists."""

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
"""The number of times that a database transaction is tried if it conflicts with another writer."""
_POSTGRESQL = "postgresql+asyncpg"


class Database:
    """The engines of a ledger.

    `primary` serves all database transactions, and the reads that never use a replica, such as
    credentials and balances. `lists` serves lists: the replica if there is one, or the primary.
    """

    def __init__(self, url: str, limits: DatabaseLimits | None = None, replica_url: str | None = None) -> None:
        """Creates the engines, which connect later. Raises DatabaseUrlInvalid."""
        limits = limits or DatabaseLimits()
        self.conflict_count = 0
        """The number of database transactions rolled back because of a conflict with another writer."""
        with _hiding_url("database_url"):
            self.url: URL = make_url(url)
            self.primary: Engine = _open(self.url, limits)
        self.lists: Reader = self.primary
        self.replica: Replica | None = None
        if replica_url:
            with _hiding_url("database_replica_url"):
                self.lists = self.replica = self._open_replica(make_url(replica_url), limits)

    def _open_replica(self, url: URL, limits: DatabaseLimits) -> Replica:
        if url.drivername != _POSTGRESQL:
            raise DatabaseUrlInvalid(f"must begin with {_POSTGRESQL}:")
        if self.url.drivername != _POSTGRESQL:
            raise DatabaseUrlInvalid(f"can be set only where database_url begins with {_POSTGRESQL}:")
        # Imported here, because most servers have no replica, and the import makes their start slower.
        from server.store.replica import Replica  # noqa: PLC0415

        return Replica.of(url, limits, self.primary)

    async def transact(self, work: Work[Result]) -> Result:
        """Runs `work` in one database transaction: commits at its end, or rolls back if it raises.

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

    def using_replica(self) -> AbstractAsyncContextManager[None]:
        """Sends lists to the replica, if there is one, until the end of the block; before, the primary serves them."""
        return nullcontext() if self.replica is None else self.replica.checking()

    async def close(self) -> None:
        """Closes every connection, after the current database transaction."""
        await self.primary.close()
        if self.replica is not None:
            await self.replica.server.close()


def _open(url: URL, limits: DatabaseLimits) -> Engine:
    # Imported here, so that a server loads the driver of its own database only.
    match url.drivername:
        case "sqlite+aiosqlite":
            from server.store.sqlite import SQLite  # noqa: PLC0415

            return SQLite(url, limits)
        case "postgresql+asyncpg":
            from server.store.postgresql import PostgreSQL  # noqa: PLC0415

            return PostgreSQL(url, limits)
    raise DatabaseUrlInvalid("must begin with sqlite+aiosqlite: or postgresql+asyncpg:")


@contextmanager
def _hiding_url(setting: str) -> Iterator[None]:
    """Replaces errors that quote the URL, which may contain a password, with DatabaseUrlInvalid for the setting."""
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
