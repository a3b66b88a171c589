"""Teable's `GET /api/space/{spaceId}/billing/credit-history`: the consumption of a space, month by month."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from daybook_client import AccountKind, NewTransaction, PastTransaction, TransactionKind, User
from server.facades.teable import TYPES
from server.importing import fields
from server.importing.found import Found, NewAccount, Options, Page, Problem, Reader, Row, RowInvalid, bearer
from server.importing.http import Api

PAGE_ROWS = 100
EMPTY_MONTHS = 12
"""Without a `since`, the history ends before this number of months without rows."""
CATEGORIES = {name: category for (_, category), name in TYPES.items()}


def pages(api: Api, options: Options) -> Iterator[Page]:
    """Reads month by month, back from the present one."""
    path = f"/space/{options.account_id}/billing/credit-history"
    year, month, empty = options.now.year, options.now.month, 0
    while empty < EMPTY_MONTHS if options.since is None else (year, month) >= (options.since.year, options.since.month):
        cursor, number, is_empty = "", 0, True
        while number == 0 or cursor:
            number += 1
            parameters: dict[str, str | int] = {"month": f"{year:04}-{month:02}", "take": PAGE_ROWS}
            content = api.get(path, **parameters, **({"cursor": cursor} if cursor else {}))
            yield Page(f"{api.place(path, number)} of {year:04}-{month:02}", content)
            cursor = fields.next_token(content, "nextCursor", cursor)
            is_empty = is_empty and not fields.member(content, "data")
        empty = empty + 1 if is_empty else 0
        year, month = (year, month - 1) if month > 1 else (year - 1, 12)


def rows(pages: Iterable[Page], options: Options) -> Iterator[Found]:
    """Reads records: charges of the space."""
    space = options.account_id
    yield NewAccount(id=space, kind=AccountKind.SPACE)
    for page in pages:
        for number, record in enumerate(fields.rows_of(page.place, fields.member(page.content, "data")), 1):
            place = f"{page.place}, row {number}"
            try:
                yield Row(_past(space, record), place=place)
            except RowInvalid as error:
                yield Problem(place, str(error))


def _past(space: str, record: Any) -> PastTransaction:
    user = fields.member(record, "user")
    creator = None
    if user is not None:
        creator = User(
            id=fields.required(user, "id"), name=fields.text(user, "name"), photo_uri=fields.text(user, "avatar")
        )
    transaction = NewTransaction(
        TransactionKind.CHARGE,
        fields.one_of(record, "sourceType", CATEGORIES),
        -fields.required_number(record, "amount"),
        description=fields.text(record, "displayName"),
        creator=creator,
    )
    time = fields.required_time(record, "createdTime")
    return PastTransaction(f"accounts/{space}", transaction, time, f"teable:{fields.required(record, 'id')}")


READER = Reader("Teable", "https://app.teable.ai/api", bearer, pages, rows, needs_account=True)
