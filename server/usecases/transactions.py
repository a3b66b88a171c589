"""What can be done with transactions."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import NamedTuple
from uuid import UUID

from daybook.v1.transaction_pb2 import Transaction

from server.ledger.access import Caller
from server.ledger.bodies import join_messages
from server.ledger.errors import DaybookError, FieldInvalid, TransactionNotFound, of_item
from server.ledger.idempotency import Request
from server.ledger.instants import from_timestamp
from server.ledger.money import Millionths
from server.ledger.names import transaction_name
from server.ledger.paging import PAGE_BYTES_MAX, Order, OrderField, Page, TransactionFilter, TransactionKey
from server.ledger.posting import Draft
from server.posting.commands import BatchCreate, Create, Item, Refund, Transfer
from server.posting.poster import Poster
from server.store.accounts import AccountStore
from server.store.transactions import Heads, Refunds, TransactionRow, TransactionStore

NEWEST_FIRST = Order()
HISTORIES_CACHED_MAX = 1024
"""How many first pages of history are kept. Beyond it the one goes that was read first."""
HISTORY_BYTES_MAX = 32_768
"""A longer page is not kept, so that all of them take 32 MiB at most, and 6 as a rule."""


class NewTransaction(NamedTuple):
    """A transaction that a caller wants posted."""

    account_id: str
    draft: Draft
    details: Transaction
    """The fields that posting doesn't decide: description, subject, labels and so on."""
    request: Request
    record_declined: bool = False
    """Whether a charge that lacks credits is kept for the record instead of refused."""


class History(NamedTuple):
    """A page of all of an account's transactions."""

    transactions: bytes
    """A message that has them as its field 1."""
    next_key: TransactionKey | None


class Transactions:
    """Posts, reads and lists transactions."""

    def __init__(self, accounts: AccountStore, store: TransactionStore, poster: Poster) -> None:
        self._accounts = accounts
        self._store = store
        self._poster = poster
        self._histories: dict[tuple[int, bytes, int, bool], History] = {}

    async def create(self, caller: Caller, new: NewTransaction) -> bytes:
        """Posts a transaction; answers with it, serialized, once it is on disk.

        Raises AccountNotFound, RequestIdReused, TooBusy, and what server.ledger.posting
        refuses.
        """
        return await self._poster.submit(Create(await self._item(caller, new)))

    async def create_batch(self, caller: Caller, new: Sequence[NewTransaction], request: Request) -> bytes:
        """Posts all of these or none; answers with a serialized BatchCreateTransactionsResponse.

        Raises what `create` raises, with the index of the transaction.
        """
        items = []
        for index, each in enumerate(new):
            try:
                items.append(await self._item(caller, each))
            except DaybookError as error:
                raise of_item(error, index) from None
        return await self._poster.submit(BatchCreate(items, request))

    async def create_each(self, caller: Caller, new: Sequence[NewTransaction]) -> list[bytes | DaybookError]:
        """Posts each of these by itself; answers with each one's transaction or refusal."""

        async def outcome(item: Item | DaybookError) -> bytes | DaybookError:
            if isinstance(item, DaybookError):
                return item
            try:
                return await self._poster.submit(Create(item))
            except DaybookError as error:
                return error

        items: list[Item | DaybookError] = []
        for each in new:
            try:
                items.append(await self._item(caller, each))
            except DaybookError as error:
                items.append(error)
        # All are queued, in their order, before the first is awaited.
        return list(await asyncio.gather(*(outcome(item) for item in items)))

    async def refund(
        self,
        caller: Caller,
        account_id: str,
        uid: UUID,
        amount: Millionths | None,
        details: Transaction,
        request: Request,
    ) -> bytes:
        """Gives back an amount of a charge, or all that is left; answers with the REFUND.

        Raises AccountNotFound, TransactionNotFound, and what server.ledger.refunds refuses.
        """
        number = await self._number(caller, account_id)
        return await self._poster.submit(Refund(number, account_id, uid, amount, details, request))

    async def transfer(
        self,
        caller: Caller,
        source_id: str,
        destination_id: str,
        amount: Millionths,
        details: Transaction,
        request: Request,
    ) -> bytes:
        """Moves credits; answers with a serialized TransferCreditsResponse.

        The caller must be permitted both accounts, which a credential that is bound to one
        never is. Raises AccountNotFound, InsufficientCredits.
        """
        source = await self._number(caller, source_id)
        destination = await self._number(caller, destination_id)
        return await self._poster.submit(
            Transfer(source, source_id, destination, destination_id, amount, details, request)
        )

    async def get(self, caller: Caller, account_id: str, uid: UUID) -> tuple[bytes, bytes]:
        """A transaction's body and allocations. Raises AccountNotFound, TransactionNotFound."""
        stored = await self._store.get(await self._number(caller, account_id), uid)
        if stored is None:
            raise TransactionNotFound(transaction_name(account_id, uid))
        return stored

    async def refunds(self, listed: Collection[TransactionRow]) -> tuple[Refunds, Heads]:
        """What was given back of listed transactions, and the heads of the accounts of those at that instant."""
        return await self._store.refunds([(row.account_number, row.sequence) for row in listed]) if listed else ({}, {})

    async def _number(self, caller: Caller, account_id: str) -> int:
        caller.require_account(account_id)
        return await self._accounts.number(caller.tenant_number, account_id)

    async def _item(self, caller: Caller, new: NewTransaction) -> Item:
        number = await self._number(caller, new.account_id)
        return Item(number, new.draft, new.details, new.request, new.record_declined)

    async def require_account(self, caller: Caller, account_id: str) -> None:
        """Raises AccountNotPermitted or AccountNotFound unless `list` would find the account."""
        await self._number(caller, account_id)

    async def slice(self, caller: Caller, account_id: str, offset: int, limit: int) -> tuple[list[TransactionRow], int]:
        """Transactions of an account, newest first, behind the `offset` newest; and how many it has in all.

        Both at one instant. Raises AccountNotFound.
        """
        return await self._store.slice(await self._number(caller, account_id), offset, limit)

    async def history(
        self, caller: Caller, account_id: str, after: TransactionKey | None, limit: int, *, descending: bool
    ) -> History:
        """A page of all of an account's transactions in the order of time: what `list` finds, serialized.

        The fast path of the list that is asked for most. Raises AccountNotFound.
        """
        caller.require_account(account_id)
        number = await self._accounts.number(caller.tenant_number, account_id)
        if after is None:
            return await self._first_history(number, limit, descending=descending)
        return _history(
            number, await self._store.bodies(number, after.sequence, limit + 1, descending=descending), limit
        )

    async def _first_history(self, number: int, limit: int, *, descending: bool) -> History:
        """The first page, which callers ask for again and again; nothing but a hash is read if nothing is new.

        The hash of an account's newest transaction stands for all of them, for each is part of
        its successor's. So what was read with a hash is true for as long as that is the newest,
        whoever posts, and also where a database is put back to what it was.
        """
        known = self._histories.get((number, await self._store.head(number), limit, descending))
        if known is not None:
            return known
        head, bodies = await self._store.first_bodies(number, limit + 1, descending=descending)
        history = _history(number, bodies, limit)
        if len(history.transactions) <= HISTORY_BYTES_MAX:
            if len(self._histories) >= HISTORIES_CACHED_MAX:
                del self._histories[next(iter(self._histories))]
            self._histories[number, head, limit, descending] = history
        return history

    async def list(
        self,
        caller: Caller,
        account_id: str | None,
        wanted: TransactionFilter,
        after: TransactionKey | None,
        limit: int,
        order: Order = NEWEST_FIRST,
        *,
        bytes_max: int | None = PAGE_BYTES_MAX,
    ) -> Page[TransactionRow, TransactionKey]:
        """A page of an account's transactions, or of the whole tenant's if it is None.

        It is cut short where its rows take more than `bytes_max`, unless that is None, and
        where the filter made it read as many rows as a page may; it may be empty then and
        have a next one.
        Raises AccountNotFound, and FieldInvalid for an order that no index serves.
        """
        number = None
        if account_id is not None:
            number = await self._number(caller, account_id)
        else:
            caller.require_tenant()
            if order.field is OrderField.AMOUNT:
                raise FieldInvalid("order_by", "must not be by amount for accounts/-")
        rows, until = await self._store.page(caller.tenant_number, number, wanted, order, after, limit + 1)
        page = Page.of(rows, limit, key=lambda row: row.key)
        if page.next_key is None:
            page = Page(page.rows, until)
        if bytes_max is None:
            return page
        return page.within(bytes_max, size=lambda row: len(row.body), key=lambda row: row.key)


def _history(account_number: int, bodies: list[bytes], limit: int) -> History:
    """The page out of `limit` + 1 transactions."""

    def key(body: bytes) -> TransactionKey:
        last = Transaction.FromString(body)
        return TransactionKey(from_timestamp(last.create_time), account_number, last.sequence)

    page = Page.of(bodies, limit, key).within(PAGE_BYTES_MAX, len, key)
    return History(join_messages(page.rows), page.next_key)
