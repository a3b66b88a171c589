"""What the contracts state only in comments, as JSON Schema: bounds, patterns, sets of values and nulls.

Each number, pattern and set of values is the one in the server's code, where the code has it by a name. The tests send
requests at these bounds and beyond them, and compare answers with these schemas.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from daybook.facades.spacebring.v1 import transactions_service_pb2
from daybook.v1.transaction_pb2 import Transaction
from google.protobuf.descriptor import Descriptor

from docs.openapi.schemas import Schema
from server.facades import dreadnode, nebulablock, paged, spacebring, teable
from server.ledger import money, names
from server.ledger.access import SUFFICIENT
from server.transport import validation
from server.transport.errors import DOMAIN
from server.transport.filters import FILTER_CHARACTERS_MAX
from server.transport.page_tokens import TOKEN_CHARACTERS_MAX

_AMOUNT = money.GRAMMAR.pattern
_NOT_NEGATIVE = _AMOUNT.removeprefix("-?")
_CATEGORY = validation.CATEGORY.pattern


def whole(pattern: str) -> Schema:
    """A text that the pattern matches as a whole."""
    return {"type": "string", "pattern": f"^{pattern}$"}


def integer(minimum: int, maximum: int | None = None, default: int | None = None) -> Schema:
    """A whole number. The query has it in digits."""
    bounds = {"minimum": minimum, "maximum": maximum, "default": default}
    return {"type": "integer", **{name: bound for name, bound in bounds.items() if bound is not None}}


def one_of(values: Collection[str], default: str | None = None) -> Schema:
    """One of some texts."""
    schema: Schema = {"type": "string", "enum": list(dict.fromkeys(values))}
    return schema if default is None else {**schema, "default": default}


def or_null(kind: str) -> Schema:
    """A value of this type, or null."""
    return {"type": [kind, "null"]}


UUID: Schema = {"type": "string", "format": "uuid"}
TIME: Schema = {"type": "string", "format": "date-time"}
TIME_OF_SIX_DIGITS: Schema = {**TIME, "pattern": r"\.[0-9]{6}Z$"}
COUNT: Schema = {"type": "integer", "minimum": 0}
POSITIVE_OR_ZERO: Schema = {"type": "number", "minimum": 0}


def _spacebring_types() -> Collection[str]:
    named = spacebring.TYPES.values()
    return dict.fromkeys(text for each in named for text in (each if isinstance(each, spacebring.ByLots) else (each,)))


def _least(message: str, field: str) -> Schema:
    return {"minLength": 1} if field == "id" and message in _IDENTIFIED else {}


def _within(prefix: str, schemas: Mapping[str, Schema]) -> Mapping[str, Schema]:
    return {f"{prefix}.{name}": schema for name, schema in schemas.items()}


_LABELS: Schema = {
    "maxProperties": validation.LABELS_MAX,
    "propertyNames": {"pattern": whole(_CATEGORY)["pattern"]},
    "additionalProperties": {"type": "string", "minLength": 1, "maxLength": validation.LABEL_CHARACTERS_MAX},
}
_PAGE = {"minimum": 0, "default": validation.PAGE_SIZE_DEFAULT}
_TOKEN = {"maxLength": TOKEN_CHARACTERS_MAX}
_BATCH = {"minItems": 1, "maxItems": validation.BATCH_SIZE_MAX}
_REQUEST_ID = {"maxLength": validation.REQUEST_ID_CHARACTERS_MAX, "pattern": r"^[\x20-\x7e]*$"}
_IDENTIFIED = {message.DESCRIPTOR.full_name for message in validation.IDENTIFIED}

NATIVE: Mapping[str, Schema] = {
    **{
        f"{message}.{field}": {"maxLength": characters, **_least(message, field)}
        for message, fields in validation.CHARACTERS_MAX.items()
        for field, characters in fields.items()
    },
    **_within(
        "daybook.v1",
        {
            "Account.credit_limit": whole(f"({_NOT_NEGATIVE})?"),
            "Allocation.amount": whole(_AMOUNT),
            "ApiKey.scopes": {"minItems": 1, "items": one_of(SUFFICIENT)},
            "Balance.amount": whole(_AMOUNT),
            "Balance.available_amount": whole(_AMOUNT),
            "Balance.expiring_amount": whole(_AMOUNT),
            "Balance.permanent_amount": whole(_AMOUNT),
            "BatchCreateTransactionsRequest.request_id": _REQUEST_ID,
            "BatchCreateTransactionsRequest.requests": _BATCH,
            "Company.Address.country_code": whole(f"({validation.COUNTRY_CODE.pattern})?"),
            "Company.expiring_day_passes": {"minimum": 0},
            "CreateAccountRequest.account_id": whole(names.ACCOUNT_ID.pattern),
            "CreateAccountRequest.request_id": _REQUEST_ID,
            "CreateTransactionRequest.request_id": _REQUEST_ID,
            "ExportTransactionsRequest.filter": {"maxLength": FILTER_CHARACTERS_MAX},
            "ListAccountsRequest.page_size": _PAGE,
            "ListAccountsRequest.page_token": _TOKEN,
            "ListApiKeysRequest.page_size": _PAGE,
            "ListApiKeysRequest.page_token": _TOKEN,
            "ListLotsRequest.page_size": _PAGE,
            "ListLotsRequest.page_token": _TOKEN,
            "ListTransactionsRequest.filter": {"maxLength": FILTER_CHARACTERS_MAX},
            "ListTransactionsRequest.page_size": _PAGE,
            "ListTransactionsRequest.page_token": _TOKEN,
            "Lot.amount": whole(_AMOUNT),
            "Lot.remaining_amount": whole(_AMOUNT),
            "RefundTransactionRequest.amount": whole(f"({_NOT_NEGATIVE})?"),
            "RefundTransactionRequest.request_id": _REQUEST_ID,
            "SubmitTransactionsRequest.requests": _BATCH,
            "Transaction.amount": whole(_AMOUNT),
            "Transaction.balance_after": whole(_AMOUNT),
            "Transaction.category": whole(_CATEGORY),
            "Transaction.expiring_amount": whole(_AMOUNT),
            "Transaction.kind:REQUEST": one_of([Transaction.Kind.Name(kind) for kind in validation.CREATABLE_KINDS]),
            "Transaction.labels": _LABELS,
            "Transaction.permanent_amount": whole(_AMOUNT),
            "Transaction.priority": {"minimum": -validation.PRIORITY_MAX, "maximum": validation.PRIORITY_MAX},
            "TransferCreditsRequest.amount": whole(_NOT_NEGATIVE),
            "TransferCreditsRequest.destination": whole(f"accounts/{names.ACCOUNT_ID.pattern}"),
            "TransferCreditsRequest.labels": _LABELS,
            "TransferCreditsRequest.request_id": _REQUEST_ID,
            "UpdateAccountRequest.request_id": _REQUEST_ID,
            "Usage.cost_usd": whole(_NOT_NEGATIVE),
            "Usage.input_tokens": {"pattern": "^[0-9]+$"},
            "Usage.output_tokens": {"pattern": "^[0-9]+$"},
        },
    ),
    "google.rpc.ErrorInfo.domain": {"const": DOMAIN},
    "google.rpc.ErrorInfo.reason": {"$ref": "#/components/schemas/ErrorReason"},
    "google.rpc.Status.details": {
        "items": {
            "anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in ("ErrorInfo", "BadRequest", "RetryInfo")]
        }
    },
}

OPTIONAL = {
    # The parent of a batch is the parent of its requests.
    "daybook.v1.CreateTransactionRequest.parent",
    # The gateway's own errors have none.
    "google.rpc.ErrorInfo.metadata",
}
"""Fields that may be absent, although they are REQUIRED in a request or have no presence in an answer."""

REQUIRED_OVER_REST = {"daybook.v1.ExportTransactionsRequest.format"}
"""OPTIONAL fields that a request over REST needs."""

PATH: Mapping[str, Schema] = {
    "account": whole(names.ACCOUNT_ID.pattern),
    "apiKey": whole(names.API_KEY_ID.pattern),
    "transaction": UUID,
}
"""The ids in the paths of the native API."""

TEABLE = _within(
    "daybook.facades.teable.v1",
    {
        "GetSpaceCreditHistoryRequest.month": whole("(?!0000)[0-9]{4}-(0[1-9]|1[0-2])"),
        "GetSpaceCreditHistoryRequest.take": integer(1, teable.TAKE_MAX, teable.TAKE_DEFAULT),
        "GetSpaceCreditHistoryRequest.source_type": one_of(teable.TYPES.values()),
        "GetSpaceCreditHistoryRequest.order_by": one_of(teable.ORDERS_BY, "createdTime"),
        "GetSpaceCreditHistoryRequest.order": one_of(teable.ORDERS, "desc"),
        "GetSpaceCreditHistoryResponse.next_cursor": {**or_null("string"), "minLength": 1},
        "GetSpaceCreditHistoryResponse.Record.id": UUID,
        "GetSpaceCreditHistoryResponse.Record.source_type": one_of(teable.TYPES.values()),
        "GetSpaceCreditHistoryResponse.Record.created_time": {**TIME, "pattern": r"\.[0-9]{3}Z$"},
        "GetSpaceCreditHistoryResponse.Record.display_name": or_null("string"),
        "GetSpaceCreditHistoryResponse.Record.user": {
            **or_null("object"),
            "required": ["id", "name", "avatar"],
            "properties": {"id": {"type": "string"}, "name": {"type": "string"}, "avatar": or_null("string")},
        },
    },
)

_HOUR = r"EST [0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01]) ([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]"

NEBULABLOCK = _within(
    "daybook.facades.nebulablock.v1",
    {
        "GetCreditsHistoryRequest.limit": integer(1, nebulablock.LIMIT_MAX, nebulablock.LIMIT_DEFAULT),
        "GetCreditsHistoryRequest.offset": integer(0, nebulablock.OFFSET_MAX, 0),
        "GetCreditsHistoryResponse.message": {"const": nebulablock.SUCCESS.message},
        "GetCreditsHistoryResponse.status": {"const": nebulablock.SUCCESS.status},
        "GetCreditsHistoryResponse.Data.total_credit_histories": COUNT,
        "GetCreditsHistoryResponse.CreditHistory.user_id": COUNT,
        "GetCreditsHistoryResponse.CreditHistory.computing_amount": POSITIVE_OR_ZERO,
        "GetCreditsHistoryResponse.CreditHistory.serverless_amount": POSITIVE_OR_ZERO,
        "GetCreditsHistoryResponse.CreditHistory.create_time": whole(_HOUR),
        "GetCreditsHistoryResponse.CreditHistory.update_time": whole(_HOUR),
        "GetCreditsHistoryResponse.CreditHistory.total": POSITIVE_OR_ZERO,
    },
)


def _texts_of_spacebring(messages: Iterable[Descriptor]) -> Iterator[str]:
    """The fields with a text that is absent if it would be empty."""
    for message in (each for each in messages if not each.name.endswith("Request")):
        yield from (
            each.full_name for each in message.fields if each.has_presence and each.cpp_type == each.CPPTYPE_STRING
        )
        yield from _texts_of_spacebring(message.nested_types)


SPACEBRING = {
    **{
        name: {"minLength": 1}
        for name in _texts_of_spacebring(transactions_service_pb2.DESCRIPTOR.message_types_by_name.values())
    },
    **_within(
        "daybook.facades.spacebring.v1",
        {
            "GetCreditsTransactionsRequest.limit": integer(1, spacebring.LIMIT_MAX, spacebring.LIMIT_DEFAULT),
            "GetCreditsTransactionsRequest.create_date_gte": TIME,
            "GetCreditsTransactionsRequest.create_date_lte": TIME,
            "GetCreditsTransactionsRequest.location_ref": UUID,
            "GetCreditsTransactionsRequest.membership_ref": UUID,
            "GetCreditsTransactionsRequest.company_ref": UUID,
            "GetCreditsTransactionsResponse.transactions": {"maxItems": spacebring.LIMIT_MAX},
            "CreditsTransaction.amount": POSITIVE_OR_ZERO,
            "CreditsTransaction.create_date": TIME_OF_SIX_DIGITS,
            "CreditsTransaction.expiring_amount": POSITIVE_OR_ZERO,
            "CreditsTransaction.id": UUID,
            "CreditsTransaction.permanent_amount": POSITIVE_OR_ZERO,
            "CreditsTransaction.status": one_of(spacebring.STATUSES.values()),
            "CreditsTransaction.type": one_of(_spacebring_types()),
            **dict.fromkeys(
                (
                    *(f"CreditsTransaction.{name}_ref" for name in ("company", "location", "membership")),
                    *(f"CreditsTransaction.{name}_ref_creator" for name in ("membership", "user")),
                    "CreditsTransaction.user_ref_owner",
                    *(
                        f"{name}.id"
                        for name in ("Booking", "Booking.Resource", "Order", "Order.Option", "Order.Product")
                    ),
                    *(f"{name}.id" for name in ("Ticket", "Ticket.Event", "User")),
                    *(f"Company.{name}_ref" for name in ("location", "subscription")),
                ),
                UUID,
            ),
            "Company.create_date": TIME_OF_SIX_DIGITS,
            "Company.delete_date": TIME_OF_SIX_DIGITS,
            "Refund.amount": {"exclusiveMinimum": 0},
            "Refund.create_date": TIME_OF_SIX_DIGITS,
            "Ticket.create_date": TIME_OF_SIX_DIGITS,
            "Ticket.Event.end_date": TIME_OF_SIX_DIGITS,
            "Ticket.Event.start_date": TIME_OF_SIX_DIGITS,
        },
    ),
}

DREADNODE = _within(
    "daybook.facades.dreadnode.v1",
    {
        "ListCreditTransactionsRequest.limit": integer(1, dreadnode.LIMIT_MAX, dreadnode.LIMIT_DEFAULT),
        "ListCreditTransactionsRequest.transaction_type": {"items": one_of(dreadnode.TYPES.values())},
        "ListCreditTransactionsResponse.transactions": {"maxItems": dreadnode.LIMIT_MAX},
        "CreditTransaction.amount": {"type": "integer"},
        "CreditTransaction.created_at": TIME_OF_SIX_DIGITS,
        "CreditTransaction.description": or_null("string"),
        "CreditTransaction.id": UUID,
        "CreditTransaction.inference_cost_usd": or_null("number"),
        "CreditTransaction.input_tokens": or_null("integer"),
        "CreditTransaction.model": or_null("string"),
        "CreditTransaction.output_tokens": or_null("integer"),
        "CreditTransaction.transaction_type": one_of(dreadnode.TYPES.values()),
        "GetCreditBalanceResponse.auto_refill_enabled": {"const": False},
        "GetCreditBalanceResponse.balance": {"type": "integer"},
    },
)

PAGED = _within(
    "daybook.facades.paged.v1",
    {
        "ListAccountTransactionsRequest.page": integer(1, default=1),
        "ListAccountTransactionsRequest.page_size": integer(1, paged.PAGE_SIZE_MAX, paged.PAGE_SIZE_DEFAULT),
        "ListAccountTransactionsResponse.count": COUNT,
        "ListAccountTransactionsResponse.next": or_null("string"),
        "ListAccountTransactionsResponse.previous": or_null("string"),
        "ListAccountTransactionsResponse.results": {"maxItems": paged.PAGE_SIZE_MAX},
        "AccountTransaction.amount": whole(_AMOUNT),
        "AccountTransaction.balance": whole(_AMOUNT),
        "AccountTransaction.created": TIME_OF_SIX_DIGITS,
        "AccountTransaction.description": or_null("string"),
        "AccountTransaction.id": UUID,
        "AccountTransaction.status": one_of([name.lower() for name in Transaction.State.keys()[1:]]),
        "AccountTransaction.type": one_of([name.lower() for name in Transaction.Kind.keys()[1:]]),
    },
)

FACTS: Mapping[str, Schema] = {**NATIVE, **TEABLE, **NEBULABLOCK, **SPACEBRING, **DREADNODE, **PAGED}
"""The facts about a field, by its full name, or by `name:REQUEST` if they hold only in requests."""

ALWAYS = {
    "daybook.facades.nebulablock.v1.GetCreditsHistoryResponse.data",
    "daybook.facades.spacebring.v1.Company.credits",
}
"""Messages that an answer always has."""

HEADERS: Mapping[str, Sequence[Schema]] = {
    "daybook.facades.spacebring.v1.Transactions": [
        {
            "name": spacebring.NETWORK_HEADER,
            "in": "header",
            "description": "The tenant's UUID, which must be the caller's own. Required with a Bearer credential.",
            "schema": UUID,
        }
    ]
}
"""The parameters in headers of a service's methods."""
