"""Rows by their keys, several at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import Dialect, Select, and_, column, tuple_, values
from sqlalchemy.sql.elements import KeyedColumnElement

KEYS_AT_ONCE_MAX = 512
"""How many keys one statement asks for; engines bound the parameters of a statement."""

Key = TypeVar("Key")


def with_keys(
    statement: Select[Any],
    columns: Iterable[KeyedColumnElement[Any]],
    keys: Sequence[tuple[Any, ...]],
    dialect: Dialect,
) -> Select[Any]:
    """The statement, for the rows that have one of the keys in these columns.

    Of more than one key SQLite makes no search: for `(a, b) IN (VALUES ...)` it reads all of
    the table. It searches for each where they are a table of their own. PostgreSQL
    does that anyway, and a sharded one couldn't send such a table to its nodes.
    """
    if dialect.name != "sqlite":
        return statement.where(tuple_(*columns).in_(keys))
    wanted = values(*(column(each.name, each.type) for each in columns), name="wanted").data(keys).cte()
    return statement.join(wanted, and_(*(wanted.c[each.name] == each for each in columns)))


def in_parts(keys: Iterable[Key]) -> Iterator[list[Key]]:
    """Keys in parts that a statement can ask for at once."""
    remaining = iter(keys)
    while some := list(islice(remaining, KEYS_AT_ONCE_MAX)):
        yield some
