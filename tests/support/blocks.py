"""The code blocks of the documentation, and how each of them is checked.

A block begins with three backticks and its language. The blocks `sh` and `python` of a page run one after the other in
tests/facades/test_guides.py, against the demo. Others are named here, with what checks them instead.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *(ROOT / folder / "README.md" for folder in ("bench", "clients/python", "examples")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"(?ms)^( *)```(\w*)\n(.*?)^ *```$")
GENERATED = re.compile(r"(?s)<!-- generated.*?<!-- end -->")


@dataclass(frozen=True, slots=True)
class Block:
    """A code block of a page."""

    page: str
    """The path of the page in the project."""
    language: str
    text: str

    @property
    def first(self) -> str:
        """The first line."""
        return self.text.partition("\n")[0]


def blocks(page: str, *languages: str) -> list[Block]:
    """Returns the blocks of a page in some languages, by default in all. Generated blocks are not among them."""
    text = GENERATED.sub("", (ROOT / page).read_text())
    found = [
        Block(page, language, re.sub(rf"(?m)^{indent}", "", body)) for indent, language, body in FENCE.findall(text)
    ]
    return [block for block in found if not languages or block.language in languages]


ALL = [block for page in PAGES for block in blocks(str(page.relative_to(ROOT)))]

ELSEWHERE = {
    ("docs/cli.md", "sh"): "tests/cli/test_guide.py",
    ("docs/cli.md", "toml"): "tests/cli/test_guide.py",
    ("docs/clients.md", "go"): "tests/facades/test_generated_clients.py",
    ("docs/clients.md", "java"): "tests/facades/test_generated_clients.py",
    ("docs/clients.md", "js"): "tests/facades/test_generated_clients.py",
    ("docs/clients.md", "python"): "tests/facades/test_generated_clients.py",
    ("docs/clients.md", "sh"): "tests/facades/test_generated_clients.py",
    ("docs/clients.md", "ts"): "tests/facades/test_generated_clients.py",
    ("docs/import.md", "toml"): "tests/importing/test_table.py",
    ("docs/operate/access-tokens.md", "json"): "tests/rpc/test_access_tokens.py",
    ("docs/operate/access-tokens.md", "text"): "tests/rpc/test_access_tokens.py",
    ("docs/operate/backup.md", "text"): "tests/support/postgresql_standby.py",
    ("docs/operate/deploy.md", "ini"): "tests/test_systemd.py",
    ("docs/operate/postgresql.md", "text"): "tests/store/test_postgresql_url.py",
    ("docs/operate/tls.md", "sh"): "tests/facades/test_tls.py",
    ("docs/operate/upgrades.md", "sql"): "tests/test_docs.py",
    ("docs/operate/watching.md", "yaml"): "tests/facades/test_watching.py",
    ("docs/paging.md", "text"): "tests/transport/test_filters.py",
    ("docs/python.md", "python"): "tests/clients/test_guide.py",
    ("examples/README.md", "text"): "tests/facades/test_generated_clients.py",
}
"""What runs or parses the blocks of a page in a language."""

NOT_RUN = {
    ("CONTRIBUTING.md", "make test"): "runs all tests",
    ("README.md", "make run"): "runs all tests",
    ("README.md", ".venv/bin/daybook up"): "serves until it is stopped; tests/facades/test_up.py starts it",
    ("SECURITY.md", "pip-audit"): "needs a database of vulnerabilities",
    ("bench/README.md", "make bench"): "takes an hour",
    ("bench/README.md", ".venv/bin/daybook seed"): "takes minutes; tests/test_seed.py seeds less",
    ("docs/architecture.md", "flowchart"): "is a diagram",
    ("docs/clients.md", "<Protobuf"): "needs .NET",
    (
        "docs/clients.md",
        "go install",
    ): "tests/facades/test_generated_clients.py takes pinned versions and runs the rest",
    (
        "docs/clients.md",
        "npm install",
    ): "tests/facades/test_generated_clients.py takes pinned versions and runs the rest",
    ("docs/clients.md", "pip install"): "tests/test_install.py installs wheels",
    ("docs/clients.md", "using Daybook"): "needs .NET",
    ("docs/get-started.md", "make run"): "serves until it is stopped",
    ("docs/get-started.md", ".venv/bin/daybook up"): "serves until it is stopped; tests/facades/test_up.py starts it",
    ("docs/import.md", "daybook import --from"): "needs the vendor; tests/importing serves the vendors' pages",
    ("docs/import.md", "SOURCE_TOKEN"): "needs the vendor; tests/importing serves the vendors' pages",
    ("docs/import.md", "daybook import history.csv"): "tests/importing/test_table.py imports such files",
    ("docs/operate/citus.md", "SELECT citus"): "needs Citus",
    ("docs/operate/citus.md", "daybook migrate --distribute"): "needs Citus",
    ("docs/operate/citus.md", "python -m bench.cluster"): "needs Citus",
    ("docs/operate/deploy.md", "python3.11 -m venv /opt"): "changes the machine; tests/test_install.py installs wheels",
    ("docs/operate/tls.md", "DAYBOOK_GATEWAY_TLS"): "serves until it is stopped; tests/facades/test_tls.py starts it",
    ("docs/python.md", "pip install"): "tests/test_install.py installs wheels",
    ("examples/README.md", "cd "): "tests/facades/test_generated_clients.py builds the programs with pinned versions",
}
"""Blocks that can't run here, by their page and the beginning of their first line, with the reason. Their commands are
parsed instead: tests/test_blocks.py.
"""


def is_named(block: Block) -> bool:
    """Whether a block is in NOT_RUN."""
    return any(page == block.page and block.first.startswith(start) for page, start in NOT_RUN)


def is_run(block: Block) -> bool:
    """Whether tests/facades/test_guides.py runs a block."""
    return block.language in {"sh", "python"} and (block.page, block.language) not in ELSEWHERE and not is_named(block)
