"""Reads open lots of an account that has many: only those that a posting needs, in spending order."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import BindParameter, Connection, bindparam, func, literal_column, select

from server.ledger.instants import Instant
from server.ledger.lots import NEVER, Lot
from server.store.engine import engine_of
from server.store.lookups import in_parts
from server.store.states import LOT_COLUMNS, has_remaining, to_lot
from server.store.tables import lots, transactions


class OpenLots:
    """Reads open lots of a locked account, and the transactions that opened them. Every read is bounded."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def first_to_spend(self, account_number: int, limit: int) -> list[Lot]:
        """The first `limit` open lots in spending order."""
        rows = self._connection.execute(FIRST_TO_SPEND, {"account_number": account_number, "limit": limit})
        return [to_lot(*row) for row in rows]

    def expired(self, account_number: int, now: Instant, limit: int) -> list[Lot]:
        """The first `limit` open lots that have expired, by expire_time and number."""
        parameters = {"account_number": account_number, "now": now, "limit": limit}
        return [to_lot(*row) for row in self._connection.execute(EXPIRED, parameters)]

    def next_expire_time(self, account_number: int, now: Instant) -> Instant:
        """The first expire_time after this instant; NEVER if there is none."""
        parameters = {"account_number": account_number, "now": now}
        found: Instant | None = self._connection.execute(NEXT_EXPIRE_TIME, parameters).scalar_one()
        return NEVER if found is None else found

    def openers(self, opened: Collection[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
        """The bodies of the transactions that opened lots, by account and sequence."""
        return load_bodies(self._connection, opened)


def load_bodies(connection: Connection, keys: Collection[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
    """The bodies of transactions, by account and sequence."""
    bodies: dict[tuple[int, int], bytes] = {}
    for some in in_parts(sorted(keys)):
        key = transactions.c["account_number", "sequence"]
        rows = connection.execute(engine_of(connection).with_keys(select(*key, transactions.c.body), key, some))
        bodies |= {(row.account_number, row.sequence): bytes(row.body) for row in rows}
    return bodies


# The conditions match the indexes lots_open and lots_expiring, so that each statement scans one of them.
_is_of_account = (lots.c.account_number == bindparam("account_number")) & has_remaining
_now: BindParameter[Instant] = bindparam("now")
_some = select(*LOT_COLUMNS).where(_is_of_account).limit(bindparam("limit"))
FIRST_TO_SPEND = _some.order_by(
    lots.c.priority, func.coalesce(lots.c.expire_time, literal_column(str(NEVER))), lots.c.number
)
EXPIRED = _some.where(lots.c.expire_time <= _now).order_by(lots.c.expire_time, lots.c.number)
NEXT_EXPIRE_TIME = select(func.min(lots.c.expire_time)).where(_is_of_account, lots.c.expire_time > _now)
