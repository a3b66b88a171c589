"""The golden exchanges show every documented field of the vendors, and no undocumented one.

Each list below has the fields of a documented response. Some exchange must show each field with a value
of its type; for an optional or nullable field, another must show it absent or null.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from decimal import Decimal

import pytest

from tests.support.golden import FILES, read_exchanges
from tests.support.http_client import Json, read_json

ALWAYS, OPTIONAL, NULLABLE = "always there", "may be left out", "may be null"
TEXT, UUID, NUMBER, FLAG, DATE, PART, LIST, ANYTHING = (
    "text",
    "uuid",
    "number",
    "flag",
    "date",
    "object",
    "array",
    "anything",
)

Field = tuple[str, str]

_USER: dict[str, Field] = {
    "about": (TEXT, OPTIONAL),
    "email": (TEXT, OPTIONAL),
    "id": (UUID, ALWAYS),
    "name": (TEXT, OPTIONAL),
    "phoneNumber": (TEXT, OPTIONAL),
    "photoUrl": (TEXT, OPTIONAL),
    "surname": (TEXT, OPTIONAL),
}

FIELDS: dict[str, dict[str, Field]] = {
    "teable": {
        "data": (LIST, ALWAYS),
        "data.id": (UUID, ALWAYS),
        "data.sourceType": (TEXT, ALWAYS),
        "data.amount": (NUMBER, ALWAYS),
        "data.createdTime": (DATE, ALWAYS),
        "data.displayName": (TEXT, NULLABLE),
        "data.user": (PART, NULLABLE),
        "data.user.id": (TEXT, ALWAYS),
        "data.user.name": (TEXT, ALWAYS),
        "data.user.avatar": (TEXT, NULLABLE),
        "nextCursor": (TEXT, NULLABLE),
    },
    "nebulablock": {
        "data": (PART, ALWAYS),
        "data.credit_balance": (NUMBER, ALWAYS),
        "data.credit_history": (LIST, ALWAYS),
        "data.credit_history.user_id": (NUMBER, ALWAYS),
        "data.credit_history.computing_amount": (NUMBER, ALWAYS),
        "data.credit_history.serverless_amount": (NUMBER, ALWAYS),
        "data.credit_history.create_time": (TEXT, ALWAYS),
        "data.credit_history.update_time": (TEXT, ALWAYS),
        "data.credit_history.total": (NUMBER, ALWAYS),
        "data.total_credit_histories": (NUMBER, ALWAYS),
        "message": (TEXT, ALWAYS),
        "status": (TEXT, ALWAYS),
    },
    "spacebring": {
        "nextPageToken": (TEXT, OPTIONAL),
        "transactions": (LIST, ALWAYS),
        "transactions.amount": (NUMBER, ALWAYS),
        "transactions.booking": (PART, OPTIONAL),
        "transactions.booking.id": (UUID, ALWAYS),
        "transactions.booking.resource": (PART, OPTIONAL),
        "transactions.booking.resource.id": (UUID, OPTIONAL),
        "transactions.booking.resource.title": (TEXT, OPTIONAL),
        "transactions.company": (PART, OPTIONAL),
        "transactions.company.billingAddress": (TEXT, OPTIONAL),
        "transactions.company.businessAddress": (PART, OPTIONAL),
        "transactions.company.businessAddress.city": (TEXT, OPTIONAL),
        "transactions.company.businessAddress.countryCode": (TEXT, OPTIONAL),
        "transactions.company.businessAddress.line1": (TEXT, OPTIONAL),
        "transactions.company.businessAddress.line2": (TEXT, OPTIONAL),
        "transactions.company.businessAddress.postalCode": (TEXT, OPTIONAL),
        "transactions.company.businessAddress.state": (TEXT, OPTIONAL),
        "transactions.company.createDate": (DATE, ALWAYS),
        "transactions.company.credits": (PART, ALWAYS),
        "transactions.company.credits.expiring": (NUMBER, ALWAYS),
        "transactions.company.credits.permanent": (NUMBER, ALWAYS),
        "transactions.company.dayPasses": (PART, OPTIONAL),
        "transactions.company.dayPasses.expiring": (NUMBER, ALWAYS),
        "transactions.company.deleteDate": (DATE, OPTIONAL),
        # The page gives no format, but companyRef, a UUID, refers to this id.
        "transactions.company.id": (UUID, ALWAYS),
        "transactions.company.legalName": (TEXT, OPTIONAL),
        "transactions.company.locationRef": (UUID, OPTIONAL),
        "transactions.company.metadata": (ANYTHING, OPTIONAL),
        "transactions.company.notes": (TEXT, OPTIONAL),
        "transactions.company.subscriptionRef": (UUID, OPTIONAL),
        "transactions.company.taxId": (TEXT, OPTIONAL),
        "transactions.company.title": (TEXT, OPTIONAL),
        "transactions.companyRef": (UUID, OPTIONAL),
        "transactions.createDate": (DATE, ALWAYS),
        "transactions.description": (TEXT, OPTIONAL),
        "transactions.expiringAmount": (NUMBER, ALWAYS),
        "transactions.id": (UUID, ALWAYS),
        "transactions.locationRef": (UUID, OPTIONAL),
        "transactions.membershipRef": (UUID, OPTIONAL),
        "transactions.membershipRefCreator": (UUID, OPTIONAL),
        "transactions.order": (PART, OPTIONAL),
        "transactions.order.id": (UUID, ALWAYS),
        "transactions.order.option": (PART, OPTIONAL),
        "transactions.order.option.id": (UUID, OPTIONAL),
        "transactions.order.option.name": (TEXT, OPTIONAL),
        "transactions.order.product": (PART, OPTIONAL),
        "transactions.order.product.id": (UUID, OPTIONAL),
        "transactions.order.product.title": (TEXT, OPTIONAL),
        "transactions.permanentAmount": (NUMBER, ALWAYS),
        "transactions.refund": (PART, OPTIONAL),
        "transactions.refund.amount": (NUMBER, ALWAYS),
        "transactions.refund.createDate": (DATE, ALWAYS),
        "transactions.status": (TEXT, ALWAYS),
        "transactions.ticket": (PART, OPTIONAL),
        "transactions.ticket.createDate": (DATE, OPTIONAL),
        "transactions.ticket.event": (PART, OPTIONAL),
        "transactions.ticket.event.endDate": (DATE, OPTIONAL),
        "transactions.ticket.event.id": (UUID, OPTIONAL),
        "transactions.ticket.event.startDate": (DATE, OPTIONAL),
        "transactions.ticket.event.title": (TEXT, OPTIONAL),
        "transactions.ticket.id": (UUID, ALWAYS),
        "transactions.type": (TEXT, ALWAYS),
        "transactions.userCreator": (PART, OPTIONAL),
        **{f"transactions.userCreator.{name}": field for name, field in _USER.items()},
        "transactions.userOwner": (PART, OPTIONAL),
        **{f"transactions.userOwner.{name}": field for name, field in _USER.items()},
        "transactions.userRefCreator": (UUID, OPTIONAL),
        "transactions.userRefOwner": (UUID, OPTIONAL),
    },
    "dreadnode": {
        "id": (UUID, ALWAYS),
        "amount": (NUMBER, ALWAYS),
        "created_at": (DATE, ALWAYS),
        "transaction_type": (TEXT, ALWAYS),
        "has_receipt": (FLAG, ALWAYS),
        "description": (TEXT, NULLABLE),
        "inference_cost_usd": (NUMBER, NULLABLE),
        "input_tokens": (NUMBER, NULLABLE),
        "output_tokens": (NUMBER, NULLABLE),
        "model": (TEXT, NULLABLE),
    },
    # From the vendor's SDK; no page documents it.
    "dreadnode-balance": {
        "balance": (NUMBER, ALWAYS),
        "is_low_balance": (FLAG, ALWAYS),
        "auto_refill_enabled": (FLAG, ALWAYS),
    },
}

_DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.(\d{3}|\d{6})Z")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|<uuid7(: [^<>]+)?>")
_TYPES_OF_PYTHON = {Decimal: NUMBER, bool: FLAG, dict: PART, list: LIST, type(None): NULLABLE}


def type_of(value: Json) -> str:
    """The type of a value, in the terms of the lists above."""
    if isinstance(value, str):
        return DATE if _DATE.fullmatch(value) else UUID if _UUID.fullmatch(value) else TEXT
    return _TYPES_OF_PYTHON[type(value)]


def occurrences(fields: dict[str, Field], place: str, value: Json) -> Iterator[tuple[str, str]]:
    """Every field in a body with its type, and every absent field with OPTIONAL."""
    if fields.get(place, ("", ""))[0] == ANYTHING:
        return
    if isinstance(value, list):
        for element in value:
            yield from occurrences(fields, place, element)
    elif isinstance(value, dict):
        here = {path for path in fields if path.rpartition(".")[0] == place}
        inside = {f"{place}.{name}".lstrip("."): part for name, part in value.items()}
        for path in here - inside.keys():
            yield path, OPTIONAL
        for path, part in inside.items():
            yield path, ANYTHING if fields.get(path, ("", ""))[0] == ANYTHING else type_of(part)
            yield from occurrences(fields, path, part)


@pytest.mark.parametrize("vendor", FIELDS)
def test_exchanges_show_every_documented_field(vendor: str) -> None:
    """The exchanges together show exactly the documented fields, with their types, absences and nulls."""
    fields = FIELDS[vendor]
    found: dict[str, set[str]] = defaultdict(set)
    for file in FILES:
        for exchange in read_exchanges(file) if file.parent.name == vendor.partition("-")[0] else ():
            is_balance = re.search(r"/credits/?(\?|$)", exchange.target) is not None
            if exchange.status == 200 and exchange.body and is_balance == vendor.endswith("-balance"):
                for path, what in occurrences(fields, "", read_json(exchange.body)):
                    found[path].add(what)
    expected = {path: {what} | {presence} - {ALWAYS} for path, (what, presence) in fields.items()}
    differing = {path for path in found.keys() | expected.keys() if found[path] != expected.get(path)}
    assert {path: found[path] for path in differing} == {path: expected.get(path) for path in differing}
