"""The keys of page tokens: which key seals, and how long older keys open."""

from __future__ import annotations

import asyncio
from random import Random

import pytest
from daybook.v1.ledger_service_pb2 import ListTransactionsRequest

from server.book import Book
from server.ledger.access import Caller
from server.ledger.errors import PageTokenInvalid
from server.ledger.instants import HOUR, SECOND, Instant
from server.ledger.paging import TransactionKey
from server.store.credentials import TokenKey
from server.transport import token_keys
from server.transport.page_tokens import Listing, PageTokens
from server.transport.token_keys import TokenKeys, refreshed_token_keys
from tests.support.clock import NOON, Clock

OLD, NEW, NEWEST = (bytes([n]) * 32 for n in (1, 2, 3))
PLACE = TransactionKey(NOON, 7, 42)
LISTING = Listing.of(
    "daybook.v1.Ledger/ListTransactions",
    Caller(1, "t", "key"),
    ListTransactionsRequest(parent="accounts/acme"),
    ("page_token", "page_size"),
)


def tokens_of(clock: Clock, *keys: TokenKey) -> PageTokens:
    """Returns page tokens with these keys, newest first."""
    return PageTokens(TokenKeys(keys, clock), Random(1).randbytes)


def opens(tokens: PageTokens, token: str) -> bool:
    """Whether a token opens, which must then yield PLACE."""
    try:
        place = tokens.open(LISTING, token, TransactionKey)
    except PageTokenInvalid:
        return False
    assert place == PLACE
    return True


@pytest.mark.parametrize(
    ("age", "sealer"),
    [
        (0, OLD),
        (60 * SECOND - 1, OLD),
        (60 * SECOND, NEW),
        (30 * 24 * HOUR, NEW),
        # The clock went back.
        (-HOUR, OLD),
    ],
)
def test_new_key_seals_after_a_minute(age: Instant, sealer: bytes) -> None:
    """A new key seals after a minute, when every process has it; until then the previous key seals."""
    clock = Clock()
    clock.now = NOON + age
    token = tokens_of(clock, TokenKey(NEW, NOON), TokenKey(OLD, NOON - HOUR)).seal(LISTING, PLACE)
    for key in (OLD, NEW):
        assert opens(tokens_of(clock, TokenKey(key, 0)), token) == (key == sealer)


def test_first_key_seals_at_once() -> None:
    """A single key seals immediately."""
    clock = Clock()
    only = TokenKey(NEW, NOON)
    assert opens(tokens_of(clock, only), tokens_of(clock, only).seal(LISTING, PLACE))


@pytest.mark.parametrize(
    ("age", "good"),
    [
        (0, True),
        (60 * SECOND, True),
        (60 * SECOND + 24 * HOUR - 1, True),
        (60 * SECOND + 24 * HOUR, False),
        (365 * 24 * HOUR, False),
    ],
)
def test_key_opens_for_a_day_after_its_successor_seals(age: Instant, good: bool) -> None:
    """An old key opens until 24 hours after its successor starts to seal, so that lists can be read to their end."""
    clock = Clock()
    old, new = TokenKey(OLD, NOON - HOUR), TokenKey(NEW, NOON)
    token = tokens_of(clock, old).seal(LISTING, PLACE)
    clock.now = NOON + age
    assert opens(tokens_of(clock, new, old), token) == good
    # A further key does not change this.
    assert opens(tokens_of(clock, TokenKey(NEWEST, NOON + SECOND), new, old), token) == good


def test_new_key_opens_before_it_seals() -> None:
    """A process whose clock is behind opens tokens that another process has sealed with a new key."""
    clock = Clock()
    old, new = TokenKey(OLD, NOON - HOUR), TokenKey(NEW, NOON)
    clock.now = NOON + 60 * SECOND
    token = tokens_of(clock, new, old).seal(LISTING, PLACE)
    clock.now = NOON
    assert opens(tokens_of(clock, new, old), token)


async def test_running_process_gets_a_new_key(book: Book, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A running process gets an added key, and tokens that it sealed before still open."""
    monkeypatch.setattr(token_keys, "REFRESH_SECONDS", 0.01)
    await book.credentials.ensure_token_key(OLD, clock())
    async with refreshed_token_keys(book.credentials, clock) as keys:
        tokens = PageTokens(keys, Random(1).randbytes)
        before = tokens.seal(LISTING, PLACE)
        await book.credentials.add_token_key(NEW, clock())
        async with asyncio.timeout(30):
            while len(keys.opening) == 1:
                await asyncio.sleep(0.01)
        clock.advance(60)
        after = tokens.seal(LISTING, PLACE)
        assert opens(tokens_of(clock, TokenKey(NEW, 0)), after)
        assert opens(tokens, before)
        assert opens(tokens, after)
