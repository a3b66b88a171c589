"""Answers and logs, even at debug level, have no secrets, tokens, SQL, passwords or paths."""

from __future__ import annotations

import asyncio
import base64
import json
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy
from daybook.v1.account_pb2 import Account, User
from daybook.v1.admin_service_pb2 import CreateApiKeyRequest, RotateApiKeyRequest
from daybook.v1.admin_service_pb2_grpc import AdminStub
from daybook.v1.api_key_pb2 import ApiKey
from daybook.v1.ledger_service_pb2 import (
    CreateAccountRequest,
    CreateTransactionRequest,
    GetTransactionRequest,
    ListAccountsRequest,
    ListTransactionsRequest,
)
from daybook.v1.transaction_pb2 import Transaction

from server.book import open_book
from server.ledger.errors import ServiceUnavailable
from server.store.database import Database
from server.store.query import Query
from tests.support.callers import credential, ledger_stub
from tests.support.databases import PostgreSQL
from tests.support.http_client import send
from tests.support.ledgers import create_key
from tests.support.processes import ROOT, Daybook, Ports, run, sqlite_url

PASSWORD = "pass-word-of-the-database"
PERSON = "person-who-is-named"
TOKEN_KEY = bytes(range(100, 132)).hex()
FORBIDDEN_IN_ANSWERS = (
    "Traceback",
    ".py",
    "SELECT",
    "INSERT",
    "UPDATE ",
    "DELETE",
    "sqlite",
    "sqlalchemy",
    "asyncpg",
    "no such table",
)
"""Implementation details that no answer may have."""
FORBIDDEN_IN_LOGS = ("SELECT ", "INSERT ", "UPDATE ", "DELETE ", "[SQL", "[parameters")
"""Parts of SQL statements, which would log stored values."""


class Recorder:
    """Records all answers to callers, and all secrets that were sent or answered."""

    def __init__(self) -> None:
        self.answers: list[str] = []
        self.secrets: set[str] = set()

    def call(self, method: Any, request: object, metadata: Any) -> Any:
        """Calls over gRPC; returns the answer, or None for a refusal."""
        try:
            answer = method(request, metadata=metadata)
        except grpc.RpcError as error:
            refusal: Any = error
            self.answers.append(f"{refusal.code()} {refusal.details()} {refusal.trailing_metadata()!r}")
            return None
        self.answers.append(str(answer))
        return answer

    def ask(self, daybook: Daybook, target: str, headers: dict[str, str]) -> None:
        """Sends a GET over REST."""
        answer = send(daybook.origin, target, headers=headers)
        self.answers.append(f"{answer.status} {answer.headers} {answer.body.decode()}")


def credentials_of(key: str) -> Iterator[tuple[tuple[str, str], ...]]:
    """Metadata with a key in every format, and with invalid keys."""
    key_id, _, secret = key.partition(".")
    for text in (key, f"{key_id}.{secret[::-1]}", f"unknown.{secret}", secret, f"{key} {key}"):
        yield (("authorization", f"Bearer {text}"),)
        yield (("x-api-key", text),)
        yield (("authorization", f"Basic {base64.b64encode(text.replace('.', ':').encode()).decode()}"),)
        yield (("authorization", f"Digest {text}"),)
    yield (("authorization", f"Bearer {key}" + "x" * 5000),)


def corrupt(database: Path) -> None:
    """Makes the database fail in several ways: invalid rows, refused writes, a missing table."""
    with closing(sqlite3.connect(database)) as connection:
        connection.executescript("""
            UPDATE transactions SET body = X'FF', allocations = X'FF';
            CREATE TRIGGER no_keys BEFORE INSERT ON api_keys BEGIN SELECT RAISE(ABORT, 'no more keys'); END;
            CREATE TRIGGER no_rotation BEFORE UPDATE OF secret_hash ON api_keys BEGIN SELECT RAISE(ABORT, 'no'); END;
            CREATE TRIGGER no_accounts BEFORE INSERT ON accounts BEGIN SELECT RAISE(ABORT, 'no more accounts'); END;
            CREATE TRIGGER no_posting BEFORE INSERT ON transactions BEGIN SELECT RAISE(ABORT, 'no more rows'); END;
            ALTER TABLE usage_windows RENAME TO gone;
        """)


def exercise(daybook: Daybook, key: str, recorder: Recorder, *, has_gateway: bool) -> None:
    """Sends valid and invalid credentials and tokens, and calls that fail in different ways."""
    recorder.secrets |= {key.partition(".")[2], key.partition(".")[2][::-1]}
    grant = Transaction(
        kind=Transaction.GRANT, category="test", amount="5", description=PERSON, owner=User(id=PERSON, email=PERSON)
    )
    posting = CreateTransactionRequest(parent="accounts/acme", transaction=grant)
    listing = ListTransactionsRequest(parent="accounts/acme", page_size=1)
    with grpc.insecure_channel(f"127.0.0.1:{daybook.ports.server}") as channel:
        ledger, admin = ledger_stub(channel), AdminStub(channel)  # type: ignore[arg-type]  # as in ledger_stub
        sound = credential(key)
        account = CreateAccountRequest(account_id="acme", account=Account(kind=Account.SPACE))
        recorder.call(ledger.CreateAccount, account, sound)
        posted = [recorder.call(ledger.CreateTransaction, posting, sound) for _ in range(3)]
        token = recorder.call(ledger.ListTransactions, listing, sound).next_page_token
        created = recorder.call(admin.CreateApiKey, CreateApiKeyRequest(api_key=ApiKey(scopes=["accounts"])), sound)
        rotated = recorder.call(admin.RotateApiKey, RotateApiKeyRequest(name=created.api_key.name), sound)
        # The caller may see these answers; later ones may not have the secrets.
        recorder.answers.clear()
        recorder.secrets |= {token, created.key_string.partition(".")[2], rotated.key_string.partition(".")[2]}
        for metadata in credentials_of(key):
            recorder.call(ledger.ListAccounts, ListAccountsRequest(), metadata)
        for wrong in (token[:-1], token[::-1], f"{token}A", TOKEN_KEY):
            listing.page_token = wrong
            recorder.call(ledger.ListTransactions, listing, sound)
        recorder.call(ledger.ListAccounts, ListAccountsRequest(page_token=token), sound)
        corrupt(daybook.folder / "daybook.db")
        recorder.call(ledger.CreateTransaction, posting, sound)
        recorder.call(ledger.CreateAccount, CreateAccountRequest(account_id="b", account=account.account), sound)
        recorder.call(admin.CreateApiKey, CreateApiKeyRequest(api_key=ApiKey(scopes=["accounts"])), sound)
        recorder.call(admin.RotateApiKey, RotateApiKeyRequest(name=created.api_key.name), sound)
        recorder.call(ledger.GetTransaction, GetTransactionRequest(name=posted[0].name, view=2), sound)  # type: ignore[arg-type]
        if has_gateway:
            headers = {"authorization": f"Bearer {key}"}
            for path in (
                f"/v1/accounts/acme/transactions?pageToken={token}",
                f"/api/space/acme/billing/credit-history?month=2024-10&cursor={token}",
                f"/transactions/credits/v1?nextPageToken={token}",
                f"/api/v1/org/acme/credits/transactions?token={token}",
                f"/api/billing/accounts/acme/transactions?token={token}",
                f"/v1/accounts/acme?apiKey={key}",
                f"/nowhere?apiKey={key}",
            ):
                recorder.ask(daybook, path, headers)
        with closing(sqlite3.connect(daybook.folder / "daybook.db")) as connection:
            connection.executescript("ALTER TABLE accounts RENAME TO lost; ALTER TABLE api_keys RENAME TO lost_keys")
        for method, request in (
            (ledger.ListAccounts, ListAccountsRequest()),
            (ledger.CreateAccount, account),
            (ledger.CreateTransaction, posting),
        ):
            recorder.call(method, request, sound)
            recorder.call(method, request, credential(f"unknown.{key.partition('.')[2]}"))


@pytest.mark.parametrize(("command", "log_format"), [("up", "json"), ("serve", "console")])
def test_no_secret_is_answered_or_logged(tmp_path: Path, command: str, log_format: str) -> None:
    """No answer and no log line has a secret or an implementation detail."""
    database, ports, recorder = sqlite_url(tmp_path / "daybook.db"), Ports.free(), Recorder()
    key = asyncio.run(create_key(database, {"admin"}))
    settings = {"DAYBOOK_LOG_LEVEL": "debug", "DAYBOOK_LOG_FORMAT": log_format, "DAYBOOK_TOKEN_KEYS": TOKEN_KEY}
    flags = ports.flags if command == "up" else ports.flags[:2]
    daybook = Daybook.start(
        command, "--database-url", database, *flags, folder=tmp_path, ports=ports, settings=settings
    )
    try:
        daybook.wait_for("gateway" if command == "up" else "serving")
        exercise(daybook, key, recorder, has_gateway=command == "up")
        assert daybook.stop() == 0
    finally:
        daybook.kill()
    logged = daybook.stdout + daybook.stderr
    assert "no more keys" in logged, "failures are logged with the database's message"
    assert "UNAUTHENTICATED" in logged, "every call is logged"
    if log_format == "json":
        assert all(json.loads(line) for line in daybook.stderr.splitlines())
    folders = (str(ROOT), sys.prefix, sys.base_prefix, str(tmp_path))
    found = {
        secret for secret in {*recorder.secrets, TOKEN_KEY, PERSON, *FORBIDDEN_IN_LOGS, *folders} if secret in logged
    }
    assert 'File \\"server/' in logged or 'File "server/' in logged, "tracebacks have paths relative to the project"
    answered = "\n".join(recorder.answers)
    found |= {word for word in {*recorder.secrets, TOKEN_KEY, *FORBIDDEN_IN_ANSWERS, str(tmp_path)} if word in answered}
    assert not found
    assert {"UNAVAILABLE", "INTERNAL", "UNAUTHENTICATED"} <= {
        word for answer in recorder.answers for word in answer.replace(".", " ").split()
    }


URLS = {
    f"postgresql+asyncpg://user:{PASSWORD}@127.0.0.1:1/ledger": "is unavailable",
    f"postgresql+asyncpg://user:{PASSWORD}/@127.0.0.1:1/ledger": "is unavailable",
    f"postgresql+asyncpg://user:{PASSWORD}@[::1/ledger": "can't be read",
    f"postgresql://user:{PASSWORD}@127.0.0.1:1/ledger": "must begin with",
    f"sqlite:///{PASSWORD}.db": "must begin with",
    f"oracle://user:{PASSWORD}@127.0.0.1:1/ledger": "must begin with",
    f"sqlite+aiosqlite:////dev/null/{PASSWORD}/daybook.db": "can't be made",
    PASSWORD: "can't be read",
}
"""Invalid or unusable URLs, each with a part of its error message."""


@pytest.mark.parametrize("url", URLS)
async def test_error_of_an_unusable_url_hides_the_url(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The error of a URL that can't be opened, and the log, have no part of the URL."""
    with pytest.raises((ValueError, ServiceUnavailable), match=URLS[url]) as caught:
        async with open_book(url):
            pass
    output = capfd.readouterr()
    for word in (PASSWORD, "/dev/null"):
        assert word not in f"{caught.value!r} {caught.value} {output.out} {output.err}"


def test_start_with_an_invalid_url_fails_in_one_line(tmp_path: Path) -> None:
    """`daybook serve` with an invalid URL exits with 1 and prints one line without the password."""
    url = f"postgresql+asyncpg://user:{PASSWORD}@[::1/ledger"
    result = run(
        "serve", "--port", "0", "--log-level", "debug", folder=tmp_path, settings={"DAYBOOK_DATABASE_URL": url}
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("daybook: database_url can't be read")
    assert PASSWORD not in result.stderr
    assert result.stderr.count("\n") == 1


async def test_database_that_refuses_the_login_is_unavailable(postgresql: PostgreSQL) -> None:
    """A missing database and a missing role raise ServiceUnavailable, like an unreachable database."""
    for url in (postgresql.url("nowhere"), postgresql.url("postgres").replace("postgres@", f"unknown:{PASSWORD}@")):
        with pytest.raises(ServiceUnavailable) as caught:
            async with open_book(url):
                pass
        assert PASSWORD not in str(caught.value)
        database, anything = Database(url), Query(sqlalchemy.text("SELECT 1"))
        primary = database.primary
        for read in (primary.fetch(anything, {}), primary.transact(str)):
            with pytest.raises(ServiceUnavailable):
                await read
        await database.close()
