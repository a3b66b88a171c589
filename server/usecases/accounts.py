"""The use cases of accounts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from server.ledger.access import Caller
from server.ledger.accounts import AccountRecord
from server.ledger.errors import AccountNotFound, EtagMismatch
from server.ledger.idempotency import Request
from server.ledger.instants import SECOND, Clock, Instant
from server.ledger.lots import Lot
from server.ledger.names import account_name
from server.ledger.paging import PAGE_BYTES_MAX, Page
from server.ledger.posting import AccountState
from server.store.accounts import AccountStore


class Accounts:
    """Creates, reads and updates accounts, and reads their credits."""

    def __init__(self, store: AccountStore, clock: Clock, checked_clock: Clock) -> None:
        """`clock` is for reads; `checked_clock`, which may raise ClockSkewed, for times that are stored."""
        self._store = store
        self._clock = clock
        self._checked_clock = checked_clock

    async def create(
        self, caller: Caller, draft: AccountRecord, request: Request, *, hour_anchor: Instant | None
    ) -> bytes:
        """Creates an account; returns the serialized Account. Raises AccountExists.

        The draft's times are set here. Without an anchor, the account's hours begin at its
        creation; either way they begin at a whole second.
        """
        caller.require_account(draft.id)
        now = self._checked_clock()
        anchor = now if hour_anchor is None else hour_anchor
        record = replace(draft, hour_anchor=anchor - anchor % SECOND, create_time=now, update_time=now)
        return await self._store.create(caller.tenant_number, record, request)

    async def get(self, caller: Caller, account_id: str) -> AccountRecord:
        """One account. Raises AccountNotFound."""
        caller.require_account(account_id)
        return await self._store.get(caller.tenant_number, account_id)

    async def list(self, caller: Caller, after: str | None, limit: int) -> Page[AccountRecord, str]:
        """A page of the tenant's accounts after the id `after`, by ascending id."""
        caller.require_tenant()
        rows = await self._store.page(caller.tenant_number, after, limit + 1)
        page = Page.of(rows, limit, key=lambda row: row.id)
        # Only profiles are counted: the other fields of a page take less than 1.5 MiB.
        return page.within(PAGE_BYTES_MAX, size=lambda row: len(row.profile), key=lambda row: row.id)

    async def update(
        self,
        caller: Caller,
        account_id: str,
        change: Callable[[AccountRecord], AccountRecord],
        request: Request,
        *,
        etag: str = "",
    ) -> bytes:
        """Applies a change; returns the serialized Account.

        Raises AccountNotFound, and EtagMismatch if an etag is given and stale.
        """
        caller.require_account(account_id)
        now = self._checked_clock()

        def checked_change(record: AccountRecord) -> AccountRecord:
            if etag and etag != record.etag:
                raise EtagMismatch(account_name(account_id))
            changed = change(record)
            return record if changed == record else replace(changed, update_time=now)

        return await self._store.update(caller.tenant_number, account_id, checked_change, request)

    async def balance(self, caller: Caller, account_id: str) -> tuple[AccountState, Instant]:
        """The state of an account, without its lots, and the time of the read. Raises AccountNotFound."""
        caller.require_account(account_id)
        now = self._clock()
        found = await self._store.accounts_with_states(caller.tenant_number, [account_id], now)
        if not found:
            raise AccountNotFound(account_name(account_id))
        return found[0].state, now

    async def lots(self, caller: Caller, account_id: str, after: int, limit: int) -> Page[Lot, int]:
        """A page of an account's lots after the number `after`, by number.

        An expired lot has nothing left, whether or not its expiration is posted. Raises AccountNotFound.
        """
        caller.require_account(account_id)
        number = await self._store.number(caller.tenant_number, account_id)
        now = self._clock()
        rows = [
            lot._replace(remaining=0) if lot.terms.have_expired(now) else lot
            for lot in await self._store.lots(number, after, limit + 1)
        ]
        return Page.of(rows, limit, key=lambda row: row.number)
