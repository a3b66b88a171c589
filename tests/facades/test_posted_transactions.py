"""Transactions posted natively appear at once in each vendor's API, by the rules of its page."""

from __future__ import annotations

import re
import uuid
from datetime import UTC, datetime
from decimal import Decimal
from zoneinfo import ZoneInfo

import pytest
from daybook.v1.account_pb2 import Account, User
from daybook.v1.transaction_pb2 import Booking, EventTicket, Order, Transaction, Usage
from google.protobuf.timestamp_pb2 import Timestamp

from tests.support.callers import NativeCaller
from tests.support.demo import DREADNODE, TEABLE, Network, create_key, get, make_network
from tests.support.http_client import Json, send
from tests.support.processes import Daybook


def time_of(transaction: Transaction) -> datetime:
    """The create_time of a transaction."""
    return transaction.create_time.ToDatetime(UTC)


def test_teable_shows_charges_of_five_categories(gateway: Daybook, native: NativeCaller) -> None:
    """Teable shows only charges of its five source types, with times in milliseconds."""
    space = native.create_account(TEABLE)
    creator = User(id="u1", name="Ада", surname="Лавлейс", photo_uri="https://example.com/a.png")
    posted = [
        native.post(TEABLE, space, Transaction.GRANT, "ai_chat", "100"),
        native.post(TEABLE, space, Transaction.CHARGE, "purchase", "-1"),
        native.post(TEABLE, space, Transaction.ADJUSTMENT, "ai_chat", "-1"),
        native.post(
            TEABLE, space, Transaction.CHARGE, "ai_chat", "-0.000001", description='"Ünïcode" \\ 🙂', creator=creator
        ),
    ]
    charge = posted[-1]
    moment = time_of(charge)
    body = get(gateway, TEABLE, f"/api/space/{space}/billing/credit-history?month={moment:%Y-%m}")
    assert body == {
        "data": [
            {
                "id": charge.uid,
                "sourceType": "ai_chat",
                "amount": Decimal("0.000001"),
                "createdTime": f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03}Z",
                "displayName": '"Ünïcode" \\ 🙂',
                "user": {"id": "u1", "name": "Ада Лавлейс", "avatar": "https://example.com/a.png"},
            }
        ],
        "nextCursor": None,
    }


@pytest.mark.parametrize(
    ("amount", "shown"),
    [
        ("0.4", 0),
        ("0.499999", 0),
        ("0.5", 1),
        ("1.5", 2),
        ("2.5", 3),
        ("-0.4", 0),
        ("-0.5", -1),
        ("-1.5", -2),
        ("-2.5", -3),
        ("2147483648", 2147483648),
        ("999999999990", 999999999990),
    ],
)
def test_dreadnode_amount_is_rounded_to_whole_credits(
    gateway: Daybook, native: NativeCaller, amount: str, shown: int
) -> None:
    """Amounts are signed integers of any size, rounded half away from zero."""
    organization = native.create_account(DREADNODE, credit_limit="10")
    native.post(DREADNODE, organization, Transaction.ADJUSTMENT, "admin_adjustment", amount)
    answer = send(
        gateway.origin,
        f"/api/v1/org/{organization}/credits/transactions",
        headers={"authorization": f"Bearer {DREADNODE}"},
    )
    # A JSON integer has neither a decimal point nor an exponent.
    assert re.findall(rb'"amount":([^,]*),', answer.body) == [str(shown).encode()]


def test_dreadnode_shows_each_type_of_its_kind_only(gateway: Daybook, native: NativeCaller) -> None:
    """A category is shown as a vendor's type only for the type's transaction kind."""
    organization = native.create_account(DREADNODE)
    native.post(DREADNODE, organization, Transaction.GRANT, "inference", "10")
    native.post(DREADNODE, organization, Transaction.CHARGE, "purchase", "-1")
    native.post(DREADNODE, organization, Transaction.CHARGE, "ai_chat", "-1")
    usage = Usage(model="m", input_tokens=0, output_tokens=2**33, cost_usd="0")
    shown = native.post(DREADNODE, organization, Transaction.CHARGE, "inference", "-1", usage=usage)
    moment = time_of(shown)
    assert get(gateway, DREADNODE, f"/api/v1/org/{organization}/credits/transactions") == [
        {
            "id": shown.uid,
            "amount": Decimal(-1),
            "created_at": moment.isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "transaction_type": "inference",
            "has_receipt": False,
            "description": None,
            "inference_cost_usd": Decimal(0),
            "input_tokens": Decimal(0),
            "output_tokens": Decimal(2**33),
            "model": "m",
        }
    ]


@pytest.fixture(scope="module")
def network(gateway: Daybook) -> Network:
    """A network without transactions."""
    return make_network(gateway)


@pytest.fixture
def unlisted_account(native: NativeCaller, network: Network) -> str:
    """An account with credits from a grant that Spacebring's list does not show."""
    account = native.create_account(network.key)
    native.post(network.key, account, Transaction.GRANT, "purchase", "100")
    return account


def test_spacebring_omits_absent_fields(network: Network, native: NativeCaller, unlisted_account: str) -> None:
    """Minimal rows have no empty text, no null and no unknown company; only the eleven types are listed."""
    location, company = str(uuid.uuid4()), str(uuid.uuid4())
    labels = {"location": location, "company": company}
    for kind, category, amount in (
        (Transaction.CHARGE, "ai_chat", "-1"),
        (Transaction.GRANT, "booking", "1"),
        (Transaction.ADJUSTMENT, "order", "1"),
    ):
        native.post(network.key, unlisted_account, kind, category, amount, labels=labels)
    booking, ticket, order = (
        native.post(network.key, unlisted_account, Transaction.CHARGE, category, "-0.25", labels=labels, **subject)
        for category, subject in (
            ("booking", {"booking": Booking(id="b")}),
            ("event_ticket", {"event_ticket": EventTicket(id="t", event=EventTicket.Event(title="T"))}),
            ("order", {"order": Order(id="o", product=Order.Product(id="p"))}),
        )
    )

    def row(transaction: Transaction, **more: Json) -> Json:
        return {
            "amount": Decimal("0.25"),
            "companyRef": company,
            "createDate": time_of(transaction).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "expiringAmount": Decimal(0),
            "id": transaction.uid,
            "locationRef": location,
            "permanentAmount": Decimal("0.25"),
            "status": "succeeded",
            **more,
        }

    assert network.rows(location) == [
        row(order, type="order", order={"id": "o", "product": {"id": "p"}}),
        row(ticket, type="eventTicket", ticket={"id": "t", "event": {"title": "T"}}),
        row(booking, type="booking", booking={"id": "b"}),
    ]


def test_spacebring_shows_a_companys_current_credits(network: Network, native: NativeCaller) -> None:
    """A company's credits are its current ones, also in an old transaction's row."""
    location = str(uuid.uuid4())
    company = native.create_account(network.key, Account.COMPANY, display_name="Shown without a title")
    labels = {"location": location, "company": company}
    native.post(network.key, company, Transaction.GRANT, "credit_package", "10", labels=labels)

    def credits_now() -> list[Json]:
        rows = network.rows(location)
        companies = [row["company"] for row in rows if isinstance(row, dict)]
        assert all(isinstance(each, dict) and each["title"] == "Shown without a title" for each in companies)
        return [each["credits"] for each in companies if isinstance(each, dict)]

    assert credits_now() == [{"expiring": Decimal(0), "permanent": Decimal(10)}]
    native.post(network.key, company, Transaction.CHARGE, "order", "-2.5", labels=labels)
    assert credits_now() == [{"expiring": Decimal(0), "permanent": Decimal("7.5")}] * 2


def test_nebulablock_hours_begin_at_the_anchor(gateway: Daybook, native: NativeCaller) -> None:
    """user_id is the account's number if its id is not one; hours begin at the anchor, in New York's time."""
    key = create_key(gateway, "demo-nebulablock")
    anchor = Timestamp()
    anchor.FromJsonString("2020-01-01T00:17:42Z")
    user = native.create_account(key, Account.USER, hour_anchor_time=anchor)
    bound = create_key(gateway, "demo-nebulablock", "--account", user)
    native.post(key, user, Transaction.GRANT, "computing", "5")
    native.post(key, user, Transaction.CHARGE, "computing", "-1")
    charges = [
        native.post(key, user, Transaction.CHARGE, category, amount, usage=Usage(model="m"))
        for category, amount in (("computing", "-0.1"), ("serverless", "-0.2"), ("storage", "-0.3"))
    ]
    body = get(gateway, bound, "/users/credits/history")
    assert isinstance(body, dict)
    data = body["data"]
    assert isinstance(data, dict)
    rows = data["credit_history"]
    assert isinstance(rows, list)
    row = rows[0]
    assert isinstance(row, dict)
    begin = datetime.strptime(str(row["create_time"]), "EST %Y-%m-%d %H:%M:%S").replace(
        tzinfo=ZoneInfo("America/New_York")
    )
    assert (begin.minute, begin.second) == (17, 42)
    seconds = (time_of(charges[0]) - begin.astimezone(UTC)).total_seconds()
    assert 0 <= seconds < 3600
    assert data["credit_balance"] == Decimal("3.4")
    assert isinstance(row["user_id"], Decimal)
    assert row["user_id"] == account_number(gateway, key, user)
    # Only usage counts. The charges may fall into two hour windows.
    assert data["total_credit_histories"] == Decimal(len(rows))
    assert sum(Decimal(str(each["total"])) for each in rows if isinstance(each, dict)) == Decimal("0.3")


def account_number(gateway: Daybook, key: str, account: str) -> Decimal:
    """The number that Daybook assigned to an account."""
    body = get(gateway, key, f"/v1/accounts/{account}")
    assert isinstance(body, dict)
    return Decimal(str(body["number"]))
