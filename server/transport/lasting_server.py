"""Keeps a port served: any client can end a server of grpc.aio by one request.

grpc.aio (1.85) decodes the path of a call in the loop that takes calls, so a path that isn't UTF-8
ends this loop. The server then finishes its running calls, and listens no more.

If methods were registered with the server, it also overwrites memory, which can end the process:
for each registered method the loop has a request for the next call, and its end frees these
requests, but gRPC's core writes into them while the server shuts down. So a server must get its
services from `Services`, which registers no method.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeAlias

import grpc
import structlog

log = structlog.get_logger(__name__)

CHECK_SECONDS = 0.05
"""Time between two checks whether the server still takes calls, in seconds."""
RETRY_SECONDS_MAX = 2.0
"""Longest time between two attempts to create a server, in seconds."""

Create: TypeAlias = Callable[[int], tuple[grpc.aio.Server, int]]
"""Returns a new server that listens on a port, and the port: a free one for 0. Raises if the port is taken."""


class Services(list[grpc.GenericRpcHandler]):
    """Collects the services that generated code adds; has the methods of a server that it calls."""

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Adds services."""
        self += generic_rpc_handlers

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, object]) -> None:
        """Ignores the handlers, which generated code registers a second time, by method name."""


@asynccontextmanager
async def lasting_server(
    create: Create, port: int, grace_seconds: float, running_seconds_max: float = 0.0
) -> AsyncIterator[int]:
    """Serves until the end of the block, and yields the port. Another server replaces one that ends by itself.

    At the end running calls get `grace_seconds`. The running calls of a replaced server get
    `running_seconds_max`. Raises the error of `create` if the first server can't listen.
    """
    server, port = create(port)
    await server.start()
    servers = [server]
    replacing = asyncio.create_task(_replace(servers, partial(create, port), running_seconds_max))
    try:
        yield port
    finally:
        replacing.cancel()
        await asyncio.wait([replacing])
        await asyncio.gather(*(_stop(each, grace_seconds) for each in servers))


async def _stop(server: grpc.aio.Server, grace_seconds: float) -> None:
    """Stops a server. The first `stop` raises UnicodeDecodeError if a request ends the server at the same time."""
    with contextlib.suppress(UnicodeDecodeError):
        await server.stop(grace_seconds)
    # Waits for the end of a stop that has begun.
    await server.stop(grace_seconds)


async def _replace(
    servers: list[grpc.aio.Server], create: Callable[[], tuple[grpc.aio.Server, int]], running_seconds_max: float
) -> None:
    """Appends a new server whenever the last one has ended, and removes the ended one after its calls."""
    ending = set[asyncio.Task[None]]()

    async def end(server: grpc.aio.Server) -> None:
        await _stop(server, running_seconds_max)
        servers.remove(server)

    while True:
        ended = servers[-1]
        try:
            await ended.wait_for_termination(CHECK_SECONDS)
            continue
        # The error that ended the server. Without one it runs.
        except Exception as error:
            log.warning("grpc server ended by a request", error=type(error).__name__)
        server = await _created(create)
        # Before its start, so that it is stopped also if the start is cancelled.
        servers.append(server)
        await server.start()
        task = asyncio.create_task(end(ended))
        ending.add(task)
        task.add_done_callback(ending.discard)


async def _created(create: Callable[[], tuple[grpc.aio.Server, int]]) -> grpc.aio.Server:
    """Creates a new server as soon as the old one has released the port, and later if there is another error."""
    wait_seconds = CHECK_SECONDS
    while True:
        try:
            return create()[0]
        except Exception as error:
            log.warning("grpc server not replaced yet", error=str(error))
        await asyncio.sleep(wait_seconds)
        # gRPC never frees a server that could not listen, so the attempts become rare.
        wait_seconds = min(2 * wait_seconds, RETRY_SECONDS_MAX)
