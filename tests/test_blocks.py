"""Every code block of the documentation is run, or checked as tests/support/blocks.py says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.support.blocks import ALL, ELSEWHERE, GENERATED, NOT_RUN, PAGES, ROOT, Block, is_named, is_run
from tests.support.command_line import require_command

OF_THE_SYSTEM = {
    "cd",
    "cp",
    "go",
    "install",
    "npm",
    "npx",
    "pip",
    "pip-audit",
    "python",
    "python3.11",
    "systemctl",
    "buf",
}
"""Programs that are not part of the project."""
LEFT_OUT = [
    block for block in ALL if is_named(block) or not (is_run(block) or (block.page, block.language) in ELSEWHERE)
]


def by_place(block: Block) -> str:
    """Returns the page and the first line of a block, as the id of a test case."""
    return f"{block.page} {block.first}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_is_in_blocks_with_a_language(page: Path) -> None:
    """Code is between backticks, never only indented, so that there is one way to find it."""
    text = GENERATED.sub("", page.read_text())
    assert len(re.findall(r"(?m)^ *```", text)) == 2 * len([each for each in ALL if ROOT / each.page == page])
    assert not re.findall(r"(?m)^\n    \S.*", re.sub(r"(?ms)^( *)```.*?^ *```$", "", text))
    assert not [block for block in ALL if ROOT / block.page == page and not block.language]


@pytest.mark.parametrize("block", LEFT_OUT, ids=by_place)
def test_block_that_is_not_run_is_named(block: Block) -> None:
    """A block that no test runs is named with the reason."""
    named = [start for page, start in NOT_RUN if page == block.page and block.first.startswith(start)]
    assert len(named) == 1, "a test must run the block; otherwise name it in NOT_RUN"


def test_reasons_are_needed() -> None:
    """Each exception is about an existing block, and each test that is named reads the page."""
    for page, start in NOT_RUN:
        assert [block for block in LEFT_OUT if block.page == page and block.first.startswith(start)], (page, start)
    for (page, language), test in ELSEWHERE.items():
        assert [block for block in ALL if (block.page, block.language) == (page, language)], (page, language)
        assert Path(page).name in (ROOT / test).read_text(), f"{test} doesn't read {page}"


@pytest.mark.parametrize("block", [each for each in LEFT_OUT if each.language == "sh"], ids=by_place)
def test_commands_that_are_not_run_are_valid(block: Block) -> None:
    """`daybook` accepts their arguments, targets of make exist, and so do the files that they read."""
    for line in block.text.replace("\\\n", "").splitlines():
        words = [word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)]
        program = words[0].rpartition("/")[2]
        if program == "daybook":
            require_command(*words[1:])
        elif program == "make":
            target = next(word for word in words[1:] if "=" not in word)
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        else:
            assert program in OF_THE_SYSTEM
            modules = words[words.index("-m") + 1 :][:1] if "-m" in words and program.startswith("python") else []
            for module in modules:
                assert module in {"pytest", "venv"} or (ROOT / f"{module.replace('.', '/')}.py").exists()
        for word in words[1:]:
            if re.match(r"(\./)?(docs|clients|\.ci)/", word):
                assert (ROOT / word).exists(), word
