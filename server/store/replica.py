"""A streaming standby of the primary, which serves lists.

A list shows everything that was committed before its call, whichever server serves it. So a
read first queries the primary for its flushed WAL position, in one query for all concurrent
lists, and the standby must have replayed up to that position. If the standby can't, or is too
slow, the primary serves the list.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import structlog
from sqlalchemy import text
from sqlalchemy.engine import URL

from server.background import repeating
from server.ledger.errors import ServiceUnavailable
from server.store.data_loader import DataLoader
from server.store.engine import DatabaseLimits, Reader, Rows
from server.store.failures import ReplicaUnfit, driver_error
from server.store.postgresql import PostgreSQL
from server.store.query import Query

log = structlog.get_logger(__name__)

CHECK_SECONDS = 1.0
"""Time between two checks of a replica, in seconds. After a failed check it is unused until the next one."""
POLL_SECONDS = 0.002
"""Time between two queries for the replay position of a lagging replica, in seconds."""
REPLICA_SECONDS_MAX = 2.0
"""Timeout of connecting, of the wait for a connection, and of a statement, in seconds. Then the primary serves."""

# A commit is on disk before it is visible to any client (synchronous_commit), and a standby receives
# only flushed WAL.
COMMITTED = Query(text("SELECT (pg_current_wal_flush_lsn() - '0/0')::bigint"))
_REPLAYED = Query(text("SELECT (pg_last_wal_replay_lsn() - '0/0')::bigint WHERE pg_is_in_recovery()"))
# A physical standby has the same identifiers of cluster and database as its primary.
_IDENTITY = Query(
    text(
        "SELECT system_identifier || '/' || (SELECT oid FROM pg_database WHERE datname = current_database())"
        " FROM pg_control_system()"
    )
)


class Replica(Reader):
    """Reads from the standby while that keeps up with the primary, and from the primary otherwise."""

    def __init__(
        self,
        server: PostgreSQL,
        primary: Reader,
        wait_seconds: float,
        stopwatch: Callable[[], float] = time.monotonic,
    ) -> None:
        """A list waits at most `wait_seconds` for the standby to catch up. `stopwatch` returns seconds."""
        self.server = server
        self.reads = Counter[str]()
        """Number of reads served by the `replica`, and by the `primary` in its place."""
        self._primary = primary
        self._wait_seconds = wait_seconds
        self._stopwatch = stopwatch
        self._load_committed = DataLoader(self._read_committed)
        self._identity: str | None = None
        self._is_used: bool | None = None
        self._lag_seconds: float | None = None
        self._caught_up_at = 0.0

    @classmethod
    def of(cls, url: URL, limits: DatabaseLimits, primary: Reader) -> Replica:
        """The standby of a URL. Raises DatabaseUrlInvalid."""
        limits = replace(
            limits,
            wait_seconds=min(limits.wait_seconds, REPLICA_SECONDS_MAX),
            connect_seconds=min(limits.connect_seconds, REPLICA_SECONDS_MAX),
            statement_seconds=min(limits.statement_seconds or REPLICA_SECONDS_MAX, REPLICA_SECONDS_MAX),
            # The replay position is cached per session, so transaction pooling must not swap sessions.
            pooler_mode="session",
        )
        server = PostgreSQL(url, limits, reads=limits.connections, must_be_primary=False)
        return cls(server, primary, limits.replica_wait_seconds)

    @property
    def lag_seconds(self) -> float | None:
        """The time that the standby needed to catch up with the primary at its last check, in seconds.

        While the standby is unused: the time since it last caught up. None before its first success.
        """
        if self._lag_seconds is None or self._is_used:
            return self._lag_seconds
        return self._stopwatch() - self._caught_up_at

    async def fetch(self, query: Query, parameters: Mapping[str, object]) -> Rows:
        """The rows of a query, from the standby or the primary."""

        async def work(session: Any) -> Rows:
            if not self._is_used:
                # The standby became unused while this read waited for a connection.
                raise ReplicaUnfit
            await self._reach(session, committed)
            return await self.server.fetch_by(session, query, parameters)

        try:
            committed = await self._committed()
            with self.server.using("read", "read"), self._unused_after_error():
                rows = await self.server.run(work)
        except ReplicaUnfit:
            self.reads["primary"] += 1
            return await self._primary.fetch(query, parameters)
        self.reads["replica"] += 1
        return rows

    async def _committed(self) -> int:
        """The flushed WAL position of the primary. Raises ReplicaUnfit, and ServiceUnavailable."""
        if not self._is_used:
            raise ReplicaUnfit
        return await self._load_committed(None)

    async def _read_committed(self, _keys: Collection[None]) -> Mapping[None, int]:
        ((committed,),) = await self._primary.fetch(COMMITTED, {})
        return {None: committed}

    @contextlib.asynccontextmanager
    async def checking(self) -> AsyncIterator[None]:
        """Checks the replica every CHECK_SECONDS until the end of the block. It is unused before its first success."""
        async with repeating(self._check_and_suppress, CHECK_SECONDS, "replica check failed", at_once=True):
            yield

    async def _check_and_suppress(self) -> None:
        # Both errors are logged elsewhere: the replica's once, the primary's by the calls that need the primary.
        with contextlib.suppress(ReplicaUnfit, ServiceUnavailable):
            await self.check()

    async def check(self) -> None:
        """Starts to use the standby if it can serve a list now. Raises ReplicaUnfit, ServiceUnavailable."""
        ((self._identity,),) = await self._primary.fetch(_IDENTITY, {})

        async def work(session: Any) -> float:
            replayed = await self._replayed(session)
            started = self._stopwatch()
            committed = await self._load_committed(None)
            if replayed > committed:
                # It followed a former primary, and has WAL that the present primary lacks.
                raise ReplicaUnfit("is ahead of the primary")
            await self._reach(session, committed)
            return started

        with self._unused_after_error():
            self._caught_up_at = await self.server.run(work)
        self._lag_seconds = self._stopwatch() - self._caught_up_at
        if not self._is_used:
            self._is_used = True
            log.info("replica enabled")

    @contextlib.contextmanager
    def _unused_after_error(self) -> Iterator[None]:
        """After an error in the block, the standby is unused until its next check. Raises ReplicaUnfit."""
        try:
            yield
        except ServiceUnavailable:
            # An error of the primary.
            raise
        except Exception as error:
            # A broken connection makes the driver raise many kinds of errors. The primary does the
            # same work in any case, and raises the error if the work itself is at fault.
            driver = driver_error(error)
            reason = str(driver) or type(driver).__name__
            if self._is_used is not False:
                self._is_used = False
                log.warning("replica disabled", reason=reason)
            raise ReplicaUnfit(reason) from error

    async def _reach(self, session: Any, committed: int) -> None:
        """Waits until the session has replayed up to the position `committed`. Raises ReplicaUnfit."""
        # The position of a session never goes back: a standby that restarts with less WAL has lost all
        # its sessions.
        if session.info.get("replayed", -1) >= committed:
            return
        deadline = self._stopwatch() + self._wait_seconds
        while await self._replayed(session) < committed:
            if self._stopwatch() >= deadline:
                raise ReplicaUnfit("is behind")
            await asyncio.sleep(POLL_SECONDS)

    async def _replayed(self, session: Any) -> int:
        """The replayed WAL position of the standby. Raises ReplicaUnfit if it is not a standby of this primary."""
        if "identity" not in session.info:
            ((session.info["identity"],),) = await self.server.fetch_by(session, _IDENTITY, {})
        if session.info["identity"] != self._identity:
            raise ReplicaUnfit("is not a copy of the primary's database")
        rows = await self.server.fetch_by(session, _REPLAYED, {})
        if not rows:
            raise ReplicaUnfit("is not a standby")
        replayed: int = rows[0][0]
        session.info["replayed"] = replayed
        return replayed
