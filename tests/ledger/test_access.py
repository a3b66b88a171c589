"""Who may touch what."""

from __future__ import annotations

import pytest

from server.ledger.access import RETIRED_SECRETS_MAX, Caller, RetiredSecret, is_active, retire
from server.ledger.errors import AccountNotPermitted, ScopeMissing
from server.ledger.instants import Instant


def caller(account_id: str | None) -> Caller:
    """A caller of tenant 1, bound to an account if one is named."""
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
def test_a_bound_credential_is_for_its_account_only(bound_to: str | None, account_id: str, permitted: bool) -> None:
    """A credential bound to an account opens exactly that account; an unbound one opens all."""
    if permitted:
        caller(bound_to).require_account(account_id)
        return
    with pytest.raises(AccountNotPermitted) as refusal:
        caller(bound_to).require_account(account_id)
    assert refusal.value.metadata == {"account": f"accounts/{account_id}"}


def test_the_refusal_does_not_tell_the_account_of_the_credential() -> None:
    """A refusal names the account that was asked for, not the one the credential is bound to."""
    with pytest.raises(AccountNotPermitted) as refusal:
        caller("secret-neighbour").require_account("other")
    assert "secret-neighbour" not in refusal.value.message
    assert "accounts/other" in refusal.value.message


def test_an_unbound_credential_is_for_the_whole_tenant() -> None:
    """A credential that is bound to no account may list the tenant."""
    caller(None).require_tenant()


def test_a_bound_credential_is_not_for_the_whole_tenant() -> None:
    """A credential that is bound to an account may not list the tenant."""
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
    """One of several scopes, or one that includes it, is enough; else the first is told, with the request."""
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
        # The clock of whoever revoked it was ahead.
        (101, None, False),
        (99, 101, False),
    ],
)
def test_when_a_key_opens(revoke_time: Instant | None, expire_time: Instant | None, active: bool) -> None:
    """At the instant 100 a key opens that is not revoked and expires later, if ever."""
    assert is_active(revoke_time, expire_time, 100) is active


@pytest.mark.parametrize(
    ("older", "until", "good"),
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
def test_which_secrets_stay_good(older: list[tuple[str, int]], until: int, good: list[tuple[str, int]]) -> None:
    """At the instant 100 the secret of before stays good as long as is said, and older ones no longer than it."""
    assert RETIRED_SECRETS_MAX == 4
    kept = retire(b"new", [RetiredSecret(name.encode(), time) for name, time in older], now=100, until=until)
    assert [(each.secret_hash.decode(), each.expire_time) for each in kept] == good
