"""Teams of a design tool, from September to December 2024: plans that expire, packs, refunds and a transfer.

The page in the browser opens with this tenant.
"""

from __future__ import annotations

from collections.abc import Iterator

from daybook.v1.account_pb2 import Account, User
from daybook.v1.transaction_pb2 import Transaction, Usage

from server.demo.story import DAY, MINUTE, Event, Refund, Story, Transfer, charge, demo_uuid, grant
from server.ledger import money
from server.ledger.instants import HOUR, Instant, parse, to_timestamp

STUDIO = "studio-north"
CLINIC = "harbour-clinic"
SCHOOL = "old-mill-school"
LIBRARY = "quiet-library"
KEY = "demo-teams"

_START = parse("2024-09-01T07:00:00Z")
_DAYS = 93
_MONTHS = (("September", 0, 30), ("October", 30, 61), ("November", 61, 91))
_SUNDAY = 0
_LEAD = User(id="lead", name="Lead designer")
_EDITOR = User(id="editor", name="Editor")
# The charges of a working day: hour, category, description, creator, model, amount in millionths.
_DAY_OF_WORK = (
    (1, "translation", "Captions", _EDITOR, "example-small", 820_000),
    (2, "image_generation", "Poster drafts", _LEAD, "example-image", 9_400_000),
    (5, "chat", "", _EDITOR, "example-large", 1_750_000),
    (8, "speech", "Voice-over", _EDITOR, "example-voice", 3_125_000),
)


def _on(day: int, hour: int = 0) -> Instant:
    return _START + day * DAY + hour * HOUR


def _plan(month: str, amount: str, last_day: int) -> Transaction:
    return grant("plan_renewal", amount, description=f"{month} plan", expire_time=to_timestamp(_on(last_day)))


def _studio() -> Iterator[Event]:
    for month, first, last in _MONTHS:
        yield Event(_on(first), STUDIO, _plan(month, "600", last))
    pack = grant("credit_pack", "400", description="Pack for ten years", expire_time=to_timestamp(_on(3653)))
    pack.receipt_uri = f"https://example.com/receipts/{demo_uuid('pack')}"
    yield Event(_on(20, 3), STUDIO, pack)
    yield Event(_on(47, 2), STUDIO, grant("credit_pack", "250", description="Pack without expiry", creator=_LEAD))
    gift = grant("promotion", "75", description="Thank you", expire_time=to_timestamp(_on(9131)))
    yield Event(_on(90, 3), STUDIO, gift)
    for day in range(_DAYS):
        if day % 7 == _SUNDAY:
            continue
        for hour, category, description, creator, model, cost in _DAY_OF_WORK:
            if (day + hour) % 5 == 0:
                continue
            # Amounts vary by the day, and grow.
            amount = cost * (60 + 13 * (day * hour % 7) + day // 2) // 100
            used = charge(category, money.write(-amount), description=description, creator=creator)
            used.usage.CopyFrom(Usage(model=model))
            yield Event(_on(day, hour) + day % 50 * MINUTE, STUDIO, used)
        if day % 11 == 5:
            video = charge("video_render", "-62.5", description="Trailer", creator=_LEAD)
            yield Event(_on(day, 9), STUDIO, video, name=f"trailer {day}")
    failed = charge("video_render", "-5000", description="Feature film", state=Transaction.FAILED, creator=_LEAD)
    yield Event(_on(40, 10), STUDIO, failed)


def _others() -> Iterator[Event]:
    """A clinic with a small plan, and a school whose credits come from the studio."""
    for month, first, last in _MONTHS:
        yield Event(_on(first, 1), CLINIC, _plan(month, "40", last))
    for week in range(13):
        yield Event(_on(7 * week + 1, 3), CLINIC, charge("translation", "-2.4", description="Leaflet"))
        if week % 4 == 2:
            yield Event(_on(7 * week + 2, 4), CLINIC, charge("speech", "-6.75", description="Announcement"))
    for week in range(4):
        yield Event(_on(64 + 7 * week, 2), SCHOOL, charge("image_generation", "-7.5", description="Class project"))


STORY = Story(
    slug="demo-teams",
    display_name="Example design tool",
    uid=demo_uuid("teams"),
    start=_START,
    accounts={
        STUDIO: Account(kind=Account.COMPANY, display_name="Studio North"),
        CLINIC: Account(kind=Account.COMPANY, display_name="Harbour Clinic"),
        SCHOOL: Account(kind=Account.ORGANIZATION, display_name="Old Mill School"),
        LIBRARY: Account(kind=Account.ORGANIZATION, display_name="Quiet Library"),
    },
    keys={KEY: None},
    events=[*_studio(), *_others()],
    refunds_and_transfers=[
        Refund(_on(38, 12), STUDIO, "trailer 38", "20.5", Transaction(description="Half of the trailer was black")),
        Transfer(_on(62, 1), STUDIO, SCHOOL, "60", Transaction(description="For the class project", creator=_LEAD)),
    ],
)
