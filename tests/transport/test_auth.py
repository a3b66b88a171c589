"""Credentials: which are read, whom they identify, and what becomes of their secret."""

from __future__ import annotations

import base64
import hashlib
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text

from server.book import Book, open_book
from server.ledger.access import hash_secret, new_api_key
from server.ledger.errors import CredentialInvalid, CredentialMissing, DaybookError
from server.ledger.names import RandomBytes
from server.transport import auth
from server.transport.auth import (
    CREDENTIAL_CHARACTERS_MAX,
    KEY_CACHED_SECONDS_MAX,
    Authentication,
    Authenticator,
    Scheme,
)
from tests.support.clock import NOON, Clock
from tests.support.databases import writing

SPELLINGS = 200
Metadata: TypeAlias = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True)
class Key:
    """A key that is in the ledger, as its holder knows it."""

    id: str
    secret: str


async def store_key(book: Book, key: Key, *, tenant: str = "house", account_number: int | None = None) -> int:
    """Puts a key of a new tenant into the ledger; answers with the tenant's number."""
    number = await book.credentials.create_tenant(
        slug=tenant, uid=f"uid of {tenant}", display_name=tenant, create_time=NOON
    )
    await book.credentials.create_api_key(
        key_id=key.id,
        secret_hash=hash_secret(key.secret),
        tenant_number=number,
        account_number=account_number,
        create_time=NOON,
    )
    return number


def authenticator_of(book: Book, stopwatch: Callable[[], float] = time.monotonic) -> Authenticator:
    """The authenticator as a server has it, with a stopwatch that a test can move."""
    return Authenticator(book.credentials, book.clock, book.api_key_uses.note, stopwatch)


def new_key(random_bytes: RandomBytes) -> Key:
    """A key as new_api_key makes it."""
    key_id, _, secret = new_api_key(random_bytes).text.partition(".")
    return Key(key_id, secret)


def basic(pair: str) -> str:
    """An id and a secret as a Basic credential."""
    return "Basic " + base64.b64encode(pair.encode()).decode()


async def outcome_of(attempt: Awaitable[Authentication]) -> Scheme | type[DaybookError]:
    """The scheme by which the caller got in, or the error by which they did not."""
    try:
        return (await attempt).scheme
    except DaybookError as error:
        return type(error)


def other_case(word: str) -> str:
    """A word with its first letter in the other case."""
    place = next(place for place, character in enumerate(word) if character.isalpha())
    return word[:place] + word[place].swapcase() + word[place + 1 :]


Outcome: TypeAlias = Scheme | type[DaybookError]

CASES: dict[str, tuple[Callable[[Key], Metadata], Outcome]] = {
    "no metadata": (lambda _: (), CredentialMissing),
    "other metadata only": (
        lambda key: [("user-agent", "x"), ("authorisation", f"Bearer {key.id}.{key.secret}")],
        CredentialMissing,
    ),
    "a value of bytes": (lambda key: [("authorization", f"Bearer {key.id}.{key.secret}".encode())], CredentialMissing),
    "an x-api-key of bytes": (lambda key: [("x-api-key", f"{key.id}.{key.secret}".encode())], CredentialMissing),
    "Bearer": (lambda key: [("authorization", f"Bearer {key.id}.{key.secret}")], Scheme.BEARER),
    "bearer in lower case": (lambda key: [("authorization", f"bearer {key.id}.{key.secret}")], Scheme.BEARER),
    "BEARER in capitals": (lambda key: [("authorization", f"BEARER {key.id}.{key.secret}")], Scheme.BEARER),
    "Bearer with more spaces": (lambda key: [("authorization", f"Bearer   {key.id}.{key.secret} ")], Scheme.BEARER),
    "Bearer behind other metadata": (
        lambda key: [("user-agent", "x"), ("te", b"\xff"), ("authorization", f"Bearer {key.id}.{key.secret}")],
        Scheme.BEARER,
    ),
    "Bearer without a key": (lambda _: [("authorization", "Bearer")], CredentialInvalid),
    "Bearer with spaces only": (lambda _: [("authorization", "Bearer   ")], CredentialInvalid),
    "Bearer with an id only": (lambda key: [("authorization", f"Bearer {key.id}")], CredentialInvalid),
    "Bearer with an empty secret": (lambda key: [("authorization", f"Bearer {key.id}.")], CredentialInvalid),
    "Bearer with an empty id": (lambda key: [("authorization", f"Bearer .{key.secret}")], CredentialInvalid),
    "Bearer with a secret only": (lambda key: [("authorization", f"Bearer {key.secret}")], CredentialInvalid),
    "Bearer with a colon": (lambda key: [("authorization", f"Bearer {key.id}:{key.secret}")], CredentialInvalid),
    "a key without a scheme": (lambda key: [("authorization", f"{key.id}.{key.secret}")], CredentialInvalid),
    "another scheme": (lambda key: [("authorization", f"Digest {key.id}.{key.secret}")], CredentialInvalid),
    "a scheme that begins alike": (
        lambda key: [("authorization", f"Bearers {key.id}.{key.secret}")],
        CredentialInvalid,
    ),
    "an empty authorization": (lambda _: [("authorization", "")], CredentialInvalid),
    "an authorization of spaces": (lambda _: [("authorization", "  ")], CredentialInvalid),
    "X-API-Key": (lambda key: [("x-api-key", f"{key.id}.{key.secret}")], Scheme.API_KEY),
    "X-API-Key with spaces": (lambda key: [("x-api-key", f" {key.id}.{key.secret} ")], Scheme.API_KEY),
    "an empty X-API-Key": (lambda _: [("x-api-key", "")], CredentialInvalid),
    "X-API-Key with a scheme": (lambda key: [("x-api-key", f"Bearer {key.id}.{key.secret}")], CredentialInvalid),
    "X-API-Key with an id only": (lambda key: [("x-api-key", key.id)], CredentialInvalid),
    "Basic": (lambda key: [("authorization", basic(f"{key.id}:{key.secret}"))], Scheme.BASIC),
    "basic in lower case": (
        lambda key: [("authorization", "basic " + basic(f"{key.id}:{key.secret}").partition(" ")[2])],
        Scheme.BASIC,
    ),
    "Basic without padding": (
        # 20 characters, a colon and 43 more: a length that needs padding.
        lambda key: [("authorization", basic(f"{key.id}:{key.secret}").rstrip("="))],
        CredentialInvalid,
    ),
    "Basic in clear": (lambda key: [("authorization", f"Basic {key.id}:{key.secret}")], CredentialInvalid),
    "Basic with characters outside base64": (
        lambda key: [("authorization", basic(f"{key.id}:{key.secret}") + "!")],
        CredentialInvalid,
    ),
    "Basic of bytes that are no UTF-8": (
        lambda _: [("authorization", "Basic " + base64.b64encode(b"\xff\xfe:x").decode())],
        CredentialInvalid,
    ),
    "Basic without a colon": (lambda key: [("authorization", basic(f"{key.id}{key.secret}"))], CredentialInvalid),
    "Basic with a point": (lambda key: [("authorization", basic(f"{key.id}.{key.secret}"))], CredentialInvalid),
    "Basic with an empty secret": (lambda key: [("authorization", basic(f"{key.id}:"))], CredentialInvalid),
    "Basic with an empty id": (lambda key: [("authorization", basic(f":{key.secret}"))], CredentialInvalid),
    "Basic of nothing": (lambda _: [("authorization", "Basic ")], CredentialInvalid),
    "Basic with a trailing space in the secret": (
        lambda key: [("authorization", basic(f"{key.id}:{key.secret} "))],
        CredentialInvalid,
    ),
    "a wrong secret": (lambda key: [("authorization", f"Bearer {key.id}.{key.secret}x")], CredentialInvalid),
    "half a secret": (lambda key: [("authorization", f"Bearer {key.id}.{key.secret[:20]}")], CredentialInvalid),
    "the hash of the secret": (
        lambda key: [("authorization", f"Bearer {key.id}.{hash_secret(key.secret).hex()}")],
        CredentialInvalid,
    ),
    "an unknown id": (lambda key: [("authorization", f"Bearer 00000000000000000000.{key.secret}")], CredentialInvalid),
    "an id in the other case": (
        lambda key: [("authorization", f"Bearer {other_case(key.id)}.{key.secret}")],
        CredentialInvalid,
    ),
    "a secret in the other case": (
        lambda key: [("authorization", f"Bearer {key.id}.{other_case(key.secret)}")],
        CredentialInvalid,
    ),
    "an id with a wildcard": (
        lambda key: [("authorization", f"Bearer {key.id[:-1]}%.{key.secret}")],
        CredentialInvalid,
    ),
    "an id with SQL": (lambda key: [("authorization", f"Bearer ' OR 1=1 --.{key.secret}")], CredentialInvalid),
    "an id with NUL": (lambda key: [("x-api-key", f"{key.id}\0.{key.secret}")], CredentialInvalid),
    "an id of 65 characters": (lambda key: [("x-api-key", f"{'a' * 65}.{key.secret}")], CredentialInvalid),
    "a million characters": (lambda _: [("authorization", "Bearer " + "a" * 1_000_000)], CredentialInvalid),
}


async def test_credentials(book: Book, random_bytes: RandomBytes) -> None:
    """Each credential lets its holder in by its scheme, or is missing, or is invalid."""
    key = new_key(random_bytes)
    await store_key(book, key)
    authenticator = authenticator_of(book)
    outcomes = {
        name: await outcome_of(authenticator.authenticate(metadata(key))) for name, (metadata, _) in CASES.items()
    }
    assert outcomes == {name: outcome for name, (_, outcome) in CASES.items()}


@pytest.mark.parametrize("value", ["Basic é", "Basic \N{KELVIN SIGN}ey", "Bearer é.é", "é"])
async def test_credential_outside_ascii_is_invalid(book: Book, value: str) -> None:
    """A credential with characters outside ASCII is refused like any other that is malformed."""
    with pytest.raises(CredentialInvalid):
        await authenticator_of(book).authenticate([("authorization", value)])


@pytest.mark.parametrize("stray", ["\xa0", "\x85", "\x0b", "\x0c", "\x1c", "\x1f", "\t", "\n", "\u2003", "\u3000"])
async def test_only_spaces_are_taken_off(book: Book, random_bytes: RandomBytes, stray: str) -> None:
    """What Unicode counts as a space, and HTTP as part of a value, makes another credential of it."""
    key = new_key(random_bytes)
    await store_key(book, key)
    text = f"{key.id}.{key.secret}"
    pair = basic(f"{key.id}:{key.secret}")
    for header in (
        ("authorization", f"Bearer {text}{stray}"),
        ("authorization", f"Bearer {stray}{text}"),
        ("authorization", f"{pair}{stray}"),
        ("x-api-key", f"{text}{stray}"),
        ("x-api-key", f"{stray}{text}"),
    ):
        with pytest.raises(CredentialInvalid):
            await authenticator_of(book).authenticate([header])


async def test_caller_is_the_one_of_the_key(book: Book, random_bytes: RandomBytes) -> None:
    """Each of two tenants' keys identifies its own tenant, and is bound to no account."""
    keys = {tenant: new_key(random_bytes) for tenant in ("house", "neighbour")}
    numbers = {tenant: await store_key(book, key, tenant=tenant) for tenant, key in keys.items()}
    authenticator = authenticator_of(book)
    for tenant, key in keys.items():
        caller = (await authenticator.authenticate([("x-api-key", f"{key.id}.{key.secret}")])).caller
        assert (caller.tenant_number, caller.tenant_uid) == (numbers[tenant], f"uid of {tenant}")
        assert (caller.credential_id, caller.account_id) == (key.id, None)


async def test_secret_of_another_key_is_invalid(book: Book, random_bytes: RandomBytes) -> None:
    """One key's id doesn't open with another key's secret, also when both were just used."""
    first, second = new_key(random_bytes), new_key(random_bytes)
    await store_key(book, first)
    await store_key(book, second, tenant="neighbour")
    authenticator = authenticator_of(book)
    for key in (first, second):
        await authenticator.authenticate([("x-api-key", f"{key.id}.{key.secret}")])
    with pytest.raises(CredentialInvalid):
        await authenticator.authenticate([("x-api-key", f"{first.id}.{second.secret}")])


async def test_wrong_key_is_not_remembered(book: Book, random_bytes: RandomBytes) -> None:
    """A key that was refused before it was made opens as soon as it is made."""
    key = new_key(random_bytes)
    authenticator = authenticator_of(book)
    metadata = [("x-api-key", f"{key.id}.{key.secret}")]
    assert await outcome_of(authenticator.authenticate(metadata)) is CredentialInvalid
    await store_key(book, key)
    assert await outcome_of(authenticator.authenticate(metadata)) is Scheme.API_KEY


async def test_right_key_does_not_open_for_a_wrong_secret(book: Book, random_bytes: RandomBytes) -> None:
    """After a key was let in, the same id with another secret is still refused."""
    key = new_key(random_bytes)
    await store_key(book, key)
    authenticator = authenticator_of(book)
    assert await outcome_of(authenticator.authenticate([("x-api-key", f"{key.id}.{key.secret}")])) is Scheme.API_KEY
    assert await outcome_of(authenticator.authenticate([("x-api-key", f"{key.id}.wrong")])) is CredentialInvalid
    assert await outcome_of(authenticator.authenticate([("x-api-key", f"{key.id}.")])) is CredentialInvalid


async def test_scheme_is_that_of_each_call(book: Book, random_bytes: RandomBytes) -> None:
    """A key that came by one scheme is told by its own scheme when it comes by another."""
    key = new_key(random_bytes)
    await store_key(book, key)
    authenticator = authenticator_of(book)
    for name, value, scheme in (
        ("authorization", f"Bearer {key.id}.{key.secret}", Scheme.BEARER),
        ("x-api-key", f"{key.id}.{key.secret}", Scheme.API_KEY),
        ("authorization", basic(f"{key.id}:{key.secret}"), Scheme.BASIC),
        ("authorization", f"Bearer {key.id}.{key.secret}", Scheme.BEARER),
    ):
        assert (await authenticator.authenticate([(name, value)])).scheme is scheme


async def test_empty_secret_never_opens(book: Book) -> None:
    """A credential without a secret is refused, even if the ledger held the hash of nothing."""
    await store_key(book, Key("key-1", ""))
    authenticator = authenticator_of(book)
    for metadata in ([("x-api-key", "key-1.")], [("x-api-key", "key-1")], [("authorization", basic("key-1:"))]):
        assert await outcome_of(authenticator.authenticate(metadata)) is CredentialInvalid


async def test_separators_inside_a_secret(book: Book) -> None:
    """The first separator ends the id, so that a secret may hold points and colons."""
    key = Key("key-1", "a.b:c.d")
    await store_key(book, key)
    authenticator = authenticator_of(book)
    assert (
        await outcome_of(authenticator.authenticate([("authorization", f"Bearer {key.id}.{key.secret}")]))
        is Scheme.BEARER
    )
    assert (
        await outcome_of(authenticator.authenticate([("authorization", basic(f"{key.id}:{key.secret}"))]))
        is Scheme.BASIC
    )


async def test_length_is_limited(book: Book) -> None:
    """A right credential of 8,192 characters opens, and one of 8,193 is refused."""
    assert CREDENTIAL_CHARACTERS_MAX == 8192
    longest = Key("longest", "x" * (CREDENTIAL_CHARACTERS_MAX - len("Bearer longest.")))
    too_long = Key("toolong", longest.secret + "x")
    await store_key(book, longest)
    await store_key(book, too_long, tenant="neighbour")
    authenticator = authenticator_of(book)
    assert (
        await outcome_of(authenticator.authenticate([("authorization", f"Bearer longest.{longest.secret}")]))
        is Scheme.BEARER
    )
    assert (
        await outcome_of(authenticator.authenticate([("authorization", f"Bearer toolong.{too_long.secret}")]))
        is CredentialInvalid
    )


async def test_refusal_does_not_tell_what_was_wrong(book: Book, random_bytes: RandomBytes) -> None:
    """An unknown id and a wrong secret are refused in the same words, and without the credential in them."""
    key = new_key(random_bytes)
    await store_key(book, key)
    authenticator = authenticator_of(book)
    told = set()
    for credential in (f"{key.id}.wrong", f"unknown.{key.secret}", "malformed"):
        with pytest.raises(CredentialInvalid) as refusal:
            await authenticator.authenticate([("x-api-key", credential)])
        told.add((refusal.value.message, *refusal.value.metadata.items()))
    assert told == {("the credential is not valid",)}


async def test_secret_is_not_in_the_database(tmp_path: Path, clock: Clock, random_bytes: RandomBytes) -> None:
    """No file of the database holds a secret, as text or as bytes, while it is open or after it is closed."""
    key = new_api_key(random_bytes)
    key_id, _, secret = key.text.partition(".")

    def content() -> bytes:
        return b"".join(path.read_bytes() for path in sorted(tmp_path.iterdir()))

    contents = []
    async with open_book(f"sqlite+aiosqlite:///{tmp_path}/daybook.db", clock, random_bytes) as book:
        await store_key(book, Key(key_id, secret))
        await authenticator_of(book).authenticate([("x-api-key", key.text)])
        contents.append(content())
    contents.append(content())
    for stored in contents:
        assert key_id.encode() in stored
        assert hashlib.sha256(secret.encode()).digest() in stored
        assert secret.encode() not in stored
        assert base64.urlsafe_b64decode(secret + "=") not in stored
        assert key.text.encode() not in stored


def test_new_key_is_80_and_256_random_bits() -> None:
    """A key's id and secret are all of the random bytes and nothing else, and its hash is the secret's SHA-256."""
    key = new_api_key(lambda count: bytes(range(count)))
    key_id, _, secret = key.text.partition(".")
    assert key_id == key.key_id == "00010203040506070809"
    assert secret == "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"
    assert base64.urlsafe_b64decode(secret + "=") == bytes(range(32))
    assert key.secret_hash == hash_secret(secret) == hashlib.sha256(secret.encode()).digest()


@given(st.integers(0, 2**32))
def test_new_keys_differ(seed: int) -> None:
    """Two keys of the same source share neither id nor secret."""
    random_bytes = Random(seed).randbytes
    first, second = new_key(random_bytes), new_key(random_bytes)
    assert first.id != second.id
    assert first.secret != second.secret


async def test_key_that_is_gone_is_refused_within_seconds(book: Book, random_bytes: RandomBytes) -> None:
    """A key that has gone from the database may open for 5 seconds more, and is refused from then on."""
    assert KEY_CACHED_SECONDS_MAX <= 5
    key = new_key(random_bytes)
    await store_key(book, key)
    seconds = 0.0
    authenticator = authenticator_of(book, lambda: seconds)
    metadata = [("x-api-key", f"{key.id}.{key.secret}")]
    await authenticator.authenticate(metadata)
    async with writing(book.database) as connection:
        await connection.execute(text("DELETE FROM api_keys"))
    seconds = KEY_CACHED_SECONDS_MAX
    assert await outcome_of(authenticator.authenticate(metadata)) is CredentialInvalid


async def test_credentials_are_kept_in_bounds(
    book: Book, random_bytes: RandomBytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the bound the one goes that was looked up longest ago, and is looked up again when it comes."""
    monkeypatch.setattr(auth, "CREDENTIALS_CACHED_MAX", 3)
    keys = [new_key(random_bytes) for _ in range(4)]
    for number, key in enumerate(keys):
        await store_key(book, key, tenant=f"house-{number}")
    seconds = 0.0
    authenticator = authenticator_of(book, lambda: seconds)

    async def is_looked_up(key: Key) -> bool:
        before = book.credentials.lookup_count
        await authenticator.authenticate([("x-api-key", f"{key.id}.{key.secret}")])
        return book.credentials.lookup_count > before

    first, second, third, fourth = keys
    assert [await is_looked_up(key) for key in (first, first)] == [True, False]
    seconds = 1.0
    assert [await is_looked_up(key) for key in (second, first, second)] == [True, False, False]
    seconds = KEY_CACHED_SECONDS_MAX
    assert [await is_looked_up(key) for key in (first, third, fourth)] == [True, True, True]
    assert [await is_looked_up(key) for key in (first, third, fourth, second)] == [False, False, False, True]
    assert len(authenticator._opened) == 3
    seconds = 2 * KEY_CACHED_SECONDS_MAX
    assert await is_looked_up(fourth)
    assert len(authenticator._opened) == 1, "what opens no more without a look is not kept either"


async def test_long_spellings_of_a_key_are_not_kept(book: Book, random_bytes: RandomBytes) -> None:
    """A key opens with any number of spaces around it, and no spelling is kept."""
    key = new_key(random_bytes)
    await store_key(book, key)
    authenticator = authenticator_of(book, stopwatch=lambda: 0.0)
    room = CREDENTIAL_CHARACTERS_MAX - 200

    async def open_with(spaces: int) -> None:
        header = ("authorization", f"Bearer {' ' * spaces}{key.id}.{key.secret}{' ' * (room - spaces)}")
        assert (await authenticator.authenticate([header])).caller.credential_id == key.id
        assert authenticator.cached_credential_id([header]) == key.id

    await open_with(0)
    tracemalloc.start()
    try:
        for spaces in range(1, SPELLINGS):
            await open_with(spaces)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < SPELLINGS * room / 4


async def test_key_keeps_its_share_while_others_are_looked_up(
    book: Book, random_bytes: RandomBytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder of a key that was let in is known, whatever is looked up since, within a bound."""
    monkeypatch.setattr(auth, "IDS_CACHED_MAX", 2)
    keys = [new_key(random_bytes) for _ in range(3)]
    for number, key in enumerate(keys):
        await store_key(book, key, tenant=f"house-{number}")
    seconds = 0.0
    authenticator = authenticator_of(book, lambda: seconds)
    first, second, third = ([("x-api-key", f"{key.id}.{key.secret}")] for key in keys)
    assert authenticator.cached_credential_id(first) == ""
    await authenticator.authenticate(first)
    seconds = 2 * KEY_CACHED_SECONDS_MAX
    await authenticator.authenticate(second)
    assert [authenticator.cached_credential_id(each) for each in (first, second, third)] == [keys[0].id, keys[1].id, ""]
    await authenticator.authenticate(third)
    assert [authenticator.cached_credential_id(each) for each in (first, second, third)] == ["", keys[1].id, keys[2].id]


@dataclass
class Stopwatch:
    """Stands still until a test moves it."""

    seconds: float = 0.0

    def __call__(self) -> float:
        """What it shows."""
        return self.seconds


async def test_every_process_refuses_a_revoked_key_within_seconds(book: Book, random_bytes: RandomBytes) -> None:
    """A process that let a key in just before it was revoked refuses it 5 seconds later, one that didn't at once."""
    key = new_key(random_bytes)
    tenant_number = await store_key(book, key)
    stopwatch = Stopwatch()
    warm, cold = authenticator_of(book, stopwatch), authenticator_of(book, stopwatch)
    metadata = [("x-api-key", f"{key.id}.{key.secret}")]
    assert await outcome_of(warm.authenticate(metadata)) is Scheme.API_KEY
    await book.credentials.revoke_api_key(tenant_number, key.id, NOON)
    assert await outcome_of(cold.authenticate(metadata)) is CredentialInvalid
    stopwatch.seconds = KEY_CACHED_SECONDS_MAX
    assert await outcome_of(warm.authenticate(metadata)) is CredentialInvalid


async def test_every_process_takes_a_rotated_key_at_once(book: Book, random_bytes: RandomBytes) -> None:
    """A process that has the old secret in memory takes the new one at once, and refuses the old 5 seconds later."""
    key = new_key(random_bytes)
    tenant_number = await store_key(book, key)
    stopwatch = Stopwatch()
    authenticator = authenticator_of(book, stopwatch)
    old, new = ([("x-api-key", f"{key.id}.{secret}")] for secret in (key.secret, "new"))
    assert await outcome_of(authenticator.authenticate(old)) is Scheme.API_KEY
    await book.credentials.rotate_api_key(tenant_number, key.id, hash_secret("new"), lambda *_: [])
    assert await outcome_of(authenticator.authenticate(new)) is Scheme.API_KEY
    stopwatch.seconds = KEY_CACHED_SECONDS_MAX
    assert await outcome_of(authenticator.authenticate(old)) is CredentialInvalid
    assert await outcome_of(authenticator.authenticate(new)) is Scheme.API_KEY


async def test_only_who_is_let_in_uses_a_key(book: Book, random_bytes: RandomBytes) -> None:
    """Each call that is let in is noted as a use of its key, from memory too, and no other call is."""
    key = new_key(random_bytes)
    await store_key(book, key)
    uses: list[str] = []
    authenticator = Authenticator(book.credentials, book.clock, uses.append)
    for secret in (key.secret, "wrong", key.secret, key.secret):
        await outcome_of(authenticator.authenticate([("x-api-key", f"{key.id}.{secret}")]))
    await outcome_of(authenticator.authenticate([("x-api-key", "unknown.x")]))
    assert uses == [key.id] * 3


def test_secret_is_in_no_representation() -> None:
    """What is printed of a new key is not its secret."""
    key = new_api_key(Random(1).randbytes)
    assert key.key_id in repr(key)
    assert key.text.partition(".")[2] not in repr(key)
