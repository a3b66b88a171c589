"""A power cut between any two operations of SQLite's storage: what was acknowledged is there once, and service goes on.

The storage records a workload. From the record come the files that a power cut could leave: all that was synced, and of
the rest each sector or not. Production code opens them, with the real driver.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from random import Random
from typing import NamedTuple
from uuid import UUID

import pytest
from daybook.v1.account_pb2 import Account
from daybook.v1.transaction_pb2 import Transaction, Usage

from server.book import Book, open_book
from server.ledger.access import Caller
from server.ledger.accounts import AccountRecord
from server.ledger.audit import Finding
from server.ledger.errors import ServiceUnavailable
from server.ledger.idempotency import Request
from server.ledger.instants import SECOND, Instant
from server.ledger.names import RandomBytes
from server.ledger.posting import Draft
from server.store import sqlite
from server.store.migrate import is_fit
from server.store.sqlite import SQLite
from server.usecases.transactions import NewTransaction
from tests.support.clock import NOON, Clock
from tests.support.failing_storage import DAMAGES_OF_WRITERS, Damage, FailingStorage, Kind
from tests.support.processes import sqlite_url

GRANT, CHARGE = Transaction.GRANT, Transaction.CHARGE
CREDIT = 1_000_000
CALLER = Caller(1, "u", "key", scopes=frozenset({"admin"}))
SEED = 10
"""With this seed, syncs of the database and of its log fail, and the log begins anew between them."""
STARTS = 12
"""Number of cuts during the first start: each needs the migrations."""
ROWS = "SELECT account_number, amount, body FROM transactions"

Call = Callable[[Book], Awaitable[object]]
Rows = Counter[tuple[int, int, str]]
"""How often there is a transaction with this account, amount and request_id."""


class Step(NamedTuple):
    """A call of the workload, which has one effect however often it is repeated."""

    call: Call
    is_atomic: bool = True
    time: Instant = NOON


class Acknowledged(NamedTuple):
    """A step that was acknowledged."""

    step: Step
    cut: int
    """The number of operations of the storage at that moment."""
    rows: Rows
    """All transactions at that moment."""


def request(request_id: str) -> Request:
    """The identity of a call."""
    return Request(request_id, bytes(32))


def new(
    kind: Transaction.Kind.ValueType,
    credits_: int,
    request_id: str = "",
    *,
    account_id: str = "acme",
    expire_time: Instant | None = None,
) -> NewTransaction:
    """A transaction to be posted; a charge writes to every table to which a charge can."""
    is_charge = kind == CHARGE
    details = Transaction(usage=Usage(model="m"), labels={"location": "l"}) if is_charge else Transaction()
    draft = Draft(kind, "computing", credits_ * CREDIT, is_usage=is_charge, expire_time=expire_time)
    return NewTransaction(account_id, draft, details, request(request_id))


def post(transaction: NewTransaction) -> Call:
    """A call that posts one transaction."""
    return lambda book: book.transactions.create(CALLER, transaction)


async def refund(book: Book) -> object:
    """A refund of a part of a charge, which is known already."""
    charged = Transaction.FromString(await book.transactions.create(CALLER, FIRST_CHARGE))
    uid = UUID(charged.uid)
    return await book.transactions.refund(CALLER, "acme", uid, CREDIT // 2, Transaction(), request("refund"))


async def transfer(book: Book) -> object:
    """Credits of two lots to the other account."""
    return await book.transactions.transfer(CALLER, "acme", "other", 60 * CREDIT, Transaction(), request("transfer"))


async def batch(book: Book) -> object:
    """Three grants to two accounts, all or none."""
    items = [new(GRANT, 7), new(GRANT, 7, account_id="other"), new(GRANT, 8)]
    return await book.transactions.create_batch(CALLER, items, request("batch"))


async def group(book: Book) -> object:
    """Charges that share commits."""
    charges = [new(CHARGE, -1, f"group {number}") for number in range(4)]
    return await asyncio.gather(*(book.transactions.create(CALLER, each) for each in charges))


FIRST_CHARGE = new(CHARGE, -1, "first charge")
HALF_AN_HOUR_LATER, AN_HOUR_LATER = NOON + 1800 * SECOND, NOON + 3600 * SECOND
WORKLOAD = (
    Step(post(new(GRANT, 100, "permanent"))),
    Step(post(new(GRANT, 50, "expires", expire_time=HALF_AN_HOUR_LATER))),
    Step(post(FIRST_CHARGE)),
    Step(refund),
    Step(transfer),
    Step(post(new(GRANT, 20, "expires too", expire_time=HALF_AN_HOUR_LATER))),
    Step(post(new(CHARGE, -1, "second charge"))),
    Step(batch),
    Step(group, is_atomic=False),
    # The rest of the expiring credits expires first.
    Step(post(new(CHARGE, -1, "an hour later")), time=AN_HOUR_LATER),
    Step(post(new(CHARGE, -1, "last charge")), time=AN_HOUR_LATER),
    Step(post(new(GRANT, 1, "last")), time=AN_HOUR_LATER),
)


@pytest.fixture
def storage(tmp_path: Path, migrated_file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FailingStorage]:
    """The storage of an empty ledger, which checkpoints its log and begins it anew every few commits."""
    monkeypatch.setattr(sqlite, "LOG_PAGES_MAX", 15)
    file = tmp_path / "daybook.db"
    shutil.copyfile(migrated_file, file)
    with FailingStorage(file).connected() as storage:
        yield storage


def read_rows(connection: sqlite3.Connection) -> Rows:
    """All transactions."""
    return Counter(
        (account_number, amount, Transaction.FromString(body).request_id)
        for account_number, amount, body in connection.execute(ROWS).fetchall()
    )


async def open_accounts(book: Book) -> None:
    """Creates the tenant and its accounts."""
    await book.credentials.create_tenant(slug="t", uid="u", display_name="T", create_time=book.clock())
    for account_id in ("acme", "other"):
        account = AccountRecord(account_id, Account.SPACE, "", 0, b"")
        await book.accounts.create(CALLER, account, request(""), hour_anchor=None)


async def call_until_acknowledged(storage: FailingStorage, random: Random, step: Step, book: Book) -> None:
    """Makes a call while some operation fails, and again if it was refused."""
    is_refused = True
    while is_refused:
        damage = random.choice(DAMAGES_OF_WRITERS)
        with storage.failing(damage, random.randrange(4 if damage is Damage.NOT_SYNCED else 50)):
            try:
                await step.call(book)
                is_refused = False
            except ServiceUnavailable:
                pass


@pytest.mark.long
@pytest.mark.parametrize("fails", [False, True], ids=["sound", "failing"])
async def test_power_cut(
    tmp_path: Path, storage: FailingStorage, clock: Clock, random_bytes: RandomBytes, fails: bool
) -> None:
    """After a cut between any two operations each acknowledged transaction is there once, and the books are sound.

    The call that was under way has its whole effect or none, and one effect when repeated. On the failing storage,
    operations fail during each call before it is acknowledged.
    """
    random = Random(SEED)
    done: list[Acknowledged] = []
    async with open_book(sqlite_url(storage.file), clock, random_bytes) as book:
        await open_accounts(book)
        start = len(storage.operations)
        for step in WORKLOAD:
            clock.now = step.time
            if fails:
                await call_until_acknowledged(storage, random, step, book)
            else:
                await step.call(book)
            done.append(Acknowledged(step, len(storage.operations), read_rows(sqlite_of(book).reader)))
    kinds = Counter((each.name.removeprefix(storage.file.name), each.kind) for each in storage.operations)
    log_writes = [each for each in storage.operations if each.kind is Kind.WRITE and each.name.endswith("-wal")]
    assert sum(not each.offset for each in log_writes) > 3, "the log begins anew"
    assert not fails or {("", Kind.FAILED_SYNC), ("-wal", Kind.FAILED_SYNC)} < kinds.keys()

    image = tmp_path / "image" / "daybook.db"
    image.parent.mkdir()
    shutil.copyfile(storage.file, image)
    verified: set[str] = set()
    async with open_book(sqlite_url(image), clock) as book:
        for cut in range(start, len(storage.operations) + 1):
            # New connections open the next image; only the compiled statements are kept.
            await sqlite_of(book)._disconnect()
            write_image(image, storage.after_power_cut(cut, random))
            await check_image(book, image, clock, done, cut, verified)


def sqlite_of(book: Book) -> SQLite:
    """The engine of a book."""
    engine = book.database.primary
    assert isinstance(engine, SQLite)
    return engine


def write_image(image: Path, files: Mapping[str, bytes]) -> None:
    """Replaces the files of a database."""
    for file in image.parent.iterdir():
        file.unlink()
    for name, content in files.items():
        (image.parent / name).write_bytes(content)


async def check_image(
    book: Book, image: Path, clock: Clock, done: list[Acknowledged], cut: int, verified: set[str]
) -> None:
    """Compares a ledger with what was acknowledged before the cut, and repeats the call that was under way.

    Contents are verified once, because many images have the same.
    """
    assert await is_fit(book.database), cut
    acknowledged = sum(each.cut <= cut for each in done)
    before = done[acknowledged - 1].rows if acknowledged else Rows()
    with closing(sqlite3.connect(image)) as connection:
        found, content = read_rows(connection), "".join(connection.iterdump())
        if content not in verified:
            assert not await findings_of(book), cut
            verified.add(content)
        if acknowledged == len(done):
            assert found == before, cut
        else:
            step, _, after = done[acknowledged]
            assert before <= found <= after, cut
            assert found in (before, after) or not step.is_atomic, cut
            clock.now = step.time
            await step.call(book)
            assert read_rows(connection) == after, cut
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)], cut


async def findings_of(book: Book) -> list[Finding]:
    """What a verification of everything finds."""
    return [each async for each in book.verification.verify_all(None) if isinstance(each, Finding)]


async def test_power_cut_during_the_first_start(tmp_path: Path, clock: Clock) -> None:
    """A database whose creation was cut off is created at the next start, without help."""
    random = Random(SEED)
    with FailingStorage(tmp_path / "daybook.db").connected() as storage:
        async with open_book(sqlite_url(storage.file), clock) as book:
            await open_accounts(book)
    image = tmp_path / "image" / "daybook.db"
    image.parent.mkdir()
    for cut in sorted(random.sample(range(len(storage.operations)), STARTS)):
        write_image(image, storage.after_power_cut(cut, random))
        async with open_book(sqlite_url(image), clock) as book:
            if await book.credentials.has_tenant():
                continue
            await open_accounts(book)
            await WORKLOAD[0].call(book)
            assert not await findings_of(book), cut
