"""What happens around every call: it is timed, its caller found and counted, its errors told.

One interceptor does it all, because grpc.aio asks every interceptor anew for a handler at
each call; this one wraps each method once and keeps the result.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc
import structlog

from server.ledger.errors import DaybookError, FieldInvalid, Internal, InternalFailure, Unavailable
from server.transport.auth import Authenticator, authentication
from server.transport.errors import RenderError, code_of, refuse
from server.transport.limits import RateLimiter
from server.transport.parsing import unless_malformed

log = structlog.get_logger(__name__)

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

OPEN_SERVICES = ("grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection")
"""Served to everybody. They tell nothing that belongs to a tenant."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Stands before every method of every service but OPEN_SERVICES."""

    def __init__(
        self, authenticator: Authenticator, limiter: RateLimiter | None, renderers: Mapping[str, RenderError]
    ) -> None:
        """`renderers` tells, by the full name of a facade's service, how it words errors.

        Without a limiter every credential may call as often as it likes.
        """
        self._authenticator = authenticator
        self._limiter = limiter
        self._renderers = renderers
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
        render = self._renderers.get(service)
        # A documented API has names of its own for its parameters, which are those of JSON.
        parse = unless_malformed(handler.request_deserializer, "name" if render is None else "json_name")
        if handler.unary_unary is not None:
            # The stubs know only synchronous handlers; a server of grpc.aio has coroutines.
            answer: Callable[[Any, Context], Awaitable[Any]] = handler.unary_unary  # type: ignore[assignment]

            async def unary(request: Any, context: Context) -> Any:
                async with self._around(method, context, render):
                    return await answer(_well_formed(request), context)

            return grpc.unary_unary_rpc_method_handler(unary, parse, _unless_bytes(handler.response_serializer))
        if handler.unary_stream is not None:
            answers: Callable[[Any, Context], AsyncIterator[Any]] = handler.unary_stream  # type: ignore[assignment]

            async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
                async with self._around(method, context, render):
                    async for answer in answers(_well_formed(request), context):
                        yield answer

            return grpc.unary_stream_rpc_method_handler(stream, parse, _unless_bytes(handler.response_serializer))
        if handler.stream_unary is not None:
            summary: Callable[[Any, Context], Awaitable[Any]] = handler.stream_unary  # type: ignore[assignment]

            async def upload(requests: Any, context: Context) -> Any:
                async with self._around(method, context, render):
                    return await summary(_all_well_formed(requests), context)

            return grpc.stream_unary_rpc_method_handler(upload, parse, _unless_bytes(handler.response_serializer))
        raise AssertionError(f"{method} streams both ways, and nothing here wraps that")

    @asynccontextmanager
    async def _around(self, method: str, context: Context, render: RenderError | None) -> AsyncIterator[None]:
        started = time.perf_counter()
        code = grpc.StatusCode.OK
        try:
            found = await self._authenticator.authenticate(context.invocation_metadata() or ())
            if self._limiter is not None:
                self._limiter.take(found.caller.credential_id)
            authentication.set(found)
            yield
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
            log.debug("call", method=method, code=code.name, seconds=time.perf_counter() - started)


def _well_formed(request: Any) -> Any:
    if isinstance(request, FieldInvalid):
        raise request
    return request


async def _all_well_formed(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _well_formed(request)


def _unless_bytes(serialize: Callable[[Any], bytes] | None) -> Callable[[Any], bytes]:
    """Lets a servicer answer with a message that is serialized already."""
    assert serialize is not None, "generated code always names one"
    return lambda answer: answer if type(answer) is bytes else serialize(answer)
