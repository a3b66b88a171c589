"""Lists of transactions, compared with an oracle in plain Python that filters and sorts the posted rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import count

import pytest
from daybook.v1.ledger_service_pb2 import ListTransactionsRequest
from daybook.v1.transaction_pb2 import Transaction
from google.protobuf.struct_pb2 import Struct, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.ledger.instants import SECOND, from_timestamp, write
from server.store import transactions as store
from server.store.engine import Rows
from server.store.list_statements import ROWS_READ_MAX
from server.store.query import Query
from tests.support.callers import Client, Server
from tests.support.clock import NOON, Clock
from tests.support.lists import (
    CHARGE,
    FILTERS,
    GRANT,
    LISTS,
    Matches,
    Row,
    everything,
    expected,
    insert_rows,
    make_row,
    post_steps,
    time_literal,
    two_tenants,
)
from tests.support.markers import only_sqlite


async def read_pages(
    client: Client, parent: str, page_sizes: Iterable[int], *, filter_text: str = "", order_by: str = ""
) -> list[list[Transaction]]:
    """All pages of a list, with these page sizes, of which the last repeats."""
    pages: list[list[Transaction]] = []
    request = ListTransactionsRequest(parent=parent, filter=filter_text, order_by=order_by)
    sizes = iter(page_sizes)
    while not pages or request.page_token:
        request.page_size = next(sizes, request.page_size)
        page = await client.ledger.ListTransactions(request, metadata=client.metadata)
        pages.append(list(page.transactions))
        request.page_token = page.next_page_token
        assert len(pages) < 2000, "the list has no end"
    return pages


def names_of(pages: Iterable[Sequence[Transaction]]) -> list[str]:
    """The names on all pages."""
    return [each.name for page in pages for each in page]


@pytest.mark.parametrize(("parent", "order_by"), LISTS)
async def test_every_filter_at_every_page_size(server: Server, clock: Clock, parent: str, order_by: str) -> None:
    """The pages of a list agree with the oracle for every filter and page size."""
    client, rows = await two_tenants(server, clock)
    truth = {row.transaction.name: row.transaction for row in rows}
    for filter_text, matches in FILTERS:
        names = expected(rows, parent, matches, order_by)
        length = len(names)
        for page_size in sorted({1, max(1, length - 1), max(1, length), length + 1}):
            pages = await read_pages(client, parent, [page_size], filter_text=filter_text, order_by=order_by)
            where = f"{filter_text!r} by {page_size}"
            assert names_of(pages) == names, where
            assert all(len(page) == page_size for page in pages[:-1]), f"{where}: a page is short"
            assert pages[-1] or not names, f"{where}: the last page is empty"
            assert all(each == truth[each.name] for page in pages for each in page), where


@pytest.mark.parametrize(("parent", "order_by"), LISTS)
async def test_every_filter_with_pages_that_end_early(
    server: Server, clock: Clock, monkeypatch: pytest.MonkeyPatch, parent: str, order_by: str
) -> None:
    """Pages that end early, because they have read ROWS_READ_MAX rows, together have every row once, in order."""
    monkeypatch.setattr(store, "ROWS_READ_MAX", 4)
    client, rows = await two_tenants(server, clock)
    for filter_text, matches in FILTERS:
        names = expected(rows, parent, matches, order_by)
        pages = await read_pages(client, parent, [3], filter_text=filter_text, order_by=order_by)
        assert names_of(pages) == names, filter_text


@pytest.mark.parametrize(
    ("parent", "order_by", "filter_text", "lengths"),
    [
        # Of 25 rows each fifth is a charge, each fourth failed, and all but the first are in L.
        ("accounts/a", "", "kind = CHARGE", [2, 2, 1]),
        ("accounts/a", "amount", "state = FAILED", [2, 3, 1]),
        ("accounts/a", "create_time", "labels.location = L", [9, 10, 5]),
        ("accounts/a", "", "category = test AND labels.location = nowhere", [0, 0, 0]),
        ("accounts/a", "amount desc", "category = test", [10, 10, 5]),
        ("accounts/a", "amount", f"create_time < {time_literal(0)}", [0, 0, 0]),
        ("accounts/-", "", "kind = CHARGE", [2, 2, 1]),
        ("accounts/-", "create_time", "category = nowhere", [0, 0, 0]),
        ("accounts/-", "", "labels.location = L AND labels.membership = M", [0, 0, 0]),
        # A list that an index serves fills its pages.
        ("accounts/a", "", "category = test", [25]),
        ("accounts/a", "", "category = test AND kind = CHARGE", [5]),
        ("accounts/a", "", "category = test AND state = FAILED", [6]),
        ("accounts/a", "create_time", "state = CANCELED AND category = test", [0]),
        ("accounts/a", "", "category = test OR category = b OR category = c", [25]),
        # Merging would take 4 categories times 7 kinds times 3 states of index scans.
        ("accounts/a", "", "category = test OR category = b OR category = c OR category = d", [10, 10, 5]),
        (
            "accounts/a",
            "",
            "(category = test OR category = b OR category = c OR category = d) AND state = SUCCEEDED",
            [19],
        ),
        ("accounts/a", "", f"create_time >= {time_literal(0)}", [25]),
        ("accounts/-", "", "labels.location = L", [24]),
    ],
)
@only_sqlite
async def test_page_reads_a_bounded_number_of_rows(
    server: Server, monkeypatch: pytest.MonkeyPatch, parent: str, order_by: str, filter_text: str, lengths: list[int]
) -> None:
    """A page with few matching rows ends early, may be empty, and has a token with which the list continues."""
    monkeypatch.setattr(store, "ROWS_READ_MAX", 10)
    tenant_number = await server.create_tenant("house")
    client = await server.client(tenant_number)
    number = (await client.create_account("a")).number
    rows = [
        make_row(
            "a",
            number,
            sequence,
            kind=GRANT if sequence % 5 else CHARGE,
            state=Transaction.SUCCEEDED if sequence % 4 else Transaction.FAILED,
            amount=sequence,
            at_seconds=sequence,
            labels={"location": "L"} if sequence > 1 else None,
        )
        for sequence in range(1, 26)
    ]
    await insert_rows(server, tenant_number, rows)
    pages = await read_pages(client, parent, [100], filter_text=filter_text, order_by=order_by)
    assert [len(page) for page in pages] == lengths
    assert ROWS_READ_MAX == 10_000


@pytest.mark.parametrize(
    ("page_size", "page_lengths"),
    [
        (0, [50] * 20 + [1]),
        (1000, [1000, 1]),
        (1001, [1000, 1]),
        (2_147_483_647, [1000, 1]),
        (999, [999, 2]),
    ],
)
@only_sqlite
async def test_page_lengths(server: Server, page_size: int, page_lengths: list[int]) -> None:
    """A page has 50 rows by default and at most 1,000, and all pages together have every row."""
    tenant_number = await server.create_tenant("house")
    client = await server.client(tenant_number)
    number = (await client.create_account("a")).number
    rows = [make_row("a", number, sequence, at_seconds=sequence // 7) for sequence in range(1, 1002)]
    await insert_rows(server, tenant_number, rows)
    for parent in ("accounts/a", "accounts/-"):
        pages = await read_pages(client, parent, [page_size])
        assert [len(page) for page in pages] == page_lengths
        assert names_of(pages) == expected(rows, parent, everything, "")


async def test_large_rows(server: Server) -> None:
    """Rows that together exceed the message size are all listed, on as many pages as needed."""
    tenant_number = await server.create_tenant("house")
    client = await server.client(tenant_number)
    number = (await client.create_account("a")).number
    metadata = Struct(fields={"x": Value(string_value="x" * 8000)})
    rows = [make_row("a", number, sequence, metadata=metadata) for sequence in range(1, 601)]
    await insert_rows(server, tenant_number, rows)
    pages = await read_pages(client, "accounts/a", [1000])
    assert names_of(pages) == expected(rows, "accounts/a", everything, "")


@pytest.mark.parametrize(("parent", "order_by"), LISTS)
async def test_rows_posted_between_pages(client: Client, clock: Clock, parent: str, order_by: str) -> None:
    """The rows that exist at the first page are listed once each, in order, whatever is posted meanwhile."""
    rows = await post_steps(client, clock)
    older = expected(rows, parent, everything, order_by)
    names: list[str] = []
    request = ListTransactionsRequest(parent=parent, page_size=2, order_by=order_by)
    for turn in count():
        page = await client.ledger.ListTransactions(request, metadata=client.metadata)
        names += [each.name for each in page.transactions]
        if not page.next_page_token or turn > 40:
            break
        request.page_token = page.next_page_token
        if turn < 6:
            clock.advance(turn % 2)
            for account_id in ("a", "b"):
                await client.post(account_id, CHARGE, "-2")
                await client.post(account_id, GRANT, ("0.000001", "5", "100")[turn % 3])
    assert len(names) == len(set(names)), "a row is repeated"
    assert [name for name in names if name in set(older)] == older


@pytest.mark.parametrize(("parent", "order_by"), LISTS)
@pytest.mark.parametrize("filter_text", ["kind = CHARGE", "kind = GRANT", "state = FAILED"])
async def test_rows_posted_while_a_page_is_read(
    server: Server, clock: Clock, monkeypatch: pytest.MonkeyPatch, parent: str, order_by: str, filter_text: str
) -> None:
    """A row inserted after a page and before its boundary is read makes no other row repeat or disappear."""
    monkeypatch.setattr(store, "ROWS_READ_MAX", 4)
    client = await server.client(await server.create_tenant("house"))
    rows = await post_steps(client, clock)
    kind = {"kind = CHARGE": CHARGE, "kind = GRANT": GRANT}.get(filter_text)
    older = expected(rows, parent, lambda each: each.kind == kind, order_by)
    reader, posted = server.book.database.lists, count()
    fetch = reader.fetch

    async def post_before(query: Query, parameters: Mapping[str, object]) -> Rows:
        # The statement of a boundary reads keys only.
        text = query.compiled(server.book.database.primary.dialect).text
        if "transactions" in text and "body" not in text and next(posted) < 6:
            for amount in ("-2", "100"):
                await client.post("a", CHARGE if amount == "-2" else GRANT, amount, category="ai_chat")
        return await fetch(query, parameters)

    monkeypatch.setattr(reader, "fetch", post_before)
    names = names_of(await read_pages(client, parent, [3], filter_text=filter_text, order_by=order_by))
    assert len(names) == len(set(names)), "a row is repeated"
    assert [name for name in names if name in set(older)] == older
    assert next(posted) > 0, "nothing was posted in between"


@pytest.mark.parametrize(("parent", "order_by"), LISTS)
@only_sqlite
async def test_page_size_may_change(client: Client, clock: Clock, parent: str, order_by: str) -> None:
    """Each page may have another size."""
    rows = await post_steps(client, clock)
    filter_text = "kind = CHARGE OR kind = GRANT"
    names = expected(rows, parent, lambda each: each.kind in (CHARGE, GRANT), order_by)
    for page_sizes in ([1, 3, 2, 1000], [2, 1, 1, 3], [4, 0], [3, 1_000_000]):
        pages = await read_pages(client, parent, page_sizes, filter_text=filter_text, order_by=order_by)
        assert names_of(pages) == names
        assert [len(page) for page in pages[:-1]] == page_sizes[: len(pages) - 1] or len(pages) > len(page_sizes)


async def test_empty_lists(client: Client) -> None:
    """An account without transactions, and a tenant without any, have one empty page."""
    assert await read_pages(client, "accounts/-", [10]) == [[]]
    await client.create_account("a")
    assert await read_pages(client, "accounts/a", [10]) == [[]]
    assert await read_pages(client, "accounts/-", [10]) == [[]]


LABELS = ("location", "membership", "company")
CATEGORIES = ("ai_chat", "purchase", "x")
# Values that contain the syntax of SQL and of filters.
VALUES = ("L", "l", 'say "hi"', "back\\slash", "percent%_", "'; --", "é\u0301 😀\n", "AND", "(x)")

row_values = st.fixed_dictionaries(
    {
        "account": st.sampled_from(["a", "b"]),
        "kind": st.sampled_from(Transaction.Kind.values()[1:]),
        "category": st.sampled_from(CATEGORIES),
        "state": st.sampled_from(Transaction.State.values()[1:]),
        "amount": st.sampled_from([-3, -2, 0, 2, 999_999_999_999]),
        "wait": st.sampled_from([0.0, 0.0, 0.000001, 1.0]),
        "labels": st.dictionaries(st.sampled_from(LABELS), st.sampled_from(VALUES)),
    }
)


def quoted(value: str) -> str:
    """A string literal of AIP-160."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


@st.composite
def filters(draw: st.DrawFn) -> tuple[str, Matches]:
    """A filter, and its predicate in Python."""
    factors: list[str] = []
    tests: list[Matches] = []

    def one_of(field: str, values: list[str], test: Matches) -> None:
        text = " OR ".join(f"{field} = {value}" for value in values)
        factors.append(f"({text})" if len(values) > 1 or draw(st.booleans()) else text)
        tests.append(test)

    if draw(st.booleans()):
        kinds = draw(st.lists(st.sampled_from(Transaction.Kind.keys()[1:]), min_size=1, max_size=3))
        one_of("kind", kinds, lambda each: Transaction.Kind.Name(each.kind) in kinds)
    if draw(st.booleans()):
        categories = draw(st.lists(st.sampled_from(CATEGORIES), min_size=1, max_size=3))
        one_of("category", categories, lambda each: each.category in categories)
    if draw(st.booleans()):
        states = draw(st.lists(st.sampled_from(Transaction.State.keys()[1:]), min_size=1, max_size=2))
        one_of("state", states, lambda each: Transaction.State.Name(each.state) in states)
    for label in draw(st.sets(st.sampled_from(LABELS), max_size=2)):
        value = draw(st.sampled_from(VALUES))
        # Defaults bind the values of this iteration.
        one_of(
            f"labels.{label}",
            [quoted(value)],
            lambda each, label=label, value=value: each.labels.get(label) == value,  # type: ignore[misc]
        )
    for operator in draw(st.sampled_from([[], [">="], [">"], ["<"], ["<="], [">=", "<"], [">", "<="]])):
        bound = NOON + round(draw(st.sampled_from([0.0, 0.000001, 1.0, 2.000001])) * SECOND)
        factors.append(f'create_time {operator} "{write(bound)}"')
        tests.append(
            {
                ">=": lambda each, bound=bound: from_timestamp(each.create_time) >= bound,
                ">": lambda each, bound=bound: from_timestamp(each.create_time) > bound,
                "<": lambda each, bound=bound: from_timestamp(each.create_time) < bound,
                "<=": lambda each, bound=bound: from_timestamp(each.create_time) <= bound,
            }[operator]
        )
    text = " AND ".join(draw(st.permutations(factors)))
    return text, lambda each: all(test(each) for test in tests)


tenants = count()


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    values=st.lists(row_values, max_size=14),
    filter_and_matches=filters(),
    parent_and_order=st.sampled_from(LISTS),
    page_sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
)
async def test_generated_lists(
    server: Server,
    values: list[dict[str, object]],
    filter_and_matches: tuple[str, Matches],
    parent_and_order: tuple[str, str],
    page_sizes: list[int],
) -> None:
    """The pages agree with the oracle for any rows, filter, order and page sizes."""
    tenant_number = await server.create_tenant(f"generated-{next(tenants)}")
    client = await server.client(tenant_number)
    numbers = {account_id: (await client.create_account(account_id)).number for account_id in ("b", "a")}
    sequences = dict.fromkeys(numbers, 0)
    seconds = 0.0
    rows: list[Row] = []
    for value in values:
        fields = dict(value)
        account_id = str(fields.pop("account"))
        seconds += float(str(fields.pop("wait")))
        sequences[account_id] += 1
        rows.append(
            make_row(account_id, numbers[account_id], sequences[account_id], at_seconds=seconds, **fields)  # type: ignore[arg-type]
        )
    await insert_rows(server, tenant_number, rows)
    (parent, order_by), (filter_text, matches) = parent_and_order, filter_and_matches
    pages = await read_pages(client, parent, page_sizes, filter_text=filter_text, order_by=order_by)
    assert names_of(pages) == expected(rows, parent, matches, order_by)
