"""Checks every statement that the server sends to PostgreSQL in this process against the rules of sharding.

It patches the driver, so that no statement bypasses it. It ignores the statements of tests, which corrupt ledgers on
purpose.
"""

from __future__ import annotations

import sys
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any

from asyncpg.connection import Connection

from tests.support.sharding_rules import broken_rules, plain

_ROOT = Path(__file__).resolve().parents[2]
_SERVER, _TESTS = f"{_ROOT / 'server'}/", f"{_ROOT / 'tests'}/"


class Statements:
    """The statements that the server has sent, and the rules that they break."""

    def __init__(self) -> None:
        self.sent: set[str] = set()
        self._broken: list[str] = []

    def record(self, statement: str) -> None:
        """Records a statement that is being sent."""
        text = plain(statement)
        if text in self.sent or (sender := _sender()) is None:
            return
        self.sent.add(text)
        self._broken += [f"{rule}, sent by {sender}: {text}" for rule in broken_rules(text)]

    def take_broken(self) -> list[str]:
        """Returns the rules that were broken since the last call, each with its statement."""
        taken, self._broken = self._broken, []
        return taken


def _sender() -> str | None:
    """Returns the line of server/ that sends the statement; None if a test sends it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_SERVER):
            return f"{file.removeprefix(str(_ROOT) + '/')}:{frame.f_lineno}"
        if file.startswith(_TESTS) and file != __file__:
            return None
        frame = frame.f_back
    return None


def monitor(statements: Statements) -> None:
    """Records the statements of every asyncpg connection of this process from now on."""
    # Statements with parameters and prepared statements use _get_statement; others use execute.
    for name in ("_get_statement", "execute"):
        setattr(Connection, name, _recorded(getattr(Connection, name), statements))


def _recorded(method: Any, statements: Statements) -> Any:
    @wraps(method)
    async def send(self: Connection, query: str, *arguments: Any, **named: Any) -> Any:
        statements.record(query)
        return await method(self, query, *arguments, **named)

    return send
