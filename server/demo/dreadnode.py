"""An organization that evaluates models, in November 2024, and one with edge cases."""

from __future__ import annotations

from collections.abc import Iterator

from daybook.v1.account_pb2 import Account
from daybook.v1.transaction_pb2 import Transaction, Usage

from server.demo.story import DAY, MINUTE, Event, Refund, Story, charge, demo_uuid, grant
from server.ledger import money
from server.ledger.instants import HOUR, parse
from server.ledger.money import ONE_CREDIT

ORGANIZATION = "example"
LABORATORY = "example-lab"
KEY = "demo-dreadnode"
ACCOUNTS_KEY = "demo-dreadnode-accounts"

_START = parse("2024-11-01T09:00:00Z")
_DAYS = 28
# By then the balance is below 100 credits.
_DAY_OF_REFILL = 23


def _inference(run: int) -> Transaction:
    tokens_in, tokens_out = 1800 + 37 * run, 420 + 11 * run
    return charge(
        "inference",
        str(-(4 + run % 9)),
        description="Evaluation run",
        usage=Usage(
            model=("example-large", "example-small")[run % 2],
            input_tokens=tokens_in,
            output_tokens=tokens_out,
            # Three and fifteen dollars for a million tokens.
            cost_usd=money.write((3 * tokens_in + 15 * tokens_out) * ONE_CREDIT // 1_000_000),
        ),
    )


def _events() -> Iterator[Event]:
    yield Event(_START, ORGANIZATION, grant("signup_allocation", "500", description="Welcome credits"))
    for day in range(_DAYS):
        morning = _START + day * DAY
        if day % 14 == 3:
            receipt = f"https://example.com/receipts/{demo_uuid(f'receipt {day}')}"
            yield Event(morning, ORGANIZATION, grant("purchase", "200", description="200 credits", receipt_uri=receipt))
        if day == _DAY_OF_REFILL:
            yield Event(morning, ORGANIZATION, grant("auto_refill", "250", description="Balance fell below 100"))
        for run in range(4):
            yield Event(morning + (1 + run) * HOUR, ORGANIZATION, _inference(4 * day + run))
        yield Event(morning + 6 * HOUR, ORGANIZATION, charge("span_ingestion", "-2", description="Traces of the day"))
        if day % 3 == 0:
            yield Event(morning + 6 * HOUR + 5 * MINUTE, ORGANIZATION, charge("web_search", "-1"))
        if day % 7 == 6:
            yield Event(morning + 7 * HOUR, ORGANIZATION, charge("storage", "-12", description="Artifacts of the week"))
            yield Event(morning + 7 * HOUR, ORGANIZATION, charge("usage", "-3"))
    correction = Transaction(
        kind=Transaction.ADJUSTMENT, category="admin_adjustment", amount="15", description="Failed run, made good"
    )
    yield Event(_START + 20 * DAY, ORGANIZATION, correction)


def _experiments() -> Iterator[Event]:
    """Edge cases: fractions of a credit, sparse usage, and charges that failed or were canceled."""
    free_run = Usage(input_tokens=0, output_tokens=0, cost_usd="0")
    for number, transaction in enumerate(
        (
            grant(
                "purchase", "99", description='Předplaceno “99” "木" 🪚', receipt_uri="https://example.com/receipts/1"
            ),
            charge("usage", "-0.499999"),
            charge("inference", "-1.5", description="Evaluation run", usage=free_run),
            charge("inference", "-0.5", usage=Usage(model="模型-ünïversal")),
            charge("usage", "-50", state=Transaction.FAILED),
            charge("storage", "-50", state=Transaction.CANCELED),
            Transaction(kind=Transaction.ADJUSTMENT, category="admin_adjustment", amount="-2.5"),
            grant("bonus", "1"),
        )
    ):
        time = _START + number * DAY + number * 1000
        yield Event(time, LABORATORY, transaction, name=f"experiment {number}")


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
    refunds_and_transfers=[
        Refund(_START + 9 * DAY, LABORATORY, "experiment 2", "1.5", Transaction(description="The run was repeated"))
    ],
    narrow_keys={ACCOUNTS_KEY: ("accounts",)},
)
