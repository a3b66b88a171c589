"""The account methods of daybook.v1.Ledger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from daybook.v1 import transaction_pb2
from daybook.v1.account_pb2 import Account, Balance
from daybook.v1.ledger_service_pb2 import (
    CreateAccountRequest,
    GetAccountRequest,
    GetBalanceRequest,
    ListAccountsRequest,
    ListAccountsResponse,
    ListLotsRequest,
    ListLotsResponse,
    UpdateAccountRequest,
)

from server.ledger import money
from server.ledger.accounts import AccountRecord
from server.ledger.errors import FieldInvalid
from server.ledger.instants import from_timestamp, to_timestamp
from server.ledger.lots import Lot
from server.ledger.names import balance_name, is_account_id, lot_name, parse_account_name, parse_balance_name
from server.transport.auth import current_caller
from server.transport.calls import Context
from server.transport.page_tokens import Listing, PageTokens
from server.transport.validation import (
    Sizes,
    check_account,
    identity_of,
    read_amount,
    read_page_size,
    read_profile,
    read_request_id,
    require_unset_by_caller,
)
from server.usecases.accounts import Accounts

UPDATABLE = ("display_name", "user", "company", "credit_limit")
FIXED = ("number", "kind", "hour_anchor_time", "create_time")
"""Fields that an update may repeat but not change."""


class AccountMethods:
    """The part of the servicer for accounts, their lots and balances."""

    _accounts: Accounts
    _page_tokens: PageTokens
    _sizes: Sizes

    async def CreateAccount(self, request: CreateAccountRequest, context: Context) -> bytes:
        """Parses the account, creates it, returns its stored bytes."""
        request_id = read_request_id(request)
        if not request.account_id:
            raise FieldInvalid("account_id", "is required")
        if not is_account_id(request.account_id):
            raise FieldInvalid(
                "account_id", "must have 1 to 128 letters, digits, _, . and -, the first a letter or a digit"
            )
        account = request.account
        require_unset_by_caller("account", account)
        if account.etag:
            raise FieldInvalid("account.etag", "is only possible in UpdateAccount")
        if not account.kind:
            raise FieldInvalid("account.kind", "is required")
        if account.kind not in Account.Kind.values()[1:]:
            raise FieldInvalid("account.kind", f"must be one of {', '.join(Account.Kind.keys()[1:])}")
        check_account(account)
        hour_anchor = from_timestamp(account.hour_anchor_time) if account.HasField("hour_anchor_time") else None
        draft = AccountRecord(
            id=request.account_id,
            kind=account.kind,
            display_name=account.display_name,
            credit_limit=_read_credit_limit(account.credit_limit),
            profile=read_profile(account),
        )
        key = identity_of("CreateAccount", request, request_id)
        return await self._accounts.create(current_caller(), draft, key, hour_anchor=hour_anchor)

    async def GetAccount(self, request: GetAccountRequest, context: Context) -> Account:
        """Parses the name, gets the account."""
        account_id = parse_account_name("name", request.name)
        return (await self._accounts.get(current_caller(), account_id)).to_message()

    async def ListAccounts(self, request: ListAccountsRequest, context: Context) -> ListAccountsResponse:
        """Opens the page token, lists a page, seals the next token."""
        caller = current_caller()
        limit = read_page_size(request.page_size, self._sizes.page_size_max)
        listing = Listing.of("daybook.v1.Ledger/ListAccounts", caller, request, ("page_token", "page_size"))
        after = self._page_tokens.open(listing, request.page_token, str)
        page = await self._accounts.list(caller, after, limit)
        return ListAccountsResponse(
            accounts=[record.to_message() for record in page.rows],
            next_page_token="" if page.next_key is None else self._page_tokens.seal(listing, page.next_key),
        )

    async def UpdateAccount(self, request: UpdateAccountRequest, context: Context) -> bytes:
        """Parses the mask, updates the account, returns its stored bytes."""
        request_id = read_request_id(request)
        account_id = parse_account_name("account.name", request.account.name)
        check_account(request.account)
        change = _read_change(request)
        key = identity_of("UpdateAccount", request, request_id)
        return await self._accounts.update(current_caller(), account_id, change, key, etag=request.account.etag)

    async def ListLots(self, request: ListLotsRequest, context: Context) -> ListLotsResponse:
        """Opens the page token, lists a page, seals the next token."""
        caller = current_caller()
        account_id = parse_account_name("parent", request.parent)
        limit = read_page_size(request.page_size, self._sizes.page_size_max)
        listing = Listing.of("daybook.v1.Ledger/ListLots", caller, request, ("page_token", "page_size"))
        after = self._page_tokens.open(listing, request.page_token, int) or 0
        page = await self._accounts.lots(caller, account_id, after, limit)
        return ListLotsResponse(
            lots=[_render_lot(account_id, lot) for lot in page.rows],
            next_page_token="" if page.next_key is None else self._page_tokens.seal(listing, page.next_key),
        )

    async def GetBalance(self, request: GetBalanceRequest, context: Context) -> Balance:
        """Parses the name, gets the balance."""
        account_id = parse_balance_name("name", request.name)
        state, as_of = await self._accounts.balance(current_caller(), account_id)
        return Balance(
            name=balance_name(account_id),
            amount=money.write(state.balance),
            expiring_amount=money.write(state.expiring),
            permanent_amount=money.write(state.balance - state.expiring),
            available_amount=money.write(state.available),
            sequence=state.sequence,
            read_time=to_timestamp(as_of),
        )


def _render_lot(account_id: str, lot: Lot) -> transaction_pb2.Lot:
    expire_time = lot.terms.expire_time
    return transaction_pb2.Lot(
        name=lot_name(account_id, lot.number),
        sequence=lot.opened_by,
        amount=money.write(lot.amount),
        remaining_amount=money.write(lot.remaining),
        expire_time=None if expire_time is None else to_timestamp(expire_time),
        priority=lot.terms.priority,
    )


def _read_credit_limit(text: str) -> int:
    limit = read_amount("account.credit_limit", text) if text else 0
    if limit < 0:
        raise FieldInvalid("account.credit_limit", "must not be negative")
    return limit


def _read_change(request: UpdateAccountRequest) -> Callable[[AccountRecord], AccountRecord]:
    """The function that applies the masked fields to an account. Raises FieldInvalid."""
    account = request.account
    paths = set(request.update_mask.paths)
    is_whole = paths in (set(), {"*"})
    if not paths:
        paths = {field.name for field, _ in account.ListFields() if field.name in UPDATABLE}
    elif is_whole:
        paths = set(UPDATABLE)
    for path in paths:
        if path not in UPDATABLE:
            raise FieldInvalid("update_mask", f"must have only {', '.join(UPDATABLE)} or *, not {path[:64]!r}")
    changes: dict[str, object] = {}
    if "display_name" in paths:
        changes["display_name"] = account.display_name
    if "credit_limit" in paths:
        changes["credit_limit"] = _read_credit_limit(account.credit_limit)
    if profile_paths := paths & {"user", "company"}:
        given = account.WhichOneof("profile")
        if given is not None and given not in profile_paths:
            raise FieldInvalid("update_mask", f"must name the profile that is set, {given}")
        profile = read_profile(account)

    def change(record: AccountRecord) -> AccountRecord:
        if is_whole:
            _require_fixed_as_stored(account, record.to_message())
        # A masked but unset profile is cleared (AIP-134), unless the stored profile is of the other kind.
        if profile_paths and (profile or Account.FromString(record.profile).WhichOneof("profile") in profile_paths):
            changes["profile"] = profile
        return replace(record, **changes)  # type: ignore[arg-type]  # each has its field's type

    return change


def _require_fixed_as_stored(given: Account, stored: Account) -> None:
    """Refuses a change of a fixed field. The fields may be sent back as they were read.

    Ignores update_time: the etag detects a concurrent write.
    """
    for field, value in given.ListFields():
        if field.name in FIXED and value != getattr(stored, field.name):
            raise FieldInvalid(f"account.{field.name}", "can't be changed: leave it out, or send the stored value")
