"""Reads of the books in parts of bounded size."""

from __future__ import annotations

import pytest
from daybook.v1.ledger_service_pb2 import RefundTransactionRequest
from daybook.v1.transaction_pb2 import Transaction

from server.book import Book
from server.store import books
from tests.support.callers import Client


async def test_parts_have_every_row_once(book: Book, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of a read have every row once, and no part exceeds its bound."""
    monkeypatch.setattr(books, "ENTRIES_AT_ONCE", 3)
    monkeypatch.setattr(books, "REFUNDS_AT_ONCE", 2)
    ids = [f"account-{number}" for number in range(7)]
    numbers = [(await client.create_account(account_id)).number for account_id in ids]
    for _ in range(8):
        await client.post("account-0", Transaction.GRANT, "2")
    charges = [await client.post("account-0", Transaction.CHARGE, "-1") for _ in range(5)]
    for charge in charges:
        await client.ledger.RefundTransaction(
            RefundTransactionRequest(name=charge.name, amount="0.5"), metadata=client.metadata
        )

    store = books.BookStore(book.database)
    assert [(key.id, key.number) async for key in store.accounts(None)] == list(zip(ids, numbers, strict=True))
    async with store.open(numbers[0]) as opened:
        sequences = [[entry.sequence for entry in part] async for part in opened.entries()]
        assert sequences == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12], [13, 14, 15], [16, 17, 18]]
        refunded = [[each.uid for each in part] async for part in opened.refund_totals()]
        assert refunded == [[each.uid for each in part] for part in (charges[:2], charges[2:4], charges[4:])]
        # Each charge took half of a lot, and each refund returned a quarter.
        expected = {1: 1_000_000, 2: 1_000_000, 3: 1_500_000} | dict.fromkeys(range(4, 9), 2_000_000)
        assert await opened.open_lots() == expected
