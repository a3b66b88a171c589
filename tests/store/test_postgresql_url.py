"""URLs of PostgreSQL: libpq's parameters, and TLS to a real server."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import pytest_asyncio
from sqlalchemy import text
from structlog.testing import capture_logs

from server.ledger.errors import ServiceUnavailable
from server.store.database import Database
from server.store.engine import DatabaseUrlInvalid
from server.store.migrate import can_serve, migrate
from server.store.query import Query
from tests.support.blocks import blocks
from tests.support.certificates import Authority
from tests.support.databases import PostgreSQL
from tests.support.processes import free_range, run

PROGRAMS = next(
    (each for each in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True) if (each / "initdb").exists()),
    None,
)
SECONDS_MAX = 60
PASSWORD = "hunter2-of-postgresql"
BASE = f"postgresql+asyncpg://daybook:{PASSWORD}@127.0.0.1/daybook"


async def setting(url: str, name: str) -> str:
    """The value of a setting in a session of the pool."""
    database = Database(url)
    try:
        ((value,),) = await database.primary.fetch(Query(text(f"SHOW {name}")), {})
        return str(value)
    finally:
        await database.close()


async def test_parameters_reach_the_server(postgresql: PostgreSQL) -> None:
    """Parameters of the URL apply to the session."""
    url = postgresql.url("postgres")
    assert await setting(url, "application_name") == "daybook"
    assert await setting(f"{url}&application_name=ledger%201", "application_name") == "ledger 1"
    assert await setting(f"{url}&options=-c%20work_mem%3D7MB", "work_mem") == "7MB"
    assert await setting(f"{url}&connect_timeout=7&sslmode=require&target_session_attrs=any", "lock_timeout") == "5s"


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("colour=blue", "has an unknown parameter 'colour'; supported are application_name, connect_timeout, host, "),
        ("command_timeout=5", "has an unknown parameter 'command_timeout'"),
        ("sslmode=maybe", "has a wrong value of the parameter sslmode; it can be disable, allow, prefer, require, "),
        ("ssl=true", "has a wrong value of the parameter sslmode; "),
        ("connect_timeout=soon", "has a wrong value of the parameter connect_timeout; it is a number from 1 to 65535"),
        ("connect_timeout=0", "has a wrong value of the parameter connect_timeout"),
        ("port=99999999", "has a wrong value of the parameter port"),
        ("sslrootcert=/nowhere.pem", "has a parameter sslrootcert that names no file"),
        ("application_name=a&application_name=b", "has the parameter application_name more than once"),
        ("target_session_attrs=best", "has a wrong value of the parameter target_session_attrs; it can be any, "),
    ],
)
@pytest.mark.parametrize("name", ["database_url", "database_replica_url"])
async def test_a_wrong_parameter_is_refused(name: str, query: str, problem: str) -> None:
    """The error of a wrong parameter names the setting and the parameter, and shows no password."""
    wrong = f"{BASE}?{query}"
    with pytest.raises(DatabaseUrlInvalid) as caught:
        Database(*((wrong,) if name == "database_url" else (BASE, None, wrong)))
    assert str(caught.value).startswith(f"{name} {problem}")
    assert PASSWORD not in str(caught.value)


async def test_documented_url_is_accepted(authority: Authority) -> None:
    """The URL in docs/operate/postgresql.md has supported parameters."""
    (block,) = blocks("docs/operate/postgresql.md", "text")
    url = block.text.strip().replace("/etc/daybook/postgresql-ca.crt", str(authority.file))
    assert str(authority.file) in url
    await Database(url).close()


def test_the_command_prints_one_line(tmp_path: Path) -> None:
    """For a wrong parameter the command prints one line and no traceback."""
    done = run("migrate", "--database-url", f"{BASE}?colour=blue", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("daybook: database_url has an unknown parameter 'colour'")
    assert done.stderr.count("\n") == 1


class TlsPostgreSQL:
    """A PostgreSQL that accepts only TLS connections."""

    def __init__(self, port: int) -> None:
        self._port = port

    def url(self, query: str, host: str = "127.0.0.1") -> str:
        """The URL of its database."""
        return f"postgresql+asyncpg://daybook:{PASSWORD}@{host}:{self._port}/postgres{query}"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tls_server(authority: Authority) -> AsyncIterator[TlsPostgreSQL]:
    """Runs the system's PostgreSQL, because that of the Python package lacks TLS."""
    if PROGRAMS is None:
        pytest.skip("no PostgreSQL with TLS is installed (/usr/lib/postgresql)")
    user = "postgres" if os.geteuid() == 0 else None
    with TemporaryDirectory(prefix="daybook-tls-", ignore_cleanup_errors=True) as name:
        folder, port = Path(name), free_range(1)
        (folder / "password").write_text(PASSWORD)
        pair = authority.issue("postgresql")
        for source, target in ((pair.certificate, "server.crt"), (pair.key, "server.key")):
            shutil.copyfile(source, folder / target)
            (folder / target).chmod(0o600)
        if user is not None:
            for each in ("", "password", "server.crt", "server.key"):
                shutil.chown(folder / each, user, user)

        async def program(tool: str, *arguments: str) -> asyncio.subprocess.Process:
            return await asyncio.create_subprocess_exec(
                *(str(PROGRAMS / tool), *arguments),
                user=user,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

        data = str(folder / "data")
        initialization = await program(
            *("initdb", "-D", data, "-U", "daybook", "--pwfile", str(folder / "password"), "-E", "UTF8"),
            *("--auth", "scram-sha-256", "--no-sync", "--locale", "C"),
        )
        assert await asyncio.wait_for(initialization.wait(), SECONDS_MAX) == 0
        (folder / "data" / "pg_hba.conf").write_text("hostssl all all 127.0.0.1/32 scram-sha-256\n")
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(port),
            "unix_socket_directories": "",
            "ssl": "on",
            "ssl_cert_file": str(folder / "server.crt"),
            "ssl_key_file": str(folder / "server.key"),
            "fsync": "off",
        }
        process = await program("postgres", "-D", data, *(f"--{name}={value}" for name, value in settings.items()))
        try:
            server = TlsPostgreSQL(port)
            async with asyncio.timeout(SECONDS_MAX):
                while not await answers(server.url("?sslmode=require")):
                    assert process.returncode is None, "PostgreSQL ended"
                    await asyncio.sleep(0.05)
            yield server
        finally:
            process.kill()
            await process.wait()


async def answers(url: str) -> bool:
    """Whether a database can be reached."""
    try:
        return await setting(url, "server_encoding") == "UTF8"
    except ServiceUnavailable:
        return False


@pytest.mark.asyncio(loop_scope="module")
async def test_sslmode_works_as_in_libpq(tls_server: TlsPostgreSQL, authority: Authority, tmp_path: Path) -> None:
    """Each sslmode works as in libpq, and a failed verification is one line in the log."""
    verified = f"?sslmode=verify-full&sslrootcert={authority.file}"
    for query in ("", "?sslmode=require", "?ssl=require", verified, f"?sslmode=verify-ca&sslrootcert={authority.file}"):
        assert await setting(tls_server.url(query), "ssl") == "on", query
    assert await answers(tls_server.url(verified, "localhost"))
    assert not await answers(tls_server.url("?sslmode=disable"))
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other")
    with capture_logs() as logs:
        assert not await answers(tls_server.url(f"?sslmode=verify-full&sslrootcert={other.file}"))
    (line,) = logs
    assert line["event"] == "database unavailable"
    assert "CERTIFICATE_VERIFY_FAILED" in line["error"]
    assert "\n" not in line["error"]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_ledger_works_over_tls(tls_server: TlsPostgreSQL, authority: Authority) -> None:
    """A database is migrated and can serve, over encrypted sessions only."""
    database = Database(tls_server.url(f"?sslmode=verify-full&sslrootcert={authority.file}"))
    try:
        await migrate(database)
        assert await can_serve(database)
        count = (
            "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE datname IS NOT NULL AND NOT ssl"
        )
        assert await database.primary.fetch(Query(text(count)), {}) == [(0,)]
    finally:
        await database.close()
