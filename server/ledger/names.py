"""Resource names (AIP-122) and the ids in them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeAlias
from uuid import UUID

from server.ledger.errors import FieldInvalid
from server.ledger.instants import Instant

RandomBytes: TypeAlias = Callable[[int], bytes]
"""Returns this number of random bytes. Injected, so that a test or the demo can fix them."""

RANDOM_BLOCK_BYTES = 1000

ALL_ACCOUNTS = "-"
"""The wildcard of AIP-159: `accounts/-/transactions` names the transactions of all accounts."""

ACCOUNT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", re.ASCII)
API_KEY_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,63}", re.ASCII)
_CANONICAL_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)


def is_account_id(text: str) -> bool:
    """Whether an account may have this id; Account.name in the contract has the rule."""
    return ACCOUNT_ID.fullmatch(text) is not None


def is_api_key_id(text: str) -> bool:
    """Whether an API key may have this id. The ids that Daybook makes are 20 hexadecimal digits."""
    return API_KEY_ID.fullmatch(text) is not None


def account_name(account_id: str) -> str:
    """`accounts/{account}`."""
    return f"accounts/{account_id}"


def api_key_name(key_id: str) -> str:
    """`apiKeys/{api_key}`."""
    return f"apiKeys/{key_id}"


def balance_name(account_id: str) -> str:
    """`accounts/{account}/balance`."""
    return f"accounts/{account_id}/balance"


def lot_name(account_id: str, number: int) -> str:
    """`accounts/{account}/lots/{lot}`."""
    return f"accounts/{account_id}/lots/{number}"


def transaction_name(account_id: str, uid: UUID | str) -> str:
    """`accounts/{account}/transactions/{transaction}`."""
    return f"accounts/{account_id}/transactions/{uid}"


def _wrong_name(field: str, name: str, form: str) -> FieldInvalid:
    """The refusal of a name that is missing or has another form."""
    missing = "" if name else "is required, and "
    return FieldInvalid(field, f"{missing}must have the form {form}")


def parse_account_name(field: str, name: str, *, wildcard: bool = False) -> str:
    """The account id of `accounts/{account}`; with `wildcard` it may be `-`."""
    match name.split("/"):
        case ["accounts", account_id] if is_account_id(account_id) or (wildcard and account_id == ALL_ACCOUNTS):
            return account_id
        case _:
            raise _wrong_name(field, name, "accounts/{account}")


def parse_api_key_name(field: str, name: str) -> str:
    """The id of `apiKeys/{api_key}`."""
    match name.split("/"):
        case ["apiKeys", key_id] if is_api_key_id(key_id):
            return key_id
        case _:
            raise _wrong_name(field, name, "apiKeys/{api_key}")


def parse_balance_name(field: str, name: str) -> str:
    """The account id of `accounts/{account}/balance`."""
    match name.split("/"):
        case ["accounts", account_id, "balance"] if is_account_id(account_id):
            return account_id
        case _:
            raise _wrong_name(field, name, "accounts/{account}/balance")


def parse_transaction_name(field: str, name: str) -> tuple[str, UUID]:
    """The account id and the uid of `accounts/{account}/transactions/{transaction}`."""
    match name.split("/"):
        case ["accounts", account_id, "transactions", uid] if is_account_id(account_id) and _CANONICAL_UUID.fullmatch(
            uid
        ):
            return account_id, UUID(uid)
        case _:
            raise _wrong_name(field, name, "accounts/{account}/transactions/{transaction}")


def uid_text(stored: bytes) -> str:
    """A stored uid as a canonical UUID; bytes of another length as hexadecimal digits."""
    digits = stored.hex()
    if len(digits) != 32:
        return digits
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def in_blocks(random_bytes: RandomBytes) -> RandomBytes:
    """The same randomness, read in blocks.

    One system call serves many postings: a call for ten bytes costs a third of a posting.
    """
    block = b""

    def take(size: int) -> bytes:
        nonlocal block
        if len(block) < size:
            block = random_bytes(max(size, RANDOM_BLOCK_BYTES))
        taken, block = block[:size], block[size:]
        return taken

    return take


def uuid7(instant: Instant, random_bytes: RandomBytes) -> bytes:
    """A UUID of version 7 (RFC 9562, 5.7) for an instant, as 16 bytes.

    Implemented here because libraries read the clock and randomness themselves, whereas a
    reproducible ledger needs both injected.
    """
    milliseconds = instant // 1000
    random = int.from_bytes(random_bytes(10), "big")
    number = (
        (milliseconds & (2**48 - 1)) << 80
        | 0x7 << 76
        | (random >> 62 & 0xFFF) << 64
        | 0b10 << 62
        | random & (2**62 - 1)
    )
    return number.to_bytes(16, "big")


def post_time(uid: bytes, create_time: Instant) -> Instant:
    """The time of posting by the clock.

    Equals the create_time, unless that repeats an earlier one which was ahead of the clock. Then
    the uid has the time, to the millisecond.
    """
    milliseconds = int.from_bytes(uid[:6], "big")
    return 1000 * milliseconds if milliseconds < create_time // 1000 else create_time
