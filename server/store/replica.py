"""A streaming standby of the primary, which serves lists.

A list shows everything that was committed before the list was asked for, whichever server
serves it. So the primary is asked first how far its log is on disk, with one query for all
concurrent lists, and the standby must have replayed it that far. The primary serves what the
standby can't, or not soon.
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

WATCH_SECONDS = 1.0
"""Time between two checks of a replica, in seconds; one that failed is not used until the next check."""
POLL_SECONDS = 0.002
"""Time between two queries for how far a lagging replica is, in seconds."""
REPLICA_SECONDS_MAX = 2.0
"""Timeout of a connection, of the wait for one, and of a statement, in seconds: the primary can serve the list too."""

# What is visible to any client is on disk before (synchronous_commit), and a standby is sent no
# more than that.
COMMITTED = Query(text("SELECT (pg_current_wal_flush_lsn() - '0/0')::bigint"))
_REPLAYED = Query(text("SELECT (pg_last_wal_replay_lsn() - '0/0')::bigint WHERE pg_is_in_recovery()"))
# A physical copy has the identifiers of the cluster and of the database that it is a copy of.
_IDENTITY = Query(
    text(
        "SELECT system_identifier || '/' || (SELECT oid FROM pg_database WHERE datname = current_database())"
        " FROM pg_control_system()"
    )
)


class Replica(Reader):
    """Reads from the standby while it keeps up with the primary, and from the primary otherwise."""

    def __init__(
        self,
        server: PostgreSQL,
        primary: Reader,
        wait_seconds: float,
        stopwatch: Callable[[], float] = time.monotonic,
    ) -> None:
        """A list waits for at most `wait_seconds` for the standby to catch up. `stopwatch` gives seconds."""
        self.server = server
        self.reads = Counter[str]()
        """How many reads the `replica` served, and how many the `primary` in its place."""
        self._primary = primary
        self._wait_seconds = wait_seconds
        self._stopwatch = stopwatch
        self._load_committed = DataLoader(self._read_committed)
        self._identity: str | None = None
        self._is_used: bool | None = None
        self._lag_seconds: float | None = None
        self._complete_at = 0.0

    @classmethod
    def of(cls, url: URL, limits: DatabaseLimits, primary: Reader) -> Replica:
        """The standby of a URL. Raises DatabaseUrlInvalid."""
        limits = replace(
            limits,
            wait_seconds=min(limits.wait_seconds, REPLICA_SECONDS_MAX),
            connect_seconds=min(limits.connect_seconds, REPLICA_SECONDS_MAX),
            statement_seconds=min(limits.statement_seconds or REPLICA_SECONDS_MAX, REPLICA_SECONDS_MAX),
            # How far the standby is, is remembered for the session.
            pooler_mode="session",
        )
        server = PostgreSQL(url, limits, reads=limits.connections, must_be_primary=False)
        return cls(server, primary, limits.replica_wait_seconds)

    @property
    def lag_seconds(self) -> float | None:
        """How long the standby took, at its last check, to have what the primary had; None before it ever did.

        While it can't be used, how long ago that was.
        """
        if self._lag_seconds is None or self._is_used:
            return self._lag_seconds
        return self._stopwatch() - self._complete_at

    async def fetch(self, query: Query, parameters: Mapping[str, object]) -> Rows:
        """The rows of a query, from the standby or the primary."""

        async def work(session: Any) -> Rows:
            if not self._is_used:
                # That was found out while this read waited for a connection.
                raise ReplicaUnfit
            await self._reach(session, committed)
            return await self.server.fetch_by(session, query, parameters)

        try:
            committed = await self._committed()
            with self.server.using("read", "read"), self._leaving():
                rows = await self.server.run(work)
        except ReplicaUnfit:
            self.reads["primary"] += 1
            return await self._primary.fetch(query, parameters)
        self.reads["replica"] += 1
        return rows

    async def _committed(self) -> int:
        """How far the primary's log is on disk. Raises ReplicaUnfit, and ServiceUnavailable."""
        if not self._is_used:
            raise ReplicaUnfit
        return await self._load_committed(None)

    async def _read_committed(self, _keys: Collection[None]) -> Mapping[None, int]:
        ((committed,),) = await self._primary.fetch(COMMITTED, {})
        return {None: committed}

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Checks every WATCH_SECONDS until the end of the block whether the replica can serve; unused before."""
        async with repeating(self._watch, WATCH_SECONDS, "replica check failed", at_once=True):
            yield

    async def _watch(self) -> None:
        # Both errors are logged elsewhere: the replica's once, the primary's by each call that needs the primary.
        with contextlib.suppress(ReplicaUnfit, ServiceUnavailable):
            await self.check()

    async def check(self) -> None:
        """Uses the standby from now on if it could serve a list now. Raises ReplicaUnfit, ServiceUnavailable."""
        ((self._identity,),) = await self._primary.fetch(_IDENTITY, {})

        async def work(session: Any) -> float:
            replayed = await self._replayed(session)
            started = self._stopwatch()
            committed = await self._load_committed(None)
            if replayed > committed:
                # It followed another primary, which had more than this one has taken over.
                raise ReplicaUnfit("has what the primary has not")
            await self._reach(session, committed)
            return started

        with self._leaving():
            self._complete_at = await self.server.run(work)
        self._lag_seconds = self._stopwatch() - self._complete_at
        if not self._is_used:
            self._is_used = True
            log.info("replica enabled")

    @contextlib.contextmanager
    def _leaving(self) -> Iterator[None]:
        """If anything goes wrong in the block, the standby is not used until its next check. Raises ReplicaUnfit."""
        try:
            yield
        except ServiceUnavailable:
            # That is the primary.
            raise
        except Exception as error:
            # A driver whose connection breaks raises many things, and whatever it is, the
            # primary does the same work, and tells what is wrong if that is the work itself.
            driver = driver_error(error)
            reason = str(driver) or type(driver).__name__
            if self._is_used is not False:
                self._is_used = False
                log.warning("replica disabled", reason=reason)
            raise ReplicaUnfit(reason) from error

    async def _reach(self, session: Any, committed: int) -> None:
        """Waits until the session sees everything that was committed by then. Raises ReplicaUnfit."""
        # A session never sees less than it has seen. A standby that crashed and comes back with
        # less has none of its old sessions.
        if session.info.get("replayed", -1) >= committed:
            return
        patience = self._stopwatch() + self._wait_seconds
        while await self._replayed(session) < committed:
            if self._stopwatch() >= patience:
                raise ReplicaUnfit("is behind")
            await asyncio.sleep(POLL_SECONDS)

    async def _replayed(self, session: Any) -> int:
        """How far the standby is. Raises ReplicaUnfit for a server that is no standby of this primary."""
        if "identity" not in session.info:
            ((session.info["identity"],),) = await self.server.fetch_by(session, _IDENTITY, {})
        if session.info["identity"] != self._identity:
            raise ReplicaUnfit("is no copy of the primary's database")
        rows = await self.server.fetch_by(session, _REPLAYED, {})
        if not rows:
            raise ReplicaUnfit("is no standby")
        replayed: int = rows[0][0]
        session.info["replayed"] = replayed
        return replayed
