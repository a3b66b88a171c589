"""Callers and their permissions; API keys and their validity.

A key has the form `{id}.{secret}`. Only a SHA-256 of the secret is stored. The secret is 256
random bits, so a slow hash would add no protection.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from server.ledger.errors import AccountNotPermitted, ScopeMissing
from server.ledger.instants import Instant
from server.ledger.names import ALL_ACCOUNTS, RandomBytes, account_name
from server.ledger.paging import ApiKeyKey

ADMIN = "admin"
"""The scope of operators. It includes every other scope."""

SUFFICIENT: Mapping[str, frozenset[str]] = {
    "transactions.readonly": frozenset({"transactions.readonly", "transactions", ADMIN}),
    "transactions": frozenset({"transactions", ADMIN}),
    "accounts.readonly": frozenset({"accounts.readonly", "accounts", ADMIN}),
    "accounts": frozenset({"accounts", ADMIN}),
    ADMIN: frozenset({ADMIN}),
}
"""Each scope, with the scopes that include it. protos/daybook/v1/scope.proto defines them."""
DEFAULT_SCOPES = ("transactions", "accounts")
"""The scopes of a key that is created without any: all but `admin`."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The holder of a valid credential."""

    tenant_number: int
    tenant_uid: str
    credential_id: str
    account_id: str | None = None
    """The account to which the credential is bound; None for the whole tenant."""
    scopes: frozenset[str] = frozenset()

    def require_account(self, account_id: str) -> None:
        """Raises AccountNotPermitted unless the caller may access this account.

        Checked before the account is read, so that a bound credential cannot learn which other
        accounts exist.
        """
        if self.account_id is not None and self.account_id != account_id:
            raise AccountNotPermitted(account_name(account_id))

    def require_scope(self, scopes: Sequence[str], request: object = None) -> None:
        """Raises ScopeMissing unless the credential has one of the scopes or one that includes it.

        The error names the first scope and carries the request.
        """
        for scope in scopes:
            if not self.scopes.isdisjoint(SUFFICIENT.get(scope, ())):
                return
        raise ScopeMissing(scopes[0], request)

    def require_grant(self, scopes: Collection[str]) -> None:
        """Raises ScopeMissing for a scope that the caller can't grant: its own scopes do not include it."""
        for scope in scopes:
            self.require_scope([scope])

    def require_tenant(self) -> None:
        """Raises AccountNotPermitted unless the caller may access its whole tenant."""
        if self.account_id is not None:
            raise AccountNotPermitted(account_name(ALL_ACCOUNTS))


@dataclass(frozen=True, slots=True)
class ApiKeyRecord:
    """A stored API key, with its tenant and the account to which it is bound."""

    id: str
    secret_hash: bytes
    tenant_number: int
    tenant_uid: str
    account_id: str | None
    scopes: str
    """Separated by spaces."""
    display_name: str
    create_time: Instant
    expire_time: Instant | None
    revoke_time: Instant | None
    last_use_time: Instant | None

    @property
    def key(self) -> ApiKeyKey:
        """The position in a list."""
        return ApiKeyKey(self.create_time, self.id)


@dataclass(frozen=True, slots=True)
class NewApiKey:
    """A new key, or a key with a new secret. The text is shown once and is not stored."""

    key_id: str
    text: str = field(repr=False)
    secret_hash: bytes


def new_api_key(random_bytes: RandomBytes, key_id: str | None = None) -> NewApiKey:
    """Makes a secret of 256 random bits, and an id of 80 unless the key has one."""
    if key_id is None:
        key_id = random_bytes(10).hex()
    secret = base64.urlsafe_b64encode(random_bytes(32)).decode().rstrip("=")
    return NewApiKey(key_id, f"{key_id}.{secret}", hash_secret(secret))


def hash_secret(secret: str) -> bytes:
    """The stored hash of a secret: SHA-256."""
    return hashlib.sha256(secret.encode()).digest()


def is_active(revoke_time: Instant | None, expire_time: Instant | None, now: Instant) -> bool:
    """Whether a key is valid: not revoked, and before its expire_time.

    A revoke_time after `now` counts too: it was set by a clock that is ahead.
    """
    return revoke_time is None and (expire_time is None or now < expire_time)


RETIRED_SECRETS_MAX = 4
"""The largest number of valid secrets of a key beside its newest."""


class RetiredSecret(NamedTuple):
    """A secret that a newer one has replaced. It is valid until its expire_time."""

    secret_hash: bytes
    expire_time: Instant


def retire(
    secret_hash: bytes, older: Collection[RetiredSecret], *, now: Instant, until: Instant
) -> list[RetiredSecret]:
    """The secrets that stay valid, until `until` at most, when a key's `secret_hash` is replaced.

    Older secrets keep an earlier expire_time. At most RETIRED_SECRETS_MAX stay: those that expire last.
    """
    shortened = [RetiredSecret(each.secret_hash, min(each.expire_time, until)) for each in older]
    valid = [each for each in (RetiredSecret(secret_hash, until), *shortened) if each.expire_time > now]
    return sorted(valid, key=lambda each: -each.expire_time)[:RETIRED_SECRETS_MAX]
