"""Spacebring's `GET /transactions/credits/v1`."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

from daybook.facades.spacebring.v1 import transactions_service_pb2 as spacebring
from daybook.facades.spacebring.v1.transactions_service_pb2_grpc import (
    TransactionsServicer,
    add_TransactionsServicer_to_server,
)
from daybook.v1 import account_pb2 as native
from daybook.v1.transaction_pb2 import Booking, EventTicket, Order, Transaction
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from server.facades import Dependencies
from server.ledger import instants, money
from server.ledger.accounts import AccountWithState
from server.ledger.bodies import join_messages
from server.ledger.errors import (
    AccountNotPermitted,
    DaybookError,
    FieldInvalid,
    InvalidArgument,
    TenantNotPermitted,
)
from server.ledger.instants import Instant, from_timestamp
from server.ledger.money import Millionths
from server.ledger.paging import PAGE_BYTES_MAX, Page, TransactionFilter, TransactionKey, TransactionRow
from server.ledger.posting import Kind
from server.ledger.refunds import RefundTotal
from server.transport.auth import Scheme, authentication
from server.transport.call_metadata import call_metadata
from server.transport.calls import Context
from server.transport.errors import http_status_of, plain_message
from server.transport.page_tokens import Listing, PageTokens
from server.transport.rendered import cache_rendered
from server.transport.rest import is_uuid, read_integer
from server.usecases.transactions import NetworkPage, Transactions
from server.vendors.spacebring import VENDOR
from server.vendors.vendor import Refusal

NETWORK_HEADER = "spacebring-network-id"

LIMIT_DEFAULT = 25
LIMIT_MAX = 100

_Message = TypeVar("_Message", bound=Message)


class ByLots(NamedTuple):
    """The types of a kind and category that depend on which credits moved."""

    expiring: str
    """The type if only expiring credits moved."""
    other: str
    """The type otherwise, also if both expiring and permanent credits moved."""


TYPES: dict[tuple[Kind, str], str | ByLots] = {
    (Transaction.GRANT, "credit_package"): "creditPackage",
    (Transaction.GRANT, "subscription_renewal"): "subscriptionRenewal",
    (Transaction.CHARGE, "booking"): "booking",
    (Transaction.CHARGE, "event_ticket"): "eventTicket",
    (Transaction.CHARGE, "order"): "order",
    (Transaction.CHARGE, "admin_charge"): ByLots("chargeExpiringCredits", "chargePermanentCredits"),
    (Transaction.EXPIRATION, "expiration"): "subscriptionExpiration",
    (Transaction.REFUND, "refund"): "refund",
    # Imports of history post as adjustments what only Daybook itself or a call about another transaction can post.
    (Transaction.ADJUSTMENT, "expiration"): "subscriptionExpiration",
    (Transaction.ADJUSTMENT, "refund"): "refund",
    (Transaction.ADJUSTMENT, "transfer"): ByLots("transferExpiringCredits", "transferPermanentCredits"),
    (Transaction.TRANSFER_IN, "transfer"): ByLots("transferExpiringCredits", "transferPermanentCredits"),
    (Transaction.TRANSFER_OUT, "transfer"): ByLots("transferExpiringCredits", "transferPermanentCredits"),
}
"""Spacebring's type of each kind and category. Other transactions are not listed."""

STATUSES = {
    Transaction.SUCCEEDED: "succeeded",
    Transaction.FAILED: "failed",
    Transaction.CANCELED: "canceled",
}


class CreditsTransactions(TransactionsServicer):
    """Lists the credit transactions of a network."""

    def __init__(self, transactions: Transactions, page_tokens: PageTokens) -> None:
        self._transactions = transactions
        self._page_tokens = page_tokens

    async def GetCreditsTransactions(  # type: ignore[override]  # the answer is bytes
        self, request: spacebring.GetCreditsTransactionsRequest, context: Context
    ) -> bytes:
        """Parses, lists a page of the network's transactions, renders with their companies."""
        caller = authentication.get().caller
        _check_network()
        criteria, limit = _parse(request)
        listing = Listing.of(f"{VENDOR.service}/GetCreditsTransactions", caller, request, ("next_page_token", "limit"))
        after = self._page_tokens.open(listing, request.next_page_token, TransactionKey)
        page = _render_page(await self._transactions.list_network(caller, criteria, after, limit))
        token = None if page.next_key is None else self._page_tokens.seal(listing, page.next_key)
        rest = spacebring.GetCreditsTransactionsResponse(next_page_token=token).SerializeToString()
        return join_messages([body for _, body in page.rows]) + rest


def add_to_server(server: Any, dependencies: Dependencies) -> None:
    """Adds the servicer."""
    add_TransactionsServicer_to_server(CreditsTransactions(dependencies.transactions, dependencies.page_tokens), server)


def _check_network() -> None:
    """Checks the network header, which Bearer credentials need. It must name the caller's own network."""
    network = dict(call_metadata.get()).get(NETWORK_HEADER)
    if network is None:
        if authentication.get().scheme is Scheme.BEARER:
            raise FieldInvalid(NETWORK_HEADER, "is required with bearer token authentication")
        return
    if not isinstance(network, str) or not is_uuid(network):
        raise FieldInvalid(NETWORK_HEADER, "must be a uuid")
    if network.lower() != authentication.get().caller.tenant_uid:
        raise TenantNotPermitted


def _parse(request: spacebring.GetCreditsTransactionsRequest) -> tuple[TransactionFilter, int]:
    limit = read_integer(request.limit) if request.HasField("limit") else LIMIT_DEFAULT
    if limit is None or not 1 <= limit <= LIMIT_MAX:
        raise FieldInvalid("limit", f"must be a number between 1 and {LIMIT_MAX}")
    until = _parse_date("createDate[lte]", request.create_date_lte if request.HasField("create_date_lte") else None)
    criteria = TransactionFilter(
        kind_categories=tuple(TYPES),
        create_time_from=_parse_date(
            "createDate[gte]", request.create_date_gte if request.HasField("create_date_gte") else None
        ),
        create_time_before=None if until is None else until + 1,
        location=_parse_uuid("locationRef", request.location_ref if request.HasField("location_ref") else None),
        membership=_parse_uuid("membershipRef", request.membership_ref if request.HasField("membership_ref") else None),
        company=_parse_uuid("companyRef", request.company_ref if request.HasField("company_ref") else None),
    )
    return criteria, limit


def _parse_date(field: str, text: str | None) -> Instant | None:
    if text is None:
        return None
    try:
        return instants.parse(text)
    except ValueError as error:
        raise FieldInvalid(field, str(error)) from None


def _parse_uuid(field: str, text: str | None) -> str | None:
    if text is None:
        return None
    if not is_uuid(text):
        raise FieldInvalid(field, "must be a uuid")
    return text.lower()


def _render_page(network: NetworkPage) -> Page[tuple[TransactionRow, bytes], TransactionKey]:
    """Renders the rows of a page. Each is returned with its rendered transaction."""
    companies = {company: _render_if_company(account) for company, account in network.companies.items()}
    rows = []
    for row, company in zip(network.page.rows, network.company_ids, strict=True):
        refund = network.refunds.get((row.account_number, row.sequence))
        parts = (_render(row.body), companies.get(company, b""), b"" if refund is None else _render_refund(refund))
        # Concatenated serialized messages are one message with the fields of all.
        rows.append((row, b"".join(parts)))
    # Rendered rows contain whole companies, so the page may have to end earlier.
    page = Page(rows, network.page.next_key)
    return page.within(PAGE_BYTES_MAX, size=lambda each: len(each[1]), key=lambda each: each[0].key)


@cache_rendered
def _render(body: bytes) -> bytes:
    """A transaction without its company and its refund, which may still change."""
    transaction = Transaction.FromString(body)
    labels = dict(transaction.labels)
    expiring, permanent = _parts(transaction)
    rendered = spacebring.CreditsTransaction(
        amount=money.to_number(abs(expiring + permanent)),
        create_date=_date(transaction.create_time),
        id=transaction.uid,
        expiring_amount=money.to_number(abs(expiring)),
        permanent_amount=money.to_number(abs(permanent)),
        status=STATUSES[transaction.state],
        type=_type(transaction, permanent),
        description=transaction.description or None,
        company_ref=labels.get("company"),
        location_ref=labels.get("location"),
        membership_ref=labels.get("membership"),
        membership_ref_creator=transaction.creator.membership or None,
        user_ref_creator=transaction.creator.id or None,
        user_ref_owner=transaction.owner.id or None,
        user_creator=_render_user(transaction.creator) if transaction.HasField("creator") else None,
        user_owner=_render_user(transaction.owner) if transaction.HasField("owner") else None,
    )
    match transaction.WhichOneof("subject"):
        case "booking":
            rendered.booking.CopyFrom(_render_booking(transaction.booking))
        case "order":
            rendered.order.CopyFrom(_render_order(transaction.order))
        case "event_ticket":
            rendered.ticket.CopyFrom(_render_ticket(transaction.event_ticket))
    return rendered.SerializeToString()


def _render_refund(total: RefundTotal) -> bytes:
    """A transaction with only its refund."""
    refund = spacebring.Refund(amount=money.to_number(total.amount), create_date=instants.write(total.last_create_time))
    return spacebring.CreditsTransaction(refund=refund).SerializeToString()


def _parts(transaction: Transaction) -> tuple[Millionths, Millionths]:
    """The expiring and the permanent part of a transaction's amount.

    The amount of a failed or canceled transaction, which took nothing from any lot, counts as
    permanent, so that the parts always sum to the amount.
    """
    if transaction.state != Transaction.SUCCEEDED:
        return 0, money.parse(transaction.amount)
    return money.parse(transaction.expiring_amount), money.parse(transaction.permanent_amount)


def _type(transaction: Transaction, permanent: Millionths) -> str:
    named = TYPES[transaction.kind, transaction.category]
    if isinstance(named, ByLots):
        return named.other if permanent else named.expiring
    return named


def _unless_empty(part: _Message) -> _Message | None:
    """The part of a response, or None if it is empty, so that its field is left out."""
    return part if part.ListFields() else None


def _date(timestamp: Timestamp) -> str:
    return instants.write(from_timestamp(timestamp))


def _render_booking(booking: Booking) -> spacebring.Booking:
    return spacebring.Booking(
        id=booking.id,
        resource=_unless_empty(
            spacebring.Booking.Resource(id=booking.resource.id or None, title=booking.resource.title or None)
        ),
    )


def _render_order(order: Order) -> spacebring.Order:
    return spacebring.Order(
        id=order.id,
        option=_unless_empty(spacebring.Order.Option(id=order.option.id or None, name=order.option.name or None)),
        product=_unless_empty(spacebring.Order.Product(id=order.product.id or None, title=order.product.title or None)),
    )


def _render_ticket(ticket: EventTicket) -> spacebring.Ticket:
    event = ticket.event
    return spacebring.Ticket(
        id=ticket.id,
        create_date=_date(ticket.create_time) if ticket.HasField("create_time") else None,
        event=_unless_empty(
            spacebring.Ticket.Event(
                id=event.id or None,
                title=event.title or None,
                start_date=_date(event.start_time) if event.HasField("start_time") else None,
                end_date=_date(event.end_time) if event.HasField("end_time") else None,
            )
        ),
    )


def _render_user(user: native.User) -> spacebring.User:
    return spacebring.User(
        id=user.id,
        about=user.about or None,
        email=user.email or None,
        name=user.name or None,
        phone_number=user.phone_number or None,
        photo_url=user.photo_uri or None,
        surname=user.surname or None,
    )


def _render_if_company(account: AccountWithState) -> bytes:
    """A transaction with only its company; empty if the account is not a company's."""
    record, state = account
    if record.kind != native.Account.COMPANY:
        return b""
    return _render_company(
        record.id, record.display_name, record.create_time, record.profile, state.expiring, state.balance
    )


@cache_rendered
def _render_company(
    company_id: str,
    display_name: str,
    create_time: Instant,
    profile: bytes,
    expiring: Millionths,
    balance: Millionths,
) -> bytes:
    company = native.Account.FromString(profile).company
    address = company.business_address
    shown = spacebring.Company(
        id=company_id,
        title=company.title or display_name or None,
        legal_name=company.legal_name or None,
        tax_id=company.tax_id or None,
        billing_address=company.billing_address or None,
        business_address=_unless_empty(
            spacebring.Company.Address(
                city=address.city or None,
                country_code=address.country_code or None,
                line1=address.line1 or None,
                line2=address.line2 or None,
                postal_code=address.postal_code or None,
                state=address.state or None,
            )
        ),
        notes=company.notes or None,
        location_ref=company.location or None,
        subscription_ref=company.subscription or None,
        create_date=_date(company.create_time) if company.HasField("create_time") else instants.write(create_time),
        delete_date=_date(company.delete_time) if company.HasField("delete_time") else None,
        credits=spacebring.Company.Credits(
            expiring=money.to_number(expiring),
            permanent=money.to_number(balance - expiring),
        ),
        day_passes=spacebring.Company.DayPasses(expiring=company.expiring_day_passes)
        if company.HasField("expiring_day_passes")
        else None,
        metadata=company.metadata if company.HasField("metadata") else None,
    )
    return spacebring.CreditsTransaction(company=shown).SerializeToString()


def render_error(error: DaybookError) -> Refusal:
    """Renders an error as `{message, type}`."""
    match error:
        case InvalidArgument():
            message = f"{error.field} {error.problem}"
        case AccountNotPermitted():
            message = "the credential is not for the whole network"
        case _:
            message = plain_message(error)
    return VENDOR.refuse(http_status_of(error), message)
