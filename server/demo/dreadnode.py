"""An organization that runs evaluations of models, in November 2024."""

from __future__ import annotations

from collections.abc import Iterator

from daybook.v1.account_pb2 import Account
from daybook.v1.transaction_pb2 import Transaction, Usage

from server.demo.story import DAY, MINUTE, Event, Story, demo_uuid
from server.ledger import money
from server.ledger.instants import HOUR, parse
from server.ledger.money import ONE_CREDIT

ORGANIZATION = "example"
KEY = "demo-dreadnode"
ACCOUNTS_KEY = "demo-dreadnode-accounts"

_START = parse("2024-11-01T09:00:00Z")
_DAYS = 28
# By then the story has spent what was there but for less than 100 credits.
_DAY_OF_REFILL = 23


def _grant(category: str, amount: int, description: str, *, receipt: str = "") -> Transaction:
    return Transaction(
        kind=Transaction.GRANT, category=category, amount=str(amount), description=description, receipt_uri=receipt
    )


def _inference(run: int) -> Transaction:
    tokens_in, tokens_out = 1800 + 37 * run, 420 + 11 * run
    return Transaction(
        kind=Transaction.CHARGE,
        category="inference",
        amount=str(-(4 + run % 9)),
        description="Evaluation run",
        usage=Usage(
            model=("example-large", "example-small")[run % 2],
            input_tokens=tokens_in,
            output_tokens=tokens_out,
            # Three and fifteen dollars for a million tokens.
            cost_usd=money.write((3 * tokens_in + 15 * tokens_out) * ONE_CREDIT // 1_000_000),
        ),
    )


def _charge(category: str, amount: int, description: str = "") -> Transaction:
    return Transaction(kind=Transaction.CHARGE, category=category, amount=str(-amount), description=description)


def _events() -> Iterator[Event]:
    yield Event(_START, ORGANIZATION, _grant("signup_allocation", 500, "Welcome credits"))
    for day in range(_DAYS):
        morning = _START + day * DAY
        if day % 14 == 3:
            receipt = f"https://example.com/receipts/{demo_uuid(f'receipt {day}')}"
            yield Event(morning, ORGANIZATION, _grant("purchase", 200, "200 credits", receipt=receipt))
        if day == _DAY_OF_REFILL:
            yield Event(morning, ORGANIZATION, _grant("auto_refill", 250, "Balance fell below 100"))
        for run in range(4):
            yield Event(morning + (1 + run) * HOUR, ORGANIZATION, _inference(4 * day + run))
        yield Event(morning + 6 * HOUR, ORGANIZATION, _charge("span_ingestion", 2, "Traces of the day"))
        if day % 3 == 0:
            yield Event(morning + 6 * HOUR + 5 * MINUTE, ORGANIZATION, _charge("web_search", 1))
        if day % 7 == 6:
            yield Event(morning + 7 * HOUR, ORGANIZATION, _charge("storage", 12, "Artifacts of the week"))
            yield Event(morning + 7 * HOUR, ORGANIZATION, _charge("usage", 3))
    correction = Transaction(
        kind=Transaction.ADJUSTMENT, category="admin_adjustment", amount="15", description="Failed run, made good"
    )
    yield Event(_START + 20 * DAY, ORGANIZATION, correction)


STORY = Story(
    slug="demo-dreadnode",
    display_name="Example evaluations",
    uid=demo_uuid("dreadnode"),
    start=_START,
    accounts={ORGANIZATION: Account(kind=Account.ORGANIZATION, display_name="Example")},
    keys={ACCOUNTS_KEY: None, KEY: None},
    events=list(_events()),
    narrow_keys={ACCOUNTS_KEY: ("accounts",)},
)
