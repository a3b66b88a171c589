"""Resource names (AIP-122) and the ids in them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeAlias
from uuid import UUID

from server.ledger.errors import FieldInvalid
from server.ledger.instants import Instant

RandomBytes: TypeAlias = Callable[[int], bytes]
"""Gives so many random bytes. Injected, so that a test or the demo can fix them."""

ALL_ACCOUNTS = "-"
"""The wildcard of AIP-159: `accounts/-/transactions` are those of every account."""

_ACCOUNT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", re.ASCII)
_CANONICAL_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)


def is_account_id(text: str) -> bool:
    """Whether an account may have this id; Account.name in the contract has the rule."""
    return _ACCOUNT_ID.fullmatch(text) is not None


def account_name(account_id: str) -> str:
    """`accounts/{account}`."""
    return f"accounts/{account_id}"


def balance_name(account_id: str) -> str:
    """`accounts/{account}/balance`."""
    return f"accounts/{account_id}/balance"


def lot_name(account_id: str, number: int) -> str:
    """`accounts/{account}/lots/{lot}`."""
    return f"accounts/{account_id}/lots/{number}"


def transaction_name(account_id: str, uid: UUID | str) -> str:
    """`accounts/{account}/transactions/{transaction}`."""
    return f"accounts/{account_id}/transactions/{uid}"


def parse_account_name(field: str, name: str, *, wildcard: bool = False) -> str:
    """The account id of `accounts/{account}`; with `wildcard` it may be `-`."""
    match name.split("/"):
        case ["accounts", account_id] if is_account_id(account_id) or (wildcard and account_id == ALL_ACCOUNTS):
            return account_id
        case _:
            raise FieldInvalid(field, "must have the form accounts/{account}")


def parse_balance_name(field: str, name: str) -> str:
    """The account id of `accounts/{account}/balance`."""
    match name.split("/"):
        case ["accounts", account_id, "balance"] if is_account_id(account_id):
            return account_id
        case _:
            raise FieldInvalid(field, "must have the form accounts/{account}/balance")


def parse_transaction_name(field: str, name: str) -> tuple[str, UUID]:
    """The account id and the uid of `accounts/{account}/transactions/{transaction}`."""
    match name.split("/"):
        case ["accounts", account_id, "transactions", uid] if is_account_id(account_id) and _CANONICAL_UUID.fullmatch(
            uid
        ):
            return account_id, UUID(uid)
        case _:
            raise FieldInvalid(field, "must have the form accounts/{account}/transactions/{transaction}")


def uid_text(stored: bytes) -> str:
    """A stored uid as callers know it; of bytes that are none, their digits."""
    return str(UUID(bytes=stored)) if len(stored) == 16 else stored.hex()


def uuid7(instant: Instant, random_bytes: RandomBytes) -> UUID:
    """A UUID of version 7 (RFC 9562, 5.7) for an instant.

    Written here because the libraries draw time and randomness themselves, and both must
    be injected for a ledger to be the same twice.
    """
    milliseconds = instant // 1000
    random = int.from_bytes(random_bytes(10), "big")
    return UUID(
        int=(milliseconds & (2**48 - 1)) << 80
        | 0x7 << 76
        | (random >> 62 & 0xFFF) << 64
        | 0b10 << 62
        | random & (2**62 - 1)
    )
