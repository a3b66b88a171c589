"""The reach of credentials: a tenant, or one account if bound. test_access.py covers every method."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, cast

import pytest
from daybook.v1.account_pb2 import Account
from daybook.v1.ledger_service_pb2 import (
    CreateAccountRequest,
    CreateTransactionRequest,
    GetAccountRequest,
    GetBalanceRequest,
    GetTransactionRequest,
    ListAccountsRequest,
    ListTransactionsRequest,
    UpdateAccountRequest,
)
from daybook.v1.transaction_pb2 import Transaction
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from server.app import SERVICES
from server.transport.open_services import OPEN_SERVICES
from tests.support.callers import Client, Server
from tests.support.markers import only_sqlite
from tests.support.methods import METHODS
from tests.support.refusals import refusal_of

Metadata = Sequence[tuple[str, str]]
INVALID = ("UNAUTHENTICATED", "CREDENTIAL_INVALID")
NOT_PERMITTED = ("PERMISSION_DENIED", "ACCOUNT_NOT_PERMITTED")


def test_methods_are_enumerated() -> None:
    """METHODS has all methods of the native services and of every facade."""
    names = [method.containing_service.full_name for method in METHODS]
    assert names.count("daybook.v1.Ledger") == 14
    assert names.count("daybook.v1.Admin") == 6
    assert set(names) == set(SERVICES)


async def test_open_services(server: Server) -> None:
    """Health and reflection need no credential, and report every service."""
    # The stubs of grpcio's add-ons have no types for their methods and for grpc.aio.
    health: Any = health_pb2_grpc.HealthStub(server.channel)
    for service in ("", *SERVICES):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING

    async def ask() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    stub: Any = cast("Any", reflection_pb2_grpc.ServerReflectionStub)(server.channel)
    answers = [answer async for answer in stub.ServerReflectionInfo(ask())]
    names = {service.name for service in answers[0].list_services_response.service}
    assert names == {*SERVICES, *OPEN_SERVICES}


def basic(text: str) -> str:
    """The value of a Basic header."""
    return f"Basic {base64.b64encode(text.encode()).decode()}"


def headers_of(key: str) -> dict[str, Metadata]:
    """Metadata with a valid key in every form, and with invalid keys, by name."""
    key_id, _, secret = key.partition(".")
    return {
        "bearer": [("authorization", f"Bearer {key}")],
        "bearer in lower case": [("authorization", f"bearer {key}")],
        "x-api-key": [("x-api-key", key)],
        "basic": [("authorization", basic(f"{key_id}:{secret}"))],
        "no scheme": [("authorization", key)],
        "scheme alone": [("authorization", "Bearer")],
        "empty": [("authorization", "")],
        "empty x-api-key": [("x-api-key", "")],
        "another scheme": [("authorization", f"Digest {key}")],
        "id alone": [("authorization", f"Bearer {key_id}")],
        "id and point": [("authorization", f"Bearer {key_id}.")],
        "secret alone": [("authorization", f"Bearer .{secret}")],
        "wrong secret": [("authorization", f"Bearer {key_id}.{secret[::-1]}")],
        "secret cut": [("authorization", f"Bearer {key[:-1]}")],
        "secret in another case": [("authorization", f"Bearer {key_id}.{secret.swapcase()}")],
        "unknown id": [("authorization", f"Bearer {key_id[::-1]}.{secret}")],
        "basic without colon": [("authorization", basic(f"{key_id}.{secret}"))],
        "basic with wrong secret": [("authorization", basic(f"{key_id}:x"))],
        "basic without secret": [("authorization", basic(f"{key_id}:"))],
        "basic not in base64": [("authorization", f"Basic {key}")],
        "basic not in UTF-8": [("authorization", f"Basic {base64.b64encode(bytes([255])).decode()}")],
        "very long": [("authorization", f"Bearer {key}{'x' * 9000}")],
        "SQL": [("authorization", "Bearer ' OR 1=1 --.x")],
        "wrong before right": [("authorization", "Bearer 00.00"), ("authorization", f"Bearer {key}")],
    }


@only_sqlite
@pytest.mark.parametrize(
    ("how", "verdict"),
    [
        ("bearer", None),
        ("bearer in lower case", None),
        ("x-api-key", None),
        ("basic", None),
        *((how, INVALID) for how in list(headers_of("0.0"))[4:]),
    ],
)
async def test_credential(client: Client, how: str, verdict: tuple[str, str] | None) -> None:
    """A key is valid as Bearer, X-API-Key and Basic; anything else gets CREDENTIAL_INVALID with the same message."""
    await client.create_account("acme")
    metadata = tuple(headers_of(client.key)[how])
    call = client.ledger.GetAccount(GetAccountRequest(name="accounts/acme"), metadata=metadata)
    if verdict is None:
        assert (await call).name == "accounts/acme"
    else:
        refusal = await refusal_of(call)
        assert refusal.verdict == verdict
        assert refusal.message == "the credential is not valid"


Calls = dict[str, Callable[[Client, str], Awaitable[Message]]]
UID = "0192f3a4-5b6c-7d8e-9f01-23456789abcd"

CALLS: Calls = {
    "CreateAccount": lambda client, account_id: client.create_account(account_id),
    "GetAccount": lambda client, account_id: client.ledger.GetAccount(
        GetAccountRequest(name=f"accounts/{account_id}"), metadata=client.metadata
    ),
    "UpdateAccount": lambda client, account_id: client.ledger.UpdateAccount(
        UpdateAccountRequest(account=Account(name=f"accounts/{account_id}", display_name="taken")),
        metadata=client.metadata,
    ),
    "CreateTransaction": lambda client, account_id: client.post(account_id, Transaction.GRANT, "1"),
    "GetTransaction": lambda client, account_id: client.ledger.GetTransaction(
        GetTransactionRequest(name=f"accounts/{account_id}/transactions/{UID}"), metadata=client.metadata
    ),
    "ListTransactions": lambda client, account_id: client.ledger.ListTransactions(
        ListTransactionsRequest(parent=f"accounts/{account_id}"), metadata=client.metadata
    ),
    "GetBalance": lambda client, account_id: client.ledger.GetBalance(
        GetBalanceRequest(name=f"accounts/{account_id}/balance"), metadata=client.metadata
    ),
}
"""A call of each native method that concerns one account."""


async def test_bound_key_and_other_accounts(server: Server) -> None:
    """A bound key is refused for every other account, with the same message whether the account exists or not."""
    tenant_number = await server.create_tenant("house")
    whole = await server.client(tenant_number)
    for account_id in ("mine", "other"):
        await whole.create_account(account_id)
    before = await CALLS["GetAccount"](whole, "other")
    bound = await server.client(tenant_number, account_id="mine")
    for name, call in CALLS.items():
        existing = await refusal_of(call(bound, "other"))
        absent = await refusal_of(call(bound, "unknown"))
        in_another_case = await refusal_of(call(bound, "Mine"))
        assert existing.verdict == absent.verdict == in_another_case.verdict == NOT_PERMITTED, name
        assert existing.message == absent.message.replace("unknown", "other"), name
        assert existing.metadata == {"account": "accounts/other"}, name
        assert absent.metadata == {"account": "accounts/unknown"}, name
    assert await CALLS["GetAccount"](whole, "other") == before
    assert (await refusal_of(CALLS["GetAccount"](whole, "unknown"))).reason == "ACCOUNT_NOT_FOUND"


async def test_bound_key_and_the_tenant(server: Server) -> None:
    """A bound key is refused for lists of the whole tenant."""
    tenant_number = await server.create_tenant("house")
    await (await server.client(tenant_number)).create_account("mine")
    bound = await server.client(tenant_number, account_id="mine")
    for call in (
        bound.ledger.ListAccounts(ListAccountsRequest(), metadata=bound.metadata),
        bound.ledger.ListTransactions(ListTransactionsRequest(parent="accounts/-"), metadata=bound.metadata),
        bound.ledger.ListTransactions(
            ListTransactionsRequest(parent="accounts/-", order_by="amount"), metadata=bound.metadata
        ),
    ):
        assert (await refusal_of(call)).verdict == NOT_PERMITTED


async def test_bound_key_and_its_account(server: Server) -> None:
    """A bound key may do everything with its own account."""
    tenant_number = await server.create_tenant("house")
    whole = await server.client(tenant_number)
    await whole.create_account("mine")
    bound = await server.client(tenant_number, account_id="mine")
    posted = await bound.post("mine", Transaction.GRANT, "1")
    page = await bound.ledger.ListTransactions(ListTransactionsRequest(parent="accounts/mine"), metadata=bound.metadata)
    assert list(page.transactions) == [posted]
    found = await bound.ledger.GetTransaction(GetTransactionRequest(name=posted.name), metadata=bound.metadata)
    assert found == posted
    updated = await CALLS["UpdateAccount"](bound, "mine")
    assert await CALLS["GetAccount"](bound, "mine") == updated == await CALLS["GetAccount"](whole, "mine")
    assert await CALLS["GetBalance"](bound, "mine") == await CALLS["GetBalance"](whole, "mine")
    assert (await refusal_of(CALLS["CreateAccount"](bound, "mine"))).reason == "ACCOUNT_EXISTS"


async def test_bound_key_of_another_tenant(server: Server) -> None:
    """A bound key reaches its own tenant's account, not another tenant's account with the same id."""
    tenants = [await server.create_tenant(slug) for slug in ("one", "two")]
    clients = [await server.client(tenant_number) for tenant_number in tenants]
    accounts = [await client.create_account("same") for client in clients]
    for tenant_number, account in zip(tenants, accounts, strict=True):
        bound = await server.client(tenant_number, account_id="same")
        assert await CALLS["GetAccount"](bound, "same") == account


async def test_tenants_are_isolated(server: Server) -> None:
    """Another tenant's resource is NOT_FOUND, like an unknown one."""
    one = await server.client(await server.create_tenant("one"))
    two = await server.client(await server.create_tenant("two"))
    await two.create_account("theirs")
    theirs = await two.post("theirs", Transaction.GRANT, "5", request_id="id")
    before = [await CALLS[name](two, "theirs") for name in ("GetAccount", "GetBalance", "ListTransactions")]
    for name, call in CALLS.items():
        if name == "CreateAccount":
            continue
        refusal = await refusal_of(call(one, "theirs"))
        absent = await refusal_of(call(one, "unknown"))
        assert refusal.verdict == absent.verdict == ("NOT_FOUND", "ACCOUNT_NOT_FOUND"), name
        assert refusal.message == absent.message.replace("unknown", "theirs"), name
    get = one.ledger.GetTransaction(GetTransactionRequest(name=theirs.name), metadata=one.metadata)
    assert (await refusal_of(get)).verdict == ("NOT_FOUND", "ACCOUNT_NOT_FOUND")
    assert before == [await CALLS[name](two, "theirs") for name in ("GetAccount", "GetBalance", "ListTransactions")]


async def test_tenants_with_the_same_accounts(server: Server) -> None:
    """Two tenants with the same ids each see their own accounts, rows and balance in every list."""
    clients = {slug: await server.client(await server.create_tenant(slug)) for slug in ("one", "two")}
    accounts: dict[str, list[Account]] = {slug: [] for slug in clients}
    posted: dict[str, list[Transaction]] = {slug: [] for slug in clients}
    for amount, account_id in (("1", "a"), ("2", "b")):
        for slug, client in clients.items():
            accounts[slug].append(await client.create_account(account_id))
            posted[slug].append(
                await client.post(account_id, Transaction.GRANT, amount, description=slug, labels={"location": "l"})
            )
    for slug, client in clients.items():
        page = await client.ledger.ListAccounts(ListAccountsRequest(), metadata=client.metadata)
        assert list(page.accounts) == accounts[slug]
        for parent, filter_text, rows in (
            ("accounts/-", "", posted[slug]),
            ("accounts/-", "labels.location = l", posted[slug]),
            ("accounts/-", "category = test", posted[slug]),
            ("accounts/a", "", posted[slug][:1]),
            ("accounts/a", "category = test", posted[slug][:1]),
            ("accounts/b", "labels.location = l", posted[slug][1:]),
        ):
            request = ListTransactionsRequest(parent=parent, filter=filter_text, order_by="create_time")
            listed = await client.ledger.ListTransactions(request, metadata=client.metadata)
            assert list(listed.transactions) == rows, (parent, filter_text)
    other = posted["two"][0]
    get = clients["one"].ledger.GetTransaction(GetTransactionRequest(name=other.name), metadata=clients["one"].metadata)
    assert (await refusal_of(get)).verdict == ("NOT_FOUND", "TRANSACTION_NOT_FOUND")


@only_sqlite
async def test_account_number_is_not_a_name(server: Server) -> None:
    """An account can't be reached by its number, its own or another tenant's."""
    one = await server.client(await server.create_tenant("one"))
    two = await server.client(await server.create_tenant("two"))
    numbers = [(await client.create_account("acme")).number for client in (one, two)]
    for number in numbers:
        refusal = await refusal_of(
            one.ledger.CreateTransaction(
                CreateTransactionRequest(
                    parent=f"accounts/{number}",
                    transaction=Transaction(kind=Transaction.GRANT, category="test", amount="1"),
                ),
                metadata=one.metadata,
            )
        )
        assert refusal.verdict == ("NOT_FOUND", "ACCOUNT_NOT_FOUND")
    created = await one.ledger.CreateAccount(
        CreateAccountRequest(account_id=str(numbers[1]), account=Account(kind=Account.USER)), metadata=one.metadata
    )
    assert created.number not in numbers
