"""The methods of daybook.v1.Ledger for refunds and transfers."""

from __future__ import annotations

from daybook.v1.ledger_service_pb2 import RefundTransactionRequest, TransferCreditsRequest
from daybook.v1.transaction_pb2 import Transaction
from google.protobuf.message import Message

from server.ledger.errors import FieldInvalid
from server.ledger.names import parse_account_name, parse_transaction_name
from server.transport.auth import current_caller
from server.transport.calls import Context
from server.transport.validation import DETAILS, identity_of, read_details, read_positive_amount, read_request_id
from server.usecases.transactions import Transactions


class RefundAndTransferMethods:
    """The part of the servicer for refunds and transfers."""

    _transactions: Transactions

    async def RefundTransaction(self, request: RefundTransactionRequest, context: Context) -> bytes:
        """Parses name and amount, refunds, returns the refund's stored bytes."""
        request_id = read_request_id(request)
        account_id, uid = parse_transaction_name("name", request.name)
        amount = read_positive_amount("amount", request.amount) if request.amount else None
        details = _read_details(request)
        key = identity_of("RefundTransaction", request, request_id)
        return await self._transactions.refund(current_caller(), account_id, uid, amount, details, key)

    async def TransferCredits(self, request: TransferCreditsRequest, context: Context) -> bytes:
        """Parses both names and the amount, transfers, returns both transactions."""
        request_id = read_request_id(request)
        source = parse_account_name("name", request.name)
        destination = parse_account_name("destination", request.destination)
        if source == destination:
            raise FieldInvalid("destination", "must not be the same account as name")
        amount = read_positive_amount("amount", request.amount)
        details = _read_details(request)
        key = identity_of("TransferCredits", request, request_id)
        return await self._transactions.transfer(current_caller(), source, destination, amount, details, key)


def _read_details(request: Message) -> Transaction:
    """A transaction with the fields of the request that posting stores unchanged."""
    given = {field.name: value for field, value in request.ListFields() if field.name in DETAILS}
    return read_details("", Transaction(**given))
