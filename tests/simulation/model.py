"""The model of the ledger: reads each commit and checks that clients asked for it and that the contract allows it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal

from daybook.v1.account_pb2 import Balance
from daybook.v1.transaction_pb2 import Transaction

from server.ledger.instants import Instant, from_timestamp
from server.ledger.money import Millionths
from tests.simulation.books import NEVER, Account, CommitTimes, Effect, Lot, Row, Violation
from tests.simulation.disk import Disk


@dataclass(eq=False)
class Intent:
    """A mutation that a client intends to happen once. All its calls have the same body and request_id, or none."""

    tag: str
    """The description of its transactions, or the display_name that it gives its account."""
    account: str
    request_id: str
    effects: tuple[Effect, ...]
    """Empty for a mutation of the account itself."""
    credit_limit: Millionths | None = None
    """The credit limit that it gives its account; None if it posts."""
    rows: list[Row] = field(default_factory=list)
    """The effects that are committed."""
    committed_at: Instant | None = None
    answer: bytes | None = None
    """The first answer."""
    open_calls: int = 0
    """Number of calls that are under way or ended with an unknown outcome."""

    @property
    def is_committed(self) -> bool:
        """Whether its effects are committed."""
        return self.committed_at is not None


class Model:
    """All accounts, and all intents of clients."""

    def __init__(self, disk: Disk, now: Instant, openings: Iterable[Intent]) -> None:
        """`openings` are committed already: the accounts, and their first transactions."""
        self._disk = disk
        self.accounts: dict[str, Account] = {}
        self._intents: dict[str, Intent] = {}
        self._ids: dict[int, str] = {}
        self._by_request: dict[tuple[str, str], list[Intent]] = {}
        self._answers: dict[tuple[str, str], tuple[object, ...]] = {}
        self._last_answer = 0
        for each in openings:
            # No client waits for the answer.
            each.open_calls = 1
            self.intend(each)
        self.follow(CommitTimes(now, now, now, now))

    def intend(self, intent: Intent) -> Intent:
        """Adds an intent, before its first call."""
        self._intents[intent.tag] = intent
        if intent.request_id:
            self._by_request.setdefault((intent.account, intent.request_id), []).append(intent)
        return intent

    def follow(self, at: CommitTimes) -> None:
        """Reads and checks what a database transaction has just committed. Raises Violation."""
        posted: list[Intent] = []
        for number, account_id, name, limit in self._disk.rows(
            "SELECT number, id, display_name, credit_limit FROM accounts"
        ):
            account = self.accounts.get(account_id)
            if account is None:
                account = self.accounts[account_id] = Account(account_id, number, at.ended)
                self._ids[number] = account_id
            if (account.display_name, account.credit_limit) != (name, limit):
                posted.append(self._change_of(account_id, name, limit))
                account.change(name, limit, at.ended)
        for number, *state in self._disk.rows(
            "SELECT account_number, sequence, balance, debt, lot_count, last_hash, last_create_time, open_lot_count,"
            " expiring FROM account_states"
        ):
            account = self.accounts[self._ids[number]]
            if state[0] != len(account.rows):
                self._follow_account(account, at, posted)
            account.check_state(state)
        self._follow_answers(posted)
        for intent in posted:
            if len(intent.rows) != len(intent.effects):
                raise Violation(f"{intent.tag} is committed in part: {len(intent.rows)} of {len(intent.effects)}")
            if intent.request_id and (intent.account, intent.request_id) not in self._answers:
                raise Violation(f"{intent.tag} is committed without its answer")
            intent.committed_at = at.ended

    def _change_of(self, account_id: str, name: str, limit: Millionths) -> Intent:
        """The intent of a new or changed account, which the account's display_name names."""
        intent = self._intents.get(name)
        if intent is None or (intent.account, intent.credit_limit) != (account_id, limit):
            raise Violation(f"no client asked for {account_id} with the display_name {name!r} and a limit of {limit}")
        if intent.is_committed:
            raise Violation(f"{name} has its effect twice: it changes {account_id} again")
        return intent

    def _follow_account(self, account: Account, at: CommitTimes, posted: list[Intent]) -> None:
        lots = {
            number: Lot(number, opened_by, NEVER if expire_time is None else expire_time, priority, amount, remaining)
            for number, opened_by, expire_time, priority, amount, remaining in self._disk.rows(
                "SELECT number, opened_by, expire_time, priority, amount, remaining FROM lots WHERE account_number = ?",
                account.number,
            )
        }
        for sequence, create_time, kind, category, state, amount, body, *stored in self._disk.rows(
            "SELECT sequence, create_time, kind, category, state, amount, body, balance_after, allocations, hash"
            " FROM transactions WHERE account_number = ? AND sequence > ? ORDER BY sequence",
            account.number,
            len(account.rows),
        ):
            message = Transaction.FromString(body)
            row = Row(account.id, sequence, create_time, kind, category, state, amount, body, message)
            effect = None if kind == Transaction.EXPIRATION else self._attribute(row, posted)
            account.append(row, stored, effect, lots, at)
        account.check_lots(lots)

    def _attribute(self, row: Row, posted: list[Intent]) -> Effect:
        """The effect that a row is, of the intent that its description names."""
        intent = self._intents.get(row.message.description)
        if intent is None:
            raise Violation(f"{row.account} {row.sequence}: no client asked for {row.message.description!r}")
        if intent.is_committed or len(intent.rows) == len(intent.effects):
            raise Violation(f"{intent.tag} has its effect twice: again as {row.account} {row.sequence}")
        left = list(intent.effects)
        for each in intent.rows:
            left.remove(next(effect for effect in left if effect.is_of(each)))
        found = next((effect for effect in left if effect.is_of(row)), None)
        if found is None:
            raise Violation(f"{intent.tag} has another effect: {row}")
        if len(intent.effects) == 1 and row.message.request_id != intent.request_id:
            raise Violation(f"{intent.tag} has the request_id {row.message.request_id!r}")
        intent.rows.append(row)
        if intent not in posted:
            posted.append(intent)
        return found

    def _follow_answers(self, posted: list[Intent]) -> None:
        for rowid, number, request_id, *answer in self._disk.rows(
            "SELECT rowid, account_number, request_id, fingerprint, sequence, response FROM requests WHERE rowid > ?",
            self._last_answer,
        ):
            self._last_answer = rowid
            key = (self._ids[number], request_id)
            if key in self._answers:
                raise Violation(f"{key} has a second answer")
            if not any(each in posted for each in self._by_request.get(key, [])):
                raise Violation(f"{key} has an answer without an effect")
            self._answers[key] = tuple(answer)

    # Answers to clients.

    def acknowledge(self, intent: Intent, answer: bytes, bodies: Iterable[bytes]) -> None:
        """Checks an answer to an intent; `bodies` are the serialized transactions in it."""
        if not intent.is_committed:
            raise Violation(f"{intent.tag} is acknowledged and not committed")
        if sorted(bodies) != sorted(row.body for row in intent.rows):
            raise Violation(f"{intent.tag} is answered with other transactions than its own")
        if intent.answer is not None and intent.answer != answer:
            raise Violation(f"{intent.tag} has two answers")
        intent.answer = answer

    def refuse(self, intent: Intent, reason: str, start: Instant) -> None:
        """Checks that a call that began at `start` may be refused. A call that is still open may commit later."""
        if intent.committed_at is not None and (intent.committed_at < start or not intent.open_calls):
            raise Violation(f"{intent.tag} is refused for {reason}, and committed")
        if reason == "REQUEST_ID_REUSED":
            rivals = [each for each in self._by_request[intent.account, intent.request_id] if each is not intent]
            if not any(each.is_committed for each in rivals):
                raise Violation(f"{intent.tag} is refused for {reason}, although no other call has used it")

    def always_has(
        self, account_id: str, amount: Millionths, start: Instant, end: Instant, *, ahead: Instant, borrows: bool
    ) -> bool:
        """Whether the account had credits for an amount at every time between `start` and `end`.

        `ahead` is how far the clock of a server can be ahead.
        """
        account = self.accounts[account_id]
        limit = account.limit_between(start, end, min) if borrows else 0
        least = min(version.at(end + ahead) for version in account.versions_between(start, end))
        return least + limit >= amount

    def check_balance(self, account_id: str, balance: Balance, start: Instant, end: Instant) -> None:
        """Checks that the account had this balance at some time between `start` and `end`."""
        versions = self.accounts[account_id].versions_between(start, end)
        found = [each for each in versions if each.sequence == balance.sequence]
        if not found or found[0].at(from_timestamp(balance.read_time)) != Decimal(balance.amount) * 1_000_000:
            raise Violation(f"{account_id}: never had the balance {balance}")

    # At the end.

    def finish(self, now: Instant) -> None:
        """Checks what holds once no call is under way and the due lots of all accounts are swept at `now`.

        Sweeps skip accounts with imports for some minutes.
        """
        for intent in self._intents.values():
            if intent.is_committed and not intent.open_calls and intent.answer is None:
                raise Violation(f"{intent.tag} was refused, and is committed")
        for account in self.accounts.values():
            for lot in account.lots:
                if lot.remaining and lot.expire_time <= now and not account.has_imports:
                    raise Violation(f"{account.id}: {lot} has not expired after a sweep at {now}")
        answers = {
            (self._ids[number], request_id): tuple(answer)
            for number, request_id, *answer in self._disk.rows(
                "SELECT account_number, request_id, fingerprint, sequence, response FROM requests"
            )
        }
        if answers != self._answers:
            raise Violation("stored answers have changed")
        stored = self._disk.rows("SELECT account_number, sequence, body FROM transactions")
        followed = [(each.number, row.sequence, row.body) for each in self.accounts.values() for row in each.rows]
        if sorted(stored) != sorted(followed):
            raise Violation("stored transactions have changed")
