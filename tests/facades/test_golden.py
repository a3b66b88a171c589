"""The exchanges of the golden files, sent through a real gateway."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import pytest

from server.app import FACADES
from tests.support.databases import PostgreSQL, run_apart
from tests.support.gateways import OriginIn
from tests.support.golden import FILES, Matcher, read_condition, read_exchanges
from tests.support.http_client import read_json, send
from tests.support.processes import Daybook, Ports
from tests.support.waiting import wait_until

STATEMENTS_OF_CONDITIONS = {
    "": "SELECT 1",
    "damaged": r"""
        UPDATE transactions SET body = '\xFF';
        ALTER TABLE usage_windows ALTER COLUMN computing TYPE text USING 'x'
    """,
    # Each read fails as if a table's file were lost. A missing table would be another error than an outage.
    "lost": """
        ALTER TABLE transactions RENAME TO lost_transactions;
        CREATE VIEW transactions AS SELECT * FROM lost_transactions WHERE pg_read_file('nowhere') <> '';
        ALTER TABLE usage_windows RENAME TO lost_windows;
        CREATE VIEW usage_windows AS SELECT * FROM lost_windows WHERE pg_read_file('nowhere') <> ''
    """,
}
"""The SQL that brings the demo's database into a condition. The other conditions do not depend on the engine."""


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_exchange_is_answered_as_written(origin_in: OriginIn, file: Path) -> None:
    """Each request of a file gets the answer in the file."""
    origin, matcher = origin_in(read_condition(file)), Matcher()
    problems = [problem for each in read_exchanges(file) for problem in each.replay(origin, matcher)]
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


@pytest.mark.long
def test_exchanges_on_postgresql(postgresql: PostgreSQL, tmp_path: Path) -> None:
    """The answers are the same on PostgreSQL, also with damaged rows and with tables that can't be read."""
    name = f"golden_{uuid.uuid4().hex}"
    postgresql.execute(f"CREATE DATABASE {name}")
    problems = []
    for condition, statements in STATEMENTS_OF_CONDITIONS.items():
        run_apart(execute(postgresql.url(name), statements))
        files = [file for file in FILES if read_condition(file) == condition]
        assert files, condition
        with demo_on(postgresql.url(name), tmp_path / (condition or "sound")) as origin:
            for file in files:
                matcher = Matcher()
                found = [problem for each in read_exchanges(file) for problem in each.replay(origin, matcher)]
                problems += [f"{file.parent.name}/{file.name}: {problem}" for problem in found]
    postgresql.execute(f"DROP DATABASE {name} WITH (FORCE)")
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


async def execute(database_url: str, statements: str) -> None:
    """Executes SQL statements on a new connection."""
    connection = await asyncpg.connect(database_url.replace("+asyncpg", ""))
    try:
        await connection.execute(statements)
    finally:
        await connection.close()


@contextmanager
def demo_on(database_url: str, folder: Path) -> Iterator[str]:
    """Runs the demo on a database, loaded if it is missing; gives the gateway's origin."""
    ports = Ports.free()
    flags = ("up", "--demo", "--database-url", database_url, *ports.flags)
    daybook = Daybook.start(*flags, folder=folder, ports=ports)
    try:
        daybook.wait_for("Ctrl-C stops it.")
        wait_until(lambda: send(daybook.origin, "/readyz").status == 200, "/readyz answers 200")
        yield daybook.origin
        assert daybook.stop() == 0
    finally:
        daybook.kill()


def test_every_vendor_has_golden_files() -> None:
    """Each facade has golden files."""
    assert {file.parent.name for file in FILES} == {service.split(".")[2] for service in FACADES}


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        ("1", '"1"'),
        ("1", "true"),
        ("0", "false"),
        ("2.004", "2.0040000000000001"),
        ("null", '""'),
        ('{"a": null}', "{}"),
        ("{}", '{"a": null}'),
        ("[1, 2]", "[2, 1]"),
        ("[1]", "[1, 2]"),
        ("[1, 2]", "[1]"),
        ("[]", '{"data": []}'),
        ('"<uuid7>"', '"0192e2e0-3f00-405b-a856-6f43b10310ce"'),
        ('"<uuid7>"', '"0192E2E0-3F00-705B-A856-6F43B10310CE"'),
        ('["<uuid7>", "<uuid7>"]', '["0192e2e0-3f00-705b-a856-6f43b10310ce", "0192e2e0-3f00-705b-a856-6f43b10310ce"]'),
        ('"<page token: next>"', "null"),
        ('"<page token: next>"', '"a+b/c="'),
        ('"<text>"', '""'),
        ('"<text: take>"', '"month is wrong"'),
    ],
)
def test_comparison_finds_difference(expected: str, actual: str) -> None:
    """The matcher reports a difference between unequal JSON values."""
    assert Matcher().differences(read_json(expected), read_json(actual))


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        ("0.0", "0"),
        ("2.004", "2.0040"),
        ('{"a": 1, "b": null}', '{"b": null, "a": 1}'),
        ('["<uuid7>"]', '["0192e2e0-3f00-705b-a856-6f43b10310ce"]'),
        ('"<text: take>"', '"take is wrong"'),
    ],
)
def test_comparison_ignores_formatting(expected: str, actual: str) -> None:
    """The matcher accepts equal JSON values in other notations."""
    assert not Matcher().differences(read_json(expected), read_json(actual))


def test_named_placeholder_has_one_value() -> None:
    """A named placeholder matches only one value in all exchanges of a file."""
    matcher = Matcher()
    first, second = "0192e2e0-3f00-705b-a856-6f43b10310ce", "0192e272-6200-795b-8a71-8f1946db6388"
    assert not matcher.differences("<uuid7: row>", first)
    assert not matcher.differences("<uuid7: row>", first)
    assert matcher.differences("<uuid7: row>", second)


def test_repeated_key_is_refused() -> None:
    """read_json refuses an object with a repeated key."""
    with pytest.raises(AssertionError, match="twice"):
        read_json('{"a": 1, "a": 2}')
