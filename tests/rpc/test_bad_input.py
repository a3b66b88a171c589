"""Malformed requests: each is refused as the caller's fault, with its field, and none fails the server."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, cast

import grpc
import pytest
from daybook.v1.account_pb2 import Account, Company, User
from daybook.v1.ledger_service_pb2 import (
    CreateAccountRequest,
    CreateTransactionRequest,
    GetAccountRequest,
    GetBalanceRequest,
    GetTransactionRequest,
    ListAccountsRequest,
    ListTransactionsRequest,
    UpdateAccountRequest,
)
from daybook.v1.transaction_pb2 import Booking, EventTicket, Order, Transaction, Usage
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.ledger.money import LARGEST
from server.ledger.posting import Kind
from tests.support.callers import Client
from tests.support.examples import examples
from tests.support.markers import shares_a_server
from tests.support.methods import facade_requests
from tests.support.refusals import read_refusal, refusal_of

UID = "0192f3a4-5b6c-7d8e-9f01-23456789abcd"
FIELD, FILTER = "FIELD_INVALID", "FILTER_INVALID"


async def call(client: Client, request: Message) -> Message:
    """Calls the method that a request belongs to."""
    method = type(request).__name__.removesuffix("Request")
    answer = await getattr(client.ledger, method)(request, metadata=client.metadata)
    assert isinstance(answer, Message)
    return answer


def create(**fields: object) -> CreateAccountRequest:
    """A valid CreateAccount, except for these fields of its account."""
    return CreateAccountRequest(account_id="new", account=Account(**{"kind": Account.SPACE, **fields}))  # type: ignore[arg-type]


def update(**fields: object) -> UpdateAccountRequest:
    """An UpdateAccount with these fields."""
    return UpdateAccountRequest(account=Account(**{"name": "accounts/acme", **fields}))  # type: ignore[arg-type]


def listing(**fields: object) -> ListTransactionsRequest:
    """A valid ListTransactions, except for these fields."""
    return ListTransactionsRequest(**{"parent": "accounts/acme", **fields})  # type: ignore[arg-type]


WRONG_ACCOUNTS: list[tuple[Message, str, str]] = [
    (CreateAccountRequest(account_id="new"), "account.kind", FIELD),
    (create(display_name="x" * 256), "account.display_name", FIELD),
    (create(display_name="a\0b"), "account.display_name", FIELD),
    (create(hour_anchor_time=Timestamp(seconds=253_402_300_800)), "account.hour_anchor_time", FIELD),
    (create(hour_anchor_time=Timestamp(seconds=-62_135_596_801)), "account.hour_anchor_time", FIELD),
    (create(hour_anchor_time=Timestamp(nanos=1_000_000_000)), "account.hour_anchor_time", FIELD),
    (create(hour_anchor_time=Timestamp(nanos=-1)), "account.hour_anchor_time", FIELD),
    (create(hour_anchor_time=Timestamp(seconds=2**63 - 1)), "account.hour_anchor_time", FIELD),
    (create(user=User()), "account.user.id", FIELD),
    (create(user=User(id="x" * 129)), "account.user.id", FIELD),
    (create(user=User(id="u", name="x" * 256)), "account.user.name", FIELD),
    (create(user=User(id="u", surname="x" * 256)), "account.user.surname", FIELD),
    (create(user=User(id="u", email="x" * 256)), "account.user.email", FIELD),
    (create(user=User(id="u", phone_number="x" * 65)), "account.user.phone_number", FIELD),
    (create(user=User(id="u", photo_uri="x" * 2049)), "account.user.photo_uri", FIELD),
    (create(user=User(id="u", about="x" * 2049)), "account.user.about", FIELD),
    (create(user=User(id="u", membership="x" * 129)), "account.user.membership", FIELD),
    (create(user=User(id="u", about="\0")), "account.user.about", FIELD),
    (create(company=Company(title="x" * 256)), "account.company.title", FIELD),
    (create(company=Company(legal_name="x" * 256)), "account.company.legal_name", FIELD),
    (create(company=Company(tax_id="x" * 65)), "account.company.tax_id", FIELD),
    (create(company=Company(billing_address="x" * 1025)), "account.company.billing_address", FIELD),
    (create(company=Company(notes="x" * 4097)), "account.company.notes", FIELD),
    (create(company=Company(location="x" * 129)), "account.company.location", FIELD),
    (create(company=Company(subscription="x" * 129)), "account.company.subscription", FIELD),
    (create(company=Company(expiring_day_passes=-1)), "account.company.expiring_day_passes", FIELD),
    (
        create(company=Company(metadata=Struct(fields={"x": Value(string_value="x" * 8192)}))),
        "account.company.metadata",
        FIELD,
    ),
    (create(company=Company(create_time=Timestamp(nanos=-1))), "account.company.create_time", FIELD),
    (create(company=Company(delete_time=Timestamp(seconds=10**12))), "account.company.delete_time", FIELD),
    *(
        (
            create(company=Company(business_address=Company.Address(**{name: "x" * (limit + 1)}))),
            f"account.company.business_address.{name}",
            FIELD,
        )
        for name, limit in {
            "line1": 255,
            "line2": 255,
            "city": 255,
            "state": 255,
            "postal_code": 32,
            "country_code": 2,
        }.items()
    ),
    (
        create(company=Company(business_address=Company.Address(country_code="U"))),
        "account.company.business_address.country_code",
        FIELD,
    ),
    (UpdateAccountRequest(), "account.name", FIELD),
    (update(name="acme"), "account.name", FIELD),
    (update(name="accounts/-"), "account.name", FIELD),
    (update(name="accounts/acme/balance"), "account.name", FIELD),
    (update(display_name="x" * 256), "account.display_name", FIELD),
    (update(credit_limit="x"), "account.credit_limit", FIELD),
    (update(user=User(name="no id")), "account.user.id", FIELD),
]

WRONG_NAMES: list[tuple[Message, str, str]] = [
    *(
        (GetAccountRequest(name=name), "name", FIELD)
        for name in (
            "",
            "acme",
            "accounts",
            "accounts/",
            "accounts/-",
            "accounts/a/b",
            "/accounts/acme",
            "Accounts/acme",
            "accounts/acme\0",
            "accounts/acme\n",
            "accounts/é",
            "accounts/" + "a" * 129,
            "accounts/" + "/" * 10_000,
        )
    ),
    *(
        (GetBalanceRequest(name=name), "name", FIELD)
        for name in ("", "accounts/acme", "accounts/-/balance", "accounts/acme/balances", "accounts//balance")
    ),
    *(
        (GetTransactionRequest(name=name), "name", FIELD)
        for name in (
            "",
            f"accounts/-/transactions/{UID}",
            f"accounts/acme/transactions/{UID.upper()}",
            f"accounts/acme/transactions/{UID.replace('-', '')}",
            f"accounts/acme/transactions/{{{UID}}}",
            f"accounts/acme/transactions/urn:uuid:{UID}",
            f"accounts/acme/transactions/{UID}/",
            f"accounts/acme/transactions/{UID}\0",
            "accounts/acme/transactions/1",
            "accounts/acme/transactions/-",
            f"transactions/{UID}",
        )
    ),
    *(
        (listing(parent=parent), "parent", FIELD)
        for parent in ("", "-", "accounts/", "accounts/_", "accounts/a\0", "a/a")
    ),
]

WRONG_LISTS: list[tuple[Message, str, str]] = [
    (ListAccountsRequest(page_size=-1), "page_size", FIELD),
    (ListAccountsRequest(page_size=-(2**31)), "page_size", FIELD),
    (listing(page_size=-1), "page_size", FIELD),
    (listing(parent="accounts/-", page_size=-(2**31)), "page_size", FIELD),
    *(
        (listing(order_by=order_by), "order_by", FIELD)
        for order_by in (
            "sequence",
            "create_time ASC",
            "create_time asc desc",
            "create_time DESC",
            "create_time, amount",
            "create_time desc desc",
            "desc",
            "-create_time",
            "amount;",
            "\0",
            "x" * 100_000,
        )
    ),
    (listing(parent="accounts/-", order_by="amount"), "order_by", FIELD),
    (listing(parent="accounts/-", order_by="amount desc"), "order_by", FIELD),
    *(
        (listing(filter=filter_text), "filter", FILTER)
        for filter_text in (
            "x",
            "kind",
            "kind =",
            "= CHARGE",
            "kind = = CHARGE",
            "kind = charge",
            "kind = KIND_UNSPECIFIED",
            "kind = 1",
            "kind = NOTHING",
            "kind != CHARGE",
            "kind > CHARGE",
            "kind : CHARGE",
            "NOT kind = CHARGE",
            "-kind = CHARGE",
            "kind = CHARGE kind = GRANT",
            "kind = CHARGE AND",
            "AND kind = CHARGE",
            "kind = CHARGE and category = x",
            "kind = CHARGE OR category = x",
            "kind = CHARGE AND kind = CHARGE",
            "(kind = CHARGE",
            "kind = CHARGE)",
            "()",
            'category = "x',
            "category = 'x'",
            "category != x",
            "category = x*",
            'category = "x" OR kind = CHARGE',
            "state = STATE_UNSPECIFIED",
            "state = succeeded",
            "sequence = 1",
            'uid = "x"',
            "amount > 1",
            "labels.project = x",
            "labels = x",
            "labels.location",
            "labels.location = x OR labels.location = y",
            "labels.location = x AND labels.location = x",
            "labels.location > x",
            "create_time",
            'create_time = "2024-10-10T00:00:00Z"',
            'create_time != "2024-10-10T00:00:00Z"',
            'create_time > "2024-10-10"',
            'create_time > "2024-10-10T00:00:00"',
            'create_time > "2024-02-30T00:00:00Z"',
            'create_time > "2024-10-10T24:00:01Z"',
            'create_time > "2024-10-10T00:00:00+99:99"',
            'create_time > "0000-01-01T00:00:00Z"',
            'create_time > "now"',
            "create_time > 1728554098",
            'create_time > "2024-10-10T00:00:00Z" AND create_time >= "2024-10-10T00:00:00Z"',
            'create_time < "2024-10-10T00:00:00Z" AND create_time <= "2024-10-10T00:00:00Z"',
            'create_time > "2024-10-10T00:00:00Z" OR create_time > "2025-10-10T00:00:00Z"',
            " OR ".join(f"category = c{number}" for number in range(17)),
            "category = x" + " " * 2048,
            'category = "\0"',
            "(" * 2000,
            "(" * 1000 + "kind = CHARGE",
            "kind = CHARGE; DROP TABLE transactions",
            "1 = 1",
            "é = 1",
        )
    ),
]


def short(value: object) -> str:
    """The test id of a row."""
    name = type(value).__name__ if isinstance(value, Message) else ""
    return f"{name} {value}".replace("\n", " ").replace("\0", "NUL")[:70]


@shares_a_server
@pytest.mark.parametrize(("request_message", "field", "reason"), WRONG_ACCOUNTS + WRONG_NAMES + WRONG_LISTS, ids=short)
async def test_malformed_request_is_refused(
    shared_client: Client, request_message: Message, field: str, reason: str
) -> None:
    """A malformed request gets INVALID_ARGUMENT, with its field in details and message, and isn't echoed at length."""
    refusal = await refusal_of(call(shared_client, request_message))
    assert (*refusal.verdict, *refusal.fields) == ("INVALID_ARGUMENT", reason, field)
    assert refusal.metadata == {"field": field}
    assert refusal.message.startswith(f"{field}: ")
    assert len(refusal.message) < 1000


EDGE_REQUESTS: list[tuple[ListTransactionsRequest, int]] = [
    (listing(filter='labels.location = "' + "😀" * 100 + '"'), 0),
    (listing(filter='labels.location = "\x01\x7f\u2028\ufeff"'), 0),
    (listing(filter='category = "' + "x" * 2000 + '"'), 0),
    (listing(filter='create_time >= "0001-01-01T00:00:00-14:00"'), 1),
    (listing(filter='create_time <= "9999-12-31T23:59:59.999999999+12:00"'), 1),
    (listing(filter='create_time > "9999-12-31T23:59:59.999999Z"'), 0),
    (listing(filter="(" * 500 + "kind = GRANT" + ")" * 500), 1),
    (listing(filter="  \t\n"), 1),
    (listing(order_by="  amount   desc "), 1),
    (listing(filter=" OR ".join(f"category = c{number}" for number in range(16))), 0),
]
"""Requests at the edge of validity, and the number of rows that each finds beside a single GRANT."""


async def test_edge_requests_are_served(client: Client) -> None:
    """Both engines serve requests at the edge of validity."""
    await client.create_account("acme")
    await client.post("acme", Transaction.GRANT, "1")
    for request, found in EDGE_REQUESTS:
        page = await client.ledger.ListTransactions(request, metadata=client.metadata)
        assert len(page.transactions) == found, short(request)


@shares_a_server
@pytest.mark.parametrize("letter", ["x", "\U0010ffff"])
async def test_long_account_of_a_facade_is_not_found(shared_client: Client, letter: str) -> None:
    """The error fits into the headers that clients of gRPC accept, so it reaches them."""
    account_id = letter * 4000
    codes = []
    for method, request in facade_requests(account_id):
        call: Any = shared_client.channel.unary_unary(f"/{method.full_name.rpartition('.')[0]}/{method.name}")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(request.SerializeToString(), metadata=shared_client.metadata)
        codes.append(caught.value.code())
        assert sum(len(key) + len(value) + 32 for key, value in caught.value.trailing_metadata()) < 8192
    assert grpc.StatusCode.NOT_FOUND in codes
    assert grpc.StatusCode.RESOURCE_EXHAUSTED not in codes


texts = st.text(max_size=12) | st.sampled_from(
    [
        "",
        "\0",
        "a\0b",
        "accounts/acme",
        "accounts/-",
        "accounts/\0",
        "-",
        "0",
        "é" * 300,
        "x" * 3000,
        "\u202e",
        "\ufffe",
    ]
)
amounts = texts | st.sampled_from(["1", "-1", "0", "999999999999.999999", "-999999999999.999999", "1e9", "-0.000001"])
int32s = st.integers(-(2**31), 2**31 - 1)
int64s = st.integers(-(2**63), 2**63 - 1)
timestamps = st.builds(Timestamp, seconds=int64s, nanos=int32s)
filter_texts = texts | st.lists(
    st.sampled_from(
        [
            *("kind", "category", "state", "create_time", "labels.location", "labels.x", "=", ">=", "<", "!=", ":"),
            *("CHARGE", "SUCCEEDED", '"x"', '"', '"\0"', "AND", "OR", "NOT", "(", ")", '"2024-10-10T00:00:00Z"', "\\"),
            *("kind = CHARGE", "category = x", 'labels.company = "\\\\"', "state = FAILED", "-", "*", "\0", "é"),
        ]
    ),
    max_size=12,
).map(" ".join)
users = st.builds(User, id=texts, name=texts, photo_uri=texts)
structs = st.dictionaries(texts, texts, max_size=2).map(
    lambda entries: Struct(fields={key: Value(string_value=value) for key, value in entries.items()})
)
kinds = int32s | st.sampled_from([1, 1, 2, 2, 7])
categories = texts | st.just("test")


@st.composite
def random_transactions(draw: st.DrawFn) -> Transaction:
    """An arbitrary transaction, whose fields are valid often enough to pass the first checks."""
    # Enums are open: a caller can send any int32, which the constructor's types exclude.
    kind, state = cast("Kind", draw(kinds)), draw(st.sampled_from([0, 0, 1, 2, -1, 99]))
    transaction = Transaction(
        kind=kind,
        state=cast("Transaction.State.ValueType", state),
        amount=draw(amounts),
        category=draw(categories),
        description=draw(texts),
        labels=draw(st.dictionaries(st.sampled_from(["location", "company"]) | texts, texts, max_size=2)),
        receipt_uri=draw(texts),
    )
    for name, strategy in {
        "owner": users,
        "metadata": structs,
        "create_time": timestamps,
        "booking": st.builds(Booking, id=texts),
        "order": st.builds(Order, id=texts),
        "event_ticket": st.builds(EventTicket, id=texts, create_time=timestamps),
        "usage": st.builds(Usage, model=texts, input_tokens=int64s, cost_usd=amounts),
    }.items():
        if draw(st.integers(0, 5)) == 0:
            getattr(transaction, name).CopyFrom(draw(strategy))
    return transaction


@st.composite
def random_accounts(draw: st.DrawFn) -> Account:
    """An arbitrary account."""
    account = Account(
        name=draw(texts),
        display_name=draw(texts),
        credit_limit=draw(amounts),
        etag=draw(st.just("") | texts),
        kind=cast("Account.Kind.ValueType", draw(kinds)),
    )
    for name, strategy in {
        "hour_anchor_time": timestamps,
        "user": users,
        "company": st.builds(Company, title=texts, metadata=structs, create_time=timestamps),
    }.items():
        if draw(st.integers(0, 3)) == 0:
            getattr(account, name).CopyFrom(draw(strategy))
    return account


parents = texts | st.just("accounts/acme")
request_ids = st.just("") | texts
requests: st.SearchStrategy[Message] = st.one_of(
    st.builds(
        ListTransactionsRequest,
        parent=parents | st.just("accounts/-"),
        page_size=int32s | st.integers(0, 3),
        page_token=st.just("") | texts,
        filter=filter_texts,
        order_by=st.sampled_from(["", "amount", "create_time desc"]) | texts,
    ),
    st.builds(CreateTransactionRequest, parent=parents, transaction=random_transactions(), request_id=request_ids),
    st.builds(CreateAccountRequest, account=random_accounts(), account_id=texts, request_id=request_ids),
    st.builds(
        UpdateAccountRequest,
        account=random_accounts(),
        update_mask=st.none() | st.builds(FieldMask, paths=st.lists(texts | st.sampled_from(["*", "user"]))),
        request_id=request_ids,
    ),
    st.builds(GetTransactionRequest, name=texts),
    st.builds(GetAccountRequest, name=parents),
    st.builds(GetBalanceRequest, name=texts | st.just("accounts/acme/balance")),
    st.builds(ListAccountsRequest, page_size=int32s, page_token=texts),
)


@settings(
    max_examples=examples(100),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(request=requests)
async def test_arbitrary_request_never_fails_the_server(client: Client, request: Message) -> None:
    """An arbitrary request is answered or refused with a reason; it never gets INTERNAL, UNKNOWN or UNAVAILABLE."""
    # Hypothesis runs all examples on one ledger, so the account exists from the second example on.
    with suppress(grpc.aio.AioRpcError):
        await client.create_account("acme", credit_limit=str(LARGEST // 10**6))
    refusal = None
    try:
        await call(client, request)
    except grpc.aio.AioRpcError as error:
        refusal = read_refusal(error)
    if refusal is not None:
        server_failures = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE)
        assert refusal.code not in server_failures, refusal
        assert len(refusal.message) < 1000
