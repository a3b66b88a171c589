"""Daybook's own page-number API: `GET /api/billing/accounts/{account}/transactions`."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from daybook.facades.paged.v1.statements_service_pb2 import (
    AccountTransaction,
    ListAccountTransactionsRequest,
    ListAccountTransactionsResponse,
)
from daybook.facades.paged.v1.statements_service_pb2_grpc import StatementsServicer, add_StatementsServicer_to_server
from daybook.v1.transaction_pb2 import Transaction
from google.protobuf.struct_pb2 import Value

from server.facades import Dependencies
from server.ledger import instants
from server.ledger.errors import DaybookError, FieldInvalid, InvalidArgument
from server.transport.auth import current_caller
from server.transport.call_metadata import call_metadata
from server.transport.calls import Context
from server.transport.errors import http_status_of, plain_message
from server.transport.query_names import TARGET_HEADER
from server.transport.rendered import cache_rendered
from server.transport.rest import null, read_integer, text_or_null
from server.usecases.transactions import Transactions
from server.vendors.paged import VENDOR
from server.vendors.vendor import Refusal

PAGE_SIZE_DEFAULT = 20
PAGE_SIZE_MAX = 100

# Only the gateway can set it.
_ORIGIN_HEADER = "x-daybook-origin"


class Statements(StatementsServicer):
    """Lists an account's transactions by page number."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    async def ListAccountTransactions(  # type: ignore[override]  # the answer is bytes
        self, request: ListAccountTransactionsRequest, context: Context
    ) -> bytes:
        """Parses, gets the page and the total, renders them with links to the next and previous page."""
        caller = current_caller()
        try:
            number, size = _parse(request)
        except FieldInvalid:
            # An account that the caller may not read is refused before any parameter.
            await self._transactions.require_account(caller, request.account)
            raise
        rows, total = await self._transactions.slice(caller, request.account, (number - 1) * size, size)
        last = max(1, -(-total // size))
        if number > last:
            raise FieldInvalid("page", f"the last one is {last}")
        url = _url(request, size)
        rest = ListAccountTransactionsResponse(
            count=total,
            next=null() if number == last else _link(url, number + 1),
            previous=null() if number == 1 else _link(url, number - 1),
        )
        # Concatenated serialized messages are one message with the fields of all.
        return b"".join([rest.SerializeToString(), *(_render(row.body) for row in rows)])


def add_to_server(server: Any, dependencies: Dependencies) -> None:
    """Adds the servicer."""
    add_StatementsServicer_to_server(Statements(dependencies.transactions), server)


def _parse(request: ListAccountTransactionsRequest) -> tuple[int, int]:
    size = read_integer(request.page_size) if request.HasField("page_size") else PAGE_SIZE_DEFAULT
    if size is None or not 1 <= size <= PAGE_SIZE_MAX:
        raise FieldInvalid("page_size", f"must be a number between 1 and {PAGE_SIZE_MAX}")
    number = read_integer(request.page) if request.HasField("page") else 1
    if number is None or number < 1:
        raise FieldInvalid("page", "must be a number from 1")
    return number, size


def _url(request: ListAccountTransactionsRequest, size: int) -> str:
    """The URL of the request. It has no origin for a gRPC caller."""
    metadata = dict(call_metadata.get())
    target = metadata.get(TARGET_HEADER, f"/api/billing/accounts/{request.account}/transactions?page_size={size}")
    return str(metadata.get(_ORIGIN_HEADER, "")) + str(target)


def _link(url: str, number: int) -> Value:
    """The URL with another page. The other parameters keep their order and their escapes."""
    path, _, query = url.partition("?")
    others = [each for each in query.split("&") if each and unquote(each.partition("=")[0]) != "page"]
    return Value(string_value=f"{path}?{'&'.join([*others, f'page={number}'])}")


@cache_rendered
def _render(body: bytes) -> bytes:
    """A response with only this transaction."""
    transaction = Transaction.FromString(body)
    shown = AccountTransaction(
        id=transaction.uid,
        created=instants.write(instants.from_timestamp(transaction.create_time)),
        type=Transaction.Kind.Name(transaction.kind).lower(),
        category=transaction.category,
        status=Transaction.State.Name(transaction.state).lower(),
        amount=transaction.amount,
        balance=transaction.balance_after,
        description=text_or_null(transaction.description),
    )
    return ListAccountTransactionsResponse(results=[shown]).SerializeToString()


def render_error(error: DaybookError) -> Refusal:
    """Renders an error as `{detail}`, with `field` for a parameter. A page that doesn't exist is 404."""
    if not isinstance(error, InvalidArgument):
        return VENDOR.refuse(http_status_of(error), plain_message(error))
    if error.field == "page":
        return VENDOR.refuse(404, f"Invalid page: {error.problem}", field=error.field)
    return VENDOR.refuse(http_status_of(error), plain_message(error), field=error.field)
