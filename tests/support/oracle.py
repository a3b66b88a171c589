"""The expected content of each vendor's list in the demo, computed from the stories by the vendors' documentation.

It uses only the events of server.demo that are sent to the server, and no code of the server.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from decimal import ROUND_HALF_UP, Decimal

from daybook.v1.account_pb2 import User
from daybook.v1.transaction_pb2 import Transaction

from server.demo import dreadnode, nebulablock, spacebring, teable
from server.demo.story import Event, Story, demo_uuid
from tests.support.http_client import Json

SOURCE_TYPES = ("automation_ai_action", "ai_generation", "field_ai_generation", "ai_chat", "app_generation")
TRANSACTION_TYPES = {
    "purchase": Transaction.GRANT,
    "auto_refill": Transaction.GRANT,
    "usage": Transaction.CHARGE,
    "inference": Transaction.CHARGE,
    "span_ingestion": Transaction.CHARGE,
    "storage": Transaction.CHARGE,
    "signup_allocation": Transaction.GRANT,
    "refund": Transaction.REFUND,
    "admin_adjustment": Transaction.ADJUSTMENT,
    "web_search": Transaction.CHARGE,
}
SPACEBRING_TYPES = {
    (Transaction.GRANT, "credit_package"): "creditPackage",
    (Transaction.GRANT, "subscription_renewal"): "subscriptionRenewal",
    (Transaction.CHARGE, "booking"): "booking",
    (Transaction.CHARGE, "event_ticket"): "eventTicket",
    (Transaction.CHARGE, "order"): "order",
    # All credits of the quarter are permanent.
    (Transaction.CHARGE, "admin_charge"): "chargePermanentCredits",
}
_OF_COMPANY: dict[str, Json] = {"locationRef": spacebring.LIGHTHOUSE, "companyRef": spacebring.WORKSHOP}
_OF_ALL: dict[str, Json] = {**_OF_COMPANY, "membershipRef": spacebring.MEMBERSHIP_LIGHTHOUSE}
_OF_MEMBERSHIP: dict[str, Json] = {"membershipRef": spacebring.MEMBERSHIP_LIGHTHOUSE}
_OF_STALL: dict[str, Json] = {**_OF_MEMBERSHIP, "companyRef": spacebring.STALL}
# The opening of the lighthouse, computed by hand, newest first: time, type, amount, memo, refs, owner, creator, and a
# subject with the name of its id. Includes expirations, refunds and both sides of transfers.
_OPENING: tuple[tuple[str, str, str, str, dict[str, Json], str, str, str, str], ...] = (
    ("07-12T10:00:00.007220", "eventTicket", "0.5", "", _OF_MEMBERSHIP, "apprentice", "", "ticket", "ticket part 2"),
    ("07-12T09:00:00.007210", "eventTicket", "0.5", "", _OF_MEMBERSHIP, "apprentice", "", "ticket", "ticket part 1"),
    ("07-12T08:00:00.007200", "eventTicket", "0.5", "", _OF_MEMBERSHIP, "apprentice", "", "ticket", "ticket part 0"),
    ("07-11T09:00:00.006970", "order", "0.5", "", _OF_MEMBERSHIP, "apprentice", "", "order", "order part 1"),
    ("07-11T08:00:00.006960", "order", "0.5", "", _OF_MEMBERSHIP, "apprentice", "", "order", "order part 0"),
    ("07-10T09:00:00.006730", "booking", "0.5", "", _OF_MEMBERSHIP, "apprentice", "", "booking", "booking part 1"),
    ("07-10T08:00:00.006720", "booking", "0.5", "", _OF_MEMBERSHIP, "apprentice", "", "booking", "booking part 0"),
    ("07-09T08:00:00", "creditPackage", "30", "Card declined", _OF_COMPANY, "maker", "", "", ""),
    ("07-08T08:00:00.006240", "eventTicket", "0.5", "", _OF_STALL, "apprentice", "apprentice", "ticket", "bare ticket"),
    ("07-08T08:00:00", "chargePermanentCredits", "5000", "Damages", _OF_COMPANY, "maker", "manager", "", ""),
    ("07-07T08:00:00.006000", "order", "1", "", _OF_MEMBERSHIP, "apprentice", "", "order", "bare order"),
    ("07-07T08:00:00", "creditPackage", "12.345678", "A gift", _OF_COMPANY, "maker", "", "", ""),
    ("07-06T08:00:00", "chargePermanentCredits", "9", "Cleaning", _OF_COMPANY, "maker", "manager", "", ""),
    ("07-05T08:00:00", "creditPackage", "7", "7 credits to be used first", _OF_COMPANY, "maker", "", "", ""),
    ("07-04T08:00:00", "transferPermanentCredits", "6", "", _OF_ALL, "", "maker", "", ""),
    ("07-04T08:00:00", "transferPermanentCredits", "6", "", _OF_ALL, "", "maker", "", ""),
    ("07-03T08:00:00", "chargePermanentCredits", "3", "Lost key card", _OF_COMPANY, "maker", "manager", "", ""),
    ("07-02T08:00:00", "order", "2.25", "", _OF_COMPANY, "maker", "maker", "order", "order -1"),
    ("07-01T08:00:00", "subscriptionExpiration", "8.5", "", _OF_ALL, "", "", "", ""),
    ("07-01T08:00:00", "subscriptionExpiration", "70.5", "", _OF_COMPANY, "maker", "", "", ""),
    ("06-12T08:00:00", "booking", "1.5", "", _OF_MEMBERSHIP, "apprentice", "", "booking", "bare booking"),
    ("06-10T08:00:00", "eventTicket", "8", "", _OF_COMPANY, "maker", "", "ticket", "ticket -2"),
    ("06-09T08:00:00", "booking", "500", "Too few credits", _OF_COMPANY, "maker", "", "booking", "booking -2"),
    ("06-08T08:00:00", "eventTicket", "8", "", _OF_COMPANY, "maker", "maker", "ticket", "ticket -1"),
    ("06-07T08:00:00", "transferExpiringCredits", "10", "", _OF_ALL, "", "maker", "", ""),
    ("06-07T08:00:00", "transferExpiringCredits", "10", "", _OF_ALL, "", "maker", "", ""),
    ("06-06T08:00:00", "chargeExpiringCredits", "4", "Broken cup", _OF_COMPANY, "maker", "manager", "", ""),
    ("06-05T08:00:00", "refund", "7.5", "Refund of 7.5", _OF_COMPANY, "maker", "manager", "booking", "booking -1"),
    ("06-04T08:00:00", "refund", "5", "Refund of 5", _OF_COMPANY, "maker", "manager", "booking", "booking -1"),
    ("06-03T08:00:00", "booking", "20", "", _OF_COMPANY, "maker", "maker", "booking", "booking -1"),
    ("06-02T08:00:00", "creditPackage", "50", "50 credits", _OF_COMPANY, "maker", "maker", "", ""),
    ("06-01T08:00:00", "subscriptionRenewal", "100", "June", _OF_COMPANY, "maker", "", "", ""),
)
PAGED_TYPES = {Transaction.GRANT: "grant", Transaction.CHARGE: "charge", Transaction.ADJUSTMENT: "adjustment"}
# All hours of the stories are in October, when New York is four hours behind UTC.
_NEW_YORK_IN_OCTOBER = timezone(timedelta(hours=-4))


def _moment(event: Event) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=event.time)


def _newest_first(story: Story) -> list[Event]:
    """Sorts events, newest first. Events at the same time are ordered by account, newest first, then by position."""
    accounts = list(story.accounts)
    numbered = enumerate(story.events)
    ordered = sorted(
        numbered, key=lambda each: (each[1].time, accounts.index(each[1].account_id), each[0]), reverse=True
    )
    return [event for _, event in ordered]


def teable_records(month: str, source_type: str | None = None) -> list[dict[str, Json]]:
    """Returns the space's records of a month, newest first, without their ids."""
    return [
        {
            "sourceType": event.transaction.category,
            "amount": -Decimal(event.transaction.amount),
            "createdTime": _moment(event).strftime("%Y-%m-%dT%H:%M:%S.000Z"),
            "displayName": event.transaction.description or None,
            "user": _teable_user(event.transaction.creator) if event.transaction.HasField("creator") else None,
        }
        for event in _newest_first(teable.STORY)
        if event.account_id == teable.SPACE
        and event.transaction.kind == Transaction.CHARGE
        and event.transaction.category in ((source_type,) if source_type else SOURCE_TYPES)
        and _moment(event).strftime("%Y-%m") == month
    ]


def _teable_user(user: User) -> Json:
    return {"id": user.id, "name": user.name, "avatar": user.photo_uri or None}


def nebulablock_hours(user: str) -> list[dict[str, Json]]:
    """Returns the user's hours, newest first."""
    begin = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=nebulablock.STORY.start)
    hours: dict[int, dict[str, Decimal]] = {}
    for event in nebulablock.STORY.events:
        if event.account_id == user and event.transaction.category in ("computing", "serverless"):
            hour = (_moment(event) - begin) // timedelta(hours=1)
            amounts = hours.setdefault(hour, {"computing": Decimal(0), "serverless": Decimal(0)})
            amounts[event.transaction.category] -= Decimal(event.transaction.amount)

    def wall_time(hour: int) -> str:
        return (begin + timedelta(hours=hour)).astimezone(_NEW_YORK_IN_OCTOBER).strftime("EST %Y-%m-%d %H:%M:%S")

    return [
        {
            "user_id": Decimal(user),
            "computing_amount": amounts["computing"],
            "serverless_amount": amounts["serverless"],
            "create_time": wall_time(hour),
            "update_time": wall_time(hour + 1),
            "total": amounts["computing"] + amounts["serverless"],
        }
        for hour, amounts in sorted(hours.items(), reverse=True)
    ]


def nebulablock_balance(user: str) -> Decimal:
    """Returns the user's balance."""
    amounts = (Decimal(event.transaction.amount) for event in nebulablock.STORY.events if event.account_id == user)
    return sum(amounts, Decimal(0))


def spacebring_transactions(
    *,
    location: str | None = None,
    membership: str | None = None,
    company: str | None = None,
    first: datetime | None = None,
    last: datetime | None = None,
) -> list[dict[str, Json]]:
    """Returns the network's transactions, newest first, each with its distinguishing fields."""
    refs = {"locationRef": location, "membershipRef": membership, "companyRef": company}

    def matches(row: dict[str, Json]) -> bool:
        moment = datetime.fromisoformat(str(row["createDate"]))
        return (
            all(row.get(name) == value for name, value in refs.items() if value is not None)
            and (first is None or moment >= first)
            and (last is None or moment <= last)
        )

    quarter = [
        _spacebring_transaction(event)
        for event in _newest_first(spacebring.STORY)
        if event.account_id not in (spacebring.WORKSHOP, spacebring.MEMBERSHIP_LIGHTHOUSE)
    ]
    return [row for row in (*quarter, *_opening()) if matches(row)]


def _opening() -> Iterator[dict[str, Json]]:
    for time, kind, amount, description, refs, owner, creator, subject, subject_id in _OPENING:
        optional: dict[str, Json] = {
            "description": description or None,
            "userRefOwner": owner and demo_uuid(f"user {owner}"),
            "userRefCreator": creator and demo_uuid(f"user {creator}"),
            subject: {"id": demo_uuid(subject_id)},
        }
        yield {
            "amount": Decimal(amount),
            "createDate": f"2024-{time}Z" if "." in time else f"2024-{time}.000000Z",
            "type": kind,
            **refs,
            **{name: value for name, value in optional.items() if name and value},
        }


def _spacebring_transaction(event: Event) -> dict[str, Json]:
    transaction = event.transaction
    subjects: Iterator[tuple[str, Json]] = (
        (shown, {"id": getattr(transaction, name).id})
        for name, shown in (("booking", "booking"), ("order", "order"), ("event_ticket", "ticket"))
        if transaction.HasField(name)  # type: ignore[arg-type]  # each is a field of Transaction
    )
    optional: dict[str, Json] = {
        "locationRef": transaction.labels.get("location"),
        "membershipRef": transaction.labels.get("membership"),
        "companyRef": transaction.labels.get("company"),
        "description": transaction.description or None,
        "userRefOwner": transaction.owner.id or None,
        "userRefCreator": transaction.creator.id or None,
    }
    return {
        "amount": abs(Decimal(transaction.amount)),
        "createDate": _moment(event).strftime("%Y-%m-%dT%H:%M:%S.000000Z"),
        "type": SPACEBRING_TYPES[transaction.kind, transaction.category],
        **dict(subjects),
        **{name: value for name, value in optional.items() if value is not None},
    }


def dreadnode_transactions(*types: str) -> list[dict[str, Json]]:
    """Returns the organization's transactions of these types, newest first, without their ids."""
    return [
        _dreadnode_transaction(event)
        for event in _newest_first(dreadnode.STORY)
        if event.account_id == dreadnode.ORGANIZATION
        and event.transaction.category in (types or TRANSACTION_TYPES)
        and event.transaction.kind == TRANSACTION_TYPES[event.transaction.category]
    ]


def _dreadnode_transaction(event: Event) -> dict[str, Json]:
    transaction = event.transaction
    usage = transaction.usage if transaction.HasField("usage") else None
    return {
        "amount": Decimal(transaction.amount).quantize(Decimal(1), ROUND_HALF_UP),
        "created_at": _moment(event).strftime("%Y-%m-%dT%H:%M:%S.000000Z"),
        "transaction_type": transaction.category,
        "has_receipt": transaction.receipt_uri != "",
        "description": transaction.description or None,
        "inference_cost_usd": Decimal(usage.cost_usd) if usage else None,
        "input_tokens": Decimal(usage.input_tokens) if usage else None,
        "output_tokens": Decimal(usage.output_tokens) if usage else None,
        "model": usage.model if usage else None,
    }


def paged_transactions(story: Story, account_id: str) -> list[dict[str, Json]]:
    """Returns the account's transactions, newest first, without their ids."""
    balance = Decimal(0)
    shown: list[dict[str, Json]] = []
    for event in reversed(_newest_first(story)):
        if event.account_id != account_id:
            continue
        transaction = event.transaction
        balance += Decimal(transaction.amount)
        shown.append(
            {
                "created": _moment(event).strftime("%Y-%m-%dT%H:%M:%S.000000Z"),
                "type": PAGED_TYPES[transaction.kind],
                "category": transaction.category,
                "status": "succeeded",
                "amount": transaction.amount,
                "balance": f"{balance.normalize():f}",
                "description": transaction.description or None,
            }
        )
    return shown[::-1]
