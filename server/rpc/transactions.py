"""The methods of daybook.v1.Ledger that are about transactions."""

from __future__ import annotations

from daybook.v1.ledger_service_pb2 import (
    CreateTransactionRequest,
    GetTransactionRequest,
    ListTransactionsRequest,
    ListTransactionsResponse,
)

from server.ledger.names import ALL_ACCOUNTS, parse_account_name, parse_transaction_name
from server.store.transactions import TransactionRow
from server.transport.auth import current_caller
from server.transport.calls import Context
from server.transport.filters import parse_filter, parse_order_by
from server.transport.page_tokens import Listing, PageTokens
from server.transport.validation import read_page_size, read_request, read_transaction
from server.usecases.transactions import Transactions

# The tag of ListTransactionsResponse.transactions: field 1, length-delimited.
_TRANSACTIONS_TAG = b"\x0a"


class TransactionMethods:
    """CreateTransaction, GetTransaction, ListTransactions."""

    _transactions: Transactions
    _page_tokens: PageTokens

    async def CreateTransaction(self, request: CreateTransactionRequest, context: Context) -> bytes:
        """Parses the transaction, posts it, answers with its stored bytes."""
        key = read_request("CreateTransaction", request)
        account_id = parse_account_name("parent", request.parent)
        draft, details = read_transaction(request.transaction)
        return await self._transactions.create(current_caller(), account_id, draft, details, key)

    async def GetTransaction(self, request: GetTransactionRequest, context: Context) -> bytes:
        """Parses the name, answers with the transaction's stored bytes."""
        account_id, uid = parse_transaction_name("name", request.name)
        return await self._transactions.get(current_caller(), account_id, uid)

    async def ListTransactions(self, request: ListTransactionsRequest, context: Context) -> bytes:
        """Opens the page token, lists a page, seals the next token."""
        caller = current_caller()
        account_id = parse_account_name("parent", request.parent, wildcard=True)
        limit = read_page_size(request.page_size)
        wanted = parse_filter(request.filter)
        order = parse_order_by(request.order_by)
        listing = Listing.of("daybook.v1.Ledger/ListTransactions", caller, request, ("page_token", "page_size"))
        after = self._page_tokens.open_transaction(listing, request.page_token)
        page = await self._transactions.list(
            caller, None if account_id == ALL_ACCOUNTS else account_id, wanted, after, limit, order
        )
        token = "" if page.next_key is None else self._page_tokens.seal_transaction(listing, page.next_key)
        return render_page(page.rows, token)


def render_page(rows: list[TransactionRow], next_page_token: str) -> bytes:
    """A ListTransactionsResponse, put together from stored bytes.

    A fast path: each row is its message already, so nothing is parsed or serialized again.
    """
    parts: list[bytes] = []
    for row in rows:
        parts += (_TRANSACTIONS_TAG, _varint(len(row.body)), row.body)
    parts.append(ListTransactionsResponse(next_page_token=next_page_token).SerializeToString())
    return b"".join(parts)


def _varint(number: int) -> bytes:
    """A length as the wire format has it: seven bits a byte, the lowest first."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
