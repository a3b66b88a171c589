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
from grpc_health.v1._async import HealthServicer

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

Check = Callable[[], Awaitable[bool]]
"""Returns whether calls can be answered. An exception means that they can't."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health(HealthServicer):
    """gRPC's standard health service, with the method List that grpcio-health-checking lacks."""

    def __init__(self) -> None:
        super().__init__()
        self._services = {""}

    async def set(self, service: str, status: int) -> None:
        """Sets the status of a service, which List includes from then on."""
        self._services.add(service)
        await super().set(service, status)

    async def List(self, _request: Message, context: Context) -> Message:
        """Returns the status of each service."""
        # The typed stubs lack List.
        response: Message = cast("Any", health_pb2).HealthListResponse(
            statuses={
                name: await self.Check(health_pb2.HealthCheckRequest(service=name), context)
                for name in sorted(self._services)
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
            await health.set(service, _SERVING if is_ready else _NOT_SERVING)
        if not is_ready:
            log.warning("not ready", hint="database unavailable, read-only or not migrated, or clock skew too large")
        elif was_ready is not None:
            log.info("ready")
        was_ready = is_ready

    await health.set("", _SERVING)
    await update()
    try:
        async with repeating(update, CHECK_SECONDS, "readiness check failed"):
            yield
    finally:
        await health.enter_graceful_shutdown()
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
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=ANSWER_SECONDS_MAX)
        except grpc.aio.AioRpcError:
            return False
    return bool(answer.status == _SERVING)
