"""What the project runs on: pinned, as pinned, out of a package index; and the rules of security for its code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution, distributions
from itertools import pairwise
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
RUFF: dict[str, Any] = PROJECT["tool"]["ruff"]["lint"]


def pins() -> dict[str, str]:
    """The version of each package by .ci/constraints.txt."""
    lines = (ROOT / ".ci/constraints.txt").read_text().splitlines()
    found = [line.partition("==") for line in lines]
    return {canonicalize_name(name): version for name, _, version in found}


def declared(*, with_dev: bool) -> list[Requirement]:
    """What pyproject.toml asks for."""
    project = PROJECT["project"]
    return [Requirement(text) for text in project["dependencies"] + with_dev * project["optional-dependencies"]["dev"]]


def needed(requirements: list[Requirement]) -> dict[str, Distribution]:
    """What is installed for requirements, and for what these require in turn."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(each, "") for each in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found[name] = distribution(name)
        for wanted in {"", *requirement.extras}:
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                waiting += [(Requirement(text), wanted) for text in found[name].requires or []]
    return found


def test_everything_needed_is_pinned_and_as_pinned() -> None:
    """Each package that the project runs on, or is tested with, is pinned, and that version is installed."""
    runtime, everything = needed(declared(with_dev=False)), needed(declared(with_dev=True))
    assert runtime.keys() < everything.keys()
    installed = {name: found.version for name, found in everything.items()}
    assert {name: pins().get(name) for name in installed} == installed


def test_nothing_is_pinned_in_vain() -> None:
    """A pin whose package nobody needs any more goes."""
    assert pins().keys() == needed(declared(with_dev=True)).keys()


def test_nothing_comes_from_elsewhere() -> None:
    """Packages come out of the index that pip is set to: none by URL, out of a repository or a folder."""
    assert not [str(each) for each in declared(with_dev=True) if each.url]
    build = [Requirement(text) for text in PROJECT["build-system"]["requires"]]
    assert not [str(each) for each in build if each.url]
    direct = {each.name: json.loads(text) for each in distributions() if (text := each.read_text("direct_url.json"))}
    assert direct.keys() <= {"daybook"}, "only the project itself is installed from a folder"


def test_requirements_agree() -> None:
    """No package that is installed lacks another, or has one that it can't work with."""
    result = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def exceptions() -> Iterator[tuple[str, str]]:
    """Each rule of security that is off somewhere, as a line that says so, and the line before it."""
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    for before, line in pairwise(lines):
        if re.fullmatch(r' +"S\d*",', line):
            yield line, before


def test_rules_of_security_are_on() -> None:
    """All of ruff's S rules hold, but for those that are off by one, each with a reason."""
    assert RUFF["select"] == ["ALL"]
    off = [code for codes in [RUFF["ignore"], *RUFF["per-file-ignores"].values()] for code in codes]
    assert "S" not in off
    assert len(list(exceptions())) == len([code for code in off if code.startswith("S") and code[1:].isdigit()])
    assert not [line for line, before in exceptions() if not re.fullmatch(r" +# .+", before)]


def test_a_line_that_is_let_through_says_why() -> None:
    """Where a rule of security is off for a line, its reason stands behind it."""
    files = [file for folder in ("server", "tests", "protos") for file in (ROOT / folder).rglob("*.py")]
    off = [line for file in files for line in file.read_text().splitlines() if re.search(r"# noqa: .*\bS\d{3}\b", line)]
    assert off
    assert not [line for line in off if not re.search(r"# noqa: [A-Z0-9, ]+  # \w", line)]
