"""Reads the items of an import."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from daybook.v1.admin_service_pb2 import ImportTransactionsRequest

from server.ledger.errors import DaybookError, FieldInvalid
from server.ledger.names import parse_account_name
from server.transport.validation import read_request, read_timestamp, read_transaction
from server.usecases.transactions import NewTransaction, PastTransaction

ITEMS_AT_ONCE = 25
"""How many items are parsed before others get to run: about half a millisecond."""


async def read_items(items: Sequence[ImportTransactionsRequest.Item]) -> list[PastTransaction | DaybookError]:
    """What the items say; the last is an error if one of them is refused.

    Lets others run now and then: a message takes as long to parse as to post.
    """
    history: list[PastTransaction | DaybookError] = []
    for index, item in enumerate(items):
        if index % ITEMS_AT_ONCE == 0:
            await asyncio.sleep(0)
        try:
            history.append(read_item(item))
        except DaybookError as refusal:
            history.append(refusal)
            break
    return history


def read_item(item: ImportTransactionsRequest.Item) -> PastTransaction:
    """What an item says; the item is used up by it. Raises FieldInvalid."""
    key = read_request("ImportTransactions", item)
    account_id = parse_account_name("parent", item.parent)
    if not item.HasField("create_time"):
        raise FieldInvalid("create_time", "is required")
    create_time = read_timestamp("create_time", item.create_time)
    draft, details = read_transaction(item.transaction)
    return PastTransaction(NewTransaction(account_id, draft, details, key), create_time)
