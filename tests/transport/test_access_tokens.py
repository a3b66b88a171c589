"""Access tokens: which are valid, the caller that they identify, and every way in which a token can be invalid."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Callable, Iterator
from random import Random
from typing import Any

import pytest
import pytest_asyncio
import structlog
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from sqlalchemy import text

from server.book import Book, open_book
from server.ledger.access import Caller
from server.ledger.errors import CredentialInvalid, DaybookError
from server.ledger.instants import SECOND
from server.ledger.names import is_api_key_id
from server.transport.access_tokens import AccessTokens
from server.transport.auth import CREDENTIAL_CHARACTERS_MAX, KEY_CACHED_SECONDS_MAX, Authenticator, Scheme
from server.transport.signing_algorithms import KEY_TYPES
from server.transport.signing_keys import FETCH_AGAIN_SECONDS, SigningKeys
from tests.support.clock import NOON, Clock
from tests.support.databases import writing
from tests.support.identity_provider import (
    AUDIENCE,
    NAME,
    Key,
    claims_at,
    compact,
    ec_key,
    ed448_key,
    ed_key,
    hmac_with,
    jwk_set,
    rsa_key,
    rules,
    segment,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

NOW = NOON // SECOND
EC, ED, STRANGER = ec_key(), ed_key(), ec_key("stranger")
SKEW = 30
UID = "uid of house"


class Issuer:
    """An issuer as the server sees it: its keys, which a test may change, and a stopwatch that a test moves."""

    def __init__(self, book: Book, *keys: Key, **changes: Any) -> None:
        self.content = jwk_set(*keys)
        self.seconds = 0.0
        self.uses: list[str] = []
        self.tokens_rules = rules(**changes)
        signing_keys = SigningKeys(self._fetch, self.tokens_rules.algorithms, 300, lambda: self.seconds)
        tokens = AccessTokens(self.tokens_rules, signing_keys, book.credentials, book.clock)
        self.authenticator = Authenticator(
            book.credentials, book.clock, self.uses.append, lambda: self.seconds, tokens.open
        )

    async def _fetch(self) -> bytes:
        return self.content

    async def caller(self, token: str) -> Caller:
        """Returns the caller that a token identifies."""
        found = await self.authenticator.authenticate([("authorization", f"Bearer {token}")])
        assert found.scheme is Scheme.BEARER
        return found.caller

    async def outcome(self, token: str) -> str:
        """Returns `opens`, or the problem in the log. The error of the call is always the same."""
        with structlog.testing.capture_logs() as logs:
            try:
                await self.caller(token)
            except CredentialInvalid as error:
                refusal = error
            else:
                return "opens"
        assert (refusal.message, refusal.metadata) == ("the credential is not valid", {})
        assert refusal.__cause__ is None, "a traceback does not show the token"
        assert refusal.__suppress_context__ or refusal.__context__ is None, "nor does the context of the error"
        problems = [entry["problem"] for entry in logs if entry["event"] == "access token refused"]
        return str(problems[0]) if problems else "not a token"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def book(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Book]:
    """One ledger for all tests of this module, with the tenants `house` and `other`. Tests undo their changes."""
    url = f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('tokens')}/daybook.db"
    async with open_book(url, Clock(), Random(1).randbytes) as book:
        for slug in ("house", "other"):
            await book.credentials.create_tenant(
                slug=slug, uid=f"uid of {slug}", display_name=slug, create_time=book.clock()
            )
        yield book


@pytest.fixture
def clock(book: Book) -> Iterator[Clock]:
    """The ledger's clock, which a test may move."""
    assert isinstance(book.clock, Clock)
    yield book.clock
    book.clock.now = NOON


@pytest.fixture
def issuer(book: Book) -> Issuer:
    """An issuer with keys of every type, two of them RSA."""
    return Issuer(book, rsa_key(), rsa_key("rsa-2"), EC, ED)


def claims(**changes: Any) -> dict[str, Any]:
    """Returns the claims of a valid token of now, with changes."""
    return claims_at(NOW, **changes)


def signed(payload: bytes) -> str:
    """Returns a token with this payload."""
    return compact({"alg": "ES256", "kid": "ec"}, payload, EC.sign)


def headed(header: bytes) -> str:
    """Returns a token with this header."""
    return compact(header, claims(), EC.sign)


def resigned(token: str, change: Callable[[list[str]], list[str]]) -> str:
    """Returns a token with changed segments."""
    return ".".join(change(token.split(".")))


def flipped(part: str, place: int) -> str:
    """Returns a segment with one bit flipped."""
    content = bytearray(base64.urlsafe_b64decode(part + "=="))
    content[place] ^= 1
    return segment(bytes(content))


def public_pem(key: Key) -> bytes:
    """Returns the public key as PEM."""
    pem: bytes = key.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem


def public_der(key: Key) -> bytes:
    """Returns the public key as DER."""
    der: bytes = key.private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return der


def mac(secret: bytes, algorithm: str = "HS256") -> str:
    """Returns a token whose signature is an HMAC."""
    return compact({"alg": algorithm, "kid": "rsa", "typ": "JWT"}, claims(), hmac_with(secret))


def unsigned(algorithm: object) -> str:
    """Returns a token without a signature."""
    return compact({"alg": algorithm, "kid": "rsa", "typ": "JWT"}, claims(), lambda _: b"")


GOOD: dict[str, Callable[[], str]] = {
    "RS256": lambda: rsa_key().token(claims()),
    "the other RSA key": lambda: rsa_key("rsa-2").token(claims()),
    "ES256": lambda: EC.token(claims()),
    "EdDSA": lambda: ED.token(claims()),
    "no typ": lambda: EC.token(claims(), typ=None),
    "typ JWT": lambda: EC.token(claims(), typ="JWT"),
    "typ jwt": lambda: EC.token(claims(), typ="jwt"),
    "typ as a media type": lambda: EC.token(claims(), typ="application/at+jwt"),
    "typ in capitals": lambda: EC.token(claims(), typ="AT+JWT"),
    "no kid, and one key that fits": lambda: EC.token(claims(), kid=None),
    "addresses of keys, which are ignored": lambda: EC.token(
        claims(), jku="https://evil.example/jwks", x5u="https://evil.example/x5u", jwk=STRANGER.jwk, x5c=["x"]
    ),
    "one audience in a list": lambda: EC.token(claims(aud=[AUDIENCE])),
    "an audience among others": lambda: EC.token(claims(aud=["https://other.example", AUDIENCE])),
    "no iat": lambda: EC.token(claims(iat=None)),
    "times with fractions": lambda: EC.token(claims(iat=NOW - 0.5, nbf=NOW - 0.25, exp=NOW + 0.5)),
    "unknown claims": lambda: EC.token(claims(cnf={"jkt": "x"}, roles=["admin"], tenant_id=7)),
    "a subject with letters of any script": lambda: EC.token(claims(sub="Ада 🙂")),
}

BAD: dict[str, tuple[Callable[[], str], str]] = {
    # The algorithm.
    "none": (lambda: unsigned("none"), "alg is not allowed"),
    "None": (lambda: unsigned("None"), "alg is not allowed"),
    "nOnE": (lambda: unsigned("nOnE"), "alg is not allowed"),
    "NONE": (lambda: unsigned("NONE"), "alg is not allowed"),
    "none, with a good signature": (lambda: EC.token(claims(), alg="none"), "alg is not allowed"),
    "no alg": (lambda: EC.token(claims(), alg=None), "alg is not allowed"),
    "an empty alg": (lambda: unsigned(""), "alg is not allowed"),
    "alg null": (lambda: headed(b'{"alg":null,"kid":"ec"}'), "alg is not allowed"),
    "alg in a list": (lambda: unsigned(["ES256"]), "alg is not allowed"),
    "alg in lower case": (lambda: EC.token(claims(), alg="es256"), "alg is not allowed"),
    "HMAC with the public key as PEM": (lambda: mac(public_pem(rsa_key())), "alg is not allowed"),
    "HMAC with the public key as PEM, stripped": (lambda: mac(public_pem(rsa_key()).strip()), "alg is not allowed"),
    "HMAC with the public key as DER": (lambda: mac(public_der(rsa_key())), "alg is not allowed"),
    "HMAC with the public key as JWK": (lambda: mac(json.dumps(rsa_key().jwk).encode()), "alg is not allowed"),
    "HMAC with the JWK Set": (lambda: mac(jwk_set(rsa_key())), "alg is not allowed"),
    "HMAC with the modulus": (lambda: mac(rsa_key().jwk["n"].encode()), "alg is not allowed"),
    "HMAC with nothing": (lambda: mac(b""), "alg is not allowed"),
    "HMAC that says RS256": (lambda: mac(public_pem(rsa_key()), "RS256"), "InvalidSignatureError"),
    "HMAC that says ES256": (
        lambda: compact({"alg": "ES256", "kid": "ec"}, claims(), hmac_with(public_pem(EC))),
        "InvalidSignatureError",
    ),
    "an algorithm that is not allowed": (
        lambda: Key("rsa", "RS512", rsa_key().private).token(claims()),
        "alg is not allowed",
    ),
    "PSS where PKCS 1 is allowed": (
        lambda: Key("rsa", "PS256", rsa_key().private).token(claims()),
        "alg is not allowed",
    ),
    "PSS that says RS256": (
        lambda: Key("rsa", "PS256", rsa_key().private).token(claims(), alg="RS256"),
        "InvalidSignatureError",
    ),
    "SHA-512 that says RS256": (
        lambda: Key("rsa", "RS512", rsa_key().private).token(claims(), alg="RS256"),
        "InvalidSignatureError",
    ),
    "another algorithm than the key's": (lambda: EC.token(claims(), kid="rsa"), "the issuer has no such key"),
    "a signature with padding": (lambda: EC.token(claims()) + "==", "the signature is not base64url"),
    # The key.
    "an unknown kid": (lambda: STRANGER.token(claims()), "the issuer has no such key"),
    "another's key by a known kid": (lambda: STRANGER.token(claims(), kid="ec"), "InvalidSignatureError"),
    "another of the issuer's keys": (lambda: rsa_key().token(claims(), kid="rsa-2"), "InvalidSignatureError"),
    "no kid, and two keys that fit": (lambda: rsa_key().token(claims(), kid=None), "more than one key matches"),
    "an empty kid": (lambda: EC.token(claims(), kid=""), "the issuer has no such key"),
    "a kid in another case": (lambda: EC.token(claims(), kid="EC"), "the issuer has no such key"),
    "a kid that is a path": (lambda: EC.token(claims(), kid="../../../../dev/null"), "the issuer has no such key"),
    "a kid that is SQL": (lambda: EC.token(claims(), kid="x' UNION SELECT 'ec"), "the issuer has no such key"),
    "a kid that is a number": (lambda: EC.token(claims(), kid=7), "InvalidTokenError"),
    "a kid that is a list": (lambda: EC.token(claims(), kid=["ec"]), "InvalidTokenError"),
    "a kid that is null": (lambda: headed(b'{"alg":"ES256","kid":null}'), "InvalidTokenError"),
    "a key of its own in the header": (
        lambda: STRANGER.token(claims(), kid=None, jwk=STRANGER.jwk),
        "InvalidSignatureError",
    ),
    "a key of its own by a known kid": (
        lambda: STRANGER.token(claims(), kid="ec", jwk={**STRANGER.jwk, "kid": "ec"}),
        "InvalidSignatureError",
    ),
    "where its own key is": (
        lambda: STRANGER.token(claims(), kid="ec", jku="https://evil.example/jwks"),
        "InvalidSignatureError",
    ),
    "where its own certificate is": (
        lambda: STRANGER.token(claims(), kid="ec", x5u="https://evil.example/x5u"),
        "InvalidSignatureError",
    ),
    "a certificate of its own": (
        lambda: STRANGER.token(claims(), kid="ec", x5c=[base64.b64encode(public_der(STRANGER)).decode()]),
        "InvalidSignatureError",
    ),
    # The header.
    "a critical extension": (lambda: EC.token(claims(), crit=["exp"], exp=NOW + 300), "InvalidTokenError"),
    "a critical extension that is not there": (lambda: EC.token(claims(), crit=["b64"]), "InvalidTokenError"),
    "crit that is empty": (lambda: EC.token(claims(), crit=[]), "InvalidTokenError"),
    "crit that is no list": (lambda: EC.token(claims(), crit="exp"), "InvalidTokenError"),
    "a payload that is not encoded": (lambda: EC.token(claims(), b64=False, crit=["b64"]), "DecodeError"),
    "typ of an ID token": (lambda: EC.token(claims(), typ="ID"), "typ is not the type of an access token"),
    "typ of a logout token": (lambda: EC.token(claims(), typ="logout+jwt"), "typ is not the type of an access token"),
    "typ of a proof of possession": (
        lambda: EC.token(claims(), typ="dpop+jwt"),
        "typ is not the type of an access token",
    ),
    "typ that is a number": (lambda: EC.token(claims(), typ=1), "typ is not the type of an access token"),
    "a header that is no JSON": (lambda: headed(b"{alg:ES256}"), "DecodeError"),
    "a header that is a list": (lambda: headed(b'["ES256"]'), "DecodeError"),
    "a header that is not UTF-8": (lambda: headed(b'{"alg":"ES256","kid":"\xff"}'), "DecodeError"),
    "a header that is deep": (lambda: headed(b'{"alg":"ES256","x":' + b"[" * 4000), "DecodeError"),
    "a header with a long number": (lambda: headed(b'{"alg":"ES256","x":' + b"9" * 5000 + b"}"), "DecodeError"),
    # The form.
    "another payload": (
        lambda: resigned(EC.token(claims()), lambda it: [it[0], EC.token(claims(tenant="other")).split(".")[1], it[2]]),
        "InvalidSignatureError",
    ),
    "one bit of the payload": (
        lambda: resigned(EC.token(claims()), lambda it: [it[0], flipped(it[1], 60), it[2]]),
        "InvalidSignatureError",
    ),
    "another header": (
        lambda: resigned(EC.token(claims()), lambda it: [EC.token(claims(), typ="JWT").split(".")[0], *it[1:]]),
        "InvalidSignatureError",
    ),
    "one bit of the signature": (
        lambda: resigned(EC.token(claims()), lambda it: [*it[:2], flipped(it[2], 10)]),
        "InvalidSignatureError",
    ),
    "one bit of an RSA signature": (
        lambda: resigned(rsa_key().token(claims()), lambda it: [*it[:2], flipped(it[2], -1)]),
        "InvalidSignatureError",
    ),
    "one bit of an EdDSA signature": (
        lambda: resigned(ED.token(claims()), lambda it: [*it[:2], flipped(it[2], 0)]),
        "InvalidSignatureError",
    ),
    "no signature": (lambda: resigned(EC.token(claims()), lambda it: [*it[:2], ""]), "InvalidSignatureError"),
    "a signature of zeros": (
        lambda: compact({"alg": "ES256", "kid": "ec"}, claims(), lambda _: bytes(64)),
        "InvalidSignatureError",
    ),
    "a signature cut short": (
        lambda: resigned(EC.token(claims()), lambda it: [*it[:2], it[2][:40]]),
        "InvalidSignatureError",
    ),
    "the signature of another token": (
        lambda: resigned(EC.token(claims()), lambda it: [*it[:2], EC.token(claims(sub="x")).split(".")[2]]),
        "InvalidSignatureError",
    ),
    "no payload": (lambda: resigned(EC.token(claims()), lambda it: [it[0], "", it[2]]), "InvalidSignatureError"),
    "characters outside base64": (
        lambda: resigned(EC.token(claims()), lambda it: [*it[:2], it[2] + "!"]),
        "DecodeError",
    ),
    "a space inside": (lambda: resigned(EC.token(claims()), lambda it: [it[0], it[1] + " ", it[2]]), "DecodeError"),
    "two segments": (lambda: resigned(EC.token(claims()), lambda it: it[:2]), "not a token"),
    "four segments": (lambda: EC.token(claims()) + ".e30", "not a token"),
    "encrypted, five segments": (
        lambda: ".".join([segment(b'{"alg":"RSA-OAEP","enc":"A256GCM","kid":"rsa"}'), "a", "b", "c", "d"]),
        "not a token",
    ),
    "a token inside a token": (
        lambda: compact({"alg": "ES256", "kid": "ec", "cty": "JWT"}, EC.token(claims()).encode(), EC.sign),
        "DecodeError",
    ),
    "points": (lambda: "..", "DecodeError"),
    "garbage": (lambda: "a.b.c", "not a token"),
    "garbage in capitals": (lambda: "A.B.C", "DecodeError"),
    "a payload that is no JSON": (lambda: signed(b"{"), "DecodeError"),
    "a payload that is a list": (lambda: signed(json.dumps([claims()]).encode()), "DecodeError"),
    "a payload that is a text": (lambda: signed(b'"x"'), "DecodeError"),
    "a payload that is not UTF-8": (lambda: signed(b'{"iss":"\xff"}'), "DecodeError"),
    "a payload that is deep": (lambda: signed(b'{"x":' + b"[" * 4000), "DecodeError"),
    "a payload with a long number": (lambda: signed(b'{"exp":' + b"9" * 5000 + b"}"), "DecodeError"),
    "too long": (lambda: EC.token(claims(x="x" * CREDENTIAL_CHARACTERS_MAX)), "not a token"),
    # The times.
    "exp past": (lambda: EC.token(claims(exp=NOW - SKEW - 1)), "exp is in the past"),
    "exp past by just the skew": (lambda: EC.token(claims(exp=NOW - SKEW)), "exp is in the past"),
    "no exp": (lambda: EC.token(claims(exp=None)), "MissingRequiredClaimError"),
    "exp null": (lambda: signed(json.dumps({**claims(), "exp": None}).encode()), "MissingRequiredClaimError"),
    "exp in text": (lambda: EC.token(claims(exp=str(NOW + 300))), "exp is not a time"),
    "exp true": (lambda: EC.token(claims(exp=True)), "exp is not a time"),
    "exp in a list": (lambda: EC.token(claims(exp=[NOW + 300])), "exp is not a time"),
    "exp NaN": (lambda: EC.token(claims(exp=float("nan"))), "exp is not a time"),
    "exp infinite": (lambda: EC.token(claims(exp=float("inf"))), "exp is not a time"),
    "exp in milliseconds": (lambda: EC.token(claims(exp=(NOW + 300) * 1000)), "exp is not a time"),
    "exp beyond all time": (lambda: EC.token(claims(exp=10**400)), "exp is not a time"),
    "exp below zero": (lambda: EC.token(claims(exp=-1)), "exp is not a time"),
    "nbf to come": (lambda: EC.token(claims(nbf=NOW + SKEW + 1)), "nbf is in the future"),
    "nbf in text": (lambda: EC.token(claims(nbf=str(NOW))), "nbf is not a time"),
    "nbf null": (lambda: signed(json.dumps({**claims(), "nbf": None}).encode()), "nbf is not a time"),
    "iat to come": (lambda: EC.token(claims(iat=NOW + SKEW + 1)), "iat is in the future"),
    "iat in text": (lambda: EC.token(claims(iat="now")), "iat is not a time"),
    # The issuer.
    "no iss": (lambda: EC.token(claims(iss=None)), "MissingRequiredClaimError"),
    "another iss": (lambda: EC.token(claims(iss="https://evil.example")), "InvalidIssuerError"),
    "iss and more": (lambda: EC.token(claims(iss=f"{NAME}/")), "InvalidIssuerError"),
    "part of iss": (lambda: EC.token(claims(iss=NAME[:-1])), "InvalidIssuerError"),
    "iss in capitals": (lambda: EC.token(claims(iss=NAME.upper())), "InvalidIssuerError"),
    "iss in a list": (lambda: EC.token(claims(iss=[NAME])), "InvalidIssuerError"),
    # The audience.
    "no aud": (lambda: EC.token(claims(aud=None)), "MissingRequiredClaimError"),
    "another aud": (lambda: EC.token(claims(aud="https://other.example")), "InvalidAudienceError"),
    "other audiences": (lambda: EC.token(claims(aud=["https://other.example", NAME])), "InvalidAudienceError"),
    "no audience in a list": (lambda: EC.token(claims(aud=[])), "MissingRequiredClaimError"),
    "aud and more": (lambda: EC.token(claims(aud=f"{AUDIENCE}/")), "InvalidAudienceError"),
    "an audience beside a number": (lambda: EC.token(claims(aud=[AUDIENCE, 7])), "InvalidAudienceError"),
    "aud as an object": (lambda: EC.token(claims(aud={AUDIENCE: True})), "InvalidAudienceError"),
    # The subject, the tenant and the scopes.
    "no sub": (lambda: EC.token(claims(sub=None)), "MissingRequiredClaimError"),
    "an empty sub": (lambda: EC.token(claims(sub="")), "sub is missing or not a text"),
    "a number as sub": (lambda: EC.token(claims(sub=7)), "InvalidSubjectError"),
    "a sub with NUL": (lambda: EC.token(claims(sub="a\0b")), "sub is missing or not a text"),
    "a sub with half a character": (lambda: EC.token(claims(sub="\ud800")), "sub is missing or not a text"),
    "no tenant": (lambda: EC.token(claims(tenant=None)), "tenant is missing or not a text"),
    "an empty tenant": (lambda: EC.token(claims(tenant="")), "tenant is missing or not a text"),
    "a number as tenant": (lambda: EC.token(claims(tenant=1)), "tenant is missing or not a text"),
    "tenants in a list": (lambda: EC.token(claims(tenant=["house"])), "tenant is missing or not a text"),
    "a tenant with NUL": (lambda: EC.token(claims(tenant="house\0")), "tenant is missing or not a text"),
    "a tenant with half a character": (lambda: EC.token(claims(tenant="\udfff")), "tenant is missing or not a text"),
    "an unknown tenant": (lambda: EC.token(claims(tenant="absent")), "the tenant does not exist"),
    "a tenant in another case": (lambda: EC.token(claims(tenant="House")), "the tenant does not exist"),
    "a tenant by its uid": (lambda: EC.token(claims(tenant=UID)), "the tenant does not exist"),
    "a tenant with a wildcard": (lambda: EC.token(claims(tenant="hous%")), "the tenant does not exist"),
    "a long tenant": (lambda: EC.token(claims(tenant="x" * 4000)), "the tenant does not exist"),
    "a number as scope": (lambda: EC.token(claims(scope=7)), "the scopes are not a text or a list"),
    "scopes as an object": (
        lambda: EC.token(claims(scope={"admin": True})),
        "the scopes are not a text or a list",
    ),
}
"""Invalid tokens, each with the problem in the log, so that each is refused for the intended reason."""


async def test_valid_tokens_authenticate(issuer: Issuer) -> None:
    """Every form of token that the standards allow authenticates."""
    outcomes = {name: await issuer.outcome(make()) for name, make in GOOD.items()}
    assert outcomes == dict.fromkeys(GOOD, "opens")


async def test_invalid_tokens_are_refused(issuer: Issuer) -> None:
    """Every invalid token is refused. Only the log has the kind of problem."""
    outcomes = {name: await issuer.outcome(make()) for name, (make, _) in BAD.items()}
    assert outcomes == {name: problem for name, (_, problem) in BAD.items()}
    assert await issuer.outcome(EC.token(claims())) == "opens"


async def test_log_does_not_contain_tokens(issuer: Issuer) -> None:
    """No log entry of a refused token contains a part of it."""
    for make, _ in BAD.values():
        token = make()
        with structlog.testing.capture_logs() as logs, pytest.raises(CredentialInvalid):
            await issuer.caller(token)
        for entry in logs:
            assert set(entry) == {"event", "log_level", "problem"}
            assert "evil" not in entry["problem"]


@pytest.mark.parametrize("algorithm", KEY_TYPES)
async def test_only_allowed_algorithms_authenticate(book: Book, algorithm: str) -> None:
    """A token of each algorithm is valid if the algorithm is allowed, and invalid if only others are."""
    keys: dict[str, Callable[[], Key]] = {"RSA": rsa_key, "EC": lambda: ec_key(algorithm=algorithm), "OKP": ed448_key}
    key = Key("key", algorithm, keys[KEY_TYPES[algorithm]]().private)
    allowed = Issuer(book, key, algorithms=(algorithm,))
    assert await allowed.outcome(key.token(claims())) == "opens"
    others = Issuer(book, key, algorithms=tuple(each for each in KEY_TYPES if each != algorithm))
    assert await others.outcome(key.token(claims())) == "alg is not allowed"


async def test_weak_rsa_key_is_ignored(book: Book) -> None:
    """A token signed by an RSA key of less than 2,048 bits is refused, even if the issuer publishes the key."""
    weak, strong = rsa_key("weak", bits=1024), rsa_key("strong")
    issuer = Issuer(book, weak, strong)
    assert await issuer.outcome(weak.token(claims())) == "the issuer has no such key"
    assert await issuer.outcome(strong.token(claims())) == "opens"


@pytest.mark.parametrize(
    ("claim", "opens_from", "opens_before"),
    [
        ({"exp": NOW + 100}, None, (NOW + 100 + SKEW) * SECOND),
        ({"exp": NOW + 100.25}, None, (NOW + 100 + SKEW) * SECOND + SECOND // 4),
        ({"nbf": NOW + 100, "exp": NOW + 1000}, (NOW + 100 - SKEW) * SECOND, None),
        ({"iat": NOW + 100, "exp": NOW + 1000}, (NOW + 100 - SKEW) * SECOND, None),
    ],
)
async def test_validity_period_is_exact_to_the_microsecond(
    issuer: Issuer, clock: Clock, claim: dict[str, float], opens_from: int | None, opens_before: int | None
) -> None:
    """A token is valid from nbf and iat minus the skew until exp plus the skew, even if it is cached."""
    token = EC.token(claims(**claim))
    if opens_from is not None:
        clock.now = opens_from - 1
        assert (await issuer.outcome(token)).endswith("is in the future")
        clock.now = opens_from
        assert await issuer.outcome(token) == "opens"
    if opens_before is not None:
        clock.now = opens_before - 1
        assert await issuer.outcome(token) == "opens"
        clock.now = opens_before
        # The token is cached, so it is refused without being parsed.
        assert await issuer.outcome(token) == "not a token"
        issuer.seconds += KEY_CACHED_SECONDS_MAX
        assert await issuer.outcome(token) == "exp is in the past"


async def test_token_without_skew_expires_at_exp(book: Book, clock: Clock) -> None:
    """With a skew of 0 a token expires at exp."""
    issuer = Issuer(book, EC, clock_skew=0)
    token = EC.token(claims(nbf=NOW, exp=NOW + 1))
    assert await issuer.outcome(token) == "opens"
    clock.now += SECOND
    issuer.seconds += KEY_CACHED_SECONDS_MAX
    assert await issuer.outcome(token) == "exp is in the past"


@pytest.mark.parametrize(
    ("given", "scopes"),
    [
        (None, set()),
        ("", set()),
        ("openid profile email", set()),
        ("admin", {"admin"}),
        ("transactions.readonly accounts.readonly", {"transactions.readonly", "accounts.readonly"}),
        ("  transactions   openid ", {"transactions"}),
        ("Admin ADMIN admin. .admin admin,transactions", set()),
        ("admin\ttransactions", set()),
        ("https://daybook.example/admin daybook:admin", set()),
        (["accounts", "openid"], {"accounts"}),
        (["accounts transactions"], set()),
        (["accounts", 7, None, ["admin"], {"admin": 1}], {"accounts"}),
        ([], set()),
    ],
)
async def test_only_known_scopes_count(issuer: Issuer, given: object, scopes: set[str]) -> None:
    """Of the scopes in a text or a list, only exact names of Daybook's scopes count."""
    assert (await issuer.caller(EC.token(claims(scope=given)))).scopes == scopes


async def test_configured_claim_names_are_used(book: Book) -> None:
    """The tenant, scopes and account are read only from the claims that the settings name."""
    house = await book.credentials.tenant("house")
    assert house is not None
    namespaced = "https://daybook.example/tenant"
    issuer = Issuer(book, EC, tenant_claim=namespaced, scope_claim="scp", account_claim="acct.id")
    given = claims(
        **{namespaced: "house", "scp": ["accounts"], "acct.id": "mine"},
        tenant="absent",
        scope="admin",
        acct={"id": "theirs"},
    )
    caller = await issuer.caller(EC.token(given))
    assert (caller.tenant_number, caller.tenant_uid, caller.account_id) == (house.number, house.uid, "mine")
    assert caller.scopes == {"accounts"}


@pytest.mark.parametrize(
    ("given", "account_id"),
    [("mine", "mine"), ("-", None), ("Mine.2_x-y", "Mine.2_x-y"), ("1042", "1042")],
)
async def test_account_claim_binds_a_token(book: Book, given: str, account_id: str | None) -> None:
    """A token is bound to the account that its claim names; `-` means no account."""
    issuer = Issuer(book, EC, account_claim="account")
    assert (await issuer.caller(EC.token(claims(account=given)))).account_id == account_id


@pytest.mark.parametrize(
    "given", [None, "", 42, ["mine"], {"id": "mine"}, "accounts/mine", "mine\0", "a b", "*", "--", "x" * 129, True]
)
async def test_missing_or_invalid_account_claim_is_refused(book: Book, given: object) -> None:
    """If an account claim is configured, a token without a valid one is refused."""
    issuer = Issuer(book, EC, account_claim="account")
    assert await issuer.outcome(EC.token(claims(account=given))) in {
        "account is missing or not a text",
        "the account id is malformed",
    }


async def test_account_claim_is_ignored_by_default(issuer: Issuer) -> None:
    """Without the setting, a claim `account` does not bind a token."""
    assert (await issuer.caller(EC.token(claims(account="mine")))).account_id is None


async def test_subject_and_tenant_determine_the_credential_id(book: Book, issuer: Issuer) -> None:
    """Tokens of one subject and tenant have one credential id, which no other subject, tenant or API key has."""
    first = await issuer.caller(EC.token(claims()))
    again = await issuer.caller(rsa_key().token(claims(scope="admin", jti="2", exp=NOW + 200)))
    stranger = await issuer.caller(EC.token(claims(sub="client-2")))
    neighbour = await issuer.caller(EC.token(claims(tenant="other")))
    assert first.credential_id == again.credential_id
    assert len({first.credential_id, stranger.credential_id, neighbour.credential_id}) == 3
    for caller, slug in ((first, "house"), (neighbour, "other")):
        tenant = await book.credentials.tenant(slug)
        assert tenant is not None
        assert (caller.tenant_number, caller.tenant_uid) == (tenant.number, tenant.uid)
    for caller in (first, stranger, neighbour):
        assert caller.credential_id.startswith("oauth2:")
        assert len(caller.credential_id) == len("oauth2:") + 32
        assert not is_api_key_id(caller.credential_id)
        assert "client" not in caller.credential_id


async def test_use_of_a_token_is_not_recorded(issuer: Issuer) -> None:
    """Only uses of API keys are recorded, not uses of tokens."""
    for _ in range(2):
        await issuer.caller(EC.token(claims()))
    assert issuer.uses == []


@pytest.mark.parametrize(
    "metadata",
    [
        lambda token: [("x-api-key", token)],
        lambda token: [("authorization", "Basic " + base64.b64encode(token.replace(".", ":", 1).encode()).decode())],
        lambda token: [("authorization", token)],
        lambda token: [("authorization", f"DPoP {token}")],
        lambda token: [("authorization", f"Bearer {token}".encode())],
        lambda token: [("access_token", token)],
    ],
)
async def test_token_requires_the_bearer_scheme(
    issuer: Issuer, metadata: Callable[[str], list[tuple[str, str | bytes]]]
) -> None:
    """A token is valid only in `authorization: Bearer`."""
    with pytest.raises(DaybookError):
        await issuer.authenticator.authenticate(metadata(EC.token(claims())))


@pytest.mark.parametrize("value", ["bearer {}", "BEARER {}", "Bearer   {}  "])
async def test_bearer_is_case_insensitive(issuer: Issuer, value: str) -> None:
    """The scheme is parsed as for API keys: in any case, with any number of spaces."""
    found = await issuer.authenticator.authenticate([("authorization", value.format(EC.token(claims())))])
    assert found.caller.tenant_uid == UID


async def test_length_of_a_token_is_limited(issuer: Issuer) -> None:
    """A token with the largest length of a credential is valid; one more character is refused."""
    short = len("Bearer " + EC.token(claims(x="")))
    for spare in (0, 1):
        # Three characters of a claim are four of the token.
        filler = "x" * ((CREDENTIAL_CHARACTERS_MAX - short) // 4 * 3 - spare)
        token = EC.token(claims(x=filler))
        longest = f"Bearer {token}".ljust(CREDENTIAL_CHARACTERS_MAX)
        assert (await issuer.authenticator.authenticate([("authorization", longest)])).caller.tenant_uid == UID
        with pytest.raises(CredentialInvalid):
            await issuer.authenticator.authenticate([("authorization", longest + " ")])


async def test_token_without_an_issuer_is_refused(book: Book) -> None:
    """If no issuer is configured, a token is invalid like an unknown API key."""
    authenticator = Authenticator(book.credentials, book.clock, lambda _: None)
    with pytest.raises(CredentialInvalid):
        await authenticator.authenticate([("authorization", f"Bearer {EC.token(claims())}")])


async def test_cached_token_expires(book: Book, issuer: Issuer) -> None:
    """A cached token is valid for at most five seconds after its tenant or its key is known to be removed."""
    token = EC.token(claims())
    assert await issuer.outcome(token) == "opens"
    async with writing(book.database) as connection:
        await connection.execute(text("UPDATE tenants SET slug = 'gone' WHERE slug = 'house'"))
    issuer.seconds += KEY_CACHED_SECONDS_MAX - 0.001
    assert await issuer.outcome(token) == "opens"
    issuer.seconds += 0.001
    assert await issuer.outcome(token) == "the tenant does not exist"
    async with writing(book.database) as connection:
        await connection.execute(text("UPDATE tenants SET slug = 'house' WHERE slug = 'gone'"))
    assert await issuer.outcome(token) == "opens"
    issuer.content = jwk_set(rsa_key())
    issuer.seconds += KEY_CACHED_SECONDS_MAX
    assert await issuer.outcome(STRANGER.token(claims())) == "the issuer has no such key"
    issuer.seconds += FETCH_AGAIN_SECONDS
    assert await issuer.outcome(STRANGER.token(claims())) == "the issuer has no such key"
    assert await issuer.outcome(token) == "the issuer has no such key"


async def test_modified_copy_of_a_valid_token_is_refused(issuer: Issuer) -> None:
    """After a token was accepted, a token that differs in one character is still refused."""
    token = EC.token(claims())
    assert await issuer.outcome(token) == "opens"
    changed = resigned(token, lambda it: [it[0], flipped(it[1], 60), it[2]])
    assert await issuer.outcome(changed) == "InvalidSignatureError"
    cut = resigned(token, lambda it: [*it[:2], it[2][:-2]])
    assert await issuer.outcome(cut) == "InvalidSignatureError"
