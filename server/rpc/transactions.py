"""The methods of daybook.v1.Ledger that post, get and list transactions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

from daybook.v1.ledger_service_pb2 import (
    TRANSACTION_VIEW_FULL,
    BatchCreateTransactionsRequest,
    CreateTransactionRequest,
    ExportTransactionsRequest,
    ExportTransactionsResponse,
    GetTransactionRequest,
    ListTransactionsRequest,
    ListTransactionsResponse,
    SubmitTransactionsRequest,
    SubmitTransactionsResponse,
    TransactionView,
)
from daybook.v1.transaction_pb2 import Transaction
from google.api.httpbody_pb2 import HttpBody

from server.ledger.bodies import join_messages, with_allocations
from server.ledger.errors import DaybookError, FieldInvalid, of_item
from server.ledger.names import ALL_ACCOUNTS, parse_account_name, parse_transaction_name
from server.ledger.paging import TransactionKey, TransactionRow
from server.rpc.export_files import FORMS, file_parts
from server.transport.auth import current_caller
from server.transport.call_metadata import call_metadata
from server.transport.calls import Context
from server.transport.errors import to_status
from server.transport.filters import parse_filter, parse_order_by
from server.transport.page_tokens import Listing, PageTokens
from server.transport.query_names import TARGET_HEADER
from server.transport.validation import Sizes, identity_of, read_page_size, read_request_id, read_transaction
from server.usecases.transactions import NewTransaction, Transactions

BATCH_BYTES_MAX = 2 * 1024 * 1024
HEAD_HEADER = "x-daybook-head"
"""The metadata of a call whose answer needs only headers. Only the gateway can set it."""


class TransactionMethods:
    """The part of the servicer that posts, reads and exports transactions."""

    _transactions: Transactions
    _page_tokens: PageTokens
    _sizes: Sizes

    async def CreateTransaction(self, request: CreateTransactionRequest, context: Context) -> bytes:
        """Parses the transaction, posts it, returns its stored bytes."""
        return await self._transactions.create(current_caller(), _parse(request))

    async def BatchCreateTransactions(self, request: BatchCreateTransactionsRequest, context: Context) -> bytes:
        """Parses the transactions, posts all or none, returns their stored bytes."""
        request_id = read_request_id(request)
        new = []
        for index, each in enumerate(_batch(request.parent, request.requests, self._sizes.batch_size_max)):
            if each.request_id:
                raise FieldInvalid(f"requests[{index}].request_id", "must be empty: set the request_id of the batch")
            if each.record_declined:
                raise FieldInvalid(f"requests[{index}].record_declined", "is not possible in a batch")
            try:
                new.append(_parse(each))
            except DaybookError as error:
                raise of_item(error, index) from None
        key = identity_of("BatchCreateTransactions", request, request_id)
        return await self._transactions.create_batch(current_caller(), new, key)

    async def SubmitTransactions(
        self, request: SubmitTransactionsRequest, context: Context
    ) -> SubmitTransactionsResponse:
        """Parses the transactions, posts each independently, returns a result for each."""
        new: list[NewTransaction | DaybookError] = []
        for each in _batch(request.parent, request.requests, self._sizes.batch_size_max):
            try:
                new.append(_parse(each))
            except DaybookError as error:
                new.append(error)
        results = await self._transactions.create_each(current_caller(), new)
        return SubmitTransactionsResponse(results=[_render_result(result) for result in results])

    async def GetTransaction(self, request: GetTransactionRequest, context: Context) -> bytes | Transaction:
        """Parses the name, returns the transaction's stored bytes, in the full view with its allocations."""
        account_id, uid = parse_transaction_name("name", request.name)
        if request.view not in TransactionView.values():
            raise FieldInvalid("view", "must be TRANSACTION_VIEW_BASIC or TRANSACTION_VIEW_FULL")
        body, allocations = await self._transactions.get(current_caller(), account_id, uid)
        if request.view == TRANSACTION_VIEW_FULL:
            return with_allocations(account_id, body, allocations)
        return body

    async def ListTransactions(self, request: ListTransactionsRequest, context: Context) -> bytes:
        """Parses the list and its page token, lists a page, seals the next token."""
        caller = current_caller()
        account_id = parse_account_name("parent", request.parent, wildcard=True)
        criteria, order = parse_filter(request.filter), parse_order_by(request.order_by)
        limit = read_page_size(request.page_size, self._sizes.page_size_max)
        listing = Listing.of("daybook.v1.Ledger/ListTransactions", caller, request, ("page_token", "page_size"))
        after = self._page_tokens.open(listing, request.page_token, TransactionKey)
        page = await self._transactions.list(
            caller, None if account_id == ALL_ACCOUNTS else account_id, criteria, after, limit, order
        )
        token = "" if page.next_key is None else self._page_tokens.seal(listing, page.next_key)
        # Concatenated serialized messages are one message with the fields of all.
        rest = ListTransactionsResponse(next_page_token=token).SerializeToString()
        return join_messages([row.body for row in page.rows]) + rest

    async def ExportTransactions(
        self, request: ExportTransactionsRequest, context: Context
    ) -> AsyncGenerator[bytes | ExportTransactionsResponse, None]:
        """Parses the list and its begin, streams the rows as messages or as a file."""
        account_id = parse_account_name("parent", request.parent, wildcard=True)
        criteria, order = parse_filter(request.filter), parse_order_by(request.order_by)
        last = None
        if request.last_transaction:
            last = parse_transaction_name("last_transaction", request.last_transaction)
            if account_id not in (ALL_ACCOUNTS, last[0]):
                raise FieldInvalid("last_transaction", "must belong to parent")
        if request.format not in ExportTransactionsRequest.Format.values():
            raise FieldInvalid("format", "must be NDJSON or CSV")
        if not request.format and TARGET_HEADER in dict(call_metadata.get()):
            raise FieldInvalid("format", "is required over REST: NDJSON or CSV")
        account = None if account_id == ALL_ACCOUNTS else account_id
        export = self._transactions.export(current_caller(), account, criteria, order, last)
        async with aclosing(export) as parts:
            answers = _as_file(request, parts, context) if request.format else _as_messages(parts)
            async with aclosing(answers) as messages:
                async for each in messages:
                    yield each


async def _as_messages(parts: AsyncIterator[Sequence[TransactionRow]]) -> AsyncGenerator[bytes, None]:
    async for rows in parts:
        yield join_messages([row.body for row in rows])


async def _as_file(
    request: ExportTransactionsRequest, parts: AsyncIterator[Sequence[TransactionRow]], context: Context
) -> AsyncGenerator[ExportTransactionsResponse, None]:
    form = FORMS[request.format]
    account_id = parse_account_name("parent", request.parent, wildcard=True)
    stem = "transactions" if account_id == ALL_ACCOUNTS else f"transactions-{account_id}"
    has_headers = False
    async with aclosing(file_parts(form, parts, with_header=not request.last_transaction)) as texts:
        async for text in texts:
            if not has_headers:
                disposition = f'attachment; filename="{stem}.{form.ending}"'
                await context.send_initial_metadata((("content-disposition", disposition),))
                has_headers = True
            yield ExportTransactionsResponse(file=HttpBody(content_type=form.content_type, data=text.encode()))
            if HEAD_HEADER in dict(call_metadata.get()):
                return


def _parse(request: CreateTransactionRequest) -> NewTransaction:
    request_id = read_request_id(request)
    account_id = parse_account_name("parent", request.parent)
    draft, details = read_transaction(request.transaction)
    if request.record_declined and draft.kind != Transaction.CHARGE:
        raise FieldInvalid("record_declined", "is only possible with kind CHARGE")
    key = identity_of("CreateTransaction", request, request_id)
    return NewTransaction(account_id, draft, details, key, request.record_declined)


def _batch(parent: str, requests: Sequence[CreateTransactionRequest], size_max: int) -> list[CreateTransactionRequest]:
    """The requests of a batch, each with its parent."""
    account_id = parse_account_name("parent", parent, wildcard=True)
    if not requests:
        raise FieldInvalid("requests", "is required")
    if len(requests) > size_max:
        raise FieldInvalid("requests", f"must have at most {size_max} entries")
    if sum(each.ByteSize() for each in requests) > BATCH_BYTES_MAX:
        # The response is larger than the request, and must fit into one message.
        raise FieldInvalid("requests", f"must take at most {BATCH_BYTES_MAX} bytes")
    if account_id == ALL_ACCOUNTS:
        return list(requests)
    for index, each in enumerate(requests):
        if each.parent not in ("", parent):
            raise FieldInvalid(f"requests[{index}].parent", "must be empty or the parent of the batch")
    return [_with_parent(parent, each) for each in requests]


def _with_parent(parent: str, request: CreateTransactionRequest) -> CreateTransactionRequest:
    """The request, or a copy with the parent of its batch if it has none."""
    if request.parent:
        return request
    filled = CreateTransactionRequest(parent=parent)
    filled.MergeFrom(request)
    return filled


def _render_result(result: bytes | DaybookError) -> SubmitTransactionsResponse.Result:
    if isinstance(result, DaybookError):
        return SubmitTransactionsResponse.Result(error=to_status(result))
    return SubmitTransactionsResponse.Result(transaction=Transaction.FromString(result))
