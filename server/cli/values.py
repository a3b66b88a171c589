"""Parses the values of arguments, and prepares texts for a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import datetime

import typer

from server.ledger.instants import HOUR, SECOND, Instant, parse, to_datetime


def read_span(text: str) -> Instant:
    """Parses a duration like 90d. Raises BadParameter."""
    match = re.fullmatch(r"([0-9]{1,6})([smhd])", text, re.ASCII)
    if match is None:
        raise typer.BadParameter("must be a whole number and s, m, h or d, like 90d")
    return int(match[1]) * {"s": SECOND, "m": 60 * SECOND, "h": HOUR, "d": 24 * HOUR}[match[2]]


def read_time(text: str) -> datetime:
    """Parses an RFC 3339 time. Raises BadParameter."""
    try:
        return to_datetime(parse(text))
    except ValueError:
        raise typer.BadParameter("must be a time like 2025-01-31T12:00:00Z") from None


def read_pairs(texts: Iterable[str]) -> Mapping[str, str]:
    """Parses labels like `location=berlin`. Raises BadParameter."""
    pairs = [text.partition("=") for text in texts]
    for key, sign, _ in pairs:
        if not sign:
            raise typer.BadParameter(f"--label {key!r} must be a key, an equals sign and a value, like location=berlin")
    return {key: value for key, _, value in pairs}


def account_name(text: str) -> str:
    """The resource name of an account, from its name or its id."""
    return text if text.startswith("accounts/") else f"accounts/{text}"


def transaction_name(text: str) -> str:
    """The resource name of a transaction, from its name or from `account/uid`. Raises BadParameter."""
    if text.startswith("accounts/"):
        return text
    account, slash, uid = text.partition("/")
    if not slash:
        raise typer.BadParameter(
            "must be an account and a uid, like acme/0197..., as `daybook transactions list` shows"
        )
    return f"accounts/{account}/transactions/{uid}"


def printable(text: str) -> str:
    """The text with a space for each character that isn't printable, so that it stays in its column."""
    return "".join(character if character.isprintable() else " " for character in text)
