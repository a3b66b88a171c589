"""TLS on the gRPC port: accepted clients, unusable files, and renewed certificates."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from random import Random
from typing import Any

import grpc
import pytest
import pytest_asyncio
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from server.app import serving
from server.book import Book, open_book
from server.config import CannotStart, Settings
from server.tls import require_certificates, server_certificates
from server.transport.certificates import CertificateFiles, Trust
from server.transport.readiness import is_serving
from tests.support.callers import Server
from tests.support.certificates import Authority, Pair, handshake, served_serial
from tests.support.clock import Clock
from tests.support.markers import shares_a_server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_book(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Book]:
    """One ledger for all tests of this module, with the tenant `house`."""
    database_url = f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('certificates')}/daybook.db"
    async with open_book(database_url, Clock(), Random(1).randbytes) as book:
        await book.credentials.create_tenant(slug="house", uid="u", display_name="", create_time=book.clock())
        yield book


@pytest.fixture
def live(tmp_path: Path, authority: Authority) -> Pair:
    """The certificate files of a server, which a test may replace."""
    pair = Pair(tmp_path / "tls.crt", tmp_path / "tls.key")
    authority.issue("first").move_to(pair)
    return pair


def tls(pair: Pair, **more: object) -> Settings:
    """Returns settings with TLS and a free port."""
    return Settings(
        port=0,
        shutdown_grace_seconds=0,
        tls_certificate_file=str(pair.certificate),
        tls_key_file=str(pair.key),
        **more,  # type: ignore[arg-type]  # settings have different types
    )


@asynccontextmanager
async def channel_to(port: int, authority: Authority, client: Pair | None = None) -> AsyncIterator[grpc.aio.Channel]:
    """Opens a channel that verifies the server, and presents the client certificate if one is given."""
    shown = (None, None) if client is None else (client.key.read_bytes(), client.certificate.read_bytes())
    credentials = grpc.ssl_channel_credentials(authority.file.read_bytes(), *shown)
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
        yield channel


async def calls(book: Book, channel: grpc.aio.Channel) -> bool:
    """Whether a call with a key succeeds."""
    number = await book.credentials.tenant_number("house")
    assert number is not None
    client = await Server(book, channel).client(number)
    account_id = f"a{book.random_bytes(8).hex()}"
    try:
        return (await client.create_account(account_id)).name == f"accounts/{account_id}"
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise
        return False


@shares_a_server
async def test_calls_go_through_tls(shared_book: Book, live: Pair, authority: Authority) -> None:
    """With a certificate the port accepts only TLS."""
    async with serving(shared_book, tls(live)) as port:
        async with channel_to(port, authority) as channel:
            assert await calls(shared_book, channel)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            assert not await calls(shared_book, channel)


@shares_a_server
@pytest.mark.parametrize(
    "names",
    [
        [x509.DNSName("server.example"), x509.DNSName("other.example")],
        [x509.DNSName("*.example")],
        [x509.IPAddress(ip_address("192.0.2.1"))],
        [x509.IPAddress(ip_address("2001:db8::1"))],
        [],
    ],
    ids=["name", "wildcard", "address", "address of IPv6", "subject alone"],
)
async def test_client_with_the_certificate_file_trusts_the_server(
    shared_book: Book, authority: Authority, names: list[x509.GeneralName]
) -> None:
    """A client with the certificate's file trusts the server, even by an address that the certificate lacks."""
    pair, other = authority.issue("server.example", names), authority.issue("server.example 2", names)
    trust, distrust = (
        Trust.of(str(each.certificate), CertificateFiles("gateway_client_", "", "")) for each in (pair, other)
    )
    async with serving(shared_book, tls(pair)) as port:
        assert await is_serving(f"127.0.0.1:{port}", "", trust)
        assert not await is_serving(f"127.0.0.1:{port}", "", distrust)


@shares_a_server
async def test_server_of_another_authority_is_not_trusted(
    shared_book: Book, live: Pair, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A client that trusts another authority refuses the server."""
    stranger = Authority(tmp_path_factory.mktemp("stranger"))
    async with serving(shared_book, tls(live)) as port, channel_to(port, stranger) as channel:
        assert not await calls(shared_book, channel)


@shares_a_server
async def test_old_protocols_are_refused(shared_book: Book, live: Pair, authority: Authority) -> None:
    """TLS 1.2 and 1.3 are accepted; TLS 1.1 is refused."""
    async with serving(shared_book, tls(live)) as port:
        assert await asyncio.to_thread(handshake, port, authority, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
        assert await asyncio.to_thread(handshake, port, authority, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
        with pytest.raises(ssl.SSLError, match="EOF"):
            await asyncio.to_thread(handshake, port, authority, ssl.TLSVersion.TLSv1_1)


@shares_a_server
async def test_mutual_tls_requires_a_client_certificate(
    shared_book: Book, live: Pair, authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With a client CA only clients with a certificate signed by it are accepted."""
    stranger = Authority(tmp_path_factory.mktemp("stranger")).issue("stranger")
    async with serving(shared_book, tls(live, tls_client_ca_file=str(authority.file))) as port:
        for client, is_accepted in ((authority.issue("client"), True), (None, False), (stranger, False)):
            async with channel_to(port, authority, client) as channel:
                assert await calls(shared_book, channel) is is_accepted


@shares_a_server
async def test_new_certificate_is_used_without_a_restart(shared_book: Book, live: Pair, authority: Authority) -> None:
    """A new connection gets the new certificate; an open connection continues."""
    async with serving(shared_book, tls(live)) as port, channel_to(port, authority) as channel:
        before = live.serial
        assert await asyncio.to_thread(served_serial, port, authority) == before
        assert await calls(shared_book, channel)
        authority.issue("second").move_to(live)
        assert live.serial != before
        assert await asyncio.to_thread(served_serial, port, authority) == live.serial
        assert await calls(shared_book, channel)


@shares_a_server
async def test_new_client_authority_is_used_without_a_restart(
    shared_book: Book, live: Pair, authority: Authority, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """After the client CA file is replaced, only clients of the new authority are accepted."""
    later = Authority(tmp_path_factory.mktemp("later"))
    trusted = tmp_path / "clients.pem"
    trusted.write_bytes(authority.file.read_bytes())
    old, new = authority.issue("old client"), later.issue("new client")

    async def is_accepted(port: int, client: Pair) -> bool:
        async with channel_to(port, authority, client) as channel:
            return await calls(shared_book, channel)

    async with serving(shared_book, tls(live, tls_client_ca_file=str(trusted))) as port:
        assert (await is_accepted(port, old), await is_accepted(port, new)) == (True, False)
        trusted.write_bytes(later.file.read_bytes())
        assert (await is_accepted(port, old), await is_accepted(port, new)) == (False, True)


@shares_a_server
async def test_broken_renewal_keeps_the_last_certificate(shared_book: Book, live: Pair, authority: Authority) -> None:
    """Unusable files are logged once, regardless of the number of connections; the last usable pair stays in use."""
    before = live.serial
    async with serving(shared_book, tls(live)) as port:
        with structlog.testing.capture_logs() as logs:
            live.key.write_bytes(authority.issue("third").key.read_bytes())
            for _ in range(3):
                assert await asyncio.to_thread(served_serial, port, authority) == before
            live.certificate.unlink()
            assert await asyncio.to_thread(served_serial, port, authority) == before
            authority.issue("fourth").move_to(live)
            assert await asyncio.to_thread(served_serial, port, authority) == live.serial != before
    entries = [(entry["log_level"], entry.get("problem", "")) for entry in logs if "certificate" in entry["event"]]
    assert [level for level, _ in entries] == ["warning", "warning", "info"]
    assert "tls_key_file is not the key" in entries[0][1]
    assert "tls_certificate_file can't be read" in entries[1][1]


def test_unchanged_files_are_not_read_again(live: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handshake reads only the modification times of unchanged files."""
    certificates = server_certificates(tls(live))
    assert certificates is not None

    def read_bytes(_self: Path) -> bytes:
        raise AssertionError("read")

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert certificates._fetch() is None
    os.utime(live.key, (0, 0))
    with pytest.raises(AssertionError, match="read"):
        certificates._fetch()


SECRET = b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n"


def encrypted(pair: Pair) -> bytes:
    """Returns the key of a pair, encrypted with a password."""
    key: Any = load_pem_private_key(pair.key.read_bytes(), None)
    encrypted_key: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"password"))
    return encrypted_key


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tls_key_file": ""}, "tls_key_file is missing"),
        ({"tls_certificate_file": ""}, "tls_certificate_file is missing"),
        (
            {"tls_certificate_file": "", "tls_key_file": "", "tls_client_ca_file": "ca"},
            "tls_certificate_file is missing",
        ),
        ({"tls_certificate_file": "nothing"}, "tls_certificate_file can't be read (No such file or directory)"),
        ({"tls_key_file": "nothing"}, "tls_key_file can't be read (No such file or directory)"),
        ({"tls_key_file": "."}, "tls_key_file can't be read (Is a directory)"),
        ({"tls_key_file": "a\0b"}, "tls_key_file can't be read (not a path)"),
        ({"tls_client_ca_file": "nothing"}, "tls_client_ca_file can't be read"),
        ({"tls_certificate_file": "key"}, "tls_certificate_file must hold a certificate"),
        ({"tls_certificate_file": "empty"}, "tls_certificate_file must hold a certificate"),
        ({"tls_key_file": "certificate"}, "tls_key_file must hold a private key"),
        ({"tls_key_file": "broken"}, "tls_key_file must hold a private key"),
        ({"tls_key_file": "other"}, "tls_key_file is not the key"),
        ({"tls_key_file": "encrypted"}, "tls_key_file must not be encrypted"),
        ({"tls_client_ca_file": "key"}, "tls_client_ca_file must hold a certificate"),
        # Settings that only `daybook up` uses.
        ({}, "gateway_server_ca_file is missing"),
        ({"gateway_tls_certificate_file": "certificate"}, "gateway_tls_key_file is missing"),
        ({"gateway_tls_key_file": "key"}, "gateway_tls_certificate_file is missing"),
        (
            {"gateway_tls_certificate_file": "certificate", "gateway_tls_key_file": "other"},
            "gateway_tls_key_file is not the key",
        ),
        ({"gateway_client_certificate_file": "certificate"}, "gateway_client_key_file is missing"),
        (
            {"tls_certificate_file": "", "tls_key_file": "", "gateway_server_ca_file": "ca"},
            "tls_certificate_file is missing",
        ),
        ({"gateway_server_ca_file": "nothing"}, "gateway_server_ca_file can't be read"),
        ({"gateway_server_ca_file": "empty"}, "gateway_server_ca_file must hold a certificate"),
        (
            {"gateway_server_ca_file": "ca", "tls_client_ca_file": "ca"},
            "gateway_client_certificate_file is missing",
        ),
    ],
    ids=lambda value: " ".join(f"{name}={file}" for name, file in value.items()) if isinstance(value, dict) else "",
)
def test_unusable_certificates_are_refused_at_the_start(
    tmp_path: Path, authority: Authority, changes: dict[str, str], words: str
) -> None:
    """An invalid combination of settings or an unusable file is refused, and the error names the setting."""
    pair, other = authority.issue("refused"), authority.issue("other")
    files = {
        "certificate": pair.certificate.read_bytes(),
        "key": pair.key.read_bytes(),
        "other": other.key.read_bytes(),
        "ca": authority.file.read_bytes(),
        "broken": SECRET,
        "encrypted": encrypted(pair),
        "empty": b"",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    named = {"tls_certificate_file": "certificate", "tls_key_file": "key", **changes}
    settings = Settings(**{name: file and f"{tmp_path}/{file}" for name, file in named.items()})  # type: ignore[arg-type]
    with pytest.raises(CannotStart) as caught:
        require_certificates(settings)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(words)
    assert "c2VjcmV0" not in line
    if not words.startswith("gateway_") and "gateway_server_ca_file" not in changes:
        with pytest.raises(CannotStart, match=f"^{words.partition(' ')[0]}"):
            server_certificates(settings)


def test_tls_is_disabled_by_default() -> None:
    """Without certificates there is no TLS, and the default settings are valid."""
    assert server_certificates(Settings()) is None
    require_certificates(Settings())
