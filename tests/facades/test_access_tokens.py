"""Access tokens through the gateway: the native API and every facade accept them as Bearer credentials."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from server.demo import nebulablock, spacebring
from tests.support.http_client import Answer, Json, read_json, send
from tests.support.identity_provider import AUDIENCE, NAME, Endpoint, claims_at, ec_key, jwk_set, rsa_key
from tests.support.processes import Daybook, Ports, copy_database, sqlite_url
from tests.support.vendors import is_error

KEY = ec_key()
NETWORK = spacebring.STORY.uid
PATHS = {
    "native": ("demo-teable", "/v1/accounts/spcExampleStudio/transactions?pageSize=3"),
    "teable": ("demo-teable", "/api/space/spcExampleStudio/billing/credit-history?month=2024-10&take=3"),
    "nebulablock": ("demo-nebulablock", "/users/credits/history?limit=2&offset=0"),
    "spacebring": ("demo-spacebring", "/transactions/credits/v1?limit=3"),
    "dreadnode": ("demo-dreadnode", "/api/v1/org/example/credits/transactions?limit=3"),
    "paged": ("demo-dreadnode", "/api/billing/accounts/example/transactions?page_size=3"),
}
"""By API: a tenant of the demo, whose key has the same name, and the path of a list."""


@pytest.fixture(scope="module")
def daybook(gateway: Daybook, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daybook]:
    """A second demo behind a gateway, which accepts the access tokens of an issuer."""
    folder, ports = tmp_path_factory.mktemp("oauth2"), Ports.free()
    copy_database(gateway.folder / "daybook.db", folder / "daybook.db")
    with Endpoint().serving() as endpoint:
        endpoint.reset(jwk_set(KEY, rsa_key()))
        daybook = Daybook.start(
            *("up", "--database-url", sqlite_url(folder / "daybook.db")),
            *ports.flags,
            folder=folder,
            ports=ports,
            settings={
                "DAYBOOK_OAUTH2_ISSUER": NAME,
                "DAYBOOK_OAUTH2_AUDIENCE": AUDIENCE,
                "DAYBOOK_OAUTH2_JWKS": endpoint.url,
                "DAYBOOK_OAUTH2_ALGORITHMS": "ES256,RS256",
                "DAYBOOK_OAUTH2_ACCOUNT_CLAIM": "account",
                "DAYBOOK_LOG_LEVEL": "debug",
            },
        )
        try:
            daybook.wait_for("gateway")
            yield daybook
            assert daybook.stop() == 0
        finally:
            daybook.kill()


def token(tenant: str, **claims: object) -> str:
    """An access token issued now that may read all transactions of a tenant; `claims` replace its claims."""
    given = {"scope": "openid transactions.readonly", "account": "-", "tenant": tenant, **claims}
    return KEY.token(claims_at(int(time.time()), **given))


def ask(daybook: Daybook, api: str, credential: str, **headers: str) -> Answer:
    """The answer of an API to a caller with this Bearer credential."""
    named = {"authorization": f"Bearer {credential}", **headers}
    if api == "spacebring":
        named.setdefault("spacebring-network-id", NETWORK)
    return send(daybook.origin, PATHS[api][1], headers=named)


def rows(body: Json) -> Json:
    """A page without its page token, which differs in each answer."""
    tokens = {"nextPageToken", "nextCursor"}
    return {name: value for name, value in body.items() if name not in tokens} if isinstance(body, dict) else body


@pytest.mark.parametrize("api", PATHS)
def test_access_token_reads_the_same_as_a_key(daybook: Daybook, api: str) -> None:
    """A token and a key of one tenant read the same page; an invalid token or one with other claims reads none."""
    tenant = PATHS[api][0]
    account = {"account": nebulablock.DOCUMENTED_USER} if api == "nebulablock" else {}
    opened = ask(daybook, api, token(tenant, **account))
    by_key = ask(daybook, api, f"{tenant}.public")
    assert (opened.status, by_key.status) == (200, 200), opened.body
    assert rows(opened.json()) == rows(by_key.json())
    good = token(tenant, **account)
    for bad in (good[:-6] + "AAAAAA", token(tenant, exp=int(time.time()) - 31), token("unknown"), good + ".x"):
        refused, unknown_key = ask(daybook, api, bad), ask(daybook, api, "unknown.public")
        assert refused.status == unknown_key.status == 401
        assert refused.header("www-authenticate") == unknown_key.header("www-authenticate")
        assert refused.json() == unknown_key.json(), "a refusal does not say what is wrong with a credential"
        assert refused.header("content-type") == "application/json"
        if api != "native":
            assert is_error(api, 401, refused.json())
    narrow = ask(daybook, api, token(tenant, scope="openid", **account))
    assert narrow.status == 403
    stranger = ask(daybook, api, token(tenant, account="spcNobody", scope="transactions"))
    assert stranger.status == (404 if api == "nebulablock" else 403)
    assert good.encode() not in (daybook.folder / "stderr").read_bytes()


def test_spacebring_requires_the_network_of_the_token(daybook: Daybook) -> None:
    """Spacebring refuses a token without a network id, or with the id of another tenant."""
    mine = token("demo-spacebring")
    headers = {"authorization": f"Bearer {mine}"}
    unnamed = send(daybook.origin, PATHS["spacebring"][1], headers=headers)
    assert unnamed.status == 400
    assert unnamed.json() == {
        "message": "spacebring-network-id is required with bearer token authentication",
        "type": "invalidParams",
    }
    refused = ask(daybook, "spacebring", token("demo-teable"))
    assert (refused.status, refused.json()) == (
        403,
        {"message": "the credential belongs to another tenant", "type": "forbidden"},
    )
    bad = ask(daybook, "spacebring", mine[:-6] + "AAAAAA")
    assert (bad.status, bad.json()) == (401, {"message": "the credential is not valid", "type": "unauthorized"})


def test_access_token_may_post(daybook: Daybook) -> None:
    """An RS256 token with the scope `transactions` posts over REST."""
    claims = claims_at(int(time.time()), tenant="demo-teable", account="-", scope=["transactions"])
    headers = {"authorization": f"Bearer {rsa_key().token(claims)}", "content-type": "application/json"}
    body = json.dumps({"kind": "GRANT", "category": "purchase", "amount": "20"}).encode()
    answer = send(
        daybook.origin, "/v1/accounts/spcExampleStudio/transactions", method="POST", headers=headers, body=body
    )
    posted = read_json(answer.body.decode())
    assert isinstance(posted, dict)
    assert (answer.status, posted["amount"]) == (200, "20")


def test_longest_access_token_passes_the_gateway(daybook: Daybook) -> None:
    """The gateway passes on tokens of up to 8192 bytes, the most that the server accepts."""
    longest = token("demo-teable", padding="x" * 5700)
    assert 8000 < len(longest) <= 8192 - len("Bearer ")
    assert ask(daybook, "native", longest).status == 200
    assert ask(daybook, "native", token("demo-teable", padding="x" * 6200)).status == 401
