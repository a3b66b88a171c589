"""The facade Paged on each engine: its numbered pages are slices of the account's list."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from daybook.facades.paged.v1.statements_service_pb2 import (
    ListAccountTransactionsRequest,
    ListAccountTransactionsResponse,
)
from daybook.facades.paged.v1.statements_service_pb2_grpc import StatementsStub
from daybook.v1.ledger_service_pb2 import RefundTransactionRequest, TransferCreditsRequest
from daybook.v1.transaction_pb2 import Transaction
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict

from tests.support.callers import Client, credential
from tests.support.clock import Clock
from tests.support.refusals import refusal_of

PATH = "/api/billing/accounts/acme/transactions"


async def page_of(client: Client, page: int, size: int) -> ListAccountTransactionsResponse:
    """A page of the account `acme`."""
    return await StatementsStub(client.channel).ListAccountTransactions(
        ListAccountTransactionsRequest(account="acme", page=str(page), page_size=str(size)), metadata=client.metadata
    )


async def test_every_page_has_its_rows_and_links(client: Client) -> None:
    """Every page of 0 to 5 rows has the count, its rows and its links; a page after the last is refused."""
    await client.create_account("acme")
    newest_first: list[str] = []
    for count in range(6):
        for size in range(1, count + 2):
            last = max(1, (count + size - 1) // size)
            for number in range(1, last + 1):
                page = await page_of(client, number, size)
                assert page.count == count
                assert [row.id for row in page.results] == newest_first[(number - 1) * size : number * size]
                links = MessageToDict(page)
                # A gRPC call has no URL, so the links have no origin.
                assert links["next"] == (f"{PATH}?page_size={size}&page={number + 1}" if number < last else None)
                assert links["previous"] == (f"{PATH}?page_size={size}&page={number - 1}" if number > 1 else None)
            for number in (last + 1, last + 2, 2**63, 10**29):
                refusal = await refusal_of(page_of(client, number, size))
                assert refusal.verdict == ("INVALID_ARGUMENT", "FIELD_INVALID")
                assert refusal.fields == ("page",)
        newest_first.insert(0, (await client.post("acme", Transaction.GRANT, "1")).uid)


async def test_every_kind_and_state_is_shown(client: Client, clock: Clock) -> None:
    """Transactions of every kind and state are listed, as the count, the largest sequence, requires."""
    await client.create_account("acme")
    await client.create_account("other")
    await client.post("acme", Transaction.GRANT, "5.50", description="Top-up")
    clock.advance(0.25)
    charge = await client.post("acme", Transaction.CHARGE, "-2", category="ai_chat")
    await client.ledger.RefundTransaction(
        RefundTransactionRequest(name=charge.name, amount="0.5"), metadata=client.metadata
    )
    for source, destination in (("acme", "other"), ("other", "acme")):
        await client.ledger.TransferCredits(
            TransferCreditsRequest(name=f"accounts/{source}", destination=f"accounts/{destination}", amount="1"),
            metadata=client.metadata,
        )
    await client.post("acme", Transaction.ADJUSTMENT, "-0.000001")
    await client.post("acme", Transaction.CHARGE, "-1000", state=Transaction.FAILED)
    await client.post("acme", Transaction.CHARGE, "-1", state=Transaction.CANCELED)
    page = await page_of(client, 1, 100)
    assert [(row.type, row.status, row.category, row.amount, row.balance) for row in page.results] == [
        ("charge", "canceled", "test", "-1", "3.999999"),
        ("charge", "failed", "test", "-1000", "3.999999"),
        ("adjustment", "succeeded", "test", "-0.000001", "3.999999"),
        ("transfer_in", "succeeded", "transfer", "1", "4"),
        ("transfer_out", "succeeded", "transfer", "-1", "3"),
        ("refund", "succeeded", "refund", "0.5", "4"),
        ("charge", "succeeded", "ai_chat", "-2", "3.5"),
        ("grant", "succeeded", "test", "5.5", "5.5"),
    ]
    assert MessageToDict(page.results[-1])["description"] == "Top-up"
    assert MessageToDict(page.results[-2])["description"] is None
    assert (page.results[-1].created, page.results[-2].created) == (
        "2024-10-10T12:00:00.000000Z",
        "2024-10-10T12:00:00.250000Z",
    )
    assert page.count == 8


async def test_expiration_is_shown(client: Client, clock: Clock) -> None:
    """A posted expiration is listed at its expire_time."""
    await client.create_account("acme")
    await client.post("acme", Transaction.GRANT, "2", ttl=Duration(seconds=60))
    clock.advance(61)
    await client.post("acme", Transaction.GRANT, "1")
    rows = (await page_of(client, 1, 100)).results
    assert [(row.type, row.amount, row.balance, row.created) for row in rows] == [
        ("grant", "1", "1", "2024-10-10T12:01:01.000000Z"),
        ("expiration", "-2", "0", "2024-10-10T12:01:00.000000Z"),
        ("grant", "2", "2", "2024-10-10T12:00:00.000000Z"),
    ]


async def test_count_and_rows_are_one_snapshot(client: Client) -> None:
    """During concurrent postings, the rows of each page match its count."""
    await client.create_account("acme")
    await client.post("acme", Transaction.GRANT, "1")

    async def post() -> None:
        for _ in range(60):
            await client.post("acme", Transaction.GRANT, "1")

    async def read_pages() -> None:
        count = 0
        while count < 61:
            page = await page_of(client, 1, 2)
            assert page.count >= count
            count = int(page.count)
            # Each transaction grants one credit, so its balance equals its sequence.
            assert [int(row.balance) for row in page.results] == list(range(count, max(0, count - 2), -1))

    async with asyncio.TaskGroup() as group:
        for work in (post, *[read_pages] * 4):
            group.create_task(work())


async def test_no_row_is_skipped_during_postings(client: Client) -> None:
    """Every row that existed at the first page is on some page, despite postings between the pages."""
    await client.create_account("acme")
    posted = {(await client.post("acme", Transaction.GRANT, "1")).uid for _ in range(7)}
    found: set[str] = set()
    number, has_next = 1, True
    while has_next:
        page = await page_of(client, number, 2)
        found |= {row.id for row in page.results}
        number, has_next = number + 1, page.next.HasField("string_value")
        if number < 5:
            await client.post("acme", Transaction.GRANT, "1")
    assert posted <= found


def test_grpc_caller_cannot_forge_links(channel: grpc.Channel) -> None:
    """A caller's x-daybook-origin and x-envoy-original-path have no effect on the links."""
    statements: Any = StatementsStub(channel)  # type: ignore[arg-type]  # called without asyncio
    page = statements.ListAccountTransactions(
        ListAccountTransactionsRequest(account="266", page_size="5"),
        metadata=(
            *credential("demo-nebulablock.public"),
            ("x-daybook-origin", "https://evil.example.com"),
            ("x-envoy-original-path", "/evil"),
        ),
    )
    assert page.next.string_value == "/api/billing/accounts/266/transactions?page_size=5&page=2"
