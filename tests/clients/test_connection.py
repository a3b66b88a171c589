"""The address, the key and TLS, from arguments and from the environment."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daybook_client import AsyncDaybook, Daybook, Retry
from daybook_client.configuration import VARIABLES, Connection
from daybook_client.errors import CredentialInvalid, Unavailable
from server.config import Settings
from tests.support.certificates import Authority
from tests.support.processes import ROOT
from tests.support.python_clients import ServedLedger

ONE_ATTEMPT = Retry(attempts_max=1)


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the client is set."""
    for name in VARIABLES.values():
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def secured(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedLedger]:
    """A server with TLS that requires a client certificate."""
    pair = authority.issue("ledger")
    started = ServedLedger.start(
        tmp_path_factory.mktemp("secured"),
        tls_certificate_file=pair.certificate,
        tls_key_file=pair.key,
        tls_client_ca_file=authority.file,
    )
    yield started
    assert started.daybook.stop() == 0


def test_tls_with_client_certificate_from_arguments(secured: ServedLedger, authority: Authority, opened: Any) -> None:
    """With the authority and a client certificate, calls succeed."""
    pair = authority.issue("caller")
    files = {"client_certificate_file": str(pair.certificate), "client_key_file": str(pair.key)}
    client = opened(f"https://localhost:{secured.port}", key=secured.key, ca_file=str(authority.file), **files)
    assert client.list_accounts().page().items == ()
    # A file implies TLS, also on loopback.
    client = opened(f"localhost:{secured.port}", key=secured.key, ca_file=str(authority.file), **files)
    assert client.list_accounts().page().items == ()


def test_server_of_an_unknown_authority_is_refused(secured: ServedLedger, authority: Authority, opened: Any) -> None:
    """Without the authority's certificate, or without a client certificate, no call succeeds."""
    address = f"https://localhost:{secured.port}"
    with pytest.raises(Unavailable):
        opened(address, key=secured.key, retry=ONE_ATTEMPT).list_accounts().page()
    with pytest.raises(Unavailable):
        opened(address, key=secured.key, ca_file=str(authority.file), retry=ONE_ATTEMPT).list_accounts().page()
    with pytest.raises(Unavailable):
        opened(f"http://localhost:{secured.port}", key=secured.key, retry=ONE_ATTEMPT).list_accounts().page()


def test_everything_comes_from_the_environment(
    secured: ServedLedger, authority: Authority, monkeypatch: pytest.MonkeyPatch, opened: Any
) -> None:
    """Without arguments, a client reads its five variables; an argument overrides its variable."""
    pair = authority.issue("caller")
    values = {
        "address": f"localhost:{secured.port}",
        "key": secured.key,
        "ca_file": str(authority.file),
        "client_certificate_file": str(pair.certificate),
        "client_key_file": str(pair.key),
    }
    for name, value in values.items():
        monkeypatch.setenv(VARIABLES[name], value)
    assert opened().list_accounts().page().items == ()
    with pytest.raises(CredentialInvalid):
        opened(key="wrong.key").list_accounts().page()


def test_variables_of_client_and_server_differ() -> None:
    """No variable of the client is a setting of the server, so both may be set in one environment."""
    assert VARIABLES.keys() & Settings.model_fields.keys() == set()
    assert all(variable == f"DAYBOOK_{name.upper()}" for name, variable in VARIABLES.items())


def connection(address: str, **files: str) -> Connection:
    """Returns the connection to an address."""
    empty = dict.fromkeys(("ca_file", "client_certificate_file", "client_key_file"), "")
    return Connection.of(address=address, key="x", **{**empty, **files})


@pytest.mark.parametrize(
    ("address", "target", "is_secure"),
    [
        ("127.0.0.1:50051", "127.0.0.1:50051", False),
        ("[::1]:50051", "[::1]:50051", False),
        ("localhost:50051", "localhost:50051", False),
        ("ledger.internal:50051", "ledger.internal:50051", True),
        ("10.0.0.7:50051", "10.0.0.7:50051", True),
        ("http://ledger.internal:50051", "ledger.internal:50051", False),
        ("https://127.0.0.1:50051/", "127.0.0.1:50051", True),
        ("https://ledger.example.com", "ledger.example.com:443", True),
    ],
)
def test_address_decides_on_tls(address: str, target: str, is_secure: bool) -> None:
    """TLS is used by default unless the server is on this machine; a scheme decides otherwise."""
    found = connection(address)
    assert (found.target, found.is_secure) == (target, is_secure)


@pytest.mark.parametrize("client", [Daybook, AsyncDaybook])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no address: pass address=..., or set DAYBOOK_ADDRESS"),
        ({"address": "localhost:1"}, "no key: pass key=..., or set DAYBOOK_KEY"),
        ({"address": "localhost", "key": "x"}, "has no port"),
        ({"address": "localhost:1", "key": "secret\n"}, "the key has characters other than printable ASCII$"),
        ({"address": "localhost:http", "key": "x"}, "Port could not be cast"),
        ({"address": "ftp://localhost:1", "key": "x"}, "is no address"),
        ({"address": "https://localhost:1/path", "key": "x"}, "is no address"),
        ({"address": "localhost:1", "key": "x", "client_key_file": "k"}, "are set together"),
        ({"address": "http://localhost:1", "key": "x", "ca_file": "c"}, "use https://"),
    ],
)
def test_wrong_argument_is_named(client: type[Daybook], arguments: dict[str, str], message: str) -> None:
    """A missing or wrong argument raises ValueError, which says what to do, and never shows the key."""
    with pytest.raises(ValueError, match=message):
        client(**arguments)  # type: ignore[arg-type]


def test_client_needs_neither_server_nor_generated_code(tmp_path: Path) -> None:
    """With only its own folder and installed libraries on the path, the client imports no module of the server."""
    program = (
        "import sys, daybook_client;"
        "from daybook.v1 import ledger_service_pb2;"
        "print(sorted(name for name in sys.modules if name.partition('.')[0] in {'server', 'sqlalchemy', 'pydantic'}))"
    )
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    path = ":".join([str(ROOT / "clients" / "python"), *libraries])
    # Without the .pth files of this environment.
    result = subprocess.run(
        [sys.executable, "-S", "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stderr
