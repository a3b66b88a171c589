"""Query plans: each list of the product is a scan of an index in the order of the list."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from daybook.v1.transaction_pb2 import Transaction
from sqlalchemy import Column, Connection, Select, event, insert, select, text
from sqlalchemy.dialects import sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from server.facades import dreadnode, spacebring, teable
from server.ledger.instants import HOUR, parse
from server.ledger.paging import Order, OrderField, TransactionFilter, TransactionKey, TransactionList
from server.seed.load import Parameters, load
from server.store.database import Database
from server.store.list_statements import (
    ROWS_READ_MAX,
    FilteredScan,
    IndexScan,
    MergedScans,
    SequenceRangeScan,
    parameters_of,
    strategy_of,
)
from server.store.migrate import migrate
from server.store.open_lots import EXPIRED, FIRST_TO_SPEND, NEXT_EXPIRE_TIME
from server.store.states import current_states_query, load_states
from server.store.tables import LABELS, account_states, accounts, refunds, requests, tenants, transactions
from server.store.transactions import refunds_statement, slice_statement, windows_statement
from tests.support.databases import PostgreSQL, ReusedDatabase, writing

CHARGE = Transaction.CHARGE
SUCCEEDED = (Transaction.SUCCEEDED,)
TIME_DESC, TIME_ASC = Order(), Order(descending=False)
AMOUNT_DESC, AMOUNT_ASC = Order(OrderField.AMOUNT), Order(OrderField.AMOUNT, descending=False)
AFTER = TransactionKey(1_700_000_000_000_000, 7, 42)

TEABLE = tuple(teable.TYPES)
DREADNODE = tuple(dreadnode.TYPES)
SPACEBRING = tuple(spacebring.TYPES)

ACCOUNT, TENANT = 7, None


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    """A migrated database. SQLite plans without statistics, as the product never runs ANALYZE."""
    database = Database(f"sqlite+aiosqlite:///{tmp_path}/daybook.db")
    await migrate(database)
    yield database
    await database.close()


@dataclass(frozen=True, slots=True)
class Step:
    """A row of EXPLAIN QUERY PLAN."""

    number: int
    parent: int
    detail: str

    @property
    def bounds(self) -> str:
        """The conditions of a search in its index."""
        return self.detail[self.detail.index("(") + 1 : self.detail.rindex(")")]


Shape = tuple[int | None, TransactionFilter, Order]
Statement: TypeAlias = "tuple[Select[Any], dict[str, object]]"


def list_of(shape: Shape, after: TransactionKey | None, tenant_number: int = 1) -> TransactionList:
    """A list with a page of 50 rows."""
    account_number, criteria, order = shape
    return TransactionList(tenant_number, account_number, criteria, order, after, 50)


def page_statement(query: TransactionList) -> Statement:
    """The statement of a page, and its parameters."""
    return strategy_of(query).page(), {**parameters_of(query), "rows_read": ROWS_READ_MAX}


async def plan_of(database: Database, shape: Shape, after: TransactionKey | None) -> list[Step]:
    """SQLite's query plan for a list."""
    return await explain(database, *page_statement(list_of(shape, after)))


async def explain(database: Database, statement: Select[Any], parameters: dict[str, object]) -> list[Step]:
    """SQLite's query plan for a statement."""
    compiled = statement.compile(dialect=sqlite.dialect(), compile_kwargs={"render_postcompile": True})
    values = compiled.construct_params(parameters)

    def read_plan(connection: Connection) -> list[Step]:
        rows = connection.exec_driver_sql(
            f"EXPLAIN QUERY PLAN {compiled}", tuple(values[name] for name in compiled.positiontup or ())
        )
        return [Step(row.id, row.parent, row.detail) for row in rows]

    async with database.primary.snapshot() as connection:
        return await connection.run_sync(read_plan)


SCANS: list[tuple[str, Shape, str, str]] = [
    # Name, list, index, and the conditions that bound the scan.
    ("account", (ACCOUNT, TransactionFilter(), TIME_DESC), "PRIMARY KEY", "account_number=?"),
    ("account, oldest first", (ACCOUNT, TransactionFilter(), TIME_ASC), "PRIMARY KEY", "account_number=?"),
    (
        "account, range",
        (ACCOUNT, TransactionFilter(create_time_from=1, create_time_before=2), TIME_DESC),
        "transactions_by_time",
        "account_number=? AND create_time>? AND create_time<?",
    ),
    (
        "account, month",
        (ACCOUNT, TransactionFilter(month=202410), TIME_DESC),
        "transactions_by_time",
        "account_number=? AND create_time>? AND create_time<?",
    ),
    (
        "account, largest first",
        (ACCOUNT, TransactionFilter(), AMOUNT_DESC),
        "transactions_by_amount",
        "account_number=?",
    ),
    (
        "account, smallest first",
        (ACCOUNT, TransactionFilter(), AMOUNT_ASC),
        "transactions_by_amount",
        "account_number=?",
    ),
    ("tenant", (TENANT, TransactionFilter(), TIME_DESC), "transactions_of_tenant_by_time", "tenant_number=?"),
    (
        "tenant, oldest first",
        (TENANT, TransactionFilter(), TIME_ASC),
        "transactions_of_tenant_by_time",
        "tenant_number=?",
    ),
    (
        "tenant, range",
        (TENANT, TransactionFilter(create_time_from=1, create_time_before=2), TIME_DESC),
        "transactions_of_tenant_by_time",
        "tenant_number=? AND create_time>? AND create_time<?",
    ),
]

NUMBERED: list[tuple[str, Shape, str, str]] = [
    # Filtered lists of an account by sequence, along the primary key.
    (
        "account, one kind",
        (ACCOUNT, TransactionFilter(kinds=(CHARGE,)), TIME_DESC),
        "PRIMARY KEY",
        "account_number=?",
    ),
    (
        "account, state",
        (ACCOUNT, TransactionFilter(states=(Transaction.SUCCEEDED,)), TIME_DESC),
        "PRIMARY KEY",
        "account_number=?",
    ),
    (
        "account, location",
        (ACCOUNT, TransactionFilter(location="l"), TIME_DESC),
        "PRIMARY KEY",
        "account_number=?",
    ),
    (
        "account, category and location",
        (ACCOUNT, TransactionFilter(categories=("x",), location="l"), TIME_DESC),
        "PRIMARY KEY",
        "account_number=?",
    ),
    (
        "account, many categories",
        (ACCOUNT, TransactionFilter(categories=("x", "y", "z", "none")), TIME_DESC),
        "PRIMARY KEY",
        "account_number=?",
    ),
]

FILTERED: list[tuple[str, Shape, str, str]] = [
    # Lists whose index serves only a part of the filter.
    (
        "account, category by amount",
        (ACCOUNT, TransactionFilter(categories=("x",)), AMOUNT_DESC),
        "transactions_by_amount",
        "account_number=?",
    ),
    (
        "account, range by amount",
        (ACCOUNT, TransactionFilter(create_time_from=1), AMOUNT_ASC),
        "transactions_by_amount",
        "account_number=?",
    ),
    (
        "account, month by amount",
        (ACCOUNT, TransactionFilter(month=202410), AMOUNT_ASC),
        "transactions_by_amount",
        "account_number=?",
    ),
    (
        "account, range and kind",
        (ACCOUNT, TransactionFilter(kinds=(CHARGE,), create_time_from=1, create_time_before=2), TIME_DESC),
        "transactions_by_time",
        "account_number=? AND create_time>? AND create_time<?",
    ),
    (
        "tenant, two labels",
        (TENANT, TransactionFilter(location="l", company="c"), TIME_DESC),
        "transactions_of_location_by_time",
        "tenant_number=? AND location=?",
    ),
    (
        "tenant, kind",
        (TENANT, TransactionFilter(kinds=(CHARGE,)), TIME_DESC),
        "transactions_of_tenant_by_time",
        "tenant_number=?",
    ),
    (
        "tenant, state",
        (TENANT, TransactionFilter(states=(Transaction.FAILED, Transaction.CANCELED)), TIME_ASC),
        "transactions_of_tenant_by_time",
        "tenant_number=?",
    ),
    (
        "tenant, kind and category",
        (TENANT, TransactionFilter(kinds=(CHARGE,), categories=("x",)), TIME_DESC),
        "transactions_of_tenant_by_time",
        "tenant_number=?",
    ),
    (
        "spacebring",
        (TENANT, TransactionFilter(kind_categories=SPACEBRING), TIME_DESC),
        "transactions_of_tenant_by_time",
        "tenant_number=?",
    ),
    *(
        (
            f"spacebring, {label}{', range' if bounds else ''}",
            (TENANT, TransactionFilter(kind_categories=SPACEBRING, **{label: "x"}, **bounds), TIME_DESC),  # type: ignore[arg-type]
            f"transactions_of_{label}_by_time",
            f"tenant_number=? AND {label}=?" + (" AND create_time>? AND create_time<?" if bounds else ""),
        )
        for label in ("location", "membership", "company")
        for bounds in ({}, {"create_time_from": 1, "create_time_before": 2})
    ),
]

MERGES: list[tuple[str, Shape, str, str]] = [
    (
        "account, one kind and category",
        (ACCOUNT, TransactionFilter(kinds=(CHARGE,), categories=("x",)), TIME_DESC),
        "transactions_by_category_and_time",
        "account_number=? AND kind=? AND category=? AND state=?",
    ),
    (
        "account, one category",
        (ACCOUNT, TransactionFilter(categories=("x",)), TIME_DESC),
        "transactions_by_category_and_time",
        "account_number=? AND kind=? AND category=? AND state=?",
    ),
    (
        "account, one category and two states",
        (
            ACCOUNT,
            TransactionFilter(categories=("x",), states=(Transaction.FAILED, Transaction.CANCELED)),
            TIME_DESC,
        ),
        "transactions_by_category_and_time",
        "account_number=? AND kind=? AND category=? AND state=?",
    ),
    (
        "dreadnode",
        (ACCOUNT, TransactionFilter(kind_categories=DREADNODE, states=SUCCEEDED), TIME_DESC),
        "transactions_by_category_and_time",
        "account_number=? AND kind=? AND category=? AND state=?",
    ),
    (
        "teable, newest first",
        (ACCOUNT, TransactionFilter(kind_categories=TEABLE, states=SUCCEEDED, month=202410), TIME_DESC),
        "transactions_by_category_and_time",
        "account_number=? AND kind=? AND category=? AND state=? AND create_time>? AND create_time<?",
    ),
    (
        "teable, oldest first",
        (ACCOUNT, TransactionFilter(kind_categories=TEABLE[:1], states=SUCCEEDED, month=202410), TIME_ASC),
        "transactions_by_category_and_time",
        "account_number=? AND kind=? AND category=? AND state=? AND create_time>? AND create_time<?",
    ),
    (
        "teable, most consumed first",
        (ACCOUNT, TransactionFilter(kind_categories=TEABLE, states=SUCCEEDED, month=202410), AMOUNT_ASC),
        "transactions_by_category_and_amount",
        "account_number=? AND month=? AND kind=? AND category=? AND state=?",
    ),
    (
        "teable, least consumed first",
        (ACCOUNT, TransactionFilter(kind_categories=TEABLE, states=SUCCEEDED, month=202410), AMOUNT_DESC),
        "transactions_by_category_and_amount",
        "account_number=? AND month=? AND kind=? AND category=? AND state=?",
    ),
]


@pytest.mark.parametrize("after", [None, AFTER], ids=["first page", "next page"])
@pytest.mark.parametrize(("name", "shape", "index", "bounds"), SCANS, ids=[row[0] for row in SCANS])
async def test_list_without_residual_filter_is_one_scan(
    database: Database, after: TransactionKey | None, name: str, shape: Shape, index: str, bounds: str
) -> None:
    """A list is one search in its index, which has the order of the list, so nothing is sorted."""
    del name
    plan = await plan_of(database, shape, after)
    # The values of an IN are a list subquery of constants.
    scans = [step for step in plan if step.parent == 0 and "SUBQUERY" not in step.detail]
    access = index if index == "PRIMARY KEY" else f"INDEX {index}"
    assert [step.detail.partition(" (")[0] for step in scans] == [f"SEARCH transactions USING {access}"], plan
    others = [step.detail for step in plan if step not in scans]
    assert all(detail.startswith("LIST SUBQUERY") or "CONSTANT ROW" in detail for detail in others), plan
    if after is None:
        assert scans[0].bounds == bounds, plan
    else:
        assert continues_after_the_key(scans[0], shape), plan


@pytest.mark.parametrize("after", [None, AFTER], ids=["first page", "next page"])
@pytest.mark.parametrize(("name", "shape", "index", "bounds"), MERGES, ids=[row[0] for row in MERGES])
async def test_list_of_categories_merges_scans(
    database: Database, after: TransactionKey | None, name: str, shape: Shape, index: str, bounds: str
) -> None:
    """A list of categories is one search for each kind, category and state, in an index with the list's order.

    Only the merged page is sorted, and only its bodies are read, by primary key.
    """
    del name
    criteria = shape[1]
    plan = await plan_of(database, shape, after)
    kinds = len(criteria.kinds) or len(Transaction.Kind.values()) - 1
    pairs = len(criteria.kind_categories) or kinds * len(criteria.categories)
    scans = [step for step in plan if f" INDEX {index} (" in step.detail]
    states = len(criteria.states) or len(Transaction.State.values()) - 1
    assert len(scans) == pairs * states, plan
    for scan in scans:
        assert scan.detail.startswith(f"SEARCH transactions USING COVERING INDEX {index} ("), scan
        assert continues_after_the_key(scan, shape) if after else scan.bounds == bounds, scan
        siblings = [step.detail for step in plan if step.parent == scan.parent and step != scan]
        assert not [detail for detail in siblings if "TEMP B-TREE" in detail], f"a scan is sorted: {plan}"
    others = [step.detail for step in plan if "transactions" in step.detail and step not in scans]
    assert others == ["SEARCH transactions USING PRIMARY KEY (account_number=? AND sequence=?)"], plan


def continues_after_the_key(step: Step, shape: Shape) -> bool:
    """Whether a search begins after the last row of the previous page."""
    of_account, order = shape[0] is not None, shape[2]
    if "PRIMARY KEY" in step.detail:
        return f"sequence{'<' if order.descending else '>'}?" in step.bounds
    columns = f"{order.field.value},{'' if of_account else 'account_number,'}sequence"
    placeholders = "?,?" if of_account else "?,?,?"
    return f"({columns}){'<' if order.descending else '>'}({placeholders})" in step.bounds


@pytest.mark.parametrize("after", [None, AFTER], ids=["first page", "next page"])
@pytest.mark.parametrize(("name", "shape", "index", "bounds"), NUMBERED, ids=[row[0] for row in NUMBERED])
async def test_filtered_list_by_sequence_is_one_bounded_scan(
    database: Database, after: TransactionKey | None, name: str, shape: Shape, index: str, bounds: str
) -> None:
    """A filtered list by sequence is one search with two bounds, and its boundary is a lookup of one row."""
    assert (index, bounds) == ("PRIMARY KEY", "account_number=?"), name
    plan = await plan_of(database, shape, after)
    (scan,) = [step for step in plan if "SEARCH transactions" in step.detail]
    limits = "sequence>? AND sequence<?" if after else "sequence>?"
    assert scan.detail == f"SEARCH transactions USING PRIMARY KEY (account_number=? AND {limits})", plan
    assert not [step for step in plan if "TEMP B-TREE" in step.detail], plan
    query = list_of(shape, after)
    strategy = strategy_of(query)
    assert isinstance(strategy, SequenceRangeScan)
    parameters = {**parameters_of(query), "rows_read": ROWS_READ_MAX}
    end, *others = await explain(database, strategy.boundary(), parameters)
    assert end.detail == "SEARCH transactions USING PRIMARY KEY (account_number=? AND sequence=?)"
    assert not [step for step in others if "SEARCH transactions" in step.detail], others


@pytest.mark.parametrize("after", [None, AFTER], ids=["first page", "next page"])
@pytest.mark.parametrize(("name", "shape", "index", "bounds"), FILTERED, ids=[row[0] for row in FILTERED])
async def test_filtered_list_is_a_filter_around_a_bounded_scan(
    database: Database, after: TransactionKey | None, name: str, shape: Shape, index: str, bounds: str
) -> None:
    """A filter that no index serves is applied to the rows of a bounded scan, until the page is full.

    The scan is a co-routine: nothing is stored or sorted before the filter. Only the page is sorted, and only its
    bodies are read, by primary key. A scan of a tenant's index reads that index only.
    """
    plan = await plan_of(database, shape, after)
    (scan,) = [step for step in plan if step.detail.startswith("SEARCH transactions USING") and step.parent != 0]
    access = index if index == "PRIMARY KEY" else f"INDEX {index}"
    assert scan.detail.partition(" (")[0].replace("COVERING ", "") == f"SEARCH transactions USING {access}", plan
    if name.startswith(("tenant", "spacebring")) and name != "tenant, two labels":
        assert "COVERING" in scan.detail, plan
    assert continues_after_the_key(scan, shape) if after else scan.bounds == bounds, scan
    routine, page = [step for step in plan if step.detail.startswith(("CO-ROUTINE", "MATERIALIZE"))][::-1]
    assert scan.parent == routine.number, plan
    assert (routine.detail.split()[0], routine.parent, page.detail.split()[0]) == (
        "CO-ROUTINE",
        page.number,
        "MATERIALIZE",
    )
    (rows,) = [step for step in plan if step.parent == 0 and step.detail.startswith("SEARCH")]
    assert rows.detail == "SEARCH transactions USING PRIMARY KEY (account_number=? AND sequence=?)", plan
    sorts = [step for step in plan if "TEMP B-TREE" in step.detail]
    assert [step.parent for step in sorts] == [0], f"more than the page is sorted: {plan}"


@pytest.mark.parametrize("after", [None, AFTER], ids=["first page", "next page"])
@pytest.mark.parametrize(("name", "shape", "index", "bounds"), FILTERED, ids=[row[0] for row in FILTERED])
async def test_boundary_is_read_from_the_index(
    database: Database, after: TransactionKey | None, name: str, shape: Shape, index: str, bounds: str
) -> None:
    """The boundary of a filtered scan is read from its index alone."""
    query = list_of(shape, after)
    strategy = strategy_of(query)
    assert isinstance(strategy, FilteredScan), name
    parameters = {**parameters_of(query), "rows_read": ROWS_READ_MAX}
    (step,) = await explain(database, strategy.boundary(), parameters)
    access = "PRIMARY KEY" if index == "PRIMARY KEY" else f"COVERING INDEX {index}"
    assert step.detail.partition(" (")[0] == f"SEARCH transactions USING {access}"
    assert continues_after_the_key(step, shape) if after else step.bounds == bounds, step


@pytest.mark.parametrize(
    ("shape", "strategy"),
    [
        *((row[1], IndexScan) for row in SCANS),
        *((row[1], MergedScans) for row in MERGES),
        *((row[1], SequenceRangeScan) for row in NUMBERED),
        *((row[1], FilteredScan) for row in FILTERED),
    ],
    ids=[row[0] for row in (*SCANS, *MERGES, *NUMBERED, *FILTERED)],
)
def test_list_has_the_expected_strategy(shape: Shape, strategy: type) -> None:
    """Only a list whose filter no index serves gets a strategy with a bounded number of rows."""
    assert type(strategy_of(list_of(shape, AFTER))) is strategy


Plans: TypeAlias = "dict[tuple[str, bool], list[str]]"
"""The lines of EXPLAIN, by the name of a list and whether the page is a further one."""
SEEDED_ROWS = 20_000


@pytest.fixture(scope="module")
def plans(postgresql: PostgreSQL) -> Iterator[Plans]:
    """PostgreSQL's query plans for all lists, with the statistics of seeded data."""
    name = f"plans_{uuid.uuid4().hex}"
    postgresql.execute(f"CREATE DATABASE {name}")
    yield asyncio.run(read_plans(postgresql.url(name)))
    postgresql.execute(f"DROP DATABASE {name} WITH (FORCE)")


async def read_plans(database_url: str) -> Plans:
    """Seeds a database and explains every list, with values of a stored row as parameters."""
    await load(database_url, Parameters("seed", SEEDED_ROWS, 1, parse("2024-10-31T00:00:00Z"), 1), lambda *_: None)
    database = Database(database_url)
    try:
        async with database.primary.snapshot() as connection:
            columns = transactions.c
            row = (
                await connection.execute(
                    select(transactions)
                    .where(columns.location.is_not(None), columns.sequence > SEEDED_ROWS // 20)
                    .order_by(columns.account_number, columns.sequence)
                    .limit(1)
                )
            ).one()
            found: Plans = {}
            for name, shape, *_ in (*SCANS, *NUMBERED, *FILTERED, *MERGES):
                account_number, criteria, order = shape
                number = None if account_number is None else row.account_number
                real = (number, with_values_of(row, criteria), order)
                after = TransactionKey(getattr(row, order.field.value), row.account_number, row.sequence)
                for key in (None, after):
                    statement = page_statement(list_of(real, key, row.tenant_number))
                    found[name, key is not None] = await explain_prepared(connection, *statement)
            return found
    finally:
        await database.close()


def with_values_of(row: Any, criteria: TransactionFilter) -> TransactionFilter:
    """The filter with the values of a stored row."""
    given = {label: getattr(row, label) for label in LABELS if getattr(criteria, label) is not None}
    if criteria.categories:
        given["categories"] = (row.category, *criteria.categories[1:])
    if criteria.month is not None:
        given["month"] = row.month
    if criteria.create_time_from is not None:
        given |= {"create_time_from": row.create_time - 9 * HOUR, "create_time_before": row.create_time + 9 * HOUR}
    return replace(criteria, **given)


async def explain_prepared(
    connection: AsyncConnection, statement: Select[Any], parameters: dict[str, object]
) -> list[str]:
    """PostgreSQL's query plan for a prepared statement with these parameters."""
    compiled = statement.compile(dialect=connection.dialect, compile_kwargs={"render_postcompile": True})
    values = compiled.construct_params(parameters)
    raw = (await connection.get_raw_connection()).driver_connection
    assert raw is not None
    await raw.execute(f"PREPARE list AS {compiled}")
    arguments = ", ".join(f"'{values[name]}'" for name in compiled.positiontup or ())
    rows = await raw.fetch(f"EXPLAIN (COSTS OFF) EXECUTE list({arguments})")
    await raw.execute("DEALLOCATE list")
    return [str(row[0]).strip() for row in rows]


@pytest.mark.parametrize("is_further", [False, True], ids=["first page", "next page"])
@pytest.mark.parametrize(
    ("name", "index"),
    # Without lists for which another index and a sort are cheaper, because the seeded data has few rows.
    [
        (row[0], row[2])
        for row in (*SCANS, *NUMBERED, *FILTERED, *MERGES)
        if row[0] not in {"account, location", "account, category and location", "account, many categories"}
        and not row[0].endswith("by amount")
        and not row[0].startswith(("spacebring, location", "spacebring, membership", "spacebring, company"))
    ],
)
def test_postgresql_scans_the_same_indexes(plans: Plans, name: str, index: str, is_further: bool) -> None:
    """PostgreSQL scans the same indexes in their order, scans no whole table, and sorts at most the page."""
    plan = plans[name, is_further]
    scans = [line for line in plan if re.match(r"(->  )?(Parallel )?(Seq|Bitmap|Index)", line) and "Cond" not in line]
    # A sequential scan of the few accounts of the seeded data is fine.
    scans = [line for line in scans if "account_states" not in line]
    scanned = {re.findall(r"using (\w+)", line)[0] for line in scans if "Index" in line}
    assert scanned - {"transactions_pkey"} == {index} - {"PRIMARY KEY"}, plan
    assert not [line for line in scans if "Index" not in line or "Bitmap" in line], plan
    sorts = [number for number, line in enumerate(plan) if re.match(r"(->  )?(Incremental )?Sort$", line)]
    # The outermost step has the rows of the page only.
    assert sorts == [] or (sorts == [0] and name in {row[0] for row in FILTERED}), plan


async def test_slice_is_one_search(database: Database) -> None:
    """A page at any offset is one search by primary key: no row is skipped or sorted."""
    state, rows = await explain(database, slice_statement(), {"account_number": ACCOUNT, "offset": 42, "limit": 51})
    assert state.detail == "SEARCH account_states USING INDEX sqlite_autoindex_account_states_1 (account_number=?)"
    search = "SEARCH transactions USING PRIMARY KEY (account_number=? AND sequence>? AND sequence<?)"
    assert rows.detail.removesuffix(" LEFT-JOIN") == search


async def test_page_of_windows_is_one_search(database: Database) -> None:
    """A page of hour windows is one search by primary key."""
    (rows,) = await explain(database, windows_statement(), {"account_number": ACCOUNT, "last": 42, "limit": 51})
    search = "SEARCH usage_windows USING PRIMARY KEY (account_number=? AND number>? AND number<?)"
    assert rows.detail == search


async def test_refunds_are_looked_up_by_charge(database: Database) -> None:
    """The refund totals of a page are looked up by the primary key of each charge."""
    charges = {f"{name}_{number}": number for number in range(50) for name in ("account", "sequence")}
    plan = await explain(database, refunds_statement(50), dict(charges))
    (search,) = [step.detail for step in plan if "refunds" in step.detail]
    assert search == "SEARCH refunds USING PRIMARY KEY (account_number=? AND sequence=?)", plan


LOTS_OF_ACCOUNT = "SEARCH lots USING INDEX lots_open (account_number=?)"


@pytest.mark.parametrize(
    ("statement", "search"),
    [
        pytest.param(FIRST_TO_SPEND, LOTS_OF_ACCOUNT, id="first to spend"),
        pytest.param(
            EXPIRED, "SEARCH lots USING INDEX lots_expiring (account_number=? AND expire_time<?)", id="expired"
        ),
        pytest.param(
            NEXT_EXPIRE_TIME,
            "SEARCH lots USING INDEX lots_expiring (account_number=? AND expire_time>?)",
            id="next to expire",
        ),
    ],
)
async def test_open_lots_are_read_in_order(database: Database, statement: Select[Any], search: str) -> None:
    """Open lots are read from an index in the required order, without a sort."""
    parameters: dict[str, object] = {"account_number": 1, "limit": 64, "now": 1}
    assert [step.detail for step in await explain(database, statement, parameters)] == [search]


async def test_loading_a_state_reads_open_lots_only(database: Database) -> None:
    """Loading the state of an account searches only indexes of open lots."""
    executed: list[tuple[str, Any]] = []

    def load_state(connection: Connection) -> list[str]:
        connection.execute(insert(tenants).values(number=1, slug="t", uid="t", display_name="", create_time=0, demo=0))
        connection.execute(
            insert(accounts).values(
                number=1,
                tenant_number=1,
                id="acme",
                kind=1,
                display_name="",
                credit_limit=0,
                hour_anchor=0,
                profile=b"",
                create_time=0,
                update_time=0,
            )
        )
        connection.execute(
            insert(account_states).values(
                account_number=1,
                balance=0,
                debt=0,
                lot_count=0,
                sequence=0,
                last_hash=b"",
                last_create_time=0,
                window_number=0,
                import_time=0,
                open_lot_count=1,
            )
        )
        event.listen(connection, "before_cursor_execute", lambda *call: executed.append((call[2], call[3])))
        load_states(connection, [1])
        return [
            str(row[-1])
            for statement, parameters in executed[:]
            for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
        ]

    plan = await database.transact(load_state)
    assert [line for line in plan if " lots " in line] == [
        # The first three are for an account with many lots, or whose last posting was by an older version.
        LOTS_OF_ACCOUNT,
        "SEARCH lots USING INDEX lots_expiring (account_number=? AND expire_time>?)",
        "SEARCH lots USING INDEX lots_expiring (account_number=? AND expire_time>?)",
        LOTS_OF_ACCOUNT,
    ]


async def test_current_states_read_expired_lots_only(database: Database) -> None:
    """The credits of an account are computed from its state and its expired lots."""
    query = current_states_query(1).compiled(database.primary.dialect)
    values = query.values({"account_0": 1, "now": 1})
    async with database.primary.snapshot() as connection:
        rows = await connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query.text}", values)
        plan = [str(row[-1]) for row in rows if " lots " in str(row[-1])]
    assert plan[-1:] == ["SEARCH lots USING INDEX lots_expiring (account_number=? AND expire_time<?)"]
    # For an account whose last posting was by an older version.
    assert [line.partition(" INDEX ")[2].partition(" ")[0] for line in plan[:-1]] == ["lots_open", "lots_expiring"]


def test_postgresql_reads_open_lots_in_order(reused_database: ReusedDatabase) -> None:
    """PostgreSQL reads open lots from the indexes without a sort, even with a generic plan."""
    reused_database.empty()
    asyncio.run(check_plans_of_lots(reused_database.url))


async def check_plans_of_lots(database_url: str) -> None:
    """Fills the table lots and checks the plans of its statements."""
    database = Database(database_url)
    try:
        async with writing(database) as connection:
            await connection.execute(
                text(
                    "INSERT INTO lots SELECT account, number, number, nullif(number % 3, 0) * number, number % 5, 9,"
                    " CASE WHEN number % 7 = 0 THEN 0 ELSE 9 END"
                    " FROM generate_series(1, 5) account, generate_series(1, 4000) number"
                )
            )
            await connection.execute(text("ANALYZE lots"))
            await connection.execute(text("SET LOCAL plan_cache_mode = force_generic_plan"))
            for statement, index in (
                (FIRST_TO_SPEND, "lots_open"),
                (EXPIRED, "lots_expiring"),
                (NEXT_EXPIRE_TIME, "lots_expiring"),
            ):
                plan = await explain_prepared(connection, statement, {"account_number": 2, "limit": 64, "now": 9})
                (scan,) = [line for line in plan if "Scan" in line]
                assert index in scan, plan
                assert not [line for line in plan if "Sort" in line], plan
    finally:
        await database.close()


async def test_transaction_is_looked_up_by_uid(database: Database) -> None:
    """A transaction is looked up in the index by account and uid."""
    async with database.primary.snapshot() as connection:
        rows = await connection.exec_driver_sql(
            "EXPLAIN QUERY PLAN SELECT body FROM transactions WHERE account_number = 1 AND uid = x'00'"
        )
        plan = [str(row[-1]) for row in rows]
    assert len(plan) == 1
    assert plan[0].startswith("SEARCH transactions USING INDEX")
    assert plan[0].endswith("(account_number=? AND uid=?)")


@pytest.mark.parametrize("count", [1, 2, 512])
@pytest.mark.parametrize(
    ("column", "columns", "key", "index"),
    [
        (transactions.c.body, ("account_number", "sequence"), (1, 1), "PRIMARY KEY"),
        (transactions.c.body, ("account_number", "uid"), (1, b""), "INDEX sqlite_autoindex_transactions_2"),
        (refunds.c.amount, ("account_number", "sequence"), (1, 1), "PRIMARY KEY"),
        (requests.c.sequence, ("account_number", "request_id"), (1, ""), "INDEX sqlite_autoindex_requests_1"),
    ],
    ids=["bodies", "charges", "refunds", "requests"],
)
async def test_rows_are_looked_up_by_their_whole_key(
    database: Database, column: Column[Any], columns: tuple[str, ...], key: tuple[object, ...], index: str, count: int
) -> None:
    """Each of any number of rows is looked up by its whole key."""
    table = column.table
    statement = database.primary.with_keys(select(column), [table.c[name] for name in columns], [key] * count)
    plan = [step.detail for step in await explain(database, statement, {})]
    condition = " AND ".join(f"{name}=?" for name in columns)
    assert [detail for detail in plan if f" {table} " in f"{detail} "] == [
        f"SEARCH {table} USING {index} ({condition})"
    ]
