"""The commands: each applies the rules to the accounts that the poster has locked."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from uuid import UUID

from daybook.v1.ledger_service_pb2 import TransferCreditsResponse
from daybook.v1.transaction_pb2 import Transaction

from server.ledger import posting
from server.ledger.bodies import join_messages
from server.ledger.errors import DaybookError, FieldInvalid, InsufficientCredits, TransactionNotFound, of_item
from server.ledger.idempotency import AnswerKey, Request
from server.ledger.instants import Instant
from server.ledger.money import Millionths
from server.ledger.names import transaction_name, uid_text
from server.ledger.posting import Draft
from server.ledger.refunds import refund
from server.ledger.transfers import transfer
from server.posting.poster import Command
from server.posting.unit import Attempt, ExpirationsFirst


class _Answered(Command[bytes]):
    """A command whose answer is stored, by the request_id, in one account."""

    account_number: int
    request: Request

    @property
    def account_numbers(self) -> Collection[int]:
        """The account that stores the answer."""
        return (self.account_number,)

    @property
    def answer_keys(self) -> Collection[AnswerKey]:
        """The command's request, if it has a request_id."""
        return [(self.account_number, self.request.request_id)] if self.request.request_id else ()

    def run(self, attempt: Attempt, now: Instant) -> bytes:
        """Returns the stored answer to a repeated request; otherwise applies the rules."""
        answer = attempt.answer(self.account_number, self.request)
        return self.post(attempt, now) if answer is None else answer

    @abstractmethod
    def post(self, attempt: Attempt, now: Instant) -> bytes:
        """Applies the rules, stages the answer, and returns it."""


@dataclass(frozen=True, slots=True)
class Create(_Answered):
    """Posts one transaction; returns it serialized. Batches and imports consist of these."""

    account_number: int
    draft: Draft
    details: Transaction
    request: Request
    record_declined: bool = False
    """Whether a charge that lacks credits is recorded, in state FAILED, instead of refused."""

    def post(self, attempt: Attempt, now: Instant, *, import_time: Instant | None = None) -> bytes:
        """Posts the transaction; `import_time` is the time of the import that it belongs to."""
        draft, number = self.draft, self.account_number
        taken = -draft.amount if draft.state == Transaction.SUCCEEDED and draft.amount < 0 else 0
        state = attempt.state(number, now, taking=taken)
        if import_time is not None and state.import_time != import_time:
            state = state._replace(import_time=import_time)
        try:
            after, posted = posting.post(state, draft, now)
        except InsufficientCredits:
            if not self.record_declined or draft.kind != Transaction.CHARGE:
                raise
            after, posted = posting.record(state, draft._replace(state=Transaction.FAILED), now)
        uid, request_id = attempt.new_uid(now), self.request.request_id
        body = attempt.stage_transaction(after, posted, self.details, uid=uid, request_id=request_id)
        attempt.stage_answer(number, self.request, body, sequence=posted.sequence)
        return body


@dataclass(frozen=True, slots=True)
class BatchCreate(_Answered):
    """Posts all of its items or none; returns a serialized BatchCreateTransactionsResponse."""

    account_number: int
    """The account of the first item."""
    items: Sequence[Create]
    request: Request

    @property
    def account_numbers(self) -> Collection[int]:
        """Every item's account."""
        return {item.account_number for item in self.items}

    @property
    def transaction_count(self) -> int:
        """One for each item."""
        return len(self.items)

    def post(self, attempt: Attempt, now: Instant) -> bytes:
        """Posts the items in their order. A refusal names the item."""
        bodies = []
        for index, item in enumerate(self.items):
            try:
                bodies.append(item.post(attempt, now))
            except DaybookError as error:
                raise of_item(error, index) from None
        answer = join_messages(bodies)
        attempt.stage_answer(self.account_number, self.request, answer)
        return answer


@dataclass(frozen=True, slots=True)
class Refund(_Answered):
    """Refunds a charge; returns the serialized REFUND."""

    account_number: int
    account_id: str
    uid: UUID
    amount: Millionths | None
    details: Transaction
    request: Request

    @property
    def charge_keys(self) -> Collection[tuple[int, UUID]]:
        """The charge."""
        return ((self.account_number, self.uid),)

    def post(self, attempt: Attempt, now: Instant) -> bytes:
        """Refunds the charge."""
        state = attempt.state(self.account_number, now)
        stored = attempt.charge(self.account_number, self.uid)
        if stored is None:
            raise TransactionNotFound(transaction_name(self.account_id, self.uid))
        after, posted = refund(state, stored.charge, self.amount, now)
        details = self._details(Transaction.FromString(stored.body))
        uid, request_id = attempt.new_uid(now), self.request.request_id
        body = attempt.stage_transaction(after, posted, details, uid=uid, request_id=request_id)
        attempt.add_refund(self.account_number, stored, posted)
        attempt.stage_answer(self.account_number, self.request, body, sequence=posted.sequence)
        return body

    def _details(self, charge: Transaction) -> Transaction:
        details = Transaction(refund_of=charge.name, labels=charge.labels)
        details.MergeFrom(self.details)
        if charge.HasField("owner"):
            details.owner.CopyFrom(charge.owner)
        subject = charge.WhichOneof("subject")
        if subject is not None and subject != "usage":
            getattr(details, subject).CopyFrom(getattr(charge, subject))
        return details


@dataclass(frozen=True, slots=True)
class Transfer(_Answered):
    """Moves credits from an account to another; returns a serialized TransferCreditsResponse."""

    account_number: int
    account_id: str
    destination_number: int
    destination_id: str
    amount: Millionths
    details: Transaction
    request: Request

    @property
    def account_numbers(self) -> Collection[int]:
        """The source and the destination."""
        return (self.account_number, self.destination_number)

    @property
    def transaction_count(self) -> int:
        """One for each side."""
        return 2

    def post(self, attempt: Attempt, now: Instant) -> bytes:
        """Transfers the amount."""
        source = attempt.state(self.account_number, now, taking=self.amount)
        destination = attempt.state(self.destination_number, now)
        (source, outgoing), (destination, incoming) = transfer(source, destination, self.amount, now)
        outgoing_uid, incoming_uid, request_id = attempt.new_uid(now), attempt.new_uid(now), self.request.request_id
        details = Transaction(transfer_peer=transaction_name(self.destination_id, uid_text(incoming_uid)))
        details.MergeFrom(self.details)
        outgoing_body = attempt.stage_transaction(source, outgoing, details, uid=outgoing_uid, request_id=request_id)
        details.transfer_peer = transaction_name(self.account_id, uid_text(outgoing_uid))
        incoming_body = attempt.stage_transaction(
            destination, incoming, details, uid=incoming_uid, request_id=request_id
        )
        answer = TransferCreditsResponse(
            outgoing=Transaction.FromString(outgoing_body), incoming=Transaction.FromString(incoming_body)
        ).SerializeToString(deterministic=True)
        attempt.stage_answer(self.account_number, self.request, answer)
        return answer


@dataclass(frozen=True, slots=True)
class Expire(Command[int]):
    """Posts due expirations of an account; returns their number."""

    account_number: int

    @property
    def account_numbers(self) -> Collection[int]:
        """The account."""
        return (self.account_number,)

    def run(self, attempt: Attempt, now: Instant) -> int:
        """Posts the due expirations, up to the limit of one database transaction."""
        sequence = attempt.sequence(self.account_number)
        return attempt.expire(self.account_number, now).sequence - sequence


@dataclass(frozen=True, slots=True)
class ImportOutcome:
    """The result of a part of an import."""

    imported: int
    skipped: int
    error: DaybookError | None = None
    """The refusal of the next item; None if there is no next item, or if it was not tried yet."""


@dataclass(frozen=True, slots=True)
class Import(Command[ImportOutcome]):
    """Posts history, each item at its own time, up to the first refused item."""

    items: Sequence[tuple[Create, Instant]]

    @property
    def account_numbers(self) -> Collection[int]:
        """Every item's account."""
        return {item.account_number for item, _ in self.items}

    @property
    def answer_keys(self) -> Collection[AnswerKey]:
        """Every item's request that has an id."""
        return [key for item, _ in self.items for key in item.answer_keys]

    @property
    def transaction_count(self) -> int:
        """One for each item."""
        return len(self.items)

    def run(self, attempt: Attempt, now: Instant) -> ImportOutcome:
        """Posts the items in their order; those before a refusal stay."""
        imported = skipped = 0
        for item, time in self.items:
            try:
                number = item.account_number
                if attempt.answer(number, item.request) is not None:
                    skipped += 1
                    continue
                if time > now:
                    raise FieldInvalid("create_time", "must not be in the future")
                if time < attempt.last_create_time(number):
                    raise FieldInvalid("create_time", "must not be before the account's newest transaction")
                item.post(attempt, time, import_time=now)
            except ExpirationsFirst:
                # Some expirations are posted with the items so far; the next database transaction continues.
                break
            except DaybookError as error:
                return ImportOutcome(imported, skipped, error)
            imported += 1
        return ImportOutcome(imported, skipped)
