"""The files of exports: JSON as the transcoder writes it, and CSV that spreadsheets read without a formula."""

from __future__ import annotations

import csv
import io
import json

import pytest
from daybook.v1.ledger_service_pb2 import ExportTransactionsRequest
from daybook.v1.transaction_pb2 import Transaction
from google.protobuf.json_format import MessageToDict, Parse
from hypothesis import given
from hypothesis import strategies as st

from server.ledger.instants import EARLIEST, LATEST, set_timestamp
from server.rpc.export_files import CSV_COLUMNS, FORMS

NDJSON, CSV = FORMS[ExportTransactionsRequest.NDJSON], FORMS[ExportTransactionsRequest.CSV]
NAME = "accounts/acme/transactions/0192f3a4-5b6c-7d8e-9f01-23456789abcd"

_texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=9) | st.builds(
    str.__add__, st.sampled_from(tuple("=+-@\t\r\n'\",;")), st.text("a1=,\"'\r\n", max_size=5)
)
_values = st.recursive(
    st.none() | st.booleans() | _texts | st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(-1e15, 1e15),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def transactions(draw: st.DrawFn) -> Transaction:
    """Any transaction that the ledger can store."""
    transaction = Transaction(
        name=NAME,
        uid=NAME[-36:],
        sequence=draw(st.integers(1, 2**63 - 1)),
        kind=draw(st.sampled_from(Transaction.Kind.values()[1:])),
        category="ai_chat",
        state=draw(st.sampled_from(Transaction.State.values()[1:])),
        amount=draw(st.sampled_from(["-0.25", "999999999999.999999", "-999999999999.999999", "0.000001"])),
        description=draw(_texts),
        receipt_uri=draw(_texts),
        request_id=draw(_texts),
        labels=draw(st.dictionaries(st.sampled_from(["location", "a"]), _texts)),
        priority=draw(st.integers(-1000, 1000)),
    )
    set_timestamp(transaction.create_time, draw(st.integers(EARLIEST, LATEST)))
    if draw(st.booleans()):
        set_timestamp(transaction.expire_time, draw(st.integers(EARLIEST, LATEST)))
        transaction.owner.name = draw(_texts)
    if draw(st.booleans()):
        transaction.metadata.update(draw(st.dictionaries(_texts, _values, max_size=3)))
    match draw(st.integers(0, 3)):
        case 1:
            transaction.event_ticket.id = draw(_texts)
            transaction.event_ticket.event.start_time.FromNanoseconds(draw(st.integers(0, 10**18)))
        case 2:
            transaction.usage.input_tokens = draw(st.integers(0, 2**63 - 1))
            transaction.usage.cost_usd = ""
        case 3:
            transaction.booking.resource.title = draw(_texts)
    return transaction


def cells_of(transaction: Transaction) -> dict[str, str]:
    """The cells of a transaction in CSV, by column."""
    (record,) = csv.reader(io.StringIO(CSV.write(transaction), newline=""), strict=True)
    return dict(zip(CSV_COLUMNS, record, strict=True))


@given(transactions())
def test_json_line_is_the_json_of_protobuf(transaction: Transaction) -> None:
    """A line of NDJSON has no line break, and is the JSON of the message with its empty fields."""
    line = NDJSON.write(transaction)
    assert "\n" not in line
    assert json.loads(line) == MessageToDict(transaction, always_print_fields_with_no_presence=True)
    assert Parse(line, Transaction()) == transaction


@given(transactions())
def test_csv_has_every_field(transaction: Transaction) -> None:
    """The cells of a line have every field exactly: texts after a leading apostrophe, and messages as JSON."""
    cells = cells_of(transaction)
    for name in ("description", "receipt_uri", "request_id"):
        assert cells[name].removeprefix("'") == getattr(transaction, name)
    for name in ("name", "uid", "category", "amount"):
        assert cells[name] == getattr(transaction, name)
    assert (cells["account"], cells["sequence"]) == ("acme", str(transaction.sequence))
    assert dict(transaction.labels) == json.loads(cells["labels"] or "{}")
    shown = MessageToDict(transaction, always_print_fields_with_no_presence=True, preserving_proto_field_name=True)
    for name in ("owner", "metadata", "booking", "event_ticket", "usage"):
        assert (name in shown) == bool(cells[name])
        if cells[name]:
            read = type(getattr(transaction, name))()
            assert Parse(cells[name], read) == getattr(transaction, name)
    assert cells["kind"] == shown["kind"]
    times = Transaction()
    times.create_time.FromJsonString(cells["create_time"])
    assert times.create_time == transaction.create_time


@given(transactions())
def test_no_cell_is_a_formula(transaction: Transaction) -> None:
    """No cell but a number begins with a character by which spreadsheets recognize a formula."""
    numbers = {"amount", "expiring_amount", "permanent_amount", "balance_after", "priority"}
    for name, cell in cells_of(transaction).items():
        assert name in numbers or not cell.startswith(tuple("=+-@\t\r\n")), name


@pytest.mark.parametrize("text", ['=HYPERLINK("http://x")', "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "'quoted"])
def test_dangerous_text_gets_an_apostrophe(text: str) -> None:
    """A text that a spreadsheet would take for a formula, or that begins with an apostrophe, gets an apostrophe."""
    transaction = Transaction(name=NAME, kind=Transaction.CHARGE, state=Transaction.SUCCEEDED, amount="-1")
    transaction.description = text
    assert cells_of(transaction)["description"] == f"'{text}"
    assert cells_of(transaction)["amount"] == "-1"


def test_columns_cover_every_field() -> None:
    """The columns are the fields of a transaction in the order of the contract, after which comes what is new."""
    fields = [field.name for field in Transaction.DESCRIPTOR.fields]
    omitted = {"allocations", "ttl"}
    assert [each for each in CSV_COLUMNS if each != "account"] == [each for each in fields if each not in omitted]
