"""Rows with the smallest and the largest valid values are listed by every API, through a real gateway.

The ledger's clock is at the first or the last instants of the calendar. Every field that a caller
can set is filled from the contracts' descriptors, so a new field without a rule fails here.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from itertools import cycle, product
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import grpc
import pytest
from daybook.v1.account_pb2 import Account, Company
from daybook.v1.ledger_service_pb2 import RefundTransactionRequest, TransferCreditsRequest
from daybook.v1.transaction_pb2 import Transaction
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from server.app import serving
from server.book import Book
from server.config import Settings
from server.facades import dreadnode, spacebring, teable
from server.ledger.instants import EARLIEST, HOUR, LATEST, SECOND, to_timestamp
from server.ledger.usage import USAGE_CATEGORIES
from server.transport.validation import CHARACTERS_MAX, DETAILS, LABELS_MAX
from tests.support.callers import Client, Server
from tests.support.clock import Clock
from tests.support.gateways import gateway_before
from tests.support.http_client import Json, problems_of_any_answer, send

GRANT, CHARGE = Transaction.GRANT, Transaction.CHARGE
SUBJECTS = tuple(field.name for field in Transaction.DESCRIPTOR.oneofs_by_name["subject"].fields)
FACADE_TYPES = (teable.TYPES, spacebring.TYPES, dreadnode.TYPES)
NETWORK = str(uuid.uuid5(uuid.NAMESPACE_URL, "house"))
WIDE = "🪚"
"""A character of four bytes, the longest in UTF-8."""

_Filled = TypeVar("_Filled", bound=Message)
Row = dict[str, Json]


@dataclass(frozen=True)
class Extreme:
    """The smallest or the largest values of all ranges."""

    now: int
    """The clock's initial time, in microseconds since 1970."""
    amount: str
    account_id: str
    credit_limit: str
    time: Timestamp
    time_text: str
    hour_anchor: Timestamp
    month: str
    count: Mapping[int, int]
    """A count by the C++ type of its field."""
    texts: Mapping[str, str]
    """Texts with a required format, by the full name of their field."""
    character: str
    is_longest: bool
    labels: Mapping[str, str]
    number: float
    hours: tuple[tuple[str, str], ...]
    """Start and end of the account's three hour windows in New York, newest first, computed by hand."""

    def text(self, field: Any) -> str:
        """The value of a text field."""
        characters = CHARACTERS_MAX[field.containing_type.full_name][field.name]
        return self.texts.get(field.full_name, self.character * (characters if self.is_longest else 1))

    def fill(self, message: _Filled) -> _Filled:
        """Sets every field of a message, and returns it. Raises KeyError for a field without a rule."""
        for field in message.DESCRIPTOR.fields:
            self.fill_field(message, field.name)
        return message

    def fill_field(self, message: Message, name: str) -> None:
        """Sets one field of a message."""
        field = message.DESCRIPTOR.fields_by_name[name]
        if field.message_type is None:
            is_text = field.cpp_type == FieldDescriptor.CPPTYPE_STRING
            if field.full_name == "daybook.v1.Usage.cost_usd":
                setattr(message, field.name, self.credit_limit)
            else:
                setattr(message, field.name, self.text(field) if is_text else self.count[field.cpp_type])
        elif field.name == "labels":
            getattr(message, field.name).update(self.labels)
        elif field.message_type.full_name == Timestamp.DESCRIPTOR.full_name:
            getattr(message, field.name).CopyFrom(self.time)
        elif field.message_type.full_name == Struct.DESCRIPTOR.full_name:
            getattr(message, field.name).CopyFrom(self.struct())
        else:
            self.fill(getattr(message, field.name))

    def struct(self) -> Struct:
        """Metadata with every kind of value, nested as deeply as allowed."""
        value: Any = [None, True, self.number, self.character]
        for _ in range(18):
            value = {self.character: value}
        struct = Struct()
        struct.update({"": value})
        return struct


EXTREMES = {
    "lowest": Extreme(
        now=EARLIEST,
        amount="0.000001",
        account_id="0",
        credit_limit="0",
        time=to_timestamp(EARLIEST),
        time_text="0001-01-01T00:00:00.000000Z",
        # The first hour window begins before the calendar does.
        hour_anchor=to_timestamp(EARLIEST + HOUR // 2),
        month="0001-01",
        count={FieldDescriptor.CPPTYPE_INT32: 0, FieldDescriptor.CPPTYPE_INT64: 0},
        texts={"daybook.v1.Company.Address.country_code": "AA"},
        character="\x01",
        is_longest=False,
        labels={"a": "\x01"},
        number=5e-324,
        # Until 1883 New York used local mean time, UTC-4:56:02.
        hours=(
            ("0000-12-31 20:33:58", "0000-12-31 21:33:58"),
            ("0000-12-31 19:33:58", "0000-12-31 20:33:58"),
            ("0000-12-31 18:33:58", "0000-12-31 19:33:58"),
        ),
    ),
    "highest": Extreme(
        now=LATEST - 2 * HOUR - 1,
        amount="999999999999.999999",
        account_id="Z" * 128,
        credit_limit="999999999999.999999",
        # Times that the ledger only stores keep their nanoseconds.
        time=Timestamp(seconds=LATEST // SECOND, nanos=999_999_999),
        time_text="9999-12-31T23:59:59.999999Z",
        hour_anchor=to_timestamp(LATEST),
        month="9999-12",
        count={FieldDescriptor.CPPTYPE_INT32: 2**31 - 1, FieldDescriptor.CPPTYPE_INT64: 2**63 - 1},
        texts={"daybook.v1.Company.Address.country_code": "ZZ"},
        character=WIDE,
        is_longest=True,
        labels={f"{'z' * 61}{number:02}": WIDE * 128 for number in range(LABELS_MAX - 1)},
        number=-(2.0**53 - 1),
        hours=(
            ("9999-12-31 18:59:59", "9999-12-31 19:59:59"),
            ("9999-12-31 17:59:59", "9999-12-31 18:59:59"),
            ("9999-12-31 16:59:59", "9999-12-31 17:59:59"),
        ),
    ),
}


@pytest.fixture(params=EXTREMES)
def extreme(request: pytest.FixtureRequest) -> Extreme:
    """The smallest values, then the largest."""
    return EXTREMES[request.param]


@pytest.fixture
def clock(extreme: Extreme) -> Clock:
    """The ledger's clock, at the extreme time."""
    return Clock(extreme.now)


@dataclass
class Ledger:
    """A ledger with rows of extreme values, behind a real gateway."""

    extreme: Extreme
    origin: str
    caller: Client
    bound: Client
    """A caller whose key is bound to the listed account."""

    async def get(self, target: str, *, bound: bool = False) -> Any:
        """The body of a successful answer."""
        key = (self.bound if bound else self.caller).key
        headers = {"authorization": f"Bearer {key}", spacebring.NETWORK_HEADER: NETWORK}
        answer = await asyncio.to_thread(send, self.origin, target, headers=headers)
        assert not list(problems_of_any_answer(answer))
        assert answer.status == 200, (target, answer.body)
        return answer.json()

    async def follow(self, target: str, rows: str, token: str, parameter: str) -> list[Row]:
        """All rows of a list, read page by page."""
        found: list[Row] = []
        more = ""
        while True:
            body = await self.get(f"{target}{more}")
            found += body[rows]
            if not body.get(token):
                return found
            more = f"&{parameter}={body[token]}"

    async def transactions(self) -> dict[str, Row]:
        """The account's transactions as the native list shows them, by uid."""
        target = f"/v1/accounts/{self.extreme.account_id}/transactions?pageSize=1000"
        rows = await self.follow(target, "transactions", "nextPageToken", "pageToken")
        return {str(row["uid"]): row for row in rows}


@pytest.fixture
async def ledger(book: Book, clock: Clock, extreme: Extreme, tmp_path: Path) -> AsyncIterator[Ledger]:
    """A ledger whose rows have the extreme values."""
    settings = Settings(port=0, shutdown_grace_seconds=1)
    async with serving(book, settings) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        server = Server(book, channel)
        tenant_number = await server.create_tenant("house")
        caller = await server.client(tenant_number, scopes={"admin"})
        await post_everything(caller, clock, extreme)
        assert await caller.verify() == []
        bound = await server.client(tenant_number, account_id=extreme.account_id)
        with ExitStack() as stack:
            origin = await asyncio.to_thread(stack.enter_context, gateway_before(tmp_path, port))
            yield Ledger(extreme, origin, caller, bound)
            await asyncio.to_thread(stack.close)


async def post_everything(client: Client, clock: Clock, extreme: Extreme) -> None:
    """Posts transactions of every listed type to one account, with extreme values."""
    company = extreme.fill(Company())
    await client.create_account(
        extreme.account_id,
        kind=Account.COMPANY,
        display_name=extreme.character * 255,
        company=company,
        credit_limit=extreme.credit_limit,
        hour_anchor_time=extreme.hour_anchor,
    )
    await client.create_account("peer", hour_anchor_time=extreme.time)
    details = Transaction(labels={"company": extreme.account_id})
    for name in DETAILS - set(SUBJECTS):
        extreme.fill_field(details, name)

    async def post(kind: Transaction.Kind.ValueType, category: str, subject: str = "", **fields: Any) -> Transaction:
        transaction = Transaction(category=category, **fields)
        transaction.MergeFrom(details)
        if subject:
            extreme.fill(getattr(transaction, subject))
        values = {field.name: value for field, value in transaction.ListFields()}
        return await client.post(
            extreme.account_id, kind, f"-{extreme.amount}" if kind == CHARGE else extreme.amount, **values
        )

    async def charge(category: str, subject: str, state: Transaction.State.ValueType) -> Transaction:
        if state == Transaction.SUCCEEDED:
            await post(GRANT, "balance")
        return await post(CHARGE, category, subject, state=state)

    subjects = cycle(SUBJECTS)
    for kind, category in sorted({pair for types in FACADE_TYPES for pair in types}):
        if kind == CHARGE:
            for state in (Transaction.SUCCEEDED, Transaction.FAILED, Transaction.CANCELED):
                charged = await charge(category, next(subjects), state)
                if state == Transaction.SUCCEEDED:
                    await client.ledger.RefundTransaction(
                        RefundTransactionRequest(name=charged.name), metadata=client.metadata
                    )
                    await post(CHARGE, "balance")
        elif kind in (GRANT, Transaction.ADJUSTMENT):
            await post(kind, category)
            await post(CHARGE, "balance")
    await post(GRANT, "balance")
    transfer = TransferCreditsRequest(
        name=f"accounts/{extreme.account_id}",
        destination="accounts/peer",
        amount=extreme.amount,
        labels={"company": extreme.account_id},
    )
    await client.ledger.TransferCredits(transfer, metadata=client.metadata)
    # Each in its own hour window, the last at the last instant.
    for category in USAGE_CATEGORIES:
        await charge(category, "usage", Transaction.SUCCEEDED)
        clock.advance(3600)
    await post(GRANT, "credit_package", expire_time=to_timestamp(clock.now + 1))
    clock.advance(0.000001)
    await charge("computing", "usage", Transaction.SUCCEEDED)


def instant_of(text: Json) -> int:
    """A native time in microseconds since 1970."""
    assert isinstance(text, str)
    moment = datetime.fromisoformat(text)
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def vendor_time(text: Json, timespec: str) -> str:
    """A native time in the format of a vendor's list."""
    assert isinstance(text, str)
    return datetime.fromisoformat(text).replace(tzinfo=None).isoformat(timespec=timespec) + "Z"


def is_nearest(shown: Json, amount: Json) -> bool:
    """Whether a JSON number is the double nearest to an amount."""
    assert isinstance(shown, Decimal)
    assert isinstance(amount, str)
    return float(shown) == float(amount)


async def require_native(ledger: Ledger) -> None:
    """Checks the native lists in every order, in small pages and in one, with filters at the bounds of time."""
    everything = await ledger.transactions()
    bounds = quote('create_time >= "0001-01-01T00:00:00Z" AND create_time <= "9999-12-31T23:59:59.999999999Z"')
    for account_id in (ledger.extreme.account_id, "-"):
        uids = set()
        for order in ("create_time", "create_time desc", "amount", "amount desc"):
            if account_id == "-" and order.startswith("amount"):
                continue
            target = f"/v1/accounts/{account_id}/transactions?orderBy={quote(order)}&filter={bounds}&pageSize="
            at_once = await ledger.follow(f"{target}1000", "transactions", "nextPageToken", "pageToken")
            by_page = await ledger.follow(f"{target}7", "transactions", "nextPageToken", "pageToken")
            assert by_page == at_once
            keys = [
                instant_of(row["createTime"]) if order.startswith("create") else Decimal(str(row["amount"]))
                for row in at_once
            ]
            assert keys == sorted(keys, reverse=order.endswith("desc"))
            uids = {row["uid"] for row in at_once}
            assert uids >= everything.keys()
    (row, *_) = [row for row in everything.values() if row.get("eventTicket")]
    for name in ("amount", "balanceAfter", "description", "owner", "creator", "labels", "receiptUri", "metadata"):
        assert name in row
    lots = await ledger.follow(
        f"/v1/accounts/{ledger.extreme.account_id}/lots?pageSize=7", "lots", "nextPageToken", "pageToken"
    )
    assert {lot["amount"] for lot in lots} == {ledger.extreme.amount}
    for name in ("", "/balance", f"/transactions/{row['uid']}?view=TRANSACTION_VIEW_FULL"):
        await ledger.get(f"/v1/accounts/{ledger.extreme.account_id}{name}")
    accounts = await ledger.follow("/v1/accounts?pageSize=1", "accounts", "nextPageToken", "pageToken")
    assert {account.get("displayName", "") for account in accounts} == {ledger.extreme.character * 255, ""}
    assert len(await ledger.follow("/v1/apiKeys?pageSize=1", "apiKeys", "nextPageToken", "pageToken")) == 2


async def require_teable(ledger: Ledger) -> None:
    """Checks Teable's list of the extreme month in every order."""
    native = await ledger.transactions()
    pairs = {category for _, category in teable.TYPES}
    expected = {uid for uid, row in native.items() if row["category"] in pairs and row["state"] == "SUCCEEDED"}
    path = f"/api/space/{ledger.extreme.account_id}/billing/credit-history?month={ledger.extreme.month}"
    for order_by, order in product(teable.ORDERS_BY, teable.ORDERS):
        target = f"{path}&orderBy={order_by}&order={order}"
        at_once = await ledger.follow(f"{target}&take=100", "data", "nextCursor", "cursor")
        assert await ledger.follow(f"{target}&take=1", "data", "nextCursor", "cursor") == at_once
        assert {row["id"] for row in at_once} == expected != set()
    for row in at_once:
        posted = native[str(row["id"])]
        assert is_nearest(row["amount"], str(posted["amount"]).removeprefix("-"))
        assert row["createdTime"] == vendor_time(posted["createTime"], "milliseconds")
        assert row["displayName"] == posted["description"]


async def require_nebulablock(ledger: Ledger) -> None:
    """Checks Nebula Block's hours, which begin before year 1 or end after 9999, in New York's historical time."""
    path = "/users/credits/history?limit="
    body = (await ledger.get(f"{path}100", bound=True))["data"]
    hours = body["credit_history"]
    assert body["total_credit_histories"] == len(hours) == 3
    for offset in range(len(hours)):
        page = (await ledger.get(f"{path}1&offset={offset}", bound=True))["data"]["credit_history"]
        assert page == hours[offset : offset + 1]
    assert (await ledger.get(f"{path}1&offset={2**63 - 1}", bound=True))["data"]["credit_history"] == []
    assert all(is_nearest(hour["total"], ledger.extreme.amount) for hour in hours)
    times = [(hour["create_time"], hour["update_time"]) for hour in hours]
    assert times == [(f"EST {start}", f"EST {stop}") for start, stop in ledger.extreme.hours]


async def require_spacebring(ledger: Ledger) -> None:
    """Checks Spacebring's list of all time, with companies and subjects."""
    native = await ledger.transactions()
    path = "/transactions/credits/v1?createDate[gte]=0001-01-01T00:00:00Z&createDate[lte]=9999-12-31T23:59:59.999999Z"
    at_once = await ledger.follow(f"{path}&limit=100", "transactions", "nextPageToken", "nextPageToken")
    by_page = await ledger.follow(f"{path}&limit=3", "transactions", "nextPageToken", "nextPageToken")
    assert by_page == at_once
    shown = {str(row["id"]): row for row in at_once}
    assert {row["type"] for row in at_once} >= {"eventTicket", "refund", "subscriptionExpiration", "creditPackage"}
    for uid, posted in native.items():
        if (Transaction.Kind.Value(str(posted["kind"])), posted["category"]) not in spacebring.TYPES:
            continue
        row = shown[uid]
        assert is_nearest(row["amount"], str(posted["amount"]).removeprefix("-"))
        assert row["createDate"] == vendor_time(posted["createTime"], "microseconds")
        company = row["company"]
        assert isinstance(company, dict)
        assert company["deleteDate"] == company["createDate"] == ledger.extreme.time_text
        assert company["title"] == ledger.extreme.character * (255 if ledger.extreme.is_longest else 1)
        if "ticket" in row:
            ticket = row["ticket"]
            assert isinstance(ticket, dict)
            event = ticket["event"]
            assert isinstance(event, dict)
            assert event["startDate"] == event["endDate"] == ticket["createDate"] == ledger.extreme.time_text
        if row["type"] in ("order", "booking", "eventTicket") and row["status"] == "succeeded":
            refund = row["refund"]
            assert isinstance(refund, dict)
            assert is_nearest(refund["amount"], ledger.extreme.amount)


async def require_dreadnode(ledger: Ledger) -> None:
    """Checks Dreadnode's list of all types, with their usage."""
    native = await ledger.transactions()
    path = f"/api/v1/org/{ledger.extreme.account_id}/credits/transactions?limit="
    everything = await ledger.get(f"{path}100")
    assert everything[:1] == await ledger.get(f"{path}1")
    assert {row["transaction_type"] for row in everything} == set(dreadnode.TYPES.values())
    for row in everything:
        posted = native[row["id"]]
        assert row["amount"] == Decimal(str(posted["amount"])).quantize(Decimal(1), ROUND_HALF_UP)
        assert row["created_at"] == vendor_time(posted["createTime"], "microseconds")
        if "usage" in posted:
            assert (
                float(row["input_tokens"])
                == float(row["output_tokens"])
                == float(2**63 - 1) * ledger.extreme.is_longest
            )
            assert is_nearest(row["inference_cost_usd"], ledger.extreme.credit_limit)
    assert any(row["inference_cost_usd"] is not None for row in everything)


async def require_paged(ledger: Ledger) -> None:
    """Checks Paged's list by following the links to the next page."""
    native = await ledger.transactions()
    path = f"/api/billing/accounts/{ledger.extreme.account_id}/transactions?page_size="
    rows: list[Row] = []
    target: str | None = f"{path}7"
    while target is not None:
        page = await ledger.get(target)
        rows += page["results"]
        assert page["count"] == len(native)
        target = page["next"] and page["next"].removeprefix(ledger.origin)
    assert {row["id"] for row in rows} == native.keys()
    for row in rows:
        posted = native[str(row["id"])]
        assert (row["amount"], row["balance"]) == (posted["amount"], posted["balanceAfter"])
        assert row["created"] == vendor_time(posted["createTime"], "microseconds")


async def test_extreme_values_are_listed(ledger: Ledger) -> None:
    """Every list shows the rows with extreme values, in every order, in small pages and in one."""
    await require_native(ledger)
    await require_teable(ledger)
    await require_nebulablock(ledger)
    await require_spacebring(ledger)
    await require_dreadnode(ledger)
    await require_paged(ledger)
