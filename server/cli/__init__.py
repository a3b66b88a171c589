"""The `daybook` command: a module for each group of commands, imported when one of them runs."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from io import TextIOWrapper
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

COLLECTOR_THRESHOLDS = (20_000, 50, 100)
"""The garbage collector's thresholds: new objects, then collections of the younger generation."""


class Command(NamedTuple):
    """An entry of the list of commands."""

    module: str
    """The module below server.cli whose `app` has the command."""
    help: str
    """The first paragraph of the command's help."""


COMMANDS: Mapping[str, Command] = {
    "serve": Command("serving", "Serves gRPC until SIGINT or SIGTERM. Creates and migrates the database first."),
    "up": Command("up", "Serves gRPC, and REST through Envoy, until SIGINT or SIGTERM."),
    "health": Command("health", "Checks whether the server on this machine can answer calls. Exits with 1 if not."),
    "gateway-config": Command(
        "deployment", "Writes envoy.yaml and the files that it names, for a gateway that runs elsewhere."
    ),
    "migrate": Command("database", "Creates the database, or migrates it to the schema of this version."),
    "verify": Command("database", "Recomputes the books and prints each divergence. Exits with 1 if there is one."),
    "backup": Command("database", "Copies a SQLite database to a new file while servers use it."),
    "seed": Command("seed", "Creates a tenant with a large, generated history, and prints what to try."),
    "import": Command("importing", "Imports history from a vendor's API, from its saved pages, or from a CSV file."),
    "tenants": Command("tenants", "Tenants: each runs a set of accounts."),
    "keys": Command("keys", "API keys."),
    "token-keys": Command("keys", "Keys that seal page tokens."),
    "accounts": Command("accounts", "Accounts of a server."),
    "transactions": Command("transactions", "Transactions of a server."),
    "lots": Command("accounts", "Lots: credits of an account that were added together."),
    "balance": Command("accounts", "Shows the current balance of an account."),
    "export": Command("export", "Exports the transactions of an account or of the tenant to a file, as of one moment."),
    "worker": Command("serving", "Serves as one process of `serve --workers`, which starts it."),
}
HIDDEN = {"worker"}


class LazyCommands(TyperGroup):
    """Lists commands without their modules, and imports the module of the command that runs."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Called by Typer with the arguments after the options of `daybook`."""
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None:
            module = import_module(f"server.cli.{COMMANDS[name].module}")
            command = typer.main.get_group(module.app).commands[name]
        return name, command, rest


app = typer.Typer(cls=LazyCommands, no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(is_given: bool) -> None:
    if is_given:
        # Loaded only for this option.
        from importlib.metadata import version  # noqa: PLC0415

        typer.echo(f"daybook {version('daybook')}")
        raise typer.Exit


@app.callback()
def _daybook(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Prints the version, and exits.")
    ] = False,
) -> None:
    """A credit ledger as a service."""


def _placeholder() -> None:
    """Stands for a command in the help; never runs."""


for _name, _command in COMMANDS.items():
    app.command(_name, help=_command.help, hidden=_name in HIDDEN)(_placeholder)


def main() -> None:
    """Runs the command of this process's arguments."""
    # Flushes each line, even if standard output is a pipe.
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    # Errors have one line, and gRPC's own log would add more. gRPC reads the variable when it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # Calls create few reference cycles, and frequent collections slow down imports of history.
    gc.set_threshold(*COLLECTOR_THRESHOLDS)
    try:
        app()
    except OSError as error:
        # Standard output failed: its disk may be full.
        sys.exit(f"daybook: the output can't be written: {error.strerror}")
    except Exception:
        sys.stderr.write("daybook: a defect of Daybook; please report it with the traceback below\n")
        raise
