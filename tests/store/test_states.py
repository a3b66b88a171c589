"""States of accounts: saving and loading."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from daybook.v1.transaction_pb2 import Transaction, Usage

from server.book import Book
from server.ledger.instants import EARLIEST, HOUR
from server.ledger.lots import Lot, Terms
from server.ledger.posting import AccountState
from server.ledger.usage import UsageWindow
from server.store.engine import Rows
from server.store.query import Query
from server.store.states import StoredState, account_parameters, current_states_query, load_states, to_current_state
from server.store.transactions import TransactionStore
from server.store.units import Changes, Loaded, save
from tests.support.account_states import NOW
from tests.support.callers import Client
from tests.support.clock import Clock

LOTS = (Lot(3, 21, Terms(NOW + HOUR, 1), 900, 70), Lot(2, 20, Terms(None, 4), 800, 60))


async def test_a_saved_state_is_loaded_unchanged(book: Book, client: Client) -> None:
    """A saved state is loaded unchanged. Each field has a different value, so that swapped fields are found."""
    account = await client.create_account("acme", credit_limit="0.000005", hour_anchor_time={"seconds": 6})
    tenant_number = await book.credentials.tenant_number("house")
    assert tenant_number is not None
    state = AccountState(
        account_number=account.number,
        account_id="acme",
        tenant_number=tenant_number,
        credit_limit=5,
        hour_anchor=6_000_000,
        balance=130,
        debt=8,
        lots=LOTS,
        lot_count=9,
        sequence=22,
        last_create_time=NOW,
        window=UsageWindow(11, NOW - HOUR, 12, 13),
        import_time=14,
        open_lot_count=2,
        expiring=70,
    )
    stored = StoredState(state, b"hash")
    number = account.number
    changes = Changes(states={number: stored}, lots={(number, lot.number): lot for lot in LOTS})
    assert state.window is not None
    changes.windows[number, state.window.number] = state.window
    (new,) = (await book.database.transact(lambda connection: load_states(connection, [number]))).values()
    await book.database.transact(lambda connection: save(connection, Loaded(states={number: new}), changes))

    assert await book.database.transact(lambda connection: load_states(connection, [number])) == {number: stored}
    for now, expired in ((NOW, 0), (NOW + HOUR, 70)):
        (row,) = await book.database.lists.fetch(current_states_query(1), account_parameters([number]) | {"now": now})
        assert to_current_state(row) == state._replace(
            lots=(), edge=(), horizon=EARLIEST, balance=130 - expired, expiring=70 - expired
        )


async def test_a_balance_and_its_usage_are_consistent(
    book: Book, client: Client, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Usage posted between the reads of the state and of the windows appears in neither."""
    account = await client.create_account("acme", credit_limit="100")

    async def use() -> None:
        await client.post("acme", Transaction.CHARGE, "-1", category="computing", usage=Usage())

    await use()
    clock.advance(3600)
    await use()
    now, lists = clock(), book.database.lists
    fetch = lists.fetch

    async def fetch_and_use(query: Query, parameters: Mapping[str, object]) -> Rows:
        monkeypatch.undo()
        rows = await fetch(query, parameters)
        await use()
        clock.advance(3600)
        await use()
        return rows

    monkeypatch.setattr(lists, "fetch", fetch_and_use)
    state, windows, total = await TransactionStore(book.database).windows(account.number, 0, 10, now)
    assert state.balance == -2_000_000
    assert [(window.number, window.total) for window in windows] == [(2, 1_000_000), (1, 1_000_000)]
    assert total == 2
