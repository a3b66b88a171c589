"""The audit: honest books have no findings, and every single corruption is found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random
from typing import Any
from uuid import UUID

import pytest
from daybook.v1.transaction_pb2 import Transaction, Usage

from server.ledger.audit import AccountAudit, Answer, Entry, Finding, refund_fingerprint
from server.ledger.bodies import chain, read_allocations, write_allocations
from server.ledger.idempotency import Request
from server.ledger.instants import HOUR, Instant, parse, to_timestamp
from server.ledger.lots import CREDIT_LINE, PERMANENT, Allocation, Lot, Terms
from server.ledger.money import Millionths
from server.ledger.posting import AccountState, Draft
from server.ledger.refunds import Charge, StoredCharge
from server.ledger.usage import UsageWindow
from server.posting.commands import Create, Refund, Transfer
from server.posting.poster import Command
from server.posting.unit import Attempt, Unit
from server.store.states import StoredState
from server.store.tables import LABELS
from server.store.units import Loaded, PostedRow

START = parse("2024-10-31T23:30:00Z")
"""Half an hour before the end of a month, so that the books cover two months."""
ACME, OTHER = 7, 8
NO_REQUEST = Request("", b"")

GRANT, CHARGE, ADJUSTMENT = Transaction.GRANT, Transaction.CHARGE, Transaction.ADJUSTMENT
REFUND, EXPIRATION = Transaction.REFUND, Transaction.EXPIRATION
TRANSFER_IN, TRANSFER_OUT = Transaction.TRANSFER_IN, Transaction.TRANSFER_OUT


@dataclass(frozen=True)
class Books:
    """The stored books of one account."""

    entries: tuple[Entry, ...]
    state: AccountState
    """Without lots and window, which are stored separately."""
    last_hash: bytes
    window_number: int
    refunded: int
    lots: dict[int, Lot]
    windows: dict[int, UsageWindow]
    answers: dict[str, Answer]


class Writer:
    """Writes books by the rules of the service, without a database."""

    def __init__(self) -> None:
        self.charges: dict[tuple[int, UUID], StoredCharge] = {}
        self.uids: dict[int, UUID] = {}
        self.unit = Unit(
            Loaded(
                states={
                    number: StoredState(AccountState(number, f"account-{number}", 3, 20, START), b"")
                    for number in (ACME, OTHER)
                },
                charges=self.charges,
            ),
            Random(5).randbytes,
        )

    def run(self, command: Command[Any], minutes: int) -> PostedRow:
        """Runs a command `minutes` after START; returns the last row that it wrote."""
        attempt = Attempt(self.unit)
        command.run(attempt, START + minutes * HOUR // 60)
        attempt.accept()
        return next(reversed(self.unit.changes.posted.values()))

    def post(
        self,
        draft: Draft,
        minutes: int,
        details: Transaction | None = None,
        account_number: int = ACME,
        request: Request = NO_REQUEST,
    ) -> PostedRow:
        """Posts a draft."""
        return self.run(Create(account_number, draft, details or Transaction(), request), minutes)

    def refund(self, row: PostedRow, amount: Millionths | None, minutes: int) -> None:
        """Refunds the charge of a row."""
        uid = UUID(bytes=row.uid)
        charge = Charge(
            Transaction.FromString(row.body).name,
            row.kind,
            row.state,
            row.amount,
            row.create_time,
            read_allocations(row.allocations),
            {},
        )
        self.uids[row.sequence] = uid
        self.charges[ACME, uid] = StoredCharge(row.sequence, charge, row.body)
        self.run(Refund(ACME, "account-7", uid, amount, Transaction(), NO_REQUEST), minutes)

    def transfer(self, source: int, destination: int, amount: Millionths, minutes: int) -> None:
        """Transfers an amount."""
        source_id, destination_id = f"account-{source}", f"account-{destination}"
        request = Request(f"from {source}", b"")
        self.run(Transfer(source, source_id, destination, destination_id, amount, Transaction(), request), minutes)

    def books(self) -> Books:
        """The books of the account ACME."""
        changes = self.unit.changes
        stored = changes.states[ACME]
        return Books(
            entries=tuple(to_entry(row) for row in changes.posted.values() if row.account_number == ACME),
            state=stored.state._replace(lots=(), window=None),
            last_hash=stored.last_hash,
            window_number=stored.state.window.number if stored.state.window else 0,
            refunded=sum(
                refund_fingerprint(str(self.uids[sequence]), total.amount)
                for (number, sequence), total in changes.refunds.items()
                if number == ACME
            ),
            lots={number: lot for (account, number), lot in changes.lots.items() if account == ACME},
            windows={number: window for (account, number), window in changes.windows.items() if account == ACME},
            answers={
                request_id: Answer(each.sequence, each.response)
                for (account, request_id), each in changes.answers.items()
                if account == ACME
            },
        )


def to_entry(row: PostedRow) -> Entry:
    """A row of the table transactions, as an entry for the audit."""
    columns = row._asdict()
    del columns["account_number"]
    labels = {name: value for name in LABELS if (value := columns.pop(name)) is not None}
    return Entry(**columns, labels=labels)


@lru_cache
def honest_books() -> Books:
    """Books with every kind of transaction, written by the rules of the service."""
    writer = Writer()
    usage = Transaction(usage=Usage(model="gpu"))
    labelled = Transaction(labels={"location": "berlin", "company": "acme", "desk": "4"})
    writer.post(Draft(GRANT, "promotion", 100, expire_time=START + HOUR), 0, labelled)
    writer.post(Draft(CHARGE, "ai_chat", -30), 1, request=Request("second", b""))
    writer.post(Draft(GRANT, "purchase", 50), 2, Transaction(labels={"membership": "gold"}))
    charge = writer.post(Draft(CHARGE, "computing", -100, is_usage=True), 3, usage)
    writer.refund(charge, 40, 4)
    writer.post(Draft(CHARGE, "ai_chat", -500, state=Transaction.FAILED), 5)
    # Also posts the expiration of lot 1, before this charge.
    writer.post(Draft(CHARGE, "serverless", -60, is_usage=True), 61, usage)
    writer.post(Draft(GRANT, "purchase", 90, priority=2), 62, account_number=OTHER)
    writer.transfer(OTHER, ACME, 25, 63)
    writer.refund(charge, None, 64)
    writer.transfer(ACME, OTHER, 20, 65)
    writer.post(Draft(ADJUSTMENT, "correction", -5), 66)
    writer.post(Draft(CHARGE, "computing", -10, is_usage=True), 120, usage)
    return writer.books()


ENTRIES = 13


def audit(books: Books) -> list[Finding]:
    """All findings of an audit of the books."""
    account = AccountAudit("account-7", 3, START, LABELS)
    for entry in books.entries:
        account.read(entry)
    state = books.state._replace(window=books.windows.get(books.window_number))
    open_lots = {number: lot.remaining for number, lot in books.lots.items() if lot.remaining}
    account.check_answers(account.posted, books.answers)
    answers = sum(each.sequence is not None for each in books.answers.values())
    account.finish(state, books.last_hash, open_lots, books.refunded, len(books.lots), len(books.windows), answers)
    account.check_lots(account.opened_lots, books.lots)
    account.check_windows(account.closed_windows, books.windows)
    return account.findings


def refunded_of(books: Books, sequence: int, amount: Millionths) -> int:
    """The fingerprint of books whose only refunds are of one charge."""
    return refund_fingerprint(str(UUID(bytes=books.entries[sequence - 1].uid)), amount)


def places(findings: Sequence[Finding]) -> set[tuple[int, str]]:
    """The sequence and the subject of each finding."""
    return {(finding.sequence, finding.subject) for finding in findings}


def with_entry(books: Books, sequence: int, entry: Entry) -> Books:
    """Books with the entry of a sequence replaced."""
    return replace(books, entries=(*books.entries[: sequence - 1], entry, *books.entries[sequence:]))


def rewritten(entry: Entry, change: Callable[[Transaction], object]) -> bytes:
    """The body of an entry after a change of its message."""
    message = Transaction.FromString(entry.body)
    change(message)
    return message.SerializeToString(deterministic=True)


def rechained(books: Books) -> Books:
    """Books with all hashes recomputed, as a forger would."""
    entries, last_hash = [], b""
    for entry in books.entries:
        last_hash = chain(last_hash, entry.body, entry.allocations)
        entries.append(replace(entry, hash=last_hash))
    return replace(books, entries=tuple(entries), last_hash=last_hash)


def test_honest_books_have_no_finding() -> None:
    """Books written by the rules of the service have no findings."""
    assert audit(honest_books()) == []


def test_honest_books_hold_what_was_posted() -> None:
    """The books under audit hold every kind, both months, each balance, an expired, a spent and two open lots."""
    books = honest_books()
    assert [(entry.kind, entry.balance_after) for entry in books.entries] == [
        (GRANT, 100),
        (CHARGE, 70),
        (GRANT, 120),
        (CHARGE, 20),
        (REFUND, 60),
        (CHARGE, 60),
        (EXPIRATION, 50),
        (CHARGE, -10),
        (TRANSFER_IN, 15),
        (REFUND, 75),
        (TRANSFER_OUT, 55),
        (ADJUSTMENT, 50),
        (CHARGE, 40),
    ]
    assert {entry.month for entry in books.entries} == {202410, 202411}
    # The refund at minute 64 reopens expired credits with their remaining lifetime at the charge: 57 minutes.
    reopened = Terms(START + 64 * HOUR // 60 + 57 * HOUR // 60)
    assert books.lots == {
        1: Lot(1, 1, Terms(START + HOUR), 100, 0),
        2: Lot(2, 3, PERMANENT, 50, 0),
        3: Lot(3, 9, Terms(None, 2), 15, 15),
        4: Lot(4, 10, reopened, 60, 25),
    }
    assert books.windows == {
        1: UsageWindow(1, START, 100, 0),
        2: UsageWindow(2, START + HOUR, 0, 60),
        3: UsageWindow(3, START + 2 * HOUR, 10, 0),
    }
    # Both refunds are of transaction 4: 100 together.
    assert books.refunded == refunded_of(books, 4, 100)
    assert len(books.entries) == ENTRIES


@pytest.mark.parametrize("sequence", range(1, ENTRIES + 1))
@pytest.mark.parametrize(
    ("corrupt", "subject"),
    [
        pytest.param(lambda entry: replace(entry, uid=bytes([entry.uid[0] ^ 1]) + entry.uid[1:]), "uid", id="uid"),
        pytest.param(lambda entry: replace(entry, uid=entry.uid[:-1]), "uid", id="short uid"),
        pytest.param(lambda entry: replace(entry, uid=b""), "uid", id="no uid"),
        pytest.param(lambda entry: replace(entry, tenant_number=4), "tenant", id="tenant"),
        pytest.param(lambda entry: replace(entry, create_time=entry.create_time + 1), "create_time", id="later"),
        pytest.param(lambda entry: replace(entry, create_time=entry.create_time - 1), "create_time", id="earlier"),
        pytest.param(lambda entry: replace(entry, create_time=0), "create_time", id="in 1970"),
        pytest.param(lambda entry: replace(entry, month=entry.month + 1), "month", id="month"),
        pytest.param(lambda entry: replace(entry, kind=entry.kind % 7 + 1), "kind", id="kind"),
        pytest.param(lambda entry: replace(entry, kind=99), "kind", id="no kind"),
        pytest.param(lambda entry: replace(entry, category=entry.category + "s"), "category", id="category"),
        pytest.param(lambda entry: replace(entry, state=entry.state % 3 + 1), "state", id="state"),
        pytest.param(lambda entry: replace(entry, amount=entry.amount + 1), "amount", id="amount"),
        pytest.param(lambda entry: replace(entry, amount=-entry.amount), "amount", id="sign"),
        pytest.param(
            lambda entry: replace(entry, balance_after=entry.balance_after + 1), "balance_after", id="balance_after"
        ),
        pytest.param(
            lambda entry: replace(entry, labels={**entry.labels, "location": "paris"}), "label location", id="location"
        ),
        pytest.param(
            lambda entry: replace(entry, labels={**entry.labels, "membership": ""}), "label membership", id="membership"
        ),
        pytest.param(
            lambda entry: replace(entry, labels={**entry.labels, "company": "acme "}), "label company", id="company"
        ),
        pytest.param(
            lambda entry: replace(
                entry, body=rewritten(entry, lambda message: setattr(message, "description", "forged"))
            ),
            "hash",
            id="body",
        ),
        pytest.param(lambda entry: replace(entry, body=entry.body[:-1] + b"\x01"), "hash", id="last byte of the body"),
        pytest.param(lambda entry: replace(entry, body=b"\xff"), "body", id="unreadable body"),
        pytest.param(lambda entry: replace(entry, body=b""), "hash", id="no body"),
        pytest.param(
            lambda entry: replace(entry, allocations=write_allocations([Allocation(1, -1, PERMANENT)])),
            "hash",
            id="allocations",
        ),
        pytest.param(lambda entry: replace(entry, allocations=b"\xff"), "body", id="unreadable allocations"),
        pytest.param(
            lambda entry: replace(entry, body=entry.body + entry.allocations, allocations=b""),
            "hash",
            id="allocations moved to the body",
        ),
        pytest.param(lambda entry: replace(entry, hash=bytes([entry.hash[0] ^ 1]) + entry.hash[1:]), "hash", id="hash"),
        pytest.param(lambda entry: replace(entry, hash=b""), "hash", id="no hash"),
    ],
)
def test_a_corrupt_entry_is_found(corrupt: Callable[[Entry], Entry], sequence: int, subject: str) -> None:
    """A change of any one field of any one entry is found at that entry, under the field's name."""
    books = honest_books()
    entry = books.entries[sequence - 1]
    corrupted = corrupt(entry)
    if corrupted == entry:
        # A failed transaction has no allocations to move.
        assert not entry.allocations
        return
    assert (sequence, subject) in places(audit(with_entry(books, sequence, corrupted)))


@pytest.mark.parametrize("sequence", range(1, ENTRIES + 1))
@pytest.mark.parametrize("wrong", [-1, 0, 100])
def test_a_wrong_sequence_is_found(wrong: int, sequence: int) -> None:
    """An entry with a wrong sequence is found under that sequence."""
    books = honest_books()
    entry = replace(books.entries[sequence - 1], sequence=wrong)
    assert {(wrong, "sequence"), (wrong, "sequence in body")} <= places(audit(with_entry(books, sequence, entry)))


@pytest.mark.parametrize("create_time", [2**62, -(2**62)])
def test_a_time_outside_the_calendar_is_found(create_time: Instant) -> None:
    """A 64-bit time outside the calendar is found and doesn't stop the audit."""
    books = honest_books()
    entry = replace(books.entries[4], create_time=create_time)
    assert (5, "create_time") in places(audit(with_entry(books, 5, entry)))


@pytest.mark.parametrize("label", ["location", "company"])
def test_a_lost_label_is_found(label: str) -> None:
    """A label of the transaction that is missing in its column is found."""
    books = honest_books()
    labels = {name: value for name, value in books.entries[0].labels.items() if name != label}
    findings = audit(with_entry(books, 1, replace(books.entries[0], labels=labels)))
    assert places(findings) == {(1, f"label {label}")}


@pytest.mark.parametrize("sequence", range(1, ENTRIES + 1))
def test_a_dropped_row_is_found(sequence: int) -> None:
    """A missing row is found at its successor; the last row, at the end of the account."""
    books = honest_books()
    findings = audit(replace(books, entries=books.entries[: sequence - 1] + books.entries[sequence:]))
    expected = {(sequence + 1, "sequence"), (sequence + 1, "hash")}
    if sequence == ENTRIES:
        expected = {(0, "sequence"), (0, "last hash"), (0, "balance")}
    assert expected <= places(findings)


@pytest.mark.parametrize("sequence", range(1, ENTRIES))
def test_swapped_rows_are_found(sequence: int) -> None:
    """Two swapped neighbours are both found."""
    books = honest_books()
    entries = list(books.entries)
    entries[sequence - 1 : sequence + 1] = [entries[sequence], entries[sequence - 1]]
    findings = audit(replace(books, entries=tuple(entries)))
    assert {(sequence, "sequence"), (sequence + 1, "sequence"), (sequence + 1, "hash")} <= places(findings)


@pytest.mark.parametrize("sequence", range(1, ENTRIES))
def test_swapped_contents_are_found(sequence: int) -> None:
    """Two neighbours with swapped sequences and otherwise unchanged are both found."""
    books = honest_books()
    entries = list(books.entries)
    one, other = entries[sequence - 1 : sequence + 1]
    entries[sequence - 1 : sequence + 1] = [
        replace(other, sequence=one.sequence),
        replace(one, sequence=other.sequence),
    ]
    findings = audit(replace(books, entries=tuple(entries)))
    assert {(sequence, "hash"), (sequence + 1, "hash")} <= places(findings)


@pytest.mark.parametrize("sequence", range(1, ENTRIES + 1))
def test_a_duplicated_row_is_found(sequence: int) -> None:
    """A duplicated row is found at its second copy."""
    books = honest_books()
    findings = audit(replace(books, entries=books.entries[:sequence] + books.entries[sequence - 1 :]))
    assert {(sequence, "sequence"), (sequence, "hash")} <= places(findings)


def test_missing_transactions_are_found() -> None:
    """Books without any transaction contradict their state."""
    assert {(0, "sequence"), (0, "last hash"), (0, "balance"), (0, "lot count")} <= places(
        audit(replace(honest_books(), entries=()))
    )


def with_lot(books: Books, number: int, **changes: Any) -> Books:
    """Books with a changed stored lot."""
    return replace(books, lots={**books.lots, number: books.lots[number]._replace(**changes)})


def with_window(books: Books, number: int, **changes: Any) -> Books:
    """Books with a changed stored window."""
    return replace(books, windows={**books.windows, number: books.windows[number]._replace(**changes)})


def with_state(books: Books, **changes: Any) -> Books:
    """Books with a changed stored state."""
    return replace(books, state=books.state._replace(**changes))


def without(table: dict[int, Any], number: int) -> dict[int, Any]:
    """A table without one row."""
    return {key: value for key, value in table.items() if key != number}


@pytest.mark.parametrize(
    ("corrupt", "found"),
    [
        pytest.param(lambda books: replace(books, last_hash=b"\0" * 32), {(0, "last hash")}, id="last hash"),
        pytest.param(lambda books: replace(books, last_hash=b""), {(0, "last hash")}, id="no last hash"),
        pytest.param(
            lambda books: with_state(books, balance=41),
            {(0, "balance")},
            id="balance",
        ),
        pytest.param(
            lambda books: with_state(books, debt=1), {(0, "debt"), (0, "sum of open lots less debt")}, id="debt"
        ),
        pytest.param(lambda books: with_state(books, lot_count=5), {(0, "lot count")}, id="lot count"),
        pytest.param(lambda books: with_state(books, sequence=12), {(0, "sequence")}, id="sequence"),
        pytest.param(
            lambda books: with_state(books, last_create_time=START), {(0, "last create_time")}, id="last create_time"
        ),
        pytest.param(lambda books: replace(books, window_number=2), {(0, "newest window")}, id="an older window"),
        pytest.param(lambda books: replace(books, window_number=0), {(0, "newest window")}, id="no window"),
        pytest.param(
            lambda books: replace(books, refunded=refunded_of(books, 4, 99)), {(0, "refund totals")}, id="refunded less"
        ),
        pytest.param(lambda books: replace(books, refunded=0), {(0, "refund totals")}, id="refunded nothing"),
        pytest.param(
            lambda books: replace(books, refunded=refunded_of(books, 2, 100)),
            {(0, "refund totals")},
            id="refunded another charge",
        ),
        pytest.param(
            lambda books: with_lot(books, 3, remaining=14),
            {(0, "remaining of lot 3"), (0, "sum of open lots less debt")},
            id="less in an open lot",
        ),
        pytest.param(
            lambda books: with_state(books, open_lot_count=books.state.open_lot_count + 1),
            {(0, "open lot count")},
            id="open lot count",
        ),
        pytest.param(
            lambda books: with_state(books, expiring=books.state.expiring - 1),
            {(0, "expiring credits")},
            id="expiring credits",
        ),
        pytest.param(
            lambda books: with_lot(books, 3, remaining=0),
            {(0, "remaining of lot 3"), (0, "sum of open lots less debt")},
            id="nothing in an open lot",
        ),
        pytest.param(
            lambda books: with_lot(books, 1, remaining=1),
            {(0, "remaining of lot 1"), (0, "sum of open lots less debt")},
            id="something in an expired lot",
        ),
        pytest.param(
            lambda books: with_lot(books, 2, remaining=50),
            {(0, "remaining of lot 2"), (0, "sum of open lots less debt")},
            id="a spent lot is full",
        ),
        pytest.param(
            lambda books: with_lot(with_lot(books, 3, remaining=14), 4, remaining=26),
            {(0, "remaining of lot 3"), (0, "remaining of lot 4")},
            id="from lot to lot",
        ),
        pytest.param(
            lambda books: with_state(with_lot(books, 4, remaining=26), balance=41),
            {(0, "remaining of lot 4"), (0, "balance"), (0, "sum of open lots less debt")},
            id="a lot and the balance",
        ),
        pytest.param(
            lambda books: with_state(with_lot(books, 4, remaining=26), debt=1),
            {(0, "remaining of lot 4"), (0, "debt")},
            id="a lot and the debt",
        ),
        pytest.param(lambda books: with_lot(books, 1, amount=101), {(1, "lot 1")}, id="amount of an expired lot"),
        pytest.param(lambda books: with_lot(books, 4, amount=59), {(10, "lot 4")}, id="amount of an open lot"),
        pytest.param(lambda books: with_lot(books, 2, opened_by=2), {(3, "lot 2")}, id="opener of a lot"),
        pytest.param(lambda books: with_lot(books, 3, terms=PERMANENT), {(9, "lot 3")}, id="priority of a lot"),
        pytest.param(lambda books: with_lot(books, 1, terms=PERMANENT), {(1, "lot 1")}, id="a lot made permanent"),
        pytest.param(
            lambda books: with_lot(books, 2, terms=Terms(START)), {(3, "lot 2")}, id="a permanent lot that expires"
        ),
        pytest.param(
            lambda books: with_lot(books, 4, terms=Terms(START + 9 * HOUR)), {(10, "lot 4")}, id="a lot lives longer"
        ),
        pytest.param(
            lambda books: replace(books, lots=without(books.lots, 2)), {(0, "lots"), (3, "lot 2")}, id="no lot 2"
        ),
        pytest.param(
            lambda books: replace(books, lots=without(books.lots, 4)),
            {(0, "lots"), (10, "lot 4"), (0, "remaining of lot 4"), (0, "sum of open lots less debt")},
            id="no lot 4",
        ),
        pytest.param(
            lambda books: replace(books, lots={**books.lots, 5: Lot(5, 13, PERMANENT, 1, 0)}),
            {(0, "lots")},
            id="a spent lot from nowhere",
        ),
        pytest.param(
            lambda books: replace(books, lots={**books.lots, 5: Lot(5, 13, PERMANENT, 1, 1)}),
            {(0, "lots"), (0, "remaining of lot 5"), (0, "sum of open lots less debt")},
            id="an open lot from nowhere",
        ),
        pytest.param(lambda books: with_window(books, 1, computing=99), {(0, "window 1")}, id="a closed window"),
        pytest.param(lambda books: with_window(books, 2, serverless=61), {(0, "window 2")}, id="its serverless"),
        pytest.param(lambda books: with_window(books, 3, computing=11), {(0, "window 3")}, id="the newest window"),
        pytest.param(lambda books: with_window(books, 2, start=START), {(0, "window 2")}, id="start of a window"),
        pytest.param(
            lambda books: replace(books, windows=without(books.windows, 1)),
            {(0, "windows"), (0, "window 1")},
            id="no window 1",
        ),
        pytest.param(
            lambda books: replace(books, windows={**books.windows, 4: UsageWindow(4, START + 3 * HOUR, 0, 0)}),
            {(0, "windows")},
            id="a window from nowhere",
        ),
    ],
)
def test_corrupt_stored_totals_are_found(corrupt: Callable[[Books], Books], found: set[tuple[int, str]]) -> None:
    """A corrupt state, lot, window or refund total is found under its name, without other findings."""
    assert places(audit(corrupt(honest_books()))) == found


@pytest.mark.parametrize(
    ("corrupt", "sequences"),
    [
        pytest.param(lambda entry: replace(entry, uid=bytes(16)), {5}, id="uid"),
        pytest.param(lambda entry: replace(entry, balance_after=entry.balance_after + 1), {5, 6}, id="balance_after"),
        pytest.param(lambda entry: replace(entry, hash=b""), {5, 6}, id="hash"),
        pytest.param(lambda entry: replace(entry, category="other"), {5}, id="category"),
    ],
)
def test_one_fault_is_not_reported_at_every_row(corrupt: Callable[[Entry], Entry], sequences: set[int]) -> None:
    """After a divergence the audit continues from the stored value, so later rows don't repeat the finding."""
    books = honest_books()
    findings = audit(with_entry(books, 5, corrupt(books.entries[4])))
    assert {finding.sequence for finding in findings} == sequences


def test_a_finding_names_the_divergence() -> None:
    """A finding has the account, the sequence, the subject, the computed value and the stored value."""
    books = with_entry(honest_books(), 3, replace(honest_books().entries[2], category="gift"))
    assert audit(books) == [Finding("account-7", 3, "category", "purchase", "gift")]


def set_amounts(message: Transaction, **amounts: str) -> None:
    """Sets fields of a transaction."""
    for name, amount in amounts.items():
        setattr(message, name, amount)


def forge(sequence: int, change: Callable[[Transaction], object], **columns: Any) -> Books:
    """Honest books with changed message and columns of one entry, and all hashes recomputed."""
    books = honest_books()
    entry = books.entries[sequence - 1]
    return rechained(with_entry(books, sequence, replace(entry, body=rewritten(entry, change), **columns)))


def reallocate(sequence: int, *allocations: Allocation) -> Books:
    """Honest books with other allocations in one entry, its sums adapted and all hashes recomputed."""
    expiring = sum(each.amount for each in allocations if each.terms.expire_time is not None)
    permanent = sum(each.amount for each in allocations) - expiring
    return forge(
        sequence,
        lambda message: set_amounts(
            message,
            expiring_amount=write(expiring),
            permanent_amount=write(permanent),
        ),
        allocations=write_allocations(allocations),
    )


def write(amount: Millionths) -> str:
    """A few millionths in the format of the contract."""
    digits = f"{abs(amount) / 1_000_000:.6f}".rstrip("0").rstrip(".")
    return f"-{digits}" if amount < 0 else digits


FIRST_TERMS = Terms(START + HOUR)


@pytest.mark.parametrize(
    ("books", "found"),
    [
        pytest.param(lambda: rechained(honest_books()), set(), id="nothing"),
        pytest.param(
            lambda: forge(2, lambda message: set_amounts(message, amount="-0.000031"), amount=-31),
            {(2, "sum of allocations"), (2, "balance_after")},
            id="an amount",
        ),
        pytest.param(
            lambda: forge(2, lambda message: set_amounts(message, balance_after="0.000071"), balance_after=71),
            {(2, "balance_after"), (3, "balance_after")},
            id="a balance",
        ),
        pytest.param(
            lambda: forge(2, lambda message: set_amounts(message, expiring_amount="0")),
            {(2, "expiring_amount")},
            id="the expiring part",
        ),
        pytest.param(
            lambda: forge(3, lambda message: set_amounts(message, permanent_amount="0")),
            {(3, "permanent_amount")},
            id="the permanent part",
        ),
        pytest.param(
            lambda: forge(2, lambda message: set_amounts(message, amount="-0.0000300")), {(2, "amount")}, id="the text"
        ),
        pytest.param(
            lambda: forge(2, lambda message: setattr(message, "sequence", 3)),
            {(2, "sequence in body")},
            id="a sequence",
        ),
        pytest.param(
            lambda: forge(
                3, lambda message: message.create_time.CopyFrom(to_timestamp(START)), create_time=START, month=202410
            ),
            {(3, "create_time")},
            id="a time before its predecessor",
        ),
        pytest.param(
            lambda: forge(6, lambda message: setattr(message, "state", 1), state=1),
            {(6, "sum of allocations"), (6, "balance_after")},
            id="a failure that counts",
        ),
        pytest.param(
            lambda: reallocate(2, Allocation(1, -29, FIRST_TERMS)),
            {(2, "sum of allocations"), (0, "remaining of lot 1")},
            id="less out of a lot",
        ),
        pytest.param(
            lambda: reallocate(2, Allocation(1, -30, PERMANENT)),
            {(2, "terms of lot 1")},
            id="other terms",
        ),
        pytest.param(
            lambda: reallocate(2, Allocation(1, -130, FIRST_TERMS)),
            {(2, "remaining of lot 1"), (2, "sum of allocations")},
            id="more than a lot holds",
        ),
        pytest.param(
            lambda: reallocate(5, Allocation(2, 40, PERMANENT)),
            {(5, "remaining of lot 2")},
            id="more than a lot can hold",
        ),
        pytest.param(
            lambda: reallocate(3, Allocation(3, 50, PERMANENT)),
            {(3, "lot number")},
            id="a skipped number",
        ),
        pytest.param(
            lambda: reallocate(9, Allocation(CREDIT_LINE, 11, PERMANENT), Allocation(3, 14, Terms(None, 2))),
            {(9, "debt")},
            id="more than the debt",
        ),
        pytest.param(
            lambda: reallocate(8, Allocation(1, -10, FIRST_TERMS), Allocation(2, -50, PERMANENT)),
            {(8, "lot 1")},
            id="out of an expired lot",
        ),
    ],
)
def test_a_forgery_with_valid_hashes_is_found(books: Callable[[], Books], found: set[tuple[int, str]]) -> None:
    """A forged entry that breaks a rule of the ledger is found even if all hashes are valid."""
    findings = places(audit(books()))
    assert found <= findings if found else not findings


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        pytest.param({"second": Answer(2, b"")}, {(11, "answer to request from 7")}, id="no answer to the transfer"),
        pytest.param({"second": Answer(3, b"")}, {(2, "answer to request second")}, id="another transaction"),
        pytest.param({}, {(2, "answer to request second"), (0, "answers to requests")}, id="none"),
        pytest.param({"third": Answer(3, b"")}, {(2, "answer to request second")}, id="under another id"),
        pytest.param({"from 7": Answer(None, b"")}, {(11, "answer to request from 7")}, id="an empty answer"),
        pytest.param(
            {"second": Answer(2, b""), "third": Answer(3, b"")}, {(0, "answers to requests")}, id="one too many"
        ),
    ],
)
def test_a_wrong_answer_to_a_request_is_found(answers: dict[str, Answer], found: set[tuple[int, str]]) -> None:
    """A stored answer that differs from the transaction of its request is found."""
    assert found <= places(audit(replace(honest_books(), answers=answers)))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("accounts/another/transactions/{uid}", {(2, "account in name"), (3, "account in name")}),
        ("accounts/account-7/transactions/1", {(2, "uid in name")}),
        ("another", {(2, "uid in name"), (2, "account in name"), (3, "account in name")}),
    ],
)
def test_a_wrong_name_is_found(name: str, found: set[tuple[int, str]]) -> None:
    """A transaction whose name has another account or another uid is found."""
    uid = Transaction.FromString(honest_books().entries[1].body).uid
    books = forge(2, lambda message: setattr(message, "name", name.format(uid=uid)))
    assert {(sequence, subject) for sequence, subject in places(audit(books)) if "name" in subject} == found


def test_a_truncated_history_is_found() -> None:
    """If transactions and state were rolled back but lots and windows were not, those have findings."""
    books = honest_books()
    entries = books.entries[:-1]
    state = books.state._replace(
        sequence=12, balance=entries[-1].balance_after, last_create_time=entries[-1].create_time
    )
    truncated = replace(books, entries=entries, state=state, last_hash=entries[-1].hash)
    assert (0, "remaining of lot 4") in places(audit(truncated))
    assert (0, "windows") in places(audit(truncated))
