"""The processes of a scenario: what serves, what is killed, and how it comes back."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.support.databases import PostgreSQL
from tests.support.gateways import gateway_before
from tests.support.http_client import send
from tests.support.ledgers import prepare
from tests.support.processes import Daybook, Ports, free_range, sqlite_url
from tests.support.waiting import wait_until

DISK_MIB = 384
BLOCK_BYTES = 4096
FAILURES = 100
"""Batches of postings that fail for lack of room before the disk has room again."""


class Victim(Protocol):
    """A process or a disk that a scenario ends and starts again. Both calls block."""

    def end(self) -> None:
        """Ends the process, or fills the disk."""

    def start(self) -> None:
        """Starts the process again and returns once it works, or makes room on the disk."""


@dataclass
class Stage:
    """A running ledger."""

    port: int
    """Where callers connect."""
    key: str
    """A key with the scope `admin`."""
    victims: list[Victim]
    """They are ended in turn."""
    has_gateway: bool = False
    """Whether callers connect to the gateway."""


class Server:
    """A `daybook serve` that a signal ends."""

    def __init__(self, database_url: str, port: int, folder: Path, number: signal.Signals) -> None:
        self._database_url, self._port, self._folder, self._signal = database_url, port, folder, number
        self._daybook: Daybook | None = None

    def start(self) -> None:
        """Starts it on its port; returns once it serves."""
        flags = ("--database-url", self._database_url, "--port", str(self._port))
        self._daybook = Daybook.start("serve", *flags, folder=self._folder, ports=Ports(self._port, 0, 0))
        self._daybook.wait_for(" serving ")

    def end(self) -> None:
        """Sends the signal and waits for the end. After SIGTERM the exit code must be 0."""
        assert self._daybook is not None
        code = self._daybook.stop(self._signal)
        assert code == (0 if self._signal is signal.SIGTERM else -self._signal), self._daybook.stderr
        assert "Traceback" not in self._daybook.stderr, self._daybook.stderr

    def failures(self) -> int:
        """How often its database had no room."""
        assert self._daybook is not None
        return len(re.findall("disk is full|sqlstate=53100", self._daybook.stderr))

    def close(self) -> None:
        """Kills it if it still runs."""
        if self._daybook is not None:
            self._daybook.kill()


class Database:
    """A PostgreSQL whose processes are killed."""

    def __init__(self, postgresql: PostgreSQL) -> None:
        self.end, self.start = postgresql.kill, postgresql.start


class FullDisk:
    """A small disk that is filled up. It "starts" by getting room again."""

    def __init__(self, folder: Path, server: Server, restart: Callable[[], None]) -> None:
        """`restart` starts the database again if the full disk has ended it."""
        self._filling, self._server, self._restart = folder / "filling", server, restart

    def end(self) -> None:
        """Fills the disk; returns once the server has failed often because of that."""
        before = self._server.failures()
        with self._filling.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(BLOCK_BYTES))
        wait_until(lambda: self._server.failures() >= before + FAILURES, "the server fails")

    def start(self) -> None:
        """Makes room."""
        self._filling.unlink()
        self._restart()


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mounts a file system of its own, which only root can do."""
    if os.geteuid() != 0:
        raise PermissionError("a full disk is tried on a file system of its own, which only root can mount")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m,mode=0777", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def postgresql_in(folder: Path) -> Iterator[PostgreSQL]:
    """A PostgreSQL that makes each commit durable, as in production."""
    postgresql = PostgreSQL(folder / "postgresql")
    try:
        postgresql.execute("ALTER SYSTEM RESET fsync")
        postgresql.execute("SELECT pg_reload_conf()")
        yield postgresql
    finally:
        postgresql.stop()


@contextmanager
def killed_server(folder: Path, postgresql: PostgreSQL | None) -> Iterator[Stage]:
    """One server that is killed, on SQLite or PostgreSQL."""
    database_url = sqlite_url(folder / "daybook.db") if postgresql is None else _empty_database(postgresql)
    with _servers(database_url, folder, signal.SIGKILL, count=1) as (port, key, servers):
        yield Stage(port, key, [*servers])


@contextmanager
def killed_database(folder: Path, postgresql: PostgreSQL) -> Iterator[Stage]:
    """One server, whose PostgreSQL is killed."""
    with _servers(_empty_database(postgresql), folder, signal.SIGTERM, count=1) as (port, key, _):
        yield Stage(port, key, [Database(postgresql)])


@contextmanager
def full_sqlite(folder: Path) -> Iterator[Stage]:
    """One server, and the disk of its SQLite file is filled."""
    with (
        small_disk(folder / "disk") as disk,
        _servers(sqlite_url(disk / "daybook.db"), folder, signal.SIGTERM, count=1) as (port, key, servers),
    ):
        yield Stage(port, key, [FullDisk(disk, servers[0], restart=lambda: None)])


@contextmanager
def full_postgresql(folder: Path) -> Iterator[Stage]:
    """One server, and the disk of its PostgreSQL is filled. PostgreSQL ends itself if it can't write its log."""
    with small_disk(folder / "disk") as disk, postgresql_in(disk) as postgresql:
        postgresql.execute("ALTER SYSTEM SET min_wal_size = '32MB'")
        postgresql.execute("ALTER SYSTEM SET max_wal_size = '64MB'")
        postgresql.execute("SELECT pg_reload_conf()")
        database_url = _empty_database(postgresql)
        with _servers(database_url, folder, signal.SIGTERM, count=1) as (port, key, servers):
            yield Stage(port, key, [FullDisk(disk, servers[0], restart=postgresql.start)])


@contextmanager
def two_servers(folder: Path, postgresql: PostgreSQL, number: signal.Signals) -> Iterator[Stage]:
    """Two servers behind Envoy; a signal ends one at a time, the next only after the gateway uses both again."""
    with _servers(_empty_database(postgresql), folder, number, count=2) as (port, key, servers):
        ports = Ports.free()
        with gateway_before(folder, ports.server, ports=ports, workers=2, worker_port_base=port):
            victims: list[Victim] = [_BehindGateway(each, ports.admin) for each in servers]
            yield Stage(ports.gateway, key, victims, has_gateway=True)


class _BehindGateway:
    """A server that counts as started once the gateway uses it and the other one."""

    def __init__(self, server: Server, admin_port: int) -> None:
        self._server, self._admin_port = server, admin_port
        self.end = server.end

    def start(self) -> None:
        """Starts the server; returns once the gateway has two healthy servers."""
        self._server.start()
        wait_until(lambda: self._healthy_count() == 2, "the gateway uses both servers")

    def _healthy_count(self) -> int:
        clusters = send(f"http://127.0.0.1:{self._admin_port}", "/clusters").body.decode()
        return clusters.count("::health_flags::healthy\n")


def _empty_database(postgresql: PostgreSQL) -> str:
    """Creates a database; returns its URL."""
    name = f"chaos_{uuid.uuid4().hex}"
    postgresql.execute(f"CREATE DATABASE {name}")
    return postgresql.url(name)


@contextmanager
def _servers(
    database_url: str, folder: Path, number: signal.Signals, *, count: int
) -> Iterator[tuple[int, str, list[Server]]]:
    """Servers on consecutive ports: the first port, a key, and the servers."""
    key = asyncio.run(prepare(database_url))
    port = free_range(count)
    with ExitStack() as stack:
        servers = [Server(database_url, port + each, folder / f"server-{each}", number) for each in range(count)]
        for server in servers:
            stack.callback(server.close)
            server.start()
        yield port, key, servers
        if number is signal.SIGTERM:
            for server in servers:
                server.end()
