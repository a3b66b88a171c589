"""History worked out ahead of its posting: all that its rules need is known before the database is asked."""

from __future__ import annotations

from collections.abc import Iterable

from server.ledger.instants import EARLIEST, LATEST
from server.ledger.lots import Lot
from server.ledger.names import RandomBytes, account_name
from server.store.states import WHOLE_LOTS_MAX, StoredState
from server.store.unit import Attempt, Changes, Known, Prepared, Unit, without_import_time
from server.store.unit_store import new_rows
from server.usecases.commands import Item, import_items
from server.usecases.transactions import PastTransaction


class Preparer:
    """Works history out, on what it was told of the accounts and on what its own work makes of them.

    Whoever posts it holds that against the database: see Attempt.adopt.
    """

    def __init__(self) -> None:
        self._states: dict[int, StoredState] = {}
        self._lots: dict[tuple[int, int], Lot] = {}
        self._openers: dict[tuple[int, int], bytes] = {}
        self._numbers: dict[str, int] = {}
        self.names = set[str]()
        """The accounts that it knows."""

    def forget(self) -> None:
        """Knows nothing any more."""
        self._states.clear()
        self._lots.clear()
        self._openers.clear()
        self._numbers.clear()
        self.names.clear()

    def learn(self, known: Known) -> None:
        """Takes over what accounts are like, all of one tenant."""
        self._states.update(known.states)
        self._openers.update(known.openers)
        for number, (state, _) in known.states.items():
            self._numbers[state.account_id] = number
            self.names.add(account_name(state.account_id))
            self._lots.update({(number, lot.number): lot for lot in state.lots})

    def prepare(self, history: Iterable[PastTransaction], random_bytes: RandomBytes) -> Prepared | None:
        """What posting the history would write, or None where any of it would be refused, or depends on many lots.

        What would be skipped is not counted in it.
        Each transaction is taken out of the history when its turn comes: one that was made
        just before is still in the processor's cache.
        """
        items = ((Item(self._numbers[new.account_id], *new[1:]), time) for new, time in history)
        unit = Unit(self._states, self._lots, {}, {}, {}, random_bytes, self._openers)
        attempt = Attempt(unit)
        # Whether all of it is past by now is for whoever posts it.
        outcome = import_items(attempt, items, LATEST)
        if outcome.error is not None:
            return None
        attempt.accept()
        changes = unit.changes
        before = {number: without_import_time(self._states[number]) for number in changes.states}
        if any(stored.state.open_lot_count > WHOLE_LOTS_MAX for stored in before.values()):
            # The server that posts it doesn't load the state as it is known here.
            return None
        openers = _openers(changes)
        self._states.update(changes.states)
        self._lots.update(changes.lots)
        self._openers.update(openers)
        self._forget_empty(changes)
        return Prepared(
            before=before,
            changes=Changes(
                states=changes.states,
                lots=changes.lots,
                windows=changes.windows,
                blocks=list(new_rows(changes)),
                block_keys=set(changes.answers),
                block_openers=openers,
            ),
            item_count=outcome.imported,
            newest_time=max((stored.state.last_create_time for stored in changes.states.values()), default=EARLIEST),
        )

    def _forget_empty(self, changes: Changes) -> None:
        """Forgets the lots that are empty by now, and what opened them; a transfer may have opened several."""
        for (number, lot_number), lot in changes.lots.items():
            if lot.remaining:
                continue
            del self._lots[number, lot_number]
            if all(other.opened_by != lot.opened_by for other in self._states[number].state.lots):
                self._openers.pop((number, lot.opened_by), None)


def _openers(changes: Changes) -> dict[tuple[int, int], bytes]:
    """The bodies of the new transactions that opened lots which expire and are still open."""
    return {
        key: changes.rows[key].body
        for (number, _), lot in changes.lots.items()
        if lot.remaining and lot.terms.expire_time is not None and (key := (number, lot.opened_by)) in changes.rows
    }
