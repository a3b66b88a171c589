"""The commands that serve gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from functools import partial
from typing import Any, TypeAlias

import structlog
import typer

from server.book import Book, check_demo, database_limits, open_book
from server.cli.options import SERVER, read_settings, with_flags
from server.cli.running import Stopped, first_of, run, unless, until_stopped
from server.config import Settings
from server.ledger.instants import SECOND
from server.supervisor import end_with_supervisor, supervising

app = typer.Typer()


Serving: TypeAlias = Callable[..., contextlib.AbstractAsyncContextManager[int]]


def _load_server() -> Serving:
    """Imports `server.app.serving`, which a supervisor of workers doesn't need."""
    from server.app import serving  # noqa: PLC0415

    # Modules live as long as the process, so the garbage collector needn't visit them.
    gc.freeze()
    return serving


async def _forever() -> None:
    await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def server(
    book: Book, settings: Settings, flags: Mapping[str, object], stopped: Stopped
) -> AsyncIterator[Callable[[], Coroutine[Any, Any, None]]]:
    """Serves in this process or in workers. Yields a function that waits, and raises CannotStart if workers fail."""
    if settings.workers == 1:
        async with _load_server()(book, settings, drain_seconds=partial(stopped.drain_seconds, settings)):
            yield _forever
        return
    await check_demo(book, settings.host)
    async with supervising(settings, flags, lambda: stopped.number) as workers:
        yield workers.failed


def open_ledger(settings: Settings, *, is_worker: bool = False) -> contextlib.AbstractAsyncContextManager[Book]:
    """Opens the ledger of the settings, and migrates its schema first."""

    def while_migrating() -> contextlib.AbstractAsyncContextManager[None]:
        # The supervisor holds the port of its workers.
        if is_worker:
            return contextlib.nullcontext()
        # Loaded only if migrations are missing.
        from server.app import serving_health  # noqa: PLC0415

        return serving_health(settings)

    return open_book(
        settings.database_url,
        limits=database_limits(settings),
        replica_url=settings.database_replica_url,
        clock_skew_max=round(settings.clock_skew_seconds * SECOND),
        while_migrating=while_migrating,
    )


@app.command()
@with_flags(*SERVER)
def serve(**flags: object) -> None:
    """Serves gRPC until SIGINT or SIGTERM. Creates and migrates the database first."""
    settings = read_settings(**flags)

    async def work() -> None:
        async with until_stopped() as stopped, contextlib.AsyncExitStack() as stack:
            book = await unless(stopped, stack.enter_async_context(open_ledger(settings)))
            if book is not None:
                ended = await stack.enter_async_context(server(book, settings, flags, stopped))
                await first_of(stopped.wait(), ended())

    run(work())


@app.command()
def worker(number: int) -> None:
    """Serves as one process of `serve --workers`, which starts it."""
    settings = read_settings()
    serving = _load_server()
    if settings.metrics_port:
        settings = settings.model_copy(update={"metrics_port": settings.metrics_port + number})
    structlog.contextvars.bind_contextvars(worker=number)
    end_with_supervisor()

    async def work() -> None:
        async with until_stopped() as stopped, contextlib.AsyncExitStack() as stack:
            book = await unless(stopped, stack.enter_async_context(open_ledger(settings, is_worker=True)))
            if book is not None:
                drain_seconds, own_port = partial(stopped.drain_seconds, settings), settings.worker_ports[number]
                await stack.enter_async_context(serving(book, settings, own_port=own_port, drain_seconds=drain_seconds))
                await stopped.wait()

    run(work())
