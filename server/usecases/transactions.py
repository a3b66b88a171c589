"""The use cases of transactions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple
from uuid import UUID

from daybook.v1.transaction_pb2 import Transaction

from server.ledger.access import Caller
from server.ledger.accounts import AccountWithState
from server.ledger.bodies import label_of
from server.ledger.errors import DaybookError, FieldInvalid, TransactionNotFound, of_item
from server.ledger.idempotency import Request
from server.ledger.instants import Clock
from server.ledger.money import Millionths
from server.ledger.names import transaction_name
from server.ledger.paging import (
    EVERYTHING,
    NEWEST_FIRST,
    PAGE_BYTES_MAX,
    Order,
    OrderField,
    Page,
    TransactionFilter,
    TransactionKey,
    TransactionList,
    TransactionRow,
)
from server.ledger.posting import Draft
from server.ledger.refunds import Refunds
from server.posting.commands import BatchCreate, Create, Refund, Transfer
from server.posting.poster import Poster
from server.store.accounts import AccountStore
from server.store.transactions import TransactionStore

EXPORTED_AT_ONCE = 500
"""The number of rows that an export reads at once, which bounds its memory."""


class NewTransaction(NamedTuple):
    """A transaction to be posted."""

    account_id: str
    draft: Draft
    details: Transaction
    """The fields that posting doesn't decide: description, subject, labels and so on."""
    request: Request
    record_declined: bool = False
    """Whether a charge that lacks credits is recorded, in state FAILED, instead of refused."""


@dataclass(frozen=True, slots=True)
class NetworkPage:
    """A page of the transactions of a tenant, with the companies and the refunds of its rows."""

    page: Page[TransactionRow, TransactionKey]
    company_ids: Sequence[str]
    """The label `company` of each row; empty if it has none."""
    companies: Mapping[str, AccountWithState]
    """The companies that exist as accounts, by id."""
    refunds: Refunds


class Transactions:
    """Posts, reads and lists transactions."""

    def __init__(self, accounts: AccountStore, store: TransactionStore, poster: Poster, clock: Clock) -> None:
        self._accounts = accounts
        self._store = store
        self._poster = poster
        self._clock = clock

    async def create(self, caller: Caller, new: NewTransaction) -> bytes:
        """Posts a transaction; returns it serialized, once it is on disk.

        Raises AccountNotFound, RequestIdReused, TooBusy, and the refusals of
        server.ledger.posting.
        """
        return await self._poster.submit(await self._command(caller, new))

    async def create_batch(self, caller: Caller, new: Sequence[NewTransaction], request: Request) -> bytes:
        """Posts all of these or none; returns a serialized BatchCreateTransactionsResponse.

        Raises the errors of `create`, with the index of the transaction.
        """
        items = []
        for index, each in enumerate(new):
            try:
                items.append(await self._command(caller, each))
            except DaybookError as error:
                raise of_item(error, index) from None
        return await self._poster.submit(BatchCreate(items[0].account_number, items, request))

    async def create_each(
        self, caller: Caller, new: Sequence[NewTransaction | DaybookError]
    ) -> list[bytes | DaybookError]:
        """Posts each item independently, except those refused already; returns each one's transaction or refusal."""

        async def outcome(item: Create | DaybookError) -> bytes | DaybookError:
            if isinstance(item, DaybookError):
                return item
            try:
                return await self._poster.submit(item)
            except DaybookError as error:
                return error

        items: list[Create | DaybookError] = []
        for each in new:
            try:
                items.append(each if isinstance(each, DaybookError) else await self._command(caller, each))
            except DaybookError as error:
                items.append(error)
        # gather() queues all of them, in order, before the first completes.
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
        """Refunds an amount of a charge; None refunds all that is left. Returns the serialized REFUND.

        Raises AccountNotFound, TransactionNotFound, and the refusals of server.ledger.refunds.
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
        """Moves credits; returns a serialized TransferCreditsResponse.

        The caller must have access to both accounts, so a credential that is bound to one account
        never suffices. Raises AccountNotFound, InsufficientCredits.
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

    async def _number(self, caller: Caller, account_id: str) -> int:
        caller.require_account(account_id)
        return await self._accounts.number(caller.tenant_number, account_id)

    async def _command(self, caller: Caller, new: NewTransaction) -> Create:
        return Create(await self._number(caller, new.account_id), *new[1:])

    async def require_account(self, caller: Caller, account_id: str) -> None:
        """Raises AccountNotPermitted or AccountNotFound unless `list` would find the account."""
        await self._number(caller, account_id)

    async def slice(self, caller: Caller, account_id: str, offset: int, limit: int) -> tuple[list[TransactionRow], int]:
        """At most `limit` transactions of an account after the `offset` newest ones, newest first, and their total.

        Both are of one snapshot. Raises AccountNotFound.
        """
        return await self._store.slice(await self._number(caller, account_id), offset, limit)

    async def list(
        self,
        caller: Caller,
        account_id: str | None,
        criteria: TransactionFilter,
        after: TransactionKey | None,
        limit: int,
        order: Order = NEWEST_FIRST,
        *,
        bytes_max: int | None = PAGE_BYTES_MAX,
    ) -> Page[TransactionRow, TransactionKey]:
        """A page of an account's transactions, or of the whole tenant's for the account None.

        The page ends early if its rows exceed `bytes_max`, unless that is None. For a filter that no
        index serves, it also ends after reading a limited number of rows, and may then be empty and
        have a next page. Raises AccountNotFound, and FieldInvalid for an order that no index serves.
        """
        number = await self._listed_number(caller, account_id, order)
        query = TransactionList(caller.tenant_number, number, criteria, order, after, limit, bytes_max)
        return await self._store.list(query)

    async def export(
        self,
        caller: Caller,
        account_id: str | None,
        criteria: TransactionFilter,
        order: Order,
        last: tuple[str, UUID] | None,
    ) -> AsyncGenerator[Sequence[TransactionRow], None]:
        """Yields all rows of a list that exist at the beginning, in parts, which may be empty.

        Begins after the transaction `last`, an account id and a uid. Between two parts it holds no connection and no
        snapshot of the database, so a slow reader costs nothing. Raises the errors of `list`, and TransactionNotFound.
        """
        number = await self._listed_number(caller, account_id, order)
        after = None if last is None else await self._key(caller, *last, order)
        heads = await self._store.heads(caller.tenant_number, number)
        query = TransactionList(caller.tenant_number, number, criteria, order, after, EXPORTED_AT_ONCE)
        # No row that existed is behind this one. Without it, an export might follow new postings without end.
        backwards = replace(order, descending=not order.descending)
        last_page = await self._store.list(replace(query, filter=EVERYTHING, order=backwards, after=None, limit=1))
        while last_page.rows:
            page = await self._store.list(query)
            yield [row for row in page.rows if heads.cover(row)]
            if page.next_key is None or order.reaches(page.next_key, last_page.rows[0].key):
                return
            query = replace(query, after=page.next_key)

    async def _listed_number(self, caller: Caller, account_id: str | None, order: Order) -> int | None:
        """The number of the account to list, or None for the whole tenant."""
        if account_id is not None:
            return await self._number(caller, account_id)
        caller.require_tenant()
        if order.field is OrderField.AMOUNT:
            raise FieldInvalid("order_by", "must not be by amount for accounts/-")
        return None

    async def _key(self, caller: Caller, account_id: str, uid: UUID, order: Order) -> TransactionKey:
        key = await self._store.key(await self._number(caller, account_id), uid, order)
        if key is None:
            raise TransactionNotFound(transaction_name(account_id, uid))
        return key

    async def list_network(
        self, caller: Caller, criteria: TransactionFilter, after: TransactionKey | None, limit: int
    ) -> NetworkPage:
        """A page of the tenant's transactions, with their companies and refunds.

        Companies and refunds are read after the rows, so they may include refunds of later pages.
        """
        page = await self.list(caller, None, criteria, after, limit)
        company_ids = [label_of(row.body, "company") for row in page.rows]
        found = await self._accounts.accounts_with_states(
            caller.tenant_number, set(filter(None, company_ids)), self._clock()
        )
        refunds = await self._store.refunds([(row.account_number, row.sequence) for row in page.rows])
        return NetworkPage(page, company_ids, {each.account.id: each for each in found}, refunds)
