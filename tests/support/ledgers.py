"""A small ledger for tests that serve it from other processes."""

from __future__ import annotations

from daybook.v1.account_pb2 import Account

from server.book import open_book
from server.ledger.access import Caller, new_api_key
from server.ledger.accounts import AccountRecord
from server.ledger.idempotency import Request

ACCOUNT_IDS = ("a", "b", "c", "d", "e")


async def prepare(database_url: str) -> str:
    """A ledger with a tenant and its accounts; gives a key."""
    async with open_book(database_url) as book:
        number = await book.credentials.create_tenant(slug="t", uid="u", display_name="T", create_time=book.clock())
        caller = Caller(number, "u", "")
        for account_id in ACCOUNT_IDS:
            record = AccountRecord(account_id, Account.SPACE, "", 20_000_000 if account_id == "a" else 0, b"")
            await book.accounts.create(caller, record, Request("", b""), hour_anchor=None)
        key = new_api_key(book.random_bytes)
        await book.credentials.create_api_key(
            key_id=key.key_id,
            secret_hash=key.secret_hash,
            tenant_number=number,
            account_number=None,
            create_time=book.clock(),
            scopes=["admin"],
        )
        return key.text
