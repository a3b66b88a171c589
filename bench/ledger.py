"""The ledgers that are measured, told to the database as an import of history is."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from daybook.v1.account_pb2 import Account, Company, User
from daybook.v1.transaction_pb2 import Booking, Transaction, Usage

from bench.load import LoadFailed
from server.book import Book, open_book
from server.ledger.access import ADMIN, Caller, new_api_key
from server.ledger.accounts import AccountRecord
from server.ledger.idempotency import Request
from server.ledger.instants import HOUR, SECOND, Instant, parse
from server.transport.validation import read_profile, read_transaction
from server.usecases.imports import HistoryMessage, PastTransaction
from server.usecases.transactions import NewTransaction

DAYBOOK = str(Path(sys.executable).parent / "daybook")
"""The command of this interpreter's environment."""
MONTH = "2025-10"
ORGANIZATION = "example"
SPACE = "spcExample"
USER = "266"
NETWORK = str(uuid.uuid5(uuid.NAMESPACE_URL, "daybook:bench:network"))
COMPANY = str(uuid.uuid5(uuid.NAMESPACE_URL, "daybook:bench:company"))
LOCATION = str(uuid.uuid5(uuid.NAMESPACE_URL, "daybook:bench:location"))
MEMBERSHIP = str(uuid.uuid5(uuid.NAMESPACE_URL, "daybook:bench:membership"))
WRITERS = tuple(f"writer-{number}" for number in range(8))
"""Accounts that the figures of writing charge."""

FACADE_ROWS = 2000
"""How many transactions an account of one facade has: many pages, of which each costs the same."""
GROUP = 1000
_START = parse("2025-10-01T00:00:00Z")
_SEEDED = "bench"
_WEALTH = "1000000000"
_NEVER_REPEATED = Request("", b"")

PastEvent = tuple[Instant, str, Transaction]
"""When, on which account, and what."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """A database with rows, and keys for it."""

    database_url: str
    key: str
    """Of the tenant, for everything."""
    user_key: str = ""
    """Bound to USER; only where there is one."""
    network_key: str = ""
    """Of the network, for everything; only where there is one."""


def authorization(key: str) -> dict[str, str]:
    """The header that lets a caller in."""
    return {"authorization": f"Bearer {key}"}


def build(database_url: str, rows: int) -> Ledger:
    """Fills an empty database: an organization with so many transactions, some for each facade, and writers."""
    return asyncio.run(_build(database_url, rows))


async def _build(database_url: str, rows: int) -> Ledger:
    async with open_book(database_url) as book:
        tenant = await _create_tenant(book, "bench", str(uuid.uuid5(uuid.NAMESPACE_URL, "daybook:bench")))
        for account_id, kind in ((ORGANIZATION, Account.ORGANIZATION), (SPACE, Account.SPACE), (USER, Account.USER)):
            await _create_account(book, tenant, account_id, Account(kind=kind))
        for account_id in WRITERS:
            await _create_account(book, tenant, account_id, Account(kind=Account.USER))
            await _import(book, tenant, [(_START, account_id, _grant())])
        few = FACADE_ROWS
        await _import(book, tenant, _history(ORGANIZATION, rows, 60 * SECOND // max(1, rows // 40_000), _inference))
        # A facade's first page is full even of a short history, and all of it lies in one month.
        await _import(book, tenant, _history(SPACE, few, 20 * 60 * SECOND, _ai_chat))
        await _import(book, tenant, _history(USER, few, HOUR // 3, _computing))
        network = await _create_tenant(book, "bench-network", NETWORK)
        company = Company(title="Example Company", location=LOCATION)
        await _create_account(book, network, COMPANY, Account(kind=Account.COMPANY, company=company))
        await _import(book, network, _history(COMPANY, few, HOUR // 4, _booking))
        return Ledger(
            database_url,
            key=await _create_key(book, tenant),
            user_key=await _create_key(book, tenant, USER),
            network_key=await _create_key(book, network),
        )


def seed(database_url: str, rows: int) -> Ledger:
    """Fills an empty database with made-up history of `rows` transactions, by `daybook seed`."""
    command = [DAYBOOK, "seed", "--database-url", database_url, "--rows", str(rows), "--tenant", _SEEDED]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise LoadFailed(f"daybook seed ended with {done.returncode}:\n{done.stderr}")
    return asyncio.run(_open_seeded(database_url))


async def _open_seeded(database_url: str) -> Ledger:
    async with open_book(database_url) as book:
        number = await book.credentials.tenant_number(_SEEDED)
        assert number is not None, "it was made a moment ago"
        return Ledger(database_url, key=await _create_key(book, Caller(number, "", "bench")))


async def _create_tenant(book: Book, slug: str, uid: str) -> Caller:
    number = await book.credentials.create_tenant(slug=slug, uid=uid, display_name=slug, create_time=book.clock())
    return Caller(number, uid, "bench", scopes=frozenset({ADMIN}))


async def _create_account(book: Book, caller: Caller, account_id: str, account: Account) -> None:
    record = AccountRecord(
        id=account_id, kind=account.kind, display_name="", credit_limit=0, profile=read_profile(account)
    )
    await book.accounts.create(caller, record, _NEVER_REPEATED, hour_anchor=_START)


async def _create_key(book: Book, caller: Caller, account_id: str | None = None) -> str:
    key = new_api_key(book.random_bytes)
    await book.credentials.create_api_key(
        key_id=key.key_id,
        secret_hash=key.secret_hash,
        tenant_number=caller.tenant_number,
        account_number=None
        if account_id is None
        else await book.account_store.number(caller.tenant_number, account_id),
        create_time=book.clock(),
        scopes=(ADMIN,),
    )
    return key.text


async def _import(book: Book, caller: Caller, events: Iterable[PastEvent]) -> None:
    async def messages() -> AsyncIterator[HistoryMessage]:
        rest = iter(events)
        while group := [_past(*event) for event in islice(rest, GROUP)]:
            yield HistoryMessage(group, byte_count=0)

    await book.imports.import_history(caller, messages())


def _past(time: Instant, account_id: str, transaction: Transaction) -> PastTransaction:
    draft, details = read_transaction(transaction)
    return PastTransaction(NewTransaction(account_id, draft, details, _NEVER_REPEATED), time)


def _history(account_id: str, rows: int, step: Instant, event: Callable[[int], Transaction]) -> Iterator[PastEvent]:
    """A grant, and then so many transactions that one follows the other in steps."""
    for number in range(rows):
        yield _START + number * step, account_id, event(number) if number else _grant()


def _grant() -> Transaction:
    return Transaction(kind=Transaction.GRANT, category="purchase", amount=_WEALTH, description="Top-up")


def _inference(number: int) -> Transaction:
    return Transaction(
        kind=Transaction.CHARGE,
        category="inference",
        amount=f"-{1 + number % 9}",
        description="Evaluation run",
        usage=Usage(
            model=("example-large", "example-small")[number % 2],
            input_tokens=1800 + number % 997,
            output_tokens=420 + number % 101,
            cost_usd="0.0125",
        ),
    )


def _ai_chat(number: int) -> Transaction:
    return Transaction(
        kind=Transaction.CHARGE,
        category="ai_chat",
        amount=f"-0.{1 + number % 9}",
        creator=User(id="usrExample", name="Example", photo_uri="https://example.com/avatars/example.png"),
        usage=Usage(model="example-large"),
    )


def _computing(number: int) -> Transaction:
    return Transaction(
        kind=Transaction.CHARGE, category="computing", amount=f"-0.{1 + number % 9}", usage=Usage(model="RTX-A6000")
    )


def _booking(number: int) -> Transaction:
    member = User(id=str(uuid.uuid5(uuid.NAMESPACE_URL, "daybook:bench:member")), name="Member", membership=MEMBERSHIP)
    labels: Mapping[str, str] = {"location": LOCATION, "membership": MEMBERSHIP, "company": COMPANY}
    return Transaction(
        kind=Transaction.CHARGE,
        category="booking",
        amount=f"-{1 + number % 4}.5",
        creator=member,
        owner=member,
        labels=labels,
        booking=Booking(id=f"booking-{number}", resource=Booking.Resource(id="room", title="Small meeting room")),
    )
