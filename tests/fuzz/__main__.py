"""The command of the campaign: sends inputs of each kind, and prints a table."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import typer

from tests.fuzz.campaign import KINDS, Figures, run
from tests.fuzz.target import FLOOD_GROWTH_BYTES_MAX, Target, target_in

SHARES = {"messages": 7, "rest": 6, "http1-server": 2, "http1-gateway": 2, "http2-server": 2, "http2-gateway": 1}
"""Parts of all inputs, in twentieths."""
BATCH = 2_000
"""Inputs of one kind between two checks."""
BATCHES_PER_TENANT = 20
_HEADINGS = ("kind", "inputs", "failures", "slowest s (number)", "inputs/s", "statuses")


def main() -> None:
    """Runs the campaign; exit status 1 if an input fails or a check does."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000, help="number of inputs, shared among the kinds")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of inputs")
    parser.add_argument("--start", type=int, default=0, help="number of the first input of each kind")
    options = parser.parse_args()
    whole = sum(SHARES[kind] for kind in options.only)
    left = {kind: options.inputs * SHARES[kind] // whole for kind in options.only}
    left[options.only[0]] += options.inputs - sum(left.values())
    with tempfile.TemporaryDirectory(prefix="daybook-fuzz-") as folder, target_in(Path(folder)) as target:
        found = asyncio.run(_campaign(target, left, options.seed, options.start))
    if any(figures.failure_count for figures in found.values()):
        sys.exit("an input failed; `--only KIND --start N --inputs 1` with the same seed sends it again")


async def _campaign(target: Target, left: dict[str, int], seed: int, start: int) -> dict[str, Figures]:
    """Sends so many inputs of each kind, in turn; prints what is done after each round."""
    found = {kind: Figures() for kind in left}
    before, batch, begun, tenant = None, 0, time.monotonic(), await target.new_tenant()
    while any(left.values()):
        for kind, count in left.items():
            size = min(BATCH, count)
            if not size:
                continue
            if batch % BATCHES_PER_TENANT == BATCHES_PER_TENANT - 1:
                # Lists and verifications of a tenant that has grown would take ever longer.
                tenant = await target.new_tenant()
            first = start + found[kind].inputs
            make = partial(KINDS[kind], target, tenant)
            done = await run(make, kind, range(first, first + size), seed)
            found[kind].add(done)
            for failure in done.failures:
                typer.echo(f"FAILED {failure}", err=True)
            await target.check(tenant)
            left[kind], batch = count - size, batch + 1
        # The first round fills caches and pools.
        before = before or target.sizes()
        await target.check_sizes(before, FLOOD_GROWTH_BYTES_MAX)
        _print(found, time.monotonic() - begun)
        typer.echo(f"resident: {', '.join(f'{each.resident_bytes >> 20} MiB' for each in target.sizes())}")
    return found


def _print(found: dict[str, Figures], seconds: float) -> None:
    inputs = sum(figures.inputs for figures in found.values())
    typer.echo(f"\n{inputs} inputs in {seconds:.0f} s\n\n| {' | '.join(_HEADINGS)} |\n|{'---|' * len(_HEADINGS)}")
    for kind, figures in found.items():
        if figures.inputs:
            statuses = ", ".join(f"{status} {count}" for status, count in figures.statuses.most_common())
            rate = figures.inputs / figures.seconds
            cells = (
                kind,
                str(figures.inputs),
                str(figures.failure_count),
                f"{figures.slowest:.2f} ({figures.slowest_number})",
                f"{rate:.0f}",
            )
            typer.echo(f"| {' | '.join(cells)} | {statuses} |")


if __name__ == "__main__":
    main()
