"""A workspace that spends AI credits, from September to November 2024, and one with edge cases."""

from __future__ import annotations

from collections.abc import Iterator

from daybook.v1.account_pb2 import Account, User
from daybook.v1.transaction_pb2 import Transaction, Usage

from server.demo.story import DAY, MINUTE, Event, Refund, Story, charge, demo_uuid, grant
from server.ledger import money
from server.ledger.instants import HOUR, parse

SPACE = "spcExampleStudio"
LABORATORY = "spcExampleLab"
KEY = "demo-teable"
ACCOUNTS_KEY = "demo-teable-accounts"
MONTH = "2024-10"

_START = parse("2024-09-01T08:00:00Z")
_DAYS = 91

_DESIGNER = User(id="usrDesigner", name="Designer", photo_uri="https://example.com/avatars/designer.png")
_ANALYST = User(id="usrAnalyst", name="Analyst")
# The charges of a day: hour, source, description, creator, amount in millionths.
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
            bought = grant("purchase", "600", description="600 credits", creator=_DESIGNER)
            yield Event(_START + day * DAY, SPACE, bought)
        for hour, source, name, user, cost in _DAY_OF_WORK:
            if source == "app_generation" and day % 7:
                continue
            # Amounts vary by the day.
            amount = cost + cost // 10 * (day % 4)
            usage = Usage(model="example-large")
            used = charge(source, money.write(-amount), description=name, creator=user, usage=usage)
            yield Event(_START + day * DAY + hour * HOUR + day % 60 * MINUTE, SPACE, used)


def _experiments() -> Iterator[Event]:
    """Edge cases of months, amounts and users, and charges that failed or were canceled."""
    stranger = User(id="usrStranger")
    author = User(id="usrAuthor", name="Zoë", surname="Šťastná", photo_uri="https://example.com/avatars/zo%C3%AB.png")
    yield Event(parse("2024-06-01T00:00:00Z"), LABORATORY, grant("purchase", "2000000"))
    for time, source, amount, name, user, state in (
        ("2024-06-01T00:00:00Z", "ai_chat", "-0.000001", "", stranger, Transaction.SUCCEEDED),
        (
            "2024-06-15T12:34:56.789999Z",
            "ai_generation",
            "-1234567.890123",
            'Obálka "木" 🪚',
            author,
            Transaction.SUCCEEDED,
        ),
        ("2024-06-16T09:00:00Z", "ai_chat", "-5", "Model was away", author, Transaction.FAILED),
        ("2024-06-16T09:00:01Z", "ai_chat", "-5", "Stopped", author, Transaction.CANCELED),
        ("2024-06-17T09:00:00Z", "automation_ai_action", "-2", "Nightly summary", None, Transaction.SUCCEEDED),
        ("2024-06-30T23:59:59.999999Z", "field_ai_generation", "-0.1", "Last of June", None, Transaction.SUCCEEDED),
        ("2024-07-01T00:00:00Z", "app_generation", "-0.3", "First of July", None, Transaction.SUCCEEDED),
    ):
        used = charge(source, amount, description=name, creator=user, state=state)
        yield Event(parse(time), LABORATORY, used, name=name)


STORY = Story(
    slug="demo-teable",
    display_name="Example Studio",
    uid=demo_uuid("teable"),
    start=parse("2024-06-01T00:00:00Z"),
    accounts={
        SPACE: Account(kind=Account.SPACE, display_name="Example Studio"),
        "spcExampleArchive": Account(kind=Account.SPACE, display_name="Archive, never used"),
        LABORATORY: Account(kind=Account.SPACE, display_name="Laboratory"),
    },
    keys={ACCOUNTS_KEY: None, KEY: None},
    events=[*_experiments(), *_events()],
    refunds_and_transfers=[Refund(parse("2024-06-18T09:00:00Z"), LABORATORY, "Nightly summary", "1.5", Transaction())],
    narrow_keys={ACCOUNTS_KEY: ("accounts",)},
)
