"""`python -m bench`: measures the figures, writes the findings, and exits with 1 if a value misses its bar."""

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
"""The number of processors that the server, the gateway, the database and the load generators share."""


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if unknown := [number for number in numbers if number not in FIGURES]:
        raise ValueError(f"there is no figure {unknown[0]}")
    return numbers


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measures Daybook on this machine.")
    parser.add_argument(
        "--only", type=_numbers, default=list(FIGURES), help="numbers of the figures to measure, such as 1,3"
    )
    parser.add_argument("--quick", action="store_true", help="short trial run; its figures are noise")
    parser.add_argument(
        "--rows", type=int, help=f"number of transactions of the large ledger; {ROWS_LARGE:,} unless --quick"
    )
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder for the results; default {OUT}")
    return parser.parse_args(arguments)


@contextmanager
def _bound_to_processors() -> Iterator[None]:
    """Binds this process and its future children to the first PROCESSORS processors."""
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
    """Measures the figures. Returns the exit code."""
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
        _bound_to_processors(),
        # Databases may be large, and /tmp may be in memory.
        tempfile.TemporaryDirectory(prefix="databases-", dir=options.out) as folder,
        Stage(Path(folder), is_quick=options.quick, rows_large=rows) as stage,
    ):
        for number in options.only:
            stage.log(f"figure {number}: {FIGURES[number].title}")
            try:
                findings += FIGURES[number].measure(stage)
            except Exception as error:
                # A failure of one figure must not prevent the others.
                failures.append(f"figure {number} could not be measured: {error}")
                stage.log(traceback.format_exc())
    write(findings, {"only": options.only, "quick": options.quick, "rows": rows}, options.out)
    for failure in failures:
        sys.stderr.write(f"{failure}\n")
    return 1 if failures or any(each.is_short for each in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
