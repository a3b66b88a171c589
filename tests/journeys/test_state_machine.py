"""A ledger on a real database, compared with a model of plain dicts after every random step."""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any, ClassVar, TypeVar
from uuid import UUID

import pytest
from daybook.v1.account_pb2 import Account
from daybook.v1.ledger_service_pb2 import BatchCreateTransactionsResponse, TransferCreditsResponse
from daybook.v1.transaction_pb2 import Transaction, Usage
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.book import Book, open_book
from server.ledger.access import ADMIN, Caller
from server.ledger.accounts import AccountRecord
from server.ledger.audit import Finding
from server.ledger.bodies import with_allocations
from server.ledger.errors import DaybookError, RequestIdReused
from server.ledger.idempotency import Request
from server.ledger.instants import HOUR, SECOND, Instant, from_timestamp
from server.ledger.money import Millionths, parse
from server.ledger.paging import Order, OrderField, TransactionFilter
from server.ledger.posting import AccountState, Draft
from server.posting import unit
from server.store import states
from server.usecases.transactions import NewTransaction
from tests.support.clock import NOON, Clock
from tests.support.databases import ReusedDatabase
from tests.support.examples import examples

Result = TypeVar("Result")

LIMITS = {"cash": 0, "credit": 40, "reserve": 15}
"""Every account with its credit limit."""
FOR_EVER = 2**63
PAGE = 5
CATEGORIES = ("computing", "serverless", "ai_chat")
STEPS_BETWEEN_FULL_CHECKS = 8
DAY_SECONDS = 24 * 3600

GRANT, CHARGE, ADJUSTMENT = Transaction.GRANT, Transaction.CHARGE, Transaction.ADJUSTMENT
SUCCEEDED, FAILED, CANCELED = Transaction.SUCCEEDED, Transaction.FAILED, Transaction.CANCELED


class Refused(Exception):
    """A refusal by the model, with a reason of the contract."""

    def __init__(self, reason: str, index: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.index = index


class Model:
    """The books of a few accounts, in their simplest form: dicts, sums and one credit at a time."""

    def __init__(self) -> None:
        self.accounts: dict[str, dict[str, Any]] = {
            name: {"limit": limit, "debt": 0, "lots": [], "log": [], "last": 0, "hours": {}}
            for name, limit in LIMITS.items()
        }

    def balance(self, name: str) -> Millionths:
        """The remaining credits of all lots, less the debt."""
        account = self.accounts[name]
        total: int = sum(lot["remaining"] for lot in account["lots"]) - account["debt"]
        return total

    def expire(self, name: str, now: Instant, limit: int | None = None) -> int:
        """Posts the due expirations, or the first `limit` of them; returns the number of due lots."""
        account = self.accounts[name]
        due = [lot for lot in account["lots"] if lot["remaining"] and lot["expiry"] <= now]
        due.sort(key=lambda lot: (lot["expiry"], lot["number"]))
        for lot in due[:limit]:
            gone, lot["remaining"] = lot["remaining"], 0
            time = max(lot["expiry"], account["last"])
            self.write(name, Transaction.EXPIRATION, "expiration", -gone, time, [(lot, -gone)])
        return len(due)

    def write(
        self,
        name: str,
        kind: int,
        category: str,
        amount: Millionths,
        time: Instant,
        moves: list[tuple[dict[str, Any] | None, Millionths]],
        state: int = SUCCEEDED,
    ) -> dict[str, Any]:
        """Appends a transaction to the log; returns its row. A move without a lot changes the debt."""
        account = self.accounts[name]
        account["last"] = time
        row = {
            "kind": kind,
            "category": category,
            "amount": amount,
            "time": time,
            "state": state,
            "balance": self.balance(name),
            "moves": [(lot["number"] if lot else 0, moved) for lot, moved in moves],
            "expiring": sum(moved for lot, moved in moves if lot and lot["expiry"] < FOR_EVER),
            "sequence": len(account["log"]) + 1,
            "refunded": 0,
        }
        account["log"].append(row)
        return row

    def add_credits(
        self, name: str, amount: Millionths, expiry: Instant, priority: int, lot: dict[str, Any] | None = None
    ) -> list[tuple[dict[str, Any] | None, Millionths]]:
        """Adds credits to a lot, or to a new one, after paying the debt; returns the moves."""
        account = self.accounts[name]
        moves: list[tuple[dict[str, Any] | None, Millionths]] = []
        paid = min(amount, account["debt"])
        if paid:
            account["debt"] -= paid
            moves.append((None, paid))
        if amount > paid:
            if lot is None:
                lot = {
                    "number": len(account["lots"]) + 1,
                    "opened_by": len(account["log"]) + 1,
                    "amount": amount - paid,
                    "remaining": 0,
                    "expiry": expiry,
                    "priority": priority,
                }
                account["lots"].append(lot)
            lot["remaining"] += amount - paid
            moves.append((lot, amount - paid))
        return moves

    def spend(self, name: str, amount: Millionths, *, borrow: bool) -> list[tuple[dict[str, Any] | None, Millionths]]:
        """Takes an amount, credit by credit; returns the moves. Raises Refused if the credits don't suffice."""
        account = self.accounts[name]
        if amount > self.balance(name) + (account["limit"] if borrow else 0):
            raise Refused("INSUFFICIENT_CREDITS")
        spent: list[int] = []
        for _ in range(amount):
            lots = [lot for lot in account["lots"] if lot["remaining"]]
            if not lots:
                account["debt"] += 1
                spent.append(0)
                continue
            lot = min(lots, key=lambda lot: (lot["priority"], lot["expiry"], lot["number"]))
            lot["remaining"] -= 1
            spent.append(lot["number"])
        return [
            (account["lots"][number - 1] if number else None, -len(list(group))) for number, group in groupby(spent)
        ]

    def post(self, name: str, draft: dict[str, Any], now: Instant) -> dict[str, Any]:
        """Posts a grant, a charge or an adjustment; returns its row."""
        self.expire(name, now)
        account = self.accounts[name]
        time, amount, kind = max(now, account["last"]), draft["amount"], draft["kind"]
        if amount == 0 or (kind == GRANT and amount < 0) or (kind == CHARGE and amount > 0):
            raise Refused("FIELD_INVALID")
        if draft["state"] != SUCCEEDED:
            return self.write(name, kind, draft["category"], amount, time, [], draft["state"])
        if amount > 0:
            expiry = FOR_EVER if draft["expiry"] is None else draft["expiry"]
            if draft["ttl"]:
                expiry = now + draft["ttl"]
            if expiry <= now:
                raise Refused("FIELD_INVALID")
            return self.write(
                name, kind, draft["category"], amount, time, self.add_credits(name, amount, expiry, draft["priority"])
            )
        try:
            moves = self.spend(name, -amount, borrow=True)
        except Refused:
            if not draft["declined"]:
                raise
            return self.write(name, kind, draft["category"], amount, time, [], FAILED)
        if draft["usage"] and draft["category"] in {"computing", "serverless"}:
            hours = account["hours"].setdefault((time - NOON) // HOUR, {"computing": 0, "serverless": 0})
            hours[draft["category"]] -= amount
        row = self.write(name, kind, draft["category"], amount, time, moves)
        row["clock"] = now
        return row

    def refund(self, name: str, sequence: int, amount: Millionths | None, now: Instant) -> dict[str, Any]:
        """Refunds a part of a charge, or the rest, the last taken credits first; returns the refund's row."""
        self.expire(name, now)
        account = self.accounts[name]
        time, charge = max(now, account["last"]), account["log"][sequence - 1]
        if charge["kind"] != CHARGE or charge["state"] != SUCCEEDED:
            raise Refused("NOT_REFUNDABLE")
        left = -charge["amount"] - charge["refunded"]
        part = left if amount is None else amount
        if part > left or left == 0:
            raise Refused("REFUND_EXCEEDS_CHARGE")
        spent = [number for number, moved in charge["moves"] for _ in range(-moved)][::-1]
        returned = spent[charge["refunded"] : charge["refunded"] + part]
        moves = []
        for number, group in groupby(returned):
            lot = account["lots"][number - 1] if number else None
            expiry, priority = (lot["expiry"], lot["priority"]) if lot else (FOR_EVER, 0)
            if lot and expiry <= now:
                lot, expiry = None, now + expiry - charge["clock"]
            moves += self.add_credits(name, len(list(group)), expiry, priority, lot)
        charge["refunded"] += part
        return self.write(name, Transaction.REFUND, "refund", part, time, moves)

    def transfer(
        self, source: str, destination: str, amount: Millionths, now: Instant
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Moves credits with their terms; returns both rows."""
        self.expire(source, now)
        self.expire(destination, now)
        taken = self.spend(source, amount, borrow=False)
        times = [max(now, self.accounts[name]["last"]) for name in (source, destination)]
        outgoing = self.write(source, Transaction.TRANSFER_OUT, "transfer", -amount, times[0], taken)
        brought = []
        for (priority, expiry), equal in groupby(
            taken, lambda move: move[0] and (move[0]["priority"], move[0]["expiry"])
        ):
            brought += self.add_credits(destination, -sum(moved for _, moved in equal), expiry, priority)
        return outgoing, self.write(destination, Transaction.TRANSFER_IN, "transfer", amount, times[1], brought)


@dataclass(frozen=True)
class Done:
    """A call that succeeded under a request_id."""

    call: Callable[[Request], Awaitable[bytes]]
    request: Request
    answer: bytes


def outcome_of(call: Callable[[], Any]) -> tuple[Any, Refused | None]:
    """The result of a call of the model, or its refusal."""
    try:
        return call(), None
    except Refused as refusal:
        return None, refusal


def draft_of(draft: dict[str, Any]) -> Draft:
    """The service's draft of a posting."""
    return Draft(
        kind=draft["kind"],
        category=draft["category"],
        amount=draft["amount"],
        state=draft["state"],
        is_usage=draft["usage"],
        expire_time=None if draft["ttl"] else draft["expiry"],
        time_to_live=draft["ttl"],
        priority=draft["priority"],
    )


def posting(kind: int, amount: Millionths, **fields: Any) -> dict[str, Any]:
    """A posting, permanent and successful unless `fields` say otherwise."""
    return {
        "kind": kind,
        "amount": amount,
        "category": "ai_chat",
        "state": SUCCEEDED,
        "usage": False,
        "expiry": None,
        "ttl": None,
        "priority": 0,
        "declined": False,
        **fields,
    }


def expiring(draft: dict[str, Any], now: Instant) -> dict[str, Any]:
    """A posting whose expire_time, if it has one, is counted from `now`."""
    return draft if draft["expiry"] is None else {**draft, "expiry": now + draft["expiry"]}


accounts = st.sampled_from(sorted(LIMITS))
additions = st.sampled_from((GRANT, GRANT, ADJUSTMENT))
removals = st.integers(-12, -1) | st.integers(-50, -1)
priorities = st.sampled_from((0, 0, 0, -1, 1))
lives = st.integers(1, 60).map(SECOND.__mul__)
grants = st.one_of(
    st.builds(posting, additions, st.integers(5, 40), priority=priorities),
    st.builds(posting, additions, st.integers(5, 40), priority=priorities, ttl=lives),
    st.builds(posting, additions, st.integers(5, 40), priority=priorities, expiry=lives),
)
charges = st.one_of(
    st.builds(posting, st.just(CHARGE), removals),
    st.builds(posting, st.just(CHARGE), removals, category=st.sampled_from(CATEGORIES), usage=st.just(True)),
)
postings = st.one_of(grants, charges, charges, st.builds(posting, st.just(ADJUSTMENT), removals))
unusual_postings = st.one_of(
    st.builds(posting, st.just(CHARGE), st.integers(-90, -20), declined=st.just(True)),
    st.builds(posting, additions, st.integers(1, 9), expiry=st.integers(-9, 0).map(SECOND.__mul__)),
    st.builds(posting, st.sampled_from((GRANT, ADJUSTMENT)), st.integers(-3, 3)),
    st.builds(
        posting,
        st.sampled_from((GRANT, CHARGE, ADJUSTMENT)),
        st.integers(-99, 99),
        state=st.sampled_from((FAILED, CANCELED)),
    ),
    st.builds(
        posting,
        st.just(CHARGE),
        removals,
        state=st.just(FAILED),
        category=st.just("computing"),
        usage=st.just(True),
    ),
)


class Ledger(RuleBasedStateMachine):
    """Applies every operation of a ledger to the service and to the model."""

    @initialize(seed=st.integers(0, 2**32), first=st.lists(st.tuples(accounts, grants), min_size=4, max_size=8))
    def open(self, seed: int, first: list[tuple[str, dict[str, Any]]]) -> None:
        """Opens a ledger with three accounts and some credits."""
        self.folder = Path(tempfile.mkdtemp())
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()
        self.clock = Clock()
        self.model = Model()
        self.done: list[Done] = []
        self.refused_ids: list[str] = []
        self.request_count = 0
        self.steps = 0
        self.uids: dict[tuple[str, int], UUID] = {}
        self.seen_in_full = dict.fromkeys(LIMITS, 0)
        opening = open_book(self.empty_database(), self.clock, Random(seed).randbytes)
        self.book: Book = self.wait(self.stack.enter_async_context(opening))
        tenant = self.wait(
            self.book.credentials.create_tenant(slug="house", uid="house", display_name="House", create_time=NOON)
        )
        self.caller = Caller(tenant, "house", "key", scopes=frozenset({ADMIN}))
        for name, limit in LIMITS.items():
            record = AccountRecord(name, Account.SPACE, "", limit, b"")
            self.wait(self.book.accounts.create(self.caller, record, Request("", b""), hour_anchor=NOON))
        for name, draft in first:
            self.create(name, draft)

    def empty_database(self) -> str:
        """The URL of an empty database."""
        return f"sqlite+aiosqlite:///{self.folder}/daybook.db"

    def teardown(self) -> None:
        """Compares all transactions and lists, and closes the ledger."""
        if not hasattr(self, "runner"):
            return
        try:
            # After a failure the model may be behind, so a comparison would only report a second failure.
            if sys.exception() is None:
                self.compare_transactions()
                self.compare_lists()
        finally:
            self.wait(self.stack.aclose())
            self.runner.close()
            shutil.rmtree(self.folder)

    def wait(self, awaited: Awaitable[Result]) -> Result:
        """Runs an awaitable in the ledger's own event loop."""

        async def run() -> Result:
            return await awaited

        return self.runner.run(run())

    def next_request(self) -> Request:
        """A new request, with the unused id of a refused call if there is one."""
        self.request_count += 1
        request_id = self.refused_ids.pop() if self.refused_ids else f"request-{self.request_count}"
        return Request(request_id, f"body {self.request_count}".encode())

    def new(self, name: str, draft: dict[str, Any], request: Request) -> NewTransaction:
        """The service's form of a posting."""
        details = Transaction(usage=Usage(model="gpu")) if draft["usage"] else Transaction()
        return NewTransaction(name, draft_of(draft), details, request, draft["declined"])

    def attempt(self, on_model: Callable[[Model], Any], on_service: Callable[[Request], Awaitable[bytes]]) -> Any:
        """Makes a call on both; returns the model's rows and the service's bytes, or None if both refuse it."""
        trial, request = deepcopy(self.model), self.next_request()
        rows, refused = outcome_of(lambda: on_model(trial))
        if refused is not None:
            with pytest.raises(DaybookError) as raised:
                self.wait(on_service(request))
            assert raised.value.reason == refused.reason
            assert raised.value.metadata.get("index") == (None if refused.index is None else str(refused.index))
            self.refused_ids.append(request.request_id)
            return None
        answer = self.wait(on_service(request))
        self.model = trial
        self.done.append(Done(on_service, request, answer))
        return rows, answer

    def compare_row(self, row: dict[str, Any], message: Transaction) -> None:
        """Asserts that a transaction of the service equals the model's."""
        self.uids[message.name.split("/")[1], message.sequence] = UUID(message.uid)
        total = sum(moved for _, moved in row["moves"])
        assert {
            "kind": message.kind,
            "category": message.category,
            "amount": parse(message.amount),
            "time": from_timestamp(message.create_time),
            "state": message.state,
            "balance": parse(message.balance_after),
            "expiring": parse(message.expiring_amount),
            "permanent": parse(message.permanent_amount),
            "sequence": message.sequence,
        } == {
            **{key: value for key, value in row.items() if key not in {"moves", "refunded", "clock"}},
            "permanent": total - row["expiring"],
        }

    async def create_one(self, name: str, draft: dict[str, Any], request: Request) -> bytes:
        """Posts a transaction to the service."""
        return await self.book.transactions.create(self.caller, self.new(name, draft, request))

    @rule(name=accounts, relative=postings)
    def create(self, name: str, relative: dict[str, Any]) -> None:
        """Posts a grant, a charge or an adjustment."""
        draft = expiring(relative, self.clock.now)

        on_service = partial(self.create_one, name, draft)
        outcome = self.attempt(lambda model: model.post(name, draft, self.clock.now), on_service)
        if outcome:
            self.compare_row(outcome[0], Transaction.FromString(outcome[1]))

    @rule(name=accounts, relative=unusual_postings)
    def create_unusual(self, name: str, relative: dict[str, Any]) -> None:
        """Posts transactions that may be declined, have expired, have a wrong sign or move nothing."""
        self.create(name, relative)

    @rule(data=st.data(), of_charge=st.sampled_from((True, True, True, False)), part=st.none() | st.integers(1, 15))
    def refund(self, data: st.DataObject, of_charge: bool, part: Millionths | None) -> None:
        """Refunds an earlier charge, or tries to refund another transaction."""
        candidates = [
            key
            for key in self.uids
            if not of_charge or self.model.accounts[key[0]]["log"][key[1] - 1]["kind"] == CHARGE
        ]
        if candidates:
            self.refund_on_both(*data.draw(st.sampled_from(candidates)), part)

    @rule(
        name=accounts,
        relative=charges,
        seconds=st.sampled_from((0, 0, 1, 15, 30, 60)),
        parts=st.lists(st.integers(1, 15), max_size=2),
    )
    def charge_and_refund(self, name: str, relative: dict[str, Any], seconds: int, parts: list[Millionths]) -> None:
        """Charges credits and refunds them after a while, first in parts and then the rest."""
        self.create(name, relative)
        sequence = len(self.model.accounts[name]["log"])
        for part in (*parts, None):
            self.clock.advance(seconds)
            if (name, sequence) in self.uids:
                self.refund_on_both(name, sequence, part)

    def refund_on_both(self, name: str, sequence: int, part: Millionths | None) -> None:
        """Refunds a transaction, or a part of it, on both."""
        uid = self.uids[name, sequence]

        async def on_service(request: Request) -> bytes:
            return await self.book.transactions.refund(self.caller, name, uid, part, Transaction(), request)

        outcome = self.attempt(lambda model: model.refund(name, sequence, part, self.clock.now), on_service)
        if outcome:
            message = Transaction.FromString(outcome[1])
            self.compare_row(outcome[0], message)
            assert message.refund_of == f"accounts/{name}/transactions/{uid}"

    @rule(pair=st.permutations(sorted(LIMITS)), amount=st.integers(1, 30))
    def transfer(self, pair: list[str], amount: Millionths) -> None:
        """Moves credits from one account to another."""
        source, destination, _ = pair

        async def on_service(request: Request) -> bytes:
            return await self.book.transactions.transfer(
                self.caller, source, destination, amount, Transaction(), request
            )

        outcome = self.attempt(lambda model: model.transfer(source, destination, amount, self.clock.now), on_service)
        if outcome:
            (outgoing, incoming), answer = outcome
            response = TransferCreditsResponse.FromString(answer)
            self.compare_row(outgoing, response.outgoing)
            self.compare_row(incoming, response.incoming)
            assert response.outgoing.transfer_peer == response.incoming.name
            assert response.incoming.transfer_peer == response.outgoing.name

    @rule(items=st.lists(st.tuples(accounts, postings), min_size=1, max_size=5))
    def post_all_or_none(self, items: list[tuple[str, dict[str, Any]]]) -> None:
        """Posts a batch of transactions, all or none."""
        items = [(name, expiring(relative, self.clock.now)) for name, relative in items]

        def on_model(model: Model) -> list[dict[str, Any]]:
            rows = []
            for index, (name, draft) in enumerate(items):
                try:
                    rows.append(model.post(name, draft, self.clock.now))
                except Refused as refusal:
                    raise Refused(refusal.reason, index) from None
            return rows

        async def on_service(request: Request) -> bytes:
            nothing = Request("", b"")
            return await self.book.transactions.create_batch(
                self.caller, [self.new(name, draft, nothing) for name, draft in items], request
            )

        outcome = self.attempt(on_model, on_service)
        if outcome:
            rows, answer = outcome
            messages = BatchCreateTransactionsResponse.FromString(answer).transactions
            for row, message in zip(rows, messages, strict=True):
                self.compare_row(row, message)

    @rule(items=st.lists(st.tuples(accounts, postings | unusual_postings), min_size=1, max_size=5))
    def post_each_by_itself(self, items: list[tuple[str, dict[str, Any]]]) -> None:
        """Posts several transactions, some of which may be refused."""
        items = [(name, expiring(relative, self.clock.now)) for name, relative in items]
        requests = [self.next_request() for _ in items]
        new = [self.new(name, draft, request) for (name, draft), request in zip(items, requests, strict=True)]
        outcomes = self.wait(self.book.transactions.create_each(self.caller, new))
        for (name, draft), request, outcome in zip(items, requests, outcomes, strict=True):
            trial = deepcopy(self.model)
            row, refused = outcome_of(partial(trial.post, name, draft, self.clock.now))
            if refused is not None:
                assert isinstance(outcome, DaybookError)
                assert outcome.reason == refused.reason
                self.refused_ids.append(request.request_id)
                continue
            assert isinstance(outcome, bytes), outcome
            self.model = trial
            self.done.append(Done(partial(self.create_one, name, draft), request, outcome))
            self.compare_row(row, Transaction.FromString(outcome))

    @precondition(lambda self: self.done)
    @rule(data=st.data(), same=st.booleans())
    def repeat(self, data: st.DataObject, same: bool) -> None:
        """Repeats an earlier call: it gets its first answer, or is refused if its body differs. Nothing is posted."""
        done = self.done[data.draw(st.integers(0, len(self.done) - 1))]
        if same:
            assert self.wait(done.call(done.request)) == done.answer
            return
        with pytest.raises(RequestIdReused):
            self.wait(done.call(Request(done.request.request_id, b"another body")))

    @rule(
        seconds=st.integers(0, 40) | st.sampled_from((-20, 59 * 60, 3600, DAY_SECONDS, -DAY_SECONDS)),
        sweeps=st.booleans(),
    )
    def move_the_clock(self, seconds: int, sweeps: bool) -> None:
        """Moves the clock, by up to a day back or forth, and sometimes sweeps."""
        self.clock.advance(seconds)
        if sweeps:
            swept = self.wait(self.book.expirations.sweep())
            assert swept == sum(self.model.expire(name, self.clock.now) for name in LIMITS)

    @invariant()
    def books_agree(self) -> None:
        """The balances and lots of every account equal the model's; every few steps transactions are compared too."""
        states = {name: self.wait(self.book.accounts.balance(self.caller, name))[0] for name in LIMITS}
        self.catch_up({name: states[name].sequence for name in LIMITS})
        for name in LIMITS:
            self.compare_account(name, states[name])
        self.steps += 1
        if self.steps % STEPS_BETWEEN_FULL_CHECKS == 0:
            self.compare_transactions()

    def catch_up(self, sequences: dict[str, int]) -> None:
        """Makes the model post what the service posts before a call that it refuses: nothing."""

    def compare_account(self, name: str, state: AccountState) -> None:
        """An account's lots and balance equal the model's, whether or not expirations are posted."""
        account = self.model.accounts[name]
        now = self.clock.now
        expected = [{**lot, "remaining": 0 if lot["expiry"] <= now else lot["remaining"]} for lot in account["lots"]]
        lots = [
            {
                "number": lot.number,
                "opened_by": lot.opened_by,
                "amount": lot.amount,
                "remaining": lot.remaining,
                "expiry": FOR_EVER if lot.terms.expire_time is None else lot.terms.expire_time,
                "priority": lot.terms.priority,
            }
            for lot in self.wait(self.book.accounts.lots(self.caller, name, 0, 1000)).rows
        ]
        assert lots == expected
        assert all(0 <= lot["remaining"] <= lot["amount"] for lot in lots)
        open_credits = sum(lot["remaining"] for lot in lots)
        assert (state.balance, state.debt) == (open_credits - account["debt"], account["debt"])
        assert state.balance >= -account["limit"]
        assert state.sequence == len(account["log"])
        if account["log"] and open_credits == sum(lot["remaining"] for lot in account["lots"]):
            assert account["log"][-1]["balance"] == state.balance

    def compare_transactions(self) -> None:
        """Every transaction, in full, equals the model's, without gaps, and the audit finds nothing."""
        for name, account in self.model.accounts.items():
            messages = self.listed(name, Order(descending=False))
            assert [message.sequence for message in messages] == list(range(1, len(messages) + 1))
            for row, message in zip(account["log"], messages, strict=True):
                self.compare_row(row, message)
                if row["sequence"] <= self.seen_in_full[name]:
                    continue
                stored = self.wait(self.book.transactions.get(self.caller, name, UUID(message.uid)))
                full = with_allocations(name, *stored)
                shown = [(int(each.lot.rpartition("/")[2] or 0), parse(each.amount)) for each in full.allocations]
                assert shown == row["moves"]
                moved = sum(amount for _, amount in shown)
                assert moved == (row["amount"] if row["state"] == SUCCEEDED else 0)
            self.seen_in_full[name] = len(messages)
        assert self.wait(self.findings()) == []

    def compare_lists(self) -> None:
        """Every list in every order, the balances and the hour windows equal the model's."""
        everything = []
        for name, account in self.model.accounts.items():
            messages = self.listed(name, Order())
            assert [message.sequence for message in messages] == list(range(len(account["log"]), 0, -1))
            by_amount = sorted(messages, key=lambda message: (parse(message.amount), message.sequence))
            assert self.listed(name, Order(OrderField.AMOUNT, descending=False)) == by_amount
            everything += messages
            state, as_of_time = self.wait(self.book.accounts.balance(self.caller, name))
            assert (state.sequence, as_of_time) == (len(messages), self.clock.now)
            history = self.wait(self.book.usage.history(self.caller, name, 0, 1000))
            assert [(each.number, each.start, each.computing, each.serverless) for each in history.windows[::-1]] == [
                (number, NOON + hour * HOUR, used["computing"], used["serverless"])
                for number, (hour, used) in enumerate(sorted(account["hours"].items()), 1)
            ]
        of_tenant = self.listed(None, Order())
        assert sorted(message.name for message in of_tenant) == sorted(message.name for message in everything)
        times = [from_timestamp(message.create_time) for message in of_tenant]
        assert times == sorted(times, reverse=True)

    async def findings(self) -> list[Finding]:
        """The findings of the audit."""
        return [event async for event in self.book.verification.verify_all(None) if isinstance(event, Finding)]

    def listed(self, name: str | None, order: Order) -> list[Transaction]:
        """The transactions on all pages of a list."""
        messages, after = [], None
        while True:
            page = self.wait(self.book.transactions.list(self.caller, name, TransactionFilter(), after, PAGE, order))
            messages += [Transaction.FromString(row.body) for row in page.rows]
            if page.next_key is None:
                return messages
            after = page.next_key


TestLedger = Ledger.TestCase
TestLedger.settings = settings(
    max_examples=examples(20),
    stateful_step_count=25,
    deadline=None,
    # Each example has a database of its own.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


class LedgerOfManyLots(Ledger):
    """The same while lots are read in parts, as those of an account with many lots are."""

    def catch_up(self, sequences: dict[str, int]) -> None:
        """Makes the model post the first expirations: the service posts them before a call, even a refused one."""
        for name, sequence in sequences.items():
            self.model.expire(name, self.clock.now, max(0, sequence - len(self.model.accounts[name]["log"])))


@pytest.fixture
def few_lots_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads lots two at a time, so that few lots reach every limit."""
    monkeypatch.setattr(states, "WHOLE_LOTS_MAX", 1)
    monkeypatch.setattr(unit, "LOTS_READ_MIN", 2)
    monkeypatch.setattr(unit, "LOTS_EXPIRED_MAX", 2)


TestLedgerOfManyLots = pytest.mark.usefixtures("few_lots_at_once")(LedgerOfManyLots.TestCase)
TestLedgerOfManyLots.settings = TestLedger.settings


class LedgerOnPostgreSQL(Ledger):
    """The same on PostgreSQL."""

    database: ClassVar[ReusedDatabase]

    def empty_database(self) -> str:
        """The URL of a database that is emptied: creating one for each example would take most of the time."""
        self.database.empty()
        return self.database.url


@pytest.fixture
def postgresql_database(reused_database: ReusedDatabase) -> None:
    """Gives the state machine its database."""
    LedgerOnPostgreSQL.database = reused_database


TestLedgerOnPostgreSQL = pytest.mark.usefixtures("postgresql_database")(LedgerOnPostgreSQL.TestCase)
TestLedgerOnPostgreSQL.settings = settings(TestLedger.settings, max_examples=examples(8))


class LedgerOfManyLotsOnPostgreSQL(LedgerOfManyLots, LedgerOnPostgreSQL):
    """The same on PostgreSQL while lots are read in parts."""


TestLedgerOfManyLotsOnPostgreSQL = pytest.mark.usefixtures("postgresql_database", "few_lots_at_once")(
    LedgerOfManyLotsOnPostgreSQL.TestCase
)
TestLedgerOfManyLotsOnPostgreSQL.settings = TestLedgerOnPostgreSQL.settings
