"""Comments, docstrings, texts and names of code have no banned words."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.words import BANNED

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("server", "clients", "examples", "protos", "bench", "tests", "docs")
# Files that hold the banned words as data, and files that Google wrote.
EXEMPT = {"tests/support/words.py", "tests/test_words.py", "tests/test_docs.py"}
GOOGLE = "protos/googleapis/"
BANNED_NAME = re.compile(
    r"(^|_)(who|whoever|whom|nobody|somebody|wanted|of_before|given_up|traced(?!_memory)|the_line)(_|$)"
)
COMMENT = {".proto": re.compile(r"//.*"), ".lua": re.compile(r"--.*"), ".yaml": re.compile(r"#.*")}


def sources() -> list[str]:
    """The files of code, relative to the root."""
    found = (path for room in ROOMS for path in sorted((ROOT / room).rglob("*")) if path.suffix in {".py", *COMMENT})
    paths = [str(path.relative_to(ROOT)) for path in found]
    return [path for path in paths if path not in EXEMPT and not path.startswith(GOOGLE)]


def prose(path: str) -> Iterator[tuple[int, str]]:
    """The comments, docstrings and texts of a file, each with its line number."""
    text = (ROOT / path).read_text()
    if path.endswith(".py"):
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in (tokenize.COMMENT, tokenize.STRING):
                yield token.start[0], token.string
    else:
        pattern = COMMENT[Path(path).suffix]
        for number, line in enumerate(text.splitlines(), 1):
            yield from ((number, match[0]) for match in pattern.finditer(line))


def names(path: str) -> Iterator[tuple[int, str]]:
    """The names in a Python file, each with its line number."""
    for token in tokenize.generate_tokens(io.StringIO((ROOT / path).read_text()).readline):
        if token.type == tokenize.NAME:
            yield token.start[0], token.string


@pytest.mark.parametrize("path", sources())
def test_prose_of_code_is_plain(path: str) -> None:
    """No comment, docstring, message or help text has a banned word."""
    found = [(number, match[0]) for number, text in prose(path) for match in BANNED.finditer(text)]
    assert not found, f"{path}: {found}"


@pytest.mark.parametrize("path", [path for path in sources() if path.endswith(".py")])
def test_names_are_plain(path: str) -> None:
    """No name of code has a banned word."""
    found = [(number, name) for number, name in names(path) if BANNED_NAME.search(name)]
    assert not found, f"{path}: {found}"
    assert not BANNED_NAME.search(Path(path).stem)


def test_banned_words_are_found() -> None:
    """The patterns find what they ban, and nothing in a plain sentence."""
    assert [match[0] for match in BANNED.finditer("Whoever asks is told. Keys of before")] == [
        "Whoever",
        "is told",
        "of before",
    ]
    assert not BANNED.search("A caller who holds the scope reads the account before it is closed.")
    assert BANNED_NAME.search("test_who_asks")
    assert not BANNED_NAME.search("is_whole")
