"""Dependencies are pinned, installed as pinned, and from a package index. Security lint rules are enabled."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distributions
from itertools import pairwise
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.distributions import OWN, needed

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
CLIENT: dict[str, Any] = tomllib.loads((ROOT / "clients/python/pyproject.toml").read_text())
RUFF: dict[str, Any] = PROJECT["tool"]["ruff"]["lint"]


def pins() -> dict[str, str]:
    """Returns the version of each package in .ci/constraints.txt."""
    lines = (ROOT / ".ci/constraints.txt").read_text().splitlines()
    found = [line.partition("==") for line in lines]
    return {canonicalize_name(name): version for name, _, version in found}


def declared(*, with_dev: bool) -> list[Requirement]:
    """Returns the requirements in pyproject.toml."""
    project = PROJECT["project"]
    return [Requirement(text) for text in project["dependencies"] + with_dev * project["optional-dependencies"]["dev"]]


def test_dependencies_are_pinned_and_installed_as_pinned() -> None:
    """Each package that the project or its tests need is pinned, and the pinned version is installed."""
    runtime, everything = needed(declared(with_dev=False)), needed(declared(with_dev=True))
    assert runtime.keys() < everything.keys()
    installed = {name: found.version for name, found in everything.items()}
    assert {name: pins().get(name) for name in installed} == installed


def test_only_dependencies_are_pinned() -> None:
    """Every pinned package is a dependency."""
    assert pins().keys() == needed(declared(with_dev=True)).keys()


def test_dependencies_come_from_the_package_index() -> None:
    """No package is required by URL, from a repository or from a folder; all come from pip's index."""
    assert not [str(each) for each in declared(with_dev=True) if each.url]
    build = [Requirement(text) for text in PROJECT["build-system"]["requires"]]
    assert not [str(each) for each in build if each.url]
    direct = {each.name: json.loads(text) for each in distributions() if (text := each.read_text("direct_url.json"))}
    assert direct.keys() <= OWN, "only the project itself is installed from a folder"


def test_distributions_agree() -> None:
    """The server needs the client of its own version; both have the same Python versions and licence."""
    server, client = PROJECT["project"], CLIENT["project"]
    assert f"daybook-client=={server['version']}" in server["dependencies"]
    assert CLIENT["build-system"] == PROJECT["build-system"]
    for key in ("version", "license", "requires-python"):
        assert server[key] == client[key], key
    # A copy, because a source archive can't have a link to a file outside of it.
    assert (ROOT / "clients/python/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    versions = [[each for each in of["classifiers"] if ":: 3" in each] for of in (server, client)]
    assert versions[0] == versions[1]


def test_client_needs_only_grpc() -> None:
    """The client depends on gRPC and Protocol Buffers only, from the versions that generated its code on."""
    code = ROOT / "gen" / "daybook" / "v1"
    (grpcio,) = set(re.findall(r"GRPC_GENERATED_VERSION = '(.*)'", (code / "ledger_service_pb2_grpc.py").read_text()))
    (protobuf,) = re.findall(r"# Protobuf Python Version: (.*)", (code / "account_pb2.py").read_text())
    expected = ["googleapis-common-protos", f"grpcio>={grpcio}", f"protobuf>={protobuf}"]
    assert CLIENT["project"]["dependencies"] == expected


def test_installed_packages_are_compatible() -> None:
    """No installed package lacks a dependency or has an incompatible one."""
    result = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def exceptions() -> Iterator[tuple[str, str]]:
    """Yields each line that disables a security rule, with the line before it."""
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    for before, line in pairwise(lines):
        if re.fullmatch(r' +"S\d*",', line):
            yield line, before


def test_security_rules_are_enabled() -> None:
    """All S rules of ruff are enabled, except for single rules that are disabled with a comment."""
    assert RUFF["select"] == ["ALL"]
    off = [code for codes in [RUFF["ignore"], *RUFF["per-file-ignores"].values()] for code in codes]
    assert "S" not in off
    assert len(list(exceptions())) == len([code for code in off if code.startswith("S") and code[1:].isdigit()])
    assert not [line for line, before in exceptions() if not re.fullmatch(r" +# .+", before)]


def test_suppressed_security_finding_has_a_reason() -> None:
    """Every line that suppresses a security rule has a comment with the reason."""
    files = [file for folder in ("server", "tests", "protos") for file in (ROOT / folder).rglob("*.py")]
    off = [line for file in files for line in file.read_text().splitlines() if re.search(r"# noqa: .*\bS\d{3}\b", line)]
    assert off
    assert not [line for line in off if not re.search(r"# noqa: [A-Z0-9, ]+  # \w", line)]
