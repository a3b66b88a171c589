"""Commands in a broken environment end with one line that names the problem, without a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import Result

from tests.support.command_line import invoke
from tests.support.databases import PostgreSQL
from tests.support.processes import Ports, command, environment, run
from tests.support.waiting import SECONDS_MAX

AS_UNKNOWN_USER = """
import os, sys
import server.cli.database
import server.store.postgresql, server.store.sqlite
from server.store.database import Database
# Loads modules that are imported lazily, because the user may not be able to read them.
Database("postgresql+asyncpg://user@127.0.0.1:1/x")
Database("sqlite+aiosqlite:////nowhere/x")
os.setgroups([])
os.setgid(54321)
os.setuid(54321)
server.cli.main()
"""
"""Runs the command as a user without an entry in the password database."""


def require_one_line(result: subprocess.CompletedProcess[str] | Result, code: int, words: str) -> None:
    """Fails unless the command ended with this code, and printed only one line, to standard error, with these words."""
    found = result.exit_code if isinstance(result, Result) else result.returncode
    assert (found, result.stdout) == (code, ""), result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("daybook: "), line
    assert words in line


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sqlite+aiosqlite://", "must name a file"),
        ("sqlite+aiosqlite:///:memory:", "must name a file"),
        ("sqlite+aiosqlite:///file:x?mode=memory&uri=true", "takes no parameters after a ? for SQLite"),
        ("sqlite+aiosqlite:///text", "is not a SQLite database"),
        ("sqlite+aiosqlite:///garbage", "is not a SQLite database"),
        ("sqlite+aiosqlite:///.", "must name a file"),
        ("sqlite+aiosqlite:////dev/null", "must name a file"),
        ("sqlite+aiosqlite:///text/daybook.db", "names a folder that can't be made"),
    ],
)
def test_unusable_sqlite_file_is_refused(url: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A SQLite URL without a usable file ends the command, and the file is unchanged."""
    (tmp_path / "text").write_text("no database")
    (tmp_path / "garbage").write_bytes(b"SQLite format 3\x00 and nothing that follows")
    monkeypatch.chdir(tmp_path)
    require_one_line(invoke("migrate", "--database-url", url), 1, words)
    assert (tmp_path / "text").read_text() == "no database"


@pytest.mark.parametrize("arguments", [("seed", "--rows", "1000"), ("verify",), ("tenants", "list"), ("serve",)])
def test_every_command_refuses_an_invalid_database(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Every command reports a file that is not a database in the same way."""
    (tmp_path / "daybook.db").write_text("no database")
    result = run(*arguments, folder=tmp_path)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == "daybook: database_url names a file that is not a SQLite database"


def test_gateway_config_names_a_file_in_its_way(tmp_path: Path) -> None:
    """`gateway-config` names the path at which it can't create a folder."""
    (tmp_path / "file").touch()
    result = run("gateway-config", str(tmp_path / "file"), "--server", "server-1:50051", folder=tmp_path)
    require_one_line(result, 1, f"{tmp_path / 'file'}: File exists")


def test_full_disk_for_output_is_reported(tmp_path: Path) -> None:
    """A command whose output can't be written, because the disk is full, reports it."""
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(
            command("--help"), cwd=tmp_path, env=environment(), stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert (result.returncode, result.stderr) == (1, b"daybook: the output can't be written: No space left on device\n")


def test_command_works_with_closed_output(tmp_path: Path) -> None:
    """A command with closed standard output still does its work."""
    closing = ["sh", "-c", 'exec "$@" >&-', "sh", *command("migrate")]
    result = subprocess.run(closing, cwd=tmp_path, env=environment(), capture_output=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, b"")


def test_missing_temporary_folder_is_reported(tmp_path: Path, postgresql: PostgreSQL) -> None:
    """`daybook up` reports that there is no usable folder for temporary files."""
    postgresql.execute("CREATE DATABASE no_folder")
    limited = ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh"]
    url = postgresql.url("no_folder")
    result = subprocess.run(
        [*limited, *command("up", "--database-url", url, *Ports.free().flags)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    postgresql.execute("DROP DATABASE no_folder WITH (FORCE)")
    assert (result.returncode, result.stdout) == (1, ""), result.stderr
    assert "Traceback" not in result.stderr
    # A line of the log about the migration precedes it.
    assert result.stderr.splitlines()[-1].startswith("daybook: No usable temporary directory found")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can run a command as another user")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("migrate", "--database-url", "postgresql+asyncpg://127.0.0.1:1/x"), "must name a user"),
        (("migrate", "--database-url", "sqlite+aiosqlite:///daybook.db"), "a folder that this user can't write to"),
        (("migrate", "--database-url", "sqlite+aiosqlite:///mine"), "a file that this user can't read and write"),
    ],
)
def test_user_without_name_or_permissions_is_reported(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    """A process whose user has no passwd entry, home folder or permissions reports what is missing."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine").touch(mode=0o600)
    without_user = {name: text for name, text in environment().items() if name not in {"HOME", "USER", "LOGNAME"}}
    result = subprocess.run(
        [sys.executable, "-c", AS_UNKNOWN_USER, *arguments],
        cwd=folder,
        env=without_user,
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    require_one_line(result, 1, words)
