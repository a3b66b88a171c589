"""Generates the history of a few accounts by the commands and rules of posting.

They run on a unit of work that is never saved. Its rows are yielded in parts of some thousand,
so that memory does not grow with the number of transactions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from random import Random
from typing import NamedTuple
from uuid import UUID

from daybook.v1.account_pb2 import User
from daybook.v1.transaction_pb2 import Transaction, Usage

from server.ledger import posting
from server.ledger.idempotency import Request
from server.ledger.instants import HOUR, Instant
from server.ledger.money import ONE_CREDIT, Millionths
from server.ledger.names import in_blocks
from server.ledger.posting import AccountState, Draft, Kind, State
from server.ledger.refunds import StoredCharge
from server.posting.commands import Refund, Transfer
from server.posting.unit import Attempt, Unit
from server.store.states import StoredState
from server.store.units import Loaded, Rows, posted_rows, state_rows, to_charge

ROWS_AT_ONCE = 2000
"""Approximate number of transactions of a part."""
VARIANT_BITS = 3
PLACES = 1 << VARIANT_BITS
"""The number of places, and of variants of each activity's details."""
DAY: Instant = 24 * HOUR
YEAR: Instant = 365 * DAY


class Account(NamedTuple):
    """An account to generate."""

    number: int
    id: str
    credit_limit: Millionths
    rows: int
    """The number of its transactions."""


class Place(NamedTuple):
    """The label values of one variant."""

    location: str
    membership: str
    company: str


class Setting(NamedTuple):
    """The parameters that all accounts of a tenant share."""

    random_seed: str
    tenant_number: int
    start: Instant
    end: Instant
    places: tuple[Place, ...]
    """The places; their number is PLACES."""


class _Activity(NamedTuple):
    """A kind of transaction to generate."""

    weight: int
    """Its frequency, in 256ths."""
    kind: Kind
    category: str
    description: str
    state: State = Transaction.SUCCEEDED
    subject: str = ""
    """The subject of the transaction; "tokens" is a usage with a model, tokens and a price."""
    is_placed: bool = False
    """Whether it has labels."""

    @property
    def is_usage(self) -> bool:
        """Whether its subject is a usage."""
        return self.subject in {"usage", "tokens"}


_CHARGE, _GRANT = Transaction.CHARGE, Transaction.GRANT

ACTIVITIES = (
    # For Teable's list.
    _Activity(32, _CHARGE, "ai_chat", "Chat"),
    _Activity(12, _CHARGE, "ai_generation", "Picture"),
    _Activity(10, _CHARGE, "field_ai_generation", "Translated titles"),
    _Activity(10, _CHARGE, "automation_ai_action", "Nightly summary"),
    _Activity(8, _CHARGE, "app_generation", "Stock tracker"),
    # For Nebula Block's list.
    _Activity(28, _CHARGE, "computing", "Virtual machine", subject="usage"),
    _Activity(22, _CHARGE, "serverless", "Endpoint", subject="usage"),
    # For Dreadnode's list.
    _Activity(28, _CHARGE, "inference", "Evaluation run", subject="tokens"),
    _Activity(10, _CHARGE, "usage", "Workspace"),
    _Activity(10, _CHARGE, "span_ingestion", "Traces"),
    _Activity(8, _CHARGE, "storage", "Artifacts"),
    _Activity(8, _CHARGE, "web_search", "Search"),
    _Activity(1, _GRANT, "purchase", "Bought online"),
    # For Spacebring's list.
    _Activity(18, _CHARGE, "booking", "Meeting room", subject="booking", is_placed=True),
    _Activity(10, _CHARGE, "order", "Coffee", subject="order", is_placed=True),
    _Activity(6, _CHARGE, "event_ticket", "Workshop", subject="event_ticket", is_placed=True),
    _Activity(4, _CHARGE, "admin_charge", "Lost key card", is_placed=True),
    _Activity(1, _GRANT, "credit_package", "Package", is_placed=True),
    _Activity(1, _GRANT, "subscription_renewal", "Monthly plan", is_placed=True),
    # Failed and canceled charges.
    _Activity(4, _CHARGE, "booking", "Meeting room", Transaction.FAILED, "booking", is_placed=True),
    _Activity(3, _CHARGE, "ai_chat", "Chat", Transaction.FAILED),
    _Activity(2, _CHARGE, "storage", "Artifacts", Transaction.CANCELED),
    # Corrections and transfers.
    _Activity(4, Transaction.ADJUSTMENT, "admin_adjustment", "Put right"),
    _Activity(9, Transaction.REFUND, "refund", "Given back"),
    _Activity(7, Transaction.TRANSFER_OUT, "transfer", "Shared", is_placed=True),
)
_NO_REQUEST = Request("", b"")
_WHEEL = tuple(activity for activity in ACTIVITIES for _ in range(activity.weight))
_WELCOME = _Activity(0, _GRANT, "signup_allocation", "Welcome credits")
_REFILL = _Activity(0, _GRANT, "auto_refill", "Balance ran low")

AMOUNTS: tuple[Millionths, ...] = tuple(round(10 * 1.03**step) * 1000 for step in range(256))
"""The amounts of charges: from a hundredth of a credit to nearly twenty, spaced evenly on a logarithmic scale."""
PACKAGES: tuple[Millionths, ...] = (50 * ONE_CREDIT, 80 * ONE_CREDIT, 100 * ONE_CREDIT, 150 * ONE_CREDIT)
"""The amounts of grants. They sum to less than charges take, so that accounts have few open lots."""

_NEVER: Instant = 2**63


class _Member:
    """An account of a household, and the progress of its history."""

    def __init__(self, account: Account, setting: Setting) -> None:
        self.number, self.id, self.rows = account.number, account.id, account.rows
        self.state = AccountState(
            account.number, account.id, setting.tenant_number, account.credit_limit, setting.start
        )
        self.last_charge = 0
        """The sequence of the newest charge; 0 if it was refunded."""
        self.due: Instant = setting.start
        """The time of the next transaction."""
        self._start = setting.start
        self._span = setting.end - setting.start

    def time(self, step: float) -> Instant:
        """The time of a transaction by its number, counted from 0. Times are spread evenly."""
        return self._start + int(self._span * step / self.rows)

    def end_of_plan(self, now: Instant) -> Instant:
        """The expire_time of a monthly plan: early enough that some plans expire with credits left.

        Either before the account's last transaction or long after it, so that a server finds
        nothing to expire.
        """
        end = now + min(max(self._span * 5 // self.rows, DAY), 30 * DAY)
        return end if end < self.time(self.rows - 2) else now + self._span + YEAR


class Household:
    """One or two accounts with transfers between them, whose history is generated together."""

    def __init__(self, setting: Setting, accounts: Sequence[Account]) -> None:
        # Independent of other households, so that the history depends on these accounts only.
        self._random = Random(f"{setting.random_seed}/{accounts[0].id}")
        self._members = [_Member(account, setting) for account in accounts]
        self._details = {each: _details(each, setting.places) for each in (*ACTIVITIES, _WELCOME, _REFILL)}
        self._charges: dict[tuple[int, UUID], StoredCharge] = {}
        self._openers: dict[tuple[int, int], bytes] = {}
        self._unit = Unit(
            Loaded(
                states={member.number: StoredState(member.state, b"") for member in self._members},
                charges=self._charges,
                openers=self._openers,
            ),
            in_blocks(self._random.randbytes),
        )
        self._attempt = Attempt(self._unit)

    def history(self) -> Iterator[Rows]:
        """All rows of the accounts, in parts. The last part has the final states."""
        while any(member.due < _NEVER for member in self._members):
            for _ in range(ROWS_AT_ONCE):
                member = min(self._members, key=lambda each: each.due)
                if member.due == _NEVER:
                    break
                self._act(member)
            self._accept()
            self._keep_openers()
            yield posted_rows(self._unit.changes)
            # No later change updates these rows.
            self._unit.changes.posted.clear()
            self._unit.changes.answers.clear()
        yield state_rows(self._unit.changes)

    def _act(self, member: _Member) -> None:
        """Posts the next transaction."""
        now, state = member.due, member.state
        if past := _past(state, now):
            if past < member.rows - state.sequence:
                member.state = self._attempt.state(member.number, now)
            else:
                # Expirations must not exceed the account's number of rows.
                now = state.last_create_time
        if not member.state.sequence:
            self._grant(member, _WELCOME, PACKAGES[0], now)
        else:
            while not self._try(member, now):
                pass
        self._schedule(member)

    def _try(self, member: _Member, now: Instant) -> bool:
        """Posts a random activity. Returns whether that was possible."""
        bits = self._random.getrandbits(16)
        activity, amount = _WHEEL[bits & 255], AMOUNTS[bits >> 8]
        match activity.kind:
            case Transaction.CHARGE if activity.state == Transaction.SUCCEEDED and amount > member.state.available:
                self._grant(member, _REFILL, PACKAGES[bits & 3], now)
            case Transaction.CHARGE:
                draft = Draft(_CHARGE, activity.category, -amount, activity.state, activity.is_usage)
                self._post(member, activity, draft, now)
                if activity.state == Transaction.SUCCEEDED:
                    member.last_charge = member.state.sequence
            case Transaction.GRANT:
                self._grant(member, activity, PACKAGES[bits >> 8 & 3], now)
            case Transaction.ADJUSTMENT:
                self._post(member, activity, Draft(activity.kind, activity.category, amount), now)
            case Transaction.REFUND:
                return self._refund(member, activity, now)
            case Transaction.TRANSFER_OUT:
                return self._transfer(member, activity, amount, now)
        return True

    def _grant(self, member: _Member, activity: _Activity, amount: Millionths, now: Instant) -> None:
        expire_time = member.end_of_plan(now) if activity.category == "subscription_renewal" else None
        draft = Draft(_GRANT, activity.category, amount, expire_time=expire_time)
        self._post(member, activity, draft, now, self._new_request())

    def _post(
        self, member: _Member, activity: _Activity, draft: Draft, now: Instant, request: Request = _NO_REQUEST
    ) -> None:
        member.state, posted = posting.post(member.state, draft, now)
        details = self._details_of(activity)
        body = self._attempt.stage_transaction(member.state, posted, details, request_id=request.request_id)
        self._attempt.stage_answer(member.number, request, body, sequence=posted.sequence)

    def _refund(self, member: _Member, activity: _Activity, now: Instant) -> bool:
        """Refunds the newest charge, fully or half. Returns False if it is refunded already or its row was yielded."""
        self._accept()
        row = self._unit.changes.posted.get((member.number, member.last_charge))
        if row is None:
            return False
        uid = UUID(bytes=row.uid)
        self._charges[member.number, uid] = to_charge(member.id, row)
        amount = -row.amount // 2 if row.uid[-1] & 1 else None
        details = Transaction(description=activity.description)
        Refund(member.number, member.id, uid, amount, details, self._new_request()).run(self._attempt, now)
        self._charges.clear()
        member.last_charge = 0
        self._refresh(member)
        return True

    def _transfer(self, member: _Member, activity: _Activity, amount: Millionths, now: Instant) -> bool:
        """Transfers between the two accounts. Returns False on the larger one's turn, or if an account is complete."""
        if member is self._members[0]:
            return False
        source, destination = self._members if self._random.getrandbits(1) else self._members[::-1]
        if source.state.at(now).balance < amount:
            return False
        for each in (source, destination):
            if not each.state.sequence or _past(each.state, now) >= each.rows - each.state.sequence:
                return False
        details, request = self._details_of(activity), self._new_request()
        Transfer(source.number, source.id, destination.number, destination.id, amount, details, request).run(
            self._attempt, now
        )
        for each in (source, destination):
            self._refresh(each)
            self._schedule(each)
        return True

    def _refresh(self, member: _Member) -> None:
        """Reads an account's state after a command."""
        member.state = self._attempt.state(member.number, self._attempt.last_create_time(member.number))

    def _schedule(self, member: _Member) -> None:
        """Sets the time of an account's next transaction."""
        step = member.state.sequence
        member.due = member.time(step + self._random.random()) if step < member.rows else _NEVER

    def _details_of(self, activity: _Activity) -> Transaction:
        return Transaction.FromString(self._details[activity][self._random.getrandbits(VARIANT_BITS)])

    def _new_request(self) -> Request:
        return Request(str(UUID(bytes=self._random.randbytes(16), version=4)), self._random.randbytes(32))

    def _accept(self) -> None:
        self._attempt.accept()
        self._attempt = Attempt(self._unit)

    def _keep_openers(self) -> None:
        """Keeps the bodies that later expirations need, before their rows are yielded."""
        rows = self._unit.changes.posted
        kept = {}
        for member in self._members:
            for lot in member.state.lots:
                if lot.terms.expire_time is not None:
                    key = (member.number, lot.opened_by)
                    kept[key] = rows[key].body if key in rows else self._openers[key]
        self._openers.clear()
        self._openers.update(kept)


def _past(state: AccountState, now: Instant) -> int:
    """The number of expirations that are due."""
    return sum(1 for lot in state.lots if lot.terms.have_expired(now))


@lru_cache(64)
def _details(activity: _Activity, places: tuple[Place, ...]) -> list[bytes]:
    """The fields that posting stores unchanged, serialized: a variant for each place."""
    found = []
    for number, (location, membership, company) in enumerate(places):
        details = Transaction(
            description=activity.description, creator=User(id=f"user-{number}", name=f"User {number}")
        )
        if activity.is_placed:
            details.labels.update({"location": location, "membership": membership, "company": company})
            details.owner.id = f"user-{number}"
            details.creator.membership = membership
        match activity.subject:
            case "booking":
                details.booking.id = f"booking-{number}"
                details.booking.resource.title = "Meeting room"
            case "order":
                details.order.id = f"order-{number}"
                details.order.product.title = "Coffee"
            case "event_ticket":
                details.event_ticket.id = f"ticket-{number}"
                details.event_ticket.event.title = "Workshop"
            case "usage":
                details.usage.model = f"machine-{number}"
            case "tokens":
                tokens = Usage(
                    model=f"model-{number}", input_tokens=900 * (number + 1), output_tokens=250, cost_usd="0.0075"
                )
                details.usage.CopyFrom(tokens)
        found.append(details.SerializeToString(deterministic=True))
    return found
