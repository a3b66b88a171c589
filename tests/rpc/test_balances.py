"""Balances are never stale."""

from __future__ import annotations

from random import Random

import grpc
import pytest
from daybook.v1.account_pb2 import Account
from daybook.v1.ledger_service_pb2 import UpdateAccountRequest
from daybook.v1.transaction_pb2 import Transaction
from google.protobuf.duration_pb2 import Duration
from sqlalchemy import delete, update

from server.app import serving
from server.book import open_book
from server.config import Settings
from server.store.tables import account_states, lots, transactions
from tests.support.callers import Client, Server
from tests.support.clock import Clock
from tests.support.databases import writing
from tests.support.statement_counter import statements

GRANT, CHARGE = Transaction.GRANT, Transaction.CHARGE


async def amount(client: Client, account: str = "acme") -> str:
    """The balance of an account."""
    return (await client.balance(account)).amount


async def lower_limit(client: Client, credit_limit: str) -> None:
    """Lowers the credit limit, without a transaction."""
    account = Account(name="accounts/acme", credit_limit=credit_limit)
    await client.ledger.UpdateAccount(UpdateAccountRequest(account=account), metadata=client.metadata)


@pytest.fixture
async def acme(client: Client) -> Client:
    """A caller with the account `acme`."""
    await client.create_account("acme", credit_limit="10")
    return client


async def test_one_statement_reads_a_balance(server: Server, acme: Client) -> None:
    """One statement reads an account and its state, so that both belong to one snapshot."""
    await acme.post("acme", GRANT, "1")
    with statements(server.book) as found:
        assert await amount(acme) == "1"
    assert found.reads_of("accounts", "account_states") == 1


async def test_accounts_have_separate_balances(acme: Client) -> None:
    """Each account has its own balance, also before its first transaction."""
    await acme.create_account("other")
    assert [await amount(acme, name) for name in ("acme", "other", "acme")] == ["0"] * 3
    await acme.post("other", GRANT, "3")
    assert [await amount(acme, name) for name in ("acme", "other", "acme")] == ["0", "3", "0"]


async def test_new_limit_takes_effect_at_once(acme: Client) -> None:
    """A new credit limit takes effect at once, though it leaves no transaction."""
    await acme.post("acme", CHARGE, "-4")
    assert (await acme.balance()).available_amount == "6"
    await lower_limit(acme, "5")
    assert (await acme.balance()).available_amount == "1"


async def test_expired_credits_leave_the_balance(acme: Client, clock: Clock) -> None:
    """Credits leave the balance at their expire_time by the clock, though nothing is posted."""
    await acme.post("acme", GRANT, "8", ttl=Duration(seconds=3600))
    await acme.post("acme", GRANT, "2")
    amounts = []
    for seconds in (3599.999999, 0.000001):
        clock.advance(seconds)
        amounts.append((await amount(acme), (await acme.balance()).expiring_amount))
    assert amounts == [("10", "8"), ("2", "0")]


async def test_change_by_another_process_shows_at_once(database_url: str, acme: Client, server: Server) -> None:
    """A transaction or a credit limit of another process shows at once."""
    assert await amount(acme) == "0"
    async with (
        open_book(database_url, server.book.clock, Random(7).randbytes) as book,
        serving(book, Settings(port=0)) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        stranger = Client(channel, acme.key)
        await stranger.post("acme", GRANT, "1")
        assert [await amount(caller) for caller in (acme, stranger)] == ["1", "1"]
        await lower_limit(acme, "3")
        assert [(await caller.balance()).available_amount for caller in (acme, stranger)] == ["4", "4"]


@pytest.mark.one_server
async def test_restored_database_shows_its_own_balance(server: Server, acme: Client, clock: Clock) -> None:
    """After a restore the balance has no lost transaction, even if as many others are posted."""
    await acme.post("acme", CHARGE, "-1")
    async with server.book.database.primary.snapshot() as connection:
        before = (await connection.execute(account_states.select())).one()
    await acme.post("acme", GRANT, "7")
    assert await amount(acme) == "6"
    async with writing(server.book.database) as connection:
        await connection.execute(delete(lots))
        await connection.execute(delete(transactions).where(transactions.c.sequence == 2))
        await connection.execute(update(account_states).values(**before._asdict()))
    assert await amount(acme) == "-1"
    clock.advance(1)
    assert (await acme.post("acme", GRANT, "4")).sequence == 2
    assert await amount(acme) == "3"
