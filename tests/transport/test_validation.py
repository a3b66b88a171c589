"""Validation: every limit of a request's fields, just inside and just outside."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from daybook.v1.account_pb2 import Account, Company, User
from daybook.v1.api_key_pb2 import ApiKey
from daybook.v1.ledger_service_pb2 import CreateAccountRequest, CreateTransactionRequest, UpdateAccountRequest
from daybook.v1.transaction_pb2 import Booking, EventTicket, Order, Transaction, Usage
from google.api.field_behavior_pb2 import OUTPUT_ONLY, field_behavior
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from server.ledger import money
from server.ledger.errors import FieldInvalid
from server.ledger.posting import Draft, Kind
from server.transport.metadata import METADATA_BYTES_MAX
from server.transport.validation import (
    CHARACTERS_MAX,
    DETAILS,
    check_content,
    identity_of,
    read_amount,
    read_page_size,
    read_profile,
    read_request_id,
    read_transaction,
    require_unset_by_caller,
)

PROTOS = Path(__file__).parents[2] / "protos" / "daybook" / "v1"

PROFILE = ("display_name", "user", "company")

UNLIMITED = {
    ("daybook.v1.Usage", "cost_usd"): "is an amount, whose grammar limits its length",
}
"""The texts of callers without a limit in CHARACTERS_MAX, with the reason."""


def charge(**fields: Any) -> Transaction:
    """Returns a valid transaction with changed fields."""
    return Transaction(**{"kind": Transaction.CHARGE, "category": "ai_chat", "amount": "-1", **fields})


def problem_of(check: Callable[[], object]) -> str | None:
    """Returns the field that is refused, or None. Only FieldInvalid may be raised."""
    try:
        check()
    except FieldInvalid as error:
        return error.field if error.problem else "a field without a problem"
    return None


def field_problem(transaction: Transaction) -> str | None:
    """Returns the field of a transaction that is refused, or None."""
    return problem_of(lambda: read_transaction(transaction))


@dataclass(frozen=True)
class Place:
    """A field at any depth of a request, with the names on its path."""

    root: str
    names: tuple[str, ...]
    field: FieldDescriptor

    @property
    def message(self) -> str:
        """The full name of the message that has the field."""
        return self.field.containing_type.full_name  # type: ignore[union-attr]  # Only extensions have none.

    @property
    def path(self) -> str:
        """The path of the field in errors."""
        return ".".join((self.root, *self.names))

    def problem_with(self, value: Any) -> str | None:
        """Returns the refused field, or None, of a valid request in which this field has this value."""
        message: Any = {"transaction": charge(), "account": Account(kind=Account.SPACE), "api_key": ApiKey()}[self.root]
        if "usage" not in self.names and self.root == "transaction":
            message.kind = Transaction.ADJUSTMENT
        inside = message
        for name in self.names[:-1]:
            inside = getattr(inside, name)
            # An empty message counts as set, and needs its id.
            inside.SetInParent()
            if "id" in inside.DESCRIPTOR.fields_by_name:
                inside.id = "id"
        if self.field.message_type is None:
            setattr(inside, self.names[-1], value)
        else:
            getattr(inside, self.names[-1]).CopyFrom(value)
        if self.root == "transaction":
            return field_problem(message)
        return problem_of(lambda: check_content(self.root, message))


def places(root: str, descriptor: Descriptor, only: Collection[str]) -> Iterator[Place]:
    """Yields every singular field of a message, at any depth, whose path begins with one of these names."""

    def inside(message: Descriptor, names: tuple[str, ...]) -> Iterator[Place]:
        for field in message.fields:
            if not names and field.name not in only:
                continue
            if field.is_repeated:
                continue
            yield Place(root, (*names, field.name), field)
            if field.message_type is not None and field.message_type.file.package == "daybook.v1":
                yield from inside(field.message_type, (*names, field.name))

    return inside(descriptor, ())


PLACES = [
    *places("transaction", Transaction.DESCRIPTOR, DETAILS),
    *places("account", Account.DESCRIPTOR, PROFILE),
    *places("api_key", ApiKey.DESCRIPTOR, ("display_name",)),
]
TEXTS = [place for place in PLACES if place.field.cpp_type == FieldDescriptor.CPPTYPE_STRING]


def limit_of(place: Place) -> int | None:
    """Returns the limit of a text in the table."""
    return CHARACTERS_MAX.get(place.message, {}).get(place.field.name)


LIMITED = [(place, limit) for place in TEXTS if (limit := limit_of(place)) is not None]


def of_type(full_name: str) -> list[Place]:
    """Returns the places of messages of one type."""
    found = [place for place in PLACES if place.field.message_type and place.field.message_type.full_name == full_name]
    assert found
    return found


def path_of(place: Place) -> str:
    """Returns the path of a place, as the id of a test case."""
    return place.path


# A country code has a stricter format.
FREE_TEXTS = [(place, limit) for place, limit in LIMITED if place.names[-1] != "country_code"]


@pytest.mark.parametrize(
    ("text", "good"), [("NL", True), ("nl", False), ("N", False), ("NLD", False), ("N1", False), ("ÄÖ", False)]
)
def test_country_is_two_capital_letters(text: str, good: bool) -> None:
    """A country code is two capital ASCII letters."""
    (place,) = [place for place, _ in LIMITED if place.names[-1] == "country_code"]
    assert place.problem_with(text) == (None if good else place.path)


@pytest.mark.parametrize(("place", "limit"), FREE_TEXTS, ids=[place.path for place, _ in FREE_TEXTS])
def test_texts_are_limited(place: Place, limit: int) -> None:
    """A text with its limit of characters, regardless of bytes, is accepted; one more character is refused."""
    assert place.problem_with("X" * limit) is None
    assert place.problem_with("ä" * limit) is None
    assert place.problem_with("🏦" * limit) is None
    assert place.problem_with("X" * (limit + 1)) == place.path


def test_every_text_has_a_limit_or_a_reason() -> None:
    """Every text of a caller is either limited by the table or in UNLIMITED."""
    unlimited = {(place.message, place.field.name) for place in TEXTS if limit_of(place) is None}
    assert unlimited == set(UNLIMITED)


def test_every_limit_is_in_use() -> None:
    """Every entry of the table is a text in a request."""
    used = {(place.message, place.field.name) for place, _ in LIMITED}
    assert used == {(message, field) for message, fields in CHARACTERS_MAX.items() for field in fields}


def documented_limits() -> dict[tuple[str, str], int]:
    """Returns the limits of texts in the comments of the contract."""
    limits: dict[tuple[str, str], int] = {}
    for name in ("account.proto", "api_key.proto", "transaction.proto"):
        scope: list[str] = []
        comment: list[str] = []
        for line in map(str.strip, (PROTOS / name).read_text().splitlines()):
            if line.startswith("//"):
                comment.append(line.removeprefix("//").strip())
                continue
            if match := re.fullmatch(r"(?:message|enum|oneof) (\w+) \{", line):
                scope.append("" if line.startswith("oneof") else match[1])
            elif line == "}":
                scope.pop()
            elif match := re.match(r"(?:optional )?string (\w+) = ", line):
                message = ".".join(("daybook.v1", *filter(None, scope)))
                if found := re.search(r"at most ([\d,]+) characters", " ".join(comment)):
                    limits[message, match[1]] = int(found[1].replace(",", ""))
            comment = []
    return limits


def test_limits_match_the_contract() -> None:
    """The limits in the table equal the limits in the comments of the contract."""
    table = {(message, field): limit for message, fields in CHARACTERS_MAX.items() for field, limit in fields.items()}
    # The contract describes this text without a number.
    assert table.pop(("daybook.v1.Company.Address", "country_code")) == 2
    assert documented_limits() == table


@pytest.mark.parametrize("place", TEXTS, ids=path_of)
def test_no_text_may_contain_nul(place: Place) -> None:
    """A text with NUL, which PostgreSQL can't store, is refused, and the error names the field."""
    assert place.problem_with("\0") == place.path


@pytest.mark.parametrize("place", of_type("google.protobuf.Timestamp"), ids=path_of)
@pytest.mark.parametrize(
    ("seconds", "nanoseconds", "good"),
    [
        (0, 0, True),
        (-62_135_596_800, 0, True),
        (-62_135_596_801, 999_999_999, False),
        (253_402_300_799, 999_999_999, True),
        (253_402_300_800, 0, False),
        (0, 1_000_000_000, False),
        (0, 999_999_999, True),
        (0, -1, False),
        (2**63 - 1, 0, False),
        (-(2**63), 0, False),
    ],
)
def test_times_must_be_valid(place: Place, seconds: int, nanoseconds: int, good: bool) -> None:
    """A Timestamp outside the years 1 to 9999, or with invalid nanoseconds, is refused."""
    problem = place.problem_with(Timestamp(seconds=seconds, nanos=nanoseconds))
    assert problem == (None if good else place.path)


@pytest.mark.parametrize("seconds", [-62_135_596_801, 253_402_300_800])
def test_hour_anchor_must_be_valid(seconds: int) -> None:
    """An hour anchor outside the years 1 to 9999 is refused."""
    account = Account(kind=Account.SPACE, hour_anchor_time=Timestamp(seconds=seconds))
    assert problem_of(lambda: check_content("account", account)) == "account.hour_anchor_time"


@pytest.mark.parametrize(
    "place",
    [
        place
        for place in PLACES
        if place.field.cpp_type in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)
    ],
    ids=path_of,
)
@pytest.mark.parametrize(("number", "good"), [(0, True), (1, True), (2**31 - 1, True), (-1, False), (-(2**31), False)])
def test_counts_are_not_negative(place: Place, number: int, good: bool) -> None:
    """A count of 0 or more is accepted; a negative count is refused."""
    assert place.problem_with(number) == (None if good else place.path)


def struct_of(size: int) -> Struct:
    """Returns a struct with a serialized size of `size` bytes."""
    struct = Struct()
    length = 0
    for _ in range(4):
        struct["key"] = "x" * length
        # A length has one to three bytes, so a correction may need another one.
        length += size - struct.ByteSize()
    assert struct.ByteSize() == size
    return struct


@pytest.mark.parametrize("place", of_type("google.protobuf.Struct"), ids=path_of)
@pytest.mark.parametrize(("size", "good"), [(8191, True), (8192, True), (8193, False)])
def test_metadata_is_limited(place: Place, size: int, good: bool) -> None:
    """Metadata of 8 KiB is accepted; one byte more is refused."""
    assert METADATA_BYTES_MAX == 8 * 1024
    assert place.problem_with(struct_of(size)) == (None if good else place.path)


@pytest.mark.parametrize("place", of_type("google.protobuf.Struct"), ids=path_of)
@pytest.mark.parametrize(
    ("number", "good"),
    [
        # JSON can't represent these, so every list with one would fail over REST.
        *((float(text), False) for text in ("nan", "inf", "-inf")),
        # The largest integer below which a double is exact; 9007199254740993 arrives rounded.
        (9_007_199_254_740_991, True),
        (-9_007_199_254_740_991, True),
        (9_007_199_254_740_992, False),
        (-9_007_199_254_740_992, False),
        (float(9_007_199_254_740_993), False),
        (1e300, False),
        (0.1, True),
        (-0.0, True),
        (5e-324, True),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_metadata_has_only_exact_numbers(place: Place, number: float, good: bool, nested: bool) -> None:
    """A number that can't be stored exactly is refused, and the error has the path of its key."""
    struct = Struct()
    struct.update({"a": {"b": [1, {"c": number}]}} if nested else {"order": number})
    assert place.problem_with(struct) == (None if good else f"{place.path}.{'a.b[1].c' if nested else 'order'}")


def test_long_path_in_metadata_is_truncated() -> None:
    """The path in an error is truncated if keys are long and deeply nested."""
    struct, inner = Struct(), {"x" * 100: float("nan")}
    for _ in range(15):
        inner = {"x" * 100: inner}  # type: ignore[dict-item]  # one is inside the other
    struct.update(inner)
    problem = field_problem(charge(metadata=struct))
    assert problem is not None
    assert problem.startswith("transaction.metadata.xxx")
    assert len(problem) < 400


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("owner", User(name="Ada")),
        ("creator", User(name="Ada")),
        ("booking", Booking(resource=Booking.Resource(id="room"))),
        ("order", Order(product=Order.Product(id="product"))),
        ("event_ticket", EventTicket(event=EventTicket.Event(id="event"))),
    ],
)
def test_ids_are_required(field: str, value: Message) -> None:
    """A person or a subject without an id is refused."""
    assert field_problem(charge(**{field: value})) == f"transaction.{field}.id"
    assert field_problem(charge(**{field: type(value)()})) == f"transaction.{field}.id"
    assert field_problem(charge(**{field: type(value)(id="id")})) is None


def test_id_of_a_profile_is_required() -> None:
    """The user of an account needs an id; a company does not."""
    assert problem_of(lambda: check_content("account", Account(user=User(name="Ada")))) == "account.user.id"
    assert problem_of(lambda: check_content("account", Account(company=Company(title="Acme")))) is None


@pytest.mark.parametrize(
    ("category", "good"),
    [
        ("a", True),
        ("ai_chat", True),
        ("a1_", True),
        ("a__b", True),
        ("a" * 63, True),
        ("a" * 64, False),
        ("", False),
        ("A", False),
        ("aI", False),
        ("1a", False),
        ("_a", False),
        ("a-b", False),
        ("a b", False),
        ("a.b", False),
        ("a\n", False),
        ("a\0", False),
        ("ä", False),
        ("aß", False),
        ("a\u0661", False),
    ],
)
def test_format_of_categories(category: str, good: bool) -> None:
    """Categories and label keys are a lower-case letter and up to 62 lower-case letters, digits and underscores."""
    assert field_problem(charge(category=category)) == (None if good else "transaction.category")
    assert field_problem(charge(labels={category: "value"})) == (None if good else "transaction.labels")


@pytest.mark.parametrize(
    ("value", "good"),
    [
        ("", False),
        ("x", True),
        (" ", True),
        ("x" * 128, True),
        ("ä" * 128, True),
        ("x" * 129, False),
        ("\0", False),
        ("a\0b", False),
        ("A/ü 🏦", True),
    ],
)
def test_label_values(value: str, good: bool) -> None:
    """A label's value has 1 to 128 characters without NUL; the error of another value names its key."""
    assert field_problem(charge(labels={"town": value})) == (None if good else "transaction.labels.town")


@pytest.mark.parametrize(("count", "good"), [(0, True), (1, True), (32, True), (33, False)])
def test_labels_are_limited(count: int, good: bool) -> None:
    """A transaction has at most 32 labels."""
    labels = {f"key_{number}": "value" for number in range(count)}
    assert field_problem(charge(labels=labels)) == (None if good else "transaction.labels")


@pytest.mark.parametrize(
    ("kind", "good"),
    [
        (Transaction.KIND_UNSPECIFIED, False),
        (Transaction.GRANT, True),
        (Transaction.CHARGE, True),
        (Transaction.REFUND, False),
        (Transaction.TRANSFER_IN, False),
        (Transaction.TRANSFER_OUT, False),
        (Transaction.EXPIRATION, False),
        (Transaction.ADJUSTMENT, True),
        (99, False),
        (-1, False),
    ],
)
def test_kinds_that_can_be_created(kind: Kind, good: bool) -> None:
    """Only GRANT, CHARGE and ADJUSTMENT can be created directly."""
    assert field_problem(charge(kind=kind)) == (None if good else "transaction.kind")


@pytest.mark.parametrize(
    ("state", "good"),
    [
        (Transaction.STATE_UNSPECIFIED, True),
        (Transaction.SUCCEEDED, True),
        (Transaction.FAILED, True),
        (Transaction.CANCELED, True),
        (99, False),
    ],
)
def test_states_that_can_be_created(state: Transaction.State.ValueType, good: bool) -> None:
    """A transaction can be created in any state; unspecified means SUCCEEDED."""
    assert field_problem(charge(state=state)) == (None if good else "transaction.state")


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("-1", -1_000_000),
        ("-0.000001", -1),
        ("1", 1_000_000),
        ("0", 0),
        ("-999999999999.999999", -999_999_999_999_999_999),
        ("", None),
        ("1e3", None),
        ("+1", None),
        ("1.1234567", None),
        ("1234567890123", None),
        ("1,5", None),
        ("-", None),
    ],
)
def test_amounts_are_parsed_exactly(text: str, amount: int | None) -> None:
    """An amount of either sign is parsed exactly, or refused."""
    if amount is None:
        assert field_problem(charge(amount=text)) == "transaction.amount"
        assert problem_of(lambda: read_amount("some.field", text)) == "some.field"
        return
    assert read_transaction(charge(amount=text))[0] == Draft(Transaction.CHARGE, "ai_chat", amount)
    assert read_amount("some.field", text) == amount


@pytest.mark.parametrize(
    ("cost", "good"),
    [
        ("0", True),
        ("-0", True),
        ("0.000001", True),
        ("999999999999.999999", True),
        ("-0.000001", False),
        ("-1", False),
        ("", False),
        ("free", False),
        ("0.1234567", False),
        ("\0", False),
    ],
)
def test_cost_is_not_negative(cost: str, good: bool) -> None:
    """The cost of usage is an amount of 0 or more; any other text, including an empty one, is refused."""
    expected = None if good else "transaction.usage.cost_usd"
    assert field_problem(charge(usage=Usage(cost_usd=cost))) == expected


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (Transaction.CHARGE, None),
        (Transaction.GRANT, "transaction.usage"),
        (Transaction.ADJUSTMENT, "transaction.usage"),
    ],
)
def test_usage_requires_a_charge(kind: Kind, problem: str | None) -> None:
    """A usage subject, even an empty one, requires the kind CHARGE."""
    assert field_problem(charge(kind=kind, usage=Usage())) == problem
    assert field_problem(charge(kind=kind, usage=Usage(model="m", input_tokens=1))) == problem


@pytest.mark.parametrize(
    ("subject", "is_usage"),
    [
        ({}, False),
        ({"booking": Booking(id="b")}, False),
        ({"order": Order(id="o")}, False),
        ({"event_ticket": EventTicket(id="t")}, False),
        ({"usage": Usage()}, True),
    ],
    ids=["none", "booking", "order", "event_ticket", "usage"],
)
def test_subject_determines_usage(subject: dict[str, Any], is_usage: bool) -> None:
    """A draft is usage if and only if its subject is usage, even an empty one."""
    assert read_transaction(charge(**subject))[0].is_usage is is_usage


def copy_of(transaction: Transaction) -> Transaction:
    """Returns a copy, because read_transaction reuses its argument for the details."""
    copy = Transaction()
    copy.CopyFrom(transaction)
    return copy


FULL = charge(
    description="memo",
    owner=User(id="owner", name="Ada", surname="Lovelace"),
    creator=User(id="creator", membership="m"),
    labels={"location": "berlin", "company": "acme"},
    receipt_uri="https://example.com/1",
    metadata=struct_of(100),
    usage=Usage(model="large", input_tokens=0, output_tokens=7, cost_usd="0.5"),
)


def test_details_are_kept_unchanged() -> None:
    """Details of the caller are kept unchanged; kind, category and amount go into the draft."""
    given = copy_of(FULL)
    draft, details = read_transaction(given)
    assert given == FULL
    assert draft == Draft(Transaction.CHARGE, "ai_chat", -1_000_000, is_usage=True)
    expected = Transaction()
    expected.CopyFrom(FULL)
    for name in ("kind", "category", "amount"):
        expected.ClearField(name)
    assert details == expected


@pytest.mark.parametrize(
    "subject",
    [
        {"booking": Booking(id="b", resource=Booking.Resource(id="r", title="Room"))},
        {"order": Order(id="o", product=Order.Product(id="p"), option=Order.Option(name="large"))},
        {"event_ticket": EventTicket(id="t", create_time=Timestamp(seconds=5), event=EventTicket.Event(title="Party"))},
    ],
    ids=lambda subject: next(iter(subject)),
)
def test_subjects_are_kept_unchanged(subject: dict[str, Any]) -> None:
    """Every kind of subject is kept unchanged."""
    assert read_transaction(charge(**subject))[1] == Transaction(**subject)


def set_to_something(message: Any, field: FieldDescriptor) -> None:
    """Sets a field to a value that a server could have set."""
    if field.is_repeated:
        getattr(message, field.name).add()
    elif field.message_type is not None:
        getattr(message, field.name).CopyFrom(Timestamp(seconds=1_728_543_298))
    elif field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        setattr(message, field.name, "999")
    elif field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        setattr(message, field.name, 1)
    else:
        setattr(message, field.name, 999)


def server_fields(descriptor: Descriptor) -> list[FieldDescriptor]:
    """Returns the output-only fields and the name."""
    return [
        field
        for field in descriptor.fields
        if OUTPUT_ONLY in field.GetOptions().Extensions[field_behavior] or field.name == "name"
    ]


def test_important_fields_are_output_only() -> None:
    """The fields on which the consistency of the ledger depends are output-only."""
    names = {field.name for field in server_fields(Transaction.DESCRIPTOR)}
    assert {"name", "uid", "sequence", "create_time", "balance_after"} <= names


@pytest.mark.parametrize("field", server_fields(Transaction.DESCRIPTOR), ids=lambda field: field.name)
def test_output_only_field_of_a_transaction_is_refused(field: FieldDescriptor) -> None:
    """A transaction with a value in an output-only field is refused."""
    given_by_caller = copy_of(FULL)
    set_to_something(given_by_caller, field)
    assert given_by_caller != FULL
    assert field_problem(given_by_caller) == f"transaction.{field.name}"


@pytest.mark.parametrize(
    ("message_type", "field"),
    [(message_type, field) for message_type in (Account, ApiKey) for field in server_fields(message_type.DESCRIPTOR)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_output_only_field_of_a_new_resource_is_refused(
    message_type: type[Account | ApiKey], field: FieldDescriptor
) -> None:
    """A new account or API key with a value in an output-only field is refused."""
    resource = message_type(display_name="x")
    assert problem_of(lambda: require_unset_by_caller("it", resource)) is None
    set_to_something(resource, field)
    assert problem_of(lambda: require_unset_by_caller("it", resource)) == f"it.{field.name}"


def test_profile_is_the_user_or_the_company() -> None:
    """The stored profile has the user or the company of the account, and no other field."""
    company = Company(title="Acme", expiring_day_passes=0)
    account = Account(name="accounts/a", kind=Account.COMPANY, display_name="x", credit_limit="5", company=company)
    assert Account.FromString(read_profile(account)) == Account(company=company)
    assert read_profile(Account(kind=Account.SPACE, display_name="x")) == b""


@pytest.mark.parametrize(
    ("page_size", "limit"), [(0, 50), (1, 1), (50, 50), (999, 999), (1000, 1000), (1001, 1000), (2**31 - 1, 1000)]
)
def test_page_sizes(page_size: int, limit: int) -> None:
    """A page has the requested number of rows, 50 by default, and at most 1,000."""
    assert read_page_size(page_size) == limit


@pytest.mark.parametrize("page_size", [-1, -(2**31)])
def test_negative_page_size_is_refused(page_size: int) -> None:
    """A negative page size is refused."""
    assert problem_of(lambda: read_page_size(page_size)) == "page_size"


@pytest.mark.parametrize(
    ("request_id", "good"),
    [
        ("", True),
        ("invoice-7", True),
        (" ", True),
        ("~", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("\x1f", False),
        ("\x7f", False),
        ("a\n", False),
        ("\0", False),
        ("ä", False),
        ("\u0661", False),
    ],
)
def test_format_of_request_ids(request_id: str, good: bool) -> None:
    """A request_id has at most 128 printable ASCII characters, and is kept unchanged."""
    request = CreateTransactionRequest(parent="accounts/acme", request_id=request_id)
    if not good:
        assert problem_of(lambda: read_request_id(request)) == "request_id"
        return
    assert read_request_id(request) == identity_of("CreateTransaction", request, request_id).request_id == request_id


def test_fingerprint_ignores_the_request_id() -> None:
    """A request has the same fingerprint with any request_id, and is not changed."""
    request = CreateTransactionRequest(parent="accounts/acme", transaction=FULL, request_id="first")
    first = identity_of("CreateTransaction", request, request.request_id)
    assert request == CreateTransactionRequest(parent="accounts/acme", transaction=FULL, request_id="first")
    nameless = CreateTransactionRequest(parent="accounts/acme", transaction=FULL)
    assert identity_of("CreateTransaction", nameless, "").fingerprint == first.fingerprint
    request.request_id = "second"
    assert identity_of("CreateTransaction", request, request.request_id).fingerprint == first.fingerprint
    assert len(first.fingerprint) == 32


@pytest.mark.parametrize(
    "other",
    [
        CreateTransactionRequest(parent="accounts/acme2", transaction=FULL),
        CreateTransactionRequest(parent="accounts/acme", transaction=charge()),
        CreateTransactionRequest(parent="accounts/acme"),
    ],
    ids=["parent", "transaction", "no transaction"],
)
def test_another_request_has_another_fingerprint(other: CreateTransactionRequest) -> None:
    """Requests that differ in any field but the request_id have different fingerprints."""
    request = CreateTransactionRequest(parent="accounts/acme", transaction=FULL)
    fingerprint = identity_of("CreateTransaction", request, request.request_id).fingerprint
    assert identity_of("CreateTransaction", other, "").fingerprint != fingerprint


def test_another_method_has_another_fingerprint() -> None:
    """Two methods have different fingerprints, even if their requests have the same bytes."""
    create = CreateAccountRequest(account=Account(name="accounts/acme"))
    update = UpdateAccountRequest(account=Account(name="accounts/acme"))
    assert create.SerializeToString() == update.SerializeToString()
    first = identity_of("CreateAccount", create, "").fingerprint
    assert identity_of("UpdateAccount", update, "").fingerprint != first


def test_empty_mask_differs_from_no_mask() -> None:
    """An empty mask and a missing mask have different fingerprints."""
    without = UpdateAccountRequest(account=Account(name="accounts/acme"))
    empty = UpdateAccountRequest(account=Account(name="accounts/acme"), update_mask=FieldMask())
    assert identity_of("UpdateAccount", without, "").fingerprint != identity_of("UpdateAccount", empty, "").fingerprint


@given(st.permutations(range(32)), st.integers(0, 60))
def test_order_of_labels_does_not_matter(order: list[int], removed: int) -> None:
    """The order in which labels were added and removed does not change the fingerprint."""
    requests = []
    for numbers, extra in ((range(32), 0), (order, removed)):
        transaction = charge()
        for number in numbers:
            transaction.labels[f"key_{number}"] = f"value {number}"
        # More labels change the order in which a map iterates over its entries.
        for number in range(extra):
            transaction.labels[f"extra_{number}"] = "x"
        for number in range(extra):
            del transaction.labels[f"extra_{number}"]
        requests.append(identity_of("CreateTransaction", CreateTransactionRequest(transaction=transaction), ""))
    assert requests[0] == requests[1]


@given(
    st.builds(
        Transaction,
        kind=st.sampled_from(Transaction.Kind.values()),
        category=st.text(max_size=5) | st.just("ai_chat"),
        amount=st.text(max_size=5) | st.integers(-money.LARGEST, money.LARGEST).map(money.write),
        description=st.text(max_size=5),
        labels=st.dictionaries(st.text(max_size=3) | st.just("town"), st.text(max_size=3), max_size=3),
        owner=st.none() | st.builds(User, id=st.text(max_size=2)),
        usage=st.none() | st.builds(Usage, input_tokens=st.integers(-1, 1), cost_usd=st.text(max_size=2)),
    )
)
def test_any_transaction_is_parsed_or_refused(transaction: Transaction) -> None:
    """Any transaction is parsed, or raises FieldInvalid with the name of one of its fields."""
    problem = field_problem(transaction)
    assert problem is None or problem.startswith("transaction.")
