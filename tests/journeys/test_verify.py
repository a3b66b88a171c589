"""Books that were tampered with: verify finds each divergence and reports its place."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

import grpc
import pytest
import pytest_asyncio
from daybook.v1.account_pb2 import Account
from daybook.v1.ledger_service_pb2 import (
    BatchCreateTransactionsRequest,
    CreateTransactionRequest,
    GetAccountRequest,
    RefundTransactionRequest,
    TransferCreditsRequest,
)
from daybook.v1.transaction_pb2 import Transaction, Usage
from google.protobuf.duration_pb2 import Duration
from sqlalchemy import Table, and_, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from server.app import serving
from server.book import Book, open_book
from server.config import Settings
from server.ledger.access import Caller
from server.ledger.accounts import AccountRecord
from server.ledger.errors import TooBusy
from server.ledger.idempotency import Request
from server.ledger.instants import HOUR, SECOND
from server.store.database import Database
from server.store.tables import (
    account_states,
    accounts,
    lots,
    refunds,
    requests,
    transactions,
    usage_windows,
)
from server.usecases.verification import IN_FLIGHT_MAX, Progress
from tests.support.callers import Client, Server
from tests.support.clock import NOON, Clock
from tests.support.databases import PostgreSQL, writing
from tests.support.refusals import refusal_of

GRANT, CHARGE = Transaction.GRANT, Transaction.CHARGE
CREDIT = 1_000_000
DAYBOOK = str(Path(sys.executable).parent / "daybook")

Row: TypeAlias = dict[str, Any]
Change: TypeAlias = Callable[[Any], Any]


async def fill(client: Client, clock: Clock) -> None:
    """Fills the books: `acme` has every kind of row, `debtor` a debt, and `sound` is never tampered with."""
    for account_id in ("sound", "acme", "other"):
        await client.create_account(account_id)
    await client.create_account("debtor", credit_limit="10")
    usage: dict[str, Any] = {"category": "computing", "usage": Usage(model="m", input_tokens=7)}
    steps: list[tuple[Transaction.Kind.ValueType, str, dict[str, Any]]] = [
        (GRANT, "100", {"description": "The first"}),
        (GRANT, "50", {"ttl": Duration(seconds=10 * 24 * 3600), "priority": 5}),
        (CHARGE, "-10", usage),
        (CHARGE, "-5", {**usage, "category": "serverless"}),
        (Transaction.REFUND, "4", {"of": 3}),
        (CHARGE, "-20", {"labels": {"location": "l", "membership": "m", "company": "c"}}),
        (Transaction.REFUND, "20", {"of": 6}),
        (GRANT, "7", {"priority": -1}),
        (CHARGE, "-7", {"request_id": "r-9"}),
        (CHARGE, "-1", usage),
    ]
    for kind, amount, fields in steps:
        if kind == Transaction.REFUND:
            name = (await client.history("acme"))[fields["of"] - 1].name
            await client.ledger.RefundTransaction(
                RefundTransactionRequest(name=name, amount=amount), metadata=client.metadata
            )
        else:
            await client.post("acme", kind, amount, **fields)
        clock.advance(3600)
    for account_id, amount in (("debtor", "-4"), ("sound", "-1"), ("other", "-1")):
        if account_id != "debtor":
            await client.post(account_id, GRANT, "5")
        await client.post(account_id, CHARGE, amount, **usage)
    for account_id in ("payer", "payee"):
        await client.create_account(account_id)
    await client.post("payer", GRANT, "5")
    await client.ledger.TransferCredits(
        TransferCreditsRequest(name="accounts/payer", destination="accounts/payee", amount="1", request_id="t-2"),
        metadata=client.metadata,
    )


@dataclass(frozen=True)
class Ledger:
    """A server, a caller with the scope `admin`, and the original rows."""

    server: Server
    client: Client
    numbers: Mapping[str, int]
    sound: Mapping[Table, list[Row]]

    async def restore(self) -> None:
        """Restores every row."""
        async with writing(self.server.book.database) as connection:
            for table, rows in self.sound.items():
                await connection.execute(delete(table))
                await connection.execute(insert(table), rows)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["sqlite", "postgresql"])
async def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Ledger]:
    """One ledger for all cases, on each engine."""
    if request.param == "sqlite":
        database_url = f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('verify')}/daybook.db"
    else:
        postgresql: PostgreSQL = request.getfixturevalue("postgresql")
        postgresql.execute("CREATE DATABASE test_verify")
        database_url = postgresql.url("test_verify")
    clock = Clock()
    async with (
        open_book(database_url, clock, Random(1).randbytes) as book,
        serving(book, Settings(port=0, shutdown_grace_seconds=1)) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        server = Server(book, channel)
        client = await server.client(await server.create_tenant("house"), scopes={"admin"})
        await fill(client, clock)
        async with book.database.primary.snapshot() as connection:
            numbers = {row.id: row.number for row in await connection.execute(select(accounts))}
            sound = {
                table: [dict(row) for row in (await connection.execute(select(table))).mappings()]
                for table in (account_states, transactions, lots, refunds, usage_windows, requests)
            }
        yield Ledger(server, client, numbers, sound)
    if request.param == "postgresql":
        postgresql.execute("DROP DATABASE test_verify WITH (FORCE)")


Tampering: TypeAlias = Callable[[AsyncConnection, int], Awaitable[None]]
"""Tampers with the books of an account, given by its number."""


def _is(table: Table, number: int, key: Mapping[str, int | str]) -> Any:
    return and_(table.c.account_number == number, *(table.c[name] == value for name, value in key.items()))


TAMPERED: set[str] = set()
"""The columns that a case changes."""


def changed(table: Table, column: str, change: Change, **key: int | str) -> Tampering:
    """Changes a column of one row."""
    TAMPERED.add(f"{table.name}.{column}")

    async def tamper(connection: AsyncConnection, number: int) -> None:
        place = _is(table, number, key)
        old = (await connection.execute(select(table.c[column]).where(place))).scalar_one()
        value = change(bytes(old) if isinstance(old, memoryview) else old)
        assert value != old, "nothing would be changed"
        await connection.execute(update(table).where(place).values({column: value}))

    return tamper


def removed(table: Table, **key: int | str) -> Tampering:
    """Deletes one row."""

    async def tamper(connection: AsyncConnection, number: int) -> None:
        done = await connection.execute(delete(table).where(_is(table, number, key)))
        assert done.rowcount == 1

    return tamper


def added(table: Table, **values: Any) -> Tampering:
    """Inserts a row."""

    async def tamper(connection: AsyncConnection, number: int) -> None:
        await connection.execute(insert(table).values(account_number=number, **values))

    return tamper


def copied(sequence: int, to: int) -> Tampering:
    """Copies a transaction, under another uid."""

    async def tamper(connection: AsyncConnection, number: int) -> None:
        place = _is(transactions, number, {"sequence": sequence})
        row = dict((await connection.execute(select(transactions).where(place))).mappings().one())
        await connection.execute(insert(transactions).values({**row, "sequence": to, "uid": b"x" * 16}))

    return tamper


def swapped(first: int, second: int) -> Tampering:
    """Swaps the places of two transactions."""

    async def tamper(connection: AsyncConnection, number: int) -> None:
        found = transactions.c.sequence.in_([first, second]) & (transactions.c.account_number == number)
        rows = (await connection.execute(select(transactions).where(found))).mappings().all()
        await connection.execute(delete(transactions).where(found))
        for row in rows:
            sequence = first + second - row["sequence"]
            await connection.execute(insert(transactions).values({**row, "sequence": sequence}))

    return tamper


def flipped(place: int) -> Change:
    """Flips a bit of one byte, or cuts the last byte off if `place` is negative."""
    return lambda old: old[:place] + bytes([old[place] ^ 1]) + old[place + 1 :] if place >= 0 else old[:-1]


def plus(difference: int) -> Change:
    """Adds a difference to a number."""
    return lambda old: old + difference


def to(value: Any) -> Change:
    """Replaces a value."""
    return lambda _old: value


def replaced(old_text: bytes, new_text: bytes) -> Change:
    """Replaces some bytes by as many others, so that the whole stays well-formed."""
    assert len(old_text) == len(new_text)
    return lambda old: old.replace(old_text, new_text)


def dated(seconds: int) -> Change:
    """Changes the create_time in a body."""

    def change(old: bytes) -> bytes:
        message = Transaction.FromString(old)
        message.create_time.seconds = seconds
        return message.SerializeToString(deterministic=True)

    return change


Where: TypeAlias = "tuple[int, str] | None"
"""The sequence and the subject of an expected finding; None if only its account is compared."""

CASES: dict[str, tuple[str, Tampering, Where]] = {
    # Columns of a transaction.
    "amount": ("acme", changed(transactions, "amount", plus(-1), sequence=6), (6, "amount")),
    "amount of the first": ("acme", changed(transactions, "amount", plus(1), sequence=1), (1, "amount")),
    "amount of the last": ("acme", changed(transactions, "amount", plus(1), sequence=10), (10, "amount")),
    "balance_after": (
        "acme",
        changed(transactions, "balance_after", plus(1), sequence=6),
        (6, "balance_after"),
    ),
    "balance_after of the last": (
        "acme",
        changed(transactions, "balance_after", plus(1), sequence=10),
        (10, "balance_after"),
    ),
    "create_time": ("acme", changed(transactions, "create_time", plus(1), sequence=6), (6, "create_time")),
    "create_time before its predecessor": (
        "acme",
        changed(transactions, "create_time", plus(-2 * HOUR), sequence=6),
        (6, "create_time"),
    ),
    "create_time beyond the calendar": (
        "acme",
        changed(transactions, "create_time", to(2**62), sequence=6),
        (6, "create_time"),
    ),
    "month": ("acme", changed(transactions, "month", to(202409), sequence=6), (6, "month")),
    "invalid month": ("acme", changed(transactions, "month", to(0), sequence=6), (6, "month")),
    "kind": ("acme", changed(transactions, "kind", to(int(Transaction.ADJUSTMENT)), sequence=6), (6, "kind")),
    "invalid kind": ("acme", changed(transactions, "kind", to(99), sequence=6), (6, "kind")),
    "category": ("acme", changed(transactions, "category", to("other"), sequence=6), (6, "category")),
    "category of usage": ("acme", changed(transactions, "category", to("serverless"), sequence=3), (3, "category")),
    "state": ("acme", changed(transactions, "state", to(int(Transaction.FAILED)), sequence=6), (6, "state")),
    "location": ("acme", changed(transactions, "location", to("x"), sequence=6), (6, "label location")),
    "membership": ("acme", changed(transactions, "membership", to(""), sequence=6), (6, "label membership")),
    "lost label": ("acme", changed(transactions, "company", to(None), sequence=6), (6, "label company")),
    "added label": ("acme", changed(transactions, "company", to("c"), sequence=1), (1, "label company")),
    "uid": ("acme", changed(transactions, "uid", flipped(15), sequence=6), (6, "uid")),
    "invalid uid": ("acme", changed(transactions, "uid", to(b"x"), sequence=6), (6, "uid")),
    "tenant": ("acme", changed(transactions, "tenant_number", plus(1), sequence=6), (6, "tenant")),
    "hash": ("acme", changed(transactions, "hash", flipped(0), sequence=6), (6, "hash")),
    "hash of the last": ("acme", changed(transactions, "hash", flipped(31), sequence=10), (10, "hash")),
    "body": ("acme", changed(transactions, "body", replaced(b"The first", b"The worst"), sequence=1), (1, "hash")),
    "amount in the body": ("acme", changed(transactions, "body", replaced(b"-20", b"-21"), sequence=6), (6, "hash")),
    "any byte of the body": ("acme", changed(transactions, "body", flipped(0), sequence=6), (6, "hash")),
    "body of the last": ("acme", changed(transactions, "body", flipped(40), sequence=10), (10, "hash")),
    "cut body": ("acme", changed(transactions, "body", flipped(-1), sequence=6), (6, "hash")),
    "empty body": ("acme", changed(transactions, "body", to(b""), sequence=6), (6, "hash")),
    "body of garbage": ("acme", changed(transactions, "body", to(b"\xff" * 40), sequence=6), (6, "body")),
    "body of a refund of garbage": (
        "acme",
        changed(transactions, "body", to(b"\xff" * 40), sequence=7),
        (7, "body"),
    ),
    "time in the body beyond the calendar": (
        "acme",
        changed(transactions, "body", dated(2**50), sequence=6),
        (6, "create_time"),
    ),
    "invalid uid of a refund": ("acme", changed(transactions, "uid", to(b"x"), sequence=7), (7, "uid")),
    "allocations": ("acme", changed(transactions, "allocations", flipped(5), sequence=6), (6, "hash")),
    "no allocations": (
        "acme",
        changed(transactions, "allocations", to(b""), sequence=6),
        (6, "sum of allocations"),
    ),
    "allocations of garbage": ("acme", changed(transactions, "allocations", to(b"\xff"), sequence=6), (6, "hash")),
    # Rows of transactions.
    "first transaction missing": ("acme", removed(transactions, sequence=1), (2, "sequence")),
    "transaction missing": ("acme", removed(transactions, sequence=5), (6, "sequence")),
    "last transaction missing": ("acme", removed(transactions, sequence=10), (0, "sequence")),
    "only transaction missing": ("debtor", removed(transactions, sequence=1), (0, "sequence")),
    "transaction moved": ("acme", changed(transactions, "sequence", to(12), sequence=10), (12, "sequence")),
    "transaction copied": ("acme", copied(10, to=11), (11, "hash")),
    "transactions swapped": ("acme", swapped(3, 4), (3, "hash")),
    # The state of the account.
    "balance": ("acme", changed(account_states, "balance", plus(1)), (0, "balance")),
    "debt": ("debtor", changed(account_states, "debt", plus(-1)), (0, "debt")),
    "debt of nothing": ("acme", changed(account_states, "debt", plus(1)), (0, "debt")),
    "sequence": ("acme", changed(account_states, "sequence", plus(1)), (0, "sequence")),
    "sequence behind": ("acme", changed(account_states, "sequence", plus(-1)), (0, "sequence")),
    "last hash": ("acme", changed(account_states, "last_hash", flipped(0)), (0, "last hash")),
    "no last hash": ("acme", changed(account_states, "last_hash", to(b"")), (0, "last hash")),
    "lot count": ("acme", changed(account_states, "lot_count", plus(1)), (0, "lot count")),
    "lot count behind": ("acme", changed(account_states, "lot_count", plus(-1)), (0, "lot count")),
    "open lot count": ("acme", changed(account_states, "open_lot_count", plus(1)), (0, "open lot count")),
    "expiring credits": ("acme", changed(account_states, "expiring", plus(1)), (0, "expiring credits")),
    "last create_time": ("acme", changed(account_states, "last_create_time", plus(1)), (0, "last create_time")),
    "newest window": ("acme", changed(account_states, "window_number", plus(-1)), (0, "newest window")),
    "no newest window": ("acme", changed(account_states, "window_number", to(0)), (0, "newest window")),
    "no state": ("acme", removed(account_states), (0, "state")),
    # Lots.
    "remaining": ("acme", changed(lots, "remaining", plus(-1), number=1), (0, "remaining of lot 1")),
    "remaining of a spent lot": ("acme", changed(lots, "remaining", plus(1), number=3), (0, "remaining of lot 3")),
    "nothing remaining": ("acme", changed(lots, "remaining", to(0), number=2), (0, "remaining of lot 2")),
    "amount of a lot": ("acme", changed(lots, "amount", plus(1), number=1), (1, "lot 1")),
    "amount of a spent lot": ("acme", changed(lots, "amount", plus(1), number=3), (8, "lot 3")),
    "expire_time": ("acme", changed(lots, "expire_time", plus(1), number=2), (2, "lot 2")),
    "no expire_time": ("acme", changed(lots, "expire_time", to(None), number=2), (2, "lot 2")),
    "expire_time of a permanent lot": (
        "acme",
        changed(lots, "expire_time", to(NOON + 100 * HOUR), number=1),
        (1, "lot 1"),
    ),
    "priority": ("acme", changed(lots, "priority", plus(1), number=2), (2, "lot 2")),
    "opened_by": ("acme", changed(lots, "opened_by", plus(1), number=2), (2, "lot 2")),
    "lot missing": ("acme", removed(lots, number=1), (1, "lot 1")),
    "spent lot missing": ("acme", removed(lots, number=3), (8, "lot 3")),
    "lot too many": (
        "acme",
        added(lots, number=4, opened_by=1, priority=0, amount=CREDIT, remaining=CREDIT),
        (0, "remaining of lot 4"),
    ),
    "spent lot too many": (
        "acme",
        added(lots, number=4, opened_by=1, priority=0, amount=CREDIT, remaining=0),
        (0, "lots"),
    ),
    # Hour windows.
    "computing": ("acme", changed(usage_windows, "computing", plus(1), number=1), (0, "window 1")),
    "serverless": ("acme", changed(usage_windows, "serverless", plus(-1), number=2), (0, "window 2")),
    "serverless of another hour": ("acme", changed(usage_windows, "serverless", plus(1), number=1), (0, "window 1")),
    "computing of the newest": ("acme", changed(usage_windows, "computing", plus(1), number=3), (0, "window 3")),
    "start": ("acme", changed(usage_windows, "start", plus(SECOND), number=2), (0, "window 2")),
    "window missing": ("acme", removed(usage_windows, number=1), (0, "window 1")),
    "newest window missing": ("acme", removed(usage_windows, number=3), (0, "window 3")),
    "window too many": (
        "acme",
        added(usage_windows, number=4, start=NOON + 100 * HOUR, computing=0, serverless=0),
        (0, "windows"),
    ),
    # Refund totals of charges.
    "refund total": ("acme", changed(refunds, "amount", plus(-1), sequence=3), None),
    "refund total missing": ("acme", removed(refunds, sequence=6), None),
    "refund total too many": ("acme", added(refunds, sequence=9, amount=1, last_create_time=NOON), None),
    "refund total of another charge": ("acme", changed(refunds, "sequence", to(4), sequence=3), None),
    "time of a refund": ("acme", changed(refunds, "last_create_time", plus(1), sequence=6), None),
    # Stored answers to requests.
    "answer": ("acme", changed(requests, "sequence", plus(-1), request_id="r-9"), (9, "answer to request r-9")),
    "answer missing": ("acme", removed(requests, request_id="r-9"), (9, "answer to request r-9")),
    "answer to another request": (
        "acme",
        changed(requests, "request_id", to("r-8"), request_id="r-9"),
        (9, "answer to request r-9"),
    ),
    "answer too many": (
        "acme",
        added(requests, request_id="r-1", fingerprint=b"", sequence=1),
        (0, "answers to requests"),
    ),
    "answer to a transfer": (
        "payer",
        changed(requests, "response", flipped(40), request_id="t-2"),
        (2, "answer to request t-2"),
    ),
    "answer to a transfer missing": ("payer", removed(requests, request_id="t-2"), (2, "answer to request t-2")),
}


@pytest.mark.asyncio(loop_scope="module")
async def test_untouched_books_have_no_divergence(shared: Ledger) -> None:
    """Untouched books have no divergence, one account at a time or all at once."""
    assert await shared.client.verify() == []
    for account_id in shared.numbers:
        assert await shared.client.verify(f"accounts/{account_id}") == []


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("case", CASES)
async def test_tampering_is_found(shared: Ledger, case: str) -> None:
    """Every tampering is found, and reported with its account and place."""
    account_id, tamper, where = CASES[case]
    async with writing(shared.server.book.database) as connection:
        await tamper(connection, shared.numbers[account_id])
    try:
        findings = await shared.client.verify()
        alone = await shared.client.verify(f"accounts/{account_id}")
        sound = await shared.client.verify("accounts/sound")
    finally:
        await shared.restore()
    assert {finding.account for finding in findings} == {f"accounts/{account_id}"}
    assert findings == alone
    assert sound == []
    assert all(finding.expected != finding.found for finding in findings)
    if where is not None:
        assert where in {(finding.sequence, finding.subject) for finding in findings}
    assert await shared.client.verify() == []


@pytest.mark.asyncio(loop_scope="module")
async def test_renamed_account_is_reported_once(shared: Ledger) -> None:
    """A renamed account is reported once, though every transaction has the old name."""
    database, number = shared.server.book.database, shared.numbers["acme"]

    async def rename(account_id: str) -> None:
        async with writing(database) as connection:
            await connection.execute(update(accounts).where(accounts.c.number == number).values(id=account_id))

    await rename("emca")
    try:
        findings = await shared.client.verify()
    finally:
        await rename("acme")
    assert [(each.account, each.sequence, each.subject) for each in findings] == [
        ("accounts/emca", 1, "account in name")
    ]
    assert (findings[0].expected, findings[0].found) == ("emca", "acme")


@pytest.mark.asyncio(loop_scope="module")
async def test_several_divergences_are_reported(shared: Ledger) -> None:
    """Divergences of several accounts are all reported, and an early one isn't repeated at later rows."""
    async with writing(shared.server.book.database) as connection:
        for account_id, tamper in (
            ("acme", changed(transactions, "hash", flipped(0), sequence=2)),
            ("acme", changed(transactions, "category", to("x"), sequence=9)),
            ("other", changed(account_states, "balance", plus(1))),
        ):
            await tamper(connection, shared.numbers[account_id])
    try:
        findings = await shared.client.verify()
    finally:
        await shared.restore()
    places = [(finding.account, finding.sequence, finding.subject) for finding in findings]
    assert ("accounts/acme", 2, "hash") in places
    assert ("accounts/acme", 9, "category") in places
    assert ("accounts/other", 0, "balance") in places
    # A hash covers its predecessor's, so the next row differs too, but no later one.
    assert {sequence for account, sequence, _ in places if account == "accounts/acme"} <= {2, 3, 9}


async def test_verification_needs_the_scope_admin(server: Server, client: Client, admin: Client) -> None:
    """Verification needs the scope `admin`, and reveals nothing of other tenants or of accounts outside a binding."""
    for account_id in ("acme", "other"):
        await client.create_account(account_id)
        await client.post(account_id, GRANT, "1")
    for account in ("", "accounts/acme", "accounts/unknown"):
        refusal = await refusal_of(client.verify(account))
        assert refusal.verdict == ("PERMISSION_DENIED", "SCOPE_MISSING")
        assert refusal.metadata == {"scope": "admin"}
    assert (await refusal_of(admin.verify("accounts/unknown"))).verdict == ("NOT_FOUND", "ACCOUNT_NOT_FOUND")
    for account in ("accounts/-", "acme", "accounts/acme/transactions"):
        refusal = await refusal_of(admin.verify(account))
        assert (*refusal.verdict, *refusal.fields) == ("INVALID_ARGUMENT", "FIELD_INVALID", "account")
    tenant_number = await server.book.credentials.tenant_number("house")
    assert tenant_number is not None
    bound = await server.client(tenant_number, account_id="acme", scopes={"admin"})
    assert await bound.verify("accounts/acme") == []
    for account in ("", "accounts/other"):
        assert (await refusal_of(bound.verify(account))).verdict == ("PERMISSION_DENIED", "ACCOUNT_NOT_PERMITTED")
    async with writing(server.book.database) as connection:
        await connection.execute(update(account_states).values(balance=0))
    stranger = await server.client(await server.create_tenant("stranger"), scopes={"admin"})
    await stranger.create_account("theirs")
    assert await stranger.verify() == []
    assert (await refusal_of(stranger.verify("accounts/acme"))).verdict == ("NOT_FOUND", "ACCOUNT_NOT_FOUND")
    assert {finding.account for finding in await admin.verify()} == {"accounts/acme", "accounts/other"}


async def test_concurrent_verifications_are_bounded(book: Book) -> None:
    """At most IN_FLIGHT_MAX verifications run at once; another one gets TOO_BUSY until one has ended."""
    number = await book.credentials.create_tenant(slug="t", uid="u", display_name="T", create_time=1)
    caller = Caller(number, "u", "key", scopes=frozenset({"admin"}))
    await book.accounts.create(
        caller, AccountRecord("acme", Account.SPACE, "", 0, b""), Request("", b""), hour_anchor=0
    )
    in_flight = [book.verification.verify(caller, None) for _ in range(IN_FLIGHT_MAX)]
    for each in in_flight:
        await anext(each)
    with pytest.raises(TooBusy):
        await anext(book.verification.verify(caller, None))
    await in_flight.pop().aclose()
    assert [event async for event in book.verification.verify(caller, "acme")] == [Progress(1, is_done=True)]
    await in_flight.pop().aclose()


async def test_long_books_are_verified_in_parts(server: Server, client: Client, admin: Client, clock: Clock) -> None:
    """Books that are read in parts are verified across the parts' boundaries, and each part's faults are found."""
    account = await client.create_account("acme")
    grant = Transaction(kind=GRANT, category="x", amount="3")
    charge = Transaction(kind=CHARGE, category="computing", amount="-1", usage=Usage())
    batch = [CreateTransactionRequest(transaction=each) for each in [grant, charge] * 50]
    for _ in range(21):
        await client.ledger.BatchCreateTransactions(
            BatchCreateTransactionsRequest(parent="accounts/acme", requests=batch), metadata=client.metadata
        )
        # Spends the lots.
        await client.post("acme", CHARGE, "-90")
        clock.advance(3600)
    assert await admin.verify() == []
    async with writing(server.book.database) as connection:
        for tamper in (
            changed(transactions, "category", to("y"), sequence=1000),
            changed(transactions, "category", to("y"), sequence=1001),
            removed(lots, number=999),
            removed(usage_windows, number=10),
            changed(usage_windows, "computing", plus(1), number=20),
            removed(transactions, sequence=2000),
        ):
            await tamper(connection, account.number)
    places = {(finding.sequence, finding.subject) for finding in await admin.verify()}
    assert {
        (1000, "category"),
        (1001, "category"),
        (0, "window 10"),
        (0, "window 20"),
        (2001, "sequence"),
    } <= places
    assert "lot 999" in {subject for _, subject in places}


async def test_verification_during_postings(client: Client, admin: Client) -> None:
    """Each account is verified as of one instant, whatever is posted meanwhile."""
    for account_id in ("acme", "other"):
        await client.create_account(account_id)
        await client.post(account_id, GRANT, "1000")
    is_done = asyncio.Event()

    async def keep_posting(account_id: str) -> None:
        while not is_done.is_set():
            await client.post(account_id, CHARGE, "-1", category="computing", usage=Usage())
            await client.post(account_id, GRANT, "1")

    posting = [asyncio.create_task(keep_posting(account_id)) for account_id in ("acme", "other") for _ in range(2)]
    try:
        for _ in range(10):
            assert await admin.verify() == []
    finally:
        is_done.set()
        await asyncio.gather(*posting)
    assert await admin.verify() == []


async def run(*arguments: str) -> tuple[int, list[str], str]:
    """Runs the `daybook` command; returns its exit status, the lines of its stdout, and its stderr."""
    process = await asyncio.create_subprocess_exec(
        DAYBOOK, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), timeout=60)
    assert process.returncode is not None
    return process.returncode, out.decode().splitlines(), err.decode()


async def test_command(tmp_path: Path, clock: Clock) -> None:
    """`daybook verify` exits with 0 if there is no divergence, else with 1 and a line for each, of every tenant."""
    database_url = f"sqlite+aiosqlite:///{tmp_path}/daybook.db"
    async with (
        open_book(database_url, clock) as book,
        serving(book, Settings(port=0)) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        server = Server(book, channel)
        client = await server.client(await server.create_tenant("house"))
        await fill(client, clock)
        stranger = await server.client(await server.create_tenant("stranger"))
        theirs = await stranger.create_account("theirs")
        await stranger.post("theirs", GRANT, "1")
        acme = await client.ledger.GetAccount(GetAccountRequest(name="accounts/acme"), metadata=client.metadata)
        other = acme.number + 1
    status, lines, _ = await run("verify", "--database-url", database_url)
    assert (status, lines) == (0, ["7 accounts, 19 transactions, 0 divergences"])
    database = Database(database_url)
    async with writing(database) as connection:
        await changed(transactions, "category", to("other"), sequence=6)(connection, acme.number)
        await changed(account_states, "last_create_time", plus(1))(connection, theirs.number)
        await connection.execute(delete(accounts).where(accounts.c.id == "other"))
        await connection.execute(
            insert(usage_windows).values(account_number=theirs.number + 5, number=1, start=0, computing=0, serverless=0)
        )
    await database.close()
    status, lines, errors = await run("verify", "--database-url", database_url)
    assert status == 1
    assert lines[:-1] == [
        "accounts/acme 6 category: expected test, found other",
        f"accounts/{other} 0 account: expected a row of accounts, found none",
        f"accounts/theirs 0 last create_time: expected {clock.now}, found {clock.now + 1}",
        f"accounts/{theirs.number + 5} 0 account: expected a row of accounts, found none",
    ]
    assert lines[-1] == "6 accounts, 17 transactions, 4 divergences"
    assert "Traceback" not in errors


def test_every_column_is_tampered_with() -> None:
    """CASES change every column of the books except the keys."""
    books = (account_states, transactions, lots, refunds, usage_windows, requests)
    columns = {f"{table.name}.{column.name}" for table in books for column in table.columns if not column.primary_key}
    # import_time only delays the sweep. counted_sequence only says that two other columns are up
    # to date. fingerprint is computed from the request, which isn't stored.
    assert columns - TAMPERED == {
        "account_states.import_time",
        "account_states.counted_sequence",
        "requests.fingerprint",
    }
