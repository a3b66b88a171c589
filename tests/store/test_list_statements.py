"""The memory of compiled list statements."""

from __future__ import annotations

import gc
import tracemalloc
from itertools import product
from pathlib import Path

import pytest
from daybook.v1.transaction_pb2 import Transaction

from server.ledger.paging import Order, TransactionFilter, TransactionKey, TransactionList
from server.store import transactions
from server.store.database import Database
from server.store.list_statements import SCANS_MAX, MergedScans, strategy_of
from server.store.migrate import migrate
from server.store.transactions import TransactionStore

BYTES_MAX = 1_000_000
ALLOWANCE = 1.5
"""The sizes of Python's own objects are approximate."""


async def test_cached_statements_are_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statements of many merged scans evict each other, and SQLAlchemy's statement objects are not kept."""
    monkeypatch.setattr(transactions, "QUERIES_BYTES_MAX", BYTES_MAX)
    database = Database(f"sqlite+aiosqlite:///{tmp_path}/daybook.db")
    await migrate(database)
    store = TransactionStore(database)
    tracemalloc.start()
    try:
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        shapes = product(range(SCANS_MAX - 4, SCANS_MAX + 1), (True, False), (None, TransactionKey(1, 1, 1)))
        for count, descending, after in shapes:
            pairs = tuple((Transaction.GRANT, f"category-{number}") for number in range(count))
            criteria = TransactionFilter(kind_categories=pairs, states=(Transaction.SUCCEEDED,))
            query = TransactionList(1, 1, criteria, Order(descending=descending), after, 50)
            assert isinstance(strategy_of(query), MergedScans)
            await store.list(query)
            assert store._queries.bytes <= BYTES_MAX
        gc.collect()
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
        await database.close()
    assert store._queries.bytes > BYTES_MAX / 2, "too few statements to fill the cache"
    assert used <= ALLOWANCE * BYTES_MAX
