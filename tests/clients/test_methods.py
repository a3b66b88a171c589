"""Both clients have every method of the contracts, in plain values."""

from __future__ import annotations

import dataclasses
import inspect
import uuid
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from enum import StrEnum
from typing import Any

import pytest
from daybook.v1 import account_pb2, admin_service_pb2, api_key_pb2, ledger_service_pb2, transaction_pb2
from google.api import field_behavior_pb2
from google.protobuf.descriptor import MethodDescriptor

import daybook_client
from daybook_client import (
    Account,
    AccountKind,
    Address,
    Allocation,
    ApiKey,
    AsyncDaybook,
    Balance,
    Booking,
    BookingResource,
    Company,
    Daybook,
    Event,
    EventTicket,
    Finding,
    Imported,
    Lot,
    NewApiKey,
    NewTransaction,
    Order,
    OrderOption,
    OrderProduct,
    PastTransaction,
    Posting,
    Progress,
    Transaction,
    TransactionKind,
    TransactionState,
    TransactionView,
    Transfer,
    Usage,
    User,
)
from daybook_client.conversion import fill, to_value
from tests.support.python_clients import ServedLedger, public_methods

METHODS: list[MethodDescriptor] = [
    method
    for file in (ledger_service_pb2, admin_service_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
MESSAGES: dict[type, Any] = {
    Account: account_pb2.Account,
    Address: account_pb2.Company.Address,
    Allocation: transaction_pb2.Allocation,
    ApiKey: api_key_pb2.ApiKey,
    Balance: account_pb2.Balance,
    Booking: transaction_pb2.Booking,
    BookingResource: transaction_pb2.Booking.Resource,
    Company: account_pb2.Company,
    Event: transaction_pb2.EventTicket.Event,
    EventTicket: transaction_pb2.EventTicket,
    Finding: admin_service_pb2.VerifyAccountsResponse.Finding,
    Imported: admin_service_pb2.ImportTransactionsResponse,
    Lot: transaction_pb2.Lot,
    NewApiKey: admin_service_pb2.CreateApiKeyResponse,
    Order: transaction_pb2.Order,
    OrderOption: transaction_pb2.Order.Option,
    OrderProduct: transaction_pb2.Order.Product,
    Progress: admin_service_pb2.VerifyAccountsResponse.Progress,
    Transaction: transaction_pb2.Transaction,
    Transfer: ledger_service_pb2.TransferCreditsResponse,
    Usage: transaction_pb2.Usage,
    User: account_pb2.User,
}
"""The message of each value that results have."""
ENUMS: dict[type[StrEnum], Any] = {
    AccountKind: account_pb2.Account.Kind,
    TransactionKind: transaction_pb2.Transaction.Kind,
    TransactionState: transaction_pb2.Transaction.State,
    TransactionView: ledger_service_pb2.TransactionView,
}
INPUT_ONLY = {"ttl"}


def snake_case(name: str) -> str:
    """Returns the name of a client's method for a method of the contracts."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).removeprefix("_")


@pytest.mark.parametrize("client", [Daybook, AsyncDaybook])
def test_client_has_every_method_of_the_contracts(client: type) -> None:
    """Each client has one method per RPC, and `close`, with documentation and a signature."""
    assert public_methods(client) == {snake_case(method.name) for method in METHODS} | {"close"}
    for name in public_methods(client):
        method = getattr(client, name)
        assert method.__doc__, name
        assert next(iter(inspect.signature(method).parameters)) == "self", name


@pytest.mark.parametrize("value", MESSAGES, ids=lambda value: value.__name__)
def test_result_has_every_field_of_its_message(value: type) -> None:
    """A result has each field of its message except those of requests, and the message itself if it has one."""
    names = {field.name for field in dataclasses.fields(value)} - {"message"}
    assert names == set(MESSAGES[value].DESCRIPTOR.fields_by_name) - INPUT_ONLY


def test_input_has_every_field_that_a_caller_can_set() -> None:
    """NewTransaction has each field of a transaction that is not output-only."""
    fields = transaction_pb2.Transaction.DESCRIPTOR.fields
    fixed = {field_behavior_pb2.OUTPUT_ONLY, field_behavior_pb2.IDENTIFIER}
    settable = {
        each.name for each in fields if not fixed & set(each.GetOptions().Extensions[field_behavior_pb2.field_behavior])
    }
    assert {each.name for each in dataclasses.fields(NewTransaction)} == settable


@pytest.mark.parametrize("values", ENUMS, ids=lambda values: values.__name__)
def test_enumeration_has_every_value_of_the_contracts(values: type[StrEnum]) -> None:
    """An enumeration has each value of the contract, and UNKNOWN if it is in results."""
    contract = {each.removeprefix("TRANSACTION_VIEW_") for each, _ in ENUMS[values].items()}
    assert set(values) - {"UNKNOWN"} == {each for each in contract if not each.endswith("UNSPECIFIED")}


def test_unknown_enumeration_value_is_readable() -> None:
    """A value that only a newer server has becomes UNKNOWN; the message still has its number."""
    message = transaction_pb2.Transaction(uid=str(uuid.uuid4()), kind=99)  # type: ignore[arg-type]  # a newer value
    transaction = to_value(Transaction, message)
    assert (transaction.kind, transaction.message.kind) == (TransactionKind.UNKNOWN, 99)


def test_all_names_are_exported() -> None:
    """The package exports what it lists."""
    assert [name for name in daybook_client.__all__ if not hasattr(daybook_client, name)] == []


def test_account_is_created_read_and_updated(client: Any) -> None:
    """All plain values of an account arrive as they were sent."""
    east = timezone(timedelta(hours=2))
    company = Company(
        title="Acme",
        business_address=Address(city="Zürich", country_code="CH"),
        expiring_day_passes=0,
        metadata={"plan": "gold", "seats": [1.0, None]},
        create_time=datetime(2024, 2, 29, 14, 30, 0, 123456, tzinfo=east),
    )
    account_id = f"acme-{uuid.uuid4()}"
    created = client.create_account(
        account_id, AccountKind.COMPANY, display_name="A", credit_limit=Decimal("2.50"), company=company
    )
    assert created == client.get_account(f"accounts/{account_id}")
    assert (created.kind, created.credit_limit, created.user) == (AccountKind.COMPANY, Decimal("2.5"), None)
    assert created.company == company
    assert created.create_time.tzinfo is UTC
    assert isinstance(created.message, account_pb2.Account)
    updated = client.update_account(created.name, display_name="B", clear=["company"], etag=created.etag)
    assert (updated.display_name, updated.company, updated.credit_limit) == ("B", None, Decimal("2.5"))
    assert created.name in {each.name for each in client.list_accounts(page_size=1)}


def test_transactions_are_posted_refunded_and_transferred(client: Any, account: str) -> None:
    """Every method that moves credits returns exact amounts, and a subject as it was sent."""
    ticket = EventTicket(id="t-1", event=Event(title="Fair", start_time=datetime(2024, 5, 1, tzinfo=UTC)))
    granted = client.create_transaction(
        account,
        NewTransaction(
            TransactionKind.GRANT,
            "bonus",
            "0.000001",
            ttl=timedelta(days=1),
            owner=User(id="u-1", name="Ada"),
            labels={"location": "north"},
            metadata={"note": "x"},
            priority=-5,
            event_ticket=ticket,
        ),
    )
    assert (granted.amount, granted.balance_after) == (Decimal("0.000001"), Decimal("10.000001"))
    assert (granted.event_ticket, granted.booking, granted.metadata) == (ticket, None, {"note": "x"})
    assert granted.expire_time == granted.create_time + timedelta(days=1)
    assert (granted.owner, granted.labels, granted.priority) == (User(id="u-1", name="Ada"), {"location": "north"}, -5)
    usage = Usage(model="small", input_tokens=0, cost_usd=Decimal("0.002"))
    charged = client.create_transaction(
        account, NewTransaction(TransactionKind.CHARGE, "inference", Decimal(-4), usage=usage)
    )
    assert charged.usage == usage
    full = client.get_transaction(charged.name, view=TransactionView.FULL)
    assert (full.uid, charged.allocations) == (charged.uid, ())
    assert [(each.lot.rpartition("/")[2], each.amount) for each in full.allocations] == [
        ("2", Decimal("-0.000001")),
        ("1", Decimal("-3.999999")),
    ]
    refund = client.refund_transaction(charged.name, 1, description="late")
    assert (refund.kind, refund.amount, refund.refund_of) == (TransactionKind.REFUND, 1, charged.name)
    other = client.create_account(f"other-{uuid.uuid4()}", AccountKind.USER).name
    transfer = client.transfer_credits(account, other, Decimal(2), labels={"location": "north"})
    assert (transfer.outgoing.amount, transfer.incoming.amount) == (-2, 2)
    assert transfer.outgoing.transfer_peer == transfer.incoming.name
    balance = client.get_balance(account)
    assert (balance.amount, balance.sequence) == (Decimal("5.000001"), 5)
    assert sum(lot.remaining_amount for lot in client.list_lots(account)) == balance.amount


def test_declined_charge_is_recorded(client: Any, account: str) -> None:
    """With record_declined, a charge without credits returns a FAILED transaction."""
    charge = NewTransaction(TransactionKind.CHARGE, "inference", -11)
    declined = client.create_transaction(account, charge, record_declined=True)
    assert (declined.state, declined.balance_after) == (TransactionState.FAILED, 10)


def test_batch_is_atomic_and_submit_is_not(client: Any, account: str) -> None:
    """A batch with one refused charge posts nothing; submit posts the others, and returns the error."""
    charges = [Posting(account, NewTransaction(TransactionKind.CHARGE, "inference", each)) for each in (-1, -99, -2)]
    with pytest.raises(daybook_client.DaybookError) as refused:
        client.batch_create_transactions(charges)
    assert (refused.value.reason, refused.value.metadata["index"]) == ("INSUFFICIENT_CREDITS", "1")
    assert client.get_balance(account).amount == 10
    outcomes = client.submit_transactions(charges)
    assert [each.error.reason if each.error else each.transaction.amount for each in outcomes] == [
        -1,
        "INSUFFICIENT_CREDITS",
        -2,
    ]
    assert len({each.request_id for each in (outcomes[0].transaction, outcomes[1].error, outcomes[2].transaction)}) == 3
    posted = client.batch_create_transactions([charges[0], charges[2]])
    assert [each.balance_after for each in posted] == [6, 4]


def test_import_resumes_and_verification_streams(client: Any, direct: Daybook) -> None:
    """A repeated import skips what it imported; a verification ends with its progress."""
    name = direct.create_account(f"old-{uuid.uuid4()}", AccountKind.USER).name
    past = [
        PastTransaction(
            name,
            NewTransaction(TransactionKind.GRANT, "purchase", number + 1),
            datetime(2024, 1, 1, tzinfo=UTC) + timedelta(seconds=number),
            f"{name}-{number}",
        )
        for number in range(1500)
    ]
    first = client.import_transactions(iter(past[:1200]))
    assert (first.imported_count, first.skipped_count) == (1200, 0)
    again = client.import_transactions(past)
    assert (again.imported_count, again.skipped_count) == (300, 1200)
    *_, last = client.verify_accounts(name)
    assert isinstance(last, Progress)
    exported = list(client.export_transactions(name))
    assert [each.sequence for each in exported] == list(range(1500, 0, -1))
    assert exported[:100] == list(client.list_transactions(name, page_size=100).page().items)
    rest = list(client.export_transactions(name, last_transaction=exported[1199].name))
    assert rest == exported[1200:]
    assert (last.done, last.transaction_count, last.finding_count) == (True, 1500, 0)


def test_error_in_the_items_of_an_import_reaches_the_caller(client: Any, account: str) -> None:
    """An exception while items are read or converted is raised as it is."""
    transaction = NewTransaction(TransactionKind.GRANT, "purchase", 1)
    with pytest.raises(ValueError, match="must be an aware datetime"):
        client.import_transactions([PastTransaction(account, transaction, datetime(2024, 1, 1), "x")])  # noqa: DTZ001


def test_refused_item_of_an_import_is_named(client: Any, account: str) -> None:
    """The error of an item that is refused has its index."""
    late = NewTransaction(TransactionKind.GRANT, "purchase", 1)
    with pytest.raises(daybook_client.DaybookError) as refused:
        client.import_transactions([PastTransaction(account, late, datetime(2024, 1, 1, tzinfo=UTC), "x")])
    assert (refused.value.reason, refused.value.metadata["index"]) == ("FIELD_INVALID", "0")


def test_api_keys_are_created_rotated_and_revoked(client: Any, ledger: ServedLedger) -> None:
    """A new key works; after a rotation the new secret works, and after its revocation none does."""
    made = client.create_api_key(["accounts.readonly"], display_name="report", ttl=timedelta(days=1))
    assert made.key_string not in repr(made)
    assert made.api_key.expire_time == made.api_key.create_time + timedelta(days=1)
    with Daybook(ledger.address, key=made.key_string) as reader:
        reader.list_accounts().page()
    rotated = client.rotate_api_key(made.api_key.name, grace_period=timedelta(hours=1))
    assert rotated.key_string != made.key_string
    assert made.api_key.name in {each.name for each in client.list_api_keys(page_size=1)}
    assert client.revoke_api_key(made.api_key.name).revoke_time is not None


@pytest.mark.parametrize("amount", [0.5, float("nan")])
def test_float_is_refused(client: Any, account: str, amount: float) -> None:
    """A float is refused before it is sent, because it is not exact."""
    with pytest.raises(TypeError, match="amount must be a Decimal"):
        client.create_transaction(account, NewTransaction(TransactionKind.GRANT, "purchase", amount))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("amount", "text"), [(Decimal("1E+3"), "1000"), (Decimal("-1E-6"), "-0.000001"), (7, "7"), ("0.10", "0.10")]
)
def test_amount_is_written_without_an_exponent(amount: daybook_client.Amount, text: str) -> None:
    """A decimal is written in the form that the contracts require."""
    message = transaction_pb2.Transaction()
    fill(message, {"amount": amount})
    assert message.amount == text
