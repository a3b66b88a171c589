"""`python -m bench`: measures, prints and writes what it found, exits with 1 where a bar falls short."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.figures import FIGURES
from bench.load import LoadFailed, require_tools
from bench.report import Finding, write
from bench.stage import ROWS_LARGE, ROWS_LARGE_QUICK, Stage

OUT = Path(".daybook/bench")
PROCESSORS = 2
"""How many processors everything shares: server, gateway, database and load."""


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if unknown := [number for number in numbers if number not in FIGURES]:
        raise ValueError(f"there is no figure {unknown[0]}")
    return numbers


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measures Daybook on this machine.")
    parser.add_argument("--only", type=_numbers, default=list(FIGURES), help="the numbers of figures, like 1,3")
    parser.add_argument("--quick", action="store_true", help="only to see that everything works: figures are noise")
    parser.add_argument("--rows", type=int, help=f"how large the large ledger is; {ROWS_LARGE:,} unless --quick")
    parser.add_argument("--out", type=Path, default=OUT, help=f"where the results go; {OUT} unless given")
    return parser.parse_args(arguments)


@contextmanager
def _few_processors() -> Iterator[None]:
    """All processes that are started in the block get the same few."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    all_of_them = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(all_of_them)[:PROCESSORS])
    try:
        yield
    finally:
        os.sched_setaffinity(0, all_of_them)


def main(arguments: Sequence[str] | None = None) -> int:
    """Takes the figures. Answers with the exit code."""
    options = _parse(arguments)
    rows = options.rows or (ROWS_LARGE_QUICK if options.quick else ROWS_LARGE)
    findings: list[Finding] = []
    failures: list[str] = []
    try:
        require_tools()
    except LoadFailed as error:
        sys.stderr.write(f"{error}\n")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    with (
        _few_processors(),
        # Beside the results: it may be large, and folders for temporary files may be in memory.
        tempfile.TemporaryDirectory(prefix="databases-", dir=options.out) as folder,
        Stage(Path(folder), is_quick=options.quick, rows_large=rows) as stage,
    ):
        for number in options.only:
            stage.say(f"figure {number}: {FIGURES[number].title}")
            try:
                findings += FIGURES[number].measure(stage)
            except Exception as error:
                # Whatever it was: the others are still worth their time.
                failures.append(f"figure {number} could not be taken: {error}")
                stage.say(traceback.format_exc())
    write(findings, {"only": options.only, "quick": options.quick, "rows": rows}, options.out)
    for failure in failures:
        sys.stderr.write(f"{failure}\n")
    return 1 if failures or any(each.is_short for each in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
