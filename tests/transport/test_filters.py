"""The filter and the order_by of a list: their meaning and their errors."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass

import pytest
from daybook.v1.transaction_pb2 import Transaction
from hypothesis import given
from hypothesis import strategies as st

from server.ledger import instants
from server.ledger.errors import FieldInvalid, FilterInvalid
from server.ledger.paging import Order, OrderField, TransactionFilter
from server.transport.filters import FILTER_CHARACTERS_MAX, VALUES_MAX, parse_filter, parse_order_by
from tests.support.blocks import blocks

OCTOBER = instants.parse("2024-10-01T00:00:00Z")
NOVEMBER = instants.parse("2024-11-01T00:00:00Z")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", TransactionFilter()),
        (" \t\n", TransactionFilter()),
        ("kind = CHARGE", TransactionFilter(kinds=(Transaction.CHARGE,))),
        ("kind=CHARGE", TransactionFilter(kinds=(Transaction.CHARGE,))),
        ('kind = "CHARGE"', TransactionFilter(kinds=(Transaction.CHARGE,))),
        ("  kind\n=\tCHARGE ", TransactionFilter(kinds=(Transaction.CHARGE,))),
        ("(kind = CHARGE)", TransactionFilter(kinds=(Transaction.CHARGE,))),
        ("(((kind = CHARGE)))", TransactionFilter(kinds=(Transaction.CHARGE,))),
        (
            "kind = GRANT OR kind = CHARGE",
            TransactionFilter(kinds=(Transaction.GRANT, Transaction.CHARGE)),
        ),
        ("kind = GRANT OR kind = GRANT", TransactionFilter(kinds=(Transaction.GRANT,))),
        ("state = SUCCEEDED", TransactionFilter(states=(Transaction.SUCCEEDED,))),
        (
            "(state = FAILED OR state = CANCELED)",
            TransactionFilter(states=(Transaction.FAILED, Transaction.CANCELED)),
        ),
        ('category = "ai_chat"', TransactionFilter(categories=("ai_chat",))),
        (
            '(category = "ai_chat" OR category = "inference")',
            TransactionFilter(categories=("ai_chat", "inference")),
        ),
        # OR has a higher precedence than AND, see AIP-160.
        (
            "kind = CHARGE AND category = a OR category = b AND state = SUCCEEDED",
            TransactionFilter(kinds=(Transaction.CHARGE,), categories=("a", "b"), states=(Transaction.SUCCEEDED,)),
        ),
        ('create_time >= "2024-10-01T00:00:00Z"', TransactionFilter(create_time_from=OCTOBER)),
        # The JSON name.
        ('createTime >= "2024-10-01T00:00:00Z"', TransactionFilter(create_time_from=OCTOBER)),
        (
            "createTime >= 2024-10-01T00:00:00Z AND create_time < 2024-11-01T00:00:00Z",
            TransactionFilter(create_time_from=OCTOBER, create_time_before=NOVEMBER),
        ),
        ("create_time >= 2024-10-01T00:00:00Z", TransactionFilter(create_time_from=OCTOBER)),
        ("create_time >= 2024-10-01T02:00:00+02:00", TransactionFilter(create_time_from=OCTOBER)),
        ('create_time > "2024-10-01T00:00:00Z"', TransactionFilter(create_time_from=OCTOBER + 1)),
        ('create_time < "2024-11-01T00:00:00Z"', TransactionFilter(create_time_before=NOVEMBER)),
        ('create_time <= "2024-11-01T00:00:00Z"', TransactionFilter(create_time_before=NOVEMBER + 1)),
        (
            'create_time < "2024-11-01T00:00:00Z" AND create_time >= "2024-10-01T00:00:00Z"',
            TransactionFilter(create_time_from=OCTOBER, create_time_before=NOVEMBER),
        ),
        ('labels.location = "berlin mitte"', TransactionFilter(location="berlin mitte")),
        ("labels.membership = m-1", TransactionFilter(membership="m-1")),
        ("labels.company = 1.2:3+4", TransactionFilter(company="1.2:3+4")),
        ("labels.location = a OR labels.location = a", TransactionFilter(location="a")),
        # An empty text is a value.
        ('labels.location = ""', TransactionFilter(location="")),
        ('category = "AND"', TransactionFilter(categories=("AND",))),
        ("category = ORDER AND kind = CHARGE", TransactionFilter(kinds=(Transaction.CHARGE,), categories=("ORDER",))),
        ("category = ANDROID", TransactionFilter(categories=("ANDROID",))),
        ('labels.location = "a AND kind = CHARGE"', TransactionFilter(location="a AND kind = CHARGE")),
        (r'labels.location = "say \"hi\""', TransactionFilter(location='say "hi"')),
        (r'labels.location = "back\\slash"', TransactionFilter(location=r"back\slash")),
        (r'labels.location = "\\"', TransactionFilter(location="\\")),
        (r'labels.location = "\\\""', TransactionFilter(location='\\"')),
        (r'labels.location = "\\\\"', TransactionFilter(location="\\\\")),
        ('labels.location = "Zürich 🏦"', TransactionFilter(location="Zürich 🏦")),
        ('labels.location = "(x"', TransactionFilter(location="(x")),
    ],
)
def test_filter_is_parsed(text: str, expected: TransactionFilter) -> None:
    """A filter of the documented grammar is parsed to its conditions."""
    assert parse_filter(text) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("CHARGE", "has a syntax error at character 1"),
        ("kind", "has a syntax error at character 1"),
        ("kind : CHARGE", "has a syntax error at character 1"),
        ("Kind = CHARGE", "has a syntax error at character 1"),
        ("NOT kind = CHARGE", "has a syntax error at character 1"),
        ("-kind = CHARGE", "has a syntax error at character 1"),
        ("AND kind = CHARGE", "has a syntax error at character 1"),
        ("kind == CHARGE", "has a syntax error at character 7"),
        ("kind = = CHARGE", "has a syntax error at character 8"),
        ("kind = AND", "has a syntax error at character 8"),
        ("kind = CHARGE kind = GRANT", "has a syntax error at character 15"),
        ("kind = CHARGE, kind = GRANT", "has a syntax error at character 14"),
        ("kind = CHARGE and state = FAILED", "has a syntax error at character 15"),
        ("kind = CHARGE AND AND state = FAILED", "has a syntax error at character 19"),
        ("kind = CHARGE)", "has a syntax error at character 14"),
        ("()", "has a syntax error at character 2"),
        ("(kind = GRANT) OR kind = CHARGE", "has a syntax error at character 16"),
        ("(kind = GRANT OR (kind = CHARGE))", "has a syntax error at character 18"),
        ("(kind = CHARGE AND state = FAILED)", "has a syntax error at character 16"),
        ('category = "ai', "has a syntax error at character 12"),
        ("category = 'ai'", "has a syntax error at character 12"),
        ("category = a*", "has a syntax error at character 13"),
        ("category = ä", "has a syntax error at character 12"),
        ("labels.location.x = a", "has a syntax error at character 1"),
        ('labels["location"] = a', "has a syntax error at character 1"),
        ("kind = CHARGE; DROP TABLE transactions", "has a syntax error at character 14"),
        (
            "kind = charge",
            "kind must be one of GRANT, CHARGE, REFUND, TRANSFER_IN, TRANSFER_OUT, EXPIRATION, ADJUSTMENT",
        ),
        ("kind = KIND_UNSPECIFIED", "kind must be one of"),
        ("kind = 2", "kind must be one of"),
        ("kind = GRANT OR kind = GIFT", "kind must be one of"),
        ("state = STATE_UNSPECIFIED", "state must be one of SUCCEEDED, FAILED, CANCELED"),
        ("kind != CHARGE", "kind can only be compared with ="),
        ("category >= a", "category can only be compared with ="),
        ("category = a OR category != b", "category can only be compared with ="),
        ("labels.location != a", "labels.location can only be compared with ="),
        ("labels.location = a OR labels.location = b", "labels.location takes one value"),
        ("labels.town = a", "labels.town can't be filtered by"),
        ("labels = a", "labels can't be filtered by"),
        ("location = a", "location can't be filtered by"),
        ("month = 202410", "month can't be filtered by"),
        ("kinds = CHARGE", "kinds can't be filtered by"),
        ("amount = 5", "amount can't be filtered by"),
        ("amount > 5", "amount"),
        ("kind = CHARGE OR category = a", "OR is only possible between values of one field"),
        ("category = a OR labels.location = a", "OR is only possible between values of one field"),
        ("kind = CHARGE AND kind = GRANT", "kind is given more than once"),
        ("kind = CHARGE AND kind = CHARGE", "kind is given more than once"),
        ("category = a AND (category = b)", "category is given more than once"),
        (
            "create_time >= 2024-10-01T00:00:00Z AND create_time > 2024-10-02T00:00:00Z",
            "create_time is given more than once",
        ),
        (
            "create_time < 2024-10-01T00:00:00Z AND create_time <= 2024-10-02T00:00:00Z",
            "create_time is given more than once",
        ),
        ("create_time = 2024-10-01T00:00:00Z", "create_time takes >=, >, <= and <, without OR"),
        ("create_time != 2024-10-01T00:00:00Z", "create_time takes >=, >, <= and <, without OR"),
        (
            "create_time < 2024-10-01T00:00:00Z OR create_time > 2024-10-02T00:00:00Z",
            "create_time takes >=, >, <= and <, without OR",
        ),
        ("create_time > 2024-10-01", "create_time must be a date and time by RFC 3339"),
        ('create_time > "yesterday"', "create_time must be a date and time by RFC 3339"),
        ("create_time > 2024-02-30T00:00:00Z", "create_time must be a date and time by RFC 3339"),
        ('category = "a\0b"', "must not contain the character NUL"),
        ("\0", "must not contain the character NUL"),
    ],
)
def test_invalid_filter_is_refused(text: str, problem: str) -> None:
    """A filter with a syntax error or an unsupported condition is refused; the error has the position or the reason."""
    with pytest.raises(FilterInvalid, match=re.escape(problem)) as refusal:
        parse_filter(text)
    assert refusal.value.field == "filter"


@pytest.mark.parametrize("text", ["kind =", "kind = CHARGE AND", "(kind = CHARGE", "(", "category = a OR "])
def test_incomplete_filter_is_reported_at_its_end(text: str) -> None:
    """The error of an incomplete filter is at its end."""
    with pytest.raises(FilterInvalid, match="has a syntax error at its end"):
        parse_filter(text)


def test_position_counts_from_the_first_line() -> None:
    """In a filter of several lines, the position of an error is counted from the start of the filter."""
    with pytest.raises(FilterInvalid, match=r"at character 19$"):
        parse_filter("kind = CHARGE\nAND oops")


@pytest.mark.parametrize("name", ["kind", "category"])
@pytest.mark.parametrize(("count", "readable"), [(1, True), (VALUES_MAX, True), (VALUES_MAX + 1, False)])
def test_values_are_limited(name: str, count: int, readable: bool) -> None:
    """A field may have at most 16 values."""
    assert VALUES_MAX == 16
    text = " OR ".join(f"{name} = CHARGE" for _ in range(count))
    if readable:
        parse_filter(text)
        return
    with pytest.raises(FilterInvalid, match=f"{name} has more than 16 values"):
        parse_filter(text)


def test_longest_filter_is_parsed() -> None:
    """A filter of 2,048 characters of several bytes is parsed. Longer ones are refused before parse_filter."""
    assert FILTER_CHARACTERS_MAX == 2048
    value = "ä" * (FILTER_CHARACTERS_MAX - len('labels.location = ""'))
    assert parse_filter(f'labels.location = "{value}"').location == value


def test_deep_parentheses_are_parsed() -> None:
    """A thousand nested parentheses don't exhaust the stack."""
    assert parse_filter("(" * 1000 + "kind=CHARGE" + ")" * 1000) == TransactionFilter(kinds=(Transaction.CHARGE,))


@pytest.mark.parametrize("text", ["(" * 2048, ")" * 2048, "(" * 1000 + "kind=CHARGE" + ")" * 999])
def test_unbalanced_parentheses_are_refused(text: str) -> None:
    """Thousands of unbalanced parentheses are a syntax error."""
    with pytest.raises(FilterInvalid, match="has a syntax error"):
        parse_filter(text)


# Tokens of the grammar, so that random filters are valid beyond their first character.
PIECES = st.sampled_from(
    [
        "kind",
        "category",
        "create_time",
        "labels.location",
        "state",
        "=",
        ">=",
        "<",
        "!=",
        " AND ",
        " OR ",
        "(",
        ")",
        '"',
        "\\",
        "CHARGE",
        '"a"',
        "2024-10-01T00:00:00Z",
        "0001-01-01T00:00:00+23:59",
        " ",
        "\n",
        "NOT",
        "-",
        ".",
        ":",
    ]
)


@given(st.text() | st.lists(PIECES | st.characters(), max_size=30).map("".join))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    """Any text is parsed, or raises FilterInvalid."""
    with suppress(FilterInvalid):
        assert isinstance(parse_filter(text), TransactionFilter)


@dataclass(frozen=True)
class Composed:
    """A filter as text, with its expected conditions."""

    text: str
    expected: TransactionFilter


SPACES = st.sampled_from(("", " ", "  ", "\n", "\t "))
GAPS = st.sampled_from((" ", "  ", "\n", " \t"))
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
WORDS = st.from_regex(r"[A-Za-z0-9_.:+-]{1,12}", fullmatch=True)


@st.composite
def composed(draw: st.DrawFn) -> Composed:
    """Generates random conditions, in any order and any spelling of the grammar."""

    def spelled(value: str) -> str:
        is_word = re.fullmatch(r"(?!(AND|OR)\b)[A-Za-z0-9_.:+-]+", value, re.ASCII)
        if is_word and draw(st.booleans()):
            return value
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'

    def comparison(name: str, operator: str, value: str) -> str:
        return f"{name}{draw(SPACES)}{operator}{draw(SPACES)}{spelled(value)}"

    def factor(name: str, values: list[str], operator: str = "=") -> str:
        text = f"{draw(GAPS)}OR{draw(GAPS)}".join(comparison(name, operator, value) for value in values)
        depth = draw(st.integers(0, 3))
        return "(" * depth + text + ")" * depth

    factors: list[str] = []
    found: dict[str, object] = {}
    if kinds := draw(st.lists(st.sampled_from(Transaction.Kind.keys()[1:]), max_size=4)):
        factors.append(factor("kind", kinds))
        found["kinds"] = tuple(dict.fromkeys(Transaction.Kind.Value(kind) for kind in kinds))
    if states := draw(st.lists(st.sampled_from(Transaction.State.keys()[1:]), max_size=3)):
        factors.append(factor("state", states))
        found["states"] = tuple(dict.fromkeys(Transaction.State.Value(state) for state in states))
    if categories := draw(st.lists(WORDS | TEXTS, max_size=VALUES_MAX)):
        factors.append(factor("category", categories))
        found["categories"] = tuple(dict.fromkeys(categories))
    for label in ("location", "membership", "company"):
        if (value := draw(st.none() | WORDS | TEXTS)) is not None:
            factors.append(factor(f"labels.{label}", [value]))
            found[label] = value
    times = st.none() | st.integers(0, 10**16)
    if (start := draw(times)) is not None:
        operator = draw(st.sampled_from((">=", ">")))
        factors.append(factor("create_time", [instants.write(start)], operator))
        found["create_time_from"] = start + (operator == ">")
    if (end := draw(times)) is not None:
        operator = draw(st.sampled_from(("<", "<=")))
        factors.append(factor("create_time", [instants.write(end)], operator))
        found["create_time_before"] = end + (operator == "<=")
    text = f"{draw(GAPS)}AND{draw(GAPS)}".join(draw(st.permutations(factors)))
    return Composed(text, TransactionFilter(**found))  # type: ignore[arg-type]  # Each has its field's type.


@given(composed().filter(lambda each: len(each.text) <= FILTER_CHARACTERS_MAX))
def test_composed_filter_is_parsed(each: Composed) -> None:
    """A filter is parsed to its conditions, in any spelling and order."""
    assert parse_filter(each.text) == each.expected


def test_equal_filters_have_equal_hashes() -> None:
    """Equal filters are equal and have equal hashes, so that they can be cache keys."""
    first, second = parse_filter("kind = CHARGE"), parse_filter("( kind = CHARGE )")
    assert first == second
    assert hash(first) == hash(second)


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("", Order(OrderField.CREATE_TIME, descending=True)),
        ("  ", Order(OrderField.CREATE_TIME, descending=True)),
        ("create_time", Order(OrderField.CREATE_TIME, descending=False)),
        ("create_time desc", Order(OrderField.CREATE_TIME, descending=True)),
        ("create_time asc", Order(OrderField.CREATE_TIME, descending=False)),
        ("createTime", Order(OrderField.CREATE_TIME, descending=False)),
        ("createTime asc", Order(OrderField.CREATE_TIME, descending=False)),
        ("createTime desc", Order(OrderField.CREATE_TIME, descending=True)),
        ("amount", Order(OrderField.AMOUNT, descending=False)),
        ("amount asc", Order(OrderField.AMOUNT, descending=False)),
        ("amount desc", Order(OrderField.AMOUNT, descending=True)),
        ("  amount   desc ", Order(OrderField.AMOUNT, descending=True)),
    ],
)
def test_order_is_parsed(text: str, order: Order) -> None:
    """An order_by is a field, ascending unless ` desc` follows; empty means newest first."""
    assert parse_order_by(text) == order


@pytest.mark.parametrize(
    "text",
    [
        "sequence",
        "CREATE_TIME",
        "Create_time",
        "desc",
        "asc",
        "amount ASC",
        "amount asc desc",
        "amount DESC",
        "amount descending",
        "amount desc desc",
        "amountdesc",
        "amount,create_time",
        "amount, create_time",
        "create_time desc, amount",
        "-amount",
        "amount\0",
        "amount; DROP TABLE transactions",
    ],
)
def test_invalid_order_is_refused(text: str) -> None:
    """Any other order_by is refused, and the error names the valid fields."""
    with pytest.raises(FieldInvalid, match="must be create_time or amount") as refusal:
        parse_order_by(text)
    assert refusal.value.field == "order_by"


@given(st.text())
def test_any_order_is_parsed_or_refused(text: str) -> None:
    """Any text is parsed, or raises FieldInvalid."""
    with suppress(FieldInvalid):
        assert isinstance(parse_order_by(text), Order)


@pytest.mark.parametrize("operator", ["=", "!=", ">", ">=", "<", "<="])
@pytest.mark.parametrize("field", ["amount", "sequence", "labels.project"])
def test_unsupported_field_is_refused_with_any_operator(field: str, operator: str) -> None:
    """With any operator, the error says that the field is not supported, and names the supported fields."""
    with pytest.raises(FilterInvalid) as refusal:
        parse_filter(f"{field} {operator} 5")
    assert refusal.value.problem == (
        f"{field} can't be filtered by; use kind, category, state, create_time, "
        "labels.location, labels.membership, labels.company"
    )


def test_documented_filter_is_parsed() -> None:
    """The filter in docs/paging.md can be parsed."""
    (block,) = blocks("docs/paging.md", "text")
    assert parse_filter(block.text) != TransactionFilter()
