"""Recomputes the books of an account from its transactions, and reports where the stored books differ.

The transactions are read once, in order; memory does not grow with them. After a divergence
the audit continues from the stored value, so that a fault is reported once and not at every
later row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from daybook.v1.transaction_pb2 import Transaction
from google.protobuf.message import DecodeError

from server.ledger import money
from server.ledger.bodies import chain, read_allocations
from server.ledger.instants import EARLIEST, Instant, from_timestamp, month_of
from server.ledger.lots import CREDIT_LINE, Allocation, Lot, expiring_and_permanent
from server.ledger.money import Millionths
from server.ledger.names import post_time, uid_text
from server.ledger.posting import AccountState
from server.ledger.usage import UsageWindow, add_usage


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored transaction: the serialized message, and the columns derived from it."""

    sequence: int
    tenant_number: int
    uid: bytes
    create_time: Instant
    month: int
    kind: int
    category: str
    state: int
    amount: Millionths
    balance_after: Millionths
    labels: Mapping[str, str]
    """The labels that have a column."""
    body: bytes
    allocations: bytes
    hash: bytes


@dataclass(frozen=True, slots=True)
class Posted:
    """A transaction that was posted by a request with a request_id."""

    request_id: str
    sequence: int
    kind: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """The stored answer to a request: the sequence of a transaction, or a serialized message."""

    sequence: int | None
    response: bytes


@dataclass(frozen=True, slots=True)
class Finding:
    """A divergence of the stored books."""

    account_id: str
    sequence: int
    """0 for a finding about the account as a whole."""
    subject: str
    expected: str
    found: str


class AccountAudit:
    """The audit of one account. The caller passes every entry to `read`, then calls `finish`.

    In between, the caller empties `opened_lots`, `closed_windows` and `posted`, and passes them
    with the stored rows to `check_lots`, `check_windows` and `check_answers`.
    """

    def __init__(self, account_id: str, tenant_number: int, hour_anchor: Instant, label_names: Iterable[str]) -> None:
        self.findings: list[Finding] = []
        self.opened_lots: list[Lot] = []
        """As they were opened; their `remaining` has no meaning here."""
        self.closed_windows: list[UsageWindow] = []
        self.posted: list[Posted] = []
        self._account_id = account_id
        self._named_id = account_id
        self._tenant_number = tenant_number
        self._hour_anchor = hour_anchor
        self._label_names = tuple(label_names)
        self._sequence = 0
        self._hash = b""
        self._balance: Millionths = 0
        self._debt: Millionths = 0
        self._lots: dict[int, Lot] = {}
        self._lot_count = 0
        self._window: UsageWindow | None = None
        self._last_create_time: Instant = EARLIEST
        self._refunded = 0
        self._answers = 0

    def read(self, entry: Entry) -> None:
        """Checks the next transaction against all earlier ones."""
        self._expect(entry.sequence, "sequence", self._sequence + 1, entry.sequence)
        expected_hash = chain(self._hash, entry.body, entry.allocations)
        self._expect(entry.sequence, "hash", expected_hash.hex(), entry.hash.hex())
        self._sequence, self._hash = entry.sequence, entry.hash
        try:
            message = Transaction.FromString(entry.body)
            allocations = read_allocations(entry.allocations)
        except DecodeError:
            self._expect(entry.sequence, "body", "a serialized Transaction", "something else")
            self._balance = entry.balance_after
            return
        self._check_columns(entry, message, allocations)
        self._check_amounts(entry, allocations)
        self._check_time(entry)
        for allocation in allocations:
            self._move(entry, allocation)
        if message.WhichOneof("subject") == "usage" and entry.state == Transaction.SUCCEEDED:
            self._add_usage(entry)
        if entry.kind == Transaction.REFUND:
            self._refunded += refund_fingerprint(message.refund_of.rpartition("/")[2], entry.amount)
        # The answer to a transfer is stored with the source.
        if message.request_id and entry.kind != Transaction.TRANSFER_IN:
            self.posted.append(Posted(message.request_id, entry.sequence, entry.kind, entry.body))

    def check_lots(self, expected: Iterable[Lot], stored: Mapping[int, Lot]) -> None:
        """Compares opened lots with the stored lots, by number."""
        for lot in expected:
            found = stored.get(lot.number)
            self._expect(lot.opened_by, f"lot {lot.number}", _describe(lot), _describe(found))

    def check_windows(self, expected: Iterable[UsageWindow], stored: Mapping[int, UsageWindow]) -> None:
        """Compares hour windows with the stored ones, by number."""
        for window in expected:
            self._expect(0, f"window {window.number}", str(window), str(stored.get(window.number)))

    def check_answers(self, posted: Iterable[Posted], stored: Mapping[str, Answer]) -> None:
        """Compares the transactions of requests with the stored answers, by request_id.

        A repeated request gets the stored answer, so a wrong answer is as bad as a wrong row.
        """
        for each in posted:
            answer = stored.get(each.request_id, Answer(None, b""))
            subject = f"answer to request {each.request_id}"
            if each.kind == Transaction.TRANSFER_OUT:
                is_stored = each.body in answer.response
                self._expect(each.sequence, subject, "both sides", "both sides" if is_stored else "something else")
            else:
                self._answers += 1
                self._expect(each.sequence, subject, each.sequence, answer.sequence)

    def check_refund(self, sequence: int, time: Instant, *, is_dated: bool) -> None:
        """Checks that the stored time of the last refund of a charge is the time of one of its refunds."""
        self._expect(
            sequence,
            "time of the last refund",
            "the time of one of its refunds",
            "the time of one of its refunds" if is_dated else time,
        )

    def finish(
        self,
        state: AccountState,
        last_hash: bytes,
        open_lots: Mapping[int, Millionths],
        refunded: int,
        lots: int,
        windows: int,
        answers: int,
    ) -> None:
        """Compares the computed state and totals with the stored ones.

        `open_lots` has the remaining amount of each stored open lot, by number. `refunded` is the
        sum of the refund_fingerprint of every stored total. `lots`, `windows` and `answers` are numbers
        of stored rows, the last of requests that are answered with a transaction. The lots in the
        state are not compared.
        """
        if self._window is not None:
            self.closed_windows.append(self._window)
        expiring = sum(lot.remaining for lot in self._lots.values() if lot.terms.expire_time is not None)
        for subject, expected, found in (
            ("sequence", self._sequence, state.sequence),
            ("last hash", self._hash.hex(), last_hash.hex()),
            ("balance", money.write(self._balance), money.write(state.balance)),
            ("debt", money.write(self._debt), money.write(state.debt)),
            ("last create_time", self._last_create_time, state.last_create_time),
            ("refund totals", self._refunded, refunded),
            ("answers to requests", self._answers, answers),
            ("lots", self._lot_count, lots),
            ("lot count", self._lot_count, state.lot_count),
            ("open lot count", len(self._lots), state.open_lot_count),
            ("expiring credits", money.write(expiring), money.write(state.expiring)),
            ("windows", self._window.number if self._window else 0, windows),
            ("newest window", self._window.number if self._window else 0, state.window.number if state.window else 0),
        ):
            self._expect(0, subject, expected, found)
        computed = {number: lot.remaining for number, lot in self._lots.items()}
        for number in sorted(open_lots.keys() | computed.keys()):
            self._expect(
                0,
                f"remaining of lot {number}",
                money.write(computed.get(number, 0)),
                money.write(open_lots.get(number, 0)),
            )
        self._expect(
            0,
            "sum of open lots less debt",
            money.write(self._balance),
            money.write(sum(open_lots.values()) - state.debt),
        )

    def _expect(self, sequence: int, subject: str, expected: object, found: object) -> None:
        if expected != found:
            self.findings.append(Finding(self._account_id, sequence, subject, str(expected), str(found)))

    def _check_columns(self, entry: Entry, message: Transaction, allocations: tuple[Allocation, ...]) -> None:
        expiring, permanent = expiring_and_permanent(allocations)
        self._check_name(entry, message)
        for subject, expected, found in (
            ("sequence in body", entry.sequence, message.sequence),
            ("tenant", self._tenant_number, entry.tenant_number),
            ("uid", message.uid, uid_text(entry.uid)),
            ("create_time", from_timestamp(message.create_time), entry.create_time),
            ("month", _month(entry.create_time), entry.month),
            ("kind", message.kind, entry.kind),
            ("category", message.category, entry.category),
            ("state", message.state, entry.state),
            ("amount", message.amount, money.write(entry.amount)),
            ("balance_after in body", message.balance_after, money.write(entry.balance_after)),
            ("expiring_amount", money.write(expiring), message.expiring_amount),
            ("permanent_amount", money.write(permanent), message.permanent_amount),
            *((f"label {name}", message.labels.get(name), entry.labels.get(name)) for name in self._label_names),
        ):
            self._expect(entry.sequence, subject, expected, found)

    def _check_name(self, entry: Entry, message: Transaction) -> None:
        named_id, _, uid = message.name.removeprefix("accounts/").partition("/transactions/")
        self._expect(entry.sequence, "uid in name", message.uid, uid)
        # Reported once: if the account was renamed, every transaction has the old name.
        if named_id != self._named_id:
            self._expect(entry.sequence, "account in name", self._named_id, named_id)
            self._named_id = named_id

    def _check_amounts(self, entry: Entry, allocations: tuple[Allocation, ...]) -> None:
        moved = entry.amount if entry.state == Transaction.SUCCEEDED else 0
        allocated = sum(each.amount for each in allocations)
        self._expect(entry.sequence, "sum of allocations", money.write(moved), money.write(allocated))
        balance = money.write(self._balance + moved)
        self._expect(entry.sequence, "balance_after", balance, money.write(entry.balance_after))
        self._balance = entry.balance_after

    def _check_time(self, entry: Entry) -> None:
        if entry.create_time < self._last_create_time:
            self._expect(entry.sequence, "create_time", f"at least {self._last_create_time}", entry.create_time)
        self._last_create_time = entry.create_time

    def _move(self, entry: Entry, allocation: Allocation) -> None:
        number, amount = allocation.lot_number, allocation.amount
        if number == CREDIT_LINE:
            self._debt -= amount
            if self._debt < 0:
                self._expect(entry.sequence, "debt", "0 or more", money.write(self._debt))
            return
        if number > self._lot_count:
            self._expect(entry.sequence, "lot number", self._lot_count + 1, number)
            self._lot_count = number
            lot = Lot(number, entry.sequence, allocation.terms, amount, amount)
            self.opened_lots.append(lot)
        else:
            lot = self._lots.get(number, Lot(number, 0, allocation.terms, money.LARGEST, 0))
            self._expect(entry.sequence, f"terms of lot {number}", lot.terms, allocation.terms)
            posted = post_time(entry.uid, entry.create_time)
            if amount < 0 and entry.kind != Transaction.EXPIRATION and lot.terms.have_expired(posted):
                self._expect(entry.sequence, f"lot {number}", "not spent after its expire_time", money.write(amount))
            lot = lot.with_remaining(lot.remaining + amount)
        if not 0 <= lot.remaining <= lot.amount:
            within = f"0 to {money.write(lot.amount)}"
            self._expect(entry.sequence, f"remaining of lot {number}", within, money.write(lot.remaining))
        self._lots[number] = lot
        if lot.remaining <= 0:
            # Only open lots stay in memory. A refund into a closed lot begins at 0 again.
            del self._lots[number]

    def _add_usage(self, entry: Entry) -> None:
        window = add_usage(self._window, self._hour_anchor, entry.category, -entry.amount, entry.create_time)
        if self._window is not None and window is not None and window.number != self._window.number:
            self.closed_windows.append(self._window)
        self._window = window


def _month(time: Instant) -> int | None:
    try:
        return month_of(time)
    except OverflowError:
        return None


def refund_fingerprint(uid: str | None, amount: Millionths) -> int:
    """A fingerprint of an amount refunded of a charge. Sums over refunds and over stored totals must be equal.

    `uid` is the uid of the charge, or None for a total without a charge. Comparing sums spares the
    audit from keeping every charge in memory; errors stay undetected only if they cancel out in a
    64-bit hash.
    """
    return amount * int.from_bytes(hashlib.sha256(str(uid).encode()).digest()[:8], "big")


def _describe(lot: Lot | None) -> str:
    if lot is None:
        return "none"
    return (
        f"opened by {lot.opened_by}, {money.write(lot.amount)} credits, "
        f"expire_time {lot.terms.expire_time}, priority {lot.terms.priority}"
    )
