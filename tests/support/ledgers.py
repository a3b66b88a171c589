"""A small ledger, for tests that serve it from other processes."""

from __future__ import annotations

from collections.abc import Collection

from daybook.v1.account_pb2 import Account

from server.book import Book, open_book
from server.ledger.access import Caller, new_api_key
from server.ledger.accounts import AccountRecord
from server.ledger.idempotency import Request

ACCOUNT_IDS = ("a", "b", "c", "d", "e")


async def create_key(database_url: str, scopes: Collection[str]) -> str:
    """Creates the tenant `house` in an empty database; returns a key of the tenant."""
    async with open_book(database_url) as book:
        _, key = await _create_key(book, scopes)
        return key


async def prepare(database_url: str) -> str:
    """Creates the tenant `house` and its accounts in an empty database; returns a key with the scope `admin`."""
    async with open_book(database_url) as book:
        number, key = await _create_key(book, {"admin"})
        caller = Caller(number, "u", "")
        for account_id in ACCOUNT_IDS:
            record = AccountRecord(account_id, Account.SPACE, "", 20_000_000 if account_id == "a" else 0, b"")
            await book.accounts.create(caller, record, Request("", b""), hour_anchor=None)
        return key


async def _create_key(book: Book, scopes: Collection[str]) -> tuple[int, str]:
    """Creates the tenant `house`; returns its number and a key of the tenant."""
    now, key = book.clock(), new_api_key(book.random_bytes)
    number = await book.credentials.create_tenant(slug="house", uid="u", display_name="House", create_time=now)
    await book.credentials.create_api_key(
        key_id=key.key_id,
        secret_hash=key.secret_hash,
        tenant_number=number,
        account_number=None,
        create_time=now,
        scopes=scopes,
    )
    return number, key.text
