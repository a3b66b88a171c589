"""The servicer of daybook.v1.Admin."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from daybook.v1.admin_service_pb2 import (
    ImportTransactionsRequest,
    ImportTransactionsResponse,
    VerifyLedgerRequest,
    VerifyLedgerResponse,
)
from daybook.v1.admin_service_pb2_grpc import AdminServicer

from server.ledger.access import Caller
from server.ledger.audit import Finding
from server.ledger.errors import DaybookError, FieldInvalid
from server.ledger.instants import from_timestamp
from server.ledger.names import account_name, parse_account_name
from server.rpc.api_keys import ApiKeyMethods
from server.transport.auth import current_caller
from server.transport.calls import Context
from server.transport.page_tokens import PageTokens
from server.transport.validation import Sizes, check_timestamp, read_request, read_transaction
from server.usecases.api_keys import ApiKeys
from server.usecases.commands import ImportOutcome, of_item
from server.usecases.transactions import NewTransaction, PastTransaction, Transactions
from server.usecases.verification import Progress, Verification

ITEMS_AT_ONCE = 25
"""How many items are parsed before others get to run: about half a millisecond."""
PART_ITEMS_MIN = 2000
"""How many items wait while others are being posted, before no more are taken in."""


class Admin(ApiKeyMethods, AdminServicer):
    """ImportTransactions, VerifyLedger, and the methods of API keys."""

    def __init__(
        self,
        transactions: Transactions,
        verification: Verification,
        api_keys: ApiKeys,
        page_tokens: PageTokens,
        sizes: Sizes,
    ) -> None:
        self._transactions = transactions
        self._verification = verification
        self._api_keys = api_keys
        self._page_tokens = page_tokens
        self._sizes = sizes

    async def ImportTransactions(
        self, request_iterator: AsyncIterator[ImportTransactionsRequest], context: Context
    ) -> ImportTransactionsResponse:
        """Parses and imports each message's items; stops at the first that is refused."""
        upload = _Upload(self._transactions, current_caller())
        try:
            async for request in request_iterator:
                _check_length(request, self._sizes.batch_size_max)
                await upload.add(await _parse_items(request.items))
            total = await upload.finish()
        except DaybookError:
            # A message that can't be read comes after those before it.
            await upload.finish()
            raise
        finally:
            upload.cancel()
        return ImportTransactionsResponse(imported_count=total.imported, skipped_count=total.skipped)

    async def VerifyLedger(self, request: VerifyLedgerRequest, context: Context) -> AsyncIterator[VerifyLedgerResponse]:
        """Parses the account, verifies, streams findings and progress."""
        account_id = parse_account_name("account", request.account) if request.account else None
        async for event in self._verification.verify(current_caller(), account_id):
            yield _render(event)


class _Upload:
    """An import under way: while one part of it is being posted, the next comes in."""

    def __init__(self, transactions: Transactions, caller: Caller) -> None:
        self._transactions = transactions
        self._caller = caller
        self._total = ImportOutcome(0, 0)
        self._part: list[PastTransaction | DaybookError] = []
        self._posting: asyncio.Task[ImportOutcome] | None = None

    async def add(self, items: Sequence[PastTransaction | DaybookError]) -> None:
        """Takes items over. Raises the refusal that ended the import."""
        self._part += items
        if self._posting is None or self._posting.done() or len(self._part) >= PART_ITEMS_MIN:
            await self._post_part()

    async def finish(self) -> ImportOutcome:
        """What became of all items, once they are posted. Raises the refusal that ended the import."""
        await self._post_part()
        await self._settle()
        return self._total

    def cancel(self) -> None:
        """Gives up waiting for what is being posted."""
        if self._posting is not None:
            self._posting.cancel()

    async def _post_part(self) -> None:
        await self._settle()
        part, self._part = self._part, []
        if part:
            self._posting = asyncio.create_task(self._transactions.import_history(self._caller, part))

    async def _settle(self) -> None:
        if self._posting is None:
            return
        outcome = await self._posting
        self._posting = None
        imported, skipped = self._total.imported + outcome.imported, self._total.skipped + outcome.skipped
        if outcome.error is not None:
            self._part.clear()
            raise of_item(outcome.error, imported + skipped, "items")
        self._total = ImportOutcome(imported, skipped)


def _check_length(request: ImportTransactionsRequest, items_max: int) -> None:
    if len(request.items) > items_max:
        raise FieldInvalid("items", f"must be at most {items_max} in one message")


async def _parse_items(items: Sequence[ImportTransactionsRequest.Item]) -> list[PastTransaction | DaybookError]:
    """What the items say; the last is an error if one of them is refused.

    Lets others run now and then: a message takes as long to parse as to post.
    """
    history: list[PastTransaction | DaybookError] = []
    for index, item in enumerate(items):
        if index % ITEMS_AT_ONCE == 0:
            await asyncio.sleep(0)
        try:
            history.append(_parse(item))
        except DaybookError as refusal:
            history.append(refusal)
            break
    return history


def _parse(item: ImportTransactionsRequest.Item) -> PastTransaction:
    key = read_request("ImportTransactions", item)
    account_id = parse_account_name("parent", item.parent)
    if not item.HasField("create_time"):
        raise FieldInvalid("create_time", "is required")
    check_timestamp("create_time", item.create_time)
    draft, details = read_transaction(item.transaction)
    return PastTransaction(NewTransaction(account_id, draft, details, key), from_timestamp(item.create_time))


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
