"""Runs several server processes: starts them, restarts those that end, and stops them together.

Direct callers use one shared port, whose connections the kernel distributes over the workers
(SO_REUSEPORT). The gateway keeps one connection per address and thread, so each worker also
listens on a private port. A worker is a new process of the program, not a fork, because gRPC
doesn't survive a fork.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager

import structlog

from server.config import CannotStart, Settings
from server.transport.addresses import AddressUnusable, bound

log = structlog.get_logger(__name__)

# `-P`: a local `server/` must not shadow the package.
PROGRAM = (sys.executable, "-P", "-m", "server.cli", "worker")
STEADY_SECONDS = 10.0
"""A worker that ends within this time counts as failed to start, in seconds."""
FAILURES_MAX = 5
"""Consecutive failed starts of a worker after which the supervisor gives up."""
PAUSE_SECONDS_MIN = 0.1
PAUSE_SECONDS_MAX = 5.0
"""Shortest and longest pause before a restart, in seconds; it doubles with each restart."""
STOP_SECONDS_MAX = 10.0
"""Time that a worker gets to end after its grace period, in seconds. Then it is killed."""


class Workers:
    """The worker processes, each restarted when it ends."""

    def __init__(self, settings: Settings, environment: Mapping[str, str], program: Sequence[str] = PROGRAM) -> None:
        """A worker runs `program` with its number as the last argument, and gets its settings from `environment`."""
        self._settings = settings
        self._environment = environment
        self._program = program
        self._running: dict[int, Process] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._lifeline = contextlib.ExitStack()

    def start(self) -> None:
        """Starts all workers."""
        # A pipe whose read end is the standard input of every worker. Only this process has the
        # write end, which the kernel closes however this process ends: see end_with_supervisor.
        self._lifeline_end, held = os.pipe()
        for end in (self._lifeline_end, held):
            self._lifeline.callback(os.close, end)
        self._keepers = [asyncio.create_task(self._keep(number)) for number in range(self._settings.workers)]

    async def failed(self) -> None:
        """Raises CannotStart when a worker has failed to start FAILURES_MAX times in a row; never returns before."""
        done, _ = await asyncio.wait(self._keepers, return_when=asyncio.FIRST_COMPLETED)
        for keeper in done:
            keeper.result()

    async def stop(self, number: signal.Signals) -> None:
        """Stops all workers gracefully by a signal, and kills those that exceed their drain and grace period."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        running = list(self._running.values())
        for process in running:
            _send(process, number)
        try:
            async with asyncio.timeout(
                self._settings.shutdown_drain_seconds + self._settings.shutdown_grace_seconds + STOP_SECONDS_MAX
            ):
                await asyncio.gather(*(process.wait() for process in running))
        except TimeoutError:
            log.warning("workers killed")
        finally:
            for process in running:
                _send(process, signal.SIGKILL)
            self._lifeline.close()
            await asyncio.gather(*(process.wait() for process in running))

    async def _keep(self, number: int) -> None:
        """Runs a worker, and restarts it when it ends. Raises CannotStart after FAILURES_MAX failed starts."""
        loop = asyncio.get_running_loop()
        failures, pause = 0, PAUSE_SECONDS_MIN
        while True:
            started = loop.time()
            process = self._running[number] = await self._run(number)
            code = await process.wait()
            is_steady = loop.time() - started >= STEADY_SECONDS
            if is_steady:
                pause = PAUSE_SECONDS_MIN
            # EX_TEMPFAIL: the database is unavailable and may return. EX_PROTOCOL: a later version migrated
            # it; this worker can't restart, but the running workers serve as far as the schema allows.
            if is_steady or code in (os.EX_TEMPFAIL, os.EX_PROTOCOL):
                failures = 0
            else:
                failures += 1
            if failures == FAILURES_MAX:
                raise CannotStart(
                    f"worker {number} ended {failures} times within {STEADY_SECONDS:.0f} seconds of its start, "
                    f"the last time with {_describe(code)}; its message is above"
                )
            log.warning(
                "worker ended", worker=number, pid=process.pid, ended_with=_describe(code), restart_seconds=pause
            )
            await asyncio.sleep(pause)
            pause = min(2 * pause, PAUSE_SECONDS_MAX)

    async def _run(self, number: int) -> Process:
        return await asyncio.create_subprocess_exec(
            *self._program,
            str(number),
            env=self._environment,
            stdin=self._lifeline_end,
            # Ctrl-C reaches only this process, which stops the workers.
            start_new_session=True,
        )


@asynccontextmanager
async def supervising(
    settings: Settings, flags: Mapping[str, object], stop_signal: Callable[[], signal.Signals]
) -> AsyncIterator[Workers]:
    """Runs the workers of the settings until the end of the block.

    The workers inherit this process's environment and flags, and are stopped by the signal that
    `stop_signal` returns. Raises CannotStart if one of their ports is taken.
    """
    with contextlib.ExitStack() as held:
        # Bound until the end, so that no other program takes the port of a worker that restarts.
        port, *_ = [
            held.enter_context(_held_port(settings.host, each)) for each in (settings.port, *settings.worker_ports)
        ]
        workers = Workers(settings, _environment({**flags, "port": port}))
        log.info("starting workers", workers=settings.workers, port=port, worker_ports=settings.worker_ports)
        workers.start()
        try:
            yield workers
        finally:
            await workers.stop(stop_signal())


def end_with_supervisor() -> None:
    """Sends this worker SIGINT when its supervisor ends, even by SIGKILL, so that it frees its ports soon.

    The worker's standard input is a pipe; the kernel closes its other end with the supervisor.
    """

    def wait() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, name="end with supervisor", daemon=True).start()


def _environment(flags: Mapping[str, object]) -> dict[str, str]:
    given = {f"DAYBOOK_{name.upper()}": str(value) for name, value in flags.items() if value is not None}
    return {**os.environ, **given}


@contextlib.contextmanager
def _held_port(host: str, port: int) -> Iterator[int]:
    """Binds a port that workers can share and no other program can take; 0 binds a free port."""
    try:
        with bound(host, port) as held:
            # Set after binding: a port that another program shares must count as taken.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            yield held.getsockname()[1]
    except AddressUnusable as error:
        raise CannotStart(str(error)) from None


def _send(process: Process, number: signal.Signals) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)


def _describe(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
