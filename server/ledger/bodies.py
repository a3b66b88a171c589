"""The stored form of a transaction: its message, its allocations and its hash. It never changes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache

from daybook.internal.v1.allocations_pb2 import Allocations
from daybook.v1 import transaction_pb2
from daybook.v1.transaction_pb2 import Transaction

from server.ledger import money
from server.ledger.instants import set_timestamp
from server.ledger.lots import CREDIT_LINE, Allocation, Terms, expiring_and_permanent
from server.ledger.names import lot_name, transaction_name
from server.ledger.posting import Posting


def write_body(account_id: str, posted: Posting, details: Transaction, uid: str, request_id: str) -> bytes:
    """The serialized transaction: the fields that posting decides, and the caller's details.

    The details become that message, because a copy costs as much as the rest of this function.
    Every field that posting decides is overwritten, so the details can be reused.
    """
    message = details
    kind, category, state, amount, sequence, create_time, balance_after, allocations, terms = posted
    expiring, permanent = expiring_and_permanent(allocations)
    message.uid = uid
    message.name = transaction_name(account_id, uid)
    message.sequence = sequence
    set_timestamp(message.create_time, create_time)
    message.kind = kind
    message.category = category
    message.state = state
    message.amount = text = money.write(amount)
    # Nearly every transaction is all expiring or all permanent, and formatting an amount is slow.
    message.expiring_amount = text if expiring == amount else money.write(expiring)
    message.permanent_amount = text if permanent == amount else money.write(permanent)
    message.balance_after = money.write(balance_after)
    message.request_id = request_id
    message.ClearField("lifetime")
    expire_time, message.priority = terms
    if expire_time is not None:
        set_timestamp(message.expire_time, expire_time)
    return message.SerializeToString(deterministic=True)


def write_allocations(allocations: Iterable[Allocation]) -> bytes:
    """The stored form of allocations."""
    message = Allocations()
    for lot_number, amount, (expire_time, priority) in allocations:
        each = message.allocations.add()
        each.lot_number, each.amount, each.priority = lot_number, amount, priority
        if expire_time is not None:
            each.expire_time = expire_time
    # A message without maps, so its serialization is deterministic.
    return message.SerializeToString()


def read_allocations(stored: bytes) -> tuple[Allocation, ...]:
    """Parses stored allocations."""
    return tuple(
        Allocation(
            each.lot_number,
            each.amount,
            Terms(each.expire_time if each.HasField("expire_time") else None, each.priority),
        )
        for each in Allocations.FromString(stored).allocations
    )


def with_allocations(account_id: str, body: bytes, stored: bytes) -> Transaction:
    """A transaction with its allocations (the view FULL)."""
    message = Transaction.FromString(body)
    for each in read_allocations(stored):
        shown = transaction_pb2.Allocation(amount=money.write(each.amount))
        if each.lot_number != CREDIT_LINE:
            shown.lot = lot_name(account_id, each.lot_number)
        if each.terms.expire_time is not None:
            set_timestamp(shown.expire_time, each.terms.expire_time)
        message.allocations.append(shown)
    return message


def label_of(body: bytes, name: str) -> str:
    """The value of a label of a stored transaction; empty if it has none."""
    return Transaction.FromString(body).labels.get(name, "")


def chain(previous_hash: bytes, body: bytes, allocations: bytes) -> bytes:
    """The hash of a transaction: SHA-256 over its predecessor's hash and its own stored bytes.

    The length of the body is hashed too, so that no byte can move between the body and the
    allocations. The hash before the first transaction is empty.
    """
    return hashlib.sha256(b"%b%d:%b%b" % (previous_hash, len(body), body, allocations)).digest()


# The tag of field 1, length-delimited: the repeated field of list responses.
_FIELD_1_TAG = b"\x0a"
LENGTHS_CACHED_MAX = 4096


def join_messages(bodies: Sequence[bytes]) -> bytes:
    """A serialized message whose field 1 repeats these serialized messages.

    Hot path: nothing is parsed or serialized again, and there is no Python loop over the bodies.
    """
    parts = [b""] * (2 * len(bodies))
    parts[::2] = map(_head, map(len, bodies))
    parts[1::2] = bodies
    return b"".join(parts)


@lru_cache(LENGTHS_CACHED_MAX)
def _head(length: int) -> bytes:
    """The prefix of an embedded message: the tag, and the length as a varint."""
    encoded = bytearray(_FIELD_1_TAG)
    while length > 0x7F:
        encoded.append(length & 0x7F | 0x80)
        length >>= 7
    encoded.append(length)
    return bytes(encoded)
