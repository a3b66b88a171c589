"""Who may touch what."""

from __future__ import annotations

import pytest

from server.ledger.access import Caller
from server.ledger.errors import AccountNotPermitted


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
