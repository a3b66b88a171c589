"""Page tokens over the wire: a token is valid for the list that returned it, and for no other."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random

import grpc
import pytest
from daybook.facades.teable.v1.billing_service_pb2 import GetSpaceCreditHistoryRequest
from daybook.facades.teable.v1.billing_service_pb2_grpc import BillingStub
from daybook.v1.ledger_service_pb2 import (
    ListAccountsRequest,
    ListAccountsResponse,
    ListTransactionsRequest,
    ListTransactionsResponse,
)
from daybook.v1.transaction_pb2 import Transaction
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.app import serving
from server.book import open_book
from server.config import Settings
from tests.support.callers import Client, Server
from tests.support.clock import Clock
from tests.support.examples import examples
from tests.support.markers import only_sqlite
from tests.support.refusals import refusal_of

INVALID = ("INVALID_ARGUMENT", "PAGE_TOKEN_INVALID")
MISMATCH = ("INVALID_ARGUMENT", "PAGE_TOKEN_MISMATCH")


async def list_transactions(
    client: Client, parent: str = "accounts/a", token: str = "", filter_text: str = "", order_by: str = ""
) -> ListTransactionsResponse:
    """A page of one transaction."""
    return await client.ledger.ListTransactions(
        ListTransactionsRequest(parent=parent, page_size=1, page_token=token, filter=filter_text, order_by=order_by),
        metadata=client.metadata,
    )


async def list_accounts(client: Client, token: str = "") -> ListAccountsResponse:
    """A page of one account."""
    return await client.ledger.ListAccounts(
        ListAccountsRequest(page_size=1, page_token=token), metadata=client.metadata
    )


async def list_credit_history(client: Client, cursor: str = "") -> str:
    """The cursor after a page of one record of Teable's API."""
    page = await BillingStub(client.channel).GetSpaceCreditHistory(
        GetSpaceCreditHistoryRequest(space_id="a", month="2024-10", take="1", cursor=cursor or None),
        metadata=client.metadata,
    )
    return page.next_cursor.string_value


async def fill(client: Client) -> None:
    """Creates two accounts with three charges each."""
    for account_id in ("a", "b"):
        await client.create_account(account_id, credit_limit="100")
        for _ in range(3):
            await client.post(account_id, Transaction.CHARGE, "-1", category="ai_chat")


SOURCES: dict[str, Callable[[Client], Awaitable[str]]] = {}
"""Functions that get a page token, by the name of its list."""


def source(name: str) -> Callable[[Callable[[Client], Awaitable[str]]], Callable[[Client], Awaitable[str]]]:
    """Registers a function in SOURCES."""

    def register(function: Callable[[Client], Awaitable[str]]) -> Callable[[Client], Awaitable[str]]:
        SOURCES[name] = function
        return function

    return register


@source("list")
async def _list(client: Client) -> str:
    return (await list_transactions(client)).next_page_token


@source("other account")
async def _other_account(client: Client) -> str:
    return (await list_transactions(client, "accounts/b")).next_page_token


@source("tenant")
async def _tenant(client: Client) -> str:
    return (await list_transactions(client, "accounts/-")).next_page_token


@source("filter")
async def _filter(client: Client) -> str:
    return (await list_transactions(client, filter_text="kind = CHARGE")).next_page_token


@source("order")
async def _order(client: Client) -> str:
    return (await list_transactions(client, order_by="create_time")).next_page_token


@source("amount")
async def _amount(client: Client) -> str:
    return (await list_transactions(client, order_by="amount desc")).next_page_token


@source("ListAccounts")
async def _list_accounts(client: Client) -> str:
    return (await list_accounts(client)).next_page_token


@source("facade")
async def _facade(client: Client) -> str:
    return await list_credit_history(client)


@pytest.mark.parametrize(
    ("of", "verdict"),
    [
        ("list", None),
        ("other account", MISMATCH),
        ("tenant", MISMATCH),
        ("filter", MISMATCH),
        ("order", MISMATCH),
        ("amount", MISMATCH),
        ("ListAccounts", MISMATCH),
        ("facade", MISMATCH),
    ],
)
@only_sqlite
async def test_token_of_another_list(client: Client, of: str, verdict: tuple[str, str] | None) -> None:
    """ListTransactions accepts its own tokens, and none of another method, parent, filter or order."""
    await fill(client)
    token = await SOURCES[of](client)
    assert token
    if verdict is None:
        assert [each.sequence for each in (await list_transactions(client, token=token)).transactions] == [2]
        return
    refusal = await refusal_of(list_transactions(client, token=token))
    assert refusal.verdict == verdict
    assert refusal.fields == ("page_token",)
    assert refusal.metadata == {"field": "page_token"}


@pytest.mark.parametrize(
    ("of", "verdict"),
    [("ListAccounts", None), ("list", MISMATCH), ("tenant", MISMATCH), ("facade", MISMATCH)],
)
@only_sqlite
async def test_token_in_list_accounts(client: Client, of: str, verdict: tuple[str, str] | None) -> None:
    """ListAccounts accepts its own tokens, and none of another method."""
    await fill(client)
    token = await SOURCES[of](client)
    if verdict is None:
        assert [account.name for account in (await list_accounts(client, token)).accounts] == ["accounts/b"]
        return
    refusal = await refusal_of(list_accounts(client, token))
    assert (*refusal.verdict, *refusal.fields) == (*verdict, "page_token")


@pytest.mark.parametrize(
    ("of", "verdict"), [("facade", None), ("list", MISMATCH), ("filter", MISMATCH), ("ListAccounts", MISMATCH)]
)
@only_sqlite
async def test_token_in_a_facade(client: Client, of: str, verdict: tuple[str, str] | None) -> None:
    """A facade accepts its own cursors, and no native token."""
    await fill(client)
    token = await SOURCES[of](client)
    if verdict is None:
        assert await list_credit_history(client, token) not in ("", token)
        return
    refusal = await refusal_of(list_credit_history(client, token))
    assert (*refusal.verdict, *refusal.fields) == (*verdict, "cursor")


async def test_token_of_another_tenant(server: Server) -> None:
    """A token is refused for another tenant, even if its account has the same id and rows."""
    one = await server.client(await server.create_tenant("one"))
    two = await server.client(await server.create_tenant("two"))
    for client in (one, two):
        await fill(client)
    for read in ("list", "tenant", "ListAccounts"):
        token = await SOURCES[read](one)
        if read == "ListAccounts":
            refusal = await refusal_of(list_accounts(two, token))
        else:
            parent = "accounts/a" if read == "list" else "accounts/-"
            refusal = await refusal_of(list_transactions(two, parent, token))
        assert (*refusal.verdict, *refusal.fields) == (*MISMATCH, "page_token")


async def test_token_of_another_key_of_the_tenant(server: Server) -> None:
    """A token belongs to its tenant, not to the key of the call that returned it."""
    tenant_number = await server.create_tenant("house")
    first, second = await server.client(tenant_number), await server.client(tenant_number)
    await fill(first)
    token = (await list_transactions(first)).next_page_token
    assert [each.sequence for each in (await list_transactions(second, token=token)).transactions] == [2]


async def test_token_survives_a_restart(server: Server, client: Client) -> None:
    """A token is valid in another server process on the same database."""
    await fill(client)
    token = (await list_transactions(client)).next_page_token
    async with (
        serving(server.book, Settings(port=0)) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        page = await list_transactions(Client(channel, client.key), token=token)
    assert [each.sequence for each in page.transactions] == [2]


@only_sqlite
async def test_token_of_another_database(client: Client, tmp_path: Path, clock: Clock) -> None:
    """A token that another ledger sealed with its own key is invalid."""
    await fill(client)
    async with (
        open_book(f"sqlite+aiosqlite:///{tmp_path}/other.db", clock, Random(2).randbytes) as book,
        serving(book, Settings(port=0)) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        other_server = Server(book, channel)
        other = await other_server.client(await other_server.create_tenant("house"))
        await fill(other)
        token = (await list_transactions(other)).next_page_token
    refusal = await refusal_of(list_transactions(client, token=token))
    assert (*refusal.verdict, *refusal.fields) == (*INVALID, "page_token")


def decode(token: str) -> bytes:
    """The sealed bytes of a token."""
    return base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))


def encode(sealed: bytes) -> str:
    """The token of sealed bytes."""
    return base64.urlsafe_b64encode(sealed).decode().rstrip("=")


@only_sqlite
async def test_damaged_token(client: Client) -> None:
    """A token with any bit flipped, truncated anywhere, or spelled differently is refused."""
    await fill(client)
    token = (await list_transactions(client)).next_page_token
    sealed = decode(token)
    assert encode(sealed) == token
    flipped = [
        encode(sealed[:place] + bytes([sealed[place] ^ 1 << place % 8]) + sealed[place + 1 :])
        for place in range(len(sealed))
    ]
    truncated = [token[:length] for length in range(1, len(token))]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    last = alphabet.index(token[-1])
    # If the last character has unused bits, its neighbours decode to the same bytes.
    respelled = [token[:-1] + alphabet[last ^ bit] for bit in (1, 2)]
    spelled_differently = [
        token + "=",
        token + "==",
        token + "\n",
        " " + token,
        token + "A",
        token * 2,
        token.swapcase(),
    ]
    for damaged in (*flipped, *truncated, *respelled, *spelled_differently):
        refusal = await refusal_of(list_transactions(client, token=damaged))
        assert (*refusal.verdict, *refusal.fields) == (*INVALID, "page_token"), damaged
    assert (await list_transactions(client, token=token)).transactions


@only_sqlite
@pytest.mark.parametrize(
    ("token", "verdict"),
    [
        ("x", INVALID),
        ("0", INVALID),
        ("=", INVALID),
        ("null", INVALID),
        ("\0", INVALID),
        ("é" * 40, INVALID),
        ("A" * 16, INVALID),
        ("A" * 38, INVALID),
        ("A" * 1025, INVALID),
        ("A" * 1_000_000, INVALID),
        ("CAESBQ" * 20, INVALID),
    ],
    ids=lambda value: str(value)[:20],
)
async def test_forged_token_is_refused(client: Client, token: str, verdict: tuple[str, str]) -> None:
    """A forged token is refused in every list, and is not echoed."""
    await fill(client)
    for call in (
        list_transactions(client, token=token),
        list_transactions(client, "accounts/-", token=token),
        list_accounts(client, token),
    ):
        refusal = await refusal_of(call)
        assert (*refusal.verdict, *refusal.fields) == (*verdict, "page_token")
        assert len(refusal.message) < 200


@only_sqlite
@settings(max_examples=examples(30), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(token=st.text(min_size=1) | st.binary(min_size=1, max_size=80).map(encode))
async def test_any_text_as_token(client: Client, token: str) -> None:
    """Any text as a page token gets PAGE_TOKEN_INVALID."""
    refusal = await refusal_of(list_accounts(client, token))
    assert (*refusal.verdict, *refusal.fields) == (*INVALID, "page_token")


@only_sqlite
async def test_tokens_reveal_nothing(client: Client) -> None:
    """A token has no id in clear text, and two tokens of the same position differ."""
    for account_id in ("a", "confidential-name", "z"):
        await client.create_account(account_id)
    first = (await list_accounts(client)).next_page_token
    second = (await list_accounts(client, first)).next_page_token
    again = (await list_accounts(client, first)).next_page_token
    assert second != again
    assert b"confidential" not in decode(second)
    assert (await list_accounts(client, second)).accounts == (await list_accounts(client, again)).accounts
