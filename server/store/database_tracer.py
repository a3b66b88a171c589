"""Who is told what a database is asked to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any


class DatabaseTracer:
    """Told what the database is asked to do. This one takes no notice; others override what they want to know."""

    def work(self, name: str) -> AbstractContextManager[None]:
        """Entered for all that is done with one connection, from the wait for it to the commit."""
        del name
        return _NOTHING

    def statement(self, system: str, text: str) -> Callable[[BaseException | None], None]:
        """A statement begins, given without its values; what this gives is told at its end whether it failed."""
        del system, text
        return _not_told


_NOTHING = nullcontext()


def _not_told(_failure: BaseException | None) -> None:
    """For a statement of which nobody takes notice."""


def statement_listeners(tracer: DatabaseTracer, system: str) -> Mapping[str, Callable[..., None]]:
    """What SQLAlchemy calls around each statement. A connection has one under way at most."""
    key = "daybook_end_statement"

    def begin(connection: Any, _cursor: object, statement: str, *_: object) -> None:
        connection.info[key] = tracer.statement(system, statement)

    def end(connection: Any, *_: object) -> None:
        if told := connection.info.pop(key, None):
            told(None)

    def fail(failure: Any) -> None:
        if failure.connection is not None and (told := failure.connection.info.pop(key, None)):
            told(failure.original_exception)

    return {"before_cursor_execute": begin, "after_cursor_execute": end, "handle_error": fail}
