"""Scopes: every method declares its own. Who may call what stands in test_access.py."""

from __future__ import annotations

import grpc
import pytest
from daybook.facades.teable.v1.billing_service_pb2 import GetSpaceCreditHistoryRequest
from daybook.v1.ledger_service_pb2 import CreateTransactionRequest
from daybook.v1.scope_pb2 import scope
from daybook.v1.transaction_pb2 import Transaction

from server.ledger.access import SUFFICIENT
from server.transport.scopes import declared_scopes
from tests.support.callers import Server
from tests.support.markers import only_sqlite
from tests.support.methods import METHODS
from tests.support.refusals import read_refusal, refusal_of


def test_every_method_declares_its_scope() -> None:
    """No method of any service is without a scope, or with one that nobody could have."""
    for method in METHODS:
        declared = list(method.GetOptions().Extensions[scope])
        assert declared, f"{method.full_name} declares no scope"
        assert set(declared) <= {"transactions.readonly", "transactions", "accounts.readonly", "accounts", "admin"}
        assert declared_scopes(f"{method.containing_service.full_name}/{method.name}") == tuple(declared)


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
