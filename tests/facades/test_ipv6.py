"""IPv6: `serve` and `up` listen on `::1` and on `::`, which covers IPv4, and print addresses in brackets."""

from __future__ import annotations

import json
import shlex
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tests.support.command_line import invoke
from tests.support.http_client import send
from tests.support.processes import Daybook, Ports, copy_database, free_range, printed_commands, run, sqlite_url
from tests.support.waiting import SECONDS_MAX, wait_until

CREDENTIAL = {"authorization": "Bearer demo-dreadnode.public"}
PAGE = "/api/billing/accounts/example/transactions?page_size=1"


def has_ipv6() -> bool:
    """Whether this machine has the IPv6 loopback address; a container may lack it."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


pytestmark = pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")


class Start(Protocol):
    """Starts a `daybook` command in a new folder."""

    def __call__(self, *arguments: str, ports: Ports) -> Daybook:
        """Starts a command, which is killed at the end of the test."""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts commands, and kills the remaining ones at the end of the test."""
    started: list[Daybook] = []

    def start(*arguments: str, ports: Ports) -> Daybook:
        started.append(Daybook.start(*arguments, folder=tmp_path / f"{len(started)}", ports=ports))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def connects(host: str, port: int) -> bool:
    """Whether a connection to this address is accepted."""
    try:
        socket.create_connection((host, port), SECONDS_MAX).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("host", "reached", "workers"),
    [("::1", {"::1"}, 1), ("[::1]", {"::1"}, 2), ("::", {"::1", "127.0.0.1"}, 1), ("::", {"::1", "127.0.0.1"}, 2)],
)
def test_serve_listens_on_its_host_only(
    start: Start, tmp_path: Path, host: str, reached: set[str], workers: int
) -> None:
    """The server listens on its host only, with one process and with two, and `health` connects to it."""
    ports = Ports.free()
    address = ("--host", host, "--port", str(ports.server))
    daybook = start(
        *("serve", *address, "--metrics-host", host, "--metrics-port", "0" if workers == 1 else str(free_range(2))),
        *("--workers", str(workers), "--worker-port-base", str(free_range(2))),
        *("--database-url", sqlite_url(tmp_path / "daybook.db")),
        ports=ports,
    )
    daybook.wait_for(" serving ")
    wait_until(lambda: connects("::1", ports.server), "the server listens")
    assert invoke("health", *address).stdout == "serving\n"
    assert {each for each in ("::1", "127.0.0.1") if connects(each, ports.server)} == reached
    assert daybook.stop() == 0


@pytest.mark.parametrize(
    ("host", "gateway_host", "reached"),
    [("::1", "::1", {"::1"}), ("::", "::", {"::1", "127.0.0.1"}), ("localhost", "localhost", {"127.0.0.1"})],
)
def test_up_listens_on_its_host_only(
    gateway: Daybook, start: Start, tmp_path: Path, host: str, gateway_host: str, reached: set[str]
) -> None:
    """The gateway listens on its host only, reaches the server, and writes links with the request's host."""
    ports = Ports.free()
    copy_database(gateway.folder / "daybook.db", tmp_path / "daybook.db")
    is_demo_refused = host == "::"
    if is_demo_refused:
        (tmp_path / "daybook.db").unlink()
    daybook = start(
        *("up", "--host", host, "--gateway-host", gateway_host, *ports.flags),
        *("--database-url", sqlite_url(tmp_path / "daybook.db")),
        ports=ports,
    )
    origins = {each: f"http://{f'[{each}]' if ':' in each else each}:{ports.gateway}" for each in ("::1", "127.0.0.1")}

    def is_ready(host: str) -> bool:
        assert daybook.process.poll() is None, daybook.stderr
        return connects(host, ports.gateway) and send(origins[host], "/readyz").status == 200

    wait_until(lambda: any(map(is_ready, reached)), "the gateway is ready")
    assert {each for each in origins if connects(each, ports.gateway)} == reached
    for each in reached:
        answer = send(origins[each], PAGE, headers=CREDENTIAL)
        assert answer.status == (401 if is_demo_refused else 200)
        if answer.status == 200:
            assert json.loads(answer.body)["next"].startswith(f"{origins[each]}/")
    assert daybook.stop() == 0


def test_printed_commands_have_the_gateways_address(gateway: Daybook, start: Start, tmp_path: Path) -> None:
    """The commands that `up --demo` prints have the gateway's address."""
    ports = Ports.free()
    copy_database(gateway.folder / "daybook.db", tmp_path / "daybook.db")
    daybook = start(
        *("up", "--demo", "--gateway-host", "::1", *ports.flags),
        *("--database-url", sqlite_url(tmp_path / "daybook.db")),
        ports=ports,
    )
    daybook.wait_for("Ctrl-C stops it.")
    for command in printed_commands(daybook).values():
        (url,) = [word for word in shlex.split(command) if word.startswith("http")]
        assert url.startswith(f"http://[::1]:{ports.gateway}/")
    assert daybook.stop() == 0


@pytest.mark.parametrize(
    ("command", "host", "reason"),
    [
        ("serve", "::1", "the port is taken"),
        ("serve with workers", "::1", "the port is taken"),
        ("up", "::1", "the port is taken"),
        ("serve", "no-such-host.invalid", "Name or service not known"),
        # An address reserved for documentation, which no machine has.
        ("serve", "2001:db8::1", "Cannot assign requested address"),
    ],
)
def test_unusable_address_is_named(tmp_path: Path, command: str, host: str, reason: str) -> None:
    """A server that can't listen prints one line with the reason and the address, IPv6 in brackets."""
    ports = Ports.free()
    flags = ports.flags if command == "up" else ("--port", str(ports.server))
    if "workers" in command:
        flags = (*flags, "--workers", "2", "--worker-port-base", str(free_range(2)))
    url = ("--database-url", sqlite_url(tmp_path / "a.db"))
    with socket.create_server(("::1", ports.server), family=socket.AF_INET6):
        result = run(command.split(maxsplit=1)[0], *url, "--host", host, *flags, folder=tmp_path)
    written = f"[{host}]" if ":" in host else host
    # Log lines may precede the error.
    assert result.returncode == 1, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("daybook: ")]
    assert f"{written}:{ports.server}" in line
    assert reason in line
    assert "Traceback" not in result.stderr
