"""Configured keys of page tokens: the first seals, all open, and none is ever shown."""

from __future__ import annotations

import base64
from pathlib import Path

import grpc
import pytest
from daybook.v1.ledger_service_pb2 import ListAccountsRequest, ListAccountsResponse
from pydantic import ValidationError

from server.app import serving
from server.book import Book
from server.config import Settings
from server.transport.token_keys import CONFIGURED_KEYS_MAX, parse_token_keys
from tests.support.callers import Client, Server
from tests.support.command_line import invoke
from tests.support.markers import only_sqlite
from tests.support.refusals import refusal_of

OLD, NEW = (bytes([number]) * 31 + b"\xff" for number in (1, 2))


def hexadecimal(*keys: bytes) -> str:
    """Returns keys in the format of the setting."""
    return ",".join(key.hex() for key in keys)


def base64url(key: bytes) -> str:
    """Returns a key as base64url."""
    return base64.urlsafe_b64encode(key).decode().rstrip("=")


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        (OLD.hex(), [OLD]),
        (OLD.hex().upper(), [OLD]),
        (base64url(OLD), [OLD]),
        (base64.urlsafe_b64encode(OLD).decode(), [OLD]),
        (base64.b64encode(OLD).decode(), [OLD]),
        (f"{NEW.hex()},{OLD.hex()}", [NEW, OLD]),
        (f"  {NEW.hex()}\n{base64url(OLD)}\n", [NEW, OLD]),
        (" ".join(bytes([n] * 32).hex() for n in range(CONFIGURED_KEYS_MAX)), None),
    ],
)
def test_keys_are_parsed(text: str, keys: list[bytes] | None) -> None:
    """The setting has one or several keys, in hex or either base64; their order is kept."""
    assert parse_token_keys(text) == (keys or [bytes([n] * 32) for n in range(CONFIGURED_KEYS_MAX)])


WRONG = [
    " , ",
    "secret",
    OLD.hex()[:-2],
    OLD.hex() + "00",
    OLD.hex()[:-1] + "g",
    base64url(OLD[:-1]),
    base64url(OLD + b"1"),
    f"{OLD.hex()},secret",
    f"{OLD.hex()},{base64url(OLD)}",
    " ".join(bytes([n] * 32).hex() for n in range(CONFIGURED_KEYS_MAX + 1)),
    "é" * 43,
]


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_invalid_keys_are_refused(text: str, tmp_path: Path) -> None:
    """Keys of a wrong length, duplicates and too many keys are refused, and the error shows no key."""
    words = text.replace(",", " ").split()
    with pytest.raises(ValidationError, match="token_keys") as caught:
        Settings(token_keys=text)  # type: ignore[arg-type]  # a text, as in the environment
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ValueError, match=r"^token_keys_file: ") as of_file:
        Settings(token_keys_file=tmp_path / "keys").configured_token_keys()
    for word in words:
        assert word not in str(caught.value) + repr(caught.value) + str(of_file.value)


def test_keys_are_read_from_a_file(tmp_path: Path) -> None:
    """A file may have the keys, one per line. The error for a missing or binary file does not show its path."""
    (tmp_path / "keys").write_text(f"{NEW.hex()}\n{OLD.hex()}\n")
    assert Settings(token_keys_file=tmp_path / "keys").configured_token_keys() == [NEW, OLD]
    (tmp_path / "keys").write_bytes(OLD)
    for name, problem in (("keys", "must be a text file"), ("nothing", "can't be read")):
        with pytest.raises(ValueError, match=problem) as caught:
            Settings(token_keys_file=tmp_path / name).configured_token_keys()
        assert str(tmp_path) not in str(caught.value)
    with pytest.raises(ValidationError, match="can't both be set"):
        Settings(token_keys=OLD.hex(), token_keys_file=tmp_path / "keys")  # type: ignore[arg-type]  # as above


def test_settings_do_not_show_secrets() -> None:
    """Neither printed settings nor errors of settings contain a key or a password."""
    url = "postgresql+asyncpg://user:pass-word@localhost/ledger"
    settings = Settings(token_keys=OLD.hex(), database_url=url)  # type: ignore[arg-type]  # as above
    shown = f"{settings!r} {settings} {settings.model_dump_json(exclude={'database_url'})}"
    with pytest.raises(ValidationError) as caught:
        Settings(token_keys=OLD.hex(), database_url=url, port=-1)  # type: ignore[arg-type]  # as above
    for secret in (OLD.hex(), "pass-word"):
        assert secret not in f"{shown} {caught.value} {caught.value!r}"


@pytest.fixture
async def paged_client(client: Client) -> Client:
    """A caller with two accounts, so that a list has two pages of one account."""
    for name in ("one", "two"):
        await client.create_account(name)
    return client


async def page(server: Server, client: Client, keys: str, token: str = "") -> ListAccountsResponse:
    """Gets a page of one account from a server with these keys."""
    settings = Settings(port=0, token_keys=keys)  # type: ignore[arg-type]  # as above
    async with serving(server.book, settings) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        caller = Client(channel, client.key)
        request = ListAccountsRequest(page_size=1, page_token=token)
        answer: ListAccountsResponse = await caller.ledger.ListAccounts(request, metadata=caller.metadata)
        return answer


@only_sqlite
async def test_configured_keys_are_rotated(server: Server, paged_client: Client) -> None:
    """The first key seals. Tokens of an old key open as long as the key is configured."""
    old = (await page(server, paged_client, hexadecimal(OLD))).next_page_token
    assert (await page(server, paged_client, hexadecimal(NEW, OLD), old)).accounts[0].name == "accounts/two"
    assert (await refusal_of(page(server, paged_client, hexadecimal(NEW), old))).reason == "PAGE_TOKEN_INVALID"
    new = (await page(server, paged_client, hexadecimal(NEW, OLD))).next_page_token
    assert (await page(server, paged_client, hexadecimal(NEW), new)).accounts[0].name == "accounts/two"
    assert (await refusal_of(page(server, paged_client, hexadecimal(OLD), new))).reason == "PAGE_TOKEN_INVALID"
    # The keys of the database don't open it either.
    assert (await refusal_of(page(server, paged_client, "", new))).reason == "PAGE_TOKEN_INVALID"


@only_sqlite
async def test_no_key_is_created_in_the_database(book: Book) -> None:
    """A server with configured keys creates none in its database."""
    async with serving(book, Settings(port=0, token_keys=OLD.hex())):  # type: ignore[arg-type]  # as above
        assert await book.credentials.token_keys() == []
    async with serving(book, Settings(port=0)):
        assert len(await book.credentials.token_keys()) == 1


@pytest.mark.parametrize("name", ["DAYBOOK_TOKEN_KEYS", "DAYBOOK_TOKEN_KEYS_FILE"])
def test_rotate_command_refuses_configured_keys(tmp_path: Path, name: str) -> None:
    """If keys are configured, `daybook token-keys rotate` fails, creates no key and shows none."""
    (tmp_path / "keys").write_text(OLD.hex())
    settings = {name: str(tmp_path / "keys") if name.endswith("FILE") else OLD.hex()}
    database = ("--database-url", f"sqlite+aiosqlite:///{tmp_path}/daybook.db")
    result = invoke("token-keys", "rotate", *database, settings=settings)
    assert result.exit_code == 1
    assert "the settings have the keys of page tokens" in result.stderr
    assert OLD.hex() not in result.output
    assert not (tmp_path / "daybook.db").exists()
    assert invoke("token-keys", "rotate", *database).exit_code == 0
