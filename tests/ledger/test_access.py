"""Permissions of callers, and the validity of API keys."""

from __future__ import annotations

import pytest

from server.ledger.access import RETIRED_SECRETS_MAX, Caller, RetiredSecret, is_active, retire
from server.ledger.errors import AccountNotPermitted, ScopeMissing
from server.ledger.instants import Instant


def caller(account_id: str | None) -> Caller:
    """A caller of tenant 1, bound to an account unless that is None."""
    return Caller(tenant_number=1, tenant_uid="uid", credential_id="key", account_id=account_id)


@pytest.mark.parametrize(
    ("bound_to", "account_id", "permitted"),
    [
        (None, "acme", True),
        (None, "other", True),
        ("acme", "acme", True),
        ("acme", "other", False),
        ("acme", "Acme", False),
        ("acme", "acme2", False),
        ("acme2", "acme", False),
        ("acme", "", False),
        ("acme", "-", False),
    ],
)
def test_a_bound_credential_may_access_its_account_only(bound_to: str | None, account_id: str, permitted: bool) -> None:
    """A credential bound to an account gives access to this account only; an unbound one, to all."""
    if permitted:
        caller(bound_to).require_account(account_id)
        return
    with pytest.raises(AccountNotPermitted) as refusal:
        caller(bound_to).require_account(account_id)
    assert refusal.value.metadata == {"account": f"accounts/{account_id}"}


def test_the_refusal_hides_the_account_of_the_credential() -> None:
    """A refusal names the requested account and not the account to which the credential is bound."""
    with pytest.raises(AccountNotPermitted) as refusal:
        caller("secret-neighbour").require_account("other")
    assert "secret-neighbour" not in refusal.value.message
    assert "accounts/other" in refusal.value.message


def test_an_unbound_credential_may_access_the_whole_tenant() -> None:
    """An unbound credential may access the whole tenant."""
    caller(None).require_tenant()


def test_a_bound_credential_may_not_access_the_whole_tenant() -> None:
    """A credential that is bound to an account may not access the whole tenant."""
    with pytest.raises(AccountNotPermitted) as refusal:
        caller("acme").require_tenant()
    assert refusal.value.metadata == {"account": "accounts/-"}


@pytest.mark.parametrize(
    ("held", "required", "lacking"),
    [
        ({"transactions"}, ["transactions.readonly"], None),
        ({"transactions.readonly"}, ["transactions"], "transactions"),
        ({"accounts"}, ["transactions.readonly"], "transactions.readonly"),
        ({"accounts"}, ["transactions.readonly", "accounts.readonly"], None),
        (set(), ["transactions.readonly", "accounts.readonly"], "transactions.readonly"),
        ({"admin"}, ["accounts"], None),
        ({"accounts"}, ["admin"], "admin"),
        ({"unknown"}, ["unknown"], "unknown"),
    ],
)
def test_one_sufficient_scope_is_enough(held: set[str], required: list[str], lacking: str | None) -> None:
    """One of the required scopes, or a scope that includes it, is enough. A refusal has the first and the request."""
    holder = Caller(tenant_number=1, tenant_uid="uid", credential_id="key", scopes=frozenset(held))
    if lacking is None:
        holder.require_scope(required)
        return
    with pytest.raises(ScopeMissing) as refusal:
        holder.require_scope(required, "the request")
    assert refusal.value.metadata == {"scope": lacking}
    assert refusal.value.request == "the request"


@pytest.mark.parametrize(
    ("revoke_time", "expire_time", "active"),
    [
        (None, None, True),
        (None, 101, True),
        (None, 100, False),
        (None, 99, False),
        (99, None, False),
        (100, None, False),
        # Revoked by a server whose clock was ahead.
        (101, None, False),
        (99, 101, False),
    ],
)
def test_a_key_is_active_until_it_expires_or_is_revoked(
    revoke_time: Instant | None, expire_time: Instant | None, active: bool
) -> None:
    """At the instant 100 a key is active if it is not revoked and does not expire before 101."""
    assert is_active(revoke_time, expire_time, 100) is active


@pytest.mark.parametrize(
    ("older", "until", "valid"),
    [
        ([], 100, []),
        ([], 101, [("new", 101)]),
        ([("a", 150)], 200, [("new", 200), ("a", 150)]),
        ([("a", 250)], 200, [("new", 200), ("a", 200)]),
        ([("a", 100), ("b", 101)], 200, [("new", 200), ("b", 101)]),
        ([("a", 150)], 100, []),
        (
            [("a", 110), ("b", 140), ("c", 120), ("d", 130)],
            200,
            [("new", 200), ("b", 140), ("d", 130), ("c", 120)],
        ),
    ],
)
def test_retired_secrets_stay_valid_for_a_bounded_time(
    older: list[tuple[str, int]], until: int, valid: list[tuple[str, int]]
) -> None:
    """A replaced secret stays valid until `until`; older secrets at most as long. At most 4 are kept."""
    assert RETIRED_SECRETS_MAX == 4
    retired = retire(b"new", [RetiredSecret(name.encode(), time) for name, time in older], now=100, until=until)
    assert [(each.secret_hash.decode(), each.expire_time) for each in retired] == valid
