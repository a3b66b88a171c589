"""Checks statements against the rules of sharded PostgreSQL (Citus).

The rows of distributed tables are on the node of their account. Citus refuses statements that a node can't execute
alone, or executes them a hundred times slower.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TypeGuard

import sqlglot
from sqlglot import expressions as sql
from sqlglot.optimizer.scope import Scope, traverse_scope

from server.store.tables import DISTRIBUTED, DISTRIBUTION_COLUMN

DISTRIBUTED_NAMES = frozenset(table.name for table in DISTRIBUTED)

_PARAMETER = re.compile(r"\$\d+(::[A-Z]+(\(\d+\))?(\[\])?)?")
_REPEATED_ROW = re.compile(r"(\((?:[\w:]+\(\$1\)|\$1|, )+\))(?:, \1)+")
_REPEATED_PARAMETER = re.compile(r"\$1(?:, \$1)+")


def plain(statement: str) -> str:
    """Normalizes a statement: removes the numbers of parameters, and reduces lists of parameters to one."""
    text = _PARAMETER.sub("$1", statement)
    text = _REPEATED_ROW.sub(r"\1", text)
    return text if text.lstrip().upper().startswith("INSERT") else _REPEATED_PARAMETER.sub("$1", text)


@lru_cache(4096)
def broken_rules(statement: str) -> tuple[str, ...]:
    """Returns descriptions of the rules that a statement breaks; none if it uses no distributed table."""
    if not any(name in statement for name in DISTRIBUTED_NAMES):
        return ()
    if statement.split(None, 1)[0].upper() not in {"SELECT", "INSERT", "UPDATE", "DELETE", "WITH"}:
        return ()
    return tuple(_broken_rules(sqlglot.parse_one(statement, read="postgres")))


def _broken_rules(tree: sql.Expr) -> Iterator[str]:
    if not any(table.name in DISTRIBUTED_NAMES for table in tree.find_all(sql.Table)):
        return
    if tree.find(sql.Unnest) or any(each.name.lower() == "unnest" for each in tree.find_all(sql.Anonymous)):
        yield "unnest with a distributed table"
    match tree:
        case sql.Insert():
            yield from _broken_by_insert(tree)
        case sql.Update() | sql.Delete():
            if tree.this.name in DISTRIBUTED_NAMES and not _names_accounts(
                tree.args.get("where"), tree.this.alias_or_name
            ):
                yield f"{tree.key.upper()} without {DISTRIBUTION_COLUMN} in its WHERE"
    for select in tree.find_all(sql.Select):
        locks = select.args.pop("locks", None) or ()
        # sqlglot would treat the tables that a lock names as additional sources.
        select.meta["locked"] = [{each.name for each in lock.expressions or ()} for lock in locks]
    scopes = traverse_scope(tree)
    for scope in scopes:
        yield from _broken_by_join(scope)
        yield from _broken_by_lock(scope)
    if isinstance(tree, sql.Query):
        yield from _broken_by_routing(scopes)


def _broken_by_insert(tree: sql.Insert) -> Iterator[str]:
    if not isinstance(tree.this, sql.Schema):
        yield "INSERT without its columns"
    elif tree.this.this.name in DISTRIBUTED_NAMES and DISTRIBUTION_COLUMN not in {
        each.name for each in tree.this.expressions
    }:
        yield f"INSERT without {DISTRIBUTION_COLUMN}"
    if isinstance(tree.expression, sql.Select | sql.SetOperation):
        yield "INSERT ... SELECT"


def _broken_by_join(scope: Scope) -> Iterator[str]:
    """Distributed tables must be joined by account."""
    sources = [name for name, source in scope.selected_sources.items() if _is_big(source[1])]
    joined = {
        frozenset((pair.left.table, pair.right.table))
        for pair in _equalities(scope.expression)
        if isinstance(pair.left, sql.Column)
        and isinstance(pair.right, sql.Column)
        and pair.left.name == pair.right.name == DISTRIBUTION_COLUMN
    }
    # An indirect connection counts too.
    connected = set(sources[:1])
    for _ in sources:
        connected |= {name for name in sources for other in connected if frozenset((name, other)) in joined}
    for name in sources:
        if name not in connected:
            yield f"{name} is not joined by {DISTRIBUTION_COLUMN}"


def _broken_by_lock(scope: Scope) -> Iterator[str]:
    for named in scope.expression.meta.get("locked", ()):
        for name, (_, source) in scope.selected_sources.items():
            if _is_big(source) and (not named or name in named) and not _names_one_account(scope.expression, name):
                yield "FOR UPDATE over more than one account"


def _broken_by_routing(scopes: Sequence[Scope]) -> Iterator[str]:
    """If a statement names an account, each distributed table must name it.

    Otherwise Citus reads all shards of the table. A join with a table that names the account is enough, but a
    correlated subquery is not.
    """
    routed: dict[int, set[str]] = {}
    for scope in scopes:
        routed[id(scope)] = _routed(scope)
        # An equation with a routed table routes the other table too.
        for _ in scope.selected_sources:
            routed[id(scope)] |= {
                one.table
                for pair in _equalities(scope.expression)
                for one, other in ((pair.left, pair.right), (pair.right, pair.left))
                if _is_account_column(one) and _is_account_column(other) and other.table in routed[id(scope)]
            }
    if not any(routed.values()):
        return
    for scope in scopes:
        for name, (_, source) in scope.selected_sources.items():
            if isinstance(source, sql.Table) and source.name in DISTRIBUTED_NAMES and name not in routed[id(scope)]:
                yield f"{name} doesn't name the account of the statement"


def _routed(scope: Scope) -> set[str]:
    """Returns the distributed tables of a SELECT whose account its own conditions name."""
    names = {name for name, (_, source) in scope.selected_sources.items() if isinstance(source, sql.Table)}
    where = scope.expression.args.get("where")
    return {
        name
        for name in names
        if _is_big(scope.selected_sources[name][1])
        and (_names_one_account(scope.expression, name) or _names_accounts(where, name))
    }


def _is_account_column(expression: sql.Expr) -> TypeGuard[sql.Column]:
    return isinstance(expression, sql.Column) and expression.name == DISTRIBUTION_COLUMN


def _is_big(source: sql.Expr | Scope) -> bool:
    if isinstance(source, Scope):
        return any(table.name in DISTRIBUTED_NAMES for table in source.expression.find_all(sql.Table))
    return isinstance(source, sql.Table) and source.name in DISTRIBUTED_NAMES


def _conjuncts(condition: sql.Expr | None) -> Iterator[sql.Expr]:
    if condition is None:
        return
    if isinstance(condition, sql.Where | sql.Paren):
        yield from _conjuncts(condition.this)
    elif isinstance(condition, sql.And):
        yield from _conjuncts(condition.left)
        yield from _conjuncts(condition.right)
    else:
        yield condition


def _equalities(select: sql.Expr) -> Iterator[sql.EQ]:
    """Yields the equations that hold for every row of a SELECT."""
    conditions = [select.args.get("where"), *(join.args.get("on") for join in select.args.get("joins") or ())]
    for condition in conditions:
        yield from (each for each in _conjuncts(condition) if isinstance(each, sql.EQ))


def _is_account(expression: sql.Expr, table: str) -> bool:
    return (
        isinstance(expression, sql.Column)
        and expression.name == DISTRIBUTION_COLUMN
        and expression.table in {"", table}
    )


def _names_one_account(select: sql.Expr, table: str) -> bool:
    return any(_is_of_one_account(each, table) for each in _equalities(select))


def _is_of_one_account(equality: sql.EQ, table: str) -> bool:
    left, right = equality.left, equality.right
    return (_is_account(left, table) and not right.find(sql.Column, sql.Query)) or (
        _is_account(right, table) and not left.find(sql.Column, sql.Query)
    )


def _names_accounts(where: sql.Expr | None, table: str) -> bool:
    """Whether a WHERE clause names its accounts: one, or a list."""
    for each in _conjuncts(where):
        if isinstance(each, sql.EQ) and _is_of_one_account(each, table):
            return True
        if isinstance(each, sql.In) and not each.args.get("query"):
            columns = each.this.expressions if isinstance(each.this, sql.Tuple) else [each.this]
            if any(_is_account(column, table) for column in columns):
                return True
    return False
