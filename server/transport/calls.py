"""What happens around every call: it is bounded, its caller found and counted, their scope checked, its errors told.

One interceptor does it all, because grpc.aio asks every interceptor anew for a handler at
each call; this one wraps each method once and keeps the result.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import structlog

from server.ledger.errors import DaybookError, FieldInvalid, Internal, InternalFailure, TimedOut, Unavailable
from server.transport.auth import Authenticator, authentication
from server.transport.deadlines import Deadlines, Work
from server.transport.errors import RenderError, code_of, refuse
from server.transport.limits import RateLimiter
from server.transport.parsing import unless_malformed
from server.transport.scopes import declared_scopes

log = structlog.get_logger(__name__)

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

OPEN_SERVICES = ("grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection")
"""Served to everybody. They tell nothing that belongs to a tenant."""


@dataclass(frozen=True, slots=True)
class CallBounds:
    """How long calls may take, in seconds, whatever deadline their callers set."""

    call: float
    """One request and one answer."""
    stream: float
    """All of a stream."""
    idle: float
    """From one message of a stream to the next, in either direction."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Stands before every method of every service but OPEN_SERVICES."""

    def __init__(
        self,
        authenticator: Authenticator,
        limiter: RateLimiter | None,
        renderers: Mapping[str, RenderError],
        bounds: CallBounds,
    ) -> None:
        """`renderers` tells, by the full name of a facade's service, how it words errors.

        Without a limiter every credential may call as often as it likes.
        """
        self._authenticator = authenticator
        self._limiter = limiter
        self._renderers = renderers
        self._calls = (Deadlines(bounds.call),)
        self._idle = Deadlines(bounds.idle)
        self._streams = (Deadlines(bounds.stream), self._idle)
        self._wrapped: dict[str, Handler | None] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The handler of a method with all of this around it; None if there is no such method."""
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            wrapped = self._wrap(method.lstrip("/"), await continuation(handler_call_details))
            if wrapped is not None:
                # Bounded: only methods that exist get here.
                self._wrapped[method] = wrapped
        return wrapped

    def _wrap(self, method: str, handler: Handler | None) -> Handler | None:
        service = method.partition("/")[0]
        if handler is None or service in OPEN_SERVICES:
            return handler
        scopes = declared_scopes(method)
        render = self._renderers.get(service)
        # A documented API has names of its own for its parameters, which are those of JSON.
        parse = unless_malformed(handler.request_deserializer, "name" if render is None else "json_name")
        if handler.unary_unary is not None:
            # The stubs know only synchronous handlers; a server of grpc.aio has coroutines.
            answer: Callable[[Any, Context], Awaitable[Any]] = handler.unary_unary  # type: ignore[assignment]

            async def unary(request: Any, context: Context) -> Any:
                async with self._around(method, scopes, context, render, self._calls, request):
                    return await answer(_well_formed(request), context)

            return grpc.unary_unary_rpc_method_handler(unary, parse, _unless_bytes(handler.response_serializer))
        if handler.unary_stream is not None:
            answers: Callable[[Any, Context], AsyncIterator[Any]] = handler.unary_stream  # type: ignore[assignment]

            async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
                async with self._around(method, scopes, context, render, self._streams, request) as work:
                    async for answer in answers(_well_formed(request), context):
                        yield answer
                        self._idle.begin_anew(work)

            return grpc.unary_stream_rpc_method_handler(stream, parse, _unless_bytes(handler.response_serializer))
        if handler.stream_unary is not None:
            summary: Callable[[Any, Context], Awaitable[Any]] = handler.stream_unary  # type: ignore[assignment]

            async def upload(requests: Any, context: Context) -> Any:
                async with self._around(method, scopes, context, render, self._streams) as work:
                    return await summary(self._all_well_formed(requests, work), context)

            return grpc.stream_unary_rpc_method_handler(upload, parse, _unless_bytes(handler.response_serializer))
        raise AssertionError(f"{method} streams both ways, and nothing here wraps that")

    async def _all_well_formed(self, requests: AsyncIterator[Any], work: Work) -> AsyncIterator[Any]:
        async for request in requests:
            self._idle.begin_anew(work)
            yield _well_formed(request)

    @asynccontextmanager
    async def _around(
        self,
        method: str,
        scopes: Sequence[str],
        context: Context,
        render: RenderError | None,
        bounds: Sequence[Deadlines],
        request: Any = None,
    ) -> AsyncIterator[Work]:
        started = time.perf_counter()
        code = grpc.StatusCode.OK
        work = asyncio.current_task()
        assert work is not None, "gRPC makes one for each call"
        for bound in bounds:
            bound.begin(work)
        try:
            found = await self._authenticator.authenticate(context.invocation_metadata() or ())
            if self._limiter is not None:
                self._limiter.take(found.caller.credential_id)
            authentication.set(found)
            found.caller.require_scope(scopes, request)
            yield work
        except asyncio.CancelledError:
            if not any(bound.end(work) for bound in bounds):
                # The caller has gone away, or set a deadline that is sooner.
                raise
            work.uncancel()
            code = grpc.StatusCode.DEADLINE_EXCEEDED
            log.warning("call took too long", method=method)
            await refuse(context, TimedOut(), render)
        except DaybookError as error:
            code = code_of(error)
            if isinstance(error, Internal | Unavailable):
                log.warning("call failed", method=method, reason=error.reason)
            await refuse(context, error, render)
        except grpc.aio.AbortError:
            raise
        except Exception:
            code = grpc.StatusCode.INTERNAL
            log.exception("call failed", method=method)
            await refuse(context, InternalFailure(), render)
        finally:
            for bound in bounds:
                bound.end(work)
            log.debug("call", method=method, code=code.name, seconds=time.perf_counter() - started)


def _well_formed(request: Any) -> Any:
    if isinstance(request, FieldInvalid):
        raise request
    return request


def _unless_bytes(serialize: Callable[[Any], bytes] | None) -> Callable[[Any], bytes]:
    """Lets a servicer answer with a message that is serialized already."""
    assert serialize is not None, "generated code always names one"
    return lambda answer: answer if type(answer) is bytes else serialize(answer)
