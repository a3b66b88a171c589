"""Who is calling and what they may touch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.ledger.errors import AccountNotPermitted, ScopeMissing
from server.ledger.names import ALL_ACCOUNTS, account_name

ADMIN = "admin"
"""The scope of those who run the ledger. It includes every other."""

SUFFICIENT: Mapping[str, frozenset[str]] = {
    "transactions.readonly": frozenset({"transactions.readonly", "transactions", ADMIN}),
    "transactions": frozenset({"transactions", ADMIN}),
    "accounts.readonly": frozenset({"accounts.readonly", "accounts", ADMIN}),
    "accounts": frozenset({"accounts", ADMIN}),
    ADMIN: frozenset({ADMIN}),
}
"""Every scope, each with those that include it. protos/daybook/v1/scope.proto says what they mean."""
DEFAULT_SCOPES = ("transactions", "accounts")
"""Those of a key for which nobody chose any: everything but running the ledger."""


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

    def require_scope(self, scopes: Sequence[str], request: object = None) -> None:
        """Raises ScopeMissing, for the first, unless the credential has one of the scopes or one that includes it.

        `request` is what the credential is needed for.
        """
        if all(self.scopes.isdisjoint(SUFFICIENT[scope]) for scope in scopes):
            raise ScopeMissing(scopes[0], request)

    def require_tenant(self) -> None:
        """Raises AccountNotPermitted unless the caller may touch all of its tenant."""
        if self.account_id is not None:
            raise AccountNotPermitted(account_name(ALL_ACCOUNTS))
