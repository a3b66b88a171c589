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
        """Entered for the use of one connection, from the wait for it to the commit."""
        del name
        return _NOTHING

    def statement(self, system: str, text: str) -> Callable[[BaseException | None], None]:
        """Called at the start of a statement, without values. The result is called at its end, with any error."""
        del system, text
        return _ignore


_NOTHING = nullcontext()


def _ignore(_failure: BaseException | None) -> None:
    """Called at the end of a statement without tracing."""


def trace_statements(engine: sqlalchemy.Engine, tracer: Callable[[], DatabaseTracer]) -> None:
    """Calls the current tracer around each statement of SQLAlchemy. A connection runs one statement at a time."""
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
