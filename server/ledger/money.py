"""Money: exact decimals of credits, held as whole millionths.

On the wire an amount is text (see Transaction.amount in the contract), in the database
and in all arithmetic an int of millionths, and in a vendor's JSON a number. Nothing is
rounded on the way in, and no float takes part in arithmetic.
"""

from __future__ import annotations

import re
from typing import TypeAlias

Millionths: TypeAlias = int
"""An amount of credits times 1,000,000."""

ONE_CREDIT: Millionths = 1_000_000
LARGEST: Millionths = 10**18 - 1
"""999999999999.999999 credits. Twice this still fits into a 64-bit column."""

GRAMMAR = re.compile(r"-?[0-9]{1,12}(?:\.[0-9]{1,6})?", re.ASCII)


def parse(text: str) -> Millionths:
    """Parses an amount. Raises ValueError with a message for the caller."""
    if GRAMMAR.fullmatch(text) is None:
        raise ValueError(
            'must be a decimal with 1 to 12 digits before the point and at most 6 behind it, such as "-12.5"'
        )
    whole, _, fraction = text.partition(".")
    return int(f"{whole}{fraction:0<6}")


def write(amount: Millionths) -> str:
    """Writes an amount in its shortest exact form."""
    whole, fraction = divmod(abs(amount), ONE_CREDIT)
    digits = f"{whole}.{fraction:06d}".rstrip("0") if fraction else str(whole)
    return f"-{digits}" if amount < 0 else digits


def to_number(amount: Millionths) -> float:
    """The double nearest to an amount, for a vendor's JSON. Division of ints rounds once."""
    return amount / ONE_CREDIT


def to_whole_credits(amount: Millionths) -> int:
    """The nearest whole number of credits; half a credit is rounded away from zero."""
    whole = (abs(amount) + ONE_CREDIT // 2) // ONE_CREDIT
    return -whole if amount < 0 else whole
