"""All pages together have every row of the demo exactly once and in order, at any page size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import cast
from urllib.parse import quote, urlencode

import httpx
import pytest
from daybook.v1.transaction_pb2 import Transaction

from server.demo import dreadnode, nebulablock, spacebring, teable
from server.demo.story import Story
from tests.support import oracle
from tests.support.callers import NativeCaller
from tests.support.http_client import Json, read_json, write_json
from tests.support.processes import Daybook

Row = dict[str, Json]
MONTH = "2024-10"
NETWORK = {"spacebring-network-id": spacebring.NETWORK}
SIZE_MAX = 100


@pytest.fixture(scope="module")
def client(gateway: Daybook) -> Iterator[httpx.Client]:
    """An HTTP client that reuses its connection to the gateway."""
    with httpx.Client(base_url=gateway.origin) as client:
        yield client


def get(client: httpx.Client, key: str, target: str) -> Json:
    """The body of a successful answer."""
    answer = client.get(target, headers={"authorization": f"Bearer {key}.public", **NETWORK})
    assert answer.status_code == 200, f"{target}: {answer.text}"
    return read_json(answer.text)


def pages_of(read: Callable[[str], tuple[list[Row], str | None]], size: int) -> list[Row]:
    """Reads all pages; returns their rows. Fails if a page has another size than it should."""
    rows, token = read("")
    found = list(rows)
    while token is not None:
        assert len(rows) == size, "only the last page may be shorter"
        rows, token = read(token)
        assert rows, "no page but the first may be empty"
        found += rows
    assert len(rows) <= size
    return found


def sizes_for(count: int) -> list[int]:
    """Valid page sizes around 1, the number of rows and the maximum."""
    return sorted({size for size in (1, 2, count - 1, count, count + 1, SIZE_MAX) if 1 <= size <= SIZE_MAX})


def without_ids(rows: list[Row]) -> list[Row]:
    """The rows without their ids, which are random. Fails if two ids are equal."""
    assert len({cast("str", row["id"]) for row in rows}) == len(rows), "a row comes twice"
    return [{name: value for name, value in row.items() if name != "id"} for row in rows]


def in_any_order(rows: list[Row]) -> list[str]:
    """A value that is equal for the same rows in another order."""
    return sorted(write_json(row) for row in rows)


def all_of_teable(client: httpx.Client, space: str, size: int, **query: str) -> list[Row]:
    """All records of a Teable list."""

    def read(cursor: str) -> tuple[list[Row], str | None]:
        query_string = urlencode({"month": MONTH, **query, "take": size, **({"cursor": cursor} if cursor else {})})
        body = get(client, "demo-teable", f"/api/space/{space}/billing/credit-history?{query_string}")
        assert isinstance(body, dict)
        return cast("list[Row]", body["data"]), cast("str | None", body["nextCursor"])

    return pages_of(read, size)


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("source_type", [None, *oracle.SOURCE_TYPES])
def test_teable_lists_by_time(client: httpx.Client, source_type: str | None, order: str) -> None:
    """The list has every record of the month once, by time and then in order of posting."""
    expected = oracle.teable_records(MONTH, source_type)[:: 1 if order == "desc" else -1]
    query = {"sourceType": source_type} if source_type else {}
    for size in sizes_for(len(expected)):
        rows = all_of_teable(client, teable.SPACE, size, orderBy="createdTime", order=order, **query)
        assert without_ids(rows) == expected, f"at size {size}"


@pytest.mark.parametrize("source_type", [None, *oracle.SOURCE_TYPES])
def test_teable_lists_by_amount(client: httpx.Client, source_type: str | None) -> None:
    """The list has every record of the month once, by amount; the orders are exact reverses, also for equal amounts."""
    expected = oracle.teable_records(MONTH, source_type)
    query = {"sourceType": source_type} if source_type else {}
    for size in sizes_for(len(expected)):
        descending = all_of_teable(client, teable.SPACE, size, orderBy="amount", order="desc", **query)
        ascending = all_of_teable(client, teable.SPACE, size, orderBy="amount", order="asc", **query)
        assert in_any_order(without_ids(descending)) == in_any_order(expected), f"at size {size}"
        assert all(
            cast("Decimal", one["amount"]) >= cast("Decimal", other["amount"]) for one, other in pairwise(descending)
        )
        assert ascending == descending[::-1], f"at size {size}"


@pytest.mark.parametrize("month", ["2024-08", "2024-09", "2024-11", "2024-12"])
def test_teable_lists_one_month(client: httpx.Client, month: str) -> None:
    """The list of a month has the month's records only."""
    rows = all_of_teable(client, teable.SPACE, SIZE_MAX, month=month)
    assert without_ids(rows) == oracle.teable_records(month)


@pytest.mark.parametrize("order_by", ["createdTime", "amount"])
@pytest.mark.parametrize("order", ["asc", "desc"])
def test_teable_skips_no_record_during_postings(
    client: httpx.Client, native: NativeCaller, order_by: str, order: str
) -> None:
    """Every record that existed at the first page is listed once, despite postings between the pages."""
    space = native.create_account("demo-teable.public")
    native.post("demo-teable.public", space, Transaction.GRANT, "purchase", "1000")
    charge = [
        native.post("demo-teable.public", space, Transaction.CHARGE, "ai_chat", f"-{amount}")
        for amount in (3, 1, 2, 3, 1, 2)
    ]
    found: list[str] = []
    month = charge[0].create_time.ToDatetime(UTC).strftime("%Y-%m")
    cursor: str | None = ""
    while cursor is not None:
        query = {
            "month": month,
            "orderBy": order_by,
            "order": order,
            "take": 2,
            **({"cursor": cursor} if cursor else {}),
        }
        body = get(client, "demo-teable", f"/api/space/{space}/billing/credit-history?{urlencode(query)}")
        assert isinstance(body, dict)
        found += [cast("str", row["id"]) for row in cast("list[Row]", body["data"])]
        cursor = cast("str | None", body["nextCursor"])
        if len(found) <= len(charge):
            for amount in ("0.5", "1", "1.5", "2", "3", "4"):
                native.post("demo-teable.public", space, Transaction.CHARGE, "ai_chat", f"-{amount}")
    assert len(set(found)) == len(found)
    assert {each.uid for each in charge} <= set(found)


@pytest.mark.parametrize(
    "user",
    [(nebulablock.DOCUMENTED_USER, nebulablock.DOCUMENTED_KEY), (nebulablock.BUSY_USER, nebulablock.BUSY_KEY)],
    ids=["documented", "busy"],
)
def test_nebulablock_lists_every_hour(client: httpx.Client, user: tuple[str, str]) -> None:
    """Pages of any limit have every hour once, newest first; every page has the balance and the total."""
    account, key = user
    expected = oracle.nebulablock_hours(account)
    for size in sizes_for(len(expected)):
        found: list[Row] = []
        for offset in range(0, len(expected) + size, size):
            body = get(client, key, f"/users/credits/history?limit={size}&offset={offset}")
            assert isinstance(body, dict)
            data = body["data"]
            assert isinstance(data, dict)
            assert (data["credit_balance"], data["total_credit_histories"]) == (
                oracle.nebulablock_balance(account),
                Decimal(len(expected)),
            )
            found += cast("list[Row]", data["credit_history"])
        assert found == expected, f"at limit {size}"


def test_nebulablock_page_begins_at_its_offset(client: httpx.Client) -> None:
    """A page begins with the row at its offset."""
    expected = oracle.nebulablock_hours(nebulablock.BUSY_USER)
    for offset in range(len(expected) + 2):
        body = get(client, nebulablock.BUSY_KEY, f"/users/credits/history?limit=3&offset={offset}")
        assert isinstance(body, dict)
        assert isinstance(body["data"], dict)
        assert body["data"]["credit_history"] == expected[offset : offset + 3]


def project(rows: list[Row]) -> list[Row]:
    """The fields of Spacebring's transactions that the oracle has."""
    refs = ("locationRef", "membershipRef", "companyRef", "userRefOwner", "userRefCreator")
    names = ("amount", "createDate", "type", "description", *refs)
    projected = [{name: row[name] for name in names if name in row} for row in rows]
    for row, projection in zip(rows, projected, strict=True):
        for subject in ("booking", "order", "ticket"):
            if subject in row:
                projection[subject] = {"id": cast("Row", row[subject])["id"]}
    return projected


def all_of_spacebring(client: httpx.Client, size: int, query: str) -> list[Row]:
    """All transactions of a Spacebring list; `query` is sent unchanged."""

    def read(token: str) -> tuple[list[Row], str | None]:
        parts = [query, f"limit={size}", *([f"nextPageToken={token}"] if token else [])]
        body = get(client, spacebring.KEY, "/transactions/credits/v1?" + "&".join(filter(None, parts)))
        assert isinstance(body, dict)
        return cast("list[Row]", body["transactions"]), cast("str | None", body.get("nextPageToken"))

    rows = pages_of(read, size)
    without_ids(rows)
    return project(rows)


@pytest.mark.parametrize(
    ("query", "filters"),
    [
        ("", {}),
        (f"locationRef={spacebring.HARBOUR}", {"location": spacebring.HARBOUR}),
        (f"locationRef={spacebring.OLD_TOWN}", {"location": spacebring.OLD_TOWN}),
        (f"membershipRef={spacebring.MEMBERSHIP_HARBOUR}", {"membership": spacebring.MEMBERSHIP_HARBOUR}),
        (f"membershipRef={spacebring.MEMBERSHIP_OLD_TOWN}", {"membership": spacebring.MEMBERSHIP_OLD_TOWN}),
        (f"companyRef={spacebring.STUDIO}", {"company": spacebring.STUDIO}),
        (f"companyRef={spacebring.BUREAU}", {"company": spacebring.BUREAU}),
        (f"locationRef={spacebring.LIGHTHOUSE}", {"location": spacebring.LIGHTHOUSE}),
        (f"membershipRef={spacebring.MEMBERSHIP_LIGHTHOUSE}", {"membership": spacebring.MEMBERSHIP_LIGHTHOUSE}),
        (f"companyRef={spacebring.WORKSHOP}", {"company": spacebring.WORKSHOP}),
        (
            f"companyRef={spacebring.STUDIO}&membershipRef={spacebring.MEMBERSHIP_HARBOUR}",
            {"company": spacebring.STUDIO, "membership": spacebring.MEMBERSHIP_HARBOUR},
        ),
        (
            f"locationRef={spacebring.OLD_TOWN}&companyRef={spacebring.BUREAU}",
            {"location": spacebring.OLD_TOWN, "company": spacebring.BUREAU},
        ),
    ],
    ids=[
        "network",
        "harbour",
        "old town",
        "member",
        "freelancer",
        "studio",
        "bureau",
        "lighthouse",
        "apprentice",
        "workshop",
        "company+member",
        "place+company",
    ],
)
def test_spacebring_lists_by_filter(client: httpx.Client, query: str, filters: dict[str, str]) -> None:
    """The list has every transaction that matches the filter once, newest first."""
    expected = oracle.spacebring_transactions(**filters)  # type: ignore[arg-type]  # all of these are texts
    assert expected
    for size in sizes_for(len(expected)):
        assert all_of_spacebring(client, size, query) == expected, f"at limit {size}"


# The times of a renewal, of a booking and of an order in the story.
FIRST = datetime(2024, 8, 31, 7, tzinfo=UTC)
BETWEEN = datetime(2024, 9, 2, 9, tzinfo=UTC)
LAST = datetime(2024, 9, 26, 10, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


def test_bounds_are_times_of_the_demo() -> None:
    """FIRST, BETWEEN and LAST are times of transactions, so that inclusive and exclusive bounds differ."""
    times = {each["createDate"] for each in oracle.spacebring_transactions()}
    assert {moment.strftime("%Y-%m-%dT%H:%M:%S.000000Z") for moment in (FIRST, BETWEEN, LAST)} <= times


@pytest.mark.parametrize("encode", [lambda text: text, lambda text: quote(text, safe="=&")], ids=["raw", "encoded"])
@pytest.mark.parametrize(
    ("first", "last"),
    [
        (FIRST, None),
        (FIRST + MICROSECOND, None),
        (None, LAST),
        (None, LAST - MICROSECOND),
        (FIRST, LAST),
        (FIRST + MICROSECOND, LAST - MICROSECOND),
        (BETWEEN, BETWEEN),
        (BETWEEN + MICROSECOND, BETWEEN),
    ],
    ids=["from", "after", "to", "before", "range", "inside", "instant", "nothing"],
)
def test_spacebring_dates_are_inclusive(
    client: httpx.Client, first: datetime | None, last: datetime | None, encode: Callable[[str], str]
) -> None:
    """Both date bounds are inclusive, raw and percent-encoded."""
    bounds = {"createDate[gte]": first, "createDate[lte]": last}
    query = encode("&".join(f"{name}={moment:%Y-%m-%dT%H:%M:%S.%fZ}" for name, moment in bounds.items() if moment))
    expected = oracle.spacebring_transactions(first=first, last=last)
    for size in (7, SIZE_MAX):
        assert all_of_spacebring(client, size, query) == expected, f"at limit {size}"


@pytest.mark.parametrize(
    "spelled",
    ["2024-09-02T11:00:00%2B02:00", "2024-09-02T04:00:00-05:00", "2024-09-02T09:00:00-00:00", "2024-09-02t09:00:00z"],
)
def test_spacebring_dates_accept_time_zones(client: httpx.Client, spelled: str) -> None:
    """A date bound in another time zone means the same instant."""
    not_before = all_of_spacebring(client, SIZE_MAX, f"createDate[gte]={spelled}")
    not_after = all_of_spacebring(client, SIZE_MAX, f"createDate[lte]={spelled}")
    assert not_before == oracle.spacebring_transactions(first=BETWEEN)
    assert not_after == oracle.spacebring_transactions(last=BETWEEN)


@pytest.mark.parametrize("size", [1, 2, SIZE_MAX - 1, SIZE_MAX])
def test_dreadnode_lists_the_newest(client: httpx.Client, size: int) -> None:
    """The list has the newest transactions of all types, as many as the limit."""
    rows = get(client, dreadnode.KEY, f"/api/v1/org/example/credits/transactions?limit={size}")
    assert without_ids(cast("list[Row]", rows)) == oracle.dreadnode_transactions()[:size]


@pytest.mark.parametrize(
    "types",
    [
        *((name,) for name in oracle.TRANSACTION_TYPES),
        ("purchase", "usage"),
        ("usage", "purchase"),
        ("storage", "storage", "usage"),
        ("signup_allocation", "refund", "admin_adjustment", "web_search"),
        ("inference", "span_ingestion"),
        tuple(oracle.TRANSACTION_TYPES),
    ],
    ids=lambda types: f"{types[0]}+{len(types) - 1}",
)
def test_dreadnode_lists_by_type(client: httpx.Client, types: tuple[str, ...]) -> None:
    """The list has the newest transactions of the requested types, as many as the limit."""
    expected = oracle.dreadnode_transactions(*types)
    query = urlencode([("transaction_type", name) for name in types])
    for size in sizes_for(len(expected)):
        rows = get(client, dreadnode.KEY, f"/api/v1/org/example/credits/transactions?{query}&limit={size}")
        assert without_ids(cast("list[Row]", rows)) == expected[:size], f"at limit {size}"


@pytest.mark.parametrize(
    ("story", "account"),
    [
        (dreadnode.STORY, dreadnode.ORGANIZATION),
        (teable.STORY, teable.SPACE),
        (nebulablock.STORY, nebulablock.BUSY_USER),
    ],
    ids=["organization", "space", "user"],
)
def test_paged_links_lead_to_every_row(client: httpx.Client, story: Story, account: str) -> None:
    """Following the `next` links lists every transaction once, `previous` leads back, and every page has the count."""
    expected = oracle.paged_transactions(story, account)
    (key, *_) = (
        name for name, bound_to in story.keys.items() if bound_to in (None, account) and name not in story.narrow_keys
    )
    for size in (7, SIZE_MAX):
        pages = []
        url: str | None = f"{client.base_url}/api/billing/accounts/{account}/transactions?page_size={size}"
        while url is not None:
            body = get(client, key, url)
            assert isinstance(body, dict)
            assert body["count"] == Decimal(len(expected))
            pages.append(cast("list[Row]", body["results"]))
            url, previous = cast("str | None", body["next"]), cast("str | None", body["previous"])
            assert (previous is None) == (len(pages) == 1)
            if previous is not None:
                assert cast("Row", get(client, key, previous))["results"] == pages[-2]
        assert [len(page) for page in pages[:-1]] == [size] * (len(pages) - 1)
        assert without_ids([row for page in pages for row in page]) == expected, f"at size {size}"


def test_default_page_sizes(client: httpx.Client) -> None:
    """The default page size is 50 (Teable, Dreadnode), 20 (Nebula Block, Paged) or 25 (Spacebring)."""
    records = get(client, teable.KEY, f"/api/space/{teable.SPACE}/billing/credit-history?month={MONTH}")
    hours = get(client, nebulablock.BUSY_KEY, "/users/credits/history")
    transactions = get(client, spacebring.KEY, "/transactions/credits/v1")
    credits_ = get(client, dreadnode.KEY, "/api/v1/org/example/credits/transactions")
    paged = get(client, dreadnode.KEY, "/api/billing/accounts/example/transactions")
    assert isinstance(records, dict)
    assert isinstance(hours, dict)
    assert isinstance(hours["data"], dict)
    assert isinstance(transactions, dict)
    assert without_ids(cast("list[Row]", records["data"])) == oracle.teable_records(MONTH)[:50]
    assert hours["data"]["credit_history"] == oracle.nebulablock_hours(nebulablock.BUSY_USER)[:20]
    assert project(cast("list[Row]", transactions["transactions"])) == oracle.spacebring_transactions()[:25]
    assert without_ids(cast("list[Row]", credits_)) == oracle.dreadnode_transactions()[:50]
    assert isinstance(paged, dict)
    transactions_of_organization = oracle.paged_transactions(dreadnode.STORY, "example")
    assert without_ids(cast("list[Row]", paged["results"])) == transactions_of_organization[:20]
