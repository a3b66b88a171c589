"""Streams that callers cancel: the server releases everything that they held."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sqlite3
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeAlias

import asyncpg
import grpc
import pytest
from daybook.v1.admin_service_pb2 import VerifyAccountsRequest, VerifyAccountsResponse
from daybook.v1.transaction_pb2 import Transaction

from server.store import sqlite
from server.store.database_tracer import DatabaseTracer
from tests.support.callers import Client, Server
from tests.support.markers import only_postgresql, only_sqlite
from tests.support.waiting import until

STATEMENTS = 24
"""More statements than a verification of two accounts executes."""
ROUNDS = 3 * STATEMENTS
LOG_PAGES_MAX = 250
FRAME_BYTES = 4096 + 24
"""Size of a page in SQLite's write-ahead log, with its header."""
BUSY_SECONDS = 0.002

Call: TypeAlias = "grpc.aio.UnaryStreamCall[VerifyAccountsRequest, VerifyAccountsResponse]"


@pytest.fixture(autouse=True)
def without_garbage_collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Disables the garbage collector, so that resources are released only by closing; shortens the log."""
    monkeypatch.setattr(sqlite, "LOG_PAGES_MAX", LOG_PAGES_MAX)
    gc.disable()
    yield
    gc.enable()


class Canceller(DatabaseTracer):
    """Cancels a stream while the database executes one of its statements."""

    def __init__(self) -> None:
        self._statements_left = 0
        self._call: Call | None = None

    def cancel_at(self, call: Call, statement_number: int) -> None:
        """Counts statements from now on, and cancels the call at the given one."""
        self._call, self._statements_left = call, statement_number

    def statement(self, system: str, text: str) -> Callable[[BaseException | None], None]:
        """Cancels the call at its statement, then blocks until the cancellation has arrived."""
        self._statements_left -= 1
        if self._statements_left == 0 and self._call is not None:
            self._call.cancel()
            time.sleep(BUSY_SECONDS)
        return super().statement(system, text)


async def cancel_verifications(server: Server, admin: Client, client: Client) -> None:
    """Cancels verifications at each of their statements in turn, and posts after each."""
    canceller = Canceller()
    for account_id in ("acme", "other"):
        await client.create_account(account_id)

    async def has_run(statement_number: int) -> bool:
        """Whether a verification has run. It is refused while cancelled ones have not ended yet."""
        call = admin.admin.VerifyAccounts(VerifyAccountsRequest(), metadata=admin.metadata)
        canceller.cancel_at(call, statement_number)
        code = grpc.StatusCode.OK
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError as error:
            code = error.code()
        except asyncio.CancelledError:
            pass
        assert code in (grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED)
        return code is grpc.StatusCode.OK

    with server.book.database.tracing_with(canceller):
        for number in range(ROUNDS):
            await until(partial(has_run, 1 + number % STATEMENTS))
            for kind, amount in ((Transaction.GRANT, "1"), (Transaction.CHARGE, "-1")):
                await client.post("acme", kind, amount)


def size_of(file: str) -> int:
    """The bytes of a file."""
    return Path(file).stat().st_size


@only_sqlite
async def test_sqlite_keeps_its_log_short(server: Server, client: Client, admin: Client) -> None:
    """The write-ahead log stays near the length of a checkpoint, and no reader blocks a checkpoint."""
    await cancel_verifications(server, admin, client)
    file = str(server.book.database.url.database)
    assert size_of(f"{file}-wal") <= 2 * LOG_PAGES_MAX * FRAME_BYTES

    async def is_checkpointed() -> bool:
        with contextlib.closing(sqlite3.connect(file, timeout=0)) as connection:
            (is_busy, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return not is_busy

    await until(is_checkpointed)


@only_postgresql
async def test_postgresql_keeps_no_transaction(server: Server, client: Client, admin: Client) -> None:
    """No session of the server stays in a transaction or holds a snapshot."""
    await cancel_verifications(server, admin, client)
    url = server.book.database.url.set(drivername="postgresql").render_as_string(hide_password=False)
    connection = await asyncpg.connect(url)

    async def are_idle() -> bool:
        busy = await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND (state <> 'idle' OR backend_xmin IS NOT NULL)"
        )
        return bool(busy == 0)

    try:
        await until(are_idle)
    finally:
        await connection.close()
