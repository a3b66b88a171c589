"""`daybook serve --workers`: how its processes begin, end, and are started again."""

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
    """Starts `daybook serve --workers 2`; kills what a failed test leaves."""
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
    """Returns when so many workers have begun to serve, since the start."""
    wait_until(lambda: daybook.stderr.count(" serving ") >= count, f"{count} workers serve\n{daybook.stderr}")


def test_workers_die_with_their_supervisor(start: Start) -> None:
    """A kill -9 of the supervisor leaves no worker, and its port is free."""
    daybook = start()
    wait_for_workers(daybook, 2)
    family = daybook.family()
    assert len(family) == 2
    daybook.process.kill()
    daybook.process.wait(60)
    require_gone(family)
    with socket.create_server(("127.0.0.1", daybook.ports.server)):
        pass


def test_second_signal_ends_all_at_once(start: Start) -> None:
    """The first signal waits for a worker that does not end; the second, of another kind, does not."""
    daybook = start("--shutdown-grace-seconds", "600")
    wait_for_workers(daybook, 2)
    family = daybook.family()
    # A worker that is stopped like this can't end in good order.
    family[0].suspend()
    daybook.process.send_signal(signal.SIGTERM)
    wait_until(lambda: not family[1].is_running(), "the other one ends")
    assert daybook.process.poll() is None
    daybook.process.send_signal(signal.SIGINT)
    assert daybook.process.wait(60) != 0
    family[0].resume()
    require_gone(family)


def workers(script: str, count: int = 1, **more: str) -> Workers:
    """Workers that are a shell script, whose first argument is the number."""
    settings = Settings(workers=count, shutdown_drain_seconds=0, shutdown_grace_seconds=0)
    return Workers(settings, {**os.environ, **more}, ("sh", "-c", script, "worker"))


@pytest.mark.parametrize(("script", "told"), [("exit 3", "exit code 3"), ("kill -9 $$", "signal SIGKILL")])
async def test_worker_that_cannot_start_is_given_up(
    script: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that ends at its start is started so many times, with longer and longer pauses, and then given up."""
    pause = 0.02
    monkeypatch.setattr(supervisor, "PAUSE_SECONDS_MIN", pause)
    started = tmp_path / "started"
    some = workers(f'date +%s.%N >> "{started}"; {script}')
    some.start()
    with pytest.raises(CannotStart, match=f"worker 0 ended {FAILURES_MAX} times .* {told}"):
        await some.failed()
    await some.stop(signal.SIGTERM)
    times = [float(line) for line in started.read_text().splitlines()]
    assert len(times) == FAILURES_MAX
    for number, (earlier, later) in enumerate(pairwise(times)):
        assert later - earlier >= pause * 2**number


@pytest.mark.parametrize("code", [os.EX_TEMPFAIL, os.EX_PROTOCOL])
async def test_worker_without_a_database_is_not_given_up(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the database is away, or too new, a worker is started again for as long as it takes."""
    monkeypatch.setattr(supervisor, "PAUSE_SECONDS_MAX", 0.01)
    monkeypatch.setattr(supervisor, "PAUSE_SECONDS_MIN", 0.01)
    started, arrived = tmp_path / "started", tmp_path / "arrived"
    # The last time it finds its database, and runs on.
    script = (
        f'echo >> "{started}"; test $(wc -l < "{started}") -gt {2 * FAILURES_MAX} || exit {code}; : > "{arrived}"; cat'
    )
    some = workers(script)
    some.start()
    failing = asyncio.create_task(some.failed())
    async with asyncio.timeout(60):
        while not arrived.exists():
            await asyncio.sleep(0.01)
    assert not failing.done()
    failing.cancel()
    await some.stop(signal.SIGTERM)
    assert len(started.read_text()) == 2 * FAILURES_MAX + 1


@pytest.mark.parametrize(("trap", "seconds_max", "said"), [("echo stopped; exit", 60.0, "stopped\n"), ("", 0.2, "")])
async def test_worker_may_stop_and_must(
    trap: str, seconds_max: float, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that stops at the signal is let go; one that doesn't is killed once it took longer than it may."""
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
    wait_until(lambda: not psutil.pid_exists(pid), "it is gone")


@pytest.mark.parametrize(
    "wrong",
    [
        {"workers": 0},
        {"workers": 65},
        {"workers": 3, "port": 50053},
        {"workers": 3, "worker_port_base": 65534},
    ],
)
def test_workers_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    """A number or a range of ports that can't be is refused."""
    with pytest.raises(ValidationError, match=r"workers"):
        Settings(**wrong)  # type: ignore[arg-type]


def test_ports_of_workers() -> None:
    """Each worker has a port of its own; a single process has none."""
    assert Settings(workers=3, worker_port_base=6000, port=5999).worker_ports == [6000, 6001, 6002]
    assert Settings(workers=1, worker_port_base=50051).worker_ports == []
