"""The commands that serve."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from functools import partial
from typing import Annotated, Any

import structlog
import typer

from server.app import Book, CannotStart, check_demo, database_limits, only_alive, open_book, serving
from server.cli.options import (
    DatabaseUrl,
    GatewayAdminPort,
    GatewayHost,
    GatewayPort,
    Host,
    LogFormat,
    LogLevel,
    MetricsHost,
    MetricsPort,
    OtlpEndpoint,
    Port,
    ShutdownGraceSeconds,
    WorkerCount,
    WorkerPortBase,
    read_settings,
)
from server.cli.running import first_of, run, unless, until_stopped
from server.config import Settings
from server.demo.guide import what_to_try
from server.demo.load import DATABASE_URL as DEMO_DATABASE_URL
from server.demo.load import load as load_demo
from server.gateway import gateway, require_certificates, require_free_ports
from server.ledger.instants import SECOND
from server.supervisor import end_with_supervisor, supervising
from server.transport.addresses import is_loopback


async def _for_ever() -> None:
    await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def _server(
    book: Book, settings: Settings, flags: Mapping[str, object]
) -> AsyncIterator[Callable[[], Coroutine[Any, Any, None]]]:
    """The server, in this process or in several; gives what raises CannotStart if it ends by itself."""
    if settings.workers == 1:
        async with serving(book, settings):
            yield _for_ever
        return
    await check_demo(book, settings.host)
    async with supervising(settings, flags) as workers:
        yield workers.failed


def _open(settings: Settings, *, is_worker: bool = False) -> contextlib.AbstractAsyncContextManager[Book]:
    return open_book(
        settings.database_url,
        limits=database_limits(settings),
        replica_url=settings.database_replica_url,
        clock_skew_max=round(settings.clock_skew_seconds * SECOND),
        # The port of workers is held by their supervisor.
        while_migrating=contextlib.nullcontext if is_worker else partial(only_alive, settings),
    )


def serve(
    database_url: DatabaseUrl = None,
    host: Host = None,
    port: Port = None,
    workers: WorkerCount = None,
    worker_port_base: WorkerPortBase = None,
    shutdown_grace_seconds: ShutdownGraceSeconds = None,
    metrics_host: MetricsHost = None,
    metrics_port: MetricsPort = None,
    otlp_endpoint: OtlpEndpoint = None,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
) -> None:
    """Serves gRPC until SIGINT or SIGTERM. Creates and migrates the database first."""
    flags = locals()
    settings = read_settings(**flags)

    async def work() -> None:
        async with until_stopped() as stopped, contextlib.AsyncExitStack() as stack:
            book = await unless(stopped, stack.enter_async_context(_open(settings)))
            if book is not None:
                ended = await stack.enter_async_context(_server(book, settings, flags))
                await first_of(stopped.wait(), ended())

    run(work())


def worker(number: int) -> None:
    """One of the processes of `serve --workers`, which starts it."""
    settings = read_settings()
    if settings.metrics_port:
        settings = settings.model_copy(update={"metrics_port": settings.metrics_port + number})
    structlog.contextvars.bind_contextvars(worker=number)
    end_with_supervisor()

    async def work() -> None:
        async with until_stopped() as stopped, contextlib.AsyncExitStack() as stack:
            book = await unless(stopped, stack.enter_async_context(_open(settings, is_worker=True)))
            if book is not None:
                await stack.enter_async_context(serving(book, settings, own_port=settings.worker_ports[number]))
                await stopped.wait()

    run(work())


def up(
    database_url: DatabaseUrl = None,
    host: Host = None,
    port: Port = None,
    workers: WorkerCount = None,
    worker_port_base: WorkerPortBase = None,
    gateway_host: GatewayHost = None,
    gateway_port: GatewayPort = None,
    gateway_admin_port: GatewayAdminPort = None,
    shutdown_grace_seconds: ShutdownGraceSeconds = None,
    metrics_host: MetricsHost = None,
    metrics_port: MetricsPort = None,
    otlp_endpoint: OtlpEndpoint = None,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
    with_demo: Annotated[
        bool, typer.Option("--demo", help="load demo data into an empty database, and print what to try")
    ] = False,
) -> None:
    """Serves gRPC, and REST through Envoy beside it, until SIGINT or SIGTERM."""
    flags = {name: value for name, value in locals().items() if name != "with_demo"}
    if with_demo:
        flags["database_url"] = database_url or DEMO_DATABASE_URL
    settings = read_settings(**flags)

    async def work() -> None:
        require_certificates(settings)
        require_free_ports(settings)
        if with_demo:
            await load_demo(settings.database_url)
        async with until_stopped() as stopped, contextlib.AsyncExitStack() as stack:
            book = await unless(stopped, stack.enter_async_context(_open(settings)))
            if book is None:
                return
            if await book.credentials.has_demo_tenant() and not is_loopback(settings.gateway_host):
                raise CannotStart("the database holds demo data: its gateway listens on loopback only")
            async with gateway(settings) as envoy, _server(book, settings, flags) as ended:
                await first_of(envoy.ready(), ended())
                if with_demo:
                    typer.echo(
                        what_to_try(
                            settings.gateway_port,
                            settings.gateway_tls_certificate_file,
                            gateway_host=settings.gateway_host,
                        )
                    )
                await first_of(stopped.wait(), ended(), envoy.process.wait())
                if not stopped.is_set():
                    raise CannotStart("the gateway ended by itself; its message is above")

    run(work())
