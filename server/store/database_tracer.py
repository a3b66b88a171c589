"""Tracing hooks around what an engine does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import sqlalchemy
from sqlalchemy import event


class DatabaseTracer:
    """Tracing hooks; no-ops by default."""

    def work(self, name: str) -> AbstractContextManager[None]:
        """Entered for everything that is done with one connection, from the wait for it to the commit."""
        del name
        return _NOTHING

    def statement(self, system: str, text: str) -> Callable[[BaseException | None], None]:
        """Called when a statement begins, without its values; the result is called at its end, with its failure."""
        del system, text
        return _ignore


_NOTHING = nullcontext()


def _ignore(_failure: BaseException | None) -> None:
    """The end of a statement that is not traced."""


def trace_statements(engine: sqlalchemy.Engine, tracer: Callable[[], DatabaseTracer]) -> None:
    """Calls the current tracer around each statement that SQLAlchemy executes. A connection has one at a time."""
    key, system = "daybook_end_statement", engine.dialect.name

    def begin(connection: Any, _cursor: object, statement: str, *_: object) -> None:
        connection.info[key] = tracer().statement(system, statement)

    def end(connection: Any, *_: object) -> None:
        if ended := connection.info.pop(key, None):
            ended(None)

    def fail(failure: Any) -> None:
        if failure.connection is not None and (ended := failure.connection.info.pop(key, None)):
            ended(failure.original_exception)

    event.listen(engine, "before_cursor_execute", begin)
    event.listen(engine, "after_cursor_execute", end)
    event.listen(engine, "handle_error", fail)
