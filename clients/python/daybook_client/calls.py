"""The parameters and the result of each method, for both clients: a function makes the call of a method.

Names are resource names of the contracts, such as `accounts/acme`. `timeout` is the deadline of the call in seconds,
over all attempts; None means the client's. A `request_id` is the idempotency key; by default, the client makes one for
the call and keeps it over retries. Pass your own, such as an invoice's number, to repeat a call after a crash.

The clients raise DaybookError, and ValueError or TypeError for a value that can't be sent.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Generic, TypeVar

from daybook.v1 import account_pb2, admin_service_pb2, api_key_pb2, ledger_service_pb2, transaction_pb2
from daybook.v1.ledger_service_pb2 import CreateTransactionRequest, SubmitTransactionsRequest
from google.protobuf.message import Message

from daybook_client.conversion import fill, to_value
from daybook_client.errors import from_status
from daybook_client.values import (
    Account,
    AccountKind,
    Amount,
    ApiKey,
    Balance,
    Company,
    Finding,
    Imported,
    Lot,
    NewApiKey,
    NewTransaction,
    Page,
    PastTransaction,
    Posting,
    Progress,
    Submitted,
    Transaction,
    TransactionView,
    Transfer,
    User,
)

T = TypeVar("T")
R = TypeVar("R")

LEDGER, ADMIN = "daybook.v1.Ledger", "daybook.v1.Admin"
ALL_ACCOUNTS = "accounts/-"
"""The accounts of a tenant, where a list or a batch takes more than one."""
ITEMS_MAX = 1000
"""Maximum number of items of one message of an import."""
ITEMS_BYTES_MAX = 1 << 20
"""Size at which a message of an import is sent, in bytes."""


@dataclass(frozen=True, slots=True)
class Call(Generic[R]):
    """A call of a method, to be made."""

    service: str
    method: str
    request: Message
    response: type[Message]
    read: Callable[[Any], R]
    """Makes the result from a response."""
    timeout: float | None
    is_idempotent: bool = True
    """Whether the call has the same effect if it is made twice."""

    @property
    def path(self) -> str:
        """The path of the method, for gRPC."""
        return f"/{self.service}/{self.method}"

    @property
    def request_id(self) -> str:
        """The idempotency key; empty if the method takes none."""
        return str(getattr(self.request, "request_id", ""))

    def with_request_ids(self, new_request_id: Callable[[], str]) -> Call[R]:
        """Sets each request_id that the method takes and the caller did not give. Returns this call."""
        requests = self.request.requests if isinstance(self.request, SubmitTransactionsRequest) else [self.request]
        for each in requests:
            if "request_id" in each.DESCRIPTOR.fields_by_name and not getattr(each, "request_id", ""):
                fill(each, {"request_id": new_request_id()})
        return self

    def with_page_token(self, page_token: str) -> Call[R]:
        """Returns the call of another page of the list."""
        request = type(self.request)()
        request.CopyFrom(self.request)
        fill(request, {"page_token": page_token})
        return Call(self.service, self.method, request, self.response, self.read, self.timeout)


def describe(method: Any, build: Callable[..., Any]) -> None:
    """Gives a client's method the name, the documentation and the parameters of the function that makes its call."""
    method.__name__, method.__doc__ = build.__name__, build.__doc__
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    method.__signature__ = inspect.Signature([own, *inspect.signature(build).parameters.values()])


def create_account(
    account_id: str,
    kind: AccountKind,
    *,
    display_name: str = "",
    credit_limit: Amount = 0,
    hour_anchor_time: datetime | None = None,
    user: User | None = None,
    company: Company | None = None,
    request_id: str = "",
    timeout: float | None = None,
) -> Call[Account]:
    """Creates an account with a balance of 0. Raises AccountExists if the tenant has an account with this id."""
    request = ledger_service_pb2.CreateAccountRequest(account_id=account_id, request_id=request_id)
    fields = {
        "kind": kind,
        "display_name": display_name,
        "credit_limit": credit_limit,
        "hour_anchor_time": hour_anchor_time,
        "user": user,
        "company": company,
    }
    fill(request.account, fields)
    return Call(LEDGER, "CreateAccount", request, account_pb2.Account, partial(to_value, Account), timeout)


def get_account(name: str, *, timeout: float | None = None) -> Call[Account]:
    """Gets an account. Raises AccountNotFound."""
    request = ledger_service_pb2.GetAccountRequest(name=name)
    return Call(LEDGER, "GetAccount", request, account_pb2.Account, partial(to_value, Account), timeout)


def list_accounts(*, page_size: int = 0, page_token: str = "", timeout: float | None = None) -> Call[Page[Account]]:
    """Lists the accounts of the tenant in ascending order of their ids. The timeout is that of each page."""
    request = ledger_service_pb2.ListAccountsRequest(page_size=page_size, page_token=page_token)
    response = ledger_service_pb2.ListAccountsResponse
    return Call(LEDGER, "ListAccounts", request, response, partial(_page, Account, "accounts"), timeout)


def update_account(
    name: str,
    *,
    display_name: str | None = None,
    credit_limit: Amount | None = None,
    user: User | None = None,
    company: Company | None = None,
    clear: Sequence[str] = (),
    etag: str = "",
    request_id: str = "",
    timeout: float | None = None,
) -> Call[Account]:
    """Updates the given fields of an account; `clear` names fields to empty, such as `company`.

    Raises AccountNotFound, and EtagMismatch if the account has changed since the etag was read.
    """
    request = ledger_service_pb2.UpdateAccountRequest(request_id=request_id)
    fields = {"display_name": display_name, "credit_limit": credit_limit, "user": user, "company": company}
    fill(request.account, {"name": name, "etag": etag, **fields})
    request.update_mask.paths.extend([*(each for each, value in fields.items() if value is not None), *clear])
    return Call(LEDGER, "UpdateAccount", request, account_pb2.Account, partial(to_value, Account), timeout)


def create_transaction(
    account: str,
    transaction: NewTransaction,
    *,
    record_declined: bool = False,
    request_id: str = "",
    timeout: float | None = None,
) -> Call[Transaction]:
    """Posts a grant, a charge or an adjustment.

    With record_declined, a charge that fails for lack of credits is recorded and returned in state FAILED. Raises
    AccountNotFound, InsufficientCredits, BalanceOutOfRange and TooManyLots.
    """
    request = _posting_request(Posting(account, transaction, request_id=request_id, record_declined=record_declined))
    response = transaction_pb2.Transaction
    return Call(LEDGER, "CreateTransaction", request, response, partial(to_value, Transaction), timeout)


def batch_create_transactions(
    postings: Sequence[Posting], *, request_id: str = "", timeout: float | None = None
) -> Call[tuple[Transaction, ...]]:
    """Posts 1 to 1,000 transactions atomically, in their order. The postings take no request_id of their own.

    Raises the error of the first transaction that fails, whose metadata has its `index`.
    """
    request = ledger_service_pb2.BatchCreateTransactionsRequest(
        parent=_common_account(postings), requests=map(_posting_request, postings), request_id=request_id
    )
    response = ledger_service_pb2.BatchCreateTransactionsResponse

    def read(message: ledger_service_pb2.BatchCreateTransactionsResponse) -> tuple[Transaction, ...]:
        return tuple(to_value(Transaction, each) for each in message.transactions)

    return Call(LEDGER, "BatchCreateTransactions", request, response, read, timeout)


def submit_transactions(postings: Sequence[Posting], *, timeout: float | None = None) -> Call[tuple[Submitted, ...]]:
    """Posts 1 to 1,000 transactions, each independently. Returns their outcomes in order."""
    request = ledger_service_pb2.SubmitTransactionsRequest(
        parent=_common_account(postings), requests=map(_posting_request, postings)
    )
    response = ledger_service_pb2.SubmitTransactionsResponse

    def read(message: ledger_service_pb2.SubmitTransactionsResponse) -> tuple[Submitted, ...]:
        return tuple(
            Submitted(
                transaction=to_value(Transaction, each.transaction) if each.HasField("transaction") else None,
                error=from_status(each.error, posting.request_id) if each.HasField("error") else None,
            )
            for posting, each in zip(request.requests, message.results, strict=True)
        )

    return Call(LEDGER, "SubmitTransactions", request, response, read, timeout)


def refund_transaction(
    name: str,
    amount: Amount | None = None,
    *,
    description: str = "",
    creator: User | None = None,
    metadata: Mapping[str, Any] | None = None,
    request_id: str = "",
    timeout: float | None = None,
) -> Call[Transaction]:
    """Refunds a charge: an amount above 0 or, without one, the rest of the charge.

    Raises TransactionNotFound, NotRefundable and RefundExceedsCharge.
    """
    request = ledger_service_pb2.RefundTransactionRequest(name=name, request_id=request_id)
    fill(request, {"amount": amount, "description": description, "creator": creator, "metadata": metadata})
    response = transaction_pb2.Transaction
    return Call(LEDGER, "RefundTransaction", request, response, partial(to_value, Transaction), timeout)


def transfer_credits(
    source: str,
    destination: str,
    amount: Amount,
    *,
    description: str = "",
    creator: User | None = None,
    labels: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    request_id: str = "",
    timeout: float | None = None,
) -> Call[Transfer]:
    """Moves credits atomically from one account to another; the amount is above 0.

    Raises AccountNotFound, InsufficientCredits and TooManyLots.
    """
    request = ledger_service_pb2.TransferCreditsRequest(name=source, destination=destination, request_id=request_id)
    fields = {"amount": amount, "description": description, "creator": creator}
    fill(request, {**fields, "labels": labels, "metadata": metadata})
    response = ledger_service_pb2.TransferCreditsResponse
    return Call(LEDGER, "TransferCredits", request, response, partial(to_value, Transfer), timeout)


def get_transaction(
    name: str, *, view: TransactionView = TransactionView.BASIC, timeout: float | None = None
) -> Call[Transaction]:
    """Gets a transaction. Raises TransactionNotFound."""
    request = ledger_service_pb2.GetTransactionRequest(name=name)
    fill(request, {"view": view})
    response = transaction_pb2.Transaction
    return Call(LEDGER, "GetTransaction", request, response, partial(to_value, Transaction), timeout)


def list_transactions(
    account: str = ALL_ACCOUNTS,
    *,
    filter: str = "",  # noqa: A002  # the name of the contract
    order_by: str = "",
    page_size: int = 0,
    page_token: str = "",
    timeout: float | None = None,
) -> Call[Page[Transaction]]:
    """Lists the transactions of an account or of the tenant, newest first unless order_by says otherwise.

    The filter is like `kind = CHARGE AND create_time >= "2024-10-01T00:00:00Z"`; order_by is `create_time` or
    `amount`, optionally with ` desc`. The timeout is that of each page.
    """
    request = ledger_service_pb2.ListTransactionsRequest(
        parent=account, filter=filter, order_by=order_by, page_size=page_size, page_token=page_token
    )
    response = ledger_service_pb2.ListTransactionsResponse
    return Call(LEDGER, "ListTransactions", request, response, partial(_page, Transaction, "transactions"), timeout)


def list_lots(
    account: str, *, page_size: int = 0, page_token: str = "", timeout: float | None = None
) -> Call[Page[Lot]]:
    """Lists the lots of an account in the order of their opening. The timeout is that of each page."""
    request = ledger_service_pb2.ListLotsRequest(parent=account, page_size=page_size, page_token=page_token)
    return Call(LEDGER, "ListLots", request, ledger_service_pb2.ListLotsResponse, partial(_page, Lot, "lots"), timeout)


def get_balance(account: str, *, timeout: float | None = None) -> Call[Balance]:
    """Gets the current balance of an account, `accounts/{account}`. Raises AccountNotFound."""
    request = ledger_service_pb2.GetBalanceRequest(name=f"{account}/balance")
    return Call(LEDGER, "GetBalance", request, account_pb2.Balance, partial(to_value, Balance), timeout)


def export_transactions(
    account: str = ALL_ACCOUNTS,
    *,
    filter: str = "",  # noqa: A002  # the name of the contract
    order_by: str = "",
    last_transaction: str = "",
    timeout: float | None = None,
) -> Call[list[Transaction]]:
    """Yields the transactions of an account or of the tenant, of one snapshot, with the filter and order of a list.

    After an error, pass the name of the last transaction received as `last_transaction`: the export goes on after it,
    with a snapshot of its own. Raises AccountNotFound and TransactionNotFound.
    """
    request = ledger_service_pb2.ExportTransactionsRequest(
        parent=account, filter=filter, order_by=order_by, last_transaction=last_transaction
    )
    response = ledger_service_pb2.ExportTransactionsResponse

    def read(message: ledger_service_pb2.ExportTransactionsResponse) -> list[Transaction]:
        return [to_value(Transaction, each) for each in message.transactions]

    return Call(LEDGER, "ExportTransactions", request, response, read, timeout)


def verify_accounts(account: str = "", *, timeout: float | None = None) -> Call[list[Finding | Progress]]:
    """Recomputes one account, or all of the tenant, and yields each difference and, at intervals, the progress."""
    request = admin_service_pb2.VerifyAccountsRequest(account=account)

    def read(message: admin_service_pb2.VerifyAccountsResponse) -> list[Finding | Progress]:
        if message.HasField("finding"):
            return [to_value(Finding, message.finding)]
        return [to_value(Progress, message.progress)]

    return Call(ADMIN, "VerifyAccounts", request, admin_service_pb2.VerifyAccountsResponse, read, timeout)


def create_api_key(
    scopes: Sequence[str],
    *,
    display_name: str = "",
    account: str = "",
    expire_time: datetime | None = None,
    ttl: timedelta | None = None,
    timeout: float | None = None,
) -> Call[NewApiKey]:
    """Creates an API key with scopes such as `transactions`, bound to one account if one is given.

    Only a call that had no effect is retried. After a lost response, revoke the unused key. Raises AccountNotFound and
    ScopeMissing.
    """
    request = admin_service_pb2.CreateApiKeyRequest()
    fields = {"scopes": scopes, "display_name": display_name, "account": account}
    fill(request.api_key, {**fields, "expire_time": expire_time, "ttl": ttl})
    read = partial(to_value, NewApiKey)
    return Call(ADMIN, "CreateApiKey", request, admin_service_pb2.CreateApiKeyResponse, read, timeout, False)


def list_api_keys(*, page_size: int = 0, page_token: str = "", timeout: float | None = None) -> Call[Page[ApiKey]]:
    """Lists the API keys of the tenant, newest first. The timeout is that of each page."""
    request = admin_service_pb2.ListApiKeysRequest(page_size=page_size, page_token=page_token)
    response = admin_service_pb2.ListApiKeysResponse
    return Call(ADMIN, "ListApiKeys", request, response, partial(_page, ApiKey, "api_keys"), timeout)


def revoke_api_key(name: str, *, timeout: float | None = None) -> Call[ApiKey]:
    """Revokes an API key permanently. Raises ApiKeyNotFound."""
    request = admin_service_pb2.RevokeApiKeyRequest(name=name)
    return Call(ADMIN, "RevokeApiKey", request, api_key_pb2.ApiKey, partial(to_value, ApiKey), timeout)


def rotate_api_key(
    name: str, *, grace_period: timedelta | None = None, timeout: float | None = None
) -> Call[NewApiKey]:
    """Replaces the secret of an API key; the old one stays valid for the grace period.

    Only a call that had no effect is retried. After a lost response, rotate the key again. Raises ApiKeyNotFound and
    ApiKeyInactive.
    """
    request = admin_service_pb2.RotateApiKeyRequest(name=name)
    fill(request, {"grace_period": grace_period})
    read = partial(to_value, NewApiKey)
    return Call(ADMIN, "RotateApiKey", request, admin_service_pb2.RotateApiKeyResponse, read, timeout, False)


IMPORT_PATH = f"/{ADMIN}/ImportTransactions"
to_imported = partial(to_value, Imported)


class ImportMessages:
    """Gathers the items of an import into messages."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._request = admin_service_pb2.ImportTransactionsRequest()
        self._bytes = 0

    def add(self, past: PastTransaction) -> admin_service_pb2.ImportTransactionsRequest | None:
        """Adds an item. Returns a message if it is full."""
        item = self._request.items.add()
        fields = {"parent": past.account, "transaction": past.transaction}
        fill(item, {**fields, "create_time": past.create_time, "request_id": past.request_id})
        self._bytes += item.ByteSize()
        is_full = len(self._request.items) == ITEMS_MAX or self._bytes >= ITEMS_BYTES_MAX
        return self.rest() if is_full else None

    def rest(self) -> admin_service_pb2.ImportTransactionsRequest | None:
        """Returns a message with the items that were not yet returned, if there are any."""
        request = self._request
        self._begin()
        return request if request.items else None


def import_messages(items: Iterable[PastTransaction]) -> Iterator[admin_service_pb2.ImportTransactionsRequest]:
    """The messages of an import."""
    messages = ImportMessages()
    for item in items:
        if (full := messages.add(item)) is not None:
            yield full
    if (rest := messages.rest()) is not None:
        yield rest


def _posting_request(posting: Posting) -> CreateTransactionRequest:
    request = CreateTransactionRequest(
        parent=posting.account, request_id=posting.request_id, record_declined=posting.record_declined
    )
    fill(request, {"transaction": posting.transaction})
    return request


def _common_account(postings: Sequence[Posting]) -> str:
    accounts = {each.account for each in postings}
    return accounts.pop() if len(accounts) == 1 else ALL_ACCOUNTS


def _page(kind: type[T], name: str, message: Any) -> Page[T]:
    items = tuple(to_value(kind, each) for each in getattr(message, name))
    return Page(items=items, next_page_token=message.next_page_token, message=message)
