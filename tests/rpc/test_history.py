"""The first page of an account's history, which is remembered: that it is never out of date, and has a bound."""

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
from server.store.tables import account_states, transactions
from server.usecases import transactions as usecase
from tests.support.callers import Client, Server
from tests.support.clock import Clock
from tests.support.databases import writing
from tests.support.statement_counter import statements


async def first_page(client: Client, account: str = "acme", **fields: object) -> ListTransactionsResponse:
    """The first page of an account's history."""
    request = ListTransactionsRequest(parent=f"accounts/{account}", **fields)  # type: ignore[arg-type]
    return await client.ledger.ListTransactions(request, metadata=client.metadata)


async def grants(client: Client, count: int, account: str = "acme", description: str = "") -> list[str]:
    """Posts grants; answers with their names, newest first."""
    posted = [await client.post(account, Transaction.GRANT, "1", description=description) for _ in range(count)]
    return [each.name for each in reversed(posted)]


@pytest.fixture
async def acme(client: Client) -> Client:
    """A caller with an account."""
    await client.create_account("acme")
    return client


async def test_nothing_but_a_hash_is_read_of_a_page_that_is_known(server: Server, acme: Client) -> None:
    """Each size and each direction is a page of its own; what is behind a token is read each time."""
    names = await grants(acme, 5)
    await acme.create_account("other")
    for _ in range(2):
        # SQLite isn't asked even for the hash where nothing was committed.
        await grants(acme, 1, "other")
        with statements(server.book) as found:
            page = await first_page(acme, page_size=2)
        assert [row.name for row in page.transactions] == names[:2]
    assert (found.of_bodies, len(found.texts)) == (0, 1)
    for size, order, expected in ((3, "", names[:3]), (2, "create_time", names[:-3:-1])):
        with statements(server.book) as found:
            other = await first_page(acme, page_size=size, order_by=order)
        assert [row.name for row in other.transactions] == expected
        assert found.of_bodies == 1
    for _ in range(2):
        with statements(server.book) as found:
            behind = await first_page(acme, page_size=2, page_token=page.next_page_token)
        assert [row.name for row in behind.transactions] == names[2:4]
        assert found.of_bodies == 1


async def test_an_account_without_transactions(acme: Client) -> None:
    """Its page is empty, of which there is nothing to remember, until it has one."""
    for _ in range(2):
        assert await first_page(acme) == ListTransactionsResponse()
    (name,) = await grants(acme, 1)
    assert [row.name for row in (await first_page(acme)).transactions] == [name]


async def test_accounts_have_pages_of_their_own(acme: Client) -> None:
    """Also those that have nothing yet, whose hash is the same."""
    await acme.create_account("other")
    assert await first_page(acme) == await first_page(acme, "other") == ListTransactionsResponse()
    mine, others = await grants(acme, 2), await grants(acme, 2, "other")
    for _ in range(2):
        assert [row.name for row in (await first_page(acme)).transactions] == mine
        assert [row.name for row in (await first_page(acme, "other")).transactions] == others


async def test_what_another_process_posted_is_there(database_url: str, acme: Client, server: Server) -> None:
    """At once: the newest transaction is asked for, not remembered."""
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
async def test_a_database_that_is_put_back(server: Server, acme: Client, clock: Clock) -> None:
    """As many transactions as before, but others: what was remembered of those that are gone is not shown."""
    kept = await grants(acme, 1)
    async with server.book.database.read() as connection:
        before = (await connection.execute(account_states.select())).one()
    gone = await grants(acme, 1, description="gone")
    assert [row.name for row in (await first_page(acme)).transactions] == [*gone, *kept]
    async with writing(server.book.database) as connection:
        await connection.execute(delete(transactions).where(transactions.c.sequence == 2))
        await connection.execute(update(account_states).values(**before._asdict()))
    assert [row.name for row in (await first_page(acme)).transactions] == kept
    clock.advance(1)
    others = await acme.post("acme", Transaction.CHARGE, "-1", description="instead")
    assert others.sequence == 2
    assert [row.name for row in (await first_page(acme)).transactions] == [others.name, *kept]


async def test_a_long_page_is_not_remembered(server: Server, acme: Client) -> None:
    """Beyond HISTORY_BYTES_MAX; a shorter one is."""
    await grants(acme, 50, description="x" * 900)
    row = (await first_page(acme, page_size=1)).transactions[0]
    # The tag and two bytes of length. The other rows are as long, or a byte or two shorter.
    most = usecase.HISTORY_BYTES_MAX // (row.ByteSize() + 3)
    for size, reads in ((most - 1, 0), (most + 2, 1)):
        for _ in range(2):
            with statements(server.book) as found:
                page = await first_page(acme, page_size=size)
            assert len(page.transactions) == size
        assert found.of_bodies == reads


async def test_pages_have_a_bound(server: Server, acme: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond HISTORIES_CACHED_MAX the one that was read first is read again."""
    monkeypatch.setattr(usecase, "HISTORIES_CACHED_MAX", 2)
    await grants(acme, 5)
    for size in (1, 2, 3):
        await first_page(acme, page_size=size)
    for size, reads in ((3, 0), (2, 0), (1, 1), (2, 1)):
        with statements(server.book) as found:
            await first_page(acme, page_size=size)
        assert found.of_bodies == reads, size
