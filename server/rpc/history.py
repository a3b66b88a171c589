"""Parses the messages of an import."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

from daybook.v1.admin_service_pb2 import ImportTransactionsRequest

from server.ledger.errors import DaybookError, FieldInvalid
from server.ledger.names import parse_account_name
from server.transport.validation import identity_of, read_request_id, read_timestamp, read_transaction
from server.usecases.imports import HistoryMessage, PastTransaction
from server.usecases.transactions import NewTransaction

ITEMS_AT_ONCE = 25
"""The number of items parsed before other calls run: about half a millisecond."""


async def read_messages(
    requests: AsyncIterator[ImportTransactionsRequest], items_max: int
) -> AsyncGenerator[HistoryMessage, None]:
    """Yields the parsed messages of an import. Raises FieldInvalid for a message with more than `items_max` items."""
    async for request in requests:
        if len(request.items) > items_max:
            raise FieldInvalid("items", f"must have at most {items_max} entries: send more messages")
        byte_count = request.ByteSize()
        yield HistoryMessage(await _read_items(request.items), byte_count)


async def _read_items(items: Sequence[ImportTransactionsRequest.Item]) -> list[PastTransaction | DaybookError]:
    """The parsed items up to the first refused one, whose error comes last.

    Lets other calls run in between, because parsing takes as long as posting.
    """
    history: list[PastTransaction | DaybookError] = []
    for index, item in enumerate(items):
        if index % ITEMS_AT_ONCE == 0:
            await asyncio.sleep(0)
        try:
            history.append(_read_item(item))
        except DaybookError as refusal:
            history.append(refusal)
            break
    return history


def _read_item(item: ImportTransactionsRequest.Item) -> PastTransaction:
    """Parses an item. Raises FieldInvalid."""
    request_id = read_request_id(item)
    account_id = parse_account_name("parent", item.parent)
    if not item.HasField("create_time"):
        raise FieldInvalid("create_time", "is required")
    create_time = read_timestamp("create_time", item.create_time)
    draft, details = read_transaction(item.transaction)
    key = identity_of("ImportTransactions", item, request_id)
    return PastTransaction(NewTransaction(account_id, draft, details, key), create_time)
