"""Three users of a GPU cloud: the documented example, one with many hours, and one with hours all year."""

from __future__ import annotations

from collections.abc import Iterator

from daybook.v1.account_pb2 import Account
from daybook.v1.transaction_pb2 import Transaction, Usage

from server.demo.story import DAY, MINUTE, Event, Story, charge, demo_uuid, grant
from server.ledger.instants import HOUR, parse

DOCUMENTED_USER = "266"
DOCUMENTED_KEY = "demo-nebulablock"
BUSY_USER = "271"
BUSY_KEY = "demo-nebulablock-busy"
SEASONED_USER = "305"
SEASONED_KEY = "demo-nebulablock-seasons"
ACCOUNTS_KEY = "demo-nebulablock-accounts"

# 05:54:58 in New York, where the documented example begins.
_START = parse("2024-10-10T09:54:58Z")


def _grant(amount: str) -> Transaction:
    return grant("purchase", amount, description="Top-up by card")


def _use(category: str, amount: str, model: str) -> Transaction:
    return charge(category, f"-{amount}", usage=Usage(model=model))


def _documented() -> Iterator[Event]:
    """Two hours at 2.004 credits, billed every ten minutes, out of 13.8762: 9.8682 are left."""
    yield Event(_START, DOCUMENTED_USER, _grant("13.8762"))
    for tick in range(12):
        yield Event(_START + tick * 10 * MINUTE, DOCUMENTED_USER, _use("computing", "0.334", "RTX-A6000"))


def _busy() -> Iterator[Event]:
    """Sixty hours of a machine over a week, with calls of serverless endpoints in between."""
    yield Event(_START, BUSY_USER, _grant("250"))
    for day in range(6):
        for hour in range(10):
            begin = _START + day * DAY + hour * HOUR
            for tick in range(4):
                yield Event(begin + tick * 15 * MINUTE, BUSY_USER, _use("computing", "0.75", "H100-80G"))
            if hour % 3 == 0:
                yield Event(begin + 7 * MINUTE, BUSY_USER, _use("serverless", "0.0123", "example-large"))


def _seasons() -> Iterator[Event]:
    """Hours in winter and in summer, and the hours in which New York's daylight saving time ends and begins."""
    yield Event(_START, SEASONED_USER, _grant("100"))
    for time, category, amount in (
        # Daylight saving time ends at 06:00 UTC: the clock goes from 2 to 1.
        ("2024-11-03T04:54:58Z", "computing", "0.1"),
        ("2024-11-03T05:54:57.999999Z", "serverless", "0.2"),
        ("2024-11-03T05:54:58Z", "computing", "1"),
        ("2024-11-03T07:54:57Z", "computing", "2"),
        ("2025-01-15T15:00:00Z", "serverless", "0.000001"),
        # Daylight saving time begins at 07:00 UTC: the clock goes from 2 to 3.
        ("2025-03-09T06:54:58Z", "computing", "4"),
        ("2025-07-04T16:00:00Z", "computing", "8.25"),
    ):
        yield Event(parse(time), SEASONED_USER, _use(category, amount, "H100-80G"))
    failed = _use("computing", "16", "H100-80G")
    failed.state = Transaction.FAILED
    yield Event(parse("2025-07-04T16:00:01Z"), SEASONED_USER, failed)


STORY = Story(
    slug="demo-nebulablock",
    display_name="Example GPU cloud",
    uid=demo_uuid("nebulablock"),
    start=_START,
    accounts={
        DOCUMENTED_USER: Account(kind=Account.USER, display_name="User 266"),
        BUSY_USER: Account(kind=Account.USER, display_name="User 271"),
        SEASONED_USER: Account(kind=Account.USER, display_name="User 305"),
    },
    keys={
        ACCOUNTS_KEY: DOCUMENTED_USER,
        DOCUMENTED_KEY: DOCUMENTED_USER,
        BUSY_KEY: BUSY_USER,
        SEASONED_KEY: SEASONED_USER,
    },
    events=[*_documented(), *_busy(), *_seasons()],
    narrow_keys={ACCOUNTS_KEY: ("accounts",)},
)
