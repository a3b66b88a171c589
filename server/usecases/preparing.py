"""History worked out ahead of its posting: all that its rules need is known before the database is asked."""

from __future__ import annotations

from collections.abc import Sequence

from server.ledger.instants import LATEST
from server.ledger.names import RandomBytes
from server.store.states import StoredState
from server.store.unit import Attempt, Changes, Known, Prepared, Unit
from server.store.unit_store import new_rows
from server.usecases.commands import Import, Item
from server.usecases.transactions import PastTransaction


class Preparer:
    """Works history out, on what it was told of the accounts and on what its own work makes of them.

    Whoever posts it holds that against the database: see Attempt.adopt.
    """

    def __init__(self) -> None:
        self._states: dict[int, StoredState] = {}
        self._openers: dict[tuple[int, int], bytes] = {}
        self._numbers: dict[str, int] = {}

    def forget(self) -> None:
        """Knows nothing any more."""
        self._states.clear()
        self._openers.clear()
        self._numbers.clear()

    def learn(self, known: Known) -> None:
        """Takes over what accounts are like, all of one tenant."""
        self._states.update(known.states)
        self._openers.update(known.openers)
        self._numbers.update({stored.state.account_id: number for number, stored in known.states.items()})

    def prepare(self, history: Sequence[PastTransaction], random_bytes: RandomBytes) -> Prepared | None:
        """What posting the history would write, or None where any of it would be refused or skipped."""
        items = [
            (Item(self._numbers[new.account_id], new.draft, new.details, new.request), time) for new, time in history
        ]
        command = Import(items)
        before = {
            number: StoredState(stored.state._replace(import_time=0), stored.last_hash)
            for number in command.account_numbers
            for stored in (self._states[number],)
        }
        lots = {(number, lot.number): lot for number, stored in before.items() for lot in stored.state.lots}
        unit = Unit(before, lots, {}, {}, {}, random_bytes, self._openers)
        attempt = Attempt(unit)
        # Whether all of it is past by now is for whoever posts it.
        outcome = command.run(attempt, LATEST)
        if outcome.imported < len(items):
            return None
        attempt.accept()
        changes = unit.changes
        openers = _openers(changes)
        self._states.update(changes.states)
        self._openers.update(openers)
        self._forget_openers(changes)
        return Prepared(
            before=before,
            changes=Changes(
                states=changes.states,
                lots=changes.lots,
                windows=changes.windows,
                blocks=list(new_rows(changes)),
                block_answers={
                    key: (answer.request.fingerprint, answer.response) for key, answer in changes.answers.items()
                },
                block_openers=openers,
            ),
            item_count=len(items),
            newest_time=max(time for _, time in items),
        )

    def _forget_openers(self, changes: Changes) -> None:
        """Forgets what opened the lots that are empty by now; a transfer may have opened several."""
        for (number, _), lot in changes.lots.items():
            if not lot.remaining and all(other.opened_by != lot.opened_by for other in self._states[number].state.lots):
                self._openers.pop((number, lot.opened_by), None)


def _openers(changes: Changes) -> dict[tuple[int, int], bytes]:
    """The bodies of the new transactions that opened lots which expire and are still open."""
    return {
        key: changes.rows[key].body
        for (number, _), lot in changes.lots.items()
        if lot.remaining and lot.terms.expire_time is not None and (key := (number, lot.opened_by)) in changes.rows
    }
