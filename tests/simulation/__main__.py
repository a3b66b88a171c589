"""The command of the simulation: runs seeds, prints a failing schedule, and plants faults."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext

import typer

from tests.simulation.planted import PLANTED
from tests.simulation.simulation import Outcome, simulate

CHUNK = 50
"""Number of seeds that a process runs between two garbage collections."""
REPORT_SECONDS = 10.0


def main() -> int:
    """Runs what the command line says; gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description="Simulates servers and faults.")
    parser.add_argument("--seeds", type=int, default=1000, help="number of seeds")
    parser.add_argument("--start", type=int, default=0, help="first seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="processes that share the seeds")
    parser.add_argument("--fault", choices=[*PLANTED, "each"], help="fault to plant until a seed finds it")
    given = parser.parse_args()
    if given.fault == "each":
        return max([_plant(name, given.start, given.seeds) for name in PLANTED])
    if given.seeds == 1:
        with nullcontext() if given.fault is None else PLANTED[given.fault]():
            outcome = simulate(given.start)
        typer.echo("\n".join(lines(outcome, given.fault)))
        return int(outcome.problem is not None)
    if given.fault is not None:
        return _plant(given.fault, given.start, given.seeds)
    failed = _run_all(given.start, given.seeds, given.processes)
    if failed:
        typer.echo("\n".join(lines(simulate(failed[0]))))
        typer.echo(f"failed: {' '.join(map(str, failed))}")
    return int(bool(failed))


def lines(outcome: Outcome, fault: str | None = None) -> Iterator[str]:
    """The schedule of a simulation, and the command that repeats it."""
    for microseconds, *event in outcome.schedule:
        yield f"{microseconds / 1_000_000:12.6f}  {' '.join(map(str, event))}"
    yield f"seed {outcome.seed}: {outcome.problem or 'all invariants hold'}"
    yield f"digest {outcome.digest}"
    yield f"repeat with: make simulate SEEDS=1 START={outcome.seed}{f' FAULT={fault}' if fault else ''}"


def first_failure(start: int, count: int) -> Outcome | None:
    """The first of `count` seeds that fails; None if none does."""
    return next((outcome for outcome in map(simulate, range(start, start + count)) if outcome.problem), None)


def _plant(name: str, start: int, count: int) -> int:
    """Prints the number of seeds until a planted fault is found; gives 1 if no invariant finds it."""
    with PLANTED[name]():
        found = first_failure(start, count)
    if found is None:
        typer.echo(f"{name:26} not found")
        return 1
    typer.echo(f"{name:26} {found.seed - start + 1:>4}  {str(found.problem)[:120]}")
    return int(found.is_crash)


def _run_all(start: int, count: int, processes: int) -> list[int]:
    """Runs seeds in several processes, and prints their number per second; gives those that fail."""
    began = reported = time.monotonic()
    failed: list[int] = []
    done = commits = 0
    chunks = [range(first, min(first + CHUNK, start + count)) for first in range(start, start + count, CHUNK)]
    with ProcessPoolExecutor(processes) as pool:
        for chunk, (some_failed, some_commits) in zip(chunks, pool.map(_run_some, chunks), strict=True):
            failed += some_failed
            done, commits = done + len(chunk), commits + some_commits
            now = time.monotonic()
            if now - reported > REPORT_SECONDS or done == count:
                reported = now
                rate = done / (now - began)
                typer.echo(f"{done} seeds, {commits} commits, {rate:.1f} seeds/s, {len(failed)} failed")
    return failed


def _run_some(seeds: Sequence[int]) -> tuple[list[int], int]:
    """Runs seeds; gives those that fail, and the number of commits of all."""
    gc.disable()
    outcomes = [(outcome.seed, outcome.problem, outcome.commits) for outcome in map(simulate, seeds)]
    gc.enable()
    gc.collect()
    return [seed for seed, problem, _ in outcomes if problem is not None], sum(commits for *_, commits in outcomes)


if __name__ == "__main__":
    sys.exit(main())
