"""`daybook health` calls the server of its settings, over TLS if they have it, and never through a proxy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.certificates import Authority, Pair
from tests.support.command_line import invoke
from tests.support.processes import Daybook, Ports, run, sqlite_url

PROXIES = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy", "all_proxy"), "http://127.0.0.1:1")
"""All proxy variables, with an address that refuses connections."""
NONE: Mapping[str, str] = {}


@dataclass(frozen=True)
class Served:
    """A running `daybook serve` with its settings."""

    daybook: Daybook
    settings: Mapping[str, str]

    def health(self, *flags: str, **settings: str) -> str:
        """Runs `daybook health` with the settings of the server and more. Returns the last line of its output."""
        arguments = ("health", "--port", str(self.daybook.ports.server), *flags)
        merged = {**self.settings, **settings}
        if merged.keys() & PROXIES:
            # gRPC reads proxy variables once per process, so this runs in a new one.
            result = run(*arguments, folder=self.daybook.folder, settings=merged)
            assert (result.returncode == 0) == (result.stdout == "serving\n")
            printed, logged = result.stdout, result.stderr
        else:
            invoked = invoke(*arguments, settings=merged)
            assert (invoked.exit_code == 0) == (invoked.stdout == "serving\n")
            printed, logged = invoked.stdout, invoked.stderr
        assert "Traceback" not in logged
        # gRPC may log the details of a handshake before the last line.
        return (printed or logged).splitlines()[-1]


Serve = Callable[[Mapping[str, str]], Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts servers; kills them at the end of the test."""
    started: list[Daybook] = []

    def serve(settings: Mapping[str, str]) -> Served:
        ports = Ports.free()
        address = ("--port", str(ports.server), "--database-url", sqlite_url(tmp_path / "daybook.db"))
        started.append(Daybook.start("serve", *address, folder=tmp_path / "serve", ports=ports, settings=settings))
        started[-1].wait_for("serving")
        return Served(started[-1], settings)

    yield serve
    for each in started:
        each.kill()


def environment_of(**settings: Path) -> dict[str, str]:
    """Returns settings as environment variables."""
    return {f"DAYBOOK_{name.upper()}": str(value) for name, value in settings.items()}


def tls(pair: Pair) -> dict[str, str]:
    """Returns the settings of a server with a certificate."""
    return environment_of(tls_certificate_file=pair.certificate, tls_key_file=pair.key)


def client_certificate(pair: Pair) -> dict[str, str]:
    """Returns the settings of a client certificate."""
    return environment_of(gateway_client_certificate_file=pair.certificate, gateway_client_key_file=pair.key)


def test_health_without_tls(serve: Serve) -> None:
    """A running server is healthy as a whole and by service; an unknown service or a stopped server is not."""
    served = serve(NONE)
    assert served.health() == served.health("--service", "") == "serving"
    assert served.health("--service", "daybook.v1.Nothing") == "daybook: not serving"
    assert served.daybook.stop() == 0
    assert served.health() == "daybook: not serving"


def test_health_bypasses_proxies(serve: Serve, authority: Authority) -> None:
    """`daybook health` connects directly, even if the environment names a proxy."""
    for settings in (NONE, tls(authority.issue("server"))):
        served = serve({**PROXIES, "no_proxy": "", "no_grpc_proxy": "", **settings})
        assert served.health() == "serving"
        assert served.daybook.stop() == 0


def test_health_with_tls(serve: Serve, authority: Authority) -> None:
    """`daybook health` trusts exactly the certificate in the settings, regardless of its issuer."""
    served = serve(tls(authority.issue("server")))
    assert served.health() == "serving"
    assert served.health(**tls(authority.issue("another server"))) == "daybook: not serving"
    assert served.health("--host", "localhost") == "serving"


def test_health_with_mutual_tls(serve: Serve, authority: Authority, tmp_path: Path) -> None:
    """If the server requires client certificates, `daybook health` presents the one of the gateway."""
    settings = {**tls(authority.issue("server")), **environment_of(tls_client_ca_file=authority.file)}
    served = serve(settings)
    output = served.health()
    assert output == (
        "daybook: gateway_client_certificate_file is missing: tls_client_ca_file is set, "
        "and the server requires client certificates"
    )
    client = authority.issue("client")
    assert served.health(**client_certificate(client)) == "serving"
    assert served.health(**client_certificate(client), **PROXIES, no_proxy="") == "serving"
    (tmp_path / "stranger").mkdir()
    assert (
        served.health(**client_certificate(Authority(tmp_path / "stranger").issue("stranger")))
        == "daybook: not serving"
    )
    missing = {**client_certificate(client), **environment_of(gateway_client_key_file=tmp_path / "nothing.key")}
    assert served.health(**missing).startswith("daybook: gateway_client_key_file can't be read")


def test_unusable_certificate_is_reported(serve: Serve, authority: Authority, tmp_path: Path) -> None:
    """An unusable file is reported in one line that names its setting."""
    served = serve(tls(authority.issue("server")))
    (tmp_path / "nothing.pem").write_text("nothing")
    for file, problem in {"absent.pem": "can't be read", "nothing.pem": "must hold a certificate"}.items():
        output = served.health(**environment_of(tls_certificate_file=tmp_path / file))
        assert output.startswith(f"daybook: tls_certificate_file {problem}")
