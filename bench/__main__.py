"""`python -m bench`: measures, prints and writes the findings, and exits with 1 if a value misses its bar."""

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
"""How many processors server, gateway, database and load share."""


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if unknown := [number for number in numbers if number not in FIGURES]:
        raise ValueError(f"there is no figure {unknown[0]}")
    return numbers


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measures Daybook on this machine.")
    parser.add_argument("--only", type=_numbers, default=list(FIGURES), help="the numbers of figures, like 1,3")
    parser.add_argument("--quick", action="store_true", help="only show that everything works: figures are noise")
    parser.add_argument("--rows", type=int, help=f"transactions of the large ledger; {ROWS_LARGE:,} unless --quick")
    parser.add_argument("--out", type=Path, default=OUT, help=f"the folder for the results; {OUT} unless given")
    return parser.parse_args(arguments)


@contextmanager
def _few_processors() -> Iterator[None]:
    """Binds this process and all that it starts to the same PROCESSORS."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    available = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(available)[:PROCESSORS])
    try:
        yield
    finally:
        os.sched_setaffinity(0, available)


def main(arguments: Sequence[str] | None = None) -> int:
    """Takes the figures. Gives the exit code."""
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
        # In the folder of the results: databases may be large, and /tmp may be in memory.
        tempfile.TemporaryDirectory(prefix="databases-", dir=options.out) as folder,
        Stage(Path(folder), is_quick=options.quick, rows_large=rows) as stage,
    ):
        for number in options.only:
            stage.say(f"figure {number}: {FIGURES[number].title}")
            try:
                findings += FIGURES[number].measure(stage)
            except Exception as error:
                # Any failure: the other figures are still taken.
                failures.append(f"figure {number} could not be taken: {error}")
                stage.say(traceback.format_exc())
    write(findings, {"only": options.only, "quick": options.quick, "rows": rows}, options.out)
    for failure in failures:
        sys.stderr.write(f"{failure}\n")
    return 1 if failures or any(each.is_short for each in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
