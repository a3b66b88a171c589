"""The use case of usage."""

from __future__ import annotations

from dataclasses import dataclass

from server.ledger.access import Caller
from server.ledger.instants import Clock
from server.ledger.money import Millionths
from server.ledger.usage import UsageWindow
from server.store.accounts import AccountStore
from server.store.transactions import TransactionStore


@dataclass(frozen=True, slots=True)
class UsageHistory:
    """The available credits of an account and a page of the hours in which it used some."""

    account_number: int
    available: Millionths
    windows: list[UsageWindow]
    total: int
    """The number of windows on all pages."""


class Usage:
    """Reads usage by the hour."""

    def __init__(self, accounts: AccountStore, store: TransactionStore, clock: Clock) -> None:
        self._accounts = accounts
        self._store = store
        self._clock = clock

    async def history(self, caller: Caller, account_id: str, offset: int, limit: int) -> UsageHistory:
        """A page of an account's hour windows, newest first. Raises AccountNotFound."""
        caller.require_account(account_id)
        number = await self._accounts.number(caller.tenant_number, account_id)
        state, windows, total = await self._store.windows(number, offset, limit, self._clock())
        return UsageHistory(number, state.available, windows, total)
