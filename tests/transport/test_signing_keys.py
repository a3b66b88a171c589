"""The issuer's signing keys: which are accepted, and how and how often they are fetched."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
import structlog
from jwt import PyJWK

from server.ledger.errors import ServiceUnavailable
from server.transport import signing_keys as module
from server.transport.signing_algorithms import KEY_TYPES
from server.transport.signing_keys import (
    FETCH_AGAIN_SECONDS,
    FETCH_SECONDS_MAX,
    KEPT_SECONDS,
    SET_BYTES_MAX,
    SET_KEYS_MAX,
    Fetch,
    FetchFailed,
    NoSuchKey,
    SigningKeys,
    from_file,
    from_url,
    read_keys,
    signing_keys,
)
from tests.support.certificates import Authority
from tests.support.identity_provider import Endpoint, Key, ec_key, ed448_key, ed_key, jwk_set, rsa_key

shares_a_loop = pytest.mark.asyncio(loop_scope="module")
"""Marks tests that fetch from the shared issuer."""

ONE, TWO = ec_key("one"), ec_key("two")
REFRESH = 300.0
ALL = tuple(KEY_TYPES)


class Stopwatch:
    """A stopwatch that a test moves."""

    def __init__(self) -> None:
        self.seconds = 1_000.0

    def __call__(self) -> float:
        """Returns the seconds."""
        return self.seconds


@pytest.fixture
def stopwatch() -> Stopwatch:
    """The stopwatch of the keys under test."""
    return Stopwatch()


@pytest.fixture(scope="module")
def issuer() -> Iterator[Endpoint]:
    """One issuer for all tests of this module."""
    with Endpoint().serving() as endpoint:
        yield endpoint


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fetch(issuer: Endpoint) -> AsyncIterator[Fetch]:
    """The function that fetches the issuer's keys."""
    async with from_url(issuer.url) as fetch:
        yield fetch


@pytest.fixture
def endpoint(issuer: Endpoint) -> Endpoint:
    """The issuer with the key ONE, without requests so far."""
    issuer.reset(jwk_set(ONE))
    return issuer


@pytest_asyncio.fixture(loop_scope="module")
async def keys(endpoint: Endpoint, fetch: Fetch, stopwatch: Stopwatch) -> AsyncIterator[SigningKeys]:
    """The issuer's keys, not fetched yet."""
    del endpoint  # It serves the keys.
    keys = SigningKeys(fetch, ("ES256",), REFRESH, stopwatch)
    yield keys
    await keys.close()


async def outcome(keys: SigningKeys, key: Key) -> str:
    """Returns `found` if the key is found and equals the expected one, or the type of the error."""
    try:
        found = await keys.find(key.algorithm, key.id)
    except (NoSuchKey, ServiceUnavailable) as error:
        return type(error).__name__
    assert found.key == key.private.public_key()
    return "found"


def test_limits_match_the_documentation() -> None:
    """The limits are the ones in docs/operate/access-tokens.md."""
    assert (FETCH_SECONDS_MAX, FETCH_AGAIN_SECONDS, KEPT_SECONDS) == (5, 10, 3600)
    assert (SET_BYTES_MAX, SET_KEYS_MAX) == (262_144, 100)


def jwk(key: Key, **changes: object) -> dict[str, Any]:
    """Returns a key as it is published, with changes. Members that are None are omitted."""
    return {name: value for name, value in {**key.jwk, **changes}.items() if value is not None}


def private_jwk(key: Key) -> dict[str, Any]:
    """Returns a private key in the format of a published one."""
    return {"kid": key.id, **PyJWK(key.jwk, key.algorithm).Algorithm.to_jwk(key.private, as_dict=True)}


JWKS: dict[str, tuple[Callable[[], dict[str, Any]], Sequence[str]]] = {
    "RSA for any algorithm": (lambda: jwk(rsa_key()), ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")),
    "RSA for one algorithm": (lambda: jwk(rsa_key(), alg="PS256"), ("PS256",)),
    "RSA of 1024 bits": (lambda: jwk(rsa_key("small", bits=1024)), ()),
    "P-256": (lambda: jwk(ONE), ("ES256",)),
    "P-384": (lambda: jwk(ec_key("384", "ES384")), ("ES384",)),
    "P-521": (lambda: jwk(ec_key("521", "ES512")), ("ES512",)),
    "P-256 for the algorithm of P-384": (lambda: jwk(ONE, alg="ES384"), ()),
    "another curve": (lambda: jwk(ONE, crv="secp256k1"), ()),
    "no curve": (lambda: jwk(ONE, crv=None), ()),
    "Ed25519": (lambda: jwk(ed_key()), ("EdDSA",)),
    "Ed448": (lambda: jwk(ed448_key()), ("EdDSA",)),
    "X25519": (lambda: jwk(ed_key(), crv="X25519"), ()),
    "a shared secret": (
        lambda: {"kty": "oct", "kid": "one", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA"},
        (),
    ),
    "a shared secret that says RS256": (lambda: {"kty": "oct", "kid": "one", "alg": "RS256", "k": "c2VjcmV0"}, ()),
    "EC that says RS256": (lambda: jwk(ONE, alg="RS256"), ()),
    "EC that says HS256": (lambda: jwk(ONE, alg="HS256"), ()),
    "EC that says none": (lambda: jwk(ONE, alg="none"), ()),
    "without a use": (lambda: jwk(ONE, use=None), ("ES256",)),
    "for encryption": (lambda: jwk(ONE, use="enc"), ()),
    "to verify": (lambda: jwk(ONE, key_ops=["verify"]), ("ES256",)),
    "to sign only": (lambda: jwk(ONE, key_ops=["sign"]), ()),
    "operations that are no list": (lambda: jwk(ONE, key_ops="verify"), ()),
    "a private EC key": (lambda: private_jwk(ONE), ()),
    "a private RSA key": (lambda: {**private_jwk(rsa_key()), "key_ops": ["verify"]}, ()),
    "no type": (lambda: jwk(ONE, kty=None), ()),
    "an unknown type": (lambda: jwk(ONE, kty="AKP"), ()),
    "a type that is a list": (lambda: jwk(ONE, kty=["EC"]), ()),
    "no coordinate": (lambda: jwk(ONE, y=None), ()),
    "a coordinate that is a number": (lambda: jwk(ONE, y=7), ()),
    "a coordinate that is short": (lambda: jwk(ONE, y="AQAB"), ()),
    "a point beside the curve": (lambda: jwk(ONE, y=TWO.jwk["y"]), ()),
    "no modulus": (lambda: jwk(rsa_key(), n=None), ()),
    "an even exponent": (lambda: jwk(rsa_key(), e="AA"), ()),
    "with unknown members": (lambda: jwk(ONE, x5c=["x"], x5u="https://x.example", more={"a": 1}), ("ES256",)),
}
"""Keys by their special property, each with the algorithms for which it is accepted."""


@pytest.mark.parametrize("name", JWKS)
def test_only_suitable_keys_are_accepted(name: str) -> None:
    """A public, strong key for signatures is accepted for its algorithms. Other keys don't affect the next one."""
    make, algorithms = JWKS[name]
    taken = read_keys(jwk_set(make(), TWO), ALL)
    assert [key.algorithm_name for key in taken if key.key_id != "two"] == list(algorithms)
    assert [key.algorithm_name for key in taken if key.key_id == "two"] == ["ES256"]


def test_only_allowed_algorithms_have_keys() -> None:
    """Keys are accepted only for allowed algorithms."""
    content = jwk_set(rsa_key(), ONE, ed_key())
    assert [key.algorithm_name for key in read_keys(content, ("ES256", "PS256"))] == ["PS256", "ES256"]
    assert read_keys(content, ("ES384",)) == []


INVALID_SETS = {
    "nothing": b"",
    "no JSON": b"<html>",
    "cut": jwk_set(ONE)[:-1],
    "not UTF-8": b'{"keys": ["\xff"]}',
    "a list": b"[]",
    "a text": b'"keys"',
    "null": b"null",
    "no keys": b"{}",
    "keys that are no list": b'{"keys": {}}',
    "too deep": b'{"keys": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "too many keys": jwk_set(*[ONE] * (SET_KEYS_MAX + 1)),
    "too long": jwk_set(ONE) + b" " * SET_BYTES_MAX,
}
"""Responses of an issuer that are not valid JWK Sets."""


@shares_a_loop
@pytest.mark.parametrize("name", INVALID_SETS)
async def test_invalid_set_does_not_change_the_keys(
    keys: SigningKeys, endpoint: Endpoint, stopwatch: Stopwatch, name: str
) -> None:
    """An invalid set adds no keys, and removes no existing ones."""
    good, endpoint.content = endpoint.content, INVALID_SETS[name]
    assert await outcome(keys, ONE) == "ServiceUnavailable"
    stopwatch.seconds += FETCH_AGAIN_SECONDS
    endpoint.content = good
    assert await outcome(keys, ONE) == "found"
    stopwatch.seconds += REFRESH
    endpoint.content = INVALID_SETS[name]
    assert await outcome(keys, ONE) == "found"
    assert endpoint.count == 3


@pytest.mark.parametrize("name", [name for name in INVALID_SETS if name != "too long"])
def test_invalid_set_raises(name: str) -> None:
    """Parsing an invalid set raises FetchFailed with a message about the JWK Set."""
    with pytest.raises(FetchFailed, match="the JWK Set"):
        read_keys(INVALID_SETS[name], ALL)


@shares_a_loop
async def test_largest_set_is_accepted(keys: SigningKeys, endpoint: Endpoint) -> None:
    """A set of 100 keys and 256 KiB is accepted."""
    many = jwk_set(ONE, *[{"kty": "oct"}] * (SET_KEYS_MAX - 1))
    endpoint.content = many + b" " * (SET_BYTES_MAX - len(many))
    assert await outcome(keys, ONE) == "found"


@shares_a_loop
async def test_set_without_content_length_is_limited(keys: SigningKeys, endpoint: Endpoint) -> None:
    """Reading a response without content-length ends at the limit."""
    endpoint.drips = True
    endpoint.content = b" " * (SET_BYTES_MAX + 1)
    with structlog.testing.capture_logs() as logs:
        assert await outcome(keys, ONE) == "ServiceUnavailable"
    assert [entry["problem"] for entry in logs] == ["the JWK Set has more than 262144 bytes"]


@shares_a_loop
@pytest.mark.parametrize("status", [201, 204, 301, 302, 303, 307, 308, 400, 401, 403, 404, 429, 500, 503])
async def test_only_200_brings_keys(keys: SigningKeys, endpoint: Endpoint, status: int) -> None:
    """A response with another status is a failure, and redirects are not followed, even to the same host."""
    endpoint.status = status
    endpoint.headers = {"location": endpoint.url.replace("jwks", "other")}
    if status == 204:
        endpoint.content = b""
    assert await outcome(keys, ONE) == "ServiceUnavailable"
    assert endpoint.paths == ["/jwks.json"]


@shares_a_loop
async def test_compressed_set_is_refused(keys: SigningKeys, endpoint: Endpoint) -> None:
    """A compressed set is refused, because it could expand a thousandfold."""
    endpoint.headers = {"content-encoding": "gzip"}
    endpoint.content = gzip.compress(endpoint.content)
    assert await outcome(keys, ONE) == "ServiceUnavailable"


@shares_a_loop
async def test_loopback_issuer_is_reached_without_a_proxy(
    keys: SigningKeys, monkeypatch: pytest.MonkeyPatch, endpoint: Endpoint
) -> None:
    """An issuer on loopback is reached directly, even if the environment names a proxy."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    async with from_url(endpoint.url) as fetch:
        assert await fetch() == jwk_set(ONE)
    assert await outcome(keys, ONE) == "found"


@shares_a_loop
async def test_slow_fetch_times_out(
    keys: SigningKeys, endpoint: Endpoint, stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a fetch times out, the waiting call fails with ServiceUnavailable, and the next call does not wait."""
    monkeypatch.setattr(module, "FETCH_SECONDS_MAX", 0.2)
    endpoint.open.clear()
    assert await outcome(keys, ONE) == "ServiceUnavailable"
    monkeypatch.undo()
    assert await outcome(keys, ONE) == "ServiceUnavailable"
    assert endpoint.count == 1
    endpoint.open.set()
    stopwatch.seconds += FETCH_AGAIN_SECONDS
    assert await outcome(keys, ONE) == "found"


@shares_a_loop
async def test_timeout_covers_the_whole_fetch(
    keys: SigningKeys, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timeout is for the whole fetch; received bytes don't restart it."""
    monkeypatch.setattr(module, "FETCH_SECONDS_MAX", 0.3)
    endpoint.drips = True
    assert await outcome(keys, ONE) == "ServiceUnavailable"


@shares_a_loop
async def test_concurrent_calls_share_one_fetch(keys: SigningKeys, endpoint: Endpoint, stopwatch: Stopwatch) -> None:
    """Calls that arrive during a fetch wait for it, however long it takes."""
    endpoint.open.clear()
    waiting = [asyncio.create_task(outcome(keys, ONE)) for _ in range(25)]
    while endpoint.count == 0:
        await asyncio.sleep(0.001)
    stopwatch.seconds += FETCH_AGAIN_SECONDS
    waiting += [asyncio.create_task(outcome(keys, ONE)) for _ in range(25)]
    await asyncio.sleep(0)
    endpoint.open.set()
    assert await asyncio.gather(*waiting) == ["found"] * 50
    assert endpoint.count == 1


@shares_a_loop
async def test_cancelled_call_does_not_cancel_the_fetch(keys: SigningKeys, endpoint: Endpoint) -> None:
    """If a call is cancelled during a fetch, the fetch and other waiting calls continue."""
    endpoint.open.clear()
    first = asyncio.create_task(outcome(keys, ONE))
    second = asyncio.create_task(outcome(keys, ONE))
    while endpoint.count == 0:
        await asyncio.sleep(0.001)
    first.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await first
    endpoint.open.set()
    assert await second == "found"
    assert endpoint.count == 1


@shares_a_loop
async def test_keys_are_fetched_again_when_they_are_due(
    keys: SigningKeys, endpoint: Endpoint, stopwatch: Stopwatch
) -> None:
    """Keys are fetched again only after the refresh interval; then a removed key is not found."""
    assert await outcome(keys, ONE) == "found"
    endpoint.content = jwk_set(TWO)
    stopwatch.seconds += REFRESH - 0.001
    assert await outcome(keys, ONE) == "found"
    assert endpoint.count == 1
    stopwatch.seconds += 0.001
    assert await outcome(keys, ONE) == "NoSuchKey"
    assert endpoint.count == 2
    assert await outcome(keys, TWO) == "found"


@shares_a_loop
async def test_empty_set_revokes_all(keys: SigningKeys, endpoint: Endpoint, stopwatch: Stopwatch) -> None:
    """An empty set removes all keys; it is not treated as a failure."""
    assert await outcome(keys, ONE) == "found"
    endpoint.content = jwk_set()
    stopwatch.seconds += REFRESH
    assert await outcome(keys, ONE) == "NoSuchKey"


@shares_a_loop
async def test_unknown_key_triggers_a_fetch(keys: SigningKeys, endpoint: Endpoint, stopwatch: Stopwatch) -> None:
    """A token with an unknown key id triggers a fetch before the refresh interval ends."""
    assert await outcome(keys, ONE) == "found"
    endpoint.content = jwk_set(ONE, TWO)
    stopwatch.seconds += FETCH_AGAIN_SECONDS
    assert await outcome(keys, TWO) == "found"
    assert await outcome(keys, ONE) == "found"
    assert endpoint.count == 2


@shares_a_loop
async def test_fetches_for_unknown_keys_are_limited(
    keys: SigningKeys, endpoint: Endpoint, stopwatch: Stopwatch
) -> None:
    """Unknown key ids, sequential or concurrent, trigger at most one fetch in ten seconds."""
    made_up = [Key(f"made-up-{number}", "ES256", ONE.private) for number in range(30)]
    assert await outcome(keys, ONE) == "found"
    for elapsed, count in ((0.0, 1), (FETCH_AGAIN_SECONDS - 0.001, 1), (0.001, 2), (FETCH_AGAIN_SECONDS - 0.001, 2)):
        stopwatch.seconds += elapsed
        for key in made_up:
            assert await outcome(keys, key) == "NoSuchKey"
        assert await asyncio.gather(*(outcome(keys, key) for key in made_up)) == ["NoSuchKey"] * 30
        assert endpoint.count == count
    assert await outcome(keys, ONE) == "found"


@shares_a_loop
async def test_unreachable_issuer_makes_the_service_unavailable(
    keys: SigningKeys, endpoint: Endpoint, stopwatch: Stopwatch
) -> None:
    """Without any keys every token gets ServiceUnavailable, and fetches are limited to one in ten seconds."""
    endpoint.status = 500
    for _ in range(20):
        assert await outcome(keys, ONE) == "ServiceUnavailable"
    assert endpoint.count == 1
    stopwatch.seconds += FETCH_AGAIN_SECONDS
    endpoint.status = 200
    assert await outcome(keys, ONE) == "found"


@shares_a_loop
async def test_last_keys_are_used_while_the_issuer_is_unreachable(
    keys: SigningKeys, endpoint: Endpoint, stopwatch: Stopwatch
) -> None:
    """The last keys are used for exactly an hour after they are due. An unknown key gets ServiceUnavailable."""
    assert await outcome(keys, ONE) == "found"
    endpoint.status = 503
    stopwatch.seconds += REFRESH
    assert await outcome(keys, ONE) == "found"
    assert await outcome(keys, TWO) == "ServiceUnavailable"
    assert endpoint.count == 2
    stopwatch.seconds += KEPT_SECONDS - 0.001
    assert await outcome(keys, ONE) == "found"
    stopwatch.seconds += 0.001
    assert await outcome(keys, ONE) == "ServiceUnavailable"
    stopwatch.seconds += FETCH_AGAIN_SECONDS
    endpoint.status = 200
    assert await outcome(keys, ONE) == "found"


@shares_a_loop
async def test_calls_do_not_wait_after_a_failed_fetch(
    keys: SigningKeys, endpoint: Endpoint, stopwatch: Stopwatch
) -> None:
    """After a failed fetch, the next fetch runs in the background while calls use the last keys."""
    assert await outcome(keys, ONE) == "found"
    endpoint.status = 503
    stopwatch.seconds += REFRESH
    assert await outcome(keys, ONE) == "found"
    endpoint.open.clear()
    stopwatch.seconds += FETCH_AGAIN_SECONDS
    assert await outcome(keys, ONE) == "found"
    while endpoint.count < 3:
        await asyncio.sleep(0.001)
    assert await outcome(keys, ONE) == "found"
    endpoint.status, endpoint.content = 200, jwk_set(TWO)
    endpoint.open.set()
    # A call with an unknown key waits for the running fetch.
    assert await outcome(keys, TWO) == "found"
    assert await outcome(keys, ONE) == "NoSuchKey"
    assert endpoint.count == 3


@shares_a_loop
async def test_token_without_a_key_id_needs_a_single_key(
    endpoint: Endpoint, fetch: Fetch, stopwatch: Stopwatch
) -> None:
    """A token without a key id matches the only key of its algorithm; with several keys it is refused."""
    endpoint.content = jwk_set(ec_key(None), ed_key("ed"))
    keys = SigningKeys(fetch, ("ES256", "EdDSA"), REFRESH, stopwatch)
    assert (await keys.find("ES256", None)).key_id is None
    assert (await keys.find("EdDSA", None)).key_id == "ed"
    endpoint.content = jwk_set(ONE, TWO)
    stopwatch.seconds += REFRESH
    with pytest.raises(NoSuchKey, match="more than one"):
        await keys.find("ES256", None)
    assert (await keys.find("ES256", "two")).key_id == "two"
    endpoint.content = jwk_set(ONE, Key("one", "ES256", TWO.private))
    stopwatch.seconds += REFRESH
    with pytest.raises(NoSuchKey, match="more than one"):
        await keys.find("ES256", "one")


@shares_a_loop
async def test_key_id_matches_only_its_algorithm(endpoint: Endpoint, fetch: Fetch, stopwatch: Stopwatch) -> None:
    """A key is found by its id only with its own algorithm."""
    endpoint.content = jwk_set(ONE, rsa_key())
    keys = SigningKeys(fetch, ("ES256", "RS256"), REFRESH, stopwatch)
    for algorithm, key_id in (("RS256", "one"), ("ES256", "rsa"), ("HS256", "one"), ("none", None)):
        with pytest.raises(NoSuchKey):
            await keys.find(algorithm, key_id)


@shares_a_loop
async def test_keys_are_fetched_at_the_start(endpoint: Endpoint) -> None:
    """A server starts to fetch keys at its start without waiting for them; its end cancels the fetch."""
    endpoint.open.clear()
    before = asyncio.all_tasks()
    async with signing_keys(endpoint.url, ("ES256",), REFRESH) as keys:
        assert keys._fetching is not None
        while endpoint.count == 0:
            await asyncio.sleep(0.001)
        assert not keys.has_any()
    assert asyncio.all_tasks() == before


@shares_a_loop
async def test_keys_are_read_from_a_file(tmp_path: Path, stopwatch: Stopwatch) -> None:
    """A file is read again every ten seconds; a missing or invalid file is like an unreachable issuer."""
    file = tmp_path / "jwks.json"
    file.write_bytes(jwk_set(ONE))
    async with signing_keys(str(file), ("ES256",), 86_400, stopwatch) as keys:
        assert await outcome(keys, ONE) == "found"
        file.write_bytes(jwk_set(TWO))
        assert await outcome(keys, ONE) == "found"
        stopwatch.seconds += FETCH_AGAIN_SECONDS
        assert await outcome(keys, ONE) == "NoSuchKey"
        assert await outcome(keys, TWO) == "found"
        file.write_bytes(b"garbage")
        stopwatch.seconds += FETCH_AGAIN_SECONDS
        assert await outcome(keys, TWO) == "found"
        file.unlink()
        stopwatch.seconds += KEPT_SECONDS - 0.001
        assert await outcome(keys, TWO) == "found"
        stopwatch.seconds += 0.001
        assert await outcome(keys, TWO) == "ServiceUnavailable"


@shares_a_loop
@pytest.mark.parametrize("content", [None, b"", b"{}", jwk_set(), jwk_set(ONE) + b" " * SET_BYTES_MAX])
async def test_file_without_keys_is_refused_at_the_start(tmp_path: Path, content: bytes | None) -> None:
    """A server does not start if its file has no usable key."""
    file = tmp_path / "jwks.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(FetchFailed, match="the file holds no usable key"):
        async with signing_keys(str(file), ("ES256",), REFRESH):
            pass


@shares_a_loop
async def test_folder_is_refused(tmp_path: Path) -> None:
    """A path to a folder is refused."""
    with pytest.raises(FetchFailed, match="there is no such file"):
        await from_file(tmp_path)()


def test_all_algorithms_are_asymmetric() -> None:
    """All algorithms that can be allowed are asymmetric; `none` and HMAC are not among them."""
    assert set(KEY_TYPES) == {f"{kind}{bits}" for kind in ("RS", "PS", "ES") for bits in (256, 384, 512)} | {"EdDSA"}
    assert set(KEY_TYPES.values()) == {"RSA", "EC", "OKP"}
    assert json.loads(jwk_set(ONE))["keys"][0]["kty"] == KEY_TYPES["ES256"]


async def test_https_issuer_on_loopback_is_reached_without_a_proxy(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An https issuer on loopback is verified with the environment's authorities, and reached without its proxy."""
    authority = Authority(tmp_path)
    pair = authority.issue("issuer")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    for name in ("https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    plain = urlsplit(endpoint.url)

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The test may end, and so cancel this, before the upstream closes its connection.
        with contextlib.closing(writer):
            request = await reader.readuntil(b"\r\n\r\n")
            upstream_reader, upstream_writer = await asyncio.open_connection(plain.hostname, plain.port)
            with contextlib.closing(upstream_writer):
                upstream_writer.write(request)
                while content := await upstream_reader.read(65536):
                    writer.write(content)

    async with await asyncio.start_server(forward, "127.0.0.1", 0, ssl=context) as server:
        port = server.sockets[0].getsockname()[1]
        async with from_url(f"https://localhost:{port}{plain.path}") as fetch:
            assert await fetch() == jwk_set(ONE)
