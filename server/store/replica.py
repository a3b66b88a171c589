"""A streaming standby of the primary, which serves lists.

Whoever serves a list, it shows all that was committed before it was asked for. So the primary
is asked first how far its log is on disk, once for all lists that come at a time, and the
standby must have replayed it until there. What it can't do, or not soon, the primary does.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from typing import Any

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from server.background import repeating
from server.ledger.errors import ServiceUnavailable
from server.store.data_loader import DataLoader
from server.store.failures import ReplicaUnfit
from server.store.postgresql import PostgreSQL

log = structlog.get_logger(__name__)

WATCH_SECONDS = 1.0
"""How long a replica rests that could not serve, and how often it is looked at while it can."""
POLL_SECONDS = 0.002
"""How long a list waits before it asks again how far the replica is."""

# What is visible to anybody is on disk before (synchronous_commit), and a standby is sent no
# more than that.
_COMMITTED = "SELECT (pg_current_wal_flush_lsn() - '0/0')::bigint"
_REPLAYED = "SELECT (pg_last_wal_replay_lsn() - '0/0')::bigint WHERE pg_is_in_recovery()"
# A copy byte by byte has the cluster's number and the database's of what it is a copy of.
_IDENTITY = (
    "SELECT system_identifier || '/' || (SELECT oid FROM pg_database WHERE datname = current_database())"
    " FROM pg_control_system()"
)

AskPrimary = Callable[[str], Awaitable[Any]]
"""Gives the one value of a statement. Raises ServiceUnavailable."""


class Replica:
    """Serves reads while it keeps up with the primary, and is looked at again and again while it doesn't."""

    def __init__(
        self,
        server: PostgreSQL,
        ask_primary: AskPrimary,
        wait_seconds: float,
        stopwatch: Callable[[], float] = time.monotonic,
    ) -> None:
        """`stopwatch` gives seconds."""
        self.server = server
        self._stopwatch = stopwatch
        self._ask_primary = ask_primary
        self._wait_seconds = wait_seconds
        self._ask_committed = DataLoader(self._read_committed)
        self._identity: str | None = None
        self._is_used: bool | None = None
        self._lag_seconds: float | None = None
        self._complete_at = 0.0

    @property
    def lag_seconds(self) -> float | None:
        """How long it took, when it was last looked at, to have what the primary had; None before it ever did.

        While it can't be used, how long ago that was.
        """
        if self._lag_seconds is None or self._is_used:
            return self._lag_seconds
        return self._stopwatch() - self._complete_at

    async def committed(self) -> int:
        """Up to where in its log the primary has committed; nothing before this call is behind it.

        Raises ReplicaUnfit while the replica can't be used, and ServiceUnavailable where the
        primary can't be asked.
        """
        if not self._is_used:
            raise ReplicaUnfit
        return await self._ask_committed(None)

    async def _read_committed(self, _keys: Collection[None]) -> Mapping[None, int]:
        return {None: await self._ask_primary(_COMMITTED)}

    @contextlib.asynccontextmanager
    async def connect(self, committed: int) -> AsyncIterator[AsyncConnection]:
        """A connection that sees all that was committed by then.

        Raises ReplicaUnfit, also in the place of what goes wrong in the block.
        """
        with self._leaving():
            async with self.server.connect() as connection:
                if not self._is_used:
                    # Others found that out while this one waited for a connection.
                    raise ReplicaUnfit
                await self._reach(connection, committed)
                yield connection

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Checks every WATCH_SECONDS until the end of the block whether the replica can serve; unused before."""
        async with repeating(self._watch, WATCH_SECONDS, "watch of the replica failed", at_once=True):
            yield

    async def _watch(self) -> None:
        # Both errors are logged elsewhere: the replica's once, the primary's by each call that needs the primary.
        with contextlib.suppress(ReplicaUnfit, ServiceUnavailable):
            await self._look()

    async def _look(self) -> None:
        """Whether it could serve a list now. Raises ReplicaUnfit, ServiceUnavailable."""
        self._identity = await self._ask_primary(_IDENTITY)
        with self._leaving():
            async with self.server.connect() as connection:
                replayed = await self._replayed(connection)
                started = self._stopwatch()
                committed = await self._ask_committed(None)
                if replayed > committed:
                    # It followed another primary, which had more than this one has taken over.
                    raise ReplicaUnfit("has what the primary has not")
                await self._reach(connection, committed)
        self._complete_at = started
        self._lag_seconds = self._stopwatch() - started
        if not self._is_used:
            self._is_used = True
            log.info("replica is used")

    @contextlib.contextmanager
    def _leaving(self) -> Iterator[None]:
        """Leaves the replica alone, until it is looked at again, if anything goes wrong with it."""
        try:
            yield
        except ServiceUnavailable:
            # That is the primary.
            raise
        except Exception as error:
            # A driver whose connection breaks off raises many things, and whatever it is, the
            # primary does the same work, and tells what is wrong if that is the work itself.
            reason = _words(error)
            if self._is_used is not False:
                self._is_used = False
                log.warning("replica is not used", reason=reason)
            raise ReplicaUnfit(reason) from error

    async def _reach(self, connection: AsyncConnection, committed: int) -> None:
        """Waits until the connection sees all that was committed by then. Raises ReplicaUnfit."""
        # What a connection has seen it never sees less of. A replica that broke down and comes
        # back with less has no connections of before.
        if connection.info.get("replayed", -1) >= committed:
            return
        patience = self._stopwatch() + self._wait_seconds
        while await self._replayed(connection) < committed:
            if self._stopwatch() >= patience:
                raise ReplicaUnfit("is behind")
            await asyncio.sleep(POLL_SECONDS)

    async def _replayed(self, connection: AsyncConnection) -> int:
        """How far the replica is. Raises ReplicaUnfit for what is no standby of this primary."""
        driver: Any = (await connection.get_raw_connection()).driver_connection
        if "identity" not in connection.info:
            connection.info["identity"] = await driver.fetchval(_IDENTITY)
        if connection.info["identity"] != self._identity:
            raise ReplicaUnfit("is no copy of the primary's database")
        replayed: int | None = await driver.fetchval(_REPLAYED)
        if replayed is None:
            raise ReplicaUnfit("is no standby")
        connection.info["replayed"] = replayed
        return replayed


def _words(error: BaseException) -> str:
    """What the driver says, without the statement."""
    told = getattr(error, "orig", None) or error
    return str(told) or type(told).__name__
