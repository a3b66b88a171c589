"""`daybook serve --workers`: the start, stop and restart of its processes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from pydantic import ValidationError

from server import supervisor
from server.config import CannotStart, Settings
from server.supervisor import FAILURES_MAX, Workers
from tests.support.processes import Daybook, Ports, free_range, require_gone, sqlite_url
from tests.support.waiting import wait_until

Start = Callable[..., Daybook]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `daybook serve --workers 2`; kills the processes that a failed test leaves."""
    started: list[Daybook] = []

    def start(*flags: str, ports: Ports | None = None) -> Daybook:
        ports = ports or Ports.free()
        base = ("--port", str(ports.server), "--worker-port-base", str(free_range(2)))
        url = ("--database-url", sqlite_url(tmp_path / "daybook.db"))
        started.append(
            Daybook.start(
                "serve", "--workers", "2", *base, *url, *flags, folder=tmp_path / f"{len(started)}", ports=ports
            )
        )
        return started[-1]

    yield start
    for each in started:
        each.kill()


def wait_for_workers(daybook: Daybook, count: int) -> None:
    """Returns when `count` workers have served since the start."""
    wait_until(lambda: daybook.stderr.count(" serving ") >= count, f"{count} workers serve\n{daybook.stderr}")


def test_workers_die_with_their_supervisor(start: Start) -> None:
    """After a SIGKILL of the supervisor no worker runs, and the port is free."""
    daybook = start()
    wait_for_workers(daybook, 2)
    family = daybook.family()
    assert len(family) == 2
    daybook.process.kill()
    daybook.process.wait(60)
    require_gone(family)
    with socket.create_server(("127.0.0.1", daybook.ports.server)):
        pass


def test_second_signal_stops_all_immediately(start: Start) -> None:
    """After the first signal the supervisor waits for its workers; a second signal ends it at once."""
    daybook = start("--shutdown-grace-seconds", "600")
    wait_for_workers(daybook, 2)
    family = daybook.family()
    # A suspended worker can't shut down gracefully.
    family[0].suspend()
    daybook.process.send_signal(signal.SIGTERM)
    wait_until(lambda: not family[1].is_running(), "the other worker ends")
    assert daybook.process.poll() is None
    daybook.process.send_signal(signal.SIGINT)
    assert daybook.process.wait(60) != 0
    family[0].resume()
    require_gone(family)


def workers(script: str, count: int = 1, **more: str) -> Workers:
    """Returns workers that run a shell script, whose first argument is the number of the worker."""
    settings = Settings(workers=count, shutdown_drain_seconds=0, shutdown_grace_seconds=0)
    return Workers(settings, {**os.environ, **more}, ("sh", "-c", script, "worker"))


@pytest.mark.parametrize(("script", "status"), [("exit 3", "exit code 3"), ("kill -9 $$", "signal SIGKILL")])
async def test_failing_worker_is_restarted_a_limited_number_of_times(
    script: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that ends at its start is restarted with exponential backoff, until the supervisor fails."""
    pause = 0.02
    monkeypatch.setattr(supervisor, "PAUSE_SECONDS_MIN", pause)
    started = tmp_path / "started"
    some = workers(f'date +%s.%N >> "{started}"; {script}')
    some.start()
    with pytest.raises(CannotStart, match=f"worker 0 ended {FAILURES_MAX} times .* {status}"):
        await some.failed()
    await some.stop(signal.SIGTERM)
    times = [float(line) for line in started.read_text().splitlines()]
    assert len(times) == FAILURES_MAX
    for number, (earlier, later) in enumerate(pairwise(times)):
        assert later - earlier >= pause * 2**number


@pytest.mark.parametrize("code", [os.EX_TEMPFAIL, os.EX_PROTOCOL])
async def test_worker_without_a_database_is_restarted_without_limit(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the database is unavailable or too new, a worker is restarted without limit."""
    monkeypatch.setattr(supervisor, "PAUSE_SECONDS_MAX", 0.01)
    monkeypatch.setattr(supervisor, "PAUSE_SECONDS_MIN", 0.01)
    started, found = tmp_path / "started", tmp_path / "found"
    # At the last start the database is available, and the worker keeps running.
    script = (
        f'echo >> "{started}"; test $(wc -l < "{started}") -gt {2 * FAILURES_MAX} || exit {code}; : > "{found}"; cat'
    )
    some = workers(script)
    some.start()
    failing = asyncio.create_task(some.failed())
    async with asyncio.timeout(60):
        while not found.exists():
            await asyncio.sleep(0.01)
    assert not failing.done()
    failing.cancel()
    await some.stop(signal.SIGTERM)
    assert len(started.read_text()) == 2 * FAILURES_MAX + 1


@pytest.mark.parametrize(("trap", "seconds_max", "said"), [("echo stopped; exit", 60.0, "stopped\n"), ("", 0.2, "")])
async def test_worker_is_stopped_or_killed(
    trap: str, seconds_max: float, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker may stop gracefully after the signal; it is killed after STOP_SECONDS_MAX."""
    monkeypatch.setattr(supervisor, "STOP_SECONDS_MAX", seconds_max)
    begun, heard = tmp_path / "begun", tmp_path / "heard"
    some = workers(f"exec > '{heard}'; trap '{trap}' TERM; : > '{begun}'; while :; do sleep 0.05; done")
    some.start()
    async with asyncio.timeout(60):
        while not (begun.exists() and some._running):
            await asyncio.sleep(0.01)
    pid = some._running[0].pid
    await some.stop(signal.SIGTERM)
    assert heard.read_text() == said
    wait_until(lambda: not psutil.pid_exists(pid), "the worker has ended")


@pytest.mark.parametrize(
    "wrong",
    [
        {"workers": 0},
        {"workers": 65},
        {"workers": 3, "port": 50053},
        {"workers": 3, "worker_port_base": 65534},
    ],
)
def test_invalid_worker_settings_are_refused(wrong: dict[str, int]) -> None:
    """An invalid number of workers, and an invalid or conflicting range of ports, are refused."""
    with pytest.raises(ValidationError, match=r"workers"):
        Settings(**wrong)  # type: ignore[arg-type]


def test_each_worker_has_its_own_port() -> None:
    """Each worker has its own port; a single process has none."""
    assert Settings(workers=3, worker_port_base=6000, port=5999).worker_ports == [6000, 6001, 6002]
    assert Settings(workers=1, worker_port_base=50051).worker_ports == []
