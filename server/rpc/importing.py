"""An import under way: while one part of it is being posted, the next comes in."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from daybook.v1.admin_service_pb2 import ImportTransactionsRequest

from server.ledger.access import Caller
from server.ledger.errors import DaybookError
from server.ledger.names import parse_account_name
from server.rpc.history import read_items
from server.rpc.preparing import PreparingProcesses
from server.store.unit import Known, Prepared
from server.usecases.commands import ImportOutcome, of_item
from server.usecases.transactions import PastTransaction, Transactions

PART_ITEMS_MIN = 8000
"""How many items wait while others are being posted, before no more are taken in."""
PART_BYTES_MIN = 4 * 1024 * 1024
"""The same in bytes of their messages."""
PREPARED_ITEMS_MIN = 2000
"""After how many items an import is worth processes that prepare the rest."""
ACCOUNTS_KNOWN_MAX = 20_000
"""Of how many accounts these know the states at most, before they begin anew."""
PAUSE_MESSAGES_MAX = 64
"""How many messages are not prepared, at most, after one that was prepared in vain."""


class _Piece(NamedTuple):
    """A message of the import: read by this process, or being prepared by the others."""

    request: ImportTransactionsRequest
    byte_count: int
    history: Sequence[PastTransaction | DaybookError] | None
    prepared: asyncio.Future[list[Prepared | None]] | None

    async def as_prepared(self) -> Prepared | None:
        """The message as it was prepared; None if all of it was not."""
        shares = [share for share in await self.prepared if share is not None] if self.prepared is not None else []
        # None of them takes what is of accounts that it doesn't know.
        if not shares or sum(share.item_count for share in shares) < len(self.request.items):
            return None
        return Prepared.together(shares)


class Upload:
    """An import under way."""

    def __init__(self, transactions: Transactions, caller: Caller, processes: PreparingProcesses) -> None:
        self._transactions = transactions
        self._caller = caller
        self._total = ImportOutcome(0, 0)
        self._part: list[_Piece] = []
        self._posting: asyncio.Task[ImportOutcome] | None = None
        self._item_count = 0
        self._ahead = _Ahead(processes)

    async def add(self, request: ImportTransactionsRequest) -> None:
        """Takes a message over. Raises the refusal that ended the import."""
        # Before it is read, which uses it up.
        byte_count = request.ByteSize()
        prepared = await self._prepare(request)
        history = None
        if prepared is None:
            self._ahead.begin_anew()
            history = await read_items(request.items)
        self._item_count += len(request.items)
        self._part.append(_Piece(request, byte_count, history, prepared))
        if self._posting is None or self._posting.done() or self._is_full():
            await self._post_part()

    async def finish(self) -> ImportOutcome:
        """What became of all items, once they are posted. Raises the refusal that ended the import."""
        await self._post_part()
        await self._settle()
        return self._total

    async def close(self) -> None:
        """Stops waiting for the part that is being posted; the poster still commits what it has begun."""
        self._ahead.close()
        if self._posting is not None:
            self._posting.cancel()
            await asyncio.gather(self._posting, return_exceptions=True)

    async def _prepare(self, request: ImportTransactionsRequest) -> asyncio.Future[list[Prepared | None]] | None:
        """The message as it will have been prepared; None if it had better be read here."""
        if self._item_count < PREPARED_ITEMS_MIN or not self._ahead.is_possible():
            return None
        try:
            account_ids = {parse_account_name("parent", name) for name in {item.parent for item in request.items}}
        except DaybookError:
            return None
        unknown = self._ahead.unknown(account_ids)
        if unknown and self._ahead.is_first:
            # What is posted unprepared changes these accounts.
            await self._post_part()
            await self._settle()
        try:
            known = await self._transactions.known(self._caller, unknown) if unknown else Known({}, {})
        except DaybookError:
            return None
        return self._ahead.prepare(request, known)

    def _is_full(self) -> bool:
        return (
            sum(len(piece.request.items) for piece in self._part) >= PART_ITEMS_MIN
            or sum(piece.byte_count for piece in self._part) >= PART_BYTES_MIN
        )

    async def _post_part(self) -> None:
        await self._settle()
        part, self._part = self._part, []
        if part:
            self._posting = asyncio.create_task(self._post(part))

    async def _post(self, pieces: Sequence[_Piece]) -> ImportOutcome:
        parts: list[Prepared] = []
        for piece in pieces:
            prepared = await piece.as_prepared()
            if prepared is None:
                break
            parts.append(prepared)
        taken = await self._transactions.import_prepared(parts) if parts else 0
        imported = sum(part.item_count for part in parts[:taken])
        rest = pieces[taken:]
        self._ahead.note(len(rest) if rest and rest[0].prepared is not None else 0)
        if not rest:
            return ImportOutcome(imported, 0)
        history: list[PastTransaction | DaybookError] = []
        for piece in rest:
            history += await read_items(piece.request.items) if piece.history is None else piece.history
        outcome = await self._transactions.import_history(self._caller, history)
        return ImportOutcome(imported + outcome.imported, outcome.skipped, outcome.error)

    async def _settle(self) -> None:
        if self._posting is None:
            return
        outcome = await self._posting
        self._posting = None
        imported, skipped = self._total.imported + outcome.imported, self._total.skipped + outcome.skipped
        if outcome.error is not None:
            self._part.clear()
            raise of_item(outcome.error, imported + skipped, "items")
        self._total = ImportOutcome(imported, skipped)


class _Ahead:
    """What the processes that prepare have of this import."""

    def __init__(self, processes: PreparingProcesses) -> None:
        self._processes = processes
        self._has_processes = False
        self._known: set[str] = set()
        self.is_first = True
        """Whether it knows nothing of any account."""
        self._pause = 0
        self._next_pause = 1

    def is_possible(self) -> bool:
        """Whether the next message can be prepared, and has a chance of being posted so."""
        self._has_processes = self._has_processes or self._processes.take()
        if self._pause:
            self._pause -= 1
            return False
        return self._has_processes and self._processes.are_ready

    def unknown(self, account_ids: set[str]) -> set[str]:
        """Those of the accounts that it is to be told of."""
        if len(self._known | account_ids) > ACCOUNTS_KNOWN_MAX:
            self.begin_anew()
        return account_ids - self._known

    def prepare(self, request: ImportTransactionsRequest, known: Known) -> asyncio.Future[list[Prepared | None]]:
        """Has the message prepared, with what is to be known beside all that is."""
        prepared = self._processes.prepare(request.SerializeToString(), known, is_first=self.is_first)
        self._known.update(stored.state.account_id for stored in known.states.values())
        self.is_first = False
        return prepared

    def note(self, vain_count: int) -> None:
        """So many messages were prepared in vain: others post to these accounts, or all was imported before."""
        if not vain_count:
            self._next_pause = 1
            return
        self.begin_anew()
        self._pause = self._next_pause
        self._next_pause = min(2 * self._next_pause, PAUSE_MESSAGES_MAX)

    def begin_anew(self) -> None:
        """Lets it forget everything, for it is not true any more."""
        self._known.clear()
        self.is_first = True

    def close(self) -> None:
        """Lets others have the processes."""
        if self._has_processes:
            self._processes.give_back()
