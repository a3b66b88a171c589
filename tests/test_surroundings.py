"""The command in bad surroundings: it ends with one line that says what to mend, and no traceback."""

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

AS_NOBODY = """
import os, sys
import server.cli.database
import server.store.postgresql, server.store.sqlite
from server.store.database import Database
# Modules that are loaded late are loaded now: the user may not be able to read them.
Database("postgresql+asyncpg://user@127.0.0.1:1/x")
Database("sqlite+aiosqlite:////nowhere/x")
os.setgroups([])
os.setgid(54321)
os.setuid(54321)
server.cli.main()
"""
"""Runs the command as a user who has no entry in the password database."""


def require_one_line(result: subprocess.CompletedProcess[str] | Result, code: int, words: str) -> None:
    """Fails unless the command ended with this code and with one line on standard error, and nothing else."""
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
def test_file_that_cannot_be_a_database(url: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL of SQLite that names no usable file ends the command, and the file stays as it was."""
    (tmp_path / "text").write_text("no database")
    (tmp_path / "garbage").write_bytes(b"SQLite format 3\x00 and nothing that follows")
    monkeypatch.chdir(tmp_path)
    require_one_line(invoke("migrate", "--database-url", url), 1, words)
    assert (tmp_path / "text").read_text() == "no database"


@pytest.mark.parametrize("arguments", [("seed", "--rows", "1000"), ("verify",), ("tenants", "list"), ("serve",)])
def test_every_command_tells_it(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Whatever the command, a file that is no database ends it in the same way."""
    (tmp_path / "daybook.db").write_text("no database")
    result = run(*arguments, folder=tmp_path)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == "daybook: database_url names a file that is not a SQLite database"


def test_folder_of_a_gateway_that_is_a_file(tmp_path: Path) -> None:
    """`gateway-config` names the path that it can't make."""
    (tmp_path / "file").touch()
    result = run("gateway-config", str(tmp_path / "file"), "--server", "server-1:50051", folder=tmp_path)
    require_one_line(result, 1, f"{tmp_path / 'file'}: File exists")


def test_full_output(tmp_path: Path) -> None:
    """A disk that is full for the output is named."""
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(
            command("--help"), cwd=tmp_path, env=environment(), stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert (result.returncode, result.stderr) == (1, b"daybook: the output can't be written: No space left on device\n")


def test_closed_output(tmp_path: Path) -> None:
    """A command whose standard output is closed does its work all the same."""
    closing = ["sh", "-c", 'exec "$@" >&-', "sh", *command("migrate")]
    result = subprocess.run(closing, cwd=tmp_path, env=environment(), capture_output=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, b"")


def test_no_folder_for_temporary_files(tmp_path: Path, postgresql: PostgreSQL) -> None:
    """`daybook up`, which needs one, says so where no file can be written anywhere."""
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
    # Before it is the line of the log about the migration.
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
def test_user_without_a_name_or_rights(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    """A process whose user has no passwd entry, no home and no rights says what it lacks."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine").touch(mode=0o600)
    nameless = {name: text for name, text in environment().items() if name not in {"HOME", "USER", "LOGNAME"}}
    result = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, *arguments],
        cwd=folder,
        env=nameless,
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    require_one_line(result, 1, words)
