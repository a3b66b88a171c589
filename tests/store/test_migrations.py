"""Migrations, settings and constraints of the database, on both engines."""

from __future__ import annotations

import asyncio
import shutil
import warnings
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeAlias

import grpc
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from daybook.v1.ledger_service_pb2 import GetTransactionRequest, ListTransactionsRequest
from daybook.v1.transaction_pb2 import Transaction
from sqlalchemy import Connection, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from server.book import Book, open_book
from server.ledger.access import SUFFICIENT, hash_secret
from server.ledger.errors import SchemaTooNew, ServiceUnavailable
from server.store import migrate as migrate_module
from server.store.credentials import CredentialStore, TokenKey
from server.store.database import Database
from server.store.migrate import is_migrated, migrate
from server.store.query import Query
from server.store.tables import accounts, metadata, requests, transactions
from server.transport.auth import Authenticator
from tests.support.callers import Client, Server
from tests.support.clock import NOON, Clock
from tests.support.databases import writing

Schema: TypeAlias = "list[tuple[object, ...]]"


@pytest.fixture
async def open_database(database_url: str) -> AsyncIterator[Callable[[], Database]]:
    """Opens the database under test any number of times, and closes all in the end."""
    opened: list[Database] = []

    def open_one() -> Database:
        opened.append(Database(database_url))
        return opened[-1]

    yield open_one
    for database in opened:
        await database.close()


SQLITE_SCHEMA = """
    SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name
"""
POSTGRESQL_SCHEMA = """
    SELECT 'column' AS what, c.relname::text, a.attname::text, format_type(a.atttypid, a.atttypmod)
           || CASE WHEN a.attnotnull THEN ' NOT NULL' ELSE '' END
           || coalesce(' COLLATE ' || o.collname, '') || coalesce(' DEFAULT ' || pg_get_expr(d.adbin, d.adrelid), '')
      FROM pg_attribute a
      JOIN pg_class c ON c.oid = a.attrelid AND c.relkind IN ('r', 'S')
      LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
      LEFT JOIN pg_collation o ON o.oid = a.attcollation AND o.collname <> 'default'
     WHERE c.relnamespace = 'public'::regnamespace AND a.attnum > 0
     UNION ALL
    SELECT 'constraint', conrelid::regclass::text, conname::text, pg_get_constraintdef(oid)
      FROM pg_constraint WHERE connamespace = 'public'::regnamespace
     UNION ALL
    SELECT 'index', tablename::text, indexname::text, indexdef
      FROM pg_indexes WHERE schemaname = 'public'
     ORDER BY 1, 2, 3
"""


async def schema_of(database: Database) -> Schema:
    """The catalogue entries of all tables except alembic's."""
    statement = SQLITE_SCHEMA if database.url.get_backend_name() == "sqlite" else POSTGRESQL_SCHEMA
    async with database.primary.snapshot() as connection:
        rows = (await connection.execute(text(statement))).all()
    return [tuple(row) for row in rows if "alembic_version" not in str(row)]


async def test_migrated_schema_is_the_metadata(open_database: Callable[[], Database]) -> None:
    """Alembic finds no difference between a migrated database and the tables of the code."""
    database = open_database()
    await migrate(database)
    assert await differences_of(database) == []


async def differences_of(database: Database) -> list[object]:
    """The differences between a database and the tables of the code."""

    def differences(connection: Connection) -> list[object]:
        with warnings.catch_warnings():
            # Neither library reflects SQLite's indexes on expressions; the next test compares their text.
            warnings.filterwarnings("ignore", ".*expression-based index .?lots_open")
            return list(compare_metadata(MigrationContext.configure(connection), metadata))

    async with database.primary.snapshot() as connection:
        return await connection.run_sync(differences)


async def test_migrated_schema_is_the_created_schema(open_database: Callable[[], Database]) -> None:
    """Migrating results in exactly the columns, constraints and indexes of newly created tables.

    Alembic's comparison misses check constraints, collations and WITHOUT ROWID.
    """
    database = open_database()
    await migrate(database)
    migrated = await schema_of(database)
    async with writing(database) as connection:
        await connection.run_sync(metadata.drop_all)
    assert await schema_of(database) == []
    async with writing(database) as connection:
        await connection.run_sync(metadata.create_all)
    created = await schema_of(database)
    assert len(created) > len(metadata.tables)
    if database.url.get_backend_name() == "sqlite":
        # The statements differ only in white space and in the order of constraints.
        assert [normal(row) for row in migrated] == [normal(row) for row in created]
    else:
        assert migrated == created


def normal(row: tuple[object, ...]) -> tuple[object, ...]:
    """A row of sqlite_master with the sorted words of its statement."""
    *names, statement = row
    return *names, sorted(str(statement).replace(",", " ").replace("(", " ( ").replace(")", " ) ").split())


async def test_migrating_twice_changes_nothing(open_database: Callable[[], Database]) -> None:
    """A second migration keeps the schema and every row."""
    database = open_database()
    await migrate(database)
    await CredentialStore(database).create_tenant(slug="house", uid="u", display_name="House", create_time=1)
    before = await schema_of(database)
    await migrate(database)
    await migrate(open_database())
    assert await schema_of(database) == before
    assert await CredentialStore(database).tenant_number("house") is not None
    async with database.primary.snapshot() as connection:
        assert len((await connection.execute(text("SELECT version_num FROM alembic_version"))).all()) == 1


def test_files_are_named_by_their_revisions() -> None:
    """The file names, by which a start finds missing migrations, have the revisions that alembic applies."""
    scripts = ScriptDirectory(str(migrate_module.MIGRATIONS)).walk_revisions()
    assert list(migrate_module._revisions()) == [script.revision for script in scripts]


async def test_the_next_migration_is_applied(
    open_database: Callable[[], Database], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database of this version is migrated by a version with one more migration."""
    database = open_database()
    await migrate(database)
    folder = tmp_path / "migrations"
    shutil.copytree(migrate_module.MIGRATIONS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    newest = migrate_module._revisions()[0]
    (folder / "versions/9999_next.py").write_text(
        f'from alembic import op\nrevision = "9999"\ndown_revision = "{newest}"\n'
        'def upgrade(): op.execute("CREATE TABLE next_table (number INTEGER)")\n'
    )
    monkeypatch.setattr(migrate_module, "MIGRATIONS", folder)
    migrate_module._revisions.cache_clear()
    try:
        assert not await is_migrated(database)
        await migrate(database)
        assert await is_migrated(database)
        await database.primary.fetch(Query(text("SELECT number FROM next_table")), {})
    finally:
        migrate_module._revisions.cache_clear()


async def test_concurrent_migrations_succeed(open_database: Callable[[], Database]) -> None:
    """Eight processes that start concurrently on an empty database all find it migrated."""
    databases = [open_database() for _ in range(8)]
    await asyncio.gather(*(migrate(database) for database in databases))
    for database in databases:
        assert await CredentialStore(database).has_tenant() is False
    async with databases[0].primary.snapshot() as connection:
        assert len((await connection.execute(text("SELECT version_num FROM alembic_version"))).all()) == 1


async def migrate_to(database: Database, revision: str) -> None:
    """Migrates an empty database to the schema of an older version."""

    def upgrade(connection: Connection) -> None:
        config = Config()
        config.set_main_option("script_location", str(migrate_module.MIGRATIONS))
        config.attributes["connection"] = connection
        command.upgrade(config, revision)

    async with writing(database) as connection:
        await connection.run_sync(upgrade)


async def test_a_database_of_this_or_a_compatible_version_is_migrated(open_database: Callable[[], Database]) -> None:
    """A database is migrated if it has this version's schema, or a later one that stays usable for this version."""
    database = open_database()
    assert not await is_migrated(database), "it is empty"
    await migrate_to(database, "0001")
    assert not await is_migrated(database), "its schema is older"
    await migrate(database)
    assert await is_migrated(database)
    async with writing(database) as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999_since_0006'"))
    assert await is_migrated(database), "its schema is later and compatible"
    await migrate(database)
    for later in ("9999", "9999_since_9998"):
        async with writing(database) as connection:
            await connection.execute(text("UPDATE alembic_version SET version_num = :later"), {"later": later})
        assert not await is_migrated(database), "its schema is later and incompatible"
        with pytest.raises(SchemaTooNew, match=f"migrated to {later} by a later version"):
            await migrate(database)


async def test_keys_without_scopes_keep_their_access(open_database: Callable[[], Database]) -> None:
    """After the migration, a key without scopes can read and post, and a key with `admin` can do everything."""
    database = open_database()
    await migrate_to(database, "0001")
    async with writing(database) as connection:
        await connection.execute(
            text("INSERT INTO tenants (slug, uid, display_name, create_time, demo) VALUES ('s', 'u', 'n', 1, 0)")
        )
        for key_id, scopes in (("poster", ""), ("admin", "admin")):
            await connection.execute(
                text(
                    "INSERT INTO api_keys (id, tenant_number, scopes, secret_hash, create_time)"
                    " VALUES (:id, 1, :scopes, :hash, 1)"
                ),
                {"id": key_id, "scopes": scopes, "hash": hash_secret(key_id)},
            )
    await migrate(database)
    authenticator = Authenticator(CredentialStore(database), Clock(), lambda _: None)
    granted = {}
    for key_id in ("poster", "admin"):
        caller = (await authenticator.authenticate([("x-api-key", f"{key_id}.{key_id}")])).caller
        granted[key_id] = [
            scope for scope, sufficient in SUFFICIENT.items() if not caller.scopes.isdisjoint(sufficient)
        ]
    default = ["transactions.readonly", "transactions", "accounts.readonly", "accounts"]
    assert granted == {"poster": default, "admin": [*default, "admin"]}


PREBUILT = (
    "CREATE INDEX transactions_by_category_and_time"
    " ON transactions (account_number, kind, category, state, create_time, sequence)"
)
PREBUILT_OF_LABEL = (
    "CREATE INDEX transactions_of_company_by_time ON transactions"
    " (tenant_number, company, create_time, account_number, sequence, kind, category, state) WHERE company IS NOT NULL"
)


@pytest.mark.parametrize(("revision", "statement"), [("0004", PREBUILT), ("0005", PREBUILT_OF_LABEL)])
async def test_a_prebuilt_index_is_kept(open_database: Callable[[], Database], revision: str, statement: str) -> None:
    """A migration keeps an index that an operator has built in advance."""
    database = open_database()
    await migrate_to(database, revision)
    async with writing(database) as connection:
        await connection.execute(text(statement))
        before = await connection.run_sync(places_of_indexes)
    await migrate(database)
    async with database.primary.snapshot() as connection:
        after = await connection.run_sync(places_of_indexes)
    assert await differences_of(database) == []
    name = statement.split()[2]
    assert after[name] == before[name]


def places_of_indexes(connection: Connection) -> dict[str, int]:
    """The storage location of each index, which changes if the index is rebuilt."""
    statement = (
        "SELECT name, rootpage FROM sqlite_master WHERE type = 'index'"
        if connection.dialect.name == "sqlite"
        else "SELECT relname, relfilenode::bigint FROM pg_class WHERE relkind = 'i'"
    )
    return {str(name): number for name, number in connection.execute(text(statement))}


# The state that an interrupted CREATE INDEX CONCURRENTLY leaves.
INTERRUPT = "UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{}'::regclass"


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize(
    ("revision", "prebuilt"), [("0004", PREBUILT), ("0005", PREBUILT_OF_LABEL)], ids=["0005", "0006"]
)
@pytest.mark.parametrize("is_interrupted", [True, False], ids=["interrupted", "of other columns"])
async def test_an_unusable_prebuilt_index_is_replaced(
    open_database: Callable[[], Database], revision: str, prebuilt: str, is_interrupted: bool
) -> None:
    """A migration replaces an index of the right name that is invalid or has other columns."""
    database = open_database()
    await migrate_to(database, revision)
    statements = (
        [prebuilt, INTERRUPT.format(prebuilt.split()[2])]
        if is_interrupted
        else [prebuilt.replace("kind, category", "category, kind")]
    )
    async with writing(database) as connection:
        for statement in statements:
            await connection.execute(text(statement))
    await migrate(database)
    assert await differences_of(database) == []
    async with database.primary.snapshot() as connection:
        invalid = text("SELECT count(*) FROM pg_index WHERE NOT indisvalid")
        assert (await connection.execute(invalid)).scalar_one() == 0


async def test_concurrent_first_token_keys_agree(open_database: Callable[[], Database]) -> None:
    """Eight processes that each propose a first key for page tokens agree on one."""
    databases = [open_database() for _ in range(8)]
    await migrate(databases[0])
    candidates = [bytes([number]) * 32 for number in range(8)]
    await asyncio.gather(
        *(
            CredentialStore(database).ensure_token_key(candidate, NOON)
            for database, candidate in zip(databases, candidates, strict=True)
        )
    )
    (first,) = await CredentialStore(databases[0]).token_keys()
    assert first.key in candidates
    await CredentialStore(databases[0]).ensure_token_key(b"x" * 32, NOON)
    assert await CredentialStore(databases[7]).token_keys() == [first], "the first key stays"


async def test_concurrent_token_keys_are_all_added(open_database: Callable[[], Database]) -> None:
    """Keys for page tokens that several processes add concurrently are all stored, newest first."""
    databases = [open_database() for _ in range(4)]
    await migrate(databases[0])
    store = CredentialStore(databases[0])
    await store.ensure_token_key(b"0" * 32, NOON)
    await asyncio.gather(
        *(CredentialStore(each).add_token_key(bytes([n]) * 32, NOON + 1) for n, each in enumerate(databases))
    )
    keys = await store.token_keys()
    assert {each.key for each in keys[:-1]} == {bytes([n]) * 32 for n in range(4)}
    assert keys[-1] == TokenKey(b"0" * 32, NOON)
    await store.add_token_key(b"n" * 32, NOON + 2)
    assert (await store.token_keys())[0] == TokenKey(b"n" * 32, NOON + 2)


async def test_failed_migration_is_rolled_back(
    open_database: Callable[[], Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A migration that fails midway leaves an empty database, and the next one succeeds."""
    database = open_database()

    def fail_after(connection: Connection) -> None:
        upgrade(connection)
        raise RuntimeError("the disk is full")

    upgrade = migrate_module._upgrade
    monkeypatch.setattr(migrate_module, "_upgrade", fail_after)
    with pytest.raises(RuntimeError, match="the disk is full"):
        await migrate(database)
    assert await schema_of(database) == []
    monkeypatch.undo()
    await migrate(database)
    assert await schema_of(database) != []


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("pragma", "of_writer", "of_reader"),
    [
        ("journal_mode", "wal", "wal"),
        ("synchronous", 2, 2),
        ("foreign_keys", 1, 1),
        ("query_only", 0, 1),
    ],
)
async def test_sqlite_settings(
    open_database: Callable[[], Database], pragma: str, of_writer: object, of_reader: object
) -> None:
    """SQLite uses the write-ahead log, syncs every commit and checks foreign keys; readers can't write."""
    database = open_database()
    await migrate(database)
    for _ in range(2):
        assert await database.transact(lambda each: each.execute(text(f"PRAGMA {pragma}")).scalar_one()) == of_writer
        assert await database.primary.fetch(Query(text(f"PRAGMA {pragma}")), {}) == [(of_reader,)]
        async with database.primary.snapshot() as connection:
            assert (await connection.execute(text(f"PRAGMA {pragma}"))).scalar_one() == of_reader


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_sqlite_readers_cannot_write(open_database: Callable[[], Database]) -> None:
    """A writing statement is refused on a connection for reads."""
    database = open_database()
    await migrate(database)
    with pytest.raises(ServiceUnavailable):
        async with database.primary.snapshot() as connection:
            await connection.execute(text("DELETE FROM tenants"))


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_sqlite_reads_while_writing(open_database: Callable[[], Database]) -> None:
    """A reader doesn't wait for the writer, and sees none of its changes before the commit."""
    database = open_database()
    await migrate(database)
    store = CredentialStore(database)
    async with writing(database) as connection:
        await connection.execute(
            text("INSERT INTO tenants (slug, uid, display_name, create_time, demo) VALUES ('s', 'u', 'n', 1, 0)")
        )
        assert await store.has_tenant() is False
    assert await store.has_tenant() is True


def an_account(**changes: object) -> dict[str, object]:
    """A valid row of accounts with changed values."""
    return {
        "tenant_number": 1,
        "id": "a",
        "kind": 1,
        "display_name": "",
        "credit_limit": 0,
        "hour_anchor": 0,
        "profile": b"",
        "create_time": 0,
        "update_time": 0,
        **changes,
    }


def a_transaction(**changes: object) -> dict[str, object]:
    """A valid row of transactions with changed values."""
    return {
        "account_number": 1,
        "sequence": 1,
        "tenant_number": 1,
        "uid": b"u" * 16,
        "create_time": 0,
        "month": 197001,
        "kind": 1,
        "category": "test",
        "state": 1,
        "amount": 1,
        "balance_after": 1,
        "body": b"",
        "allocations": b"",
        "hash": b"h" * 32,
        **changes,
    }


@pytest.mark.parametrize(
    ("rows", "accepted"),
    [
        ([(accounts, an_account())], True),
        ([(accounts, an_account(tenant_number=2))], False),
        ([(accounts, an_account(credit_limit=-1))], False),
        ([(accounts, an_account()), (accounts, an_account())], False),
        ([(accounts, an_account()), (accounts, an_account(id="A"))], True),
        ([(transactions, a_transaction())], True),
        ([(transactions, a_transaction(sequence=0))], False),
        ([(transactions, a_transaction()), (transactions, a_transaction(uid=b"v" * 16))], False),
        ([(transactions, a_transaction()), (transactions, a_transaction(sequence=2))], False),
        ([(transactions, a_transaction()), (transactions, a_transaction(account_number=2))], True),
        ([(transactions, a_transaction(body=None))], False),
        ([(requests, {"account_number": 1, "request_id": "r", "fingerprint": b"", "response": b""})] * 2, False),
    ],
    ids=range(12),
)
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_constraints_exclude_invalid_rows(
    open_database: Callable[[], Database], rows: list[tuple[object, dict[str, object]]], accepted: bool
) -> None:
    """The database refuses rows that violate the rules of the ledger."""
    database = open_database()
    await migrate(database)
    await CredentialStore(database).create_tenant(slug="s", uid="u", display_name="n", create_time=1)

    async def write() -> None:
        async with writing(database) as connection:
            for table, values in rows:
                await connection.execute(insert(table).values(values))  # type: ignore[arg-type]

    if accepted:
        await write()
    else:
        with pytest.raises(IntegrityError):
            await write()


async def test_stored_bodies_are_served_unchanged(server: Server, client: Client) -> None:
    """GetTransaction and the lists serve exactly the stored bytes."""
    await client.create_account("acme")
    labels = dict.fromkeys(("z", "a", "location", "m"), "x")
    posted = await client.post("acme", Transaction.GRANT, "1.5", labels=labels, description="é")
    async with server.book.database.primary.snapshot() as connection:
        body = (await connection.execute(select(transactions.c.body))).scalar_one()
    raw: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = client.channel.unary_unary(
        "/daybook.v1.Ledger/GetTransaction"
    )
    request = GetTransactionRequest(name=posted.name).SerializeToString()
    assert await raw(request, metadata=client.metadata) == body
    raw = client.channel.unary_unary("/daybook.v1.Ledger/ListTransactions")
    request = ListTransactionsRequest(parent="accounts/acme").SerializeToString()
    assert await raw(request, metadata=client.metadata) == b"\x0a" + varint(len(body)) + body


def varint(number: int) -> bytes:
    """A length as a varint of at most two bytes."""
    assert number < 1 << 14
    return bytes([number]) if number < 128 else bytes([number & 127 | 128, number >> 7])


async def test_indexed_columns_agree_with_the_body(client: Client, book: Book) -> None:
    """The columns by which lists filter and sort have the values of the body."""
    await client.create_account("acme", credit_limit="5")
    await client.post("acme", Transaction.GRANT, "1.5", labels={"location": "l", "membership": "m", "company": "c"})
    await client.post("acme", Transaction.CHARGE, "-2.000001", category="other", labels={"project": "p"})
    async with book.database.primary.snapshot() as connection:
        rows = (await connection.execute(select(transactions).order_by(transactions.c.sequence))).all()
    assert len(rows) == 2
    for row in rows:
        body = Transaction.FromString(row.body)
        assert (row.sequence, row.kind, row.category, row.state) == (
            body.sequence,
            body.kind,
            body.category,
            body.state,
        )
        assert row.uid.hex() == body.uid.replace("-", "")
        assert (row.create_time, row.month) == (NOON, 202410)
        labels = {name: getattr(row, name) for name in ("location", "membership", "company")}
        assert labels == {name: body.labels.get(name) for name in labels}
    assert [(row.amount, row.balance_after) for row in rows] == [(1_500_000, 1_500_000), (-2_000_001, -500_001)]


async def test_reopened_book_keeps_its_data(database_url: str) -> None:
    """A reopened ledger has its tenants and its token key."""
    async with open_book(database_url) as book:
        tenant_number = await book.credentials.create_tenant(slug="s", uid="u", display_name="n", create_time=1)
        await book.credentials.ensure_token_key(b"k" * 32, 1)
    async with open_book(database_url) as book:
        assert await book.credentials.tenant_number("s") == tenant_number
        await book.credentials.ensure_token_key(b"l" * 32, 1)
        assert await book.credentials.token_keys() == [TokenKey(b"k" * 32, 1)]


async def test_error_of_an_unreachable_database_hides_its_address() -> None:
    """The error of an unreachable database shows nothing of its address."""
    database = Database("postgresql+asyncpg://user@/nothing?host=/nonexistent")
    try:
        with pytest.raises(ServiceUnavailable) as caught:
            await CredentialStore(database).has_tenant()
        assert "nonexistent" not in caught.value.message
        assert not isinstance(caught.value, DBAPIError)
    finally:
        await database.close()
