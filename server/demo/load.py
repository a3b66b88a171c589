"""Loads the stories into an empty ledger."""

from __future__ import annotations

from random import Random
from uuid import UUID

import structlog
from daybook.v1.transaction_pb2 import Transaction

from server.book import Book, open_book
from server.config import CannotStart
from server.demo import dreadnode, nebulablock, spacebring, teable, teams
from server.demo.story import Event, Refund, Story, Transfer
from server.ledger import money
from server.ledger.access import DEFAULT_SCOPES, Caller, hash_secret
from server.ledger.accounts import AccountRecord
from server.ledger.idempotency import Request
from server.ledger.instants import Instant
from server.transport.validation import read_profile, read_transaction
from server.usecases.transactions import NewTransaction, Transactions

log = structlog.get_logger(__name__)

SECRET = "public"  # noqa: S105  # the demo is public
"""The secret of every demo key."""
STORIES = (teable.STORY, nebulablock.STORY, spacebring.STORY, dreadnode.STORY, teams.STORY)

_SEED = 20241010
_NO_REQUEST = Request("", b"")


class _Clock:
    """A clock with the time of the current event."""

    now: Instant = 0

    def __call__(self) -> Instant:
        return self.now


async def load(database_url: str) -> None:
    """Loads the demo into an empty database; does nothing if the demo is complete.

    Raises CannotStart for a database with other data.
    """
    clock = _Clock()
    async with open_book(database_url, clock, Random(_SEED).randbytes) as book:
        last_key = list(STORIES[-1].keys)[-1]
        if await book.credentials.api_key(last_key) is not None:
            return
        if await book.credentials.has_tenant():
            raise CannotStart(
                "demo data needs an empty database: this one holds other data, a demo of another version, "
                "or one whose loading was interrupted"
            )
        for story in STORIES:
            await _load_story(book, clock, story)
            log.info("demo data loaded", tenant=story.slug, events=len(story.events) + len(story.refunds_and_transfers))


async def _post(
    transactions: Transactions, caller: Caller, event: Event | Refund | Transfer, named: dict[str, UUID]
) -> None:
    match event:
        case Event(account_id=account_id):
            draft, details = read_transaction(event.transaction)
            body = await transactions.create(caller, NewTransaction(account_id, draft, details, _NO_REQUEST))
            named[event.name] = UUID(Transaction.FromString(body).uid)
        case Refund(account_id=account_id, details=details):
            amount = money.parse(event.amount)
            await transactions.refund(caller, account_id, named[event.charge], amount, details, _NO_REQUEST)
        case Transfer(source_id=source, destination_id=destination, details=details):
            amount = money.parse(event.amount)
            await transactions.transfer(caller, source, destination, amount, details, _NO_REQUEST)


async def _load_story(book: Book, clock: _Clock, story: Story) -> None:
    clock.now = story.start
    tenant_number = await book.credentials.create_tenant(
        slug=story.slug, uid=story.uid, display_name=story.display_name, create_time=clock.now, demo=True
    )
    caller = Caller(tenant_number, story.uid, "demo")
    for account_id, account in story.accounts.items():
        record = AccountRecord(
            id=account_id,
            kind=account.kind,
            display_name=account.display_name,
            credit_limit=0,
            profile=read_profile(account),
        )
        await book.accounts.create(caller, record, _NO_REQUEST, hour_anchor=story.start)
    named: dict[str, UUID] = {}
    for event in sorted([*story.events, *story.refunds_and_transfers], key=lambda event: event.time):
        clock.now = event.time
        await _post(book.transactions, caller, event, named)
    # Posts the expirations of accounts without later transactions.
    await book.expirations.sweep()
    for key_id, bound_to in story.keys.items():
        await book.credentials.create_api_key(
            key_id=key_id,
            secret_hash=hash_secret(SECRET),
            tenant_number=tenant_number,
            account_number=await book.account_store.number(tenant_number, bound_to) if bound_to else None,
            create_time=story.start,
            scopes=story.narrow_keys.get(key_id, DEFAULT_SCOPES),
        )
