"""The rules of transfers between accounts."""

from __future__ import annotations

from itertools import groupby

from daybook.v1.transaction_pb2 import Transaction

from server.ledger.instants import Instant
from server.ledger.money import Millionths
from server.ledger.posting import AccountState, Portion, Posting, posted, put, withdraw


def transfer(
    source: AccountState, destination: AccountState, amount: Millionths, now: Instant
) -> tuple[tuple[AccountState, Posting], tuple[AccountState, Posting]]:
    """Moves an amount (above 0); returns the outgoing and the incoming side.

    The source spends as a charge does, but without its credit line. The destination gets the
    credits with their terms: one lot for each expire_time and priority. The create_time
    of each side keeps its own account in order, so the two may differ.

    Raises the errors of `withdraw` and `put`.
    """
    source, taken = withdraw(source, amount, borrow=False)
    # Spending order puts lots of equal terms next to each other.
    portions = [
        Portion(-sum(each.amount for each in equal), terms) for terms, equal in groupby(taken, lambda each: each.terms)
    ]
    destination, brought = put(destination, portions)
    source_time, destination_time = max(now, source.last_create_time), max(now, destination.last_create_time)
    return (
        posted(source, Transaction.TRANSFER_OUT, "transfer", -amount, source_time, taken),
        posted(destination, Transaction.TRANSFER_IN, "transfer", amount, destination_time, brought),
    )
