"""What accounts hold is never out of date."""

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
    """Changes the account and nothing that it holds."""
    account = Account(name="accounts/acme", credit_limit=credit_limit)
    await client.ledger.UpdateAccount(UpdateAccountRequest(account=account), metadata=client.metadata)


@pytest.fixture
async def acme(client: Client) -> Client:
    """A caller with an account."""
    await client.create_account("acme", credit_limit="10")
    return client


async def test_one_statement_reads_a_balance(server: Server, acme: Client) -> None:
    """The account and its state, so both are of one snapshot."""
    await acme.post("acme", GRANT, "1")
    with statements(server.book) as found:
        assert await amount(acme) == "1"
    assert len(found.texts) == 1


async def test_accounts_hold_what_is_theirs(acme: Client) -> None:
    """Also those that have no transaction yet."""
    await acme.create_account("other")
    assert [await amount(acme, name) for name in ("acme", "other", "acme")] == ["0"] * 3
    await acme.post("other", GRANT, "3")
    assert [await amount(acme, name) for name in ("acme", "other", "acme")] == ["0", "3", "0"]


async def test_another_limit_is_there(acme: Client) -> None:
    """No transaction tells of it."""
    await acme.post("acme", CHARGE, "-4")
    assert (await acme.balance()).available_amount == "6"
    await lower_limit(acme, "5")
    assert (await acme.balance()).available_amount == "1"


async def test_what_expires_is_gone(acme: Client, clock: Clock) -> None:
    """By the clock, with nothing posted and nothing read."""
    await acme.post("acme", GRANT, "8", ttl=Duration(seconds=3600))
    await acme.post("acme", GRANT, "2")
    amounts = []
    for seconds in (3599.999999, 0.000001):
        clock.advance(seconds)
        amounts.append((await amount(acme), (await acme.balance()).expiring_amount))
    assert amounts == [("10", "8"), ("2", "0")]


async def test_what_another_process_did_is_there(database_url: str, acme: Client, server: Server) -> None:
    """At once, be it a transaction or a limit."""
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
async def test_a_database_that_is_put_back(server: Server, acme: Client, clock: Clock) -> None:
    """As many transactions as before, but others: nothing is told of those that are gone."""
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
