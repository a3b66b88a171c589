"""Runs several server processes side by side: starts them, starts again what ends, and stops them together.

Direct callers share one port, which the kernel spreads over the workers (SO_REUSEPORT),
connection by connection. The gateway keeps one connection per address and thread, so each
worker also listens on a port of its own. Each is the program started afresh, because gRPC
must not be forked once it runs.
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
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager

import structlog

from server.config import CannotStart, Settings
from server.transport.addresses import AddressUnusable, bound

log = structlog.get_logger(__name__)

# Safe of a `server` that happens to be in the current folder.
PROGRAM = (sys.executable, "-P", "-m", "server.cli", "worker")
STEADY_SECONDS = 10.0
"""A worker that ends sooner did not start well."""
FAILURES_MAX = 5
"""How often in a row a worker may not start well."""
PAUSE_SECONDS_MIN = 0.1
PAUSE_SECONDS_MAX = 5.0
STOP_SECONDS_MAX = 10.0
"""How long a worker may take to end after its calls have ended."""


class Workers:
    """Processes that are kept running."""

    def __init__(self, settings: Settings, environment: Mapping[str, str], program: Sequence[str] = PROGRAM) -> None:
        """Each runs the program with its number behind it, and gets its settings from the environment."""
        self._settings = settings
        self._environment = environment
        self._program = program
        self._running: dict[int, Process] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._lifeline = contextlib.ExitStack()

    def start(self) -> None:
        """Starts all of them."""
        # All have the end that is read as their standard input. The other is only in this
        # process, and closed with it, however it ends: see end_with_supervisor.
        self._lifeline_end, held = os.pipe()
        for end in (self._lifeline_end, held):
            self._lifeline.callback(os.close, end)
        self._keepers = [asyncio.create_task(self._keep(number)) for number in range(self._settings.workers)]

    async def failed(self) -> None:
        """Raises CannotStart when a worker ends at its start again and again; never returns."""
        done, _ = await asyncio.wait(self._keepers, return_when=asyncio.FIRST_COMPLETED)
        for keeper in done:
            keeper.result()

    async def stop(self) -> None:
        """Lets each finish its calls and end; ends what takes longer than it may."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        running = list(self._running.values())
        for process in running:
            _send(process, signal.SIGTERM)
        try:
            async with asyncio.timeout(self._settings.shutdown_grace_seconds + STOP_SECONDS_MAX):
                await asyncio.gather(*(process.wait() for process in running))
        except TimeoutError:
            log.warning("workers ended by force")
        finally:
            for process in running:
                _send(process, signal.SIGKILL)
            self._lifeline.close()

    async def _keep(self, number: int) -> None:
        """Runs a worker for ever. Raises CannotStart if that is hopeless."""
        loop = asyncio.get_running_loop()
        failures, pause = 0, PAUSE_SECONDS_MIN
        while True:
            started = loop.time()
            process = self._running[number] = await self._run(number)
            code = await process.wait()
            is_steady = loop.time() - started >= STEADY_SECONDS
            if is_steady:
                pause = PAUSE_SECONDS_MIN
            # The database may come back. One that a later version has migrated stops no other worker:
            # those that run go on, as far as the schema lets them.
            if is_steady or code in (os.EX_TEMPFAIL, os.EX_PROTOCOL):
                failures = 0
            else:
                failures += 1
            if failures == FAILURES_MAX:
                raise CannotStart(
                    f"worker {number} ended {failures} times within {STEADY_SECONDS:.0f} seconds of its start, "
                    f"the last time with {_told(code)}; its message is above"
                )
            log.warning("worker ended", worker=number, pid=process.pid, ended_with=_told(code), restart_seconds=pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, PAUSE_SECONDS_MAX)

    async def _run(self, number: int) -> Process:
        return await asyncio.create_subprocess_exec(
            *self._program,
            str(number),
            env=self._environment,
            stdin=self._lifeline_end,
            # Ctrl-C must reach only this process, which stops them.
            start_new_session=True,
        )


@asynccontextmanager
async def supervising(settings: Settings, flags: Mapping[str, object]) -> AsyncIterator[Workers]:
    """Serves with as many processes as the settings say, until the end of the block.

    They get this process's environment, and the flags that it was given. Raises
    CannotStart if one of their ports is taken.
    """
    with contextlib.ExitStack() as held:
        # Bound for as long as this runs: nobody else gets a port while its worker is started again.
        port, *_ = [
            held.enter_context(_held_port(settings.host, each)) for each in (settings.port, *settings.worker_ports)
        ]
        workers = Workers(settings, _environment({**flags, "port": port}))
        log.info("supervising", workers=settings.workers, port=port, worker_ports=settings.worker_ports)
        workers.start()
        try:
            yield workers
        finally:
            await workers.stop()


def end_with_supervisor() -> None:
    """From now on, this worker stops as on SIGTERM when its supervisor is gone, even by a kill -9.

    Its standard input is a pipe, whose other end the kernel closes with the supervisor.
    """

    def wait() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="end with supervisor", daemon=True).start()


def _environment(flags: Mapping[str, object]) -> dict[str, str]:
    given = {f"DAYBOOK_{name.upper()}": str(value) for name, value in flags.items() if value is not None}
    return {**os.environ, **given}


@contextlib.contextmanager
def _held_port(host: str, port: int) -> Iterator[int]:
    """A port that workers can share and nobody else can take; a free one for 0."""
    try:
        with bound(host, port) as held:
            # Only now: a port that others share already is taken.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            yield held.getsockname()[1]
    except AddressUnusable as error:
        raise CannotStart(str(error)) from None


def _send(process: Process, number: signal.Signals) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)


def _told(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
