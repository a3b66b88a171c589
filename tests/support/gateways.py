"""Additional gateways: with a changed configuration, or in front of a server that fails."""

from __future__ import annotations

import socket
import sqlite3
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from server.config import Settings
from server.gateway.configuration import of_settings, render
from server.gateway.envoy import envoy_path
from server.vendors import all_vendors
from tests.support.http_client import send
from tests.support.processes import Daybook, Ports, copy_database, sqlite_url
from tests.support.waiting import SECONDS_MAX, wait_until

Condition: TypeAlias = Callable[[Daybook, Path], AbstractContextManager[str]]
"""Starts a gateway with its own folder; yields its origin, and stops it at the end of the block."""
OriginIn: TypeAlias = Callable[[str], str]
"""Returns the origin of the gateway in a condition of CONDITIONS; the origin of the demo for an empty string."""


def require_valid(configuration: Path, *options: str) -> None:
    """Fails unless Envoy accepts a file with its configuration, and these options."""
    result = subprocess.run(
        [envoy_path(), "--mode", "validate", "--log-level", "error", "--config-path", str(configuration), *options],
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@contextmanager
def limited(demo: Daybook, folder: Path) -> Iterator[str]:
    """A server that admits two calls of each key, and then one call in 1,000 seconds.

    Facades without a key `demo-<vendor>` in the demo get one, so that the exchanges of two vendors share no key.
    """
    another_key = """
        CREATE TEMPORARY TABLE copy AS SELECT * FROM api_keys WHERE id = 'demo-dreadnode';
        UPDATE copy SET id = 'demo-<vendor>';
        INSERT OR IGNORE INTO api_keys SELECT * FROM copy;
        DROP TABLE copy;
    """
    keys = "".join(another_key.replace("<vendor>", each.service.split(".")[2]) for each in all_vendors())
    settings = {"DAYBOOK_RATE_LIMIT_CALLS_PER_SECOND": "0.001", "DAYBOOK_RATE_LIMIT_BURST": "2"}
    with _changed(demo, folder, keys, settings) as origin:
        yield origin


@contextmanager
def crowded(demo: Daybook, folder: Path) -> Iterator[str]:
    """A gateway with a rate limit of one request per hour for all credentials together, which is used up."""

    def one_an_hour(configuration: dict[str, Any]) -> None:
        limit = rate_limit_of(configuration)
        limit["token_bucket"] = {"max_tokens": 1, "tokens_per_fill": 1, "fill_interval": "3600s"}
        del limit["rate_limits"], limit["descriptors"]

    with gateway_before(folder, demo.ports.server, one_an_hour) as origin:
        wait_until(lambda: send(origin, "/").status == 429, "the bucket is empty")
        yield origin


@contextmanager
def away(_demo: Daybook, folder: Path) -> Iterator[str]:
    """A gateway without a server behind it."""
    with socket.socket() as kept_free:
        # A bound socket that doesn't listen refuses connections, and no other process can get its port.
        kept_free.bind(("127.0.0.1", 0))
        with gateway_before(folder, kept_free.getsockname()[1]) as origin:
            yield origin


@contextmanager
def slow(_demo: Daybook, folder: Path) -> Iterator[str]:
    """A gateway with a timeout of half a second, in front of a server that never answers."""

    def impatient(configuration: dict[str, Any]) -> None:
        # The silent server accepts no connection: health checks would fill its backlog.
        del configuration["static_resources"]["clusters"][0]["health_checks"]
        for each in http_manager(configuration)["route_config"]["virtual_hosts"][0]["routes"]:
            if "idle_timeout" in each.get("route", {}):
                each["route"].update(timeout="0.5s", idle_timeout="0.5s")

    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        gateway_before(folder, silent.getsockname()[1], impatient) as origin,
    ):
        yield origin


@contextmanager
def damaged(demo: Daybook, folder: Path) -> Iterator[str]:
    """A server whose stored rows can't be parsed."""
    with _changed(
        demo, folder, "UPDATE transactions SET body = X'FF'; UPDATE usage_windows SET computing = 'x'"
    ) as origin:
        yield origin


@contextmanager
def lost(demo: Daybook, folder: Path) -> Iterator[str]:
    """A server whose tables for lists are missing."""
    with _changed(demo, folder, "DROP TABLE transactions; DROP TABLE usage_windows") as origin:
        yield origin


@contextmanager
def torn(demo: Daybook, folder: Path) -> Iterator[str]:
    """A server that can't parse the first transaction of each account."""
    with _changed(demo, folder, "UPDATE transactions SET body = X'FF' WHERE sequence = 1") as origin:
        yield origin


CONDITIONS: Mapping[str, Condition] = {each.__name__: each for each in (limited, crowded, away, slow, damaged, lost)}


@contextmanager
def _changed(demo: Daybook, folder: Path, statements: str, settings: Mapping[str, str] | None = None) -> Iterator[str]:
    """Runs a second demo with other settings, on a copy of the database that SQL statements have changed."""
    copy_database(demo.folder / "daybook.db", folder / "daybook.db")
    with closing(sqlite3.connect(folder / "daybook.db")) as connection:
        connection.executescript(statements)
    ports = Ports.free()
    flags = ("up", "--database-url", sqlite_url(folder / "daybook.db"), *ports.flags)
    daybook = Daybook.start(*flags, folder=folder, ports=ports, settings=settings)
    try:
        daybook.wait_for("gateway")
        yield daybook.origin
        assert daybook.stop() == 0
    finally:
        daybook.kill()


def configuration_of(settings: Settings, secrets: Path = Path()) -> dict[str, Any]:
    """Returns the configuration that `daybook up` passes to Envoy, with certificate files in the folder `secrets`."""
    configuration: dict[str, Any] = yaml.safe_load(render(of_settings(settings, secrets)))
    return configuration


def http_manager(configuration: dict[str, Any]) -> Any:
    """Returns the HTTP connection manager of a configuration."""
    return configuration["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]


def rate_limit_of(configuration: dict[str, Any]) -> Any:
    """Returns the gateway's rate limit."""
    (limit,) = [each for each in http_manager(configuration)["http_filters"] if "local_ratelimit" in each["name"]]
    return limit["typed_config"]


def _unchanged(_configuration: dict[str, Any]) -> None:
    pass


@contextmanager
def gateway_before(
    folder: Path,
    server_port: int,
    change: Callable[[dict[str, Any]], None] = _unchanged,
    ports: Ports | None = None,
    **settings: Any,
) -> Iterator[str]:
    """Runs an Envoy in front of the server at a port, with settings and a change to its configuration."""
    ports = ports or Ports.free()
    configuration = configuration_of(
        Settings(port=server_port, gateway_port=ports.gateway, gateway_admin_port=ports.admin, **settings)
    )
    change(configuration)
    (folder / "envoy.yaml").write_text(yaml.safe_dump(configuration))
    command = [
        envoy_path(),
        "--config-path",
        str(folder / "envoy.yaml"),
        "--disable-hot-restart",
        "--log-level",
        "error",
    ]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    origin = f"http://127.0.0.1:{ports.gateway}"

    def answers() -> bool:
        assert process.poll() is None, (folder / "output").read_text()
        try:
            return send(origin, "/healthz").status > 0
        except OSError:
            return False

    try:
        wait_until(answers, "the gateway answers")
        yield origin
    finally:
        process.terminate()
        process.wait(SECONDS_MAX)
