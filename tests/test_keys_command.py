"""`daybook keys`, `tenants` and `token-keys`: an operator creates, lists, revokes and rotates."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
from daybook.v1.account_pb2 import Account
from typer.testing import Result

from server.book import Book, open_book
from server.cli import keys, tenants
from server.ledger.access import SUFFICIENT, ApiKeyRecord, Caller
from server.ledger.accounts import AccountRecord
from server.ledger.errors import DaybookError
from server.ledger.idempotency import Request
from server.ledger.instants import HOUR, SECOND, Instant, parse
from server.ledger.names import account_name
from server.transport.auth import Authenticator
from tests.support.command_line import invoke

Answer = TypeVar("Answer")


class Operator:
    """Runs commands on the database of one test, with the tenant `house` and its account `acme`."""

    def __init__(self, database_url: str) -> None:
        self.database_url = database_url

    def on_book(self, work: Callable[[Book], Awaitable[Answer]]) -> Answer:
        """Runs a coroutine with the operator's ledger. Returns its result."""

        async def opened() -> Answer:
            async with open_book(self.database_url) as book:
                return await work(book)

        return asyncio.run(opened())

    def run(self, *arguments: str) -> Result:
        """Runs `daybook keys`."""
        return invoke("keys", *arguments, "--database-url", self.database_url)

    def printed(self, *arguments: str) -> list[str]:
        """Runs `daybook keys`, which must succeed. Returns its lines of output."""
        result = self.run(*arguments)
        assert (result.exit_code, result.stderr) == (0, ""), result.output
        return result.stdout.splitlines()

    def create(self, *arguments: str) -> str:
        """Creates a key."""
        (text,) = self.printed("create", "--tenant", "house", *arguments)
        return text

    def record(self, text: str) -> ApiKeyRecord:
        """Returns the stored record of a key."""
        record = self.on_book(lambda book: book.credentials.api_key(text.partition(".")[0]))
        assert record is not None
        return record

    def is_valid(self, text: str) -> bool:
        """Whether a key authenticates."""

        async def ask(book: Book) -> bool:
            try:
                await Authenticator(book.credentials, book.clock, book.api_key_uses.note).authenticate(
                    [("x-api-key", text)]
                )
            except DaybookError:
                return False
            return True

        return self.on_book(ask)


@pytest.fixture
def operator(tmp_path: Path) -> Operator:
    """An operator of a new ledger."""
    operator = Operator(f"sqlite+aiosqlite:///{tmp_path}/daybook.db")

    async def create_tenants(book: Book) -> None:
        for slug in ("house", "neighbour"):
            number = await book.credentials.create_tenant(slug=slug, uid=slug, display_name=slug, create_time=1)
            record = AccountRecord(id="acme", kind=Account.SPACE, display_name="", credit_limit=0, profile=b"")
            await book.accounts.create(Caller(number, slug, "test"), record, Request("", b""), hour_anchor=None)

    operator.on_book(create_tenants)
    return operator


def test_key_without_options_has_the_defaults(operator: Operator) -> None:
    """By default a key has the scopes `transactions` and `accounts`, for the whole tenant, without expiry."""
    text = operator.create()
    record = operator.record(text)
    assert (record.scopes, record.account_id, record.display_name) == ("transactions accounts", None, "")
    assert (record.expire_time, record.revoke_time, record.last_use_time) == (None, None, None)
    assert operator.is_valid(text)
    assert "Without --scope it has `transactions` and `accounts`" in operator.run("create", "--help").stdout


def test_key_has_the_given_options(operator: Operator) -> None:
    """A key has the given scopes, account, name and expiry."""
    text = operator.create(
        *("--scope", "accounts.readonly", "--scope", "transactions.readonly", "--scope", "accounts.readonly"),
        *("--account", "acme", "--display-name", "For reports", "--expire-time", "2999-01-31T12:00:00+01:00"),
    )
    record = operator.record(text)
    assert (record.scopes, record.account_id) == ("transactions.readonly accounts.readonly", "acme")
    assert (record.display_name, record.expire_time) == ("For reports", parse("2999-01-31T11:00:00Z"))


@pytest.mark.parametrize(
    ("span", "length"), [("90s", 90 * SECOND), ("5m", 300 * SECOND), ("2h", 2 * HOUR), ("1d", 24 * HOUR)]
)
def test_ttl_sets_the_expiry(operator: Operator, span: str, length: Instant) -> None:
    """--ttl is a number with a unit, counted from the creation."""
    record = operator.record(operator.create("--ttl", span))
    assert record.expire_time == record.create_time + length


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (("create", "--tenant", "absent"), 1, "there is no tenant 'absent'"),
        (("create", "--tenant", "house", "--account", "nothing"), 1, account_name("nothing")),
        (("create", "--tenant", "house", "--scope", "everything"), 2, f"the scopes are {', '.join(SUFFICIENT)}"),
        (("create", "--tenant", "house", "--display-name", "x" * 256), 2, "255"),
        (("create", "--tenant", "house", "--ttl", "90"), 2, "90d"),
        (("create", "--tenant", "house", "--ttl", "0s"), 2, "between 1s and 36525d"),
        (("create", "--tenant", "house", "--ttl", "36526d"), 2, "between 1s and 36525d"),
        (("create", "--tenant", "house", "--ttl", "1d", "--expire-time", "2999-01-01T00:00:00Z"), 2, "not both"),
        (("create", "--tenant", "house", "--expire-time", "tomorrow"), 2, "2025-01-31T12:00:00Z"),
        (("create", "--tenant", "house", "--expire-time", "2001-01-01T00:00:00Z"), 1, "must be in the future"),
        (("list", "--tenant", "absent"), 1, "there is no tenant 'absent'"),
        (("revoke", "nothing", "--tenant", "house"), 1, "apiKeys/nothing is not found"),
        (("rotate", "nothing", "--tenant", "house"), 1, "apiKeys/nothing is not found"),
        (("rotate", "nothing", "--tenant", "house", "--grace-period", "31d"), 2, "at most 30d"),
    ],
)
def test_invalid_arguments_are_refused(
    operator: Operator, arguments: tuple[str, ...], exit_code: int, words: str
) -> None:
    """An invalid argument ends the command with a message about it, and no key is created."""
    result = operator.run(*arguments)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    # Boxes and line breaks are layout.
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert len(operator.printed("list", "--tenant", "house")) == 1


def test_tenants_are_listed(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list has every tenant, across all pages, with the uid that its creation printed."""
    monkeypatch.setattr(tenants, "TENANTS_AT_ONCE", 2)

    def run(*arguments: str) -> Result:
        return invoke("tenants", *arguments, "--database-url", operator.database_url)

    uids = {slug: run("create", slug, "--display-name", f"The\t{slug}").stdout.strip() for slug in ("a", "b", "c")}
    heading, *rows = [line.split("\t") for line in run("list").stdout.splitlines()]
    assert heading == ["slug", "uid", "created", "name"]
    assert [(slug, uid, name) for slug, uid, _, name in rows][-3:] == [
        (slug, uid, f"The {slug}") for slug, uid in uids.items()
    ]
    assert all(parse(created) for _, _, created, _ in rows)
    again = run("create", "b")
    assert (again.exit_code, again.stderr) == (1, f"daybook: a tenant 'b' exists already; its uid is {uids['b']}\n")


def test_keys_are_listed(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list has every key of the tenant, newest first, across all pages, without secrets."""
    monkeypatch.setattr(keys, "KEYS_AT_ONCE", 2)
    texts = [operator.create("--display-name", f"key\t{number}") for number in range(5)]
    operator.printed("create", "--tenant", "neighbour")
    operator.printed("revoke", texts[0].partition(".")[0], "--tenant", "house")
    assert operator.is_valid(texts[1])
    lines = operator.printed("list", "--tenant", "house")
    header, *rows = [line.split("\t") for line in lines]
    assert header == ["id", "scopes", "account", "created", "expires", "revoked", "last used", "name"]
    assert [row[0] for row in rows] == [text.partition(".")[0] for text in reversed(texts)]
    assert [row[7] for row in rows] == [f"key {number}" for number in reversed(range(5))]
    assert [row[5] != "-" for row in rows] == [False, False, False, False, True]
    assert [row[6] != "-" for row in rows] == [False, False, False, True, False]
    assert not [text for text in texts if text.partition(".")[2] in "".join(lines)]


def test_key_is_revoked(operator: Operator) -> None:
    """A revoked key is invalid. A key of another tenant can't be revoked."""
    text = operator.create()
    key_id = text.partition(".")[0]
    assert operator.run("revoke", key_id, "--tenant", "neighbour").exit_code == 1
    assert operator.is_valid(text)
    (line,) = operator.printed("revoke", key_id, "--tenant", "house")
    assert line.startswith(f"{key_id} was revoked at 2")
    assert not operator.is_valid(text)
    assert operator.printed("revoke", key_id, "--tenant", "house") == [line]


def test_key_is_rotated(operator: Operator) -> None:
    """A rotation prints the key with its new secret. The old secret is valid only during the grace period."""
    old = operator.create()
    key_id = old.partition(".")[0]
    (new,) = operator.printed("rotate", key_id, "--tenant", "house", "--grace-period", "1h")
    assert new.partition(".")[0] == key_id
    assert (operator.is_valid(old), operator.is_valid(new)) == (True, True)
    (newest,) = operator.printed("rotate", key_id, "--tenant", "house")
    assert [operator.is_valid(each) for each in (old, new, newest)] == [False, False, True]


def test_page_token_key_is_rotated(operator: Operator) -> None:
    """Each rotation adds a key for page tokens, and prints no secret."""
    operator.on_book(lambda book: book.credentials.ensure_token_key(b"k" * 32, 1))
    for count in (2, 3):
        result = invoke("token-keys", "rotate", "--database-url", operator.database_url)
        keys = operator.on_book(lambda book: book.credentials.token_keys())
        assert (result.exit_code, len(keys), len({each.key for each in keys})) == (0, count, count)
        assert all(each.key.hex() not in result.output for each in keys)
