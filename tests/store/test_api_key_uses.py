"""The last use of each API key: collected in memory and written periodically in one statement."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest
from sqlalchemy import event

from server.book import Book, open_book
from server.ledger.access import DEFAULT_SCOPES, Caller
from server.ledger.errors import ClockSkewed, ServiceUnavailable
from server.ledger.instants import SECOND, Instant
from server.store.credentials import CredentialStore
from server.store.database import Database
from server.usecases import api_key_uses
from server.usecases.api_key_uses import ApiKeyUses
from server.usecases.api_keys import ApiKeyDraft
from tests.support.callers import Server
from tests.support.clock import NOON, Clock
from tests.support.markers import only_sqlite


@contextmanager
def statements(database: Database) -> Iterator[list[str]]:
    """Records the statements of the writer's connection."""
    engine = database.primary.writer
    executed: list[str] = []

    def execute(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        executed.append(statement)

    event.listen(engine, "before_cursor_execute", execute)
    try:
        yield executed
    finally:
        event.remove(engine, "before_cursor_execute", execute)


async def make_keys(book: Book, count: int) -> list[str]:
    """Creates keys of a new tenant; returns their ids."""
    number = await book.credentials.create_tenant(slug="house", uid="u", display_name="n", create_time=NOON)
    caller = Caller(number, "u", "key", scopes=frozenset({"admin"}))
    draft = ApiKeyDraft(DEFAULT_SCOPES)
    return [(await book.api_keys.create(caller, draft))[0].id for _ in range(count)]


async def last_use(book: Book, key_id: str) -> Instant | None:
    """The stored last_use_time of a key."""
    record = await book.credentials.api_key(key_id)
    assert record is not None
    return record.last_use_time


@pytest.fixture
async def key_ids(book: Book) -> list[str]:
    """The ids of three keys."""
    return await make_keys(book, 3)


@only_sqlite
async def test_uses_are_written_together(server: Server) -> None:
    """Calls write nothing; a flush writes the uses of all keys in one statement."""
    tenant_number = await server.create_tenant("house")
    clients = [await server.client(tenant_number) for _ in range(3)]
    await clients[0].create_account("acme")
    with statements(server.book.database) as executed:
        for client in clients * 5:
            await client.balance()
        assert executed == []
        await server.book.api_key_uses.flush()
        assert [statement.split(" SET ")[0] for statement in executed if not statement.startswith("BEGIN")] == [
            "UPDATE api_keys"
        ]
        await server.book.api_key_uses.flush()
        assert len([statement for statement in executed if not statement.startswith("BEGIN")]) == 1
    for client in clients:
        assert await last_use(server.book, client.key.partition(".")[0]) == NOON


async def test_each_key_has_its_own_last_use(book: Book, clock: Clock, key_ids: list[str]) -> None:
    """The last use of each key is written, and keys without a use are unchanged."""
    for key_id in (key_ids[0], key_ids[1], key_ids[0]):
        clock.advance(1)
        book.api_key_uses.note(key_id)
    await book.api_key_uses.flush()
    times = [await last_use(book, key_id) for key_id in key_ids]
    assert times == [NOON + 3 * SECOND, NOON + 2 * SECOND, None]
    clock.advance(1)
    book.api_key_uses.note(key_ids[1])
    await book.api_key_uses.flush()
    assert [await last_use(book, key_id) for key_id in key_ids] == [NOON + 3 * SECOND, NOON + 4 * SECOND, None]


async def test_a_later_stored_use_is_kept(book: Book, clock: Clock, key_ids: list[str]) -> None:
    """A late write keeps a later time of another process, and ignores a key that does not exist."""
    late = ApiKeyUses(book.credentials, clock)
    for key_id in (*key_ids, "gone"):
        late.note(key_id)
    clock.advance(1)
    book.api_key_uses.note(key_ids[0])
    await book.api_key_uses.flush()
    await late.flush()
    assert [await last_use(book, key_id) for key_id in key_ids] == [NOON + SECOND, NOON, NOON]


async def test_more_keys_than_one_statement_are_written(book: Book) -> None:
    """Uses of 1,001 keys, too many for one statement, are all written."""
    key_ids = await make_keys(book, 3)
    others = [f"unknown-{number}" for number in range(998)]
    for key_id in (key_ids[0], *others[:499], key_ids[1], *others[499:], key_ids[2]):
        book.api_key_uses.note(key_id)
    await book.api_key_uses.flush()
    assert [await last_use(book, key_id) for key_id in key_ids] == [NOON] * 3


class BrokenStore(CredentialStore):
    """A store whose writes fail on demand."""

    def __init__(self) -> None:
        self.is_broken = False
        self.written: list[dict[str, Instant]] = []
        self.attempted = asyncio.Event()
        self.during_write: Callable[[], None] = lambda: None
        """Called during each write."""

    async def record_uses(self, uses: Mapping[str, Instant]) -> None:
        """Records the uses, or raises ServiceUnavailable."""
        self.attempted.set()
        self.during_write()
        if self.is_broken:
            raise ServiceUnavailable
        self.written.append(dict(uses))


async def test_a_failed_write_is_repeated() -> None:
    """A failed write loses no use, and keeps a later use that was noted during it."""
    store, clock = BrokenStore(), Clock()
    uses = ApiKeyUses(store, clock)
    uses.note("one")
    uses.note("two")

    def use_again() -> None:
        clock.advance(1)
        uses.note("two")

    store.is_broken, store.during_write = True, use_again
    with pytest.raises(ServiceUnavailable):
        await uses.flush()
    store.is_broken, store.during_write = False, lambda: None
    await uses.flush()
    await uses.flush()
    assert store.written == [{"one": NOON, "two": NOON + SECOND}]


async def test_a_skewed_clock_records_no_use() -> None:
    """A use at a skewed clock is not recorded, so that no stored time is in the future."""

    def skewed() -> Instant:
        raise ClockSkewed(1)

    store = BrokenStore()
    uses = ApiKeyUses(store, skewed)
    uses.note("one")
    await uses.flush()
    assert store.written == []


async def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most KEYS_MAX keys are collected, and collected keys still get later times."""
    monkeypatch.setattr(api_key_uses, "KEYS_MAX", 2)
    store, clock = BrokenStore(), Clock()
    uses = ApiKeyUses(store, clock)
    for key_id in ("one", "two", "three"):
        uses.note(key_id)
    clock.advance(1)
    uses.note("one")
    await uses.flush()
    uses.note("three")
    await uses.flush()
    assert store.written == [{"one": NOON + SECOND, "two": NOON}, {"three": NOON + SECOND}]


async def test_uses_are_written_periodically(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses are written periodically, also after a failure, and once more at the end."""
    monkeypatch.setattr(api_key_uses, "FLUSH_SECONDS", 0.001)
    store = BrokenStore()
    store.is_broken = True
    uses = ApiKeyUses(store, Clock())
    async with uses.flushing():
        for key_id in ("one", "two"):
            uses.note(key_id)
            async with asyncio.timeout(30):
                await store.attempted.wait()
            store.is_broken = False
            store.attempted.clear()
        async with asyncio.timeout(30):
            while uses._latest:
                await asyncio.sleep(0)
        uses.note("three")
    assert {key_id for written in store.written for key_id in written} == {"one", "two", "three"}


async def test_a_closed_book_has_written_its_uses(database_url: str, clock: Clock) -> None:
    """A reopened ledger has the uses that were noted before it was closed."""
    async with open_book(database_url, clock) as book:
        (key_id,) = await make_keys(book, 1)
        book.api_key_uses.note(key_id)
    async with open_book(database_url, clock) as book:
        assert await last_use(book, key_id) == NOON
