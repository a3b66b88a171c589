"""Who is calling and what they may touch."""

from __future__ import annotations

from dataclasses import dataclass

from server.ledger.errors import AccountNotPermitted, ScopeMissing
from server.ledger.names import ALL_ACCOUNTS, account_name

ADMIN = "admin"
"""The scope of those who run the ledger."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The holder of a valid credential."""

    tenant_number: int
    tenant_uid: str
    credential_id: str
    account_id: str | None = None
    """The account to which the credential is bound; None for all of the tenant."""
    scopes: frozenset[str] = frozenset()

    def require_account(self, account_id: str) -> None:
        """Raises AccountNotPermitted unless the caller may touch this account.

        Said before anyone looks whether the account exists, so that a bound credential
        learns nothing about its neighbours.
        """
        if self.account_id is not None and self.account_id != account_id:
            raise AccountNotPermitted(account_name(account_id))

    def require_scope(self, scope: str) -> None:
        """Raises ScopeMissing unless the credential has the scope."""
        if scope not in self.scopes:
            raise ScopeMissing(scope)

    def require_tenant(self) -> None:
        """Raises AccountNotPermitted unless the caller may touch all of its tenant."""
        if self.account_id is not None:
            raise AccountNotPermitted(account_name(ALL_ACCOUNTS))
