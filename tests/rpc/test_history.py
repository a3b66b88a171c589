"""The first page of an account's history is never stale."""

from __future__ import annotations

from random import Random

import grpc
import pytest
from daybook.v1.ledger_service_pb2 import ListTransactionsRequest, ListTransactionsResponse
from daybook.v1.transaction_pb2 import Transaction
from sqlalchemy import delete, update

from server.app import serving
from server.book import open_book
from server.config import Settings
from server.ledger.paging import (
    EVERYTHING,
    NEWEST_FIRST,
    Page,
    TransactionKey,
    TransactionList,
    TransactionRow,
)
from server.store.tables import account_states, transactions
from tests.support.callers import Client, Server
from tests.support.clock import Clock
from tests.support.databases import writing
from tests.support.statement_counter import statements


async def first_page(client: Client, account: str = "acme", **fields: object) -> ListTransactionsResponse:
    """The first page of an account's history."""
    request = ListTransactionsRequest(parent=f"accounts/{account}", **fields)  # type: ignore[arg-type]
    return await client.ledger.ListTransactions(request, metadata=client.metadata)


async def grants(client: Client, count: int, account: str = "acme", description: str = "") -> list[str]:
    """Posts grants; returns their names, newest first."""
    posted = [await client.post(account, Transaction.GRANT, "1", description=description) for _ in range(count)]
    return [each.name for each in reversed(posted)]


@pytest.fixture
async def acme(client: Client) -> Client:
    """A caller with the account `acme`."""
    await client.create_account("acme")
    return client


async def test_unchanged_first_page_is_read_once(server: Server, acme: Client) -> None:
    """A first page is cached, by page size, while the account's head is the same; other lists are read each time."""
    names = await grants(acme, 5)
    await acme.create_account("other")
    for size in (2, 3):
        for reads in (1, 0, 0):
            await grants(acme, 1, "other")
            with statements(server.book) as found:
                page = await first_page(acme, page_size=size)
            assert [row.name for row in page.transactions] == names[:size]
            # A page is cached only if the head is the same before and after its read.
            assert (found.reads_of_transactions, found.reads_of("account_states")) == (reads, 1 + reads)
    token = (await first_page(acme, page_size=2)).next_page_token
    for request in [
        ListTransactionsRequest(page_token=token, page_size=2),
        ListTransactionsRequest(order_by="amount"),
    ] * 2:
        request.parent = "accounts/acme"
        with statements(server.book) as found:
            await acme.ledger.ListTransactions(request, metadata=acme.metadata)
        assert found.reads_of_transactions == 1


async def test_page_newer_than_its_head_is_not_cached(server: Server, acme: Client) -> None:
    """A page that is newer than the head read before it is not cached under that head."""
    await grants(acme, 1)
    store = server.book.transactions._store
    pages, read = store._first_pages, store._read
    tenant_number = await server.book.credentials.tenant_number("house")
    assert tenant_number is not None
    number = await server.book.account_store.number(tenant_number, "acme")
    query = TransactionList(tenant_number, number, EVERYTHING, NEWEST_FIRST, None, 9)

    async def post_and_read(query: TransactionList) -> Page[TransactionRow, TransactionKey]:
        await grants(acme, 1)
        return await read(query)

    assert len((await pages.page(query, post_and_read)).rows) == 2
    with statements(server.book) as found:
        assert len((await pages.page(query, read)).rows) == 2
    assert found.reads_of_transactions == 1


async def test_page_of_an_account_without_transactions(acme: Client) -> None:
    """The page of an account is empty until its first transaction."""
    for _ in range(2):
        assert await first_page(acme) == ListTransactionsResponse()
    (name,) = await grants(acme, 1)
    assert [row.name for row in (await first_page(acme)).transactions] == [name]


async def test_accounts_have_separate_pages(acme: Client) -> None:
    """Each account has its own page, also before its first transaction."""
    await acme.create_account("other")
    assert await first_page(acme) == await first_page(acme, "other") == ListTransactionsResponse()
    mine, others = await grants(acme, 2), await grants(acme, 2, "other")
    for _ in range(2):
        assert [row.name for row in (await first_page(acme)).transactions] == mine
        assert [row.name for row in (await first_page(acme, "other")).transactions] == others


async def test_transaction_of_another_process_is_listed(database_url: str, acme: Client, server: Server) -> None:
    """A page has another process's transaction as soon as it is posted."""
    names = await grants(acme, 2)
    assert [row.name for row in (await first_page(acme)).transactions] == names
    async with (
        open_book(database_url, server.book.clock, Random(7).randbytes) as book,
        serving(book, Settings(port=0)) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        stranger = Client(channel, acme.key)
        names = [*await grants(stranger, 1), *names]
        for caller in (acme, stranger, acme):
            assert [row.name for row in (await first_page(caller)).transactions] == names


@pytest.mark.one_server
async def test_restored_database_lists_no_lost_transaction(server: Server, acme: Client, clock: Clock) -> None:
    """After a restore a page has no lost transaction, even if as many others are posted."""
    kept = await grants(acme, 1)
    async with server.book.database.primary.snapshot() as connection:
        before = (await connection.execute(account_states.select())).one()
    lost = await grants(acme, 1, description="lost")
    assert [row.name for row in (await first_page(acme)).transactions] == [*lost, *kept]
    async with writing(server.book.database) as connection:
        await connection.execute(delete(transactions).where(transactions.c.sequence == 2))
        await connection.execute(update(account_states).values(**before._asdict()))
    assert [row.name for row in (await first_page(acme)).transactions] == kept
    clock.advance(1)
    others = await acme.post("acme", Transaction.CHARGE, "-1", description="instead")
    assert others.sequence == 2
    assert [row.name for row in (await first_page(acme)).transactions] == [others.name, *kept]
