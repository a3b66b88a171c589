"""An organization that runs evaluations of models, in November 2024, and one where things are tried out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from daybook.v1.account_pb2 import Account
from daybook.v1.transaction_pb2 import Transaction, Usage

from server.demo.story import DAY, MINUTE, Event, Refund, Story, demo_uuid
from server.ledger import money
from server.ledger.instants import HOUR, parse
from server.ledger.money import ONE_CREDIT

ORGANIZATION = "example"
LABORATORY = "example-lab"
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


def _experiments() -> Iterator[Event]:
    """At the edges: fractions of a credit, usage of which little is known, and what came to nothing."""
    free_run = Usage(input_tokens=0, output_tokens=0, cost_usd="0")
    declined = Transaction(kind=Transaction.CHARGE, category="usage", amount="-50", state=Transaction.FAILED)
    stopped = Transaction(kind=Transaction.CHARGE, category="storage", amount="-50", state=Transaction.CANCELED)
    for number, transaction in enumerate(
        (
            _grant("purchase", 99, 'Předplaceno “99” "木" 🪚', receipt="https://example.com/receipts/1"),
            _fraction("usage", "-0.499999"),
            _fraction("inference", "-1.5", description="Evaluation run", usage=free_run),
            _fraction("inference", "-0.5", usage=Usage(model="模型-ünïversal")),
            declined,
            stopped,
            Transaction(kind=Transaction.ADJUSTMENT, category="admin_adjustment", amount="-2.5"),
            Transaction(kind=Transaction.GRANT, category="bonus", amount="1"),
        )
    ):
        time = _START + number * DAY + number * 1000
        yield Event(time, LABORATORY, transaction, name=f"experiment {number}")


def _fraction(category: str, amount: str, **fields: Any) -> Transaction:
    return Transaction(kind=Transaction.CHARGE, category=category, amount=amount, **fields)


STORY = Story(
    slug="demo-dreadnode",
    display_name="Example evaluations",
    uid=demo_uuid("dreadnode"),
    start=_START,
    accounts={
        ORGANIZATION: Account(kind=Account.ORGANIZATION, display_name="Example"),
        LABORATORY: Account(kind=Account.ORGANIZATION, display_name="Laboratory"),
    },
    keys={ACCOUNTS_KEY: None, KEY: None},
    events=[*_experiments(), *_events()],
    movements=[
        Refund(_START + 9 * DAY, LABORATORY, "experiment 2", "1.5", Transaction(description="The run was repeated"))
    ],
    narrow_keys={ACCOUNTS_KEY: ("accounts",)},
)
