"""Bounded reads as statements: built by SQLAlchemy, executed by the driver itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sqlalchemy import Dialect, Executable


class CompiledQuery(NamedTuple):
    """The text of a query for one driver."""

    text: str
    names: tuple[str, ...]
    """The names of its parameters, in order."""
    constants: Mapping[str, object]
    """The values of parameters that SQLAlchemy added for literals."""

    def values(self, parameters: Mapping[str, object]) -> tuple[object, ...]:
        """The values of the parameters, in order."""
        merged = {**self.constants, **parameters} if self.constants else parameters
        return tuple(map(merged.__getitem__, self.names))


class Query:
    """A statement that reads a bounded number of rows, with named parameters.

    Compiled once per dialect: execution by SQLAlchemy costs several times as much as the database does.
    """

    def __init__(self, statement: Executable | Callable[[], Executable]) -> None:
        """A function saves memory: it is called at each compilation, so the statement is not kept."""
        self._statement = statement
        self._compiled: dict[str, CompiledQuery] = {}

    def compiled(self, dialect: Dialect) -> CompiledQuery:
        """The query for the drivers of a dialect."""
        found = self._compiled.get(dialect.name)
        if found is None:
            statement = self._statement() if callable(self._statement) else self._statement
            found = self._compiled[dialect.name] = _compile(statement, dialect)
        return found


def _compile(statement: Any, dialect: Dialect) -> CompiledQuery:
    compiled = statement.compile(dialect=dialect, compile_kwargs={"render_postcompile": True})
    constants = {name: value for name, value in compiled.params.items() if value is not None}
    return CompiledQuery(str(compiled), tuple(compiled.positiontup or ()), constants)
