"""A coworking network with two locations, two companies and two memberships, over a quarter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from daybook.v1.account_pb2 import Account, Company, User
from daybook.v1.transaction_pb2 import Booking, EventTicket, Order, Transaction
from google.protobuf.struct_pb2 import Struct

from server.demo.story import DAY, Event, Story, demo_uuid
from server.ledger.instants import HOUR, Instant, parse, to_timestamp

NETWORK = demo_uuid("network")
KEY = "demo-spacebring"
ACCOUNTS_KEY = "demo-spacebring-accounts"
READONLY_KEY = "demo-spacebring-readonly"
HARBOUR = demo_uuid("location harbour")
OLD_TOWN = demo_uuid("location old town")
STUDIO = demo_uuid("company studio")
BUREAU = demo_uuid("company bureau")
MEMBERSHIP_HARBOUR = demo_uuid("membership harbour")
MEMBERSHIP_OLD_TOWN = demo_uuid("membership old town")

_START = parse("2024-08-01T07:00:00Z")
_DAYS = 92

_MEMBER = User(
    id=demo_uuid("user member"),
    name="Member",
    surname="of the studio",
    email="member@example.com",
    phone_number="+1 555 0100",
    photo_uri="https://example.com/avatars/member.png",
    about="Books the small room",
    membership=MEMBERSHIP_HARBOUR,
)
_FREELANCER = User(
    id=demo_uuid("user freelancer"), name="Freelancer", email="freelancer@example.com", membership=MEMBERSHIP_OLD_TOWN
)
_MANAGER = User(id=demo_uuid("user manager"), name="Community manager", email="manager@example.com")


def _metadata() -> Struct:
    metadata = Struct()
    metadata.update({"sector": "design"})
    return metadata


_ACCOUNTS = {
    STUDIO: Account(
        kind=Account.COMPANY,
        display_name="Example Studio",
        company=Company(
            title="Example Studio",
            legal_name="Example Studio Ltd",
            tax_id="EX-0001",
            billing_address="1 Example Quay, Exampleton",
            business_address=Company.Address(
                line1="1 Example Quay", city="Exampleton", postal_code="00001", country_code="NL"
            ),
            notes="Prefers the harbour",
            location=HARBOUR,
            subscription=demo_uuid("subscription studio"),
            expiring_day_passes=4,
            metadata=_metadata(),
            create_time=to_timestamp(_START),
        ),
    ),
    BUREAU: Account(
        kind=Account.COMPANY,
        display_name="Example Bureau",
        company=Company(title="Example Bureau", location=OLD_TOWN, create_time=to_timestamp(_START)),
    ),
    MEMBERSHIP_OLD_TOWN: Account(kind=Account.MEMBERSHIP, display_name="Freelancer, old town", user=_FREELANCER),
}


def _labels(location: str, membership: str | None = None, company: str | None = None) -> dict[str, str]:
    labels = {"location": location, "membership": membership, "company": company}
    return {name: value for name, value in labels.items() if value is not None}


def _room(day: int) -> Booking:
    return Booking(
        id=demo_uuid(f"booking {day}"),
        resource=Booking.Resource(id=demo_uuid("small room"), title="Small meeting room"),
    )


def _coffee(day: int) -> Order:
    return Order(
        id=demo_uuid(f"order {day}"),
        product=Order.Product(id=demo_uuid("coffee"), title="Coffee beans"),
        option=Order.Option(id=demo_uuid("coffee 1 kg"), name="1 kg"),
    )


def _evening(day: int, now: Instant) -> EventTicket:
    return EventTicket(
        id=demo_uuid(f"ticket {day}"),
        create_time=to_timestamp(now),
        event=EventTicket.Event(
            id=demo_uuid(f"event {day}"),
            title="Evening at the harbour",
            start_time=to_timestamp(now + 10 * HOUR),
            end_time=to_timestamp(now + 12 * HOUR),
        ),
    )


def _of_studio(time: Instant, transaction: Transaction) -> Event:
    transaction.owner.CopyFrom(_MEMBER)
    transaction.labels.update(_labels(HARBOUR, MEMBERSHIP_HARBOUR, STUDIO))
    return Event(time, STUDIO, transaction)


def _of_freelancer(time: Instant, transaction: Transaction) -> Event:
    transaction.owner.CopyFrom(_FREELANCER)
    transaction.creator.CopyFrom(_FREELANCER)
    transaction.labels.update(_labels(OLD_TOWN, MEMBERSHIP_OLD_TOWN))
    return Event(time, MEMBERSHIP_OLD_TOWN, transaction)


def _grant(category: str, amount: str, description: str) -> Transaction:
    return Transaction(kind=Transaction.GRANT, category=category, amount=amount, description=description)


def _charge(category: str, amount: str, **fields: Any) -> Transaction:
    return Transaction(kind=Transaction.CHARGE, category=category, amount=amount, **fields)


def _events() -> Iterator[Event]:
    for day in range(_DAYS):
        now = _START + day * DAY
        if day % 30 == 0:
            yield _of_studio(now, _grant("subscription_renewal", "60", "Team plan"))
            yield _of_freelancer(now, _grant("credit_package", "25", "25 credits"))
        if day % 2 == 0:
            booking = _charge("booking", "-2.5", creator=_MEMBER, booking=_room(day))
            yield _of_studio(now + 2 * HOUR, booking)
        if day % 5 == 1:
            yield _of_freelancer(now + 3 * HOUR, _charge("order", "-1.75", order=_coffee(day)))
        if day % 14 == 5:
            ticket = _charge("event_ticket", "-4", creator=_MEMBER, event_ticket=_evening(day, now))
            yield _of_studio(now + 4 * HOUR, ticket)
        if day % 31 == 20:
            key_card = _charge("admin_charge", "-3", description="Lost key card", creator=_MANAGER)
            key_card.labels.update(_labels(HARBOUR, company=STUDIO))
            yield Event(now + 5 * HOUR, STUDIO, key_card)
    welcome = _grant("credit_package", "10", "Welcome")
    welcome.creator.CopyFrom(_MANAGER)
    welcome.labels.update(_labels(OLD_TOWN, company=BUREAU))
    yield Event(_START + 40 * DAY, BUREAU, welcome)


STORY = Story(
    slug="demo-spacebring",
    display_name="Example Coworking",
    uid=NETWORK,
    start=_START,
    accounts=_ACCOUNTS,
    keys={ACCOUNTS_KEY: None, READONLY_KEY: None, KEY: None},
    events=list(_events()),
    narrow_keys={ACCOUNTS_KEY: ("accounts",), READONLY_KEY: ("transactions.readonly",)},
)
