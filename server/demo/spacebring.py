"""A coworking network: the opening of one location, and then a quarter of two others.

The opening has expirations, refunds, transfers, and charges that fail or are canceled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from daybook.v1.account_pb2 import Account, Company, User
from daybook.v1.transaction_pb2 import Booking, EventTicket, Order, Transaction
from google.protobuf.struct_pb2 import Struct

from server.demo.story import DAY, Event, Refund, Story, Transfer, charge, demo_uuid, grant
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
LIGHTHOUSE = demo_uuid("location lighthouse")
WORKSHOP = demo_uuid("company workshop")
STALL = demo_uuid("company stall")
MEMBERSHIP_LIGHTHOUSE = demo_uuid("membership lighthouse")

_OPENING = parse("2024-06-01T08:00:00Z")
_END_OF_JUNE = to_timestamp(parse("2024-07-01T08:00:00Z"))
_FAR_AWAY = to_timestamp(parse("2099-12-31T23:59:59Z"))
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
_MAKER = User(
    id=demo_uuid("user maker"),
    name="Zoë",
    surname="Šťastná-O'Hara",
    email="zoë@example.com",
    phone_number="+420 555 0101",
    photo_uri="https://example.com/avatars/zo%C3%AB.png?size=64&round=1",
    about='Says "木工" 🪚 \\o/ <here>',
    membership=MEMBERSHIP_LIGHTHOUSE,
)
_APPRENTICE = User(id=demo_uuid("user apprentice"))


def _metadata(**content: Any) -> Struct:
    metadata = Struct()
    metadata.update(content)
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
            metadata=_metadata(sector="design"),
            create_time=to_timestamp(_START),
        ),
    ),
    BUREAU: Account(
        kind=Account.COMPANY,
        display_name="Example Bureau",
        company=Company(title="Example Bureau", location=OLD_TOWN, create_time=to_timestamp(_START)),
    ),
    MEMBERSHIP_OLD_TOWN: Account(kind=Account.MEMBERSHIP, display_name="Freelancer, old town", user=_FREELANCER),
    WORKSHOP: Account(
        kind=Account.COMPANY,
        display_name="Workshop",
        company=Company(
            title="Dílna “U Majáku”",
            legal_name="Example Workshop s.r.o.",
            tax_id="EX-0002",
            billing_address="Example Workshop\n2 Example Pier\nExampleton",
            business_address=Company.Address(
                line1="2 Example Pier",
                line2="Tower, 3rd floor",
                city="Exampleton",
                state="Example Shore",
                postal_code="00002",
                country_code="CZ",
            ),
            notes="Moved out in July",
            location=LIGHTHOUSE,
            subscription=demo_uuid("subscription workshop"),
            expiring_day_passes=0,
            metadata=_metadata(sector="wood", desks=3, tags=["saw", None], contact={"vip": True}),
            create_time=to_timestamp(parse("2024-05-20T10:30:00.25Z")),
            delete_time=to_timestamp(parse("2024-07-31T16:00:00Z")),
        ),
    ),
    # A company with nothing but a state in its address.
    STALL: Account(kind=Account.COMPANY, company=Company(business_address=Company.Address(state="Example Shore"))),
    MEMBERSHIP_LIGHTHOUSE: Account(kind=Account.MEMBERSHIP, display_name="Apprentice, lighthouse", user=_APPRENTICE),
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


def _opening() -> Iterator[Event]:
    """The company of the lighthouse, and its apprentice, whose credits all come from the company."""
    for day, transaction in (
        (0, grant("subscription_renewal", "100", description="June", expire_time=_END_OF_JUNE)),
        (1, grant("credit_package", "50", description="50 credits", creator=_MAKER)),
        (2, charge("booking", "-20", creator=_MAKER, booking=_room(-1))),
        (5, charge("admin_charge", "-4", description="Broken cup", creator=_MANAGER)),
        (7, charge("event_ticket", "-8", creator=_MAKER, event_ticket=_evening(-1, _OPENING))),
        (8, charge("booking", "-500", state=Transaction.FAILED, description="Too few credits", booking=_room(-2))),
        (9, charge("event_ticket", "-8", state=Transaction.CANCELED, event_ticket=_evening(-2, _OPENING))),
        (31, charge("order", "-2.25", creator=_MAKER, order=_coffee(-1))),
        (32, charge("admin_charge", "-3", description="Lost key card", creator=_MANAGER)),
        (34, grant("credit_package", "7", description="7 credits to be used first", expire_time=_FAR_AWAY)),
        (35, charge("admin_charge", "-9", description="Cleaning", creator=_MANAGER)),
        (36, grant("credit_package", "12.345678", description="A gift", expire_time=_FAR_AWAY)),
        (37, charge("admin_charge", "-5000", state=Transaction.FAILED, description="Damages", creator=_MANAGER)),
        (38, grant("credit_package", "30", description="Card declined", state=Transaction.FAILED)),
    ):
        transaction.owner.CopyFrom(_MAKER)
        transaction.labels.update(_labels(LIGHTHOUSE, company=WORKSHOP))
        yield Event(_OPENING + day * DAY, WORKSHOP, transaction, name=f"day {day}")
    for hours, transaction in _of_apprentice():
        transaction.owner.CopyFrom(_APPRENTICE)
        transaction.labels["membership"] = MEMBERSHIP_LIGHTHOUSE
        # All but the first are some microseconds after the whole second.
        yield Event(_OPENING + 11 * DAY + hours * HOUR + hours * 10, MEMBERSHIP_LIGHTHOUSE, transaction)


def _of_apprentice() -> Iterator[tuple[int, Transaction]]:
    """Charges with the hours after which they are posted. Their subjects have only some fields set."""
    bare_booking = Booking(id=demo_uuid("bare booking"), resource=Booking.Resource())
    yield 0, charge("booking", "-1.5", booking=bare_booking)
    tea = Order(id=demo_uuid("bare order"), product=Order.Product(title="Tea"))
    yield 25 * 24, charge("order", "-1", order=tea)
    ticket = EventTicket(id=demo_uuid("bare ticket"))
    yield (
        26 * 24,
        charge("event_ticket", "-0.5", event_ticket=ticket, creator=_APPRENTICE, labels={"company": STALL}),
    )
    desk = Booking.Resource
    for number, resource in enumerate((desk(id=demo_uuid("desk")), desk(title="Desk 7"))):
        booking = Booking(id=demo_uuid(f"booking part {number}"), resource=resource)
        yield 28 * 24 + number, charge("booking", "-0.5", booking=booking)
    for number, (product, option) in enumerate(
        (
            (Order.Product(id=demo_uuid("tea")), Order.Option(id=demo_uuid("tea 500 g"))),
            (None, Order.Option(name="500 g")),
        )
    ):
        order = Order(id=demo_uuid(f"order part {number}"), product=product, option=option)
        yield 29 * 24 + number, charge("order", "-0.5", order=order)
    for number, event in enumerate(
        (
            EventTicket.Event(title="Tea at the lighthouse"),
            EventTicket.Event(id=demo_uuid("event tea"), start_time=_END_OF_JUNE),
            EventTicket.Event(end_time=_END_OF_JUNE),
        )
    ):
        ticket = EventTicket(id=demo_uuid(f"ticket part {number}"), event=event)
        yield 30 * 24 + number, charge("event_ticket", "-0.5", event_ticket=ticket)


def _refunds_and_transfers() -> Iterator[Refund | Transfer]:
    """During the opening: two refunds of one booking, and transfers of expiring and permanent credits."""
    for day, amount in ((3, "5"), (4, "7.5")):
        details = Transaction(description=f"Refund of {amount}", creator=_MANAGER)
        yield Refund(_OPENING + day * DAY, WORKSHOP, "day 2", amount, details)
    for day, amount in ((6, "10"), (33, "6")):
        details = Transaction(creator=_MAKER, labels=_labels(LIGHTHOUSE, MEMBERSHIP_LIGHTHOUSE, WORKSHOP))
        yield Transfer(_OPENING + day * DAY, WORKSHOP, MEMBERSHIP_LIGHTHOUSE, amount, details)


def _quarter() -> Iterator[Event]:
    for day in range(_DAYS):
        now = _START + day * DAY
        if day % 30 == 0:
            yield _of_studio(now, grant("subscription_renewal", "60", description="Team plan"))
            yield _of_freelancer(now, grant("credit_package", "25", description="25 credits"))
        if day % 2 == 0:
            booking = charge("booking", "-2.5", creator=_MEMBER, booking=_room(day))
            yield _of_studio(now + 2 * HOUR, booking)
        if day % 5 == 1:
            yield _of_freelancer(now + 3 * HOUR, charge("order", "-1.75", order=_coffee(day)))
        if day % 14 == 5:
            ticket = charge("event_ticket", "-4", creator=_MEMBER, event_ticket=_evening(day, now))
            yield _of_studio(now + 4 * HOUR, ticket)
        if day % 31 == 20:
            key_card = charge("admin_charge", "-3", description="Lost key card", creator=_MANAGER)
            key_card.labels.update(_labels(HARBOUR, company=STUDIO))
            yield Event(now + 5 * HOUR, STUDIO, key_card)
    welcome = grant("credit_package", "10", description="Welcome")
    welcome.creator.CopyFrom(_MANAGER)
    welcome.labels.update(_labels(OLD_TOWN, company=BUREAU))
    yield Event(_START + 40 * DAY, BUREAU, welcome)


STORY = Story(
    slug="demo-spacebring",
    display_name="Example Coworking",
    uid=NETWORK,
    start=_OPENING,
    accounts=_ACCOUNTS,
    keys={ACCOUNTS_KEY: None, READONLY_KEY: None, KEY: None},
    events=[*_opening(), *_quarter()],
    refunds_and_transfers=list(_refunds_and_transfers()),
    narrow_keys={ACCOUNTS_KEY: ("accounts",), READONLY_KEY: ("transactions.readonly",)},
)
