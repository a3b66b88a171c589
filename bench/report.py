"""Writes the findings as a table, as JSON and as a plot."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

_WIDTH = 160


class Sense(Enum):
    """Whether the bar is a minimum or a maximum."""

    AT_LEAST = ">="
    AT_MOST = "<="


@dataclass(frozen=True, slots=True)
class Bar:
    """A limit for a value."""

    sense: Sense
    limit: float

    def is_held(self, value: float) -> bool:
        """Whether a value is within the limit, inclusive."""
        return value >= self.limit if self.sense is Sense.AT_LEAST else value <= self.limit

    def __str__(self) -> str:
        return f"{self.sense.value} {self.limit:,.6g}"


def at_least(limit: float) -> Bar:
    """Returns a bar that is a minimum."""
    return Bar(Sense.AT_LEAST, limit)


def at_most(limit: float) -> Bar:
    """Returns a bar that is a maximum."""
    return Bar(Sense.AT_MOST, limit)


@dataclass(frozen=True, slots=True)
class Finding:
    """One measurement of a figure."""

    figure: int
    what: str
    value: float
    unit: str
    """Empty for a ratio."""
    bar: Bar | None
    """None if the value is only reported."""
    spread: float = 0.0
    """The interquartile range of all rounds, as a fraction of their median."""
    sides: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """The measurements of each side, round by round."""
    note: str = ""

    @property
    def is_short(self) -> bool:
        """Whether there is a bar and the value misses it."""
        return self.bar is not None and not self.bar.is_held(self.value)

    @property
    def verdict(self) -> str:
        """The verdict: held, short or reported."""
        if self.bar is None:
            return "reported"
        return "short" if self.is_short else "held"


def machine() -> dict[str, Any]:
    """Returns the properties of the machine and the versions of the measured software."""
    return {
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "grpcio": version("grpcio"),
        "daybook": version("daybook"),
        # Includes the load of the bench itself.
        "load_average": os.getloadavg(),
    }


def as_table(findings: Sequence[Finding]) -> Table:
    """Returns a table with a row for each finding."""
    table = Table("figure", "what", "measured", "bar", "verdict", "spread", "rounds", "sides (medians)")
    for each in findings:
        sides = ", ".join(f"{name} {median(values):,.6g}" for name, values in each.sides.items())
        rounds = max((len(values) for values in each.sides.values()), default=1)
        colour = {"held": "green", "short": "red", "reported": "blue"}[each.verdict]
        table.add_row(
            str(each.figure),
            each.what,
            f"{each.value:,.3g} {each.unit}".strip() if each.value < 1000 else f"{each.value:,.0f} {each.unit}".strip(),
            "" if each.bar is None else str(each.bar),
            f"[{colour}]{each.verdict}[/{colour}]",
            f"{each.spread:.0%}" if each.spread else "",
            str(rounds),
            "; ".join(part for part in (sides, each.note) if part),
        )
    return table


def as_json(findings: Sequence[Finding], options: Mapping[str, Any]) -> str:
    """Returns all measurements, the options and the machine as JSON."""
    return json.dumps(
        {
            "machine": machine(),
            "options": dict(options),
            "findings": [
                {**asdict(each), "bar": None if each.bar is None else str(each.bar), "verdict": each.verdict}
                for each in findings
            ],
        },
        indent=2,
    )


def plot(findings: Sequence[Finding], file: Path) -> None:
    """Plots each value relative to its bar. Values to the right of the vertical line hold."""
    # Imported here, because tests of the findings run without matplotlib.
    from matplotlib.figure import Figure  # noqa: PLC0415

    barred = [each for each in findings if each.bar is not None][::-1]
    figure = Figure(figsize=(10, 1 + 0.4 * max(1, len(barred))), layout="constrained")
    axes = figure.subplots()
    for row, each in enumerate(barred):
        axes.barh(row, _margin(each, each.value) - 1, left=1, color="tab:red" if each.is_short else "tab:green")
        axes.annotate(f" {each.value:,.3g} ({each.bar})", (_margin(each, each.value), row), va="center")
    axes.axvline(1, color="black")
    axes.set_xscale("log")
    axes.set_yticks(range(len(barred)), [f"{each.figure}: {each.what}" for each in barred])
    # Decimal numbers instead of powers of ten.
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("value relative to its bar; above 1 it holds")
    axes.margins(x=0.3)
    figure.savefig(file, dpi=120)


def _margin(finding: Finding, value: float) -> float:
    """Returns a value relative to its bar; above 1 it holds."""
    assert finding.bar is not None
    value = max(value, 1e-9)
    return value / finding.bar.limit if finding.bar.sense is Sense.AT_LEAST else finding.bar.limit / value


def write(findings: Sequence[Finding], options: Mapping[str, Any], folder: Path) -> None:
    """Prints the table, and writes the table, the JSON and the plot into an existing folder."""
    table = as_table(findings)
    # Without a terminal there is no width.
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(table)
    (folder / "bench.json").write_text(as_json(findings, options) + "\n")
    with (folder / "bench.txt").open("w") as file:
        Console(file=file, width=_WIDTH).print(table)
    plot(findings, folder / "bench.png")
