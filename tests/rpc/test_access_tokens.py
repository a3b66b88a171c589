"""Access tokens over the wire: what a server does without its issuer, and what it keeps of whoever holds one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from daybook.v1.ledger_service_pb2 import ListAccountsRequest

from server.app import serving
from server.book import Book
from server.config import CannotStart, Settings
from server.ledger.instants import SECOND
from tests.support.callers import Client, Server
from tests.support.clock import NOON
from tests.support.identity_provider import AUDIENCE, NAME, Endpoint, claims_at, ec_key, jwk_set
from tests.support.markers import only_sqlite
from tests.support.refusals import refusal_of

pytestmark = only_sqlite

KEY = ec_key()


@asynccontextmanager
async def serving_tokens(book: Book, jwks: str, **settings: object) -> AsyncIterator[Server]:
    """The book behind a server that takes the issuer's tokens, as each tenant's callers."""
    oauth2 = {"oauth2_issuer": NAME, "oauth2_audience": AUDIENCE, "oauth2_jwks": jwks}
    async with (
        serving(book, Settings(port=0, shutdown_grace_seconds=1, **oauth2, **settings)) as port,  # type: ignore[arg-type]
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield Server(book, channel)


def holder(server: Server, **claims: object) -> Client:
    """The caller who holds a token of the tenant `house` that reads accounts, unless told otherwise."""
    given = {"scope": "accounts.readonly", **claims}
    return Client(server.channel, KEY.token(claims_at(NOON // SECOND, **given)))


async def test_an_issuer_that_is_away(book: Book) -> None:
    """Until the issuer can be reached its tokens are UNAVAILABLE, not invalid; all else is as ever."""
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


async def test_each_subject_has_a_limit_of_its_own(book: Book, tmp_path: Path) -> None:
    """All tokens of one subject share a limit, and neither another subject nor a key shares it."""
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


async def test_a_list_goes_on_with_the_next_token(book: Book, tmp_path: Path) -> None:
    """Who has to get a new access token in the middle of a list reads on with it."""
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


async def test_a_file_without_keys(book: Book, tmp_path: Path) -> None:
    """A server whose file of keys is missing doesn't start, and says which setting it is."""
    with pytest.raises(CannotStart, match="oauth2_jwks: the file holds no usable key"):
        async with serving_tokens(book, str(tmp_path / "missing.json")):
            pass
