"""Facade fields that depend on the time of the read: credits, companies and refunds."""

from __future__ import annotations

import uuid

import pytest
from daybook.facades.nebulablock.v1.users_service_pb2 import GetCreditsHistoryRequest
from daybook.facades.nebulablock.v1.users_service_pb2_grpc import UsersStub
from daybook.facades.spacebring.v1.transactions_service_pb2 import CreditsTransaction, GetCreditsTransactionsRequest
from daybook.facades.spacebring.v1.transactions_service_pb2_grpc import TransactionsStub
from daybook.v1.account_pb2 import Account, Company
from daybook.v1.ledger_service_pb2 import RefundTransactionRequest
from daybook.v1.transaction_pb2 import Transaction, Usage

from server.ledger.instants import SECOND, to_timestamp
from tests.support.callers import Client, Server
from tests.support.clock import NOON, Clock
from tests.support.markers import only_sqlite

pytestmark = only_sqlite

GRANT, CHARGE = Transaction.GRANT, Transaction.CHARGE
IN_AN_HOUR = to_timestamp(NOON + 3600 * SECOND)


async def rows_of(client: Client) -> list[CreditsTransaction]:
    """Spacebring's list of the tenant `house`, newest first."""
    network = ("spacebring-network-id", str(uuid.uuid5(uuid.NAMESPACE_URL, "house")))
    answer = await TransactionsStub(client.channel).GetCreditsTransactions(
        GetCreditsTransactionsRequest(), metadata=(*client.metadata, network)
    )
    return list(answer.transactions)


async def credits_of(client: Client) -> tuple[float, float]:
    """The expiring and the permanent credits of the newest row's company."""
    held = (await rows_of(client))[0].company.credits
    return held.expiring, held.permanent


async def test_spacebring_excludes_expired_credits(client: Client, clock: Clock) -> None:
    """A company's credits exclude expired ones, even before their expiration is posted."""
    await client.create_account("acme", kind=Account.COMPANY)
    labels = {"company": "acme"}
    await client.post("acme", GRANT, "10", category="credit_package", expire_time=IN_AN_HOUR, labels=labels)
    await client.post("acme", GRANT, "4", category="credit_package", labels=labels)
    await client.post("acme", CHARGE, "-3.5", category="order", labels=labels)
    clock.advance(3599.999999)
    assert await credits_of(client) == (6.5, 4)
    clock.advance(0.000001)
    assert await credits_of(client) == (0, 4)
    assert [row.type for row in await rows_of(client)] == ["order", "creditPackage", "creditPackage"]
    # The next posting posts the expiration, which does not change the credits.
    await client.post("acme", CHARGE, "-1", category="order", labels=labels)
    assert await credits_of(client) == (0, 3)
    newest, expiration = (await rows_of(client))[:2]
    assert (newest.type, expiration.type, expiration.amount) == ("order", "subscriptionExpiration", 6.5)
    assert (expiration.create_date, expiration.company_ref) == ("2024-10-10T13:00:00.000000Z", "acme")


async def test_spacebring_counts_debt_as_permanent(client: Client) -> None:
    """A company in debt has negative permanent credits, and the charge beyond its credits is of permanent ones."""
    await client.create_account("acme", kind=Account.COMPANY, credit_limit="5")
    labels = {"company": "acme"}
    await client.post("acme", GRANT, "2", category="credit_package", expire_time=IN_AN_HOUR, labels=labels)
    await client.post("acme", CHARGE, "-6", category="admin_charge", labels=labels)
    assert await credits_of(client) == (0, -4)
    charge = (await rows_of(client))[0]
    parts = (charge.type, charge.amount, charge.expiring_amount, charge.permanent_amount)
    assert parts == ("chargePermanentCredits", 6, 2, 4)


async def test_spacebring_shows_current_companies(client: Client) -> None:
    """A company without a title has its display name; other accounts are shown as no company."""
    await client.create_account("acme", kind=Account.COMPANY, display_name="Acme", company=Company(notes="n"))
    await client.create_account("person", kind=Account.USER, display_name="Person")
    for company in ("acme", "person", "unknown"):
        await client.post("acme", GRANT, "1", category="credit_package", labels={"company": company})
    unknown, person, acme = await rows_of(client)
    assert (unknown.company_ref, unknown.HasField("company")) == ("unknown", False)
    assert (person.company_ref, person.HasField("company")) == ("person", False)
    shown = acme.company
    assert (shown.id, shown.title, shown.notes, shown.create_date) == (
        "acme",
        "Acme",
        "n",
        "2024-10-10T12:00:00.000000Z",
    )
    assert not shown.HasField("business_address")
    assert not shown.HasField("day_passes")


async def test_spacebring_charge_shows_its_total_refund(client: Client, clock: Clock) -> None:
    """A charge shows its total refund and the time of the latest; a refund has no such field."""
    await client.create_account("acme")
    await client.post("acme", GRANT, "10", category="credit_package")
    charge = await client.post("acme", CHARGE, "-8", category="booking")
    refunds = []
    for amount in ("1.25", "2", ""):
        clock.advance(60)
        await client.ledger.RefundTransaction(
            RefundTransactionRequest(name=charge.name, amount=amount), metadata=client.metadata
        )
        rows = await rows_of(client)
        assert [row.HasField("refund") for row in rows if row.id != charge.uid] == [False] * (len(rows) - 1)
        (refund,) = [row.refund for row in rows if row.id == charge.uid]
        refunds.append((rows[0].amount, refund.amount, refund.create_date))
    assert refunds == [
        (1.25, 1.25, "2024-10-10T12:01:00.000000Z"),
        (2, 3.25, "2024-10-10T12:02:00.000000Z"),
        (4.75, 8, "2024-10-10T12:03:00.000000Z"),
    ]


@pytest.mark.parametrize(
    ("credit_limit", "spent", "available"),
    [("0", "3", 7.5), ("0", "10.5", 0), ("20", "3", 27.5), ("20", "25", 5.5), ("20", "30.5", 0)],
)
async def test_nebulablock_balance_is_the_available_amount(
    server: Server, client: Client, clock: Clock, credit_limit: str, spent: str, available: float
) -> None:
    """credit_balance is the available amount: it includes the credit limit and excludes expired credits."""
    await client.create_account("266", credit_limit=credit_limit)
    await client.post("266", GRANT, "10.5")
    await client.post("266", GRANT, "100", expire_time=IN_AN_HOUR)
    clock.advance(3600)
    await client.post("266", CHARGE, f"-{spent}", category="computing", usage=Usage(model="m"))
    tenant_number = await server.book.credentials.tenant_number("house")
    assert tenant_number is not None
    user = await server.client(tenant_number, account_id="266")
    answer = await UsersStub(client.channel).GetCreditsHistory(GetCreditsHistoryRequest(), metadata=user.metadata)
    assert answer.data.credit_balance == available
    (hour,) = answer.data.credit_history
    assert (hour.user_id, hour.total, hour.create_time) == (266, float(spent), "EST 2024-10-10 09:00:00")


async def test_nebulablock_excludes_expired_credits(server: Server, client: Client, clock: Clock) -> None:
    """Expired credits are not available, even before their expiration is posted."""
    await client.create_account("266")
    await client.post("266", GRANT, "10.5", expire_time=IN_AN_HOUR)
    tenant_number = await server.book.credentials.tenant_number("house")
    assert tenant_number is not None
    user = await server.client(tenant_number, account_id="266")
    balances = []
    for seconds in (0, 3599.999999, 0.000001):
        clock.advance(seconds)
        answer = await UsersStub(client.channel).GetCreditsHistory(GetCreditsHistoryRequest(), metadata=user.metadata)
        balances.append(answer.data.credit_balance)
    assert balances == [10.5, 10.5, 0]
    assert [row.kind for row in await client.history("266")] == [GRANT]
