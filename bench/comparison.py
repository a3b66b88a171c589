"""Compares two sides: measures them in turns until the ratio is stable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

ROUNDS_MIN = 3
ROUNDS_MAX = 9
SPREAD_MAX = 0.05


@dataclass(frozen=True, slots=True)
class Rounds:
    """The number of rounds of a comparison."""

    at_least: int = ROUNDS_MIN
    at_most: int = ROUNDS_MAX


@dataclass(frozen=True, slots=True)
class Compared:
    """The measurements of both sides."""

    above: tuple[float, ...]
    """The numerators of the ratios, round by round."""
    below: tuple[float, ...]
    """The denominators."""

    @property
    def ratios(self) -> tuple[float, ...]:
        """The ratio of each round."""
        return tuple(above / below for above, below in zip(self.above, self.below, strict=True))

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return median(self.ratios)

    @property
    def spread(self) -> float:
        """The spread of the ratios."""
        return spread(self.ratios)


def spread(values: Sequence[float]) -> float:
    """Returns the interquartile range as a fraction of the median."""
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / median(values)


def compare(above: Callable[[], float], below: Callable[[], float], rounds: Rounds) -> Compared:
    """Measures both sides in turns until the ratio is stable, or for the largest number of rounds.

    A slow phase of the machine slows both sides, so the ratio is more stable than either side.
    """
    compared = Compared((), ())
    while len(compared.above) < rounds.at_most:
        compared = Compared((*compared.above, above()), (*compared.below, below()))
        if len(compared.above) >= rounds.at_least and compared.spread < SPREAD_MAX:
            break
    return compared
