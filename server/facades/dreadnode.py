"""Dreadnode's `GET /api/v1/org/{org}/credits/transactions` and `GET /api/v1/org/{org}/credits`."""

from __future__ import annotations

from typing import Any

from daybook.facades.dreadnode.v1.credits_service_pb2 import (
    CreditTransaction,
    GetCreditBalanceRequest,
    GetCreditBalanceResponse,
    ListCreditTransactionsRequest,
    ListCreditTransactionsResponse,
)
from daybook.facades.dreadnode.v1.credits_service_pb2_grpc import CreditsServicer, add_CreditsServicer_to_server
from daybook.v1.transaction_pb2 import Transaction, Usage

from server.facades import Dependencies
from server.ledger import instants, money
from server.ledger.errors import (
    AccountNotFound,
    AccountNotPermitted,
    DaybookError,
    FieldInvalid,
    Unauthenticated,
)
from server.ledger.paging import TransactionFilter
from server.ledger.posting import Kind
from server.transport.auth import current_caller
from server.transport.calls import Context
from server.transport.errors import http_status_of, plain_message
from server.transport.rendered import cache_rendered
from server.transport.rest import echo, number_or_null, read_integer, text_or_null
from server.usecases.accounts import Accounts
from server.usecases.transactions import Transactions
from server.vendors.dreadnode import VENDOR
from server.vendors.vendor import Refusal

TYPES: dict[tuple[Kind, str], str] = {
    (Transaction.GRANT, "purchase"): "purchase",
    (Transaction.GRANT, "auto_refill"): "auto_refill",
    (Transaction.CHARGE, "usage"): "usage",
    (Transaction.CHARGE, "inference"): "inference",
    (Transaction.CHARGE, "span_ingestion"): "span_ingestion",
    (Transaction.CHARGE, "storage"): "storage",
    (Transaction.GRANT, "signup_allocation"): "signup_allocation",
    (Transaction.REFUND, "refund"): "refund",
    # Imports of history post refunds as adjustments: a row of Dreadnode doesn't name the charge.
    (Transaction.ADJUSTMENT, "refund"): "refund",
    (Transaction.ADJUSTMENT, "admin_adjustment"): "admin_adjustment",
    (Transaction.CHARGE, "web_search"): "web_search",
}
"""Dreadnode's type of each kind and category. Other transactions are not listed."""
LIMIT_DEFAULT = 50
LIMIT_MAX = 100


class Credits(CreditsServicer):
    """Lists an organization's transactions, and shows its balance."""

    def __init__(self, transactions: Transactions, accounts: Accounts) -> None:
        self._transactions = transactions
        self._accounts = accounts

    async def ListCreditTransactions(  # type: ignore[override]  # the answer is bytes
        self, request: ListCreditTransactionsRequest, context: Context
    ) -> bytes:
        """Parses, lists the newest transactions, renders."""
        caller = current_caller()
        try:
            criteria, limit = _parse(request)
        except FieldInvalid:
            # An organization that the caller may not read is refused before any parameter.
            await self._transactions.require_account(caller, request.org)
            raise
        # No bound in bytes: this API has no next page, and rendered rows are short.
        page = await self._transactions.list(caller, request.org, criteria, None, limit, bytes_max=None)
        # Concatenated serialized messages are one message with the rows of all.
        return b"".join([_render(row.body) for row in page.rows])

    async def GetCreditBalance(self, request: GetCreditBalanceRequest, context: Context) -> GetCreditBalanceResponse:
        """Gets the balance, renders."""
        state, _ = await self._accounts.balance(current_caller(), request.org)
        balance = state.balance // money.ONE_CREDIT
        return GetCreditBalanceResponse(balance=balance, is_low_balance=balance <= 0, auto_refill_enabled=False)


def add_to_server(server: Any, dependencies: Dependencies) -> None:
    """Adds the servicer."""
    add_CreditsServicer_to_server(Credits(dependencies.transactions, dependencies.accounts), server)


def _parse(request: ListCreditTransactionsRequest) -> tuple[TransactionFilter, int]:
    limit = read_integer(request.limit) if request.HasField("limit") else LIMIT_DEFAULT
    if limit is None:
        raise FieldInvalid("limit", "Input should be a valid integer, unable to parse string as an integer")
    if limit < 1:
        raise FieldInvalid("limit", "Input should be greater than or equal to 1")
    if limit > LIMIT_MAX:
        raise FieldInvalid("limit", f"Input should be less than or equal to {LIMIT_MAX}")
    known_types = tuple(dict.fromkeys(TYPES.values()))
    types = request.transaction_type or known_types
    for name in types:
        if name not in known_types:
            expected = ", ".join(f"'{known}'" for known in known_types)
            raise FieldInvalid("transaction_type", f"Input should be one of {expected}, not '{echo(name)}'")
    criteria = TransactionFilter(
        kind_categories=tuple(pair for pair, name in TYPES.items() if name in types),
        # A row has no status, so a failed transaction would look like a successful one.
        states=(Transaction.SUCCEEDED,),
    )
    return criteria, limit


@cache_rendered
def _render(body: bytes) -> bytes:
    """A response with only this transaction."""
    transaction = Transaction.FromString(body)
    usage = transaction.usage
    shown = CreditTransaction(
        id=transaction.uid,
        amount=money.to_whole_credits(money.parse(transaction.amount)),
        created_at=instants.write(instants.from_timestamp(transaction.create_time)),
        transaction_type=TYPES[transaction.kind, transaction.category],
        has_receipt=bool(transaction.receipt_uri),
        description=text_or_null(transaction.description),
        inference_cost_usd=number_or_null(_cost(usage)),
        input_tokens=number_or_null(usage.input_tokens if usage.HasField("input_tokens") else None),
        output_tokens=number_or_null(usage.output_tokens if usage.HasField("output_tokens") else None),
        model=text_or_null(usage.model),
    )
    return ListCreditTransactionsResponse(transactions=[shown]).SerializeToString()


def _cost(usage: Usage) -> float | None:
    return money.to_number(money.parse(usage.cost_usd)) if usage.HasField("cost_usd") else None


def render_error(error: DaybookError) -> Refusal:
    """Renders an error as the canonical envelope `{code, detail, type}`, with `errors` for a parameter."""
    status, detail = http_status_of(error), plain_message(error)
    more: dict[str, object] = {}
    match error:
        case Unauthenticated():
            detail = "Authentication failed"
        case AccountNotPermitted():
            detail = "Access forbidden"
        case AccountNotFound(metadata={"account": account}):
            detail = f"Organization {account.removeprefix('accounts/')} not found"
        case FieldInvalid():
            status = 422
            place = "path" if error.field == "org" else "query"
            more["errors"] = [{"loc": [place, error.field], "msg": error.problem, "type": "value_error"}]
    return VENDOR.refuse(status, detail, **more)
