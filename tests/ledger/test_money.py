"""Amounts: what is read, what is written, and how they are rounded for a vendor."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.ledger import money
from server.ledger.money import LARGEST, ONE_CREDIT

# Integers alone are mostly small.
AMOUNTS = st.integers(-LARGEST, LARGEST) | st.integers(0, LARGEST // 2).map(lambda amount: LARGEST - amount)


@pytest.mark.parametrize(
    ("text", "millionths"),
    [
        ("0", 0),
        ("-0", 0),
        ("-0.000000", 0),
        ("1", 1_000_000),
        ("-1", -1_000_000),
        ("12.5", 12_500_000),
        ("-12.5", -12_500_000),
        ("001.500", 1_500_000),
        ("000000000001", 1_000_000),
        ("0.1", 100_000),
        ("0.000001", 1),
        ("-0.000001", -1),
        ("1.123456", 1_123_456),
        ("0.010203", 10_203),
        ("9007199254.740993", 9_007_199_254_740_993),
        ("999999999999.999999", 999_999_999_999_999_999),
        ("-999999999999.999999", -999_999_999_999_999_999),
    ],
)
def test_reads_amounts(text: str, millionths: int) -> None:
    """An amount of the grammar is read exactly, as millionths."""
    assert money.parse(text) == millionths


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "+1",
        "1e3",
        "1E3",
        " 1",
        "1 ",
        "1\n",
        "\n1",
        "1.",
        ".5",
        ".",
        "-.5",
        "-1.",
        "1.1234567",
        "1.0000000",
        "1234567890123",
        "0000000000001",
        "-1234567890123",
        "\u0661",
        "\uff11",
        "1.\u0665",
        "²",
        "1,000",
        "1_000",
        "1,5",
        "-",
        "--1",
        "- 1",
        "\u22121",
        "1-",
        "0x1",
        "1.2.3",
        "NaN",
        "Infinity",
        "-inf",
        "1\0",
        "$1",
    ],
)
def test_refuses_what_is_no_amount(text: str) -> None:
    """A text outside the grammar is refused, never rounded or repaired."""
    with pytest.raises(ValueError, match="must be a decimal"):
        money.parse(text)


@given(st.text())
def test_reads_or_refuses_any_text(text: str) -> None:
    """Any text is either an exact amount in range or a ValueError."""
    try:
        amount = money.parse(text)
    except ValueError:
        return
    assert abs(amount) <= LARGEST
    assert amount == Decimal(text) * ONE_CREDIT


@pytest.mark.parametrize(
    ("text", "shortest"),
    [
        ("-0", "0"),
        ("0.000000", "0"),
        ("001.500", "1.5"),
        ("1.000000", "1"),
        ("-0.500000", "-0.5"),
        ("0.000001", "0.000001"),
        ("-0.000010", "-0.00001"),
        ("100", "100"),
        ("-1000000", "-1000000"),
        ("10.100", "10.1"),
        ("000000000000", "0"),
        ("999999999999.999999", "999999999999.999999"),
    ],
)
def test_writes_the_shortest_form(text: str, shortest: str) -> None:
    """An amount is written without leading zeros, trailing zeros, a bare point or a minus before 0."""
    assert money.write(money.parse(text)) == shortest


@given(AMOUNTS)
def test_reads_back_what_it_writes(amount: int) -> None:
    """Every amount in range survives writing and reading."""
    assert money.parse(money.write(amount)) == amount


@given(AMOUNTS)
def test_writes_the_exact_value(amount: int) -> None:
    """What is written is the exact decimal, and no shorter text of the grammar says the same."""
    text = money.write(amount)
    assert Decimal(text) * ONE_CREDIT == amount
    whole, point, fraction = text.removeprefix("-").partition(".")
    assert whole == "0" or not whole.startswith("0")
    assert bool(point) == bool(fraction)
    assert not fraction.endswith("0")


@pytest.mark.parametrize("amount", [LARGEST, -LARGEST])
def test_bounds_are_what_the_grammar_can_say(amount: int) -> None:
    """The largest amount is the largest that can be read, and twice it fits into 64 bits."""
    assert money.parse(money.write(amount)) == amount
    with pytest.raises(ValueError, match="must be a decimal"):
        money.parse(money.write(amount + (1 if amount > 0 else -1)))
    assert -(2**63) <= 2 * amount < 2**63


@given(AMOUNTS)
def test_numbers_are_the_nearest_doubles(amount: int) -> None:
    """A number in a vendor's JSON is the double nearest to the decimal."""
    assert money.to_number(amount) == float(money.write(amount))


@pytest.mark.parametrize(
    ("text", "whole_credits"),
    [
        ("0", 0),
        ("0.499999", 0),
        ("0.5", 1),
        ("1.499999", 1),
        ("1.5", 2),
        ("2.5", 3),
        ("-0.499999", 0),
        ("-0.5", -1),
        ("-1.5", -2),
        ("-2.5", -3),
        ("-2.499999", -2),
        ("3", 3),
        ("999999999999.5", 1_000_000_000_000),
    ],
)
def test_half_a_credit_goes_away_from_zero(text: str, whole_credits: int) -> None:
    """Whole credits are the nearest, and half a credit goes away from zero."""
    assert money.to_whole_credits(money.parse(text)) == whole_credits


@given(AMOUNTS | st.integers(-2_000_000, 2_000_000).map(lambda halves: halves * ONE_CREDIT // 2))
def test_rounds_as_decimal_does(amount: int) -> None:
    """Whole credits agree with decimal's ROUND_HALF_UP, which is away from zero."""
    expected = (Decimal(amount) / ONE_CREDIT).quantize(Decimal(1), rounding=ROUND_HALF_UP)
    assert money.to_whole_credits(amount) == expected
