"""Runs the work of a command until it ends, fails or is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, TypeVar

import typer

from server.config import CannotStart, Settings
from server.ledger.errors import DaybookError, SchemaTooNew, Unavailable

Result = TypeVar("Result")


@contextlib.contextmanager
def failing_in_one_line() -> Iterator[None]:
    """Turns an error that the operator can fix into one line and an exit code of docs/reference/commands.md.

    These are errors in arguments, settings, files, folders and ports. Any other exception is
    a defect and keeps its traceback.
    """
    try:
        yield
    except (CannotStart, DaybookError, SchemaTooNew, ValueError, OSError) as error:
        typer.echo(f"daybook: {_words(error)}", err=True)
        raise typer.Exit(_code_of(error)) from None


def _code_of(error: Exception) -> int:
    match error:
        case Unavailable():
            return os.EX_TEMPFAIL
        case SchemaTooNew():
            return os.EX_PROTOCOL
        case _:
            return 1


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return str(error)


def run(work: Coroutine[Any, Any, None]) -> None:
    """Runs the work of a command in an event loop."""
    with failing_in_one_line():
        asyncio.run(work)


class Stopped(asyncio.Event):
    """Set by the first SIGINT or SIGTERM."""

    number = signal.SIGTERM
    """The signal, once the event is set."""

    def drain_seconds(self, settings: Settings) -> float:
        """The time in which load balancers notice the stop, in seconds; 0 after SIGINT, the Ctrl-C of a terminal."""
        return settings.shutdown_drain_seconds if self.number == signal.SIGTERM else 0.0


@contextlib.asynccontextmanager
async def until_stopped() -> AsyncIterator[Stopped]:
    """An event that SIGINT and SIGTERM set. A second signal kills the process."""
    stopped = Stopped()
    loop = asyncio.get_running_loop()

    def stop(received: signal.Signals) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
            # Python's own handler of SIGINT would raise KeyboardInterrupt and unwind instead of killing.
            signal.signal(number, signal.SIG_DFL)
        stopped.number = received
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    yield stopped


async def unless(stopped: asyncio.Event, work: Coroutine[Any, Any, Result]) -> Result | None:
    """The result of the work; None if the event is set first. Then the work is cancelled and awaited."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stopped.wait())
    await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not working.done():
        working.cancel()
        await asyncio.wait([working])
    return None if working.cancelled() else working.result()


async def first_of(*waits: Coroutine[Any, Any, object]) -> None:
    """Waits for the first of these to end, and cancels the others. Raises the error of the first."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    for task in done:
        task.result()
