"""The outcome of a call of every method of every service, with every kind of credential."""

from __future__ import annotations

import base64
import uuid
from collections.abc import AsyncIterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from random import Random
from typing import Any

import grpc
import pytest
import pytest_asyncio
from daybook.v1.ledger_service_pb2 import SubmitTransactionsResponse
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass

from server.app import serving
from server.book import open_book
from server.config import Settings
from server.ledger.access import SUFFICIENT, RetiredSecret, hash_secret, new_api_key
from server.ledger.instants import SECOND, Instant
from tests.support.callers import Server
from tests.support.clock import NOON, Clock
from tests.support.identity_provider import AUDIENCE, NAME, Key, claims_at, ec_key, jwk_set
from tests.support.markers import shares_a_server
from tests.support.methods import METHODS, facade_requests
from tests.support.refusals import read_refusal, read_status

OK = "OK"
MISSING, INVALID, SCOPE = "CREDENTIAL_MISSING", "CREDENTIAL_INVALID", "SCOPE_MISSING"
NOT_PERMITTED, NO_ACCOUNT, NO_KEY = "ACCOUNT_NOT_PERMITTED", "ACCOUNT_NOT_FOUND", "API_KEY_NOT_FOUND"
NO_TRANSACTION = "TRANSACTION_NOT_FOUND"

READS_TRANSACTIONS = {"transactions.readonly", "transactions", "admin"}
POSTS = {"transactions", "admin"}
READS_ACCOUNTS = {"accounts.readonly", "accounts", "admin"}
WRITES_ACCOUNTS = {"accounts", "admin"}
READS_EITHER = READS_TRANSACTIONS | READS_ACCOUNTS
ADMINISTERS = {"admin"}


@dataclass(frozen=True)
class Row:
    """A method, a call of it that concerns the account `acme` of the tenant `house`, and its outcomes.

    The outcomes are those of credentials with one of `scopes`, by their reach. Any other credential
    gets SCOPE_MISSING with the scope `lacking`.
    """

    scopes: AbstractSet[str]
    lacking: str
    request: dict[str, Any]
    house: str
    """For a credential of the whole tenant."""
    acme: str
    """For a credential bound to the account."""
    spare: str
    """For a credential bound to another account of the tenant."""
    other: str
    """For a credential of another tenant, which has no such account."""


UID = "0192f3a4-5b6c-7d8e-9f01-23456789abcd"
TRANSACTION = {"kind": "GRANT", "category": "test", "amount": "1"}
ITEM = {"parent": "accounts/acme", "transaction": TRANSACTION, "createTime": "2024-10-10T12:00:00Z"}
ACME, IN_ACME = {"name": "accounts/acme"}, {"parent": "accounts/acme"}

WHOLE_ONLY, ACCOUNT_ONLY = (OK, NOT_PERMITTED, NOT_PERMITTED, OK), (OK, OK, NOT_PERMITTED, NO_ACCOUNT)
"""Outcomes of calls that concern a whole tenant, and of calls that concern the account."""

ROWS: dict[str, Row] = {
    # A facade shows the transactions of one account, unless it has a row of its own below.
    **{
        method.full_name: Row(
            READS_TRANSACTIONS,
            "transactions.readonly",
            MessageToDict(request, preserving_proto_field_name=True),
            *ACCOUNT_ONLY,
        )
        for method, request in facade_requests("acme")
    },
    "daybook.v1.Ledger.CreateAccount": Row(
        WRITES_ACCOUNTS,
        "accounts",
        # Both tenants have this account.
        {"accountId": "twin", "account": {"kind": "SPACE"}},
        *("ACCOUNT_EXISTS", NOT_PERMITTED, NOT_PERMITTED, "ACCOUNT_EXISTS"),
    ),
    "daybook.v1.Ledger.GetAccount": Row(READS_ACCOUNTS, "accounts.readonly", ACME, *ACCOUNT_ONLY),
    "daybook.v1.Ledger.ListAccounts": Row(READS_ACCOUNTS, "accounts.readonly", {}, *WHOLE_ONLY),
    "daybook.v1.Ledger.UpdateAccount": Row(
        WRITES_ACCOUNTS, "accounts", {"account": {**ACME, "displayName": "Acme"}}, *ACCOUNT_ONLY
    ),
    "daybook.v1.Ledger.CreateTransaction": Row(
        POSTS, "transactions", {**IN_ACME, "transaction": TRANSACTION}, *ACCOUNT_ONLY
    ),
    "daybook.v1.Ledger.BatchCreateTransactions": Row(
        POSTS,
        "transactions",
        {**IN_ACME, "requests": [{**IN_ACME, "transaction": TRANSACTION}]},
        *ACCOUNT_ONLY,
    ),
    "daybook.v1.Ledger.SubmitTransactions": Row(
        POSTS,
        "transactions",
        {**IN_ACME, "requests": [{**IN_ACME, "transaction": TRANSACTION}]},
        # Each transaction has its own outcome.
        *(OK, OK, f"{OK} {NOT_PERMITTED}", f"{OK} {NO_ACCOUNT}"),
    ),
    "daybook.v1.Ledger.RefundTransaction": Row(
        POSTS,
        "transactions",
        {"name": f"accounts/acme/transactions/{UID}"},
        *(NO_TRANSACTION, NO_TRANSACTION, NOT_PERMITTED, NO_ACCOUNT),
    ),
    "daybook.v1.Ledger.TransferCredits": Row(
        POSTS,
        "transactions",
        {**ACME, "destination": "accounts/twin", "amount": "0.1"},
        *(OK, NOT_PERMITTED, NOT_PERMITTED, NO_ACCOUNT),
    ),
    "daybook.v1.Ledger.GetTransaction": Row(
        READS_TRANSACTIONS,
        "transactions.readonly",
        {"name": f"accounts/acme/transactions/{UID}"},
        *(NO_TRANSACTION, NO_TRANSACTION, NOT_PERMITTED, NO_ACCOUNT),
    ),
    "daybook.v1.Ledger.ListTransactions": Row(
        READS_TRANSACTIONS, "transactions.readonly", {**IN_ACME, "pageSize": 1}, *ACCOUNT_ONLY
    ),
    "daybook.v1.Ledger.ExportTransactions": Row(READS_TRANSACTIONS, "transactions.readonly", IN_ACME, *ACCOUNT_ONLY),
    "daybook.v1.Ledger.ListLots": Row(READS_EITHER, "accounts.readonly", {**IN_ACME, "pageSize": 1}, *ACCOUNT_ONLY),
    "daybook.v1.Ledger.GetBalance": Row(
        READS_EITHER, "accounts.readonly", {"name": "accounts/acme/balance"}, *ACCOUNT_ONLY
    ),
    "daybook.v1.Admin.ImportTransactions": Row(ADMINISTERS, "admin", {"items": [ITEM]}, *ACCOUNT_ONLY),
    "daybook.v1.Admin.VerifyAccounts": Row(ADMINISTERS, "admin", {}, *WHOLE_ONLY),
    "daybook.v1.Admin.CreateApiKey": Row(
        ADMINISTERS, "admin", {"apiKey": {"scopes": ["transactions.readonly"]}}, *WHOLE_ONLY
    ),
    "daybook.v1.Admin.ListApiKeys": Row(ADMINISTERS, "admin", {"pageSize": 1}, *WHOLE_ONLY),
    "daybook.v1.Admin.RevokeApiKey": Row(
        ADMINISTERS, "admin", {"name": "apiKeys/to-revoke"}, *(OK, NOT_PERMITTED, NOT_PERMITTED, NO_KEY)
    ),
    "daybook.v1.Admin.RotateApiKey": Row(
        ADMINISTERS, "admin", {"name": "apiKeys/to-rotate"}, *(OK, NOT_PERMITTED, NOT_PERMITTED, NO_KEY)
    ),
    "daybook.facades.nebulablock.v1.Users.GetCreditsHistory": Row(
        READS_TRANSACTIONS,
        "transactions.readonly",
        {},
        # It concerns the account that the credential is bound to.
        *(NOT_PERMITTED, OK, OK, NOT_PERMITTED),
    ),
    "daybook.facades.spacebring.v1.Transactions.GetCreditsTransactions": Row(
        READS_TRANSACTIONS,
        "transactions.readonly",
        {"limit": "1"},
        # The call names the network of `house`.
        *(OK, NOT_PERMITTED, NOT_PERMITTED, "TENANT_NOT_PERMITTED"),
    ),
    "daybook.facades.dreadnode.v1.Credits.GetCreditBalance": Row(
        READS_EITHER, "accounts.readonly", {"org": "acme"}, *ACCOUNT_ONLY
    ),
}

USUAL = frozenset({"transactions", "accounts"})
SETS_OF_SCOPES: dict[str, frozenset[str]] = {
    **{scope: frozenset({scope}) for scope in SUFFICIENT},
    "both readonly": frozenset({"transactions.readonly", "accounts.readonly"}),
    "no scope": frozenset(),
    "unknown scopes": frozenset({"transaction", "Admin", "transactions.", "accounts.readonly.x"}),
}
ISSUER_KEY, STRANGERS_KEY = ec_key(), ec_key()
SECONDS = NOON // SECOND


@dataclass(frozen=True)
class Kind:
    """A credential, with its scopes and reach; for an invalid credential, the reason of its refusal."""

    metadata: Sequence[tuple[str, str]]
    scopes: frozenset[str] = USUAL
    reach: str = "house"
    refusal: str | None = None

    def expected(self, row: Row) -> str:
        """The outcome of the row's call with this credential."""
        if self.refusal is not None:
            return self.refusal
        if not self.scopes & row.scopes:
            return f"{SCOPE} {row.lacking}"
        return {"house": row.house, "acme": row.acme, "spare": row.spare, "other": row.other}[self.reach]


def bearer(text: str) -> list[tuple[str, str]]:
    """Metadata with a key or a token as Bearer."""
    return [("authorization", f"Bearer {text}")]


def basic(text: str) -> list[tuple[str, str]]:
    """Metadata with a key as Basic."""
    return [("authorization", f"Basic {base64.b64encode(text.replace('.', ':', 1).encode()).decode()}")]


def token(key: Key = ISSUER_KEY, **claims: object) -> str:
    """A token of the whole tenant `house` with the scopes of a usual key, unless `claims` override them."""
    given = {"scope": "transactions accounts", "account": "-", **claims}
    return key.token(claims_at(SECONDS, **given))


def tokens() -> dict[str, Kind]:
    """Every kind of access token."""
    by_scopes = {
        f"token: {name}": Kind(bearer(token(scope=" ".join(sorted(scopes)))), scopes)
        for name, scopes in SETS_OF_SCOPES.items()
    }
    good = token()
    bad = {
        "tampered with": bearer(good[:-4] + ("AAAA" if good[-4:] != "AAAA" else "BBBB")),
        "signed with another key": bearer(token(STRANGERS_KEY)),
        "without a signature": bearer(good.rpartition(".")[0] + "."),
        "expired": bearer(token(exp=SECONDS - 30)),
        "not valid yet": bearer(token(nbf=SECONDS + 31)),
        "for another audience": bearer(token(aud="https://other.example")),
        "of another issuer": bearer(token(iss="https://other.example")),
        "of an unknown tenant": bearer(token(tenant="unknown", scope="admin")),
        "without an account": bearer(token(account=None, scope="admin")),
        "as X-API-Key": [("x-api-key", good)],
        "as Basic": basic(good),
    }
    return {
        **by_scopes,
        "token: expired, within the allowed skew": Kind(bearer(token(exp=SECONDS - 29))),
        "token: no scope claim": Kind(bearer(token(scope=None)), frozenset()),
        "token: scopes in a list": Kind(
            bearer(token(scope=["accounts.readonly", "x"])), frozenset({"accounts.readonly"})
        ),
        "token: bound to acme": Kind(bearer(token(account="acme")), reach="acme"),
        "token: bound to acme, admin": Kind(
            bearer(token(account="acme", scope="admin")), SETS_OF_SCOPES["admin"], "acme"
        ),
        "token: bound to spare": Kind(bearer(token(account="spare", scope="admin")), SETS_OF_SCOPES["admin"], "spare"),
        "token: of another tenant": Kind(
            bearer(token(tenant="other", scope="admin")), SETS_OF_SCOPES["admin"], "other"
        ),
        **{f"token: {name}": Kind(metadata, refusal=INVALID) for name, metadata in bad.items()},
    }


async def keys(server: Server, house: int, other: int) -> dict[str, Kind]:
    """Every kind of API key, and calls without one."""

    async def key(tenant: int = house, **given: Any) -> str:
        return (await server.client(tenant, **given)).key

    async def expiring(expire_time: Instant) -> str:
        new = new_api_key(server.book.random_bytes)
        await server.book.credentials.create_api_key(
            key_id=new.key_id,
            secret_hash=new.secret_hash,
            tenant_number=house,
            account_number=None,
            create_time=NOON,
            expire_time=expire_time,
        )
        return new.text

    async def revoked() -> str:
        text = await key()
        await server.book.credentials.revoke_api_key(house, text.partition(".")[0], NOON)
        return text

    async def rotated_out(until: Instant) -> str:
        text = await key()
        key_id, _, secret = text.partition(".")
        retired = RetiredSecret(hash_secret(secret), until)
        await server.book.credentials.rotate_api_key(house, key_id, hash_secret("new"), lambda *_: [retired])
        return text

    by_scopes = {
        f"key: {name}": Kind(bearer(await key(scopes=scopes)), scopes) for name, scopes in SETS_OF_SCOPES.items()
    }
    usual = await key()
    bad = {
        "malformed": bearer("00"),
        "unknown": bearer("00.00"),
        "unknown, as X-API-Key": [("x-api-key", "00.00")],
        "unknown, as Basic": basic("00.00"),
        "with another secret": bearer(f"{usual}x"),
        "by another scheme": [("authorization", f"Digest {usual}")],
        "wrong before right": [*bearer("00.00"), *bearer(usual)],
        "very long": bearer(usual.ljust(9000, "x")),
        "rotated out": bearer(await rotated_out(NOON)),
        "expired": bearer(await expiring(NOON)),
        "revoked": bearer(await revoked()),
    }
    admin = SETS_OF_SCOPES["admin"]
    return {
        "none": Kind([], refusal=MISSING),
        "a cookie": Kind([("cookie", f"key={usual}")], refusal=MISSING),
        **by_scopes,
        "key: as Bearer": Kind(bearer(usual)),
        "key: as X-API-Key": Kind([("x-api-key", usual)]),
        "key: as Basic": Kind(basic(usual)),
        "key: rotated out, within the grace period": Kind(bearer(await rotated_out(NOON + 1))),
        "key: about to expire": Kind(bearer(await expiring(NOON + 1))),
        "key: bound to acme": Kind(bearer(await key(account_id="acme")), reach="acme"),
        "key: bound to acme, admin": Kind(bearer(await key(account_id="acme", scopes=admin)), admin, "acme"),
        "key: bound to spare": Kind(bearer(await key(account_id="spare", scopes=admin)), admin, "spare"),
        "key: of another tenant": Kind(bearer(await key(other, scopes=admin)), admin, "other"),
        **{f"key: {name}": Kind(metadata, refusal=INVALID) for name, metadata in bad.items()},
    }


async def outcome_of(channel: grpc.aio.Channel, method: MethodDescriptor, kind: Kind) -> str:
    """The outcome of a row's call: the reason of its refusal, or OK.

    OK is followed by the reason of the first item's refusal, if there is one.
    """
    request = ParseDict(ROWS[method.full_name].request, GetMessageClass(method.input_type)())
    answer = GetMessageClass(method.output_type)()
    path = f"/{method.containing_service.full_name}/{method.name}"
    metadata = (*kind.metadata, ("spacebring-network-id", str(uuid.uuid5(uuid.NAMESPACE_URL, "house"))))
    try:
        if method.server_streaming:
            stream: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(path)
            async for _ in stream(request.SerializeToString(), metadata=metadata):
                pass
        else:
            unary: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
            answer.ParseFromString(await unary(request.SerializeToString(), metadata=metadata))
    except grpc.aio.AioRpcError as error:
        refusal = read_refusal(error)
        if refusal.reason == SCOPE:
            assert refusal.message == f"the credential lacks the scope {refusal.metadata['scope']}"
            return f"{SCOPE} {refusal.metadata['scope']}"
        return refusal.reason
    if isinstance(answer, SubmitTransactionsResponse) and answer.results[0].HasField("error"):
        return f"{OK} {read_status(answer.results[0].error).reason}"
    return OK


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """A server that accepts access tokens, with the tenants `house` and `other`."""
    folder = tmp_path_factory.mktemp("access")
    (folder / "jwks.json").write_bytes(jwk_set(ISSUER_KEY))
    settings = Settings(
        port=0,
        oauth2_issuer=NAME,
        oauth2_audience=AUDIENCE,
        oauth2_jwks=str(folder / "jwks.json"),
        oauth2_account_claim="account",
    )
    async with (
        open_book(f"sqlite+aiosqlite:///{folder}/daybook.db", Clock(), Random(1).randbytes) as book,
        serving(book, settings) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield Server(book, channel)


def test_rows_cover_every_method() -> None:
    """ROWS has every method; facades whose outcomes are the usual ones get their rows automatically."""
    assert ROWS.keys() == {method.full_name for method in METHODS}


@shares_a_server
async def test_every_method_checks_every_credential(server: Server) -> None:
    """Every method checks credential, scope, tenant and binding, in this order."""
    house, other = [await server.create_tenant(slug) for slug in ("house", "other")]
    for tenant, accounts in ((house, ("acme", "spare", "twin")), (other, ("twin",))):
        owner = await server.client(tenant)
        for account_id in accounts:
            await owner.create_account(account_id)
    for key_id in ("to-revoke", "to-rotate"):
        await server.book.credentials.create_api_key(
            key_id=key_id, secret_hash=b"", tenant_number=house, account_number=None, create_time=NOON
        )
    kinds = {**await keys(server, house, other), **tokens()}
    outcomes = {
        (name, method.full_name): await outcome_of(server.channel, method, kind)
        for name, kind in kinds.items()
        for method in METHODS
    }
    expected = {(name, method): kind.expected(row) for name, kind in kinds.items() for method, row in ROWS.items()}
    assert {call: (outcomes[call], expected[call]) for call in expected if outcomes[call] != expected[call]} == {}
    assert len(outcomes) == len(kinds) * len(METHODS)
