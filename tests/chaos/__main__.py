"""The command of the campaign: runs the scenarios, prints a table and writes it as JSON."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import typer

from tests.chaos import stages
from tests.chaos.campaign import Figures, run

JSON = Path(".daybook/chaos.json")
RESTART_SECONDS_MAX = 2.0
"""Longest time that a call may take in a rolling restart, in seconds."""
_HEADINGS = (
    "scenario",
    "ends",
    "acknowledged",
    "refused",
    "repeated",
    "repeated reads",
    "unserved s, median",
    "max",
    "slowest call s",
    "duration s",
)


@contextmanager
def _on_postgresql(
    folder: Path, stage: Callable[..., AbstractContextManager[stages.Stage]], *options: signal.Signals
) -> Iterator[stages.Stage]:
    with stages.postgresql_in(folder) as postgresql, stage(folder, postgresql, *options) as running:
        yield running


SCENARIOS: dict[str, tuple[int, Callable[[Path], AbstractContextManager[stages.Stage]]]] = {
    "server-on-sqlite": (200, lambda folder: stages.killed_server(folder, None)),
    "server-on-postgresql": (200, lambda folder: _on_postgresql(folder, stages.killed_server)),
    "postgresql": (50, lambda folder: _on_postgresql(folder, stages.killed_database)),
    "one-of-two-servers": (50, lambda folder: _on_postgresql(folder, stages.two_servers, signal.SIGKILL)),
    "rolling-restart": (20, lambda folder: _on_postgresql(folder, stages.two_servers, signal.SIGTERM)),
    "full-sqlite": (20, stages.full_sqlite),
    "full-postgresql": (20, stages.full_postgresql),
}
"""How often a process ends or a disk is full in each scenario, and its stage."""
_FOR_ROOT = {"full-sqlite", "full-postgresql"}
"""Scenarios that mount a small disk."""


def main() -> None:
    """Runs the campaign; exit status 1 if a scenario fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    possible = [name for name in SCENARIOS if os.geteuid() == 0 or name not in _FOR_ROOT]
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=possible, help="scenarios to run")
    parser.add_argument("--ends", type=int, help="how often a process ends or a disk is full, instead of the default")
    parser.add_argument("--seed", type=int, default=0, help="seed of the calls and the moments")
    parser.add_argument("--json", type=Path, default=JSON, help=f"file to write the figures to; default {JSON}")
    options = parser.parse_args()
    found: dict[str, Figures] = {}
    if options.only is possible and (left_out := SCENARIOS.keys() - possible):
        typer.echo(f"Left out, because only root can mount a disk: {', '.join(sorted(left_out))}")
    typer.echo("| " + " | ".join(_HEADINGS) + " |\n|" + "---|" * len(_HEADINGS))
    for name in options.only:
        ends, stage = SCENARIOS[name]
        with tempfile.TemporaryDirectory(prefix="daybook-chaos-") as folder, stage(Path(folder)) as running:
            found[name] = figures = asyncio.run(run(running, options.ends or ends, options.seed))
        if name == "rolling-restart":
            if lost := figures.repeated + figures.repeated_reads:
                sys.exit(f"{lost} calls were lost in a rolling restart")
            if figures.slowest > RESTART_SECONDS_MAX:
                sys.exit(f"a call took {figures.slowest:.2f} seconds in a rolling restart")
        counts = (figures.ends, figures.acknowledged, figures.refused, figures.repeated, figures.repeated_reads)
        times = (statistics.median(figures.unserved), max(figures.unserved), figures.slowest, figures.duration)
        typer.echo(f"| {' | '.join((name, *map(str, counts), *(f'{each:.2f}' for each in times)))} |")
        # After each scenario, so that a failure of the next one doesn't lose it.
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({name: dataclasses.asdict(each) for name, each in found.items()}, indent=2))


if __name__ == "__main__":
    main()
