"""What happens around every call: bounds, observation, whose it is and what they may, and how errors are told.

One interceptor does it all, because grpc.aio asks every interceptor anew for a handler at
each call; this one wraps each method once and keeps the result.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import structlog

from server.ledger.errors import DaybookError, FieldInvalid, Internal, InternalFailure, TimedOut, Unavailable
from server.transport.auth import Authenticator, authentication
from server.transport.deadlines import Deadlines, Work
from server.transport.errors import RenderError, code_of, refuse
from server.transport.limits import RateLimiter
from server.transport.parsing import Naming, unless_malformed, unless_too_long
from server.transport.scopes import declared_scopes
from server.transport.validation import TEXT_CHARACTERS_MAX

log = structlog.get_logger(__name__)

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]

Measure: TypeAlias = Callable[[grpc.StatusCode, str, float], None]
"""Told of each call of a method at its end: its status, the reason if it was refused, and how many seconds it took."""
Trace: TypeAlias = Callable[[Metadata], Callable[[grpc.StatusCode, str], None]]
"""Told of each call of a method when it begins, with its metadata; what that gives is told status and reason."""

OPEN_SERVICES = ("grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection")
"""Served to everybody. They tell nothing that belongs to a tenant."""
UNCERTAIN_SECONDS = 0.1
"""A caller who goes away so shortly before their deadline is taken for one whose deadline is over."""

call_metadata: ContextVar[Metadata] = ContextVar("call_metadata", default=())
"""What the call under way came with; for log lines, which name the request that they belong to."""


@dataclass(frozen=True, slots=True)
class Observation:
    """Who is told of calls. Each is asked once for each method, by its full name."""

    measuring: Callable[[str], Measure] | None = None
    tracing: Callable[[str], Trace] | None = None


@dataclass(frozen=True, slots=True)
class CallBounds:
    """How long calls may take, in seconds, whatever deadline their callers set."""

    call: float
    """One request and one answer."""
    stream: float
    """All of a stream."""
    idle: float
    """From one message of a stream to the next, in either direction."""


@dataclass(frozen=True, slots=True)
class _Method:
    name: str
    scopes: Sequence[str]
    render: RenderError | None
    measure: Measure | None
    trace: Trace | None
    bounds: Sequence[Deadlines]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Stands before every method of every service but OPEN_SERVICES."""

    def __init__(
        self,
        authenticator: Authenticator,
        limiter: RateLimiter | None,
        renderers: Mapping[str, RenderError],
        bounds: CallBounds,
        observation: Observation = Observation(),
        text_characters_max: int = TEXT_CHARACTERS_MAX,
    ) -> None:
        """`renderers` tells, by the full name of a facade's service, how it words errors.

        Without a limiter every credential may call as often as it likes.
        """
        self._authenticator = authenticator
        self._limiter = limiter
        self._renderers = renderers
        self._observation = observation
        self._text_characters_max = text_characters_max
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

    def _wrap(self, name: str, handler: Handler | None) -> Handler | None:
        service = name.partition("/")[0]
        if handler is None or service in OPEN_SERVICES:
            return handler
        measuring, tracing = self._observation.measuring, self._observation.tracing
        method = _Method(
            name=name,
            scopes=declared_scopes(name),
            render=self._renderers.get(service),
            measure=measuring and measuring(name),
            trace=tracing and tracing(name),
            bounds=self._calls if handler.unary_unary is not None else self._streams,
        )
        # A documented API has names of its own for its parameters, which are those of JSON.
        naming: Naming = "name" if method.render is None else "json_name"
        parse = unless_malformed(handler.request_deserializer, naming)
        if self._text_characters_max < TEXT_CHARACTERS_MAX:
            parse = unless_too_long(parse, naming, self._text_characters_max)
        if handler.unary_unary is not None:
            # The stubs know only synchronous handlers; a server of grpc.aio has coroutines.
            answer: Callable[[Any, Context], Awaitable[Any]] = handler.unary_unary  # type: ignore[assignment]

            async def unary(request: Any, context: Context) -> Any:
                async with self._around(method, context, request):
                    return await answer(_well_formed(request), context)

            return grpc.unary_unary_rpc_method_handler(unary, parse, _unless_bytes(handler.response_serializer))
        if handler.unary_stream is not None:
            answers: Callable[[Any, Context], AsyncIterator[Any]] = handler.unary_stream  # type: ignore[assignment]

            async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
                async with self._around(method, context, request) as work:
                    async for answer in answers(_well_formed(request), context):
                        self._idle.begin_anew(work)
                        yield answer

            return grpc.unary_stream_rpc_method_handler(stream, parse, _unless_bytes(handler.response_serializer))
        if handler.stream_unary is not None:
            summary: Callable[[Any, Context], Awaitable[Any]] = handler.stream_unary  # type: ignore[assignment]

            async def upload(requests: Any, context: Context) -> Any:
                async with self._around(method, context) as work:
                    return await summary(self._all_well_formed(requests, work), context)

            return grpc.stream_unary_rpc_method_handler(upload, parse, _unless_bytes(handler.response_serializer))
        raise AssertionError(f"{name} streams both ways, and nothing here wraps that")

    async def _all_well_formed(self, requests: AsyncIterator[Any], work: Work) -> AsyncIterator[Any]:
        async for request in requests:
            self._idle.begin_anew(work)
            yield _well_formed(request)

    @asynccontextmanager
    async def _around(self, method: _Method, context: Context, request: Any = None) -> AsyncIterator[Work]:
        started = time.perf_counter()
        code, reason = grpc.StatusCode.OK, ""
        work = asyncio.current_task()
        assert work is not None, "gRPC makes one for each call"
        for bound in method.bounds:
            bound.begin(work)
        # A tuple; the stubs know the type of a client's metadata only.
        metadata: Metadata = context.invocation_metadata() or ()  # type: ignore[assignment]
        call_metadata.set(metadata)
        end_trace = method.trace and method.trace(metadata)
        try:
            found = await self._authenticator.authenticate(metadata)
            if self._limiter is not None:
                self._limiter.take(found.caller.credential_id)
            authentication.set(found)
            found.caller.require_scope(method.scopes, request)
            yield work
        except DaybookError as error:
            code, reason = code_of(error), error.reason
            if isinstance(error, Internal | Unavailable):
                log.warning("call failed", method=method.name, code=code.name, reason=reason)
            await refuse(context, error, method.render)
        except grpc.aio.AbortError:
            raise
        except GeneratorExit:
            code = _code_of_cancellation(context)
            raise
        except asyncio.CancelledError:
            if not any(bound.end(work) for bound in method.bounds):
                # The caller has gone away, or set a deadline that is sooner.
                code = _code_of_cancellation(context)
                raise
            work.uncancel()
            failure = TimedOut()
            code, reason = code_of(failure), failure.reason
            log.warning("call took too long", method=method.name)
            await refuse(context, failure, method.render)
        except Exception:
            unforeseen = InternalFailure()
            code, reason = code_of(unforeseen), unforeseen.reason
            log.exception("call failed", method=method.name, code=code.name, reason=reason)
            await refuse(context, unforeseen, method.render)
        finally:
            for bound in method.bounds:
                bound.end(work)
            seconds = time.perf_counter() - started
            if method.measure is not None:
                method.measure(code, reason, seconds)
            log.debug("call", method=method.name, code=code.name, seconds=seconds)
            if end_trace is not None:
                end_trace(code, reason)


def _code_of_cancellation(context: Context) -> grpc.StatusCode:
    """What a caller has who is not answered any more: gRPC cancels a call in either case.

    Their time began before it was counted here, so that it may end before it does here.
    """
    remaining = context.time_remaining()
    if remaining is not None and remaining <= UNCERTAIN_SECONDS:
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return grpc.StatusCode.CANCELLED


def _well_formed(request: Any) -> Any:
    if isinstance(request, FieldInvalid):
        raise request
    return request


def _unless_bytes(serialize: Callable[[Any], bytes] | None) -> Callable[[Any], bytes]:
    """Lets a servicer answer with a message that is serialized already."""
    assert serialize is not None, "generated code always names one"
    return lambda answer: answer if type(answer) is bytes else serialize(answer)
