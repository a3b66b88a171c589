"""Every parser takes any input: it returns a value, or raises one of its documented errors.

Parsers of money, instants, filters, orders and page tokens have the same tests in their own files, and
`tests/fuzz` sends whole requests.
"""

from __future__ import annotations

import contextlib
import json
import string
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest
import typer
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from server.cli import keys as key_commands
from server.facades import dreadnode, nebulablock, paged, spacebring, teable
from server.ledger import instants, names
from server.ledger.errors import CredentialInvalid, CredentialMissing, FieldInvalid, InvalidArgument
from server.ledger.instants import SECOND
from server.store.engine import DatabaseLimits, DatabaseUrlInvalid
from server.store.postgresql_url import connect_arguments
from server.transport import auth
from server.transport.access_tokens import AccessTokens
from server.transport.addresses import is_loopback
from server.transport.signing_keys import FetchFailed, SigningKeys, read_keys
from server.transport.token_keys import KEY_BYTES, parse_token_keys
from tests.support.clock import NOON
from tests.support.examples import examples
from tests.support.identity_provider import claims_at, compact, ec_key, ed_key, jwk_set, rsa_key, rules, segment

MANY = settings(max_examples=examples(150), deadline=None, database=None, derandomize=True)
TEXTS = st.text(max_size=200) | st.text(string.printable, max_size=60)
ALGORITHMS = ("RS256", "PS384", "ES256", "ES512", "EdDSA")
PUBLISHED = [ec_key(), ed_key(), rsa_key()]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def nested(depth: int) -> bytes:
    """JSON that is nested so deep."""
    return b"[" * depth + b"]" * depth


NAME_PARTS = st.sampled_from(
    ["accounts", "transactions", "balance", "apiKeys", "/", "//", "-", "a", "A", "é", "\0", "\n"]
)
NAMES = TEXTS | st.lists(NAME_PARTS | st.uuids().map(str), max_size=7).map("".join)


@MANY
@given(NAMES, st.booleans())
def test_any_name_is_parsed_or_refused(name: str, wildcard: bool) -> None:
    """A parsed name is formatted as the same name again."""
    formats: list[tuple[Callable[[], Any], Callable[[Any], str]]] = [
        (lambda: names.parse_account_name("name", name, wildcard=wildcard), names.account_name),
        (lambda: names.parse_api_key_name("name", name), names.api_key_name),
        (lambda: names.parse_balance_name("name", name), names.balance_name),
        (lambda: names.parse_transaction_name("name", name), lambda parsed: names.transaction_name(*parsed)),
    ]
    for parse, write in formats:
        try:
            parsed = parse()
        except FieldInvalid:
            continue
        assert write(parsed) == name


@MANY
@given(TEXTS | st.from_regex(r"[0-9]{1,5}-[0-9]{1,3}"))
def test_any_month_is_parsed_or_refused(text: str) -> None:
    """A parsed month is the one in the text."""
    try:
        month = instants.parse_month(text)
    except ValueError:
        return
    assert f"{month // 100:04}-{month % 100:02}" == text


CREDENTIALS = st.one_of(
    TEXTS,
    st.tuples(st.sampled_from(["Bearer ", "bearer", "Basic ", "BASIC  ", "Digest ", ""]), TEXTS).map("".join),
    st.tuples(st.just("Basic "), st.binary(max_size=40).map(segment)).map("".join),
)


@MANY
@given(st.lists(st.tuples(st.sampled_from(["authorization", "x-api-key", "x"]), CREDENTIALS | st.binary(max_size=9))))
def test_any_credential_is_parsed_or_refused(metadata: list[tuple[str, str | bytes]]) -> None:
    """A credential has the id of an API key and a secret, or is a token; any other is invalid or missing."""
    try:
        found = auth._credential(*auth._header(metadata))
    except (CredentialInvalid, CredentialMissing):
        return
    assert found.secret.isascii()
    assert found.key_id is None or names.is_api_key_id(found.key_id)


MEMBERS = st.sampled_from(["kty", "kid", "alg", "use", "key_ops", "crv", "x", "y", "n", "e", "d", "k", "x5c", "oth"])


@st.composite
def jwks(draw: st.DrawFn) -> dict[str, Any]:
    """A published key with changes, or any JSON."""
    jwk: dict[str, Any] = dict(draw(st.sampled_from(PUBLISHED)).jwk) if draw(st.integers(0, 4)) else {}
    odd = (
        json_values
        | st.binary(min_size=32, max_size=32).map(segment)
        | st.sampled_from(["", "AA", "AQAB", "!", "-", "_w", "A" * 999, "RSA", "EC", "OKP", "oct", "P-521"])
    )
    jwk.update(draw(st.dictionaries(MEMBERS, odd, max_size=3)))
    for name in draw(st.lists(MEMBERS, max_size=2)):
        jwk.pop(name, None)
    return jwk


@MANY
@given(
    st.one_of(
        st.lists(jwks(), max_size=3).map(lambda keys: json.dumps({"keys": keys}).encode()),
        json_values.map(lambda value: json.dumps({"keys": value}).encode()),
        st.binary(max_size=60),
    )
)
@example(nested(100_000))
@example(b'{"keys": [' + nested(900) + b"]}")
@example(b'{"keys": [{"kty": "RSA", "n": ' + nested(500) + b', "e": "AQAB"}]}')
def test_any_jwk_set_is_read_or_refused(content: bytes) -> None:
    """A JWK Set gives the keys that can be used, or is none."""
    with contextlib.suppress(FetchFailed):
        read_keys(content, ALGORITHMS)


class NoTenants:
    """A store of credentials in which no tenant exists."""

    async def tenant(self, slug: str) -> None:
        """Finds none."""
        assert slug.isprintable()


HEADERS = st.fixed_dictionaries(
    {"alg": st.sampled_from(["ES256", "none", "HS256"]) | json_values},
    optional={"kid": st.just("ec") | json_values, "typ": st.just("JWT") | json_values, "crit": json_values},
)
CLAIMS = st.dictionaries(
    st.sampled_from(["iss", "aud", "sub", "exp", "nbf", "iat", "tenant", "scope"]), json_values, max_size=2
)


@st.composite
def tokens(draw: st.DrawFn) -> str:
    """A token with odd headers or claims, whose signature is right; or segments of any content."""
    if draw(st.booleans()):
        header = draw(st.just({"alg": "ES256", "kid": "ec"}) | HEADERS | st.binary(max_size=30) | json_values)
        claims = claims_at(NOON // SECOND, **draw(CLAIMS))
        content = header if isinstance(header, bytes) else json.dumps(header).encode()
        return compact(content, json.dumps(claims).encode(), PUBLISHED[0].sign)
    return draw(TEXTS | st.lists(st.binary(max_size=30).map(segment), max_size=4).map(".".join))


@MANY
@given(tokens())
@example(compact(nested(3000), b"{}", PUBLISHED[0].sign))
@example(compact(b'{"alg": "ES256", "kid": "ec", "typ": ' + nested(900) + b"}", b"{}", PUBLISHED[0].sign))
@example(compact(b'{"alg": "ES256", "kid": "ec", "x": ' + b"9" * 5000 + b"}", b"{}", PUBLISHED[0].sign))
@example(compact({"alg": "ES256", "kid": "ec"}, nested(2500), PUBLISHED[0].sign))
async def test_any_access_token_is_refused(token: str) -> None:
    """A token of no tenant is invalid, whatever is in it."""

    async def fetch() -> bytes:
        return jwk_set(PUBLISHED[0])

    signing_keys = SigningKeys(fetch, ("ES256",), 300, lambda: 0.0)
    store: Any = NoTenants()
    try:
        with pytest.raises(CredentialInvalid):
            await AccessTokens(rules(), signing_keys, store, lambda: NOON).open(token)
    finally:
        await signing_keys.close()


@MANY
@given(TEXTS | st.lists(st.binary(min_size=31, max_size=33).map(segment), max_size=3).map(",".join))
def test_any_token_keys_are_parsed_or_refused(text: str) -> None:
    """Parsed keys have 32 bytes, and an error shows no part of them."""
    try:
        parsed, problem = parse_token_keys(text), ""
    except ValueError as error:
        parsed, problem = [bytes(KEY_BYTES)], str(error)
    assert {len(each) for each in parsed} == {KEY_BYTES}
    assert not any(len(word) > 9 and word in problem for word in text.split())


@MANY
@given(TEXTS | st.from_regex(r"[0-9]{1,9}[smhdw]"), TEXTS)
def test_any_duration_of_a_command_is_parsed_or_refused(ttl: str, expire_time: str) -> None:
    """A lifetime is positive; anything else is a usage error."""
    for given_ttl, given_time in ((ttl, None), (None, expire_time), (ttl, expire_time)):
        try:
            _, time_to_live = key_commands._read_expiry(given_ttl, given_time)
        except typer.BadParameter:
            continue
        assert time_to_live is None or time_to_live >= SECOND


PARAMETERS = st.text(st.characters(codec="utf-8"), max_size=60) | st.sampled_from(
    ["", "1", "-1", "0", "50", "9" * 30, "9" * 31, "٣", "1e3", "2024-10", "2024-10-10T00:00:00Z", "asc", "amount"]
)


@pytest.mark.parametrize("facade", [dreadnode, nebulablock, paged, spacebring, teable], ids=lambda each: each.__name__)
def test_any_parameter_of_a_facade_is_parsed_or_refused(facade: Any) -> None:
    """Any text as a parameter gives a filter, or an error about a field of the request."""
    request_type = get_type_hints(facade._parse)["request"]

    @MANY
    @given(st.dictionaries(st.sampled_from([*request_type.DESCRIPTOR.fields]), PARAMETERS))
    def check(parameters: dict[FieldDescriptor, str]) -> None:
        request = request_type(
            **{field.name: [text] if field.is_repeated else text for field, text in parameters.items()}
        )
        with contextlib.suppress(InvalidArgument):
            facade._parse(request)

    check()


@MANY
@given(TEXTS | st.ip_addresses().map(str))
def test_any_host_is_loopback_or_not(host: str) -> None:
    """Only addresses of this machine are loopback."""
    assert not is_loopback(host) or host.strip("[]").startswith(("127.", "::1", "::ffff:", "0000:", "localhost"))


URL_PARTS = st.sampled_from(
    ["sslmode=require", "&", "=", "host=a", "port=x", "options=-c", "?", "@", ":", "//", "/d", "%zz"]
)


@MANY
@given(TEXTS | st.lists(URL_PARTS | TEXTS, max_size=6).map("".join))
def test_any_url_of_a_database_is_read_or_refused(text: str) -> None:
    """A URL of PostgreSQL gives arguments for its driver, or an error that is for the operator."""
    with contextlib.suppress(ArgumentError, DatabaseUrlInvalid, ValueError):
        connect_arguments(make_url(f"postgresql+asyncpg://user@{text}"), DatabaseLimits(), must_be_primary=True)
