"""Hears every statement that the product sends to PostgreSQL in this process, and holds it to the rules of sharding.

Heard at the driver, so that it doesn't matter by what way a statement comes there. What a
test itself sends doesn't count: tests break books on purpose.
"""

from __future__ import annotations

import sys
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any

from asyncpg.connection import Connection

from tests.sharding import broken_rules, plain

_ROOT = Path(__file__).resolve().parents[1]
_SERVER, _TESTS = f"{_ROOT / 'server'}/", f"{_ROOT / 'tests'}/"


class Statements:
    """The statements of the product that were heard, and those of them that break a rule."""

    def __init__(self) -> None:
        self.heard: set[str] = set()
        self._broken: list[str] = []

    def hear(self, statement: str) -> None:
        """Takes note of a statement that is just being sent."""
        text = plain(statement)
        if text in self.heard or (sender := _sender()) is None:
            return
        self.heard.add(text)
        self._broken += [f"{rule}, says {sender}: {text}" for rule in broken_rules(text)]

    def take_broken(self) -> list[str]:
        """What was found since the last time."""
        taken, self._broken = self._broken, []
        return taken


def _sender() -> str | None:
    """Where in the product the statement comes from; None if a test sends it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_SERVER):
            return f"{file.removeprefix(str(_ROOT) + '/')}:{frame.f_lineno}"
        if file.startswith(_TESTS) and file != __file__:
            return None
        frame = frame.f_back
    return None


def heed(statements: Statements) -> None:
    """Lets every connection of this process be heard from now on."""
    # Every way that takes parameters, or prepares, asks for a statement; `execute` may do without.
    for name in ("_get_statement", "execute"):
        setattr(Connection, name, _heard(getattr(Connection, name), statements))


def _heard(method: Any, statements: Statements) -> Any:
    @wraps(method)
    async def send(self: Connection, query: str, *arguments: Any, **named: Any) -> Any:
        statements.hear(query)
        return await method(self, query, *arguments, **named)

    return send
