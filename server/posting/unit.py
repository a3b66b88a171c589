"""The unit of work: the accounts that a group of commands posts to, in memory until they are saved.

Each command makes an attempt on top of the unit. A refused attempt is dropped and leaves no
trace; an accepted one becomes part of the unit, and the next command sees it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from uuid import UUID

from daybook.v1.transaction_pb2 import Transaction

from server.ledger import posting
from server.ledger.bodies import chain, write_allocations, write_body
from server.ledger.idempotency import Answer, Request
from server.ledger.instants import Instant, month_of
from server.ledger.lots import CREDIT_LINE, NEVER, Lot, SpendingOrder
from server.ledger.money import Millionths
from server.ledger.names import RandomBytes, uid_text, uuid7
from server.ledger.posting import AccountState, Posting
from server.ledger.refunds import RefundTotal, StoredCharge
from server.store.states import StoredState
from server.store.tables import LABELS
from server.store.units import Changes, Loaded, PostedRow

LOTS_READ_MIN = 64
"""The number of lots that the first read in spending order asks for. Each further read asks for twice as many."""
LOTS_EXPIRED_MAX = 1000
"""The largest number of expirations that one database transaction posts for an account with many open lots."""


@dataclass(slots=True)
class Unit:
    """The loaded rows, and the changes of the accepted attempts."""

    loaded: Loaded
    random_bytes: RandomBytes
    changes: Changes = field(default_factory=Changes)


class ExpirationsFirst(Exception):
    """An account has more due expirations than one unit posts. They must be posted before its other transactions."""

    def __init__(self, account_number: int, time: Instant) -> None:
        super().__init__(account_number, time)
        self.account_number = account_number
        self.time = time


class Attempt:
    """The effects of one command, which are dropped unless they are accepted."""

    def __init__(self, unit: Unit) -> None:
        self._unit = unit
        self._changes = Changes()

    def accept(self) -> None:
        """Makes the effects part of the unit."""
        self._unit.changes.update(self._changes)

    def answer(self, account_number: int, request: Request) -> bytes | None:
        """The stored answer to the request, or None if it is new. Raises RequestIdReused."""
        if not request.request_id:
            return None
        key = (account_number, request.request_id)
        answer = (
            self._changes.answers.get(key) or self._unit.changes.answers.get(key) or self._unit.loaded.answers.get(key)
        )
        return None if answer is None else answer.to(request)

    def stage_answer(
        self, account_number: int, request: Request, response: bytes, *, sequence: int | None = None
    ) -> None:
        """Stages the answer to a request that has a request_id; for a transaction only the sequence is stored."""
        if request.request_id:
            self._changes.answers[account_number, request.request_id] = Answer(request, sequence, response)

    def state(self, account_number: int, now: Instant, *, taking: Millionths = 0) -> AccountState:
        """The state of an account after its due expirations, with enough lots loaded to take the amount `taking`.

        Raises ExpirationsFirst if more are due than `expire` posts.
        """
        state = self.expire(account_number, now)
        if now >= state.horizon:
            raise ExpirationsFirst(account_number, now)
        while state.lacks_lots(taking):
            state = self._read_lots_to_spend(state)
        return state

    def expire(self, account_number: int, now: Instant) -> AccountState:
        """Posts the due expirations; for an account with many open lots, at most LOTS_EXPIRED_MAX."""
        state = self._current(account_number).state
        if now >= state.horizon:
            state = self._read_expired_lots(state, now)
        # Due lots may be missing, but all that expire before the horizon are loaded.
        steps = posting.expire_due(state, min(now, state.horizon))
        if steps:
            self._load_openers(account_number, [expiration.allocations[0].lot_number for _, expiration in steps])
        for after, expiration in steps:
            self.stage_transaction(after, expiration, self._details_of_expiration(account_number, expiration))
            state = after
        return state

    def _load_openers(self, account_number: int, lot_numbers: Iterable[int]) -> None:
        """Loads the missing bodies of the transactions that opened the lots."""
        loaded = self._unit.loaded
        if loaded.open_lots is None:
            return
        lots = (self._lot(account_number, number) for number in lot_numbers)
        opened = {(account_number, lot.opened_by) for lot in lots if lot is not None}
        missing = {key for key in opened if self._opener(key) is None}
        if missing:
            loaded.openers.update(loaded.open_lots.openers(missing))

    def _read_lots_to_spend(self, state: AccountState) -> AccountState:
        """Reads the first lots in spending order, twice as many as in the previous read."""
        unit, number = self._unit, state.account_number
        assert unit.loaded.open_lots is not None
        previous_limit = self._changes.lots_read.get(number) or unit.changes.lots_read.get(number, LOTS_READ_MIN // 2)
        limit = 2 * previous_limit
        # Kept beside the state that has these lots, so that a refused attempt drops both.
        changes = self._changes if number in self._changes.states else unit.changes
        changes.lots_read[number] = limit
        read = unit.loaded.open_lots.first_to_spend(number, limit)
        if len(read) < limit:
            return self._add_lots(state, read, None, NEVER)
        return self._add_lots(state, read, read[-1].spending_order, state.horizon)

    def _read_expired_lots(self, state: AccountState, now: Instant) -> AccountState:
        """Reads the first LOTS_EXPIRED_MAX lots that have expired."""
        number, open_lots = state.account_number, self._unit.loaded.open_lots
        assert open_lots is not None
        read = open_lots.expired(number, now, LOTS_EXPIRED_MAX)
        if len(read) == LOTS_EXPIRED_MAX:
            # There may be more, even with the expire_time of the last one.
            return self._add_lots(state, read, state.edge, read[-1].terms.expire_time or now)
        return self._add_lots(state, read, state.edge, open_lots.next_expire_time(number, now))

    def _add_lots(
        self, state: AccountState, read: Sequence[Lot], edge: SpendingOrder | None, horizon: Instant
    ) -> AccountState:
        """Adds stored lots to a state. Skips lots that the unit has changed: if open, they are in the state already."""
        number = state.account_number
        unchanged = [
            lot
            for lot in read
            if (number, lot.number) not in self._changes.lots and (number, lot.number) not in self._unit.changes.lots
        ]
        self._unit.loaded.lots.update({(number, lot.number): lot for lot in unchanged})
        state = state.with_loaded(unchanged, edge, horizon)
        for states in (self._changes.states, self._unit.changes.states, self._unit.loaded.states):
            if number in states:
                states[number] = StoredState(state, states[number].last_hash)
                break
        return state

    def sequence(self, account_number: int) -> int:
        """The sequence of the account's newest transaction."""
        return self._current(account_number).state.sequence

    def last_create_time(self, account_number: int) -> Instant:
        """The create_time of the account's newest transaction."""
        return self._current(account_number).state.last_create_time

    def charge(self, account_number: int, uid: UUID) -> StoredCharge | None:
        """A transaction to be refunded, with the sum of its refunds so far; None if no transaction has this uid."""
        stored = self._unit.loaded.charges.get((account_number, uid))
        if stored is None:
            return None
        key = (account_number, stored.sequence)
        total = (
            self._changes.refunds.get(key) or self._unit.changes.refunds.get(key) or self._unit.loaded.refunds.get(key)
        )
        lots = {
            each.lot_number: lot
            for each in stored.charge.allocations
            if (lot := self._lot(account_number, each.lot_number)) is not None
        }
        return replace(stored, charge=replace(stored.charge, lots=lots, refunded=total.amount if total else 0))

    def add_refund(self, account_number: int, stored: StoredCharge, refund: Posting) -> None:
        """Adds a refund to the sum of its charge."""
        self._changes.refunds[account_number, stored.sequence] = RefundTotal(
            stored.charge.refunded + refund.amount, refund.create_time
        )

    def new_uid(self, now: Instant) -> bytes:
        """A uid, in stored form, for a transaction that is posted now."""
        return uuid7(now, self._unit.random_bytes)

    def stage_transaction(
        self,
        after: AccountState,
        posted: Posting,
        details: Transaction,
        *,
        uid: bytes | None = None,
        request_id: str = "",
    ) -> bytes:
        """Stages a transaction and the state after it; returns the serialized message.

        `write_body` builds the message from the posting and the details. Without a uid, makes one
        from the create_time.
        """
        number = after.account_number
        before = self._current(number)
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
        # Positional, in the order of the columns, because keyword arguments take twice as long.
        self._changes.posted[number, sequence] = PostedRow(
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

    def _current(self, account_number: int) -> StoredState:
        return (
            self._changes.states.get(account_number)
            or self._unit.changes.states.get(account_number)
            or self._unit.loaded.states[account_number]
        )

    def _lot(self, account_number: int, number: int) -> Lot | None:
        key = (account_number, number)
        return self._changes.lots.get(key) or self._unit.changes.lots.get(key) or self._unit.loaded.lots.get(key)

    def _details_of_expiration(self, account_number: int, expiration: Posting) -> Transaction:
        """The details of an expiration: labels and owner of the transaction that opened the lot."""
        lot = self._lot(account_number, expiration.allocations[0].lot_number)
        assert lot is not None
        body = self._opener((account_number, lot.opened_by))
        assert body is not None
        opener = Transaction.FromString(body)
        return Transaction(labels=opener.labels, owner=opener.owner if opener.HasField("owner") else None)

    def _opener(self, key: tuple[int, int]) -> bytes | None:
        """The body of a transaction that opened a lot, by account and sequence; None if it is not loaded."""
        posted = self._changes.posted.get(key) or self._unit.changes.posted.get(key)
        return self._unit.loaded.openers.get(key) if posted is None else posted.body

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
