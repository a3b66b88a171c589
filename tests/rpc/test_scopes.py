"""What a credential may do: every method declares its scope, and opens to no credential without one."""

from __future__ import annotations

from collections.abc import Collection

import grpc
import pytest
from daybook.facades.teable.v1.billing_service_pb2 import GetSpaceCreditHistoryRequest
from daybook.v1.ledger_service_pb2 import CreateTransactionRequest
from daybook.v1.scope_pb2 import scope
from daybook.v1.transaction_pb2 import Transaction
from google.protobuf.descriptor import MethodDescriptor

from server.ledger.access import SUFFICIENT
from server.transport.scopes import declared_scopes
from tests.conftest import Server, only_sqlite, read_refusal, refusal_of
from tests.rpc.test_credentials import METHODS, call_method

CREDENTIALS: dict[str, tuple[str, ...]] = {
    "none": (),
    "transactions.readonly": ("transactions.readonly",),
    "transactions": ("transactions",),
    "accounts.readonly": ("accounts.readonly",),
    "accounts": ("accounts",),
    "admin": ("admin",),
    "both readonly": ("transactions.readonly", "accounts.readonly"),
    "usual": ("transactions", "accounts"),
    "unknown": ("transaction", "Admin", "transactions.", "accounts.readonly.x"),
}
"""Credentials by a name for the table, each with its scopes."""

READS_TRANSACTIONS = {"transactions.readonly", "transactions", "admin", "both readonly", "usual"}
POSTS = {"transactions", "admin", "usual"}
READS_ACCOUNTS = {"accounts.readonly", "accounts", "admin", "both readonly", "usual"}
WRITES_ACCOUNTS = {"accounts", "admin", "usual"}
READS_EITHER = READS_TRANSACTIONS | READS_ACCOUNTS
RUNS_THE_LEDGER = {"admin"}

OUTCOMES: dict[str, tuple[Collection[str], str]] = {
    "daybook.v1.Ledger.CreateAccount": (WRITES_ACCOUNTS, "accounts"),
    "daybook.v1.Ledger.GetAccount": (READS_ACCOUNTS, "accounts.readonly"),
    "daybook.v1.Ledger.ListAccounts": (READS_ACCOUNTS, "accounts.readonly"),
    "daybook.v1.Ledger.UpdateAccount": (WRITES_ACCOUNTS, "accounts"),
    "daybook.v1.Ledger.CreateTransaction": (POSTS, "transactions"),
    "daybook.v1.Ledger.BatchCreateTransactions": (POSTS, "transactions"),
    "daybook.v1.Ledger.BulkCreateTransactions": (POSTS, "transactions"),
    "daybook.v1.Ledger.RefundTransaction": (POSTS, "transactions"),
    "daybook.v1.Ledger.TransferCredits": (POSTS, "transactions"),
    "daybook.v1.Ledger.GetTransaction": (READS_TRANSACTIONS, "transactions.readonly"),
    "daybook.v1.Ledger.ListTransactions": (READS_TRANSACTIONS, "transactions.readonly"),
    "daybook.v1.Ledger.ListLots": (READS_EITHER, "accounts.readonly"),
    "daybook.v1.Ledger.GetBalance": (READS_EITHER, "accounts.readonly"),
    "daybook.v1.Admin.ImportTransactions": (RUNS_THE_LEDGER, "admin"),
    "daybook.v1.Admin.VerifyLedger": (RUNS_THE_LEDGER, "admin"),
    "daybook.v1.Admin.CreateApiKey": (RUNS_THE_LEDGER, "admin"),
    "daybook.v1.Admin.ListApiKeys": (RUNS_THE_LEDGER, "admin"),
    "daybook.v1.Admin.RevokeApiKey": (RUNS_THE_LEDGER, "admin"),
    "daybook.v1.Admin.RotateApiKey": (RUNS_THE_LEDGER, "admin"),
    "daybook.facades.teable.v1.Billing.GetSpaceCreditHistory": (READS_TRANSACTIONS, "transactions.readonly"),
    "daybook.facades.nebulablock.v1.Users.GetCreditsHistory": (READS_TRANSACTIONS, "transactions.readonly"),
    "daybook.facades.spacebring.v1.Transactions.GetCreditsTransactions": (READS_TRANSACTIONS, "transactions.readonly"),
    "daybook.facades.paged.v1.Statements.ListAccountTransactions": (READS_TRANSACTIONS, "transactions.readonly"),
    "daybook.facades.dreadnode.v1.Credits.ListCreditTransactions": (READS_TRANSACTIONS, "transactions.readonly"),
}
"""By method, the credentials that it opens to, and the scope that the others are told to lack."""


def test_every_method_declares_its_scope() -> None:
    """No method of any service is without a scope, or with one that nobody could have."""
    for method in METHODS:
        declared = list(method.GetOptions().Extensions[scope])
        assert declared, f"{method.full_name} declares no scope"
        assert set(declared) <= {"transactions.readonly", "transactions", "accounts.readonly", "accounts", "admin"}
        assert declared_scopes(f"{method.containing_service.full_name}/{method.name}") == tuple(declared)


def test_the_table_has_every_method() -> None:
    """A method that is new has to say here to whom it opens."""
    assert OUTCOMES.keys() == {method.full_name for method in METHODS}


@pytest.mark.parametrize("method", ["grpc.health.v1.Health/Check"])
def test_a_method_without_a_scope_is_not_served(method: str) -> None:
    """A method whose contract declares nothing is refused as a mistake, not opened to everybody."""
    with pytest.raises(AssertionError, match=method):
        declared_scopes(method)


def test_a_wider_scope_includes_the_narrower() -> None:
    """Each scope is enough for itself, `admin` for each, and a scope for its own readonly only."""
    includes = {(wide, narrow) for narrow, sufficient in SUFFICIENT.items() for wide in sufficient if wide != narrow}
    assert includes == {
        ("transactions", "transactions.readonly"),
        ("accounts", "accounts.readonly"),
        *(("admin", narrow) for narrow in ("transactions", "transactions.readonly", "accounts", "accounts.readonly")),
    }
    assert all(each in sufficient for each, sufficient in SUFFICIENT.items())


async def is_let_in(server: Server, method: MethodDescriptor, metadata: tuple[tuple[str, str], ...]) -> str | None:
    """The scope that a caller is told to lack, or None for one who is let in: what comes then is of the request."""
    try:
        await call_method(server.channel, method, metadata)
    except grpc.aio.AioRpcError as error:
        refusal = read_refusal(error)
        if refusal.reason != "SCOPE_MISSING":
            assert refusal.code is not grpc.StatusCode.UNAUTHENTICATED
            return None
        assert refusal.verdict == ("PERMISSION_DENIED", "SCOPE_MISSING")
        assert refusal.message == f"the credential lacks the scope {refusal.metadata['scope']}"
        return refusal.metadata["scope"]
    return None


@only_sqlite
async def test_who_may_call_what(server: Server) -> None:
    """Each credential opens the methods of its scopes, before anything is said of the request, and no others."""
    tenant_number = await server.create_tenant("house")
    for name, scopes in CREDENTIALS.items():
        client = await server.client(tenant_number, scopes=scopes)
        for method in METHODS:
            opens_to, lacking = OUTCOMES[method.full_name]
            expected = None if name in opens_to else lacking
            assert await is_let_in(server, method, client.metadata) == expected, (name, method.full_name)


async def test_a_refused_call_has_no_effect(server: Server) -> None:
    """A credential that may only read posts nothing, creates nothing, changes nothing, and reads on."""
    tenant_number = await server.create_tenant("house")
    owner = await server.client(tenant_number)
    await owner.create_account("acme")
    await owner.post("acme", Transaction.GRANT, "5")
    reader = await server.client(tenant_number, scopes={"transactions.readonly", "accounts.readonly"})
    before = (await owner.balance(), await owner.history())
    for call in (
        reader.post("acme", Transaction.GRANT, "1", request_id="once"),
        reader.create_account("other"),
        reader.ledger.CreateTransaction(CreateTransactionRequest(), metadata=reader.metadata),
    ):
        assert (await refusal_of(call)).verdict == ("PERMISSION_DENIED", "SCOPE_MISSING")
    assert (await reader.balance(), await reader.history()) == before
    await owner.post("acme", Transaction.GRANT, "1", request_id="once")
    await owner.create_account("other")


@only_sqlite
async def test_a_binding_stays_beside_the_scope(server: Server) -> None:
    """A scope widens no binding: a bound key is told its scope first, then its account."""
    tenant_number = await server.create_tenant("house")
    owner = await server.client(tenant_number)
    for account_id in ("mine", "theirs"):
        await owner.create_account(account_id)
    for scopes, reason in (({"accounts"}, "SCOPE_MISSING"), ({"admin"}, "ACCOUNT_NOT_PERMITTED")):
        bound = await server.client(tenant_number, account_id="mine", scopes=scopes)
        assert (await refusal_of(bound.post("theirs", Transaction.GRANT, "1"))).reason == reason


@only_sqlite
async def test_teable_is_told_its_space(server: Server) -> None:
    """Teable's refusal names the space that was asked for; a request that can't be read names none."""
    client = await server.client(await server.create_tenant("house"), scopes={"accounts"})
    call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = server.channel.unary_unary(
        "/daybook.facades.teable.v1.Billing/GetSpaceCreditHistory"
    )
    sound = GetSpaceCreditHistoryRequest(space_id="spcX").SerializeToString()
    for request, words in ((sound, "not allowed to operate space|read on spcX"), (b"\xff", "transactions.readonly")):
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await call(request, metadata=client.metadata)
        assert read_refusal(refusal.value).reason == "SCOPE_MISSING"
        assert words in str(dict(refusal.value.trailing_metadata())["x-error-body"])
