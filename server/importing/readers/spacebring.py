"""Spacebring's `GET /transactions/credits/v1`: the credits of companies and memberships of a network."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any

from daybook_client import (
    AccountKind,
    Address,
    Booking,
    BookingResource,
    Company,
    Event,
    EventTicket,
    NewTransaction,
    Order,
    OrderOption,
    OrderProduct,
    PastTransaction,
    TransactionKind,
    TransactionState,
    User,
)
from server.importing import fields
from server.importing.found import (
    Difference,
    Found,
    NewAccount,
    Options,
    Page,
    Problem,
    Reader,
    Row,
    RowInvalid,
    Seen,
    ShownBalance,
    bearer,
)
from server.importing.http import Api

PAGE_ROWS = 100
PATH = "/transactions/credits/v1"
STATES = {name.lower(): TransactionState(name) for name in ("SUCCEEDED", "FAILED", "CANCELED")}
TRANSFERS = ("transferExpiringCredits", "transferPermanentCredits")
GRANT, CHARGE, ADJUSTMENT = TransactionKind.GRANT, TransactionKind.CHARGE, TransactionKind.ADJUSTMENT
KINDS: Mapping[str, tuple[TransactionKind, str, int]] = {
    "creditPackage": (GRANT, "credit_package", 1),
    "subscriptionRenewal": (GRANT, "subscription_renewal", 1),
    "booking": (CHARGE, "booking", -1),
    "eventTicket": (CHARGE, "event_ticket", -1),
    "order": (CHARGE, "order", -1),
    "chargeExpiringCredits": (CHARGE, "admin_charge", -1),
    "chargePermanentCredits": (CHARGE, "admin_charge", -1),
    # Rows don't say which lot expired, which charge is refunded and which transfer they belong to.
    "subscriptionExpiration": (ADJUSTMENT, "expiration", -1),
    "refund": (ADJUSTMENT, "refund", 1),
    "transferExpiringCredits": (ADJUSTMENT, "transfer", 0),
    "transferPermanentCredits": (ADJUSTMENT, "transfer", 0),
}
"""The kind, the category and the sign of each type. The sign of a transfer is that of its side."""


def headers(token: str, options: Options) -> Mapping[str, str]:
    """An access token needs the network; without one the token is `client_id:client_secret`."""
    if options.network:
        return {**bearer(token, options), "spacebring-network-id": options.network}
    if ":" not in token:
        raise ValueError("give --network with an access token, or client_id:client_secret as the token")
    return {"authorization": f"Basic {b64encode(token.encode()).decode()}"}


def pages(api: Api, options: Options) -> Iterator[Page]:
    """Reads pages by their tokens."""
    parameters: dict[str, str | int] = {"limit": PAGE_ROWS}
    if options.since is not None:
        parameters["createDate[gte]"] = options.since.isoformat().replace("+00:00", "Z")
    token, number = "", 0
    while number == 0 or token:
        number += 1
        content = api.get(PATH, **parameters, **({"nextPageToken": token} if token else {}))
        yield Page(api.place(PATH, number), content)
        token = fields.next_token(content, "nextPageToken", token)


def rows(pages: Iterable[Page], options: Options) -> Iterator[Found]:
    """Reads transactions, with the companies and people that they name."""
    network = _Network(options)
    for page in pages:
        for number, row in enumerate(fields.rows_of(page.place, fields.member(page.content, "transactions")), 1):
            place = f"{page.place}, row {number}"
            try:
                yield from network.read(place, row)
            except RowInvalid as error:
                yield Problem(place, str(error))
    for place in network.transfers.values():
        yield Problem(place, "is one side of a transfer without the other, so its direction is unknown")


class _Network:
    """The accounts of the pages so far, and transfers of which one side was read."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._accounts = Seen()
        self._sides: set[str] = set()
        self.transfers: dict[tuple[object, ...], str] = {}
        """The place of the first side of each transfer."""

    def read(self, place: str, row: Any) -> Iterator[Found]:
        type_ = fields.required(row, "type")
        kind, category, sign = fields.one_of(row, "type", KINDS)
        id_ = fields.required(row, "id")
        company, membership = fields.text(row, "companyRef").lower(), fields.text(row, "membershipRef").lower()
        owner = _user(row, "userOwner", "userRefOwner")
        account = company or membership or (owner.id if owner else "")
        if type_ in TRANSFERS:
            if id_ in self._sides:
                # The row moved to a later page while the pages were read.
                return
            self._sides.add(id_)
            sign, account = self._side(place, row, company, membership)
        elif type_ == "subscriptionExpiration" and owner is None and membership:
            # Only credits of a transfer have no owner, and the membership received them.
            account = membership
        if not account:
            raise RowInvalid("has no companyRef, membershipRef and userRefOwner: its account is unknown")
        past, expiring = self._past(row, fields.account_id(account), (kind, category, sign), owner)
        yield from self._account(row, account, company, owner)
        yield Row(past, expiring, place=place)
        if fields.member(row, "refund") is not None:
            yield Difference(place, "shows no refund: an imported refund is not linked to its charge")

    def _side(self, place: str, row: Any, company: str, membership: str) -> tuple[int, str]:
        """The sign and the account of a side. The company pays the membership; the receiving side is listed first."""
        if not company or not membership:
            raise RowInvalid("is a transfer without companyRef and membershipRef, so its direction is unknown")
        key = (
            fields.text(row, "createDate"),
            fields.text(row, "type"),
            fields.number(row, "amount"),
            company,
            membership,
        )
        if key in self.transfers:
            del self.transfers[key]
            return -1, company
        self.transfers[key] = place
        return 1, membership

    def _past(
        self, row: Any, account: str, kind_category_sign: tuple[TransactionKind, str, int], owner: User | None
    ) -> tuple[PastTransaction, Decimal]:
        kind, category, sign = kind_category_sign
        expiring = fields.number(row, "expiringAmount") or Decimal(0)
        permanent = fields.number(row, "permanentAmount")
        if permanent is None:
            permanent = fields.required_number(row, "amount") - expiring
        state = fields.one_of(row, "status", STATES) if fields.text(row, "status") else TransactionState.SUCCEEDED
        if sign > 0 and expiring and permanent:
            raise RowInvalid("adds both expiring and permanent credits")
        labels = {
            name: value
            for name, field in (("location", "locationRef"), ("membership", "membershipRef"), ("company", "companyRef"))
            if (value := fields.text(row, field).lower())
        }
        creator = _user(row, "userCreator", "userRefCreator", fields.text(row, "membershipRefCreator"))
        transaction = NewTransaction(
            kind,
            category,
            sign * (expiring + permanent),
            state=state,
            description=fields.text(row, "description"),
            owner=owner,
            creator=creator,
            labels=labels,
            expire_time=self._options.expire_time if sign > 0 and expiring else None,
            **_subject(row),
        )
        time = fields.required_time(row, "createDate")
        past = PastTransaction(f"accounts/{account}", transaction, time, f"spacebring:{fields.required(row, 'id')}")
        return past, sign * expiring

    def _account(self, row: Any, account: str, company: str, owner: User | None) -> Iterator[Found]:
        shown = fields.member(row, "company")
        if shown is not None and self._accounts.is_new(company):
            profile = _company(shown)
            yield NewAccount(
                id=fields.account_id(company), kind=AccountKind.COMPANY, display_name=profile.title, company=profile
            )
            balance = fields.member(shown, "credits")
            if balance is not None:
                expiring = fields.number(balance, "expiring") or Decimal(0)
                yield ShownBalance(company, fields.required_number(balance, "permanent"), expiring)
        if account != company and self._accounts.is_new(account):
            kind = AccountKind.MEMBERSHIP if fields.text(row, "membershipRef").lower() == account else AccountKind.USER
            yield NewAccount(id=account, kind=kind, user=owner)


def _user(row: Any, name: str, reference: str, membership: str = "") -> User | None:
    shown = fields.member(row, name)
    id_ = fields.text(shown, "id") or fields.text(row, reference)
    if not id_:
        return None
    return User(
        id=id_,
        name=fields.text(shown, "name"),
        surname=fields.text(shown, "surname"),
        email=fields.text(shown, "email"),
        phone_number=fields.text(shown, "phoneNumber"),
        photo_uri=fields.text(shown, "photoUrl"),
        about=fields.text(shown, "about"),
        membership=membership,
    )


def _company(shown: Any) -> Company:
    address = fields.member(shown, "businessAddress")
    return Company(
        title=fields.text(shown, "title"),
        legal_name=fields.text(shown, "legalName"),
        tax_id=fields.text(shown, "taxId"),
        billing_address=fields.text(shown, "billingAddress"),
        business_address=None
        if address is None
        else Address(
            line1=fields.text(address, "line1"),
            line2=fields.text(address, "line2"),
            city=fields.text(address, "city"),
            state=fields.text(address, "state"),
            postal_code=fields.text(address, "postalCode"),
            country_code=fields.text(address, "countryCode"),
        ),
        notes=fields.text(shown, "notes"),
        location=fields.text(shown, "locationRef"),
        subscription=fields.text(shown, "subscriptionRef"),
        expiring_day_passes=fields.integer(fields.member(shown, "dayPasses"), "expiring"),
        metadata=_plain(fields.member(shown, "metadata")),
        create_time=fields.time(shown, "createDate"),
        delete_time=fields.time(shown, "deleteDate"),
    )


def _plain(value: Any) -> Any:
    """A JSON value with floats instead of exact decimals, as metadata has them."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return float(value) if isinstance(value, Decimal) else value


def _subject(row: Any) -> dict[str, Any]:
    booking, order, ticket = (fields.member(row, name) for name in ("booking", "order", "ticket"))
    if booking is not None:
        resource = fields.member(booking, "resource")
        shown = None
        if resource is not None:
            shown = BookingResource(id=fields.text(resource, "id"), title=fields.text(resource, "title"))
        return {"booking": Booking(id=fields.required(booking, "id"), resource=shown)}
    if order is not None:
        product, option = fields.member(order, "product"), fields.member(order, "option")
        return {
            "order": Order(
                id=fields.required(order, "id"),
                product=None
                if product is None
                else OrderProduct(id=fields.text(product, "id"), title=fields.text(product, "title")),
                option=None
                if option is None
                else OrderOption(id=fields.text(option, "id"), name=fields.text(option, "name")),
            )
        }
    if ticket is not None:
        return {"event_ticket": _ticket(ticket)}
    return {}


def _ticket(ticket: Any) -> EventTicket:
    event = fields.member(ticket, "event")
    times: Mapping[str, datetime | None] = {name: fields.time(event, name) for name in ("startDate", "endDate")}
    shown = None
    if event is not None:
        shown = Event(
            id=fields.text(event, "id"),
            title=fields.text(event, "title"),
            start_time=times["startDate"],
            end_time=times["endDate"],
        )
    return EventTicket(id=fields.required(ticket, "id"), create_time=fields.time(ticket, "createDate"), event=shown)


READER = Reader("Spacebring", "https://api.spacebring.com", headers, pages, rows)
