"""Amounts: parsing, formatting, and rounding for a vendor."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.ledger import money
from server.ledger.money import LARGEST, ONE_CREDIT

# Hypothesis draws mostly small integers, so large ones are added.
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
def test_an_amount_is_parsed(text: str, millionths: int) -> None:
    """An amount of the grammar is parsed exactly, as millionths."""
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
def test_other_amounts_are_refused(text: str) -> None:
    """A text outside the grammar is refused, never rounded or repaired."""
    with pytest.raises(ValueError, match="must be a decimal"):
        money.parse(text)


@given(st.text())
def test_any_text_is_parsed_or_refused(text: str) -> None:
    """Any text is either parsed as an exact amount in range, or refused with a ValueError."""
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
def test_an_amount_is_written_in_its_shortest_form(text: str, shortest: str) -> None:
    """An amount is written without leading zeros, trailing zeros, a bare point or a minus before 0."""
    assert money.write(money.parse(text)) == shortest


@given(AMOUNTS)
def test_a_written_amount_is_parsed_back(amount: int) -> None:
    """Every amount in range is parsed back exactly."""
    assert money.parse(money.write(amount)) == amount


@given(AMOUNTS)
def test_an_amount_is_written_exactly(amount: int) -> None:
    """The text is the exact decimal, and no shorter text of the grammar has the same value."""
    text = money.write(amount)
    assert Decimal(text) * ONE_CREDIT == amount
    whole, point, fraction = text.removeprefix("-").partition(".")
    assert whole == "0" or not whole.startswith("0")
    assert bool(point) == bool(fraction)
    assert not fraction.endswith("0")


@pytest.mark.parametrize("amount", [LARGEST, -LARGEST])
def test_the_range_is_that_of_the_grammar(amount: int) -> None:
    """The largest amount is the largest of the grammar, and twice it fits into 64 bits."""
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
def test_half_a_credit_is_rounded_away_from_zero(text: str, whole_credits: int) -> None:
    """An amount is rounded to the nearest whole credit, and half a credit away from zero."""
    assert money.to_whole_credits(money.parse(text)) == whole_credits


@given(AMOUNTS | st.integers(-2_000_000, 2_000_000).map(lambda halves: halves * ONE_CREDIT // 2))
def test_rounding_agrees_with_decimal(amount: int) -> None:
    """Whole credits agree with decimal's ROUND_HALF_UP, which is away from zero."""
    expected = (Decimal(amount) / ONE_CREDIT).quantize(Decimal(1), rounding=ROUND_HALF_UP)
    assert money.to_whole_credits(amount) == expected
