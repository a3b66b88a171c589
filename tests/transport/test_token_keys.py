"""The keys of page tokens: which one seals, and how long those before it open."""

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
    """Seals and opens with these keys, newest first."""
    return PageTokens(TokenKeys(keys, clock), Random(1).randbytes)


def opens(tokens: PageTokens, token: str) -> bool:
    """Whether a token is good, and then leads to its place."""
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
        # A clock that went back.
        (-HOUR, OLD),
    ],
)
def test_new_key_seals_after_a_minute(age: Instant, sealer: bytes) -> None:
    """Until every process has seen a new key, the one before it seals."""
    clock = Clock()
    clock.now = NOON + age
    token = tokens_of(clock, TokenKey(NEW, NOON), TokenKey(OLD, NOON - HOUR)).seal(LISTING, PLACE)
    for key in (OLD, NEW):
        assert opens(tokens_of(clock, TokenKey(key, 0)), token) == (key == sealer)


def test_first_key_seals_at_once() -> None:
    """Where there is but one key, nobody has to wait for it."""
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
    """Whoever reads a list while the key is replaced has a day to come to its end."""
    clock = Clock()
    old, new = TokenKey(OLD, NOON - HOUR), TokenKey(NEW, NOON)
    token = tokens_of(clock, old).seal(LISTING, PLACE)
    clock.now = NOON + age
    assert opens(tokens_of(clock, new, old), token) == good
    # A further key changes nothing about that.
    assert opens(tokens_of(clock, TokenKey(NEWEST, NOON + SECOND), new, old), token) == good


def test_new_key_opens_before_it_seals() -> None:
    """A process whose clock is behind opens what another has sealed with the new key."""
    clock = Clock()
    old, new = TokenKey(OLD, NOON - HOUR), TokenKey(NEW, NOON)
    clock.now = NOON + 60 * SECOND
    token = tokens_of(clock, new, old).seal(LISTING, PLACE)
    clock.now = NOON
    assert opens(tokens_of(clock, new, old), token)


async def test_processes_see_a_new_key(book: Book, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that is added reaches a process that runs, and what it had sealed before stays good."""
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
