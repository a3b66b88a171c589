"""Statements as drivers take them, past SQLAlchemy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sqlalchemy import Dialect, Select


class Query(NamedTuple):
    """A statement as the driver takes it."""

    text: str
    names: tuple[str, ...]
    """Those of its parameters, in their order."""
    constants: Mapping[str, object]
    """The values of those that SQLAlchemy added by itself."""

    @classmethod
    def of(cls, statement: Select[Any], dialect: Dialect) -> Query:
        """Compiles a statement."""
        compiled = statement.compile(dialect=dialect, compile_kwargs={"render_postcompile": True})
        constants = {name: value for name, value in compiled.params.items() if value is not None}
        return cls(str(compiled), tuple(compiled.positiontup or ()), constants)

    def values(self, parameters: Mapping[str, object]) -> tuple[object, ...]:
        """The parameters in their order."""
        known = {**self.constants, **parameters} if self.constants else parameters
        return tuple(map(known.__getitem__, self.names))
