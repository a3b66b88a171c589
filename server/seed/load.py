"""Generates the data in worker processes, and writes it as it arrives."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from random import Random
from typing import NamedTuple, TypeAlias
from uuid import UUID

from daybook.v1 import account_pb2 as native

from server.ledger.accounts import AccountRecord
from server.ledger.instants import Instant
from server.ledger.money import ONE_CREDIT
from server.seed.history import DAY, PLACES, YEAR, Account, Household, Place, Setting
from server.store.bulk import BulkLoad, bulk_load
from server.store.database import Database
from server.store.migrate import migrate
from server.store.tables import transactions
from server.store.units import Rows

ROWS_MIN = 1000
ROWS_MAX = 1_000_000_000
ROWS_OF_AN_ACCOUNT = 1000
"""The average number of transactions of an account."""
ACCOUNTS_MAX = 100_000
HOT_SHARE = 10
"""The account `hot` has this fraction of all transactions, 1 / HOT_SHARE."""
HOT_ACCOUNT = "hot"
WORKERS_MAX = 4
ROWS_OF_A_WORKER_MIN = 20_000
"""Minimum number of transactions per worker process."""

_KINDS = (native.Account.SPACE, native.Account.USER, native.Account.ORGANIZATION)


class Parameters(NamedTuple):
    """The parameters of the data."""

    tenant: str
    """The slug of the tenant, which must not exist."""
    rows: int
    random_seed: int
    until: Instant
    years: int


Report: TypeAlias = Callable[[int, str], None]
"""Receives the number of transactions written so far, and the name of the next step."""


async def load(database_url: str, parameters: Parameters, report: Report) -> str:
    """Generates a tenant and returns its uid.

    An interruption leaves the database unchanged. Raises ValueError if the tenant exists, or if
    another process has SQLite's file open.
    """
    database = Database(database_url)
    try:
        await migrate(database)
        async with bulk_load(database) as bulk:
            return await _load(bulk, parameters, report)
    finally:
        await database.close()


async def _load(bulk: BulkLoad, parameters: Parameters, report: Report) -> str:
    random = Random(f"{parameters.random_seed}/{parameters.tenant}")
    start = parameters.until - parameters.years * YEAR
    uid = _uuid(random)
    tenant_number = await bulk.add_tenant(
        slug=parameters.tenant, uid=uid, display_name=f"Seeded {parameters.tenant}", create_time=start - DAY
    )
    records = _records(parameters, random, start)
    numbers = await bulk.add_accounts(tenant_number, records)
    companies = [record.id for record in records if record.kind == native.Account.COMPANY]
    setting = Setting(
        random_seed=f"{parameters.random_seed}/{parameters.tenant}",
        tenant_number=tenant_number,
        start=start,
        end=parameters.until,
        places=tuple(Place(_uuid(random), _uuid(random), companies[place % len(companies)]) for place in range(PLACES)),
    )
    counts = row_counts(parameters.rows, len(records))
    households = _households(
        [
            Account(numbers[record.id], record.id, record.credit_limit, count)
            for record, count in zip(records, counts, strict=True)
        ]
    )
    done = 0
    with _histories(setting, households) as connections:
        async with aclosing(_received(connections)) as received:
            async for rows in received:
                await bulk.add(rows)
                done += len(rows.get(transactions.name, ()))
                report(done, "posting")
    assert done == parameters.rows
    async with aclosing(bulk.build_indexes()) as names:
        async for name in names:
            report(done, f"building {name}")
    return uid


def row_counts(rows: int, accounts: int) -> list[int]:
    """The number of transactions of each account. The first account has a tenth, the others follow Zipf's law."""
    hot = rows // HOT_SHARE
    weights = [1 / rank for rank in range(2, accounts + 1)]
    total = sum(weights)
    counts = [int((rows - hot) * weight / total) for weight in weights]
    counts[0] += rows - hot - sum(counts)
    return [hot, *counts]


def _records(parameters: Parameters, random: Random, start: Instant) -> list[AccountRecord]:
    count = min(max(parameters.rows // ROWS_OF_AN_ACCOUNT, 2 * PLACES), ACCOUNTS_MAX)
    records = []
    for number in range(count):
        # The label `company` names one of these accounts.
        is_company = number % 2 == 1 and number < 2 * PLACES
        account_id = HOT_ACCOUNT if number == 0 else _uuid(random) if is_company else f"account-{number}"
        records.append(
            AccountRecord(
                id=account_id,
                kind=native.Account.COMPANY if is_company else _KINDS[number % len(_KINDS)],
                display_name=f"Account {number}",
                credit_limit=50 * ONE_CREDIT if number % 8 == 7 else 0,
                profile=b"",
                hour_anchor=start,
                create_time=start - DAY,
                update_time=start - DAY,
            )
        )
    return records


def _households(accounts: Sequence[Account]) -> list[list[Account]]:
    """Pairs each large account with a small one; the largest account comes first."""
    half = -(-len(accounts) // 2)
    return [
        [account, *accounts[len(accounts) - 1 - place : len(accounts) - place][: place < len(accounts) - half]]
        for place, account in enumerate(accounts[:half])
    ]


def _uuid(random: Random) -> str:
    return str(UUID(bytes=random.randbytes(16), version=4))


@contextmanager
def _histories(setting: Setting, households: list[list[Account]]) -> Iterator[list[Connection]]:
    """Starts processes that generate the histories, and yields the receiving ends of their pipes."""
    context = get_context("spawn")
    rows = sum(account.rows for household in households for account in household)
    workers = min(os.cpu_count() or 1, WORKERS_MAX, -(-rows // ROWS_OF_A_WORKER_MIN))
    shares = _spread(households, workers)
    processes: list[SpawnProcess] = []
    connections: list[Connection] = []
    try:
        for share in shares:
            receiving, sending = context.Pipe(duplex=False)
            process = context.Process(target=_make, args=(sending, setting, share), daemon=True)
            process.start()
            # Closes this process's copy, so that the pipe ends when the worker does.
            sending.close()
            processes.append(process)
            connections.append(receiving)
        yield connections
    finally:
        # Ends the workers first, which ends the wait of a thread for a pipe.
        for process in processes:
            process.terminate()
            process.join()
        for connection in connections:
            connection.close()


def _spread(households: list[list[Account]], workers: int) -> list[list[list[Account]]]:
    """Spreads the households over the workers, with about as many rows for each."""
    shares: list[list[list[Account]]] = [[] for _ in range(workers)]
    rows = [0] * workers
    for household in households:
        least = rows.index(min(rows))
        shares[least].append(household)
        rows[least] += sum(account.rows for account in household)
    return shares


def _make(sending: Connection, setting: Setting, households: list[list[Account]]) -> None:
    """Runs in a worker: sends the histories one after another, and then None."""
    # Ctrl-C also reaches the parent, which then ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()
    with suppress(BrokenPipeError):
        for household in households:
            for rows in Household(setting, household).history():
                sending.send(rows)
        sending.send(None)


async def _received(connections: Sequence[Connection]) -> AsyncGenerator[Rows, None]:
    """The rows that the workers send, in the order of arrival."""
    open_connections = list(connections)
    while open_connections:
        ready = await asyncio.to_thread(wait, open_connections)
        for connection in [each for each in open_connections if each in ready]:
            try:
                rows: Rows | None = await asyncio.to_thread(connection.recv)
            except EOFError:
                raise ValueError("a worker process ended unexpectedly; the database is unchanged") from None
            if rows is None:
                open_connections.remove(connection)
            else:
                yield rows
