"""gRPC's standard health service: whether the process runs, and whether it can answer calls.

The service `` (empty) is the process: SERVING from its start to its stop, independent of the
database, so that an outage of the database doesn't restart servers. Each service of
the contracts is SERVING while its calls can be answered, which needs the database.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import grpc
import structlog
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.background import repeating
from server.ledger.errors import DaybookError
from server.transport.addresses import NO_PROXY

if TYPE_CHECKING:
    # Types only: a client of the health service needs neither, and cryptography loads slowly.
    from server.transport.calls import Context
    from server.transport.certificates import Trust

log = structlog.get_logger(__name__)

CHECK_SECONDS = 2.0
"""Time between two checks, in seconds."""
ANSWER_SECONDS_MAX = 2.0
"""Timeout of one check, in seconds."""
CALL_SECONDS_MAX = 5.0
"""Timeout of a health check of a client, in seconds, as in the gateway: checks wait in gRPC's queue."""

Check = Callable[[], Awaitable[bool]]
"""Returns whether calls can be answered. An exception means that they can't."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health(health_pb2_grpc.HealthServicer):
    """gRPC's standard health service.

    That of grpcio-health-checking lacks List, and a status can't change there while the answer
    to a watching client waits, for instance for a client that doesn't read.
    """

    def __init__(self) -> None:
        """The process is SERVING, and there are no services yet."""
        self._statuses: dict[str, int] = {"": _SERVING}
        self._changed = asyncio.Event()
        self._has_ended = False

    def set(self, service: str, status: int) -> None:
        """Sets the status of a service. Does nothing after the end."""
        if not self._has_ended:
            self._statuses[service] = status
            self._wake_watchers()

    def end(self) -> None:
        """Sets every status to NOT_SERVING for good."""
        self._statuses = dict.fromkeys(self._statuses, _NOT_SERVING)
        self._has_ended = True
        self._wake_watchers()

    def _wake_watchers(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        """Returns the status of a service; NOT_FOUND for an unknown one."""
        if request.service not in self._statuses:
            names = ", ".join(filter(None, self._statuses))
            await context.abort(grpc.StatusCode.NOT_FOUND, f"the services are {names}")
        return health_pb2.HealthCheckResponse(status=self._statuses[request.service])

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """Sends the status of a service now, and again after each change."""
        sent = None
        while True:
            # Taken before the status, so that no change is missed during the write.
            changed = self._changed
            status = self._statuses.get(request.service, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
            if status != sent:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                sent = status
            await changed.wait()

    async def List(self, _request: Message, _context: Context) -> Message:
        """Returns the status of each service."""
        # The typed stubs lack List.
        response: Message = cast("Any", health_pb2).HealthListResponse(
            statuses={
                name: health_pb2.HealthCheckResponse(status=status) for name, status in sorted(self._statuses.items())
            }
        )
        return response


@contextlib.asynccontextmanager
async def watched_health(
    health: Health, services: Sequence[str], check: Check, drain_seconds: Callable[[], float]
) -> AsyncIterator[None]:
    """Sets the status of the services now, and then every CHECK_SECONDS until the end of the block.

    No call waits for a check. At the end every status becomes NOT_SERVING, and the block lasts
    `drain_seconds` longer: gRPC cancels calls that arrive while a server stops, so load
    balancers must have stopped sending them.
    """
    was_ready: bool | None = None

    async def update() -> None:
        nonlocal was_ready
        is_ready = await _is_ready(check)
        if is_ready == was_ready:
            return
        for service in services:
            health.set(service, _SERVING if is_ready else _NOT_SERVING)
        if not is_ready:
            log.warning("not ready", hint="database unavailable, read-only or not migrated, or clock skew too large")
        elif was_ready is not None:
            log.info("ready")
        was_ready = is_ready

    await update()
    try:
        async with repeating(update, CHECK_SECONDS, "readiness check failed"):
            yield
    finally:
        health.end()
        await asyncio.sleep(drain_seconds())


async def _is_ready(check: Check) -> bool:
    try:
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            return await check()
    except (DaybookError, TimeoutError):
        return False
    except Exception:
        log.exception("readiness check failed")
        return False


async def is_serving(address: str, service: str, trust: Trust | None = None) -> bool:
    """Whether the server at an address reports a service as SERVING.

    False if it doesn't answer in time, or its certificate isn't trusted. Without `trust` the connection has no TLS.
    """
    if trust is None:
        connecting = grpc.aio.insecure_channel(address, NO_PROXY)
    else:
        connecting = grpc.aio.secure_channel(address, trust.credentials, (*NO_PROXY, trust.name_option))
    async with connecting as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=CALL_SECONDS_MAX)
        except grpc.aio.AioRpcError:
            return False
    return bool(answer.status == _SERVING)
