"""The servicer of daybook.v1.Admin."""

from __future__ import annotations

from collections.abc import AsyncIterator

from daybook.v1.admin_service_pb2 import (
    ImportTransactionsRequest,
    ImportTransactionsResponse,
    VerifyLedgerRequest,
    VerifyLedgerResponse,
)
from daybook.v1.admin_service_pb2_grpc import AdminServicer

from server.ledger.audit import Finding
from server.ledger.errors import DaybookError, FieldInvalid
from server.ledger.instants import Instant, from_timestamp
from server.ledger.names import account_name, parse_account_name
from server.rpc.api_keys import ApiKeyMethods
from server.transport.auth import current_caller
from server.transport.calls import Context
from server.transport.page_tokens import PageTokens
from server.transport.validation import check_timestamp, read_request, read_transaction
from server.usecases.api_keys import ApiKeys
from server.usecases.commands import of_item
from server.usecases.transactions import NewTransaction, Transactions
from server.usecases.verification import Progress, Verification

ITEMS_MAX = 1000


class Admin(ApiKeyMethods, AdminServicer):
    """ImportTransactions, VerifyLedger, and the methods of API keys."""

    def __init__(
        self, transactions: Transactions, verification: Verification, api_keys: ApiKeys, page_tokens: PageTokens
    ) -> None:
        self._transactions = transactions
        self._verification = verification
        self._api_keys = api_keys
        self._page_tokens = page_tokens

    async def ImportTransactions(
        self, request_iterator: AsyncIterator[ImportTransactionsRequest], context: Context
    ) -> ImportTransactionsResponse:
        """Parses and imports each message's items; stops at the first that is refused."""
        caller = current_caller()
        imported = skipped = 0
        async for request in request_iterator:
            if len(request.items) > ITEMS_MAX:
                raise FieldInvalid("items", f"must be at most {ITEMS_MAX} in one message")
            history: list[tuple[NewTransaction, Instant]] = []
            error: DaybookError | None = None
            for item in request.items:
                try:
                    history.append(_parse(item))
                except DaybookError as refusal:
                    error = refusal
                    break
            outcome = await self._transactions.import_history(caller, history)
            imported, skipped = imported + outcome.imported, skipped + outcome.skipped
            refused = outcome.error or error
            if refused is not None:
                raise of_item(refused, imported + skipped, "items")
        return ImportTransactionsResponse(imported_count=imported, skipped_count=skipped)

    async def VerifyLedger(self, request: VerifyLedgerRequest, context: Context) -> AsyncIterator[VerifyLedgerResponse]:
        """Parses the account, verifies, streams findings and progress."""
        account_id = parse_account_name("account", request.account) if request.account else None
        async for event in self._verification.verify(current_caller(), account_id):
            yield _render(event)


def _parse(item: ImportTransactionsRequest.Item) -> tuple[NewTransaction, Instant]:
    key = read_request("ImportTransactions", item)
    account_id = parse_account_name("parent", item.parent)
    if not item.HasField("create_time"):
        raise FieldInvalid("create_time", "is required")
    check_timestamp("create_time", item.create_time)
    draft, details = read_transaction(item.transaction)
    return NewTransaction(account_id, draft, details, key), from_timestamp(item.create_time)


def _render(event: Finding | Progress) -> VerifyLedgerResponse:
    if isinstance(event, Finding):
        return VerifyLedgerResponse(
            finding=VerifyLedgerResponse.Finding(
                account=account_name(event.account_id),
                sequence=event.sequence,
                subject=event.subject,
                expected=event.expected,
                found=event.found,
            )
        )
    return VerifyLedgerResponse(
        progress=VerifyLedgerResponse.Progress(
            account_count=event.accounts,
            transaction_count=event.transactions,
            finding_count=event.findings,
            done=event.is_done,
        )
    )
