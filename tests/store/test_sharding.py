"""The rules of a sharded PostgreSQL for schema and statements, and `daybook migrate --distribute`.

The tests do not need the extension Citus: stand-in functions with the names of its functions
record their calls in a real PostgreSQL.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from asyncpg.connection import Connection
from sqlalchemy import ForeignKeyConstraint, Index, PrimaryKeyConstraint, Table, UniqueConstraint, text

from server.store.database import Database
from server.store.distribute import distribute
from server.store.migrate import migrate
from server.store.tables import DISTRIBUTED, DISTRIBUTION_COLUMN, REFERENCE, metadata
from tests.support.databases import writing
from tests.support.processes import ROOT, run, sqlite_url
from tests.support.sharding_monitor import Statements, monitor
from tests.support.sharding_rules import broken_rules, plain

only_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
DISTRIBUTED_NAMES, REFERENCE_NAMES = {table.name for table in DISTRIBUTED}, {table.name for table in REFERENCE}


def test_every_table_is_distributed_or_a_reference_table() -> None:
    """Every table is either in DISTRIBUTED or in REFERENCE."""
    assert set(metadata.tables) == DISTRIBUTED_NAMES | REFERENCE_NAMES
    assert not DISTRIBUTED_NAMES & REFERENCE_NAMES


@pytest.mark.parametrize("table", DISTRIBUTED, ids=str)
def test_unique_keys_contain_the_account(table: Table) -> None:
    """A unique key of a distributed table contains the account number, because a node can check only its own rows."""
    unique = [each for each in table.constraints if isinstance(each, PrimaryKeyConstraint | UniqueConstraint)]
    indexes: list[Index] = [each for each in table.indexes if each.unique]
    assert unique
    for each in (*unique, *indexes):
        assert DISTRIBUTION_COLUMN in each.columns, each.name
    assert not table.c[DISTRIBUTION_COLUMN].nullable


@pytest.mark.parametrize("table", metadata.sorted_tables, ids=str)
def test_foreign_keys_stay_within_a_node(table: Table) -> None:
    """Foreign keys lead to reference tables; those of a distributed table also to distributed ones, by account."""
    for key in (each for each in table.constraints if isinstance(each, ForeignKeyConstraint)):
        target = key.referred_table.name
        if table.name in REFERENCE_NAMES:
            assert target in REFERENCE_NAMES, key.name
            # The referenced table is copied first.
            names = [each.name for each in REFERENCE]
            assert names.index(target) < names.index(table.name)
        elif target in DISTRIBUTED_NAMES:
            assert DISTRIBUTION_COLUMN in key.column_keys, key.name


MERGED_SCANS = (
    "SELECT p.sequence, t.body FROM (SELECT w.account_number, w.sequence FROM ("
    "SELECT account_number, sequence FROM transactions WHERE account_number = $1 AND category = $2 LIMIT $3) AS w"
    ") AS p JOIN transactions t ON t.account_number = p.account_number AND t.sequence = p.sequence"
)

BROKEN = {
    "account condition only outside": (
        "SELECT t.sequence, (SELECT b.body FROM transactions b WHERE b.account_number = t.account_number "
        "AND b.sequence = t.sequence) FROM transactions t WHERE t.account_number = $1"
    ),
    "account condition only inside": MERGED_SCANS,
    "account condition on one of two": (
        "SELECT s.balance, (SELECT count(*) FROM lots l WHERE l.remaining > $2) FROM account_states s "
        "WHERE s.account_number = $1"
    ),
    "lock of several accounts": "SELECT account_number FROM account_states WHERE account_number IN ($1, $2) FOR UPDATE",
    "lock without an account": "SELECT s.balance FROM account_states AS s WHERE s.balance > $1 FOR UPDATE",
    "lock by the account of another table": (
        "SELECT s.balance FROM account_states s JOIN lots l ON l.account_number = s.account_number "
        "WHERE l.account_number = $1 FOR UPDATE OF s"
    ),
    "lock under a condition that may not hold": (
        "SELECT balance FROM account_states WHERE account_number = $1 OR balance > $2 FOR UPDATE"
    ),
    "insert from select": "INSERT INTO lots (account_number, number) SELECT account_number, $1 FROM account_states",
    "insert from unnest": "INSERT INTO lots (account_number, number) SELECT * FROM unnest($1::bigint[], $2::bigint[])",
    "insert without its account": "INSERT INTO lots (number) VALUES ($1)",
    "update without an account": "UPDATE lots SET remaining = $1 WHERE number = $2",
    "update under a condition that may not hold": "UPDATE lots SET amount = 0 WHERE account_number = $1 OR number = $2",
    "delete without an account": "DELETE FROM requests WHERE request_id = $1",
    "join without the account": (
        "SELECT t.body FROM transactions t JOIN lots l ON l.opened_by = t.sequence WHERE t.account_number = $1"
    ),
    "join with a subquery": (
        "SELECT t.body FROM transactions t JOIN (SELECT sequence AS number FROM refunds) AS r ON r.number = t.sequence"
    ),
    "join in a subquery": (
        "SELECT x.body FROM (SELECT t.body FROM transactions t, requests r WHERE r.sequence = t.sequence) AS x"
    ),
    "outer join": (
        "SELECT r.request_id FROM requests r LEFT OUTER JOIN transactions t ON t.sequence = r.sequence "
        "WHERE r.account_number = $1"
    ),
}
VALID = {
    "account condition in a correlated subquery": (
        "SELECT t.sequence, (SELECT b.body FROM transactions b WHERE b.account_number = t.account_number "
        "AND b.account_number IN ($1) AND b.sequence = t.sequence) FROM transactions t WHERE t.account_number IN ($1)"
    ),
    "account condition inside and outside": f"{MERGED_SCANS} WHERE t.account_number = $1",
    "account condition through a joined table": (
        "SELECT s.balance, w.number FROM account_states s LEFT OUTER JOIN usage_windows w "
        "ON w.account_number = s.account_number WHERE s.account_number IN ($1, $2)"
    ),
    "lock of one account": "SELECT account_number FROM account_states WHERE account_number = $1::BIGINT FOR UPDATE",
    "lock of a reference table": "SELECT id FROM accounts WHERE tenant_number = $1 AND id = $2 FOR UPDATE",
    "insert": "INSERT INTO lots (account_number, number) VALUES ($1, $2), ($3, $4)",
    "update": "UPDATE lots SET remaining = $1 WHERE lots.account_number = $2 AND lots.number = $3",
    "update of several accounts": "UPDATE account_states SET debt = $1 WHERE account_number IN ($2, $3)",
    "join": (
        "SELECT t.body FROM transactions AS t JOIN refunds ON refunds.account_number = t.account_number "
        "AND refunds.sequence = t.sequence"
    ),
    "join with a subquery": (
        "SELECT t.body FROM transactions t JOIN (SELECT account_number, sequence FROM refunds) AS r "
        "ON t.account_number = r.account_number"
    ),
    "join of three": (
        "SELECT 1 FROM lots a JOIN refunds b ON a.account_number = b.account_number "
        "JOIN requests c ON c.account_number = b.account_number"
    ),
    "join with a reference table": "SELECT 1 FROM lots JOIN accounts ON accounts.number = lots.account_number",
    "reference tables": "UPDATE api_keys SET revoke_time = $1 WHERE id = $2",
    "list of a tenant": "SELECT body FROM transactions WHERE tenant_number = $1 ORDER BY create_time LIMIT $2",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_found(name: str) -> None:
    """Each statement that breaks a rule is found."""
    assert broken_rules(plain(BROKEN[name]))


@pytest.mark.parametrize("name", VALID)
def test_a_valid_statement_passes(name: str) -> None:
    """Statements that a sharded database executes well break no rule."""
    assert broken_rules(plain(VALID[name])) == ()


EXPECTED_WITH_STATES = ("transactions", "lots", "refunds", "usage_windows", "requests")
STAND_INS = """
CREATE SCHEMA stand_in;
CREATE TABLE stand_in.calls (number serial, call text);
CREATE TABLE citus_tables (table_name regclass, citus_table_type text);
INSERT INTO citus_tables VALUES ('retired_secrets', 'local');
CREATE FUNCTION create_reference_table(table_name regclass) RETURNS void LANGUAGE sql AS $$
  INSERT INTO citus_tables VALUES ($1, 'reference');
  INSERT INTO stand_in.calls (call) VALUES ('copy ' || $1);
$$;
CREATE FUNCTION create_distributed_table(
  table_name regclass, distribution_column text, distribution_type text DEFAULT 'hash',
  colocate_with text DEFAULT 'default', shard_count int DEFAULT NULL
) RETURNS void LANGUAGE sql AS $$
  INSERT INTO citus_tables VALUES ($1, 'distributed');
  INSERT INTO stand_in.calls (call) VALUES (concat_ws(' ', 'distribute', $1, 'by', $2, $3, 'with', $4));
$$;
INSERT INTO pg_extension SELECT 99999, 'citus', extowner, extnamespace, false, '12.1', NULL, NULL
  FROM pg_extension WHERE extname = 'plpgsql'
"""


async def calls(database: Database) -> list[str]:
    """The recorded calls of the stand-ins."""
    async with database.primary.snapshot() as connection:
        return list((await connection.execute(text("SELECT call FROM stand_in.calls ORDER BY number"))).scalars())


@only_postgresql
async def test_distribute_is_idempotent(database_url: str) -> None:
    """Small tables are copied, and big ones distributed by account on the same nodes. A repetition changes nothing."""
    database = Database(database_url)
    try:
        await migrate(database)
        async with writing(database) as connection:
            raw = (await connection.get_raw_connection()).driver_connection
            assert raw is not None
            await raw.execute(STAND_INS)
        assert set(await distribute(database)) == DISTRIBUTED_NAMES | REFERENCE_NAMES
        expected = [
            *(f"copy {table.name}" for table in REFERENCE),
            "distribute account_states by account_number hash with none",
            *(f"distribute {name} by account_number hash with account_states" for name in EXPECTED_WITH_STATES),
        ]
        assert await calls(database) == expected
        assert await distribute(database) == []
        async with writing(database) as connection:
            await connection.execute(text("DELETE FROM citus_tables WHERE table_name = 'lots'::regclass"))
        assert await distribute(database) == ["lots"]
        assert await calls(database) == [*expected, "distribute lots by account_number hash with account_states"]
    finally:
        await database.close()


async def test_distribute_without_citus_is_refused(database_url: str) -> None:
    """For SQLite, and for a PostgreSQL without the extension, the error has the reason."""
    database = Database(database_url)
    try:
        await migrate(database)
        expected = "is SQLite" if database.url.get_backend_name() == "sqlite" else "no extension citus"
        with pytest.raises(ValueError, match=expected):
            await distribute(database)
    finally:
        await database.close()


def test_the_command_distributes(tmp_path: Path) -> None:
    """`daybook migrate --distribute` migrates first, and prints why it can't distribute."""
    result = run("migrate", "--distribute", "--database-url", sqlite_url(tmp_path / "daybook.db"), folder=tmp_path)
    assert (result.returncode, result.stdout) == (1, "the database is up to date\n")
    assert "this database is SQLite" in result.stderr
    assert "Traceback" not in result.stderr


@only_postgresql
async def test_only_statements_of_the_product_are_monitored(database_url: str) -> None:
    """The monitor records statements that the product sends to the driver, and none that tests send."""
    database, statements = Database(database_url), Statements()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_get_statement", "execute"):
            patch.setattr(Connection, name, getattr(Connection, name))
        monitor(statements)
        try:
            await migrate(database)
            await database.transact(lambda connection: database.primary.lock_accounts(connection, [1]))
            async with writing(database) as connection:
                await connection.execute(text("SELECT balance FROM account_states WHERE debt > 0 FOR UPDATE"))
        finally:
            await database.close()
    monitored = [each for each in statements.sent if "FOR UPDATE" in each]
    assert len(monitored) == 1, statements.sent
    assert "WHERE account_states.account_number = $1" in monitored[0]
    assert statements.take_broken() == []


def test_a_broken_rule_is_reported_once() -> None:
    """A statement of the product that breaks a rule is reported once, with its place; one of a test is not reported."""
    statements = Statements()
    statement = "SELECT balance FROM account_states WHERE account_number IN ($1, $2, $3) FOR UPDATE"
    statements.record(statement)
    assert statements.take_broken() == []
    for length in (3, 4):
        code = f"send({statement.replace('$3', '$3' if length == 3 else '$3, $4')!r})"
        exec(compile(code, str(ROOT / "server/store/states.py"), "exec"), {"send": statements.record})  # noqa: S102  # own code, compiled with a file name of the product
    (report,) = statements.take_broken()
    assert report.startswith("FOR UPDATE over more than one account, sent by server/store/states.py:1: SELECT balance")
    assert statements.take_broken() == []
