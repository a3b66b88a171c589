"""The expected books of one account: the model decides for itself which lots a transaction moves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from daybook.internal.v1.allocations_pb2 import Allocations
from daybook.v1.transaction_pb2 import Transaction

from server.ledger.instants import SECOND, Instant
from server.ledger.money import Millionths
from tests.support.clock import NOON

NEVER = 2**63 - 1
HOUR_ANCHOR: Instant = NOON + 2 * SECOND
"""The begin of an hour of the first accounts, soon after the start, so that their usage may be in two hours."""


class Violation(Exception):
    """An invariant does not hold."""


@dataclass(frozen=True)
class Effect:
    """A transaction that a client intends to post."""

    account: str
    kind: int
    amount: Millionths
    expire_time: Instant | None = None
    time_to_live: Instant | None = None
    priority: int = 0
    may_be_declined: bool = False
    """Whether it is recorded as FAILED if the account lacks credits."""
    create_time: Instant | None = None
    """The create_time of an imported transaction."""

    def is_of(self, row: Row) -> bool:
        """Whether a row can be this effect."""
        return (self.account, self.kind, self.amount) == (row.account, row.kind, row.amount)


@dataclass(frozen=True)
class Row:
    """A committed transaction."""

    account: str
    sequence: int
    create_time: Instant
    kind: int
    category: str
    state: int
    amount: Millionths
    body: bytes
    message: Transaction = field(compare=False, repr=False)


@dataclass
class Lot:
    """A lot."""

    number: int
    opened_by: int
    expire_time: Instant
    priority: int
    amount: Millionths
    remaining: Millionths


@dataclass(frozen=True)
class Version:
    """An account after one of its transactions."""

    since: Instant
    sequence: int
    balance: Millionths
    expiring: tuple[tuple[Instant, Millionths], ...]
    """The expire_time and the remaining amount of each open lot that expires."""

    def at(self, now: Instant) -> Millionths:
        """The balance without the lots that have expired."""
        return self.balance - sum(remaining for expire_time, remaining in self.expiring if expire_time <= now)


@dataclass(frozen=True)
class CommitTimes:
    """The interval in which a database transaction took place, by the clock of its server and in simulated time.

    Simulated time orders the events of different servers.
    """

    earliest_clock: Instant
    latest_clock: Instant
    began: Instant
    ended: Instant


class Account:
    """The books of one account."""

    def __init__(self, account_id: str, number: int, now: Instant) -> None:
        self.id = account_id
        self.number = number
        self.display_name = ""
        self.credit_limit: Millionths = 0
        self._limits = [(now, self.credit_limit)]
        """The credit limits, each with the time since which it holds."""
        self.rows: list[Row] = []
        self.versions = [Version(now, 0, 0, ())]
        self.refunded: dict[str, Millionths] = {}
        """The sum of the refunds of each refunded charge, by its name."""
        self.has_imports = False
        self.last_create_time: Instant = -(10**18)
        self._lots: dict[int, Lot] = {}
        self._debt: Millionths = 0
        self._balance: Millionths = 0
        self._last_hash = b""

    @property
    def lots(self) -> Sequence[Lot]:
        """All lots, in the order of their numbers."""
        return tuple(self._lots.values())

    def change(self, display_name: str, credit_limit: Millionths, now: Instant) -> None:
        """Follows a committed change of the account itself."""
        self.display_name, self.credit_limit = display_name, credit_limit
        self._limits.append((now, credit_limit))

    def limit_between(self, start: Instant, end: Instant, pick: Callable[..., Millionths]) -> Millionths:
        """The largest or smallest credit limit, as `pick` says, that held within an interval."""
        earlier = [limit for since, limit in self._limits if since <= start][-1:]
        return pick([*earlier, *(limit for since, limit in self._limits if start < since <= end)])

    def versions_between(self, start: Instant, end: Instant) -> list[Version]:
        """The versions that were current at some time within an interval."""
        ends = [each.since for each in self.versions[1:]] + [NEVER]
        return [
            version
            for version, its_end in zip(self.versions, ends, strict=True)
            if version.since <= end and its_end >= start
        ]

    def append(
        self, row: Row, stored: Sequence[Any], effect: Effect | None, terms: Mapping[int, Lot], at: CommitTimes
    ) -> None:
        """Follows a committed transaction.

        `stored` are its balance_after, its allocations and its hash; `effect` is None for an expiration; `terms` are
        the stored lots of the account, which have the terms of the lots that it opens.
        """
        balance_after, allocations, stored_hash = stored
        where = f"{self.id} {row.sequence}"
        if row.sequence != len(self.rows) + 1:
            raise Violation(f"{where}: the sequence follows {len(self.rows)}")
        message = b"%b%d:%b%b" % (self._last_hash, len(row.body), row.body, allocations)
        self._last_hash = hashlib.sha256(message).digest()
        if stored_hash != self._last_hash:
            raise Violation(f"{where}: the chain is broken")
        if row.create_time < self.last_create_time:
            raise Violation(f"{where}: the create_time decreases")
        if effect is not None and effect.create_time is not None:
            self.has_imports = True
            if row.create_time != effect.create_time:
                raise Violation(f"{where}: imported with another create_time than its own")
            at = CommitTimes(row.create_time, row.create_time, at.began, at.ended)
        self.last_create_time = row.create_time
        if row.state == Transaction.SUCCEEDED:
            moves = [(each.lot_number, each.amount) for each in Allocations.FromString(allocations).allocations]
            self._check_moves(where, row, moves, at)
            self._move(where, row, moves, effect, terms, at)
            self._balance += row.amount
            self._check_limit(where, row, at)
        elif effect is None or not effect.may_be_declined:
            raise Violation(f"{where}: declined, although its client did not allow that")
        elif self._balance + self.limit_between(at.began, at.ended, min) + row.amount >= 0:
            raise Violation(f"{where}: declined with a balance of {self._balance}")
        if balance_after != self._balance:
            raise Violation(f"{where}: balance_after {balance_after} is not {self._balance}")
        self.rows.append(row)
        expiring = [(lot.expire_time, lot.remaining) for lot in self._open_lots() if lot.expire_time != NEVER]
        self.versions.append(Version(at.ended, row.sequence, self._balance, tuple(expiring)))

    def _open_lots(self) -> list[Lot]:
        return [lot for lot in self._lots.values() if lot.remaining]

    def _spend(self, amount: Millionths) -> list[tuple[int, Millionths]]:
        """The moves that spend an amount: lots in spending order, and the rest from the credit line, lot 0."""
        moves = []
        for lot in sorted(self._open_lots(), key=lambda lot: (lot.priority, lot.expire_time, lot.number)):
            if amount:
                taken = min(amount, lot.remaining)
                amount -= taken
                moves.append((lot.number, -taken))
        return [*moves, (0, -amount)] if amount else moves

    def _check_moves(self, where: str, row: Row, moves: list[tuple[int, Millionths]], at: CommitTimes) -> None:
        """Checks that a transaction moves what the rules demand."""
        if sum(amount for _, amount in moves) != row.amount:
            raise Violation(f"{where}: the allocations {moves} do not sum to {row.amount}")
        if row.kind == Transaction.EXPIRATION:
            ((number, amount),) = moves
            lot = self._lots[number]
            if lot.remaining != -amount or lot.expire_time > at.latest_clock:
                raise Violation(f"{where}: {lot} expires at {at.latest_clock}")
        elif row.amount < 0:
            if moves != (expected := self._spend(-row.amount)):
                raise Violation(f"{where}: spends {moves}, not {expected}")
            for number, _ in moves:
                if number and self._lots[number].expire_time <= at.earliest_clock:
                    raise Violation(f"{where}: spends {self._lots[number]}, which has expired at {at.earliest_clock}")
        if row.kind == Transaction.REFUND:
            charge_name = row.message.refund_of
            charge = next(each for each in self.rows if each.message.name == charge_name)
            total = self.refunded[charge_name] = self.refunded.get(charge_name, 0) + row.amount
            if charge.kind != Transaction.CHARGE or total > -charge.amount:
                raise Violation(f"{where}: refunds {total} of {charge}")

    def _move(
        self,
        where: str,
        row: Row,
        moves: list[tuple[int, Millionths]],
        effect: Effect | None,
        terms: Mapping[int, Lot],
        at: CommitTimes,
    ) -> None:
        for number, amount in moves:
            if number == 0:
                self._debt -= amount
                if self._debt < 0:
                    raise Violation(f"{where}: more is paid back than was borrowed")
                continue
            lot = self._lots.get(number)
            if lot is None:
                lot = self._lots[number] = self._opened(where, row, number, amount, effect, terms, at)
            else:
                if amount > 0 and lot.expire_time <= at.earliest_clock:
                    raise Violation(f"{where}: gives back into {lot}, which has expired")
                lot.remaining += amount
            if not 0 <= lot.remaining <= lot.amount:
                raise Violation(f"{where}: {lot} is out of bounds")

    def _opened(
        self,
        where: str,
        row: Row,
        number: int,
        amount: Millionths,
        effect: Effect | None,
        terms: Mapping[int, Lot],
        at: CommitTimes,
    ) -> Lot:
        """A new lot, whose terms are what the client asked for; a refund or a transfer has terms of its source."""
        if number != len(self._lots) + 1:
            raise Violation(f"{where}: lot {number} follows {len(self._lots)}")
        lot = Lot(number, row.sequence, terms[number].expire_time, terms[number].priority, amount, amount)
        if lot.expire_time <= at.earliest_clock:
            raise Violation(f"{where}: opens {lot}, which has expired")
        if effect is not None and effect.kind in (Transaction.GRANT, Transaction.ADJUSTMENT):
            first = last = NEVER if effect.expire_time is None else effect.expire_time
            if effect.time_to_live is not None:
                first = at.earliest_clock + effect.time_to_live
                last = at.latest_clock + effect.time_to_live
            if lot.priority != effect.priority or not first <= lot.expire_time <= last:
                raise Violation(f"{where}: opens {lot}, which {effect} does not ask for")
        return lot

    def _check_limit(self, where: str, row: Row, at: CommitTimes) -> None:
        limit = 0
        if row.kind in (Transaction.CHARGE, Transaction.ADJUSTMENT):
            limit = self.limit_between(at.began, at.ended, max)
        elif row.kind != Transaction.TRANSFER_OUT:
            return
        if row.amount < 0 and self._balance < -limit:
            raise Violation(f"{where}: {self._balance} is below the limit {-limit}")

    def check_lots(self, stored: Mapping[int, Lot]) -> None:
        """Compares the stored lots of the account with the expected ones."""
        if stored != self._lots:
            raise Violation(f"{self.id}: the lots are {stored}, not {self._lots}")

    def check_state(self, state: Sequence[Any]) -> None:
        """Compares the stored state of the account with the expected one."""
        open_lots = self._open_lots()
        total = sum(lot.remaining for lot in open_lots)
        if self._debt and open_lots:
            raise Violation(f"{self.id}: has a debt beside open lots")
        expected = (
            len(self.rows),
            self._balance,
            self._debt,
            len(self._lots),
            self._last_hash,
            self.last_create_time if self.rows else state[5],
            len(open_lots),
            sum(lot.remaining for lot in open_lots if lot.expire_time != NEVER),
        )
        if tuple(state) != expected or total - self._debt != self._balance:
            raise Violation(f"{self.id}: the state is {state}, not {expected}")
