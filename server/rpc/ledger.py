"""The servicer of daybook.v1.Ledger."""

from __future__ import annotations

from daybook.v1.ledger_service_pb2_grpc import LedgerServicer

from server.rpc.accounts import AccountMethods
from server.rpc.refunds_and_transfers import RefundAndTransferMethods
from server.rpc.transactions import TransactionMethods
from server.transport.page_tokens import PageTokens
from server.transport.validation import Sizes
from server.usecases.accounts import Accounts
from server.usecases.transactions import Transactions


class Ledger(AccountMethods, TransactionMethods, RefundAndTransferMethods, LedgerServicer):  # type: ignore[misc]  # answers may be bytes
    """The servicer, composed of one class for each resource."""

    def __init__(self, accounts: Accounts, transactions: Transactions, page_tokens: PageTokens, sizes: Sizes) -> None:
        self._accounts = accounts
        self._transactions = transactions
        self._page_tokens = page_tokens
        self._sizes = sizes
