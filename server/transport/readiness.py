"""Health, as gRPC's standard service tells it: that the process runs, and that it can answer calls.

The service `` (empty) is the process: SERVING from its start to its stop, whatever the
database does, so that nobody restarts a server for the database's sake. Each service of
the contracts is SERVING while calls of it can be answered, which needs the database.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, cast

import grpc
import structlog
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from server.ledger.errors import DaybookError
from server.transport.addresses import NO_PROXY
from server.transport.calls import Context
from server.transport.certificates import Trust

log = structlog.get_logger(__name__)

CHECK_SECONDS = 2.0
"""How long it rests between two looks at the database."""
ANSWER_SECONDS_MAX = 2.0
"""How long the database may take to answer one."""

Check = Callable[[], Awaitable[bool]]
"""Whether calls can be answered. May raise, which means that they can't."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health(HealthServicer):
    """gRPC's standard service with its method List, which grpcio-health-checking leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self._services = {""}

    async def set(self, service: str, status: int) -> None:
        """Sets the status of a service, which List names from then on."""
        self._services.add(service)
        await super().set(service, status)

    async def List(self, _request: Message, context: Context) -> Message:
        """What Check tells of each service."""
        # The stubs with types know no List.
        response: Message = cast("Any", health_pb2).HealthListResponse(
            statuses={
                name: await self.Check(health_pb2.HealthCheckRequest(service=name), context)
                for name in sorted(self._services)
            }
        )
        return response


@contextlib.asynccontextmanager
async def watched_health(health: Health, services: Sequence[str], check: Check) -> AsyncIterator[None]:
    """Keeps what is told of the services true, by a look now and then, until the end of the block.

    No call waits for it. At the end nothing is SERVING any more.
    """
    await health.set("", _SERVING)
    is_ready = await _look(health, services, check, None)
    task = asyncio.create_task(_watch(health, services, check, is_ready))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await health.enter_graceful_shutdown()


async def _watch(health: Health, services: Sequence[str], check: Check, is_ready: bool) -> None:
    while True:
        await asyncio.sleep(CHECK_SECONDS)
        is_ready = await _look(health, services, check, is_ready)


async def _look(health: Health, services: Sequence[str], check: Check, was_ready: bool | None) -> bool:
    is_ready = await _is_ready(check)
    if is_ready != was_ready:
        for service in services:
            await health.set(service, _SERVING if is_ready else _NOT_SERVING)
        if not is_ready:
            log.warning("not ready: the database is away, read-only or not migrated, or the clock is off")
        elif was_ready is not None:
            log.info("ready again")
    return is_ready


async def _is_ready(check: Check) -> bool:
    try:
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            return await check()
    except (DaybookError, TimeoutError):
        return False
    except Exception:
        log.exception("readiness not known")
        return False


async def is_serving(address: str, service: str, trust: Trust | None = None) -> bool:
    """Whether a server of this machine says of a service that it is SERVING.

    False if it doesn't say anything in time, or isn't the one that is trusted. Without trust it is asked without TLS.
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
