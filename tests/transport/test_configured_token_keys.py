"""Keys of page tokens that are set: the first seals, all open, and nobody ever sees them."""

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
    """Keys as a setting has them."""
    return ",".join(key.hex() for key in keys)


def base64url(key: bytes) -> str:
    """A key in the other spelling."""
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
def test_keys_are_read(text: str, keys: list[bytes] | None) -> None:
    """One or several, in hex or either base64, in their order."""
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
def test_what_is_no_key_is_refused(text: str, tmp_path: Path) -> None:
    """A key is 32 bytes, each only once and not too many; the refusal says which is wrong, and shows none."""
    words = text.replace(",", " ").split()
    with pytest.raises(ValidationError, match="token_keys") as caught:
        Settings(token_keys=text)  # type: ignore[arg-type]  # as the environment has it
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ValueError, match=r"^token_keys_file: ") as of_file:
        Settings(token_keys_file=tmp_path / "keys").configured_token_keys()
    for word in words:
        assert word not in str(caught.value) + repr(caught.value) + str(of_file.value)


def test_file_is_read(tmp_path: Path) -> None:
    """A file may hold the keys, one to a line; one that isn't there, or no text, is told without its place."""
    (tmp_path / "keys").write_text(f"{NEW.hex()}\n{OLD.hex()}\n")
    assert Settings(token_keys_file=tmp_path / "keys").configured_token_keys() == [NEW, OLD]
    (tmp_path / "keys").write_bytes(OLD)
    for name, problem in (("keys", "must be a text file"), ("nothing", "can't be read")):
        with pytest.raises(ValueError, match=problem) as caught:
            Settings(token_keys_file=tmp_path / name).configured_token_keys()
        assert str(tmp_path) not in str(caught.value)
    with pytest.raises(ValidationError, match="can't both be set"):
        Settings(token_keys=OLD.hex(), token_keys_file=tmp_path / "keys")  # type: ignore[arg-type]  # as above


def test_settings_show_no_secret() -> None:
    """Printed settings, and what is said of wrong ones, hold no key and no password."""
    url = "postgresql+asyncpg://user:pass-word@localhost/ledger"
    settings = Settings(token_keys=OLD.hex(), database_url=url)  # type: ignore[arg-type]  # as above
    shown = f"{settings!r} {settings} {settings.model_dump_json(exclude={'database_url'})}"
    with pytest.raises(ValidationError) as caught:
        Settings(token_keys=OLD.hex(), database_url=url, port=-1)  # type: ignore[arg-type]  # as above
    for secret in (OLD.hex(), "pass-word"):
        assert secret not in f"{shown} {caught.value} {caught.value!r}"


@pytest.fixture
async def furnished(client: Client) -> Client:
    """A caller with two accounts, and so two pages of one."""
    for name in ("one", "two"):
        await client.create_account(name)
    return client


async def page(server: Server, client: Client, keys: str, token: str = "") -> ListAccountsResponse:
    """A page of one account, from a server with keys that are set."""
    settings = Settings(port=0, token_keys=keys)  # type: ignore[arg-type]  # as above
    async with serving(server.book, settings) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        caller = Client(channel, client.key)
        request = ListAccountsRequest(page_size=1, page_token=token)
        answer: ListAccountsResponse = await caller.ledger.ListAccounts(request, metadata=caller.metadata)
        return answer


@only_sqlite
async def test_keys_are_rotated_by_whoever_sets_them(server: Server, furnished: Client) -> None:
    """With a new key in front, tokens of the old one open as long as it is there; the new one seals."""
    old = (await page(server, furnished, hexadecimal(OLD))).next_page_token
    assert (await page(server, furnished, hexadecimal(NEW, OLD), old)).accounts[0].name == "accounts/two"
    assert (await refusal_of(page(server, furnished, hexadecimal(NEW), old))).reason == "PAGE_TOKEN_INVALID"
    new = (await page(server, furnished, hexadecimal(NEW, OLD))).next_page_token
    assert (await page(server, furnished, hexadecimal(NEW), new)).accounts[0].name == "accounts/two"
    assert (await refusal_of(page(server, furnished, hexadecimal(OLD), new))).reason == "PAGE_TOKEN_INVALID"
    # Nor do those of the database count then.
    assert (await refusal_of(page(server, furnished, "", new))).reason == "PAGE_TOKEN_INVALID"


@only_sqlite
async def test_none_is_made_in_the_database(book: Book) -> None:
    """A server whose keys are set leaves none in its database."""
    async with serving(book, Settings(port=0, token_keys=OLD.hex())):  # type: ignore[arg-type]  # as above
        assert await book.credentials.token_keys() == []
    async with serving(book, Settings(port=0)):
        assert len(await book.credentials.token_keys()) == 1


@pytest.mark.parametrize("name", ["DAYBOOK_TOKEN_KEYS", "DAYBOOK_TOKEN_KEYS_FILE"])
def test_command_says_that_it_has_no_effect(tmp_path: Path, name: str) -> None:
    """`daybook token-keys rotate` refuses where keys are set, and makes none; it shows nothing of them."""
    (tmp_path / "keys").write_text(OLD.hex())
    settings = {name: str(tmp_path / "keys") if name.endswith("FILE") else OLD.hex()}
    database = ("--database-url", f"sqlite+aiosqlite:///{tmp_path}/daybook.db")
    result = invoke("token-keys", "rotate", *database, settings=settings)
    assert result.exit_code == 1
    assert "keys that are set" in result.stderr
    assert OLD.hex() not in result.output
    assert not (tmp_path / "daybook.db").exists()
    assert invoke("token-keys", "rotate", *database).exit_code == 0
