"""Pages of a list, and the default order and filter."""

from __future__ import annotations

import pytest

from server.ledger.paging import Order, OrderField, Page, TransactionFilter


@pytest.mark.parametrize(
    ("row_count", "limit", "rows", "next_key"),
    [
        (0, 1, [], None),
        (0, 3, [], None),
        (1, 1, [0], None),
        (2, 1, [0], "key 0"),
        (2, 3, [0, 1], None),
        (3, 3, [0, 1, 2], None),
        (4, 3, [0, 1, 2], "key 2"),
        (1000, 1000, list(range(1000)), None),
        (1001, 1000, list(range(1000)), "key 999"),
    ],
)
def test_an_extra_row_makes_a_next_page(row_count: int, limit: int, rows: list[int], next_key: str | None) -> None:
    """A page has at most `limit` rows. It has a next_key, the key of its last row, exactly if there are more rows."""
    page = Page.of(list(range(row_count)), limit, key=lambda row: f"key {row}")
    assert page.rows == rows
    assert page.next_key == next_key


@pytest.mark.parametrize("total", [1, 2, 7, 8])
@pytest.mark.parametrize("size", ["1", "N-1", "N", "N+1"])
def test_concatenated_pages_are_the_list(total: int, size: str) -> None:
    """Pages of 1, N-1, N or N+1 rows, each read from the next_key of the previous one, return all N rows once."""
    limit = max(1, {"1": 1, "N-1": total - 1, "N": total, "N+1": total + 1}[size])
    everything = list(range(total))
    seen: list[int] = []
    after = -1
    pages = 0
    while True:
        page = Page.of(everything[after + 1 : after + 2 + limit], limit, key=lambda row: row)
        seen += page.rows
        pages += 1
        if page.next_key is None:
            break
        after = page.next_key
    assert seen == everything
    assert pages == -(-total // limit)


def test_lists_are_newest_first_by_default() -> None:
    """The default order is by create_time, descending."""
    assert Order() == Order(OrderField.CREATE_TIME, descending=True)


def test_default_filter_is_empty() -> None:
    """Every field of the default filter is empty or None, so it selects all transactions."""
    empty = TransactionFilter()
    assert {getattr(empty, name) for name in TransactionFilter.__slots__} == {(), None}


def test_order_fields_have_the_names_of_the_contract() -> None:
    """The fields of an order have the names that clients use in `order_by`: create_time and amount."""
    assert {field.value for field in OrderField} == {"create_time", "amount"}
