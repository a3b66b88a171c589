"""Imports of history: while one part is being posted, the next is received."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from server.ledger.access import Caller
from server.ledger.errors import DaybookError, of_item
from server.ledger.instants import Instant
from server.posting.commands import Create, Import, ImportOutcome
from server.posting.poster import Poster
from server.store.accounts import AccountStore
from server.usecases.transactions import NewTransaction

PART_ITEMS_MAX = 2000
"""The largest number of items received while a part is being posted; then the import waits for that part."""
PART_BYTES_MAX = 4 * 1024 * 1024
"""The same bound in bytes of messages."""


class PastTransaction(NamedTuple):
    """A transaction of history."""

    transaction: NewTransaction
    create_time: Instant


class HistoryMessage(NamedTuple):
    """A message of an import."""

    items: Sequence[PastTransaction | DaybookError]
    """A refused item is an error, and the last item."""
    byte_count: int


class Imports:
    """Imports history."""

    def __init__(self, accounts: AccountStore, poster: Poster) -> None:
        self._accounts = accounts
        self._poster = poster

    async def import_history(self, caller: Caller, messages: AsyncIterator[HistoryMessage]) -> ImportOutcome:
        """Posts each transaction at its own time, up to the first refused one; returns the totals.

        Raises the refusal, with the item's index over all messages. All items before it are posted.
        """
        running = _RunningImport(self._accounts, self._poster, caller)
        try:
            async for message in messages:
                await running.add(message)
            return await running.finish()
        except DaybookError:
            # The error is about this message. A refusal of an earlier message takes precedence.
            await running.finish()
            raise
        finally:
            await running.close()


class _RunningImport:
    """One import under way: the part that is being posted, and the items that wait for it."""

    def __init__(self, accounts: AccountStore, poster: Poster, caller: Caller) -> None:
        self._accounts = accounts
        self._poster = poster
        self._caller = caller
        self._items: list[PastTransaction | DaybookError] = []
        self._byte_count = 0
        self._posting: asyncio.Task[ImportOutcome] | None = None
        self._total = ImportOutcome(0, 0)

    async def add(self, message: HistoryMessage) -> None:
        """Adds a message. Raises the refusal that ends the import."""
        self._items += message.items
        self._byte_count += message.byte_count
        is_full = len(self._items) >= PART_ITEMS_MAX or self._byte_count >= PART_BYTES_MAX
        if self._posting is None or self._posting.done() or is_full:
            await self._post_part()

    async def finish(self) -> ImportOutcome:
        """The totals, once all items are posted. Raises the refusal that ends the import."""
        await self._post_part()
        await self._settle()
        return self._total

    async def close(self) -> None:
        """Stops waiting for the part that is being posted. The poster still commits a submitted command."""
        if self._posting is not None:
            self._posting.cancel()
            await asyncio.gather(self._posting, return_exceptions=True)

    async def _post_part(self) -> None:
        await self._settle()
        part, self._items, self._byte_count = self._items, [], 0
        if part:
            self._posting = asyncio.create_task(self._post(part))

    async def _settle(self) -> None:
        """Adds the part that is being posted to the totals, once it is on disk."""
        if self._posting is None:
            return
        outcome = await self._posting
        self._posting = None
        imported, skipped = self._total.imported + outcome.imported, self._total.skipped + outcome.skipped
        if outcome.error is not None:
            self._items.clear()
            raise of_item(outcome.error, imported + skipped, "items")
        self._total = ImportOutcome(imported, skipped)

    async def _post(self, part: Sequence[PastTransaction | DaybookError]) -> ImportOutcome:
        items: list[tuple[Create, Instant]] = []
        error: DaybookError | None = None
        for each in part:
            if isinstance(each, DaybookError):
                error = each
                break
            try:
                self._caller.require_account(each.transaction.account_id)
                number = await self._accounts.number(self._caller.tenant_number, each.transaction.account_id)
            except DaybookError as refusal:
                error = refusal
                break
            items.append((Create(number, *each.transaction[1:]), each.create_time))
        imported = skipped = 0
        while imported + skipped < len(items):
            outcome = await self._poster.submit(Import(items[imported + skipped :]))
            imported, skipped = imported + outcome.imported, skipped + outcome.skipped
            if outcome.error is not None:
                return ImportOutcome(imported, skipped, outcome.error)
        return ImportOutcome(imported, skipped, error)
