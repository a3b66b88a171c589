"""What the compiled statements of lists take of memory, whatever lists are asked for."""

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
"""Python's own objects are counted approximately."""


async def test_statements_have_a_bound_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists that are merged of many scans evict each other, and the statements that SQLAlchemy built are not kept."""
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
            wanted = TransactionFilter(kind_categories=pairs, states=(Transaction.SUCCEEDED,))
            query = TransactionList(1, 1, wanted, Order(descending=descending), after, 50)
            assert isinstance(strategy_of(query), MergedScans)
            await store.list(query)
            assert store._queries.bytes <= BYTES_MAX
        gc.collect()
        kept = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
        await database.close()
    assert store._queries.bytes > BYTES_MAX / 2, "too few to tell"
    assert kept <= ALLOWANCE * BYTES_MAX
