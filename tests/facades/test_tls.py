"""TLS of the gateway towards clients and towards servers: with `daybook up`, and with envoy.yaml."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from cryptography import x509
from daybook.v1.ledger_service_pb2 import GetBalanceRequest

from server.config import Settings
from server.gateway.configuration import write_secrets
from server.gateway.envoy import envoy_path
from server.tls import require_certificates
from tests.support import curl
from tests.support.blocks import blocks
from tests.support.callers import credential, ledger_stub
from tests.support.certificates import Authority, Pair, connect, handshake, served_serial
from tests.support.gateways import configuration_of, gateway_before
from tests.support.http_client import read_json, send
from tests.support.processes import (
    BIN,
    ROOT,
    Daybook,
    Ports,
    copy_database,
    environment,
    printed_commands,
    require_refusal,
    run,
    sqlite_url,
)
from tests.support.waiting import SECONDS_MAX, wait_until

KEY = "demo-dreadnode.public"
CREDENTIAL = {"authorization": f"Bearer {KEY}"}
BALANCE = "/v1/accounts/example/balance"


@dataclass(frozen=True)
class Secured:
    """A `daybook up` with TLS on all connections, and the certificates."""

    daybook: Daybook
    gateway: Pair
    """The gateway's pair; a test may replace it."""
    server: Pair
    client: Pair
    """The client pair that the server accepts."""


@pytest.fixture(scope="module")
def secured(gateway: Daybook, authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """A second demo, with TLS at the gateway and mutual TLS between gateway and server."""
    folder, ports = tmp_path_factory.mktemp("secured"), Ports.free()
    copy_database(gateway.folder / "daybook.db", folder / "daybook.db")
    live = Pair(folder / "gateway.crt", folder / "gateway.key")
    authority.issue("gateway").move_to(live)
    server, client = authority.issue("server"), authority.issue("client of the server")
    settings = {
        "TLS_CERTIFICATE_FILE": server.certificate,
        "TLS_KEY_FILE": server.key,
        "TLS_CLIENT_CA_FILE": authority.file,
        # Relative paths, as users may write them.
        "GATEWAY_TLS_CERTIFICATE_FILE": live.certificate.name,
        "GATEWAY_TLS_KEY_FILE": live.key.name,
        "GATEWAY_SERVER_CA_FILE": authority.file,
        "GATEWAY_CLIENT_CERTIFICATE_FILE": client.certificate,
        "GATEWAY_CLIENT_KEY_FILE": client.key,
    }
    daybook = Daybook.start(
        *("up", "--demo", "--database-url", sqlite_url(folder / "daybook.db"), *ports.flags),
        folder=folder,
        ports=ports,
        settings={f"DAYBOOK_{name}": str(value) for name, value in settings.items()},
    )
    try:
        daybook.wait_for("Ctrl-C stops it.")
        yield Secured(daybook, live, server, client)
        assert daybook.stop() == 0
        assert "PRIVATE KEY" not in daybook.stderr
    finally:
        daybook.kill()


@pytest.mark.parametrize(("protocol", "version"), [("h2", "HTTP/2"), ("http/1.1", "HTTP/1.1")])
def test_rest_over_tls_succeeds(secured: Secured, authority: Authority, protocol: str, version: str) -> None:
    """The gateway negotiates HTTP/1.1 or HTTP/2 by ALPN, and calls the server over TLS."""
    port = secured.daybook.ports.gateway
    with connect(port, authority, protocols=(protocol,)) as connection:
        assert connection.selected_alpn_protocol() == protocol
        assert connection.version() == "TLSv1.3"
    with httpx.Client(verify=trusting(authority), http2=protocol == "h2", headers=CREDENTIAL) as client:
        answer = client.get(f"https://localhost:{port}{BALANCE}")
        assert (answer.status_code, answer.http_version) == (200, version)
        paged = client.get(f"https://localhost:{port}/api/billing/accounts/example/transactions?page_size=3").json()
    assert paged["next"].startswith(f"https://localhost:{port}/"), "links have the scheme of the request"


def trusting(authority: Authority) -> ssl.SSLContext:
    """A context that trusts an authority."""
    return ssl.create_default_context(cafile=str(authority.file))


def test_grpc_over_tls_succeeds(secured: Secured, authority: Authority) -> None:
    """A native gRPC call succeeds over the gateway's TLS."""
    credentials = grpc.ssl_channel_credentials(authority.file.read_bytes())
    with grpc.secure_channel(f"localhost:{secured.daybook.ports.gateway}", credentials) as channel:
        balance = ledger_stub(channel).GetBalance(
            GetBalanceRequest(name="accounts/example/balance"), metadata=credential(KEY), timeout=SECONDS_MAX
        )
        assert balance.amount


def test_connection_without_tls_or_client_certificate_is_refused(secured: Secured, authority: Authority) -> None:
    """The gateway refuses plain HTTP, and the server a client without a certificate of its authority."""
    with pytest.raises(OSError):  # noqa: PT011  # the subclass depends on timing
        send(secured.daybook.origin, "/healthz")
    for port, client in ((secured.daybook.ports.server, None), (secured.daybook.ports.server, secured.client)):
        with connect(port, authority, client=client) as connection:
            connection.settimeout(SECONDS_MAX)
            try:
                greeting = connection.recv(9)
            except ssl.SSLError:
                greeting = b""
        # An HTTP/2 server sends its settings first.
        assert bool(greeting) is (client is not None)


def test_gateway_reloads_its_certificate(secured: Secured, authority: Authority) -> None:
    """The gateway uses a replaced pair for new connections, and ignores a pair that does not match."""
    port = secured.daybook.ports.gateway
    assert served_serial(port, authority) == secured.gateway.serial
    first, second = secured.gateway.serial, authority.issue("second gateway")
    stranger = authority.issue("stranger")
    Pair(secured.gateway.certificate, stranger.key).move_to(secured.gateway)
    assert served_serial(port, authority) == first
    second.move_to(secured.gateway)
    wait_until(lambda: served_serial(port, authority) == second.serial, "the gateway presents the new certificate")


@pytest.mark.parametrize(
    ("name", "is_trusted", "status"),
    [("localhost", True, 200), ("elsewhere.example", True, 503), ("localhost", False, 503)],
    ids=["known", "another name", "another authority"],
)
def test_gateway_verifies_the_server(
    secured: Secured, authority: Authority, tmp_path: Path, name: str, is_trusted: bool, status: int
) -> None:
    """Envoy does not call a server whose certificate has another name or another authority."""
    trusted = authority if is_trusted else Authority(tmp_path)
    settings = Settings(
        port=secured.daybook.ports.server,
        tls_certificate_file=str(secured.server.certificate),
        gateway_server_ca_file=str(trusted.file),
        gateway_server_name=name,
        gateway_client_certificate_file=str(secured.client.certificate),
        gateway_client_key_file=str(secured.client.key),
    )

    def with_tls(configuration: dict[str, Any]) -> None:
        resources = configuration_of(settings, tmp_path)["static_resources"]
        configuration["static_resources"]["clusters"] = resources["clusters"]

    write_secrets(settings, tmp_path)
    with gateway_before(tmp_path, settings.port, with_tls) as origin:
        # Until the first health check, Envoy calls the server regardless of its health.
        wait_until(lambda: send(origin, BALANCE, headers=CREDENTIAL).status == status, f"the gateway answers {status}")
        assert send(origin, "/readyz").status == status


@pytest.mark.parametrize("command", ["serve", "up"])
def test_start_with_an_unreadable_certificate_fails_in_one_line(tmp_path: Path, command: str) -> None:
    """Both commands print one line with the invalid setting."""
    settings = {"DAYBOOK_TLS_CERTIFICATE_FILE": "nothing.crt", "DAYBOOK_TLS_KEY_FILE": "nothing.key"}
    ports = Ports.free()
    flags = ports.flags if command == "up" else ("--port", str(ports.server))
    result = run(command, "--database-url", sqlite_url(tmp_path / "a.db"), *flags, folder=tmp_path, settings=settings)
    require_refusal(result, "tls_certificate_file can't be read (No such file or directory)")


def test_interrupt_ends_up_while_it_waits_for_the_gateway(authority: Authority, tmp_path: Path) -> None:
    """SIGINT ends the command with code 0 although the gateway doesn't trust the server, and so isn't ready."""
    server, ports = authority.issue("untrusted server"), Ports.free()
    settings = {
        "DAYBOOK_TLS_CERTIFICATE_FILE": str(server.certificate),
        "DAYBOOK_TLS_KEY_FILE": str(server.key),
        "DAYBOOK_GATEWAY_SERVER_CA_FILE": str(Authority(tmp_path).file),
    }
    database_url = sqlite_url(tmp_path / "daybook.db")
    daybook = Daybook.start(
        "up", "--database-url", database_url, *ports.flags, folder=tmp_path / "up", ports=ports, settings=settings
    )
    try:
        daybook.wait_for(" serving ")
        assert daybook.stop() == 0
    finally:
        daybook.kill()


def snippets(language: str) -> list[str]:
    """The code blocks of docs/operate/tls.md in a language."""
    return [block.text for block in blocks("docs/operate/tls.md", language)]


def run_shell(command: str, folder: Path) -> str:
    """Runs a shell command; returns its standard output. Fails if its exit code is not 0."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    curl.install(tools)
    result = subprocess.run(
        ["sh", "-ec", command],
        cwd=folder,
        env=environment(PATH=f"{tools}{os.pathsep}{os.environ['PATH']}"),
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("number", [2, 3], ids=["through the gateway", "past it"])
def test_documented_commands_succeed(secured: Secured, authority: Authority, tmp_path: Path, number: int) -> None:
    """The commands of docs/operate/tls.md succeed with the test's files and ports."""
    ports = secured.daybook.ports
    for name, file in {
        "tls.crt": secured.gateway.certificate,
        "ca.crt": authority.file,
        "client.crt": secured.client.certificate,
        "client.key": secured.client.key,
    }.items():
        (tmp_path / name).symlink_to(file)
    command = snippets("sh")[number].replace(":8443", f":{ports.gateway}").replace(":50051", f":{ports.server}")
    printed = run_shell(command.replace(".venv/bin", str(BIN)), tmp_path)
    assert printed.count('"amount"') == printed.count("accounts/example/balance") == {2: 2, 3: 1}[number]


if shutil.which("openssl"):

    def test_documented_certificate_is_valid_for_the_server(tmp_path: Path) -> None:
        """The command of docs/operate/tls.md makes a certificate and a key that the gateway accepts, for localhost."""
        run_shell(snippets("sh")[0], tmp_path)
        certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"
        require_certificates(Settings(gateway_tls_certificate_file=str(certificate), gateway_tls_key_file=str(key)))
        names = x509.load_pem_x509_certificate(certificate.read_bytes()).extensions
        assert "localhost" in str(names.get_extension_for_class(x509.SubjectAlternativeName))


def test_printed_commands_trust_the_certificate(secured: Secured, tmp_path: Path) -> None:
    """The commands that `daybook up --demo` prints succeed over TLS."""
    commands = printed_commands(secured.daybook)
    for title in ("Teable: what a space consumed", "Native gRPC, by reflection"):
        command = commands[title].replace(secured.gateway.certificate.name, str(secured.gateway.certificate))
        assert isinstance(read_json(run_shell(command, tmp_path)), dict)


@contextmanager
def envoy_in(folder: Path, configuration: str) -> Iterator[None]:
    """Runs Envoy in a folder until the end of the block; its output is in the file `output`."""
    command = [envoy_path(), "-c", configuration, "--disable-hot-restart", "--log-level", "warning"]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
    try:
        yield
        assert process.poll() is None, (folder / "output").read_text()
    finally:
        process.terminate()
        process.wait(SECONDS_MAX)


def answers(origin: str, path: str = "/readyz", **options: Any) -> bool:
    """Whether a gateway answers with 200."""
    try:
        return send(origin, path, **options).status == 200
    except OSError:
        return False


def test_envoy_yaml_loads_certificates_later(authority: Authority, tmp_path: Path) -> None:
    """Envoy with envoy.yaml starts without certificates, and loads them when they exist."""
    ports = Ports.free()
    text = (ROOT / "envoy.yaml").read_text().replace("0.0.0.0", "127.0.0.1")  # noqa: S104  # the address to replace
    for port, other in ((8080, ports.gateway), (8443, ports.server), (9901, ports.admin)):
        assert text.count(f"port_value: {port}") == 1
        text = text.replace(f"port_value: {port}", f"port_value: {other}")
    (tmp_path / "envoy.yaml").write_text(text)
    (tmp_path / "gen").symlink_to(ROOT / "gen")
    (tmp_path / "server" / "gateway").mkdir(parents=True)
    secrets = (ROOT / "server/gateway/tls.yaml").read_text().replace("/etc/daybook", str(tmp_path))
    (tmp_path / "server/gateway/tls.yaml").write_text(secrets)
    (tmp_path / "gateway").mkdir()
    with envoy_in(tmp_path, "envoy.yaml"):
        wait_until(lambda: answers(f"http://127.0.0.1:{ports.gateway}", "/healthz"), "/healthz answers 200")
        tls = ports.server
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            connect(tls, authority)
        pair = authority.issue("late")
        pair.move_to(Pair(tmp_path / "gateway/tls.crt", tmp_path / "gateway/tls.key"))

        def presents_certificate() -> bool:
            try:
                return served_serial(tls, authority) == pair.serial
            except (ssl.SSLError, ConnectionResetError):
                return False

        wait_until(presents_certificate, "the gateway presents the certificate")
        assert handshake(tls, authority, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
        with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
            handshake(tls, authority, ssl.TLSVersion.TLSv1_1)
    output = (tmp_path / "output").read_text()
    assert [line for line in output.splitlines() if "Invalid path" in line and "tls.crt" in line]


def test_gateway_config_supports_tls(secured: Secured, authority: Authority, tmp_path: Path) -> None:
    """A gateway configured by `daybook gateway-config` serves TLS and calls the server over mutual TLS."""
    ports = Ports.free()
    settings = {
        "DAYBOOK_GATEWAY_TLS_CERTIFICATE_FILE": str(secured.gateway.certificate),
        "DAYBOOK_GATEWAY_TLS_KEY_FILE": str(secured.gateway.key),
        "DAYBOOK_GATEWAY_SERVER_CA_FILE": str(authority.file),
        "DAYBOOK_GATEWAY_SERVER_NAME": "localhost",
        "DAYBOOK_GATEWAY_CLIENT_CERTIFICATE_FILE": str(secured.client.certificate),
        "DAYBOOK_GATEWAY_CLIENT_KEY_FILE": str(secured.client.key),
    }
    addresses = ["--gateway-host", "127.0.0.1", "--gateway-port", str(ports.gateway)]
    addresses += ["--gateway-admin-port", str(ports.admin)]
    server = f"localhost:{secured.daybook.ports.server}"
    result = run("gateway-config", ".", "--server", server, *addresses, folder=tmp_path, settings=settings)
    assert result.returncode == 0, result.stderr
    with envoy_in(tmp_path, "envoy.yaml"), httpx.Client(verify=trusting(authority), http2=True) as client:

        def is_ready() -> bool:
            try:
                return client.get(f"https://localhost:{ports.gateway}/readyz").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(is_ready, "/readyz answers 200")
        answer = client.get(f"https://localhost:{ports.gateway}{BALANCE}", headers=CREDENTIAL)
    assert (answer.status_code, answer.http_version) == (200, "HTTP/2")


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ("gateway_tls_certificate_file", "gateway_tls_key_file"),
        ("gateway_tls_key_file", "gateway_tls_certificate_file"),
        ("gateway_client_certificate_file", "gateway_client_key_file"),
        ("gateway_server_ca_file", "gateway_server_name"),
    ],
)
def test_gateway_config_refuses_incomplete_settings(tmp_path: Path, given: str, missing: str) -> None:
    """A certificate without a key, and a CA without a server name, are refused with the missing setting."""
    settings = {f"DAYBOOK_{given.upper()}": "/etc/daybook/file.pem"}
    result = run("gateway-config", ".", "--server", "server-1:50051", folder=tmp_path, settings=settings)
    require_refusal(result, f"{missing} is missing: {given} is set")
    assert not list(tmp_path.iterdir())


def test_gateway_config_refuses_a_client_certificate_without_tls(tmp_path: Path) -> None:
    """A client certificate requires TLS to the servers."""
    settings = {f"DAYBOOK_GATEWAY_CLIENT_{each}_FILE": "/etc/daybook/file.pem" for each in ("CERTIFICATE", "KEY")}
    result = run("gateway-config", ".", "--server", "server-1:50051", folder=tmp_path, settings=settings)
    require_refusal(result, "gateway_server_ca_file is missing: gateway_client_certificate_file is set")


def test_gateway_config_refuses_a_host_name(tmp_path: Path) -> None:
    """gateway_host must be an address: Envoy resolves no listener names, and this machine may not know the other's."""
    result = run(
        "gateway-config", ".", "--server", "server-1:50051", "--gateway-host", "localhost", folder=tmp_path, settings={}
    )
    require_refusal(result, "gateway_host must be an IP address for a gateway that runs elsewhere")
