"""A unit of work: the accounts that a group of calls posts to, in memory, until it is saved.

Each call makes an attempt on top of the unit. One that is refused is dropped and leaves no
trace; one that succeeds becomes part of the unit, and the next call sees it.
"""

from __future__ import annotations

import marshal
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol
from uuid import UUID

from daybook.v1.transaction_pb2 import Transaction

from server.ledger import posting
from server.ledger.bodies import chain, write_allocations, write_body
from server.ledger.instants import Instant, month_of
from server.ledger.lots import CREDIT_LINE, NEVER, Lot, SpendingOrder
from server.ledger.money import Millionths
from server.ledger.names import RandomBytes, uid_text, uuid7
from server.ledger.posting import AccountState, Kind, Posting, State
from server.ledger.refunds import Charge
from server.ledger.usage import UsageWindow
from server.store.requests import Answer, AnswerKey, Request
from server.store.states import StoredState
from server.store.tables import LABELS, requests, transactions

LOTS_READ_MIN = 64
"""How many lots are read in spending order at first, of an account that has many; then twice as many each time."""
LOTS_EXPIRED_MAX = 1000
"""How many expirations of an account with many open lots are posted in one database transaction."""


class Row(NamedTuple):
    """A row of the table transactions."""

    account_number: int
    sequence: int
    tenant_number: int
    uid: bytes
    create_time: Instant
    month: int
    kind: Kind
    category: str
    state: State
    amount: Millionths
    balance_after: Millionths
    location: str | None
    membership: str | None
    company: str | None
    body: bytes
    allocations: bytes
    hash: bytes


@dataclass(frozen=True, slots=True)
class StoredCharge:
    """A transaction that is to be refunded."""

    sequence: int
    charge: Charge
    body: bytes


@dataclass(frozen=True, slots=True)
class RefundTotal:
    """What was given back of a charge so far."""

    amount: Millionths
    last_create_time: Instant


class Block(NamedTuple):
    """Rows of a table as one statement takes them."""

    table: str
    columns: tuple[str, ...]
    row_count: int
    values: tuple[Any, ...]
    """Of one row after another, in the order of the columns: numbers, texts and bytes."""

    def __reduce__(self) -> tuple[Callable[..., Block], tuple[object, ...]]:
        """Written by marshal on its way between processes, which takes two thirds of the time of pickle."""
        return _read_block, (self.table, self.columns, self.row_count, marshal.dumps(self.values))

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """One after another."""
        return zip(*[iter(self.values)] * len(self.columns), strict=True)


def _read_block(table: str, columns: tuple[str, ...], row_count: int, values: bytes) -> Block:
    return Block(table, columns, row_count, marshal.loads(values))  # noqa: S302  # our own


@dataclass(slots=True)
class Changes:
    """What is to be written."""

    states: dict[int, StoredState] = field(default_factory=dict)
    rows: dict[tuple[int, int], Row] = field(default_factory=dict)
    """Rows of the table transactions, by account and sequence, in the order of posting."""
    lots: dict[tuple[int, int], Lot] = field(default_factory=dict)
    windows: dict[tuple[int, int], UsageWindow] = field(default_factory=dict)
    refunds: dict[tuple[int, int], RefundTotal] = field(default_factory=dict)
    lots_read: dict[int, int] = field(default_factory=dict)
    """By account: how many lots its state knows in spending order."""
    answers: dict[AnswerKey, Answer] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)
    """New transactions and requests that were made ready before, beside those above."""
    block_keys: set[AnswerKey] = field(default_factory=set)
    """The requests in the blocks."""
    block_openers: dict[tuple[int, int], bytes] = field(default_factory=dict)
    """By account and sequence: the bodies of those transactions in the blocks that opened lots which expire."""

    def add(self, later: Changes) -> None:
        """Takes over what changed later."""
        self.states.update(later.states)
        self.rows.update(later.rows)
        self.lots.update(later.lots)
        self.windows.update(later.windows)
        self.refunds.update(later.refunds)
        self.lots_read.update(later.lots_read)
        self.answers.update(later.answers)
        self.blocks += later.blocks
        self.block_keys |= later.block_keys
        self.block_openers.update(later.block_openers)

    def block_answer(self, key: AnswerKey) -> Answer:
        """The answer of a request in the blocks. Looks for it row by row, for hardly anybody asks."""
        number, request_id = key
        ((fingerprint, sequence),) = (
            (fingerprint, sequence)
            for block in self.blocks
            if block.table == requests.name
            for *found, fingerprint, sequence, _ in block.rows()
            if tuple(found) == key
        )
        (body,) = (
            row.body
            for block in self.blocks
            if block.table == transactions.name
            for row in map(Row._make, block.rows())
            if (row.account_number, row.sequence) == (number, sequence)
        )
        return Answer(Request(request_id, fingerprint), sequence, body)


class Known(NamedTuple):
    """What the next posting to some accounts depends on, whoever works it out."""

    states: dict[int, StoredState]
    openers: dict[tuple[int, int], bytes]
    """By account and sequence: the bodies of what opened those of their lots that expire."""


class Prepared(NamedTuple):
    """History that was worked out ahead, on states that may have changed since: what posting it writes."""

    before: Mapping[int, StoredState]
    """The states that it was worked out on, with no import_time."""
    changes: Changes
    """With all transactions and requests in blocks. The requests must be new."""
    item_count: int
    newest_time: Instant

    @classmethod
    def together(cls, parts: Sequence[Prepared]) -> Prepared:
        """Parts, one or more, that have no account in common, as one."""
        before: dict[int, StoredState] = {}
        changes = Changes()
        for part in parts:
            before.update(part.before)
            changes.add(part.changes)
        return cls(before, changes, sum(part.item_count for part in parts), max(part.newest_time for part in parts))


@dataclass(slots=True)
class Unit:
    """What was loaded, and what has changed since."""

    states: dict[int, StoredState]
    lots: dict[tuple[int, int], Lot]
    """By account and number: open lots that are known, and those of charges to be refunded."""
    charges: Mapping[tuple[int, UUID], StoredCharge]
    """By account and uid: transactions that are to be refunded."""
    refunds: Mapping[tuple[int, int], RefundTotal]
    """By account and sequence of the charge."""
    answers: Mapping[AnswerKey, Answer]
    """Those that the requests of the group got before."""
    random_bytes: RandomBytes
    openers: dict[tuple[int, int], bytes] = field(default_factory=dict)
    """By account and sequence: the bodies of what opened the lots that are past."""
    open_lots: OpenLots | None = None
    """Where more open lots are read; None if all of them are known."""
    changes: Changes = field(default_factory=Changes)


class OpenLots(Protocol):
    """Reads open lots as they were before the unit, and what opened them."""

    def first_to_spend(self, account_number: int, limit: int) -> list[Lot]:
        """The first lots in spending order."""

    def expired(self, account_number: int, now: Instant, limit: int) -> list[Lot]:
        """The first lots that have expired, by expire_time and number."""

    def next_expire_time(self, account_number: int, now: Instant) -> Instant:
        """When the first lot expires after this instant; NEVER if none does."""

    def openers(self, opened: Collection[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
        """The bodies of the transactions that opened lots, by account and sequence."""


class ExpirationsFirst(Exception):
    """More lots have expired by a time than one unit posts. They are posted before anything else of the account."""

    def __init__(self, account_number: int, time: Instant) -> None:
        super().__init__(account_number, time)
        self.account_number = account_number
        self.time = time


class Attempt:
    """What one call does. Nothing of it stays unless it is accepted."""

    def __init__(self, unit: Unit) -> None:
        self._unit = unit
        self._changes = Changes()

    def accept(self) -> None:
        """Makes all of it part of the unit."""
        self._unit.changes.add(self._changes)

    def answer(self, account_number: int, request: Request) -> bytes | None:
        """The answer that the request got before, or None if it is new. Raises RequestIdReused."""
        if not request.request_id:
            return None
        key = (account_number, request.request_id)
        answer = self._changes.answers.get(key) or self._unit.changes.answers.get(key) or self._unit.answers.get(key)
        if answer is None:
            for changes in (self._changes, self._unit.changes):
                if key in changes.block_keys:
                    answer = changes.block_answer(key)
        return None if answer is None else answer.to(request)

    def adopt(self, prepared: Prepared, now: Instant) -> bool:
        """Takes over history that was worked out ahead; changes nothing unless that is as if worked out now."""
        changes, unit = self._changes, self._unit
        known = (unit.answers, unit.changes.answers, unit.changes.block_keys, changes.answers, changes.block_keys)
        if not all(prepared.changes.block_keys.isdisjoint(keys) for keys in known):
            return False
        if prepared.newest_time > now or any(
            without_import_time(self._stored(number)) != before for number, before in prepared.before.items()
        ):
            return False
        changes.add(prepared.changes)
        for number, (state, last_hash) in prepared.changes.states.items():
            changes.states[number] = StoredState(state._replace(import_time=now), last_hash)
        return True

    def remember(self, account_number: int, request: Request, response: bytes, *, sequence: int | None = None) -> None:
        """Keeps the answer of a request that has an id; of a transaction, only its sequence."""
        if request.request_id:
            self._changes.answers[account_number, request.request_id] = Answer(request, sequence, response)

    def state(self, account_number: int, now: Instant, *, taking: Millionths = 0) -> AccountState:
        """The state of an account, after its due expirations are posted, with the lots known that an amount is in.

        Raises ExpirationsFirst if more are due than `expire` posts.
        """
        state = self.expire(account_number, now)
        if now >= state.horizon:
            raise ExpirationsFirst(account_number, now)
        while state.lacks_lots(taking):
            state = self._know_lots_to_spend(state)
        return state

    def expire(self, account_number: int, now: Instant) -> AccountState:
        """Posts the expirations that are due, of an account with many open lots LOTS_EXPIRED_MAX at most."""
        state = self._stored(account_number).state
        if now >= state.horizon:
            state = self._know_expired_lots(state, now)
        # Of more than are known to be due, those that expired first.
        steps = posting.expire_due(state, min(now, state.horizon))
        if steps:
            self._load_openers(account_number, [expiration.allocations[0].lot_number for _, expiration in steps])
        for after, expiration in steps:
            self.write(after, expiration, self._details_of_expiration(account_number, expiration))
            state = after
        return state

    def _load_openers(self, account_number: int, lot_numbers: Iterable[int]) -> None:
        """Loads those of the bodies of what opened the lots that the unit doesn't have."""
        if self._unit.open_lots is None:
            return
        lots = (self._lot(account_number, number) for number in lot_numbers)
        opened = {(account_number, lot.opened_by) for lot in lots if lot is not None}
        missing = {key for key in opened if self._opener(key) is None}
        if missing:
            self._unit.openers.update(self._unit.open_lots.openers(missing))

    def _know_lots_to_spend(self, state: AccountState) -> AccountState:
        """Makes twice as many lots known in spending order."""
        unit, number = self._unit, state.account_number
        assert unit.open_lots is not None
        read_before = self._changes.lots_read.get(number) or unit.changes.lots_read.get(number, LOTS_READ_MIN // 2)
        limit = 2 * read_before
        # Beside the state that knows these lots: a refusal of this attempt forgets both.
        kept_with = self._changes if number in self._changes.states else unit.changes
        kept_with.lots_read[number] = limit
        read = unit.open_lots.first_to_spend(number, limit)
        if len(read) < limit:
            return self._know(state, read, None, NEVER)
        return self._know(state, read, read[-1].spending_order, state.horizon)

    def _know_expired_lots(self, state: AccountState, now: Instant) -> AccountState:
        """Makes the lots known that have expired, or the first LOTS_EXPIRED_MAX of them."""
        unit, number = self._unit, state.account_number
        assert unit.open_lots is not None
        read = unit.open_lots.expired(number, now, LOTS_EXPIRED_MAX)
        if len(read) == LOTS_EXPIRED_MAX:
            # There may be more, also of the same expire_time as the last.
            return self._know(state, read, state.edge, read[-1].terms.expire_time or now)
        return self._know(state, read, state.edge, unit.open_lots.next_expire_time(number, now))

    def _know(
        self, state: AccountState, read: Sequence[Lot], edge: SpendingOrder | None, horizon: Instant
    ) -> AccountState:
        """Adds lots as they were before the unit to those that are known."""
        number = state.account_number
        # A lot that the unit changed is known if it is still open.
        unchanged = [
            lot
            for lot in read
            if (number, lot.number) not in self._changes.lots and (number, lot.number) not in self._unit.changes.lots
        ]
        self._unit.lots.update({(number, lot.number): lot for lot in unchanged})
        state = state.with_known(unchanged, edge, horizon)
        for states in (self._changes.states, self._unit.changes.states, self._unit.states):
            if number in states:
                states[number] = StoredState(state, states[number].last_hash)
                break
        return state

    def sequence(self, account_number: int) -> int:
        """The sequence of the account's newest transaction."""
        return self._stored(account_number).state.sequence

    def last_create_time(self, account_number: int) -> Instant:
        """The time of the account's newest transaction."""
        return self._stored(account_number).state.last_create_time

    def charge(self, account_number: int, uid: UUID) -> StoredCharge | None:
        """A transaction that is to be refunded, with what was given back of it so far."""
        stored = self._unit.charges.get((account_number, uid))
        if stored is None:
            return None
        key = (account_number, stored.sequence)
        total = self._changes.refunds.get(key) or self._unit.changes.refunds.get(key) or self._unit.refunds.get(key)
        lots = {
            each.lot_number: lot
            for each in stored.charge.allocations
            if (lot := self._lot(account_number, each.lot_number)) is not None
        }
        return replace(stored, charge=replace(stored.charge, lots=lots, refunded=total.amount if total else 0))

    def add_refund(self, account_number: int, stored: StoredCharge, refund: Posting) -> None:
        """Counts a refund of a charge."""
        self._changes.refunds[account_number, stored.sequence] = RefundTotal(
            stored.charge.refunded + refund.amount, refund.create_time
        )

    def new_uid(self, now: Instant) -> bytes:
        """A uid for a transaction that is posted now, as it is stored."""
        return uuid7(now, self._unit.random_bytes)

    def write(
        self,
        after: AccountState,
        posted: Posting,
        details: Transaction,
        *,
        uid: bytes | None = None,
        request_id: str = "",
    ) -> bytes:
        """Stages a transaction and the state that it leads to; gives its serialized message.

        The details become the message, as `write_body` says. Without a uid it gets one of its
        create_time.
        """
        number = after.account_number
        before = self._stored(number)
        kind, category, state, amount, sequence, create_time, balance_after, moved, _ = posted
        uid = uid or self.new_uid(create_time)
        body = write_body(after.account_id, posted, details, uid_text(uid), request_id)
        allocations = write_allocations(moved)
        new_hash = chain(before.last_hash, body, allocations)
        self._changes.states[number] = StoredState(after, new_hash)
        self._move_lots(number, posted)
        if after.window is not None and after.window != before.state.window:
            self._changes.windows[number, after.window.number] = after.window
        location = membership = company = None
        if labels := details.labels:
            location, membership, company = map(labels.get, LABELS)
        # In the order of the columns: names take twice as long.
        self._changes.rows[number, sequence] = Row(
            number,
            sequence,
            after.tenant_number,
            uid,
            create_time,
            month_of(create_time),
            kind,
            category,
            state,
            amount,
            balance_after,
            location,
            membership,
            company,
            body,
            allocations,
            new_hash,
        )
        return body

    def _stored(self, account_number: int) -> StoredState:
        return (
            self._changes.states.get(account_number)
            or self._unit.changes.states.get(account_number)
            or self._unit.states[account_number]
        )

    def _lot(self, account_number: int, number: int) -> Lot | None:
        key = (account_number, number)
        return self._changes.lots.get(key) or self._unit.changes.lots.get(key) or self._unit.lots.get(key)

    def _details_of_expiration(self, account_number: int, expiration: Posting) -> Transaction:
        """Whose credits expired: who owned them, and by what they can be found, when they came."""
        lot = self._lot(account_number, expiration.allocations[0].lot_number)
        assert lot is not None
        body = self._opener((account_number, lot.opened_by))
        assert body is not None
        opener = Transaction.FromString(body)
        return Transaction(labels=opener.labels, owner=opener.owner if opener.HasField("owner") else None)

    def _opener(self, key: tuple[int, int]) -> bytes | None:
        """The body of a transaction that opened a lot, by account and sequence; None if it is not loaded."""
        for changes in (self._changes, self._unit.changes):
            if key in changes.rows:
                return changes.rows[key].body
            if key in changes.block_openers:
                return changes.block_openers[key]
        return self._unit.openers.get(key)

    def _move_lots(self, account_number: int, posted: Posting) -> None:
        for each in posted.allocations:
            if each.lot_number == CREDIT_LINE:
                continue
            lot = self._lot(account_number, each.lot_number)
            if lot is None:
                lot = Lot(each.lot_number, posted.sequence, each.terms, each.amount, each.amount)
            else:
                lot = lot.with_remaining(lot.remaining + each.amount)
            self._changes.lots[account_number, each.lot_number] = lot


def without_import_time(stored: StoredState) -> StoredState:
    """A state apart from when history was last imported, on which no posting depends."""
    return StoredState(stored.state._replace(import_time=0), stored.last_hash)
