"""A workspace that spends AI credits, from September to November 2024."""

from __future__ import annotations

from collections.abc import Iterator

from daybook.v1.account_pb2 import Account, User
from daybook.v1.transaction_pb2 import Transaction, Usage

from server.demo.story import DAY, MINUTE, Event, Story, demo_uuid
from server.ledger import money
from server.ledger.instants import HOUR, parse

SPACE = "spcExampleStudio"
KEY = "demo-teable"
ACCOUNTS_KEY = "demo-teable-accounts"
MONTH = "2024-10"

_START = parse("2024-09-01T08:00:00Z")
_DAYS = 91

_DESIGNER = User(id="usrDesigner", name="Designer", photo_uri="https://example.com/avatars/designer.png")
_ANALYST = User(id="usrAnalyst", name="Analyst")
# What happens on a day: the hour, the source, what it is called, who did it, millionths.
_DAY_OF_WORK = (
    (1, "automation_ai_action", "Nightly summary", None, 1_250_000),
    (2, "ai_chat", "", _DESIGNER, 350_000),
    (2, "field_ai_generation", "Translate titles", _ANALYST, 42_500),
    (4, "ai_generation", "Cover image", _DESIGNER, 4_000_000),
    (6, "ai_chat", "", _ANALYST, 350_000),
    (7, "app_generation", "Stock tracker", _DESIGNER, 12_000_000),
)


def _events() -> Iterator[Event]:
    for day in range(_DAYS):
        if day % 30 == 0:
            bought = Transaction(
                kind=Transaction.GRANT, category="purchase", amount="600", description="600 credits", creator=_DESIGNER
            )
            yield Event(_START + day * DAY, SPACE, bought)
        for hour, source, name, user, cost in _DAY_OF_WORK:
            if source == "app_generation" and day % 7:
                continue
            # Longer answers on some days than on others.
            amount = cost + cost // 10 * (day % 4)
            charge = Transaction(
                kind=Transaction.CHARGE,
                category=source,
                amount=money.write(-amount),
                description=name,
                creator=user,
                usage=Usage(model="example-large"),
            )
            yield Event(_START + day * DAY + hour * HOUR + day % 60 * MINUTE, SPACE, charge)


STORY = Story(
    slug="demo-teable",
    display_name="Example Studio",
    uid=demo_uuid("teable"),
    start=_START,
    accounts={
        SPACE: Account(kind=Account.SPACE, display_name="Example Studio"),
        "spcExampleArchive": Account(kind=Account.SPACE, display_name="Archive, never used"),
    },
    keys={ACCOUNTS_KEY: None, KEY: None},
    events=list(_events()),
    narrow_keys={ACCOUNTS_KEY: ("accounts",)},
)
