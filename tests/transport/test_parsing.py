"""Requests that are refused during parsing: malformed messages, too long texts, and unknown fields."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from daybook.facades.teable.v1.billing_service_pb2 import GetSpaceCreditHistoryRequest
from daybook.v1.account_pb2 import Account, Company
from daybook.v1.ledger_service_pb2 import (
    BatchCreateTransactionsRequest,
    CreateAccountRequest,
    CreateTransactionRequest,
    ListTransactionsRequest,
    UpdateAccountRequest,
)
from daybook.v1.transaction_pb2 import Allocation, Transaction
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import ListValue, Struct, Value

from server.ledger.errors import FieldInvalid, FilterInvalid, InvalidArgument, PageTokenInvalid
from server.transport.filters import FILTER_CHARACTERS_MAX
from server.transport.page_tokens import TOKEN_CHARACTERS_MAX
from server.transport.parsing import Naming, parser
from server.transport.validation import BATCH_SIZE_MAX, LABELS_MAX, TEXT_CHARACTERS_MAX

NOT_UTF_8 = b"\xff"
GOOD = GetSpaceCreditHistoryRequest(space_id="spc", month="2024-10", take="7", source_type="ai_chat")


def parsed(request: Message, naming: Naming = "name", characters_max: int = TEXT_CHARACTERS_MAX) -> object:
    """Returns the parsed request, or the refusal."""
    return parser(type(request).FromString, naming, characters_max)(request.SerializeToString())


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x0a\x05abc",
        b"\xff" * 20,
        CreateAccountRequest(account_id="acme").SerializeToString().replace(b"acme", NOT_UTF_8 * 4),
        CreateAccountRequest(account=Account(display_name="name")).SerializeToString().replace(b"name", NOT_UTF_8 * 4),
    ],
    ids=["cut off", "noise", "not UTF-8", "nested and not UTF-8"],
)
def test_malformed_message_is_refused(request_bytes: bytes) -> None:
    """If the bytes can't be parsed, the error names the whole request, even if only one text is not UTF-8."""
    refusal = parser(CreateAccountRequest.FromString, "name")(request_bytes)
    assert isinstance(refusal, FieldInvalid)
    problem = "is not a valid message of its type, or holds text that is not UTF-8"
    assert (refusal.field, refusal.problem) == ("request", problem)


def test_valid_message_is_parsed() -> None:
    """A valid message is parsed unchanged."""
    assert parsed(GOOD) == GOOD


# Field 999, a length, and that number of bytes.
UNKNOWN = b"\xba\x3e\x03abc"


@pytest.mark.parametrize(
    ("request_bytes", "field"),
    [
        (CreateAccountRequest(account_id="acme").SerializeToString() + UNKNOWN, "request"),
        (UNKNOWN, "request"),
        # In field 1, the account, and in its field 10, the user.
        (b"\x0a\x06" + UNKNOWN, "account"),
        (b"\x0a\x08\x52\x06" + UNKNOWN, "account.user"),
        # Field 2, a text, encoded as a number.
        (b"\x10\x01", "request"),
    ],
)
def test_unknown_field_is_refused(request_bytes: bytes, field: str) -> None:
    """An unknown field, for example of a later contract, is refused, and the error names its message."""
    refusal = parser(CreateAccountRequest.FromString, "name")(request_bytes)
    assert isinstance(refusal, FieldInvalid)
    assert (refusal.field, refusal.problem) == (field, "has a field that this server's version of the contract lacks")


def test_unknown_field_is_refused_if_the_sizes_are_equal() -> None:
    """An unknown field is detected even if the reserialized message is as long as the request."""
    # Field 2, the transaction; its field 14, an entry of the labels, without key and value.
    entry = next(f for f in Transaction.DESCRIPTOR.fields if f.name == "labels").number << 3 | 2
    empty = bytes([entry & 0x7F | 0x80, entry >> 7, 0]) if entry > 0x7F else bytes([entry, 0])
    field = next(f for f in CreateTransactionRequest.DESCRIPTOR.fields if f.name == "transaction").number << 3 | 2
    request_bytes = bytes([field, len(empty)]) + empty
    known = CreateTransactionRequest.FromString(request_bytes)
    missing = known.ByteSize() - len(request_bytes)
    assert missing > 3, "an empty entry is serialized with its key and value"
    unknown = b"\xba\x3e" + bytes([missing - 3]) + b"a" * (missing - 3)
    refusal = parser(CreateTransactionRequest.FromString, "name")(request_bytes + unknown)
    assert isinstance(refusal, FieldInvalid)
    assert refusal.field == "request"


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"",
        # An explicit empty text, and a duplicate text.
        b"\x12\x00",
        b"\x12\x01a\x12\x01b",
    ],
)
def test_noncanonical_message_is_parsed(request_bytes: bytes) -> None:
    """A message in a noncanonical encoding is parsed."""
    message = parser(CreateAccountRequest.FromString, "name")(request_bytes)
    assert message == CreateAccountRequest.FromString(request_bytes)


def described(length: int, **labels: str) -> CreateTransactionRequest:
    """Returns a request with a text of `length` characters."""
    return CreateTransactionRequest(transaction=Transaction(description="x" * length, labels=labels))


LONG = "x" * 65


@pytest.mark.parametrize(
    ("request_message", "naming", "field"),
    [
        (CreateAccountRequest(account_id=LONG), "name", "account_id"),
        (CreateAccountRequest(account_id=LONG), "json_name", "accountId"),
        (CreateAccountRequest(account=Account(company=Company(notes=LONG))), "name", "account.company.notes"),
        (BatchCreateTransactionsRequest(requests=[described(1), described(65)]), "name", "requests[1].transaction"),
        (
            BatchCreateTransactionsRequest(requests=[*[described(1)] * (BATCH_SIZE_MAX - 1), described(65)]),
            "name",
            f"requests[{BATCH_SIZE_MAX - 1}].transaction",
        ),
        (
            UpdateAccountRequest(update_mask=FieldMask(paths=["user"] * (LABELS_MAX - 1) + [LONG])),
            "name",
            "update_mask",
        ),
        (UpdateAccountRequest(update_mask=FieldMask(paths=["user", LONG])), "json_name", "updateMask"),
        (described(1, location=LONG), "name", "transaction.labels.location"),
        (described(1, **{LONG: "x"}), "name", "transaction.labels"),
    ],
)
def test_text_that_is_too_long_is_named(request_message: Message, naming: Naming, field: str) -> None:
    """The error of a too long text has its path, in the names of the caller's protocol."""
    refusal = parsed(request_message, naming, 64)
    assert isinstance(refusal, FieldInvalid)
    assert refusal.field.startswith(field)
    assert refusal.problem == "must have at most 64 characters"
    assert parsed(request_message, naming, 65) == request_message


@pytest.mark.parametrize(
    ("field", "bound", "error"),
    [
        ("parent", TEXT_CHARACTERS_MAX, FieldInvalid),
        ("order_by", TEXT_CHARACTERS_MAX, FieldInvalid),
        ("filter", FILTER_CHARACTERS_MAX, FilterInvalid),
        ("page_token", TOKEN_CHARACTERS_MAX, PageTokenInvalid),
    ],
)
@pytest.mark.parametrize("letter", ["x", "\u00e9", "\U0001f600"])
def test_each_text_of_a_list_has_its_limit(field: str, bound: int, error: type[InvalidArgument], letter: str) -> None:
    """A text of exactly its limit is accepted; one more character is refused with the error of its field."""
    longest = ListTransactionsRequest(**{field: letter * bound})  # type: ignore[arg-type]  # each is a text
    assert parsed(longest) == longest
    refusal = parsed(ListTransactionsRequest(**{field: letter * (bound + 1)}))  # type: ignore[arg-type]
    assert type(refusal) is error
    assert isinstance(refusal, InvalidArgument)
    assert refusal.field == field
    if error is not PageTokenInvalid:
        assert refusal.problem == f"must have at most {bound} characters"


def test_page_token_ignores_the_setting_for_texts() -> None:
    """A lower limit for texts does not apply to page tokens."""
    narrowed = ListTransactionsRequest(page_token="x" * TOKEN_CHARACTERS_MAX)
    assert parsed(narrowed, "name", 64) == narrowed


def test_texts_in_a_struct_have_no_own_limit() -> None:
    """Texts in a Struct are limited only by the validation of the whole Struct."""
    metadata = Struct()
    metadata["key"] = "x" * 10_000
    request = CreateTransactionRequest(transaction=Transaction(metadata=metadata))
    assert parsed(request) == request


TINY_ELEMENTS = 2_000_000


def events_of(work: Callable[[], object]) -> int:
    """Returns the number of Python and C calls of some work."""
    count = 0

    def on_event(_frame: object, _event: str, _argument: object) -> None:
        nonlocal count
        count += 1

    sys.setprofile(on_event)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


# Field 2 with the unknown field inside; the last request of a long list is not visited.
UNKNOWN_INSIDE = b"\x12\x06" + UNKNOWN
TINY_REQUESTS = b"\x12\x00" * TINY_ELEMENTS
TINY_PATHS = UpdateAccountRequest(update_mask=FieldMask(paths=[""] * TINY_ELEMENTS)).SerializeToString()
LARGE_PARTS = BatchCreateTransactionsRequest(
    requests=[CreateTransactionRequest(transaction=Transaction(allocations=[Allocation()] * 2100))] * 1000
).SerializeToString()
MANY_LABELS = described(1, **{f"{number:x}": "" for number in range(200_000)}).SerializeToString()
SHORT_LIST = Value(list_value=ListValue(values=[Value(bool_value=True)] * LABELS_MAX))
LARGE_STRUCTS = BatchCreateTransactionsRequest(
    requests=[
        CreateTransactionRequest(
            transaction=Transaction(metadata=Struct(fields={f"{key}": SHORT_LIST for key in range(LABELS_MAX)}))
        )
    ]
    * BATCH_SIZE_MAX
).SerializeToString()


@pytest.mark.parametrize("unknown", [b"", UNKNOWN, UNKNOWN_INSIDE], ids=["known", "unknown", "unknown inside"])
@pytest.mark.parametrize(
    ("message_type", "request_bytes"),
    [
        (BatchCreateTransactionsRequest, TINY_REQUESTS),
        (UpdateAccountRequest, TINY_PATHS),
        (BatchCreateTransactionsRequest, LARGE_PARTS),
        (CreateTransactionRequest, MANY_LABELS),
        (BatchCreateTransactionsRequest, LARGE_STRUCTS),
    ],
    ids=["requests", "paths", "parts", "labels", "structs"],
)
def test_work_for_many_tiny_elements_is_bounded(
    message_type: type[Message], request_bytes: bytes, unknown: bytes
) -> None:
    """Only the first elements of a long list are visited, because parsing precedes authentication."""
    parse = parser(message_type.FromString, "name")
    assert events_of(lambda: parse(request_bytes + unknown)) < 2_000_000


def test_unknown_field_beyond_many_elements_is_refused() -> None:
    """If the element with the unknown field is not visited, the error names the whole request."""
    refusal = parser(BatchCreateTransactionsRequest.FromString, "name")(TINY_REQUESTS + UNKNOWN_INSIDE)
    assert isinstance(refusal, FieldInvalid)
    assert (refusal.field, refusal.problem) == (
        "request",
        "has a field that this server's version of the contract lacks",
    )
