"""Access tokens over the wire: an unreachable issuer, rate limits of subjects, and lists across tokens."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from daybook.v1.ledger_service_pb2 import ListAccountsRequest, ListTransactionsRequest

from server.app import serving
from server.book import Book
from server.config import CannotStart, Settings
from server.ledger.instants import SECOND
from tests.support.blocks import blocks
from tests.support.callers import Client, Server
from tests.support.clock import NOON
from tests.support.identity_provider import AUDIENCE, NAME, Endpoint, claims_at, ec_key, jwk_set, rsa_key
from tests.support.markers import only_sqlite
from tests.support.refusals import refusal_of

pytestmark = only_sqlite

KEY = ec_key()


@asynccontextmanager
async def serving_tokens(book: Book, jwks: str, **settings: object) -> AsyncIterator[Server]:
    """Serves the book with the issuer's access tokens accepted."""
    oauth2 = {"oauth2_issuer": NAME, "oauth2_audience": AUDIENCE, **settings, "oauth2_jwks": jwks}
    async with (
        serving(book, Settings(port=0, shutdown_grace_seconds=1, **oauth2)) as port,  # type: ignore[arg-type]
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield Server(book, channel)


def holder(server: Server, **claims: object) -> Client:
    """A caller with a token of the tenant `house` that may read accounts, unless `claims` override it."""
    given = {"scope": "accounts.readonly", **claims}
    return Client(server.channel, KEY.token(claims_at(NOON // SECOND, **given)))


async def test_tokens_of_an_unreachable_issuer_are_unavailable(book: Book) -> None:
    """While the issuer is unreachable its tokens get UNAVAILABLE, API keys work, and unsigned tokens are invalid."""
    with Endpoint().serving() as endpoint:
        endpoint.reset(jwk_set(KEY))
        endpoint.status = 503
        async with serving_tokens(book, endpoint.url) as server:
            house = await server.client(await server.create_tenant("house"))
            caller = holder(server)
            refusal = await refusal_of(caller.ledger.ListAccounts(ListAccountsRequest(), metadata=caller.metadata))
            assert refusal.verdict == ("UNAVAILABLE", "SERVICE_UNAVAILABLE")
            assert refusal.message == "the service is unavailable; try again later"
            await house.ledger.ListAccounts(ListAccountsRequest(), metadata=house.metadata)
            other = Client(server.channel, KEY.token({}, alg="none"))
            refusal = await refusal_of(other.ledger.ListAccounts(ListAccountsRequest(), metadata=other.metadata))
            assert refusal.verdict == ("UNAUTHENTICATED", "CREDENTIAL_INVALID")
            assert endpoint.count == 1


async def test_each_subject_has_its_own_rate_limit(book: Book, tmp_path: Path) -> None:
    """All tokens of one subject share a rate limit; other subjects and API keys don't."""
    (tmp_path / "jwks.json").write_bytes(jwk_set(KEY))
    limits = {"rate_limit_calls_per_second": 0.001, "rate_limit_burst": 2}
    async with serving_tokens(book, str(tmp_path / "jwks.json"), **limits) as server:
        house = await server.client(await server.create_tenant("house"))
        for caller in (holder(server), holder(server, jti="another token")):
            await caller.ledger.ListAccounts(ListAccountsRequest(), metadata=caller.metadata)
        third = holder(server, jti="a third one")
        refusal = await refusal_of(third.ledger.ListAccounts(ListAccountsRequest(), metadata=third.metadata))
        assert refusal.verdict == ("RESOURCE_EXHAUSTED", "RATE_LIMITED")
        assert refusal.retry_delay is not None
        assert refusal.retry_delay.ToSeconds() > 900
        for caller in (holder(server, sub="client-2"), house):
            await caller.ledger.ListAccounts(ListAccountsRequest(), metadata=caller.metadata)


async def test_list_continues_with_a_new_token(book: Book, tmp_path: Path) -> None:
    """A page token stays valid when its caller gets a new access token."""
    (tmp_path / "jwks.json").write_bytes(jwk_set(KEY))
    async with serving_tokens(book, str(tmp_path / "jwks.json")) as server:
        house = await server.client(await server.create_tenant("house"))
        for account_id in ("a", "b"):
            await house.create_account(account_id)
        names, page_token = [], ""
        for jti in ("one", "two"):
            caller = holder(server, jti=jti)
            request = ListAccountsRequest(page_size=1, page_token=page_token)
            page = await caller.ledger.ListAccounts(request, metadata=caller.metadata)
            names += [account.name for account in page.accounts]
            page_token = page.next_page_token
        assert (names, page_token) == (["accounts/a", "accounts/b"], "")


async def test_missing_key_file_prevents_the_start(book: Book, tmp_path: Path) -> None:
    """The server doesn't start if the file of keys is missing, and the error names the setting."""
    with pytest.raises(CannotStart, match="oauth2_jwks: the file holds no usable key"):
        async with serving_tokens(book, str(tmp_path / "missing.json")):
            pass


async def test_documented_token_reads_its_account(book: Book, tmp_path: Path) -> None:
    """With the settings of docs/operate/access-tokens.md, its token may read its account, and no other."""
    (given,), (claims,) = (blocks("docs/operate/access-tokens.md", language) for language in ("text", "json"))
    settings = {
        name.removeprefix("DAYBOOK_").lower(): value
        for name, _, value in (line.partition("=") for line in given.text.splitlines())
    }
    key = rsa_key()
    (tmp_path / "jwks.json").write_bytes(jwk_set(key))
    async with serving_tokens(book, str(tmp_path / "jwks.json"), **settings) as server:
        house = await server.client(await server.create_tenant("acme"))
        for account_id in ("space-7", "space-8"):
            await house.create_account(account_id)
        given_claims = json.loads(claims.text)
        # The ledger of the test has its own clock; a reader has this one.
        assert given_claims["exp"] > time.time()
        caller = Client(server.channel, key.token(given_claims))
        own, other = (ListTransactionsRequest(parent=f"accounts/{each}") for each in ("space-7", "space-8"))
        await caller.ledger.ListTransactions(own, metadata=caller.metadata)
        refusal = await refusal_of(caller.ledger.ListTransactions(other, metadata=caller.metadata))
        assert refusal.reason == "ACCOUNT_NOT_PERMITTED"
