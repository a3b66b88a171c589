"""Runs the `daybook` command in the process of the test, because a new process would need a second to start."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from server import cli
from server.cli import options


def invoke(*arguments: str, settings: Mapping[str, str] | None = None) -> Result:
    """Runs a command, with only these settings in the environment. No event loop may be running."""
    inherited = {name: None for name in os.environ if name.startswith("DAYBOOK_")}
    with pytest.MonkeyPatch.context() as patch:
        # Logging is configured once per process, and pytest has done that.
        patch.setattr(options, "configure_logs", lambda _settings: None)
        return CliRunner().invoke(cli.app, arguments, env={**inherited, **(settings or {})})


def printed(database_url: str, *arguments: str) -> str:
    """Runs a command on a database; it must succeed. Returns its output without the last line break."""
    result = invoke(*arguments, "--database-url", database_url)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout.removesuffix("\n")


def require_command(*arguments: str) -> None:
    """Fails unless the `daybook` command accepts these arguments. Does not run the command."""
    group: Any = typer.main.get_command(cli.app)
    while True:
        context = group.make_context("daybook", list(arguments))
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        if not hasattr(command, "commands"):
            command.make_context(name, rest, parent=context)
            return
        group, arguments = command, tuple(rest)
