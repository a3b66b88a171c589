"""The servicer of daybook.v1.Admin."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from daybook.v1.admin_service_pb2 import (
    ImportTransactionsRequest,
    ImportTransactionsResponse,
    VerifyAccountsRequest,
    VerifyAccountsResponse,
)
from daybook.v1.admin_service_pb2_grpc import AdminServicer

from server.ledger.audit import Finding
from server.ledger.names import account_name, parse_account_name
from server.rpc.api_keys import ApiKeyMethods
from server.rpc.history import read_messages
from server.transport.auth import current_caller
from server.transport.calls import Context
from server.transport.page_tokens import PageTokens
from server.transport.validation import Sizes
from server.usecases.api_keys import ApiKeys
from server.usecases.imports import Imports
from server.usecases.verification import Progress, Verification


class Admin(ApiKeyMethods, AdminServicer):
    """The servicer of daybook.v1.Admin: imports history, verifies accounts and manages API keys."""

    def __init__(
        self,
        imports: Imports,
        verification: Verification,
        api_keys: ApiKeys,
        page_tokens: PageTokens,
        sizes: Sizes,
    ) -> None:
        self._imports = imports
        self._verification = verification
        self._api_keys = api_keys
        self._page_tokens = page_tokens
        self._sizes = sizes

    async def ImportTransactions(
        self, request_iterator: AsyncIterator[ImportTransactionsRequest], context: Context
    ) -> ImportTransactionsResponse:
        """Parses the messages, imports their items up to the first refused one, renders the totals."""
        async with aclosing(read_messages(request_iterator, self._sizes.batch_size_max)) as messages:
            total = await self._imports.import_history(current_caller(), messages)
        return ImportTransactionsResponse(imported_count=total.imported, skipped_count=total.skipped)

    async def VerifyAccounts(
        self, request: VerifyAccountsRequest, context: Context
    ) -> AsyncGenerator[VerifyAccountsResponse, None]:
        """Parses the account, verifies, streams findings and progress."""
        account_id = parse_account_name("account", request.account) if request.account else None
        async with aclosing(self._verification.verify(current_caller(), account_id)) as events:
            async for event in events:
                yield _render(event)


def _render(event: Finding | Progress) -> VerifyAccountsResponse:
    if isinstance(event, Finding):
        return VerifyAccountsResponse(
            finding=VerifyAccountsResponse.Finding(
                account=account_name(event.account_id),
                sequence=event.sequence,
                subject=event.subject,
                expected=event.expected,
                found=event.found,
            )
        )
    return VerifyAccountsResponse(
        progress=VerifyAccountsResponse.Progress(
            account_count=event.accounts,
            transaction_count=event.transactions,
            finding_count=event.findings,
            done=event.is_done,
        )
    )
