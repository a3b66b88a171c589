"""Accounts with more open lots than one transaction may take from."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest
from daybook.v1.account_pb2 import User
from daybook.v1.admin_service_pb2 import ImportTransactionsRequest
from daybook.v1.ledger_service_pb2 import (
    BatchCreateTransactionsRequest,
    CreateTransactionRequest,
    ListLotsRequest,
    RefundTransactionRequest,
)
from daybook.v1.transaction_pb2 import Lot, Transaction
from sqlalchemy import update

from server.book import Book
from server.ledger.lots import Lot as StoredLot
from server.store.open_lots import OpenLots
from server.store.tables import account_states
from tests.support.callers import Client, Server
from tests.support.clock import Clock, after
from tests.support.databases import database_occupied, writing
from tests.support.refusals import refusal_of

GRANT, CHARGE, ADJUSTMENT = Transaction.GRANT, Transaction.CHARGE, Transaction.ADJUSTMENT
BATCH = 500


def grant(amount: str = "1", **fields: object) -> Transaction:
    """A grant, permanent unless `fields` say otherwise."""
    return Transaction(**{"kind": GRANT, "category": "purchase", "amount": amount, **fields})  # type: ignore[arg-type]


async def post_all(client: Client, transactions: Sequence[Transaction], account_id: str = "acme") -> None:
    """Posts transactions in order, in batches."""
    for start in range(0, len(transactions), BATCH):
        requests = [CreateTransactionRequest(transaction=each) for each in transactions[start : start + BATCH]]
        await client.ledger.BatchCreateTransactions(
            BatchCreateTransactionsRequest(parent=f"accounts/{account_id}", requests=requests),
            metadata=client.metadata,
        )


async def all_lots(client: Client, account_id: str = "acme") -> list[Lot]:
    """All lots of an account, by number."""
    lots: list[Lot] = []
    request = ListLotsRequest(parent=f"accounts/{account_id}", page_size=1000)
    while not lots or request.page_token:
        page = await client.ledger.ListLots(request, metadata=client.metadata)
        lots += page.lots
        request.page_token = page.next_page_token
    return lots


async def taken_by(client: Client, transaction: Transaction) -> list[int]:
    """The numbers of the lots that a transaction took credits from, in spending order."""
    full = await client.full(transaction.name)
    return [int(each.lot.rpartition("/")[2]) for each in full.allocations]


@pytest.fixture
async def acme(client: Client) -> Client:
    """A caller with the account `acme`."""
    await client.create_account("acme")
    return client


async def test_oldest_of_many_grants_are_spent_first(acme: Client, admin: Client) -> None:
    """The oldest of fifteen hundred permanent grants are spent first."""
    await post_all(acme, [grant()] * 1500)
    balance = await acme.balance()
    assert (balance.amount, balance.permanent_amount, balance.sequence) == ("1500", "1500", 1500)
    assert await taken_by(acme, await acme.post("acme", CHARGE, "-2.5")) == [1, 2, 3]
    assert await taken_by(acme, await acme.post("acme", CHARGE, "-300")) == list(range(3, 304))
    assert await taken_by(acme, await acme.post("acme", ADJUSTMENT, "-1")) == [303, 304]
    assert (await acme.post("acme", ADJUSTMENT, "5")).balance_after == "1201.5"
    assert await admin.verify() == []


async def test_charge_of_too_many_lots_is_refused(acme: Client, admin: Client) -> None:
    """A charge of too many lots is refused with the largest possible amount; several charges can take everything."""
    await post_all(acme, [grant(expire_time=after(3600 + number)) for number in range(1500, 0, -1)])
    refusal = await refusal_of(acme.post("acme", CHARGE, "-1500"))
    assert refusal.verdict == ("FAILED_PRECONDITION", "TOO_MANY_LOTS")
    assert refusal.metadata == {"account": "accounts/acme", "lot_limit": "1000", "largest_amount": "1000"}
    assert "largest" not in refusal.message
    assert "1000 lots" in refusal.message
    for amount in ("-1000.000001", "-1200"):
        assert (await refusal_of(acme.post("acme", CHARGE, amount))).verdict == refusal.verdict
    first = await acme.post("acme", CHARGE, f"-{refusal.metadata['largest_amount']}")
    assert await taken_by(acme, first) == list(range(1500, 500, -1))
    assert (await acme.post("acme", CHARGE, "-500")).balance_after == "0"
    assert await admin.verify() == []


async def test_priorities_go_before_expire_times(acme: Client, admin: Client) -> None:
    """A later lot is spent first if its terms say so, however many other lots there are."""
    lots = [(number % 5 - 2, None if number % 3 == 0 else 5000 - number) for number in range(600)]
    await post_all(
        acme,
        [
            grant(priority=priority, expire_time=None if seconds is None else after(3600 + seconds))
            for priority, seconds in lots
        ],
    )
    expected = sorted(range(1, 601), key=lambda number: (lots[number - 1][0], lots[number - 1][1] or 99_999, number))
    assert await taken_by(acme, await acme.post("acme", CHARGE, "-70")) == expected[:70]
    await acme.post("acme", GRANT, "2", priority=-9)
    await acme.post("acme", GRANT, "2", priority=9)
    assert await taken_by(acme, await acme.post("acme", CHARGE, "-300")) == [601, *expected[70:368]]
    assert await taken_by(acme, await acme.post("acme", CHARGE, "-234")) == [*expected[368:], 602]
    assert await admin.verify() == []


@pytest.mark.parametrize("is_swept", [False, True], ids=["at the next charge", "by the sweep"])
async def test_many_lots_that_expire_at_once(
    server: Server, acme: Client, admin: Client, clock: Clock, is_swept: bool
) -> None:
    """The balance is right at once; expirations are posted by the thousand, before the account's other transactions."""
    await post_all(acme, [grant(expire_time=after(60), owner=User(id=f"u{number}")) for number in range(2500)])
    await post_all(acme, [grant(expire_time=after(90)), grant("7")])
    clock.advance(60)
    balance = await acme.balance()
    assert (balance.amount, balance.expiring_amount, balance.permanent_amount) == ("8", "1", "7")
    if is_swept:
        assert await server.book.expirations.sweep() == 2500
    refused, charge, _ = await asyncio.gather(
        refusal_of(acme.post("acme", CHARGE, "-8.5")),
        acme.post("acme", CHARGE, "-3"),
        acme.post("acme", GRANT, "2"),
    )
    assert refused.verdict[1] == "INSUFFICIENT_CREDITS"
    assert charge.balance_after in {"5", "7"}
    assert (await acme.balance()).amount == "7"
    assert await taken_by(acme, charge) == [2501, 2502]
    history = await acme.history()
    expirations = [each for each in history if each.kind == Transaction.EXPIRATION]
    assert [each.owner.id for each in expirations] == [f"u{number}" for number in range(2500)]
    assert {each.create_time.seconds for each in expirations} == {after(60).seconds}
    assert [each.kind for each in history[-2:]] in ([CHARGE, GRANT], [GRANT, CHARGE])
    assert await server.book.expirations.sweep() == 0
    assert await admin.verify() == []


async def queued(book: Book, calls: Sequence[Coroutine[Any, Any, object]]) -> list[asyncio.Task[object]]:
    """Starts calls that wait in the poster's queue in this order, behind the first, which the poster has taken."""
    started = []
    for number, call in enumerate(calls):
        started.append(asyncio.create_task(call))
        while not (book.poster.queue_length == number and any(pool.waiting for pool in book.database.pools.values())):
            await asyncio.sleep(0.001)
    return started


async def test_others_do_not_wait_for_expirations(server: Server, acme: Client, clock: Clock) -> None:
    """A transfer waits for the expirations of its accounts; calls of other accounts don't, and the order is kept."""
    for name in ("other", "third"):
        await acme.create_account(name)
        await acme.post(name, GRANT, "5")
    await post_all(acme, [grant(expire_time=after(60))] * 1500)
    await post_all(acme, [grant("3")])
    clock.advance(60)
    calls = [
        acme.post("third", CHARGE, "-1"),
        acme.transfer("acme", "other", "2"),
        acme.post("other", CHARGE, "-6"),
        acme.post("third", CHARGE, "-1"),
        acme.transfer("other", "acme", "1"),
    ]
    async with asyncio.timeout(60):
        async with database_occupied(server.book):
            started = await queued(server.book, calls)
        await asyncio.gather(*started)
    amounts = [(await acme.balance(name)).amount for name in ("acme", "other", "third")]
    assert amounts == ["2", "0", "3"]


async def test_refund_returns_credits_to_closed_lots(acme: Client, admin: Client) -> None:
    """A refund finds the lots of its charge behind any number of other lots, open or closed."""
    await acme.post("acme", GRANT, "10", priority=5)
    await acme.post("acme", GRANT, "10", priority=5)
    charge = await acme.post("acme", CHARGE, "-15")
    await post_all(acme, [grant()] * 1100)
    for amount in ("6", "9"):
        await acme.ledger.RefundTransaction(
            RefundTransactionRequest(name=charge.name, amount=amount), metadata=acme.metadata
        )
    lots = await all_lots(acme)
    assert [lot.remaining_amount for lot in lots[:2]] == ["10", "10"]
    assert (await acme.post("acme", CHARGE, "-1000")).balance_after == "120"
    assert await taken_by(acme, await acme.post("acme", CHARGE, "-101")) == [*range(1003, 1103), 1]
    assert await admin.verify() == []


async def test_transfers_between_accounts_with_many_lots(acme: Client, admin: Client) -> None:
    """Concurrent transfers in both directions succeed; lots with the same terms arrive as one."""
    await acme.create_account("other")
    for name in ("acme", "other"):
        await post_all(acme, [grant()] * 700, name)
        await post_all(acme, [grant(expire_time=after(3600 + number)) for number in range(400)], name)
    outcomes = await asyncio.gather(
        *(acme.transfer(*sides, "30") for sides in [("acme", "other"), ("other", "acme")] * 10)
    )
    assert len(outcomes) == 20
    assert [(await acme.balance(name)).amount for name in ("acme", "other")] == ["1100", "1100"]
    await acme.transfer("acme", "other", "900")
    arrived = (await all_lots(acme, "other"))[-1]
    assert (arrived.amount, arrived.HasField("expire_time")) == ("500", False)
    assert (await acme.balance("other")).expiring_amount == "800"
    assert await admin.verify() == []


async def test_import_into_an_account_with_many_lots(acme: Client, admin: Client, clock: Clock) -> None:
    """Any number of expirations is posted between an import's items, and repeating the import changes nothing."""
    await post_all(acme, [grant(expire_time=after(60 + number // 1200)) for number in range(2400)])
    clock.advance(3600)
    items = [
        ImportTransactionsRequest.Item(
            parent="accounts/acme", request_id=f"i{seconds}", transaction=transaction, create_time=after(seconds)
        )
        for seconds, transaction in (
            (10, grant("3")),
            (60, Transaction(kind=CHARGE, category="x", amount="-900")),
            (61, Transaction(kind=CHARGE, category="x", amount="-1")),
            (70, grant("2")),
        )
    ]
    for imported, skipped in ((3, 0), (1, 3)):
        part = items[:3] if imported == 3 else items
        call = admin.admin.ImportTransactions(iter([ImportTransactionsRequest(items=part)]), metadata=admin.metadata)
        outcome = await call
        assert (outcome.imported_count, outcome.skipped_count) == (imported, skipped)
    assert (await acme.balance()).amount == "4"
    history = await acme.history()
    assert [each.kind for each in history[2400:]] == [
        GRANT,
        *[Transaction.EXPIRATION] * 1200,
        CHARGE,
        *[Transaction.EXPIRATION] * 300,
        CHARGE,
        GRANT,
    ]
    assert await admin.verify() == []


async def test_states_of_an_older_server_are_counted(server: Server, acme: Client, admin: Client) -> None:
    """States of an older server lack the open lots and the expiring credits, which are computed until a posting."""
    await post_all(acme, [grant(expire_time=after(60 + number)) for number in range(100)])
    for expected in ("100", "99"):
        async with writing(server.book.database) as connection:
            await connection.execute(update(account_states).values(open_lot_count=1, expiring=2, counted_sequence=3))
        balance = await acme.balance()
        assert (balance.amount, balance.expiring_amount) == (expected, expected)
        assert await admin.verify() == []
        await acme.post("acme", CHARGE, "-1")
    async with server.book.database.primary.snapshot() as connection:
        row = (await connection.execute(account_states.select())).one()
    assert (row.open_lot_count, row.expiring, row.counted_sequence) == (98, 98 * 10**6, row.sequence)


async def test_refused_calls_read_a_bounded_number_of_lots(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one group, each refused batch reads no more lots than the first."""
    await client.create_account("acme")
    await post_all(client, [grant() for _ in range(1500)])
    limits: list[int] = []
    first_to_spend = OpenLots.first_to_spend

    def recorded(open_lots: OpenLots, account_number: int, limit: int) -> list[StoredLot]:
        limits.append(limit)
        return first_to_spend(open_lots, account_number, limit)

    monkeypatch.setattr(OpenLots, "first_to_spend", recorded)
    charges = [Transaction(kind=CHARGE, category="test", amount=amount) for amount in ("-1", "-100", "-2000")]
    batch = BatchCreateTransactionsRequest(
        parent="accounts/acme", requests=[CreateTransactionRequest(transaction=each) for each in charges]
    )
    refusals = await asyncio.gather(
        *(refusal_of(client.ledger.BatchCreateTransactions(batch, metadata=client.metadata)) for _ in range(20))
    )
    assert {each.reason for each in refusals} == {"INSUFFICIENT_CREDITS"}
    assert 0 < max(limits) <= 256
