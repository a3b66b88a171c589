"""The index of SQLite's log: what a mark stands for while another process writes, and where there is none."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from random import Random

import pytest
from daybook.v1.ledger_service_pb2 import ListTransactionsRequest
from daybook.v1.transaction_pb2 import Transaction

from server.store import transactions, wal_index
from server.store.database import Database
from server.store.wal_index import WalIndex
from tests.store.other_process import connect, other_process
from tests.support.callers import Client, Server
from tests.support.markers import only_sqlite
from tests.support.statement_counter import statements

ADD = "UPDATE numbers SET number = number + 1"
# More than the cache of two pages, so that it goes to the log before it is committed.
ADD_MUCH = "UPDATE numbers SET number = number + 1, padding = randomblob(40000)"
ASIDE = "INSERT INTO aside VALUES (zeroblob(5000))"
STEPS = (
    f"BEGIN IMMEDIATE; {ADD}; COMMIT",
    f"BEGIN IMMEDIATE; {ADD_MUCH}; COMMIT",
    f"BEGIN IMMEDIATE; {ADD_MUCH}; ROLLBACK",
    f"BEGIN IMMEDIATE; {ASIDE}; COMMIT",
    "BEGIN IMMEDIATE; DELETE FROM aside; COMMIT",
    "PRAGMA wal_checkpoint(PASSIVE)",
    "PRAGMA wal_checkpoint(RESTART)",
    "PRAGMA wal_checkpoint(TRUNCATE)",
    "VACUUM",
    "CREATE TABLE IF NOT EXISTS another (number)",
    "DROP TABLE IF EXISTS another",
)
COMMITS = 200
MARKS = 40


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with a number, in a folder whose name has a space."""
    folder = tmp_path / "two words"
    folder.mkdir()
    with closing(connect(folder / "daybook.db")) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE numbers AS SELECT 0 AS number, x'' AS padding")
        connection.execute("CREATE TABLE aside (padding)")
    return folder / "daybook.db"


@contextmanager
def opened(path: Path) -> Iterator[tuple[sqlite3.Connection, WalIndex]]:
    """A connection that has read, and the index that it has."""
    with closing(connect(path)) as connection:
        content(connection)
        index = WalIndex.find(str(path))
        assert index is not None
        yield connection, index
        index.close()


def content(connection: sqlite3.Connection) -> tuple[int, int, int]:
    """What can be read."""
    ((number,),) = connection.execute("SELECT number FROM numbers")
    ((count,),) = connection.execute("SELECT count(*) FROM aside")
    ((tables,),) = connection.execute("SELECT count(*) FROM sqlite_schema")
    return number, count, tables


def test_a_mark_stands_for_what_is_committed(path: Path) -> None:
    """Whatever others do, no mark comes back with other contents; without them it stays as it is."""
    random = Random(11)
    known: dict[bytes, tuple[int, int, int]] = {}
    with opened(path) as (connection, index):
        for _ in range(8):
            with other_process(path) as other:
                for _ in range(60):
                    before, mark = content(connection), index.mark()
                    assert mark is not None
                    assert known.setdefault(mark, before) == before
                    assert index.mark() == mark
                    other.do(random.choice(STEPS))
                    if content(connection) != before:
                        assert index.mark() != mark
    assert len(set(known.values())) > 100


def test_a_mark_is_of_no_earlier_moment_than_what_is_read_behind_it(path: Path) -> None:
    """Also while another process commits as fast as it can: between two equal marks nothing was."""
    known: dict[bytes, tuple[int, int, int]] = {}
    with opened(path) as (connection, index), other_process(path) as other:
        goal = 0
        while len(known) < MARKS:
            goal += COMMITS
            other.begin(f"{ADD};" * COMMITS)
            while content(connection)[0] < goal:
                first, read, second = index.mark(), content(connection), index.mark()
                if first == second:
                    assert first is not None
                    assert known.setdefault(first, read) == read
            other.end()


def test_a_process_that_is_killed_in_a_transaction(path: Path) -> None:
    """What it had written to the log already is not committed, and the next one that is, is told."""
    with opened(path) as (connection, index):
        before, mark = content(connection), index.mark()
        with other_process(path) as other:
            other.do(f"BEGIN IMMEDIATE; {ADD_MUCH}")
            assert (content(connection), index.mark()) == (before, mark)
        assert (content(connection), index.mark()) == (before, mark)
        with other_process(path) as other:
            other.do(ADD)
        assert index.mark() != mark
        assert content(connection)[0] == before[0] + 1


def test_an_index_in_several_parts(path: Path) -> None:
    """A long log has more of it, each part in a place of its own; the header is in the first."""
    with other_process(path) as other:
        other.do("PRAGMA wal_autocheckpoint = 0")
        for _ in range(4):
            other.do("INSERT INTO aside VALUES (zeroblob(20000000))")
        with opened(path) as (_, index):
            parts = wal_index.MAPS.read_text().count(f"{path}-shm")
            mark = index.mark()
            other.do(ADD)
            assert index.mark() != mark
    assert parts > 2


def test_an_index_that_is_not_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of no file, one that nobody has open, another one, a layout of another time, or on another system."""
    assert WalIndex.find("") is None
    assert WalIndex.find(str(path)) is None
    with opened(path):
        assert WalIndex.find(f"{path}.old") is None
        with monkeypatch.context() as patched:
            patched.setattr(wal_index, "VERSION", wal_index.VERSION[::-1])
            assert WalIndex.find(str(path)) is None
        with monkeypatch.context() as patched:
            patched.setattr(wal_index, "MEMORY", path.parent / "none")
            assert WalIndex.find(str(path)) is None
        monkeypatch.setattr(wal_index, "MAPS", path.parent / "none")
        assert WalIndex.find(str(path)) is None


def test_memory_that_is_gone() -> None:
    """There is no mark, in the place of a crash."""
    memory = os.open(wal_index.MEMORY, os.O_RDONLY)
    assert WalIndex(memory, 0).mark() is None
    os.close(memory)


def open_descriptors() -> int:
    """How many this process has."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def test_a_database_that_was_let_go(path: Path) -> None:
    """It gives no marks any more, for it could give one of before again, and keeps no descriptor."""
    descriptors = open_descriptors()
    database = Database(f"sqlite+aiosqlite:///{path}")
    assert database.mark() is not None
    async with database.alone() as connection:
        await connection.exec_driver_sql(ADD)
    assert database.mark() is None
    await database.close()
    assert database.mark() is None
    assert open_descriptors() == descriptors


@only_sqlite
@pytest.mark.parametrize("has_index", [True, False])
async def test_heads_are_read_when_something_is_new(
    server: Server, client: Client, monkeypatch: pytest.MonkeyPatch, has_index: bool
) -> None:
    """Whosever transaction it is. Without an index each is read each time."""
    if not has_index:
        monkeypatch.setattr(wal_index, "MAPS", Path("none"))

    async def page(account: str) -> tuple[list[str], int]:
        request = ListTransactionsRequest(parent=f"accounts/{account}")
        with statements(server.book) as found:
            answer = await client.ledger.ListTransactions(request, metadata=client.metadata)
        return [row.name for row in answer.transactions], len(found.texts)

    for account in ("acme", "other"):
        await client.create_account(account)
    names: dict[str, list[str]] = {"acme": [], "other": []}
    for account in ("acme", "other", "acme"):
        names[account].insert(0, (await client.post(account, Transaction.GRANT, "1")).name)
        for each, expected in names.items():
            assert (await page(each))[0] == expected
        for each, expected in names.items():
            assert await page(each) == (expected, int(not has_index))


@only_sqlite
async def test_heads_have_a_bound(server: Server, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond HEADS_CACHED_MAX the one that was read first is read again."""
    monkeypatch.setattr(transactions, "HEADS_CACHED_MAX", 2)
    accounts = ("first", "second", "third")
    for account in accounts:
        await client.create_account(account)
        await client.post(account, Transaction.GRANT, "1")
    reads = []
    for account in (*accounts, "third", "second", "first", "third", "second"):
        with statements(server.book) as found:
            await client.ledger.ListTransactions(
                ListTransactionsRequest(parent=f"accounts/{account}"), metadata=client.metadata
            )
        reads.append(found.of("account_states"))
    # The first time the rows are read as well, with the head of their moment.
    assert reads == [2, 2, 2, 0, 0, 1, 0, 1]
