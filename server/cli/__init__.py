"""The `daybook` command: a file per group of subcommands."""

from __future__ import annotations

import gc
import sys
from io import TextIOWrapper

import typer

from server.cli import keys, tenants, token_keys
from server.cli.database import migrate, seed, verify
from server.cli.deployment import gateway_config
from server.cli.health import health
from server.cli.serving import serve, up, worker

COLLECTOR_THRESHOLDS = (20_000, 50, 100)
"""After how many new objects the youngest are searched for cycles, and how often the older ones."""

app = typer.Typer(help="A credit ledger as a service.", no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(tenants.app, name="tenants")
app.add_typer(keys.app, name="keys")
app.add_typer(token_keys.app, name="token-keys")
for command in (serve, up, health, gateway_config, migrate, verify, seed):
    app.command()(command)
app.command(hidden=True)(worker)


def main() -> None:
    """Runs the command of this process's arguments."""
    # Lines appear as they are printed, also through a pipe.
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    # What a call makes is hardly ever in a cycle, and to look for cycles every few hundred
    # objects costs an import of history an eighth of its time.
    gc.freeze()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)
    try:
        app()
    except OSError as error:
        # Standard output: its disk may be full.
        sys.exit(f"daybook: the output can't be written: {error.strerror}")
    except Exception:
        sys.stderr.write("daybook: a defect of Daybook; please report it with the traceback below\n")
        raise
