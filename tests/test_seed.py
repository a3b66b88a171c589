"""`daybook seed`: large made-up data whose books are true."""

from __future__ import annotations

import asyncio
import hashlib
import re
import sqlite3
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc
import pytest
from daybook.facades.dreadnode.v1.credits_service_pb2 import ListCreditTransactionsRequest
from daybook.facades.dreadnode.v1.credits_service_pb2_grpc import CreditsStub
from daybook.facades.nebulablock.v1.users_service_pb2 import GetCreditsHistoryRequest
from daybook.facades.nebulablock.v1.users_service_pb2_grpc import UsersStub
from daybook.facades.paged.v1.statements_service_pb2 import ListAccountTransactionsRequest
from daybook.facades.paged.v1.statements_service_pb2_grpc import StatementsStub
from daybook.facades.spacebring.v1.transactions_service_pb2 import GetCreditsTransactionsRequest
from daybook.facades.spacebring.v1.transactions_service_pb2_grpc import TransactionsStub
from daybook.facades.teable.v1.billing_service_pb2 import GetSpaceCreditHistoryRequest
from daybook.facades.teable.v1.billing_service_pb2_grpc import BillingStub
from daybook.v1.transaction_pb2 import Transaction
from sqlalchemy import func, inspect, select

from server.app import serving
from server.book import Book, open_book
from server.config import Settings
from server.facades import dreadnode, spacebring, teable
from server.ledger.audit import Finding
from server.ledger.instants import parse
from server.seed.history import Account, Household, Place, Setting
from server.seed.load import Parameters, Report, load, row_counts
from server.store.tables import accounts, metadata, requests, transactions
from tests.support.command_line import invoke
from tests.support.databases import PostgreSQL
from tests.support.processes import sqlite_url

Answer = TypeVar("Answer")

ROWS = 3000
UNTIL = "2024-10-01T00:00:00Z"


def on_book(database_url: str, work: Callable[[Book], Awaitable[Answer]]) -> Answer:
    """Does something with a ledger."""

    async def opened() -> Answer:
        async with open_book(database_url) as book:
            return await work(book)

    return asyncio.run(opened())


def unheard(rows: int, doing: str) -> None:
    """Nobody listens to the progress."""


def load_now(database_url: str, tenant: str = "seed", report: Report = unheard) -> None:
    """Does what the command does, with a thousand transactions."""
    asyncio.run(load(database_url, Parameters(tenant, 1000, 1, parse(UNTIL), 3), report))


@dataclass(frozen=True)
class Seeded:
    """A database with seeded data, and what the command printed."""

    url: str
    output: str

    @property
    def keys(self) -> list[str]:
        """The keys in the printed commands: that of the tenant, and that of the account `hot`."""
        return list(dict.fromkeys(re.findall(r"Bearer ([^']+)'", self.output)))

    @property
    def network(self) -> str:
        """The tenant's uid."""
        return str(re.findall(r"spacebring-network-id: ([0-9a-f-]{36})", self.output)[0])


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory, postgresql: PostgreSQL) -> Iterator[dict[str, str]]:
    """An empty database of each engine."""
    name = f"seed_{uuid.uuid4().hex}"
    postgresql.execute(f"CREATE DATABASE {name}")
    yield {"sqlite": sqlite_url(tmp_path_factory.mktemp("seed") / "daybook.db"), "postgresql": postgresql.url(name)}
    postgresql.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="module")
def both(urls: dict[str, str]) -> dict[str, Seeded]:
    """The same data in each engine, made by `daybook seed`."""
    found = {}
    for engine, url in urls.items():
        arguments = ("seed", "--rows", str(ROWS), "--until", UNTIL, "--years", "1", "--database-url", url)
        result = invoke(*arguments)
        assert result.exit_code == 0, result.output
        found[engine] = Seeded(url, result.stdout)
    return found


async def prints_of(book: Book) -> dict[str, str]:
    """A hash of all rows of each big table."""
    found = {}
    for table in metadata.sorted_tables:
        if "account_number" not in table.columns or table.name == "api_keys":
            continue
        async with book.database.primary.snapshot() as connection:
            rows = (await connection.execute(select(table).order_by(*table.primary_key.columns))).all()
        assert rows, table.name
        plain = [[bytes(value) if isinstance(value, bytes | memoryview) else value for value in row] for row in rows]
        # PostgreSQL may sort text by another alphabet.
        found[table.name] = hashlib.sha256(repr(sorted(plain, key=repr)).encode()).hexdigest()
    return found


@pytest.fixture(scope="module")
def prints(both: dict[str, Seeded]) -> dict[str, dict[str, str]]:
    """What was seeded into each engine, before any server has expired something of it."""
    return {engine: on_book(seeded.url, prints_of) for engine, seeded in both.items()}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def seeded(request: pytest.FixtureRequest, both: dict[str, Seeded], prints: dict[str, dict[str, str]]) -> Seeded:
    """The data in one of the engines, whose prints are taken."""
    assert request.param in prints
    return both[request.param]


async def findings(book: Book) -> list[Finding]:
    """What `daybook verify` would print."""
    return [event async for event in book.verification.verify_all(None) if isinstance(event, Finding)]


async def count(book: Book) -> int:
    """How many transactions there are."""
    return (await book.verification.counts())[1]


async def missing_indexes(book: Book) -> set[str]:
    """The indexes of the big table that the database should have and has not."""
    async with book.database.primary.snapshot() as connection:
        found = await connection.run_sync(lambda sync: inspect(sync).get_indexes("transactions"))
    expected = {str(index.name) for index in transactions.indexes}
    assert len(expected) == 8
    return expected - {str(index["name"]) for index in found}


def test_books_are_true(seeded: Seeded) -> None:
    """`daybook verify` finds nothing, in exactly as many transactions as were asked for."""
    assert on_book(seeded.url, findings) == []
    assert on_book(seeded.url, count) == ROWS
    assert on_book(seeded.url, missing_indexes) == set()


def test_shares(seeded: Seeded) -> None:
    """One account has a tenth of the transactions; the others have fewer and fewer, by Zipf's law."""

    async def of_accounts(book: Book) -> list[int]:
        async with book.database.primary.snapshot() as connection:
            counted = (
                select(func.count())
                .select_from(transactions)
                .group_by(transactions.c.account_number)
                .order_by(transactions.c.account_number)
            )
            assert await connection.scalar(select(accounts.c.id).order_by(accounts.c.number).limit(1)) == "hot"
            return list((await connection.execute(counted)).scalars())

    counts = on_book(seeded.url, of_accounts)
    assert counts[0] == ROWS // 10
    assert counts[1:] == sorted(counts[1:], reverse=True)
    assert counts == row_counts(ROWS, len(counts))
    large = row_counts(1_000_000, 1000)
    assert (large[0], sum(large), large[1] // large[3], large[1] // large[19]) == (100_000, 1_000_000, 2, 10)


def test_every_sort_of_row(seeded: Seeded) -> None:
    """Every type that a facade knows is there, every kind and state, and requests with both sorts of answers."""

    async def sorts(book: Book) -> tuple[set[tuple[int, str]], set[int], set[bool]]:
        async with book.database.primary.snapshot() as connection:
            pairs = await connection.execute(select(transactions.c.kind, transactions.c.category).distinct())
            states = await connection.execute(select(transactions.c.state).distinct())
            answers = await connection.execute(select(requests.c.response.is_(None)).distinct())
            return {(row.kind, row.category) for row in pairs}, set(states.scalars()), set(answers.scalars())

    pairs, states, answers = on_book(seeded.url, sorts)
    assert not [pair for facade in (teable, dreadnode, spacebring) for pair in facade.TYPES if pair not in pairs]
    assert {kind for kind, _ in pairs} == set(Transaction.Kind.values()[1:])
    assert states == {Transaction.SUCCEEDED, Transaction.FAILED, Transaction.CANCELED}
    assert answers == {True, False}


def test_every_facade_lists_it(seeded: Seeded) -> None:
    """With the keys that it prints, every documented API shows full pages of the hot account or the tenant."""

    async def pages(book: Book) -> list[int]:
        key, hot_key = ((("authorization", f"Bearer {key}"),) for key in seeded.keys)
        async with (
            serving(book, Settings(port=0)) as port,
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            history = await BillingStub(channel).GetSpaceCreditHistory(
                GetSpaceCreditHistoryRequest(space_id="hot", month="2024-09", take="2"), metadata=key
            )
            hours = await UsersStub(channel).GetCreditsHistory(GetCreditsHistoryRequest(limit="3"), metadata=hot_key)
            network = await TransactionsStub(channel).GetCreditsTransactions(
                GetCreditsTransactionsRequest(limit="4"), metadata=(*key, ("spacebring-network-id", seeded.network))
            )
            organization = await CreditsStub(channel).ListCreditTransactions(
                ListCreditTransactionsRequest(org="hot", limit="5"), metadata=key
            )
            statement = await StatementsStub(channel).ListAccountTransactions(
                ListAccountTransactionsRequest(account="hot", page="2", page_size="6"), metadata=key
            )
        assert statement.count == ROWS // 10
        assert hours.data.total_credit_histories > 10
        return [
            len(history.data),
            len(hours.data.credit_history),
            len(network.transactions),
            len(organization.transactions),
            len(statement.results),
        ]

    assert on_book(seeded.url, pages) == [2, 3, 4, 5, 6]


def test_same_in_both_engines(both: dict[str, Seeded], prints: dict[str, dict[str, str]]) -> None:
    """The same arguments make the same rows of every big table, to the byte; not the same keys."""
    assert prints["sqlite"] == prints["postgresql"]
    assert len(prints["sqlite"]) == 6
    assert not set(both["sqlite"].keys) & set(both["postgresql"].keys)


def test_another_random_seed() -> None:
    """Another number makes other data; the same makes the same."""

    def first_rows(random_seed: str) -> object:
        places = tuple(Place(f"l-{number}", f"m-{number}", f"c-{number}") for number in range(8))
        setting = Setting(random_seed, 1, parse("2021-10-01T00:00:00Z"), parse(UNTIL), places)
        return next(Household(setting, [Account(1, "a", 0, 50)]).history())

    assert first_rows("1") == first_rows("1") != first_rows("2")


def test_bodies_are_as_posted(seeded: Seeded) -> None:
    """The stored bytes are those that a server writes: the canonical form of the message."""

    async def bodies(book: Book) -> list[bytes]:
        async with book.database.primary.snapshot() as connection:
            return [bytes(body) for body in (await connection.execute(select(transactions.c.body))).scalars()]

    for body in on_book(seeded.url, bodies):
        assert Transaction.FromString(body).SerializeToString(deterministic=True) == body


def test_goes_beside_what_is_there(seeded: Seeded) -> None:
    """A tenant that exists is refused; another one goes beside it, with indexes that stay in place."""
    before = on_book(seeded.url, count)
    with pytest.raises(ValueError, match="a tenant 'seed' exists already"):
        load_now(seeded.url)
    assert on_book(seeded.url, count) == before
    load_now(seeded.url, "beside")
    assert on_book(seeded.url, count) == before + 1000
    assert on_book(seeded.url, findings) == []
    assert on_book(seeded.url, missing_indexes) == set()


def test_interruption_leaves_nothing(database_url: str) -> None:
    """Whatever happens on the way, the database is as it was: no tenant, no row, every index."""

    class Interruption(Exception):
        pass

    def interrupt(rows: int, doing: str) -> None:
        if doing.startswith("building transactions_of_tenant_by_time"):
            assert rows == 1000
            raise Interruption

    with pytest.raises(Interruption):
        load_now(database_url, report=interrupt)

    async def check(book: Book) -> None:
        assert not await book.credentials.has_tenant()
        assert await count(book) == 0
        assert await missing_indexes(book) == set()
        if book.database.url.get_backend_name() == "sqlite":
            async with book.database.primary.snapshot() as connection:
                assert (await connection.exec_driver_sql("PRAGMA journal_mode")).scalar_one() == "wal"

    on_book(database_url, check)


def test_database_in_use(tmp_path: Path) -> None:
    """SQLite's file must be free: a server that has it open is told of, and nothing is done."""
    url = sqlite_url(tmp_path / "daybook.db")
    on_book(url, count)
    with closing(sqlite3.connect(tmp_path / "daybook.db")) as other:
        other.execute("SELECT count(*) FROM tenants").fetchall()
        with pytest.raises(ValueError, match="another process has the database open"):
            load_now(url)
    assert on_book(url, count) == 0


@pytest.mark.parametrize(
    "arguments",
    [["--rows", "999"], ["--rows", "1000", "--until", "soon"], ["--rows", "1000", "--until", "2999-01-01T00:00:00Z"]],
)
def test_bad_arguments(tmp_path: Path, arguments: list[str]) -> None:
    """Too few rows, or a wrong or a future end, are refused before anything is opened."""
    url = sqlite_url(tmp_path / "daybook.db")
    assert invoke("seed", *arguments, "--database-url", url).exit_code == 2
    assert not (tmp_path / "daybook.db").exists()
