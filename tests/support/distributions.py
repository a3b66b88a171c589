"""The installed distributions that requirements need."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import Distribution, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OWN = {"daybook", "daybook-client"}
"""The distributions of this project."""


def needed(requirements: Iterable[Requirement]) -> dict[str, Distribution]:
    """Returns the distributions of others that requirements need, including transitive dependencies."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(each, "") for each in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found[name] = distribution(name)
        for selected in {"", *requirement.extras}:
            if (name, selected) not in seen:
                seen.add((name, selected))
                waiting += [(Requirement(text), selected) for text in found[name].requires or []]
    return {name: each for name, each in found.items() if name not in OWN}
