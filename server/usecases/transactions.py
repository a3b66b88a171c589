"""What can be done with transactions."""

from __future__ import annotations

from uuid import UUID

from daybook.v1.transaction_pb2 import Transaction

from server.ledger.access import Caller
from server.ledger.errors import FieldInvalid, TransactionNotFound
from server.ledger.names import transaction_name
from server.ledger.paging import Order, OrderField, Page, TransactionFilter, TransactionKey
from server.ledger.posting import Draft
from server.store import poster
from server.store.accounts import AccountStore
from server.store.poster import Poster
from server.store.requests import Request
from server.store.transactions import TransactionRow, TransactionStore

NEWEST_FIRST = Order()


class Transactions:
    """Posts, reads and lists transactions."""

    def __init__(self, accounts: AccountStore, store: TransactionStore, poster: Poster) -> None:
        self._accounts = accounts
        self._store = store
        self._poster = poster

    async def create(
        self, caller: Caller, account_id: str, draft: Draft, details: Transaction, request: Request
    ) -> bytes:
        """Posts a transaction; answers with it, serialized, once it is on disk.

        Raises AccountNotFound, RequestIdReused, and what server.ledger.posting refuses.
        """
        caller.require_account(account_id)
        return await self._poster.post(poster.Order(caller.tenant_number, account_id, draft, details, request))

    async def get(self, caller: Caller, account_id: str, uid: UUID) -> bytes:
        """One transaction, serialized. Raises AccountNotFound, TransactionNotFound."""
        caller.require_account(account_id)
        number = await self._accounts.number(caller.tenant_number, account_id)
        body = await self._store.get(number, uid)
        if body is None:
            raise TransactionNotFound(transaction_name(account_id, uid))
        return body

    async def require_account(self, caller: Caller, account_id: str) -> None:
        """Raises AccountNotPermitted or AccountNotFound unless `list` would find the account."""
        caller.require_account(account_id)
        await self._accounts.number(caller.tenant_number, account_id)

    async def list(
        self,
        caller: Caller,
        account_id: str | None,
        wanted: TransactionFilter,
        after: TransactionKey | None,
        limit: int,
        order: Order = NEWEST_FIRST,
    ) -> Page[TransactionRow, TransactionKey]:
        """A page of an account's transactions, or of the whole tenant's if it is None.

        Raises AccountNotFound, and FieldInvalid for an order that no index serves.
        """
        number = None
        if account_id is not None:
            caller.require_account(account_id)
            number = await self._accounts.number(caller.tenant_number, account_id)
        else:
            caller.require_tenant()
            if order.field is OrderField.AMOUNT:
                raise FieldInvalid("order_by", "must not be by amount for accounts/-")
        rows = await self._store.page(caller.tenant_number, number, wanted, order, after, limit + 1)
        return Page.of(rows, limit, key=lambda row: row.key)
