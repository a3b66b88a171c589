"""OAuth2 access tokens: JWTs (RFC 7519, RFC 9068) signed by one configured issuer.

PyJWT verifies the signature, the issuer and the audience. The times are checked here, against
the clock of the ledger. Only the settings determine the algorithms and the source of the keys:
the headers `jku`, `jwk` and `x5u` of a token are ignored.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jwt
import structlog
from jwt import PyJWK, PyJWTError

from server.ledger.access import SUFFICIENT, Caller
from server.ledger.errors import CredentialInvalid
from server.ledger.instants import LATEST, SECOND, Clock, Instant
from server.ledger.names import ALL_ACCOUNTS, is_account_id
from server.store.credentials import CredentialStore, TenantRecord
from server.transport.auth import Opened
from server.transport.signing_keys import NoSuchKey, SigningKeys

log = structlog.get_logger(__name__)

TYPES = ("jwt", "at+jwt", "application/at+jwt")
"""The valid values of the header `typ`, in lower case. It may be missing."""

_BASE64URL = re.compile(r"[A-Za-z0-9_-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class TokenRules:
    """The rules for valid tokens, and the names of the claims with tenant, scopes and account."""

    issuer: str
    audience: str
    algorithms: tuple[str, ...]
    tenant_claim: str
    """The name of the claim with the slug of the tenant."""
    scope_claim: str
    account_claim: str | None
    """The name of the claim with the account that a token is bound to; None if tokens are never bound."""
    clock_skew: Instant
    """Maximum difference between the issuer's clock and the ledger's, in microseconds."""


class _Refused(Exception):
    """A token is invalid. The message is a fixed text for the log."""


class AccessTokens:
    """Authenticates access tokens."""

    def __init__(self, rules: TokenRules, keys: SigningKeys, store: CredentialStore, clock: Clock) -> None:
        self._rules = rules
        self._keys = keys
        self._store = store
        self._clock = clock

    async def open(self, token: str) -> Opened:
        """Verifies a token. Raises CredentialInvalid, or ServiceUnavailable if the issuer's keys can't be fetched.

        The reason is logged at level debug and not sent to the caller.
        """
        try:
            return await self._open(token)
        except (PyJWTError, NoSuchKey, _Refused) as error:
            # Messages of PyJWT contain parts of the token.
            problem = type(error).__name__ if isinstance(error, PyJWTError) else str(error)
            log.debug("access token refused", problem=problem)
            raise CredentialInvalid from None

    async def _open(self, token: str) -> Opened:
        algorithm, key_id = self._read_header(token)
        claims = self._verify(token, await self._keys.find(algorithm, key_id))
        expire_time = self._check_times(claims)
        tenant = await self._find_tenant(claims)
        caller = Caller(
            tenant.number,
            tenant.uid,
            _credential_id(tenant, _read_text(claims, "sub")),
            self._read_account(claims),
            _read_scopes(claims.get(self._rules.scope_claim)),
        )
        return Opened(caller, expire_time)

    def _read_header(self, token: str) -> tuple[str, str | None]:
        """The algorithm and the key id in the header of a token."""
        header = jwt.get_unverified_header(token)
        algorithm = header.get("alg")
        if algorithm not in self._rules.algorithms:
            raise _Refused("alg is not allowed")
        if "typ" in header and str(header["typ"]).lower() not in TYPES:
            raise _Refused("typ is not the type of an access token")
        # PyJWT accepts padding here, which would give one token two encodings.
        if _BASE64URL.fullmatch(token.rpartition(".")[2]) is None:
            raise _Refused("the signature is not base64url")
        return algorithm, header.get("kid")

    def _verify(self, token: str, key: PyJWK) -> dict[str, Any]:
        """The claims of a token that was signed with this key, by this issuer, for this audience."""
        return jwt.decode(
            token,
            key,
            algorithms=[key.algorithm_name],
            issuer=self._rules.issuer,
            audience=self._rules.audience,
            options={
                "require": ["exp", "iss", "aud", "sub"],
                # PyJWT can use only the machine's clock.
                "verify_exp": False,
                "verify_nbf": False,
                "verify_iat": False,
                "enforce_minimum_key_length": True,
            },
        )

    def _check_times(self, claims: Mapping[str, Any]) -> Instant:
        """The expire_time of a token, including the clock skew. Raises _Refused if a time is out of range."""
        now, skew = self._clock(), self._rules.clock_skew
        expire_time = _read_time(claims, "exp") + skew
        if now >= expire_time:
            raise _Refused("exp is in the past")
        for name in ("nbf", "iat"):
            if name in claims and now < _read_time(claims, name) - skew:
                raise _Refused(f"{name} is in the future")
        return expire_time

    async def _find_tenant(self, claims: Mapping[str, Any]) -> TenantRecord:
        tenant = await self._store.tenant(_read_text(claims, self._rules.tenant_claim))
        if tenant is None:
            raise _Refused("the tenant does not exist")
        return tenant

    def _read_account(self, claims: Mapping[str, Any]) -> str | None:
        """The account to which a token is bound; None for all accounts, which must be stated explicitly."""
        if self._rules.account_claim is None:
            return None
        account_id = _read_text(claims, self._rules.account_claim)
        if account_id == ALL_ACCOUNTS:
            return None
        if not is_account_id(account_id):
            raise _Refused("the account id is malformed")
        return account_id


def _read_time(claims: Mapping[str, Any], name: str) -> Instant:
    """Reads a NumericDate: seconds, perhaps with a fraction."""
    value = claims[name]
    # The comparison also rejects NaN and the infinities, which Python's JSON parser accepts.
    if type(value) not in (int, float) or not 0 <= value <= LATEST // SECOND:
        raise _Refused(f"{name} is not a time")
    return int(value * SECOND)


def _read_text(claims: Mapping[str, Any], name: str) -> str:
    value = claims.get(name)
    # Databases reject NUL and lone surrogates.
    if not isinstance(value, str) or not value or not value.isprintable():
        raise _Refused(f"{name} is missing or not a text")
    return value


def _read_scopes(value: object) -> frozenset[str]:
    """The scopes of Daybook in a claim, which is a list or a text with spaces. Other scopes are ignored."""
    match value:
        case None:
            words: list[object] = []
        case str():
            words = [*value.split(" ")]
        case list():
            words = value
        case _:
            raise _Refused("the scopes are not a text or a list")
    return frozenset(word for word in words if isinstance(word, str) and word in SUFFICIENT)


def _credential_id(tenant: TenantRecord, subject: str) -> str:
    """The credential id of a token's subject, the same for all of its tokens. It never equals an API key's id."""
    return f"oauth2:{hashlib.sha256(f'{tenant.number} {subject}'.encode()).hexdigest()[:32]}"
