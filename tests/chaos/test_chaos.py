"""A short campaign of each kind, and what its checks find."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from daybook.v1.ledger_service_pb2 import CreateTransactionRequest
from daybook.v1.transaction_pb2 import Transaction

from tests.chaos import stages
from tests.chaos.campaign import run
from tests.chaos.journal import Journal, over_grpc
from tests.support.callers import Client
from tests.support.databases import PostgreSQL
from tests.support.ledgers import ACCOUNT_IDS
from tests.support.markers import only_sqlite

SEED = 0
CALLERS = 4
"""Few, so that a busy machine has room for other tests."""


@pytest.fixture(scope="module")
def own_postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgreSQL]:
    """A PostgreSQL that no other test uses."""
    with stages.postgresql_in(tmp_path_factory.mktemp("postgresql")) as postgresql:
        yield postgresql


@pytest.mark.long
def test_killed_server_on_sqlite(tmp_path: Path) -> None:
    """After four kills every acknowledged transaction is stored once, and repeated calls have one effect."""
    with stages.killed_server(tmp_path, None) as stage:
        figures = asyncio.run(run(stage, 4, SEED, CALLERS))
    assert figures.ends == 4
    assert figures.repeated >= 4
    assert figures.acknowledged > 200


@pytest.mark.long
def test_killed_server_on_postgresql(tmp_path: Path, own_postgresql: PostgreSQL) -> None:
    """The same on PostgreSQL."""
    with stages.killed_server(tmp_path, own_postgresql) as stage:
        assert asyncio.run(run(stage, 2, SEED, CALLERS)).repeated >= 2


@pytest.mark.long
def test_killed_postgresql(tmp_path: Path, own_postgresql: PostgreSQL) -> None:
    """The server survives kills of its database and loses nothing."""
    with stages.killed_database(tmp_path, own_postgresql) as stage:
        assert asyncio.run(run(stage, 2, SEED, CALLERS)).repeated >= 2


@pytest.mark.long
def test_killed_server_behind_the_gateway(tmp_path: Path, own_postgresql: PostgreSQL) -> None:
    """The other server answers, and calls that the killed one had get one effect."""
    with stages.two_servers(tmp_path, own_postgresql, signal.SIGKILL) as stage:
        assert asyncio.run(run(stage, 2, SEED, CALLERS)).repeated >= 2


@pytest.mark.long
def test_rolling_restart_loses_no_call(tmp_path: Path, own_postgresql: PostgreSQL) -> None:
    """Each server is restarted in turn, and every call is answered at its first attempt."""
    with stages.two_servers(tmp_path, own_postgresql, signal.SIGTERM) as stage:
        figures = asyncio.run(run(stage, 2, SEED, CALLERS))
    assert figures.acknowledged > 200
    assert (figures.repeated, figures.repeated_reads) == (0, 0)


async def journal_of(client: Client) -> Journal:
    """Thirty answered calls on the accounts of the campaign."""
    for account_id in ACCOUNT_IDS:
        await client.create_account(account_id, credit_limit="100")
    journal, random = Journal(), Random(SEED)
    for _ in range(30):
        await journal.perform(over_grpc(client), journal.next_call(random), random)
    await journal.check(client)
    return journal


@only_sqlite
async def test_check_finds_a_lost_transaction(admin: Client) -> None:
    """An acknowledged transaction that is not stored fails the check."""
    journal = await journal_of(admin)
    grant = Transaction(kind=Transaction.GRANT, category="test", amount="1", name="accounts/a/transactions/999")
    journal.sent["lost"] = CreateTransactionRequest(parent="accounts/a", transaction=grant, request_id="lost")
    journal.acknowledged["lost"] = grant
    with pytest.raises(AssertionError, match="acknowledged but not stored"):
        await journal.check(admin)


@only_sqlite
async def test_check_finds_a_second_effect(admin: Client) -> None:
    """A stored transaction that no answer has fails the check."""
    journal = await journal_of(admin)
    await admin.post("a", Transaction.GRANT, "1")
    with pytest.raises(AssertionError, match="stored but not acknowledged"):
        await journal.check(admin)


@only_sqlite
async def test_check_finds_another_answer(admin: Client) -> None:
    """A repeated call whose answer differs from the first fails the check."""
    journal = await journal_of(admin)
    request_id = next(each for each, answer in journal.acknowledged.items() if isinstance(answer, Transaction))
    journal.acknowledged[request_id] = Transaction()
    with pytest.raises(AssertionError, match=request_id):
        await journal.check_repetitions(admin, Random(SEED), len(journal.acknowledged))
