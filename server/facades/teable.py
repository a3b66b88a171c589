"""Teable's `GET /api/space/{spaceId}/billing/credit-history`."""

from __future__ import annotations

from typing import Any

from daybook.facades.teable.v1.billing_service_pb2 import (
    GetSpaceCreditHistoryRequest,
    GetSpaceCreditHistoryResponse,
)
from daybook.facades.teable.v1.billing_service_pb2_grpc import BillingServicer, add_BillingServicer_to_server
from daybook.v1.account_pb2 import User
from daybook.v1.transaction_pb2 import Transaction
from google.protobuf.struct_pb2 import Struct, Value

from server.facades import Dependencies
from server.ledger import money
from server.ledger.errors import (
    AccountNotFound,
    AccountNotPermitted,
    DaybookError,
    FieldInvalid,
    InvalidArgument,
    PageTokenInvalid,
    PageTokenMismatch,
    ScopeMissing,
)
from server.ledger.instants import from_timestamp, parse_month, write_milliseconds
from server.ledger.paging import Order, OrderField, TransactionFilter, TransactionKey
from server.ledger.posting import Kind
from server.transport.auth import current_caller
from server.transport.calls import Context
from server.transport.errors import http_status_of, plain_message
from server.transport.page_tokens import Listing, PageTokens
from server.transport.rendered import cache_rendered
from server.transport.rest import echo, null, read_integer, text_or_null
from server.usecases.transactions import Transactions
from server.vendors.teable import VENDOR
from server.vendors.vendor import Refusal

TYPES: dict[tuple[Kind, str], str] = {
    (Transaction.CHARGE, "automation_ai_action"): "automation_ai_action",
    (Transaction.CHARGE, "ai_generation"): "ai_generation",
    (Transaction.CHARGE, "field_ai_generation"): "field_ai_generation",
    (Transaction.CHARGE, "ai_chat"): "ai_chat",
    (Transaction.CHARGE, "app_generation"): "app_generation",
}
"""Teable's source type of each kind and category. Other transactions are not listed."""
ORDERS_BY = {"createdTime": OrderField.CREATE_TIME, "amount": OrderField.AMOUNT}
ORDERS = ("asc", "desc")
TAKE_DEFAULT = 50
TAKE_MAX = 100


class Billing(BillingServicer):
    """Lists the credits that a space consumed."""

    def __init__(self, transactions: Transactions, page_tokens: PageTokens) -> None:
        self._transactions = transactions
        self._page_tokens = page_tokens

    async def GetSpaceCreditHistory(  # type: ignore[override]  # the answer is bytes
        self, request: GetSpaceCreditHistoryRequest, context: Context
    ) -> bytes:
        """Parses, lists a page of the space's charges, renders."""
        caller = current_caller()
        listing = Listing.of(f"{VENDOR.service}/GetSpaceCreditHistory", caller, request, ("cursor", "take"))
        try:
            criteria, order, take = _parse(request)
            after = self._page_tokens.open(listing, request.cursor, TransactionKey)
        except InvalidArgument:
            # As at Teable, a space that the caller may not read is refused before any parameter.
            await self._transactions.require_account(caller, request.space_id)
            raise
        page = await self._transactions.list(caller, request.space_id, criteria, after, take, order)
        cursor = null() if page.next_key is None else text_or_null(self._page_tokens.seal(listing, page.next_key))
        # Concatenated serialized messages are one message with the fields of all.
        rest = GetSpaceCreditHistoryResponse(next_cursor=cursor).SerializeToString()
        return b"".join([*(_render(row.body) for row in page.rows), rest])


def add_to_server(server: Any, dependencies: Dependencies) -> None:
    """Adds the servicer."""
    add_BillingServicer_to_server(Billing(dependencies.transactions, dependencies.page_tokens), server)


def _parse(request: GetSpaceCreditHistoryRequest) -> tuple[TransactionFilter, Order, int]:
    problems: dict[str, str] = {}
    month = 0
    if not request.HasField("month"):
        problems["month"] = "Required"
    else:
        try:
            month = parse_month(request.month)
        except ValueError:
            problems["month"] = "Invalid"
    take = read_integer(request.take) if request.HasField("take") else TAKE_DEFAULT
    if take is None:
        problems["take"] = "Expected number, received nan"
    elif take < 1:
        problems["take"] = "Number must be greater than or equal to 1"
    elif take > TAKE_MAX:
        problems["take"] = f"Number must be less than or equal to {TAKE_MAX}"
    for name, is_given, value, allowed in (
        ("sourceType", request.HasField("source_type"), request.source_type, tuple(TYPES.values())),
        ("orderBy", request.HasField("order_by"), request.order_by, tuple(ORDERS_BY)),
        ("order", request.HasField("order"), request.order, ORDERS),
    ):
        if is_given and value not in allowed:
            expected = " | ".join(f"'{text}'" for text in allowed)
            problems[name] = f"Invalid enum value. Expected {expected}, received '{echo(value)}'"
    if problems or take is None:
        raise FieldInvalid(
            next(iter(problems)), "; ".join(f'{problem} at "{name}"' for name, problem in problems.items())
        )
    criteria = TransactionFilter(
        kind_categories=tuple(pair for pair, name in TYPES.items() if request.source_type in ("", name)),
        # A record has no status, so a failed charge would look like a successful one.
        states=(Transaction.SUCCEEDED,),
        month=month,
    )
    order_by = ORDERS_BY[request.order_by or "createdTime"]
    descending = (request.order or "desc") == "desc"
    # A consumption is a negated amount, so its order is reversed.
    return criteria, Order(order_by, descending != (order_by is OrderField.AMOUNT)), take


@cache_rendered
def _render(body: bytes) -> bytes:
    """A response with only this transaction."""
    transaction = Transaction.FromString(body)
    record = GetSpaceCreditHistoryResponse.Record(
        id=transaction.uid,
        source_type=TYPES[transaction.kind, transaction.category],
        amount=money.to_number(-money.parse(transaction.amount)),
        created_time=write_milliseconds(from_timestamp(transaction.create_time)),
        display_name=text_or_null(transaction.description),
        user=_render_user(transaction.creator) if transaction.HasField("creator") else null(),
    )
    return GetSpaceCreditHistoryResponse(data=[record]).SerializeToString()


def _render_user(user: User) -> Value:
    fields = {
        "id": Value(string_value=user.id),
        "name": Value(string_value=f"{user.name} {user.surname}".strip()),
        "avatar": text_or_null(user.photo_uri),
    }
    return Value(struct_value=Struct(fields=fields))


def render_error(error: DaybookError) -> Refusal:
    """Renders an error as `{message, status, code}`. As at Teable, a missing or foreign space is 403."""
    status, message = http_status_of(error), plain_message(error)
    match error:
        case AccountNotPermitted(metadata={"account": account}):
            message = f"not allowed to operate space|read on {account.removeprefix('accounts/')}"
        case ScopeMissing(request=GetSpaceCreditHistoryRequest() as request):
            message = f"not allowed to operate space|read on {request.space_id}"
        case AccountNotFound(metadata={"account": account}):
            status, message = 403, f"space {account.removeprefix('accounts/')} is not found"
        case FieldInvalid(field=field, problem=problem):
            # The problems that _parse finds name their fields.
            where = f' at "{field}"'
            message = f"Validation error: {problem}" if where in problem else f"Validation error: Invalid{where}"
        case PageTokenInvalid() | PageTokenMismatch():
            message = 'Validation error: Invalid at "cursor"'
    if status == 401:
        message = "Unauthorized"
    return VENDOR.refuse(status, message)
