"""Nebula Block's `GET /users/credits/history`: the hours in which a user spent credits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

from daybook_client import AccountKind, NewTransaction, PastTransaction, TransactionKind, Usage
from server.importing import fields
from server.importing.found import (
    Found,
    NewAccount,
    Options,
    Page,
    Problem,
    Reader,
    Row,
    RowInvalid,
    ShownBalance,
    bearer,
)
from server.importing.http import Api

PAGE_ROWS = 100
PATH = "/users/credits/history"
HOUR = timedelta(hours=1)
ZERO = Decimal(0)
# The vendor writes EST also in summer.
_WALL_TIME = re.compile(r"E[SD]T (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)", re.ASCII)
_NEW_YORK = ZoneInfo("America/New_York")
_CATEGORIES = {"computing": "computing_amount", "serverless": "serverless_amount"}


def pages(api: Api, _options: Options) -> Iterator[Page]:
    """Reads pages by offset. Hours that begin meanwhile move rows to later pages, so that some appear twice."""
    offset = 0
    while True:
        content = api.get(PATH, limit=PAGE_ROWS, offset=offset)
        yield Page(api.place(PATH, offset // PAGE_ROWS + 1), content)
        data = fields.member(content, "data")
        count = len(fields.rows_of(PATH, fields.member(data, "credit_history")))
        offset += count
        if not count or offset >= (fields.integer(data, "total_credit_histories") or 0):
            return


def rows(pages: Iterable[Page], options: Options) -> Iterator[Found]:
    """Reads hours: one charge for each category that was used. The account is that of the user_id in the rows."""
    history = _History(options)
    for page in pages:
        yield from history.read(page)
    yield from history.balances()


class _History:
    """The users of the pages so far."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._anchors: dict[str, datetime] = {}
        self._balances: dict[str, tuple[datetime, Decimal]] = {}
        self._unfinished: dict[tuple[str, datetime], Decimal] = {}

    def read(self, page: Page) -> Iterator[Found]:
        data = fields.member(page.content, "data")
        for number, hour in enumerate(fields.rows_of(page.place, fields.member(data, "credit_history")), 1):
            place = f"{page.place}, row {number}"
            try:
                yield from self._hour(place, hour, fields.number(data, "credit_balance"))
            except RowInvalid as error:
                yield Problem(place, str(error))

    def _hour(self, place: str, hour: Any, balance: Decimal | None) -> Iterator[Found]:
        number = fields.integer(hour, "user_id")
        if number is None:
            raise RowInvalid("user_id is missing")
        user = fields.account_id(str(number))
        start = _start(hour)
        amounts = {category: fields.required_number(hour, name) for category, name in _CATEGORIES.items()}
        if user not in self._anchors:
            self._anchors[user] = start
            yield NewAccount(id=user, kind=AccountKind.USER, hour_anchor_time=start)
        if (start - self._anchors[user]) % HOUR:
            raise RowInvalid("begins at another minute than the other hours of the user")
        if balance is not None and (user not in self._balances or start > self._balances[user][0]):
            self._balances[user] = (start, balance)
        if start + HOUR > self._options.now:
            # The amounts still change. A later import finds the complete hour.
            self._unfinished[user, start] = sum(amounts.values(), ZERO)
            return
        if not any(amounts.values()):
            raise RowInvalid("has no amount")
        for category, amount in amounts.items():
            if amount:
                transaction = NewTransaction(TransactionKind.CHARGE, category, -amount, usage=Usage())
                request_id = f"nebulablock:{start:%Y-%m-%dT%H:%M:%SZ}:{category}"
                yield Row(PastTransaction(f"accounts/{user}", transaction, start, request_id), place=place)

    def balances(self) -> Iterator[ShownBalance]:
        """The balances after the last complete hours."""
        for user, (_, balance) in self._balances.items():
            unfinished = (amount for (of_user, _), amount in self._unfinished.items() if of_user == user)
            yield ShownBalance(user, balance + sum(unfinished, ZERO))


def _start(hour: Any) -> datetime:
    """The instant at which an hour begins.

    A wall time that occurs twice, when New York puts its clocks back, is the first one if the hour ends at the wall
    time at which it begins.
    """
    begin, end = (_WALL_TIME.fullmatch(fields.required(hour, name)) for name in ("create_time", "update_time"))
    if begin is None or end is None:
        raise RowInvalid("create_time and update_time must be like EST 2024-10-10 06:54:58")
    try:
        wall = datetime.fromisoformat(begin[1])
    except ValueError:
        raise RowInvalid("create_time is no time") from None
    # Without effect on a wall time that occurs once.
    fold = 0 if begin[1] == end[1] else 1
    return wall.replace(tzinfo=_NEW_YORK, fold=fold).astimezone(UTC)


READER = Reader("Nebula Block", "", bearer, pages, rows)
