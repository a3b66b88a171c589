"""Scopes: every method declares its own. test_access.py has the outcomes of all credentials."""

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
    """Every method of every service declares scopes, all of them known ones."""
    for method in METHODS:
        declared = list(method.GetOptions().Extensions[scope])
        assert declared, f"{method.full_name} declares no scope"
        assert set(declared) <= {"transactions.readonly", "transactions", "accounts.readonly", "accounts", "admin"}
        assert declared_scopes(f"{method.containing_service.full_name}/{method.name}") == tuple(declared)


@pytest.mark.parametrize("method", ["grpc.health.v1.Health/Check"])
def test_method_without_a_scope_is_not_served(method: str) -> None:
    """A method whose contract declares no scope fails an assertion, so it can't be open to all callers."""
    with pytest.raises(AssertionError, match=method):
        declared_scopes(method)


def test_wider_scope_includes_the_narrower() -> None:
    """Each scope suffices for itself, `admin` for every scope, and a scope for its own readonly variant."""
    includes = {(wide, narrow) for narrow, sufficient in SUFFICIENT.items() for wide in sufficient if wide != narrow}
    assert includes == {
        ("transactions", "transactions.readonly"),
        ("accounts", "accounts.readonly"),
        *(("admin", narrow) for narrow in ("transactions", "transactions.readonly", "accounts", "accounts.readonly")),
    }
    assert all(each in sufficient for each, sufficient in SUFFICIENT.items())


async def test_refused_call_has_no_effect(server: Server) -> None:
    """A read-only credential posts, creates and changes nothing, and can still read."""
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
async def test_scope_widens_no_binding(server: Server) -> None:
    """A scope doesn't widen a binding: a bound key needs first the scope, then the account."""
    tenant_number = await server.create_tenant("house")
    owner = await server.client(tenant_number)
    for account_id in ("mine", "theirs"):
        await owner.create_account(account_id)
    for scopes, reason in (({"accounts"}, "SCOPE_MISSING"), ({"admin"}, "ACCOUNT_NOT_PERMITTED")):
        bound = await server.client(tenant_number, account_id="mine", scopes=scopes)
        assert (await refusal_of(bound.post("theirs", Transaction.GRANT, "1"))).reason == reason


@only_sqlite
async def test_teable_refusal_names_the_space(server: Server) -> None:
    """Teable's refusal names the requested space; the refusal of a malformed request names none."""
    client = await server.client(await server.create_tenant("house"), scopes={"accounts"})
    call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = server.channel.unary_unary(
        "/daybook.facades.teable.v1.Billing/GetSpaceCreditHistory"
    )
    sound = GetSpaceCreditHistoryRequest(space_id="spcX").SerializeToString()
    for request, text in ((sound, "not allowed to operate space|read on spcX"), (b"\xff", "transactions.readonly")):
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await call(request, metadata=client.metadata)
        assert read_refusal(refusal.value).reason == "SCOPE_MISSING"
        assert text in str(dict(refusal.value.trailing_metadata())["x-error-body"])
