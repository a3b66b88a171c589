"""Who is calling and what they may touch; what an API key is made of and how long it opens.

A key reads `{id}.{secret}`. Only a SHA-256 of the secret is stored: the secret is 256
random bits, so there is nothing to guess that a slow hash would protect.
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
        for scope in scopes:
            if not self.scopes.isdisjoint(SUFFICIENT.get(scope, ())):
                return
        raise ScopeMissing(scopes[0], request)

    def require_grant(self, scopes: Collection[str]) -> None:
        """Raises ScopeMissing for a scope that the caller can't hand out, since its own don't include it."""
        for scope in scopes:
            self.require_scope([scope])

    def require_tenant(self) -> None:
        """Raises AccountNotPermitted unless the caller may touch all of its tenant."""
        if self.account_id is not None:
            raise AccountNotPermitted(account_name(ALL_ACCOUNTS))


@dataclass(frozen=True, slots=True)
class ApiKeyRecord:
    """An API key as it is stored, with its tenant and the account to which it is bound."""

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
    """A key just made, or its new secret. The text is shown once and stored nowhere."""

    key_id: str
    text: str = field(repr=False)
    secret_hash: bytes


def new_api_key(random_bytes: RandomBytes, key_id: str | None = None) -> NewApiKey:
    """Makes an API key out of 80 random bits for the id, unless it has one, and 256 for the secret."""
    if key_id is None:
        key_id = random_bytes(10).hex()
    secret = base64.urlsafe_b64encode(random_bytes(32)).decode().rstrip("=")
    return NewApiKey(key_id, f"{key_id}.{secret}", hash_secret(secret))


def hash_secret(secret: str) -> bytes:
    """What is stored of a secret."""
    return hashlib.sha256(secret.encode()).digest()


def is_active(revoke_time: Instant | None, expire_time: Instant | None, now: Instant) -> bool:
    """Whether a key opens: until the very instant of its expiry, and never once it is revoked.

    A revoke_time that is later than now was set by a clock that is ahead.
    """
    return revoke_time is None and (expire_time is None or now < expire_time)


RETIRED_SECRETS_MAX = 4
"""How many secrets of a key are good beside its newest."""


class RetiredSecret(NamedTuple):
    """A secret that a newer one has replaced, and until when it is good."""

    secret_hash: bytes
    expire_time: Instant


def retire(
    secret_hash: bytes, older: Collection[RetiredSecret], *, now: Instant, until: Instant
) -> list[RetiredSecret]:
    """Which secrets stay good, until when at most, as a key gets a new one in the place of `secret_hash`.

    Those that were retired before keep their time if it ends sooner. Beyond RETIRED_SECRETS_MAX
    those go that end first.
    """
    shortened = [RetiredSecret(each.secret_hash, min(each.expire_time, until)) for each in older]
    good = [each for each in (RetiredSecret(secret_hash, until), *shortened) if each.expire_time > now]
    return sorted(good, key=lambda each: -each.expire_time)[:RETIRED_SECRETS_MAX]
