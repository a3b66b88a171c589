"""A command imports only the modules it uses, so that it starts quickly and needs little memory."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import typer

from server.cli import COMMANDS, LazyCommands, app
from tests.support.processes import Ports, environment, run, sqlite_url
from tests.support.waiting import SECONDS_MAX

# Prints the imported modules when the command ends; `serve` is stopped when it listens.
SHOW_MODULES = """
import atexit, sys
import server.cli
from server.cli import main
atexit.register(lambda: print("modules", *sorted(sys.modules)))
sys.argv = ["daybook", *sys.argv[1:]]
main()
"""
END_ONCE_SERVING = """
import contextlib, os, signal
import server.app
serving = server.app.serving

@contextlib.asynccontextmanager
async def serving_once(*arguments, **options):
    async with serving(*arguments, **options) as port:
        os.kill(os.getpid(), signal.SIGTERM)
        yield port

server.app.serving = serving_once
"""
EVERYWHERE = {"alembic", "asyncpg", "httpx", "jwt", "opentelemetry", "prometheus_client", "server.demo", "server.seed"}
"""Modules that neither the help nor a server with default settings uses."""


def modules_of(
    *arguments: str, folder: Path, prepare: str = "", code: int = 0, variables: Mapping[str, str] | None = None
) -> set[str]:
    """Returns the modules that a process has imported when a command ends."""
    result = subprocess.run(
        [sys.executable, "-c", prepare + SHOW_MODULES, *arguments],
        cwd=folder,
        env=environment(**(variables or {})),
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert result.returncode == code, result.stderr
    name, *modules = result.stdout.splitlines()[-1].split()
    assert name == "modules"
    return set(modules)


def test_help_imports_no_command(tmp_path: Path) -> None:
    """`daybook --help` lists the commands without importing their modules."""
    heavy = EVERYWHERE | {"cryptography", "google", "grpc", "pydantic_settings", "sqlalchemy", "structlog", "yaml"}
    modules = modules_of("--help", folder=tmp_path)
    assert not heavy & modules
    assert {name for name in modules if name.startswith("server")} == {"server", "server.cli"}


def test_serve_on_sqlite_imports_only_what_it_uses(tmp_path: Path) -> None:
    """`serve` on migrated SQLite imports no migrations, PostgreSQL, tracing, metrics, TLS, demo or gateway."""
    url = sqlite_url(tmp_path / "daybook.db")
    assert run("migrate", "--database-url", url, folder=tmp_path).returncode == 0
    modules = modules_of(
        *("serve", "--database-url", url, "--port", str(Ports.free().server)),
        folder=tmp_path,
        prepare=END_ONCE_SERVING,
    )
    assert not (EVERYWHERE | {"cryptography.x509", "server.gateway", "server.tls", "yaml"}) & modules
    assert {"grpc", "server.app", "sqlalchemy"} <= modules


def test_gateway_config_imports_no_server(tmp_path: Path) -> None:
    """`gateway-config` imports neither SQLAlchemy nor gRPC."""
    modules = modules_of("gateway-config", str(tmp_path / "gateway"), "--server", "one:1", folder=tmp_path)
    assert not {"grpc", "sqlalchemy"} & modules


def test_health_imports_no_store(tmp_path: Path) -> None:
    """`health` does not import SQLAlchemy."""
    modules = modules_of("health", "--port", str(Ports.free().server), folder=tmp_path, code=1)
    assert "grpc" in modules
    assert "sqlalchemy" not in modules


def test_client_commands_import_no_server(tmp_path: Path) -> None:
    """A command that calls a server imports the client, but neither the store, nor settings, nor Parquet."""
    address = ("--address", f"127.0.0.1:{Ports.free().server}")
    for arguments in (("balance", "acme"), ("export", "a.csv")):
        modules = modules_of(*arguments, *address, folder=tmp_path, code=75, variables={"DAYBOOK_KEY": "a.b"})
        assert "daybook_client" in modules
        heavy = {"pyarrow", "pydantic_settings", "server.config", "server.store", "sqlalchemy", "structlog"}
        assert not (EVERYWHERE | heavy) & modules


@pytest.mark.parametrize("name", COMMANDS)
def test_list_of_commands_has_the_help_of_each(name: str) -> None:
    """The help in the list of commands is the first paragraph of the command's own help."""
    group = typer.main.get_command(app)
    assert isinstance(group, LazyCommands)
    context = group.make_context("daybook", [name])
    _, command, _ = group.resolve_command(context, [name])
    paragraph, *_ = re.split(r"\n\n", command.help)
    assert " ".join(paragraph.split()) == COMMANDS[name].help
