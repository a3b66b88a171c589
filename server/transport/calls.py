"""What happens around every call: bounds, observation, whose it is and what they may, and how errors are told.

One handler does it all, because grpc.aio asks every interceptor anew for a handler at
each call; this one wraps each method once and keeps the result.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import structlog
from google.protobuf.descriptor_pool import Default

from server.ledger.errors import (
    DaybookError,
    FieldInvalid,
    Internal,
    InternalFailure,
    MethodUnknown,
    ServiceUnavailable,
    TimedOut,
    TooBusy,
    Unavailable,
)
from server.transport.admission import Admission, Admissions
from server.transport.auth import Authenticator, authentication
from server.transport.call_metadata import Metadata, call_metadata
from server.transport.deadlines import Deadlines, Work
from server.transport.errors import RenderError, abort, code_of, code_of_cancellation, refuse, trailers_of
from server.transport.inputs import Inputs
from server.transport.limits import RateLimiter
from server.transport.parsing import Naming, unless_malformed, unless_too_long
from server.transport.query_names import TARGET_HEADER, QueryNames
from server.transport.rest import echo
from server.transport.scopes import declared_scopes
from server.transport.validation import TEXT_CHARACTERS_MAX

log = structlog.get_logger(__name__)

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

Measure: TypeAlias = Callable[[grpc.StatusCode, str, float], None]
"""Told of each call of a method at its end: its status, the reason if it was refused, and how many seconds it took."""
Trace: TypeAlias = Callable[[Metadata], Callable[[grpc.StatusCode, str], None]]
"""Told of each call of a method when it begins, with its metadata; what that gives is told status and reason."""

OPEN_SERVICES = (
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
)
"""Served to everybody. They tell nothing that belongs to a tenant."""


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
    inputs: Inputs | None
    """None for a documented API, whose vendor says what is ignored."""
    is_logged: bool
    """Whether each call has a line in the log."""
    query_names: QueryNames | None
    """The parameters that a documented API has over REST; None for a native method."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """How a call of a method is answered."""

    handler: Handler
    belated: Handler
    """The same for a call that must wait for a place."""
    admission: Admission | None
    """None for a method that needs no place."""
    bounds: Sequence[Deadlines]


@dataclass(frozen=True, slots=True)
class _Details(grpc.HandlerCallDetails):
    """What a service is asked for a handler by, where there is no call yet."""

    method: str
    invocation_metadata: tuple[tuple[str, str | bytes], ...] = ()


@dataclass(slots=True)
class _Call:
    """A call under way, and how it ends."""

    method: _Method
    context: Context
    work: Work
    started: float
    end_trace: Callable[[grpc.StatusCode, str], None] | None
    code: grpc.StatusCode = grpc.StatusCode.OK
    reason: str = ""
    is_writing: bool = False
    """Whether a message of a stream waits for its caller to take it."""


def _refusal(error: DaybookError, render: RenderError | None) -> Handler:
    """Refuses every call, whatever it streams."""

    async def refused(_requests: object, context: Context) -> None:
        await refuse(context, error, render)

    return grpc.stream_stream_rpc_method_handler(refused)


class NotYet(grpc.GenericRpcHandler):
    """Refuses every method with SERVICE_UNAVAILABLE, for a server that has not finished its start."""

    def __init__(self, renderers: Mapping[str, RenderError]) -> None:
        self._renderers = renderers

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler:
        """The handler that refuses, in the words of the method's service."""
        service = handler_call_details.method.lstrip("/").partition("/")[0]
        return _refusal(ServiceUnavailable(), self._renderers.get(service))


class CallHandler(grpc.GenericRpcHandler):
    """Has every method of a server, and stands before all but those of OPEN_SERVICES.

    It is an interceptor by what it does, and none of grpc.aio's, which puts coroutines around
    each call to ask it. Generated code adds services to it as if it were the server.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        limiter: RateLimiter | None,
        renderers: Mapping[str, RenderError],
        bounds: CallBounds,
        admissions: Admissions,
        observation: Observation = Observation(),
        text_characters_max: int = TEXT_CHARACTERS_MAX,
    ) -> None:
        """`renderers` tells, by the full name of a facade's service, how it words errors.

        Without a limiter every credential may call as often as it likes.
        """
        self._authenticator = authenticator
        self._limiter = limiter
        self._renderers = renderers
        self._admissions = admissions
        self._observation = observation
        self._text_characters_max = text_characters_max
        self._calls = (Deadlines(bounds.call),)
        self._idle = Deadlines(bounds.idle)
        self._streams = (Deadlines(bounds.stream), self._idle)
        self._services: list[grpc.GenericRpcHandler] = []
        self._entries: dict[str, _Entry] = {}

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Takes a service over."""
        self._services += generic_rpc_handlers

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, object]) -> None:
        """Leaves out what generated code registers by the names of methods as well.

        For each method of that kind grpc.aio has a task wait for its next call, and at every
        call goes through all of these tasks: with two dozen methods that is a fifth of what a
        call costs.
        """

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler:
        """The handler of a method with all of this around it; one that refuses, for a method that doesn't exist."""
        metadata = handler_call_details.invocation_metadata or ()
        # The handler runs in the same task. To ask its context would put all of it together again.
        call_metadata.set(metadata)
        entry = self._entries.get(handler_call_details.method) or self._find(handler_call_details)
        if entry is None:
            return self._refusing(handler_call_details.method.lstrip("/"))
        admission = entry.admission
        if admission is None:
            return entry.handler
        holder = self._authenticator.known_holder(metadata)
        if not admission.enter(holder):
            return entry.belated
        admission.hold(holder, entry.bounds)
        return entry.handler

    def apart(self, method: str) -> Handler:
        """The handler of a method with one request and one answer, for a queue of its own in gRPC.

        gRPC asks `service` for no method that has one.
        """
        entry = self._find(_Details(method))
        assert entry is not None, "the method is one of ours"
        if entry.admission is None:
            return entry.handler
        belated: Callable[[Any, Context], Awaitable[Any]] | None = entry.belated.stream_unary  # type: ignore[assignment]
        assert belated is not None, "such is every handler that waits"

        async def answer(requests: Any, context: Context) -> Any:
            call_metadata.set(context.invocation_metadata() or ())  # type: ignore[arg-type]  # its stub has another type
            return await belated(requests, context)

        return grpc.stream_unary_rpc_method_handler(
            answer, entry.belated.request_deserializer, entry.belated.response_serializer
        )

    def _find(self, handler_call_details: grpc.HandlerCallDetails) -> _Entry | None:
        method = handler_call_details.method
        for service in self._services:
            if (handler := service.service(handler_call_details)) is not None:
                # Bounded: only methods that exist get here.
                entry = self._entries[method] = self._wrap(method.lstrip("/"), handler)
                return entry
        return None

    def _refusing(self, name: str) -> Handler:
        """Refuses every call of an unknown method, whatever it streams, with the names of those that exist."""
        service = name.partition("/")[0]
        services = sorted(each.service_name() for each in self._services if isinstance(each, grpc.ServiceRpcHandler))
        if service in services:
            methods = sorted(method.name for method in Default().FindServiceByName(service).methods)
            known = f"{service} has {', '.join(methods)}"
        else:
            known = f"the services are {', '.join(services)}"
        return _refusal(MethodUnknown(echo(name), known), None)

    def _wrap(self, name: str, handler: Handler) -> _Entry:
        service = name.partition("/")[0]
        if service in OPEN_SERVICES:
            open_handler = _unless_malformed(handler)
            return _Entry(open_handler, open_handler, None, ())
        measuring, tracing = self._observation.measuring, self._observation.tracing
        render = self._renderers.get(service)
        method = _Method(
            name=name,
            scopes=declared_scopes(name),
            render=render,
            measure=measuring and measuring(name),
            trace=tracing and tracing(name),
            bounds=self._calls if handler.unary_unary is not None else self._streams,
            inputs=Inputs(name) if service not in self._renderers else None,
            is_logged=log.is_enabled_for(logging.DEBUG),
            query_names=None if render is None else QueryNames(name),
        )
        admission = self._admissions.calls if handler.unary_unary is not None else self._admissions.streams
        wrapped = self._around(method, handler)
        return _Entry(wrapped, self._belated(method, wrapped, admission), admission, method.bounds)

    def _around(self, method: _Method, handler: Handler) -> Handler:
        # A documented API has names of its own for its parameters, which are those of JSON.
        naming: Naming = "name" if method.render is None else "json_name"
        parse = unless_malformed(handler.request_deserializer, naming)
        if self._text_characters_max < TEXT_CHARACTERS_MAX:
            parse = unless_too_long(parse, naming, self._text_characters_max)
        if handler.unary_unary is not None:
            # The stubs know only synchronous handlers; a server of grpc.aio has coroutines.
            answer: Callable[[Any, Context], Awaitable[Any]] = handler.unary_unary  # type: ignore[assignment]

            async def unary(request: Any, context: Context) -> Any:
                call = self._begin(method, context)
                try:
                    await self._admit(call, request)
                    return await answer(_complete(method, request), context)
                except BaseException as error:
                    await self._fail(call, error)
                    raise
                finally:
                    _end(call)

            return grpc.unary_unary_rpc_method_handler(unary, parse, _unless_bytes(handler.response_serializer))
        if handler.unary_stream is not None:
            answers: Callable[[Any, Context], AsyncGenerator[Any, None]] = handler.unary_stream  # type: ignore[assignment]

            # Writes instead of yielding: gRPC leaves an async generator of a broken stream unclosed at its yield.
            async def stream(request: Any, context: Context) -> None:
                call = self._begin(method, context)
                try:
                    await self._admit(call, request)
                    await self._send_all(call, answers(_complete(method, request), context))
                except BaseException as error:
                    await self._fail(call, error)
                    raise
                finally:
                    _end(call)

            return grpc.unary_stream_rpc_method_handler(stream, parse, _unless_bytes(handler.response_serializer))
        if handler.stream_unary is not None:
            summary: Callable[[Any, Context], Awaitable[Any]] = handler.stream_unary  # type: ignore[assignment]

            async def upload(requests: Any, context: Context) -> Any:
                call = self._begin(method, context)
                try:
                    await self._admit(call)
                    _complete(method, None)
                    async with aclosing(self._all_well_formed(requests, call.work)) as messages:
                        return await summary(messages, context)
                except BaseException as error:
                    await self._fail(call, error)
                    raise
                finally:
                    _end(call)

            return grpc.stream_unary_rpc_method_handler(upload, parse, _unless_bytes(handler.response_serializer))
        raise AssertionError(f"{method.name} streams both ways, and nothing here wraps that")

    def _belated(self, method: _Method, handler: Handler, admission: Admission) -> Handler:
        """Admits a call, perhaps after a wait, or refuses it if there is no place in time; then reads its body."""
        error = TooBusy()
        code, trailers = code_of(error), trailers_of(error, method.render)
        answer: Callable[[Any, Context], Awaitable[Any]] | None = handler.unary_unary  # type: ignore[assignment]

        async def wait(requests: Any, context: Context) -> Any:
            started = time.perf_counter()
            holder = self._authenticator.known_holder(call_metadata.get())
            try:
                has_place = admission.enter(holder) or await admission.wait(holder)
            except asyncio.CancelledError:
                _tell(method, code_of_cancellation(context), "", started, None)
                raise
            if not has_place:
                _tell(method, code, error.reason, started, method.trace and method.trace(call_metadata.get()))
                await abort(context, code, error.message, trailers)
            admission.hold(holder, method.bounds)
            assert answer is not None, "no stream waits for a place"
            async for request in requests:
                return await answer(request, context)
            return await refuse(context, FieldInvalid("request", "is missing"), method.render)

        # gRPC reads a message for such a handler only when it asks for one.
        return grpc.stream_unary_rpc_method_handler(wait, handler.request_deserializer, handler.response_serializer)

    async def _send_all(self, call: _Call, answers: AsyncGenerator[Any, None]) -> None:
        async with aclosing(answers) as messages:
            async for each in messages:
                self._idle.begin_anew(call.work)
                call.is_writing = True
                await call.context.write(each)
                call.is_writing = False

    async def _all_well_formed(self, requests: AsyncIterator[Any], work: Work) -> AsyncGenerator[Any, None]:
        async for request in requests:
            self._idle.begin_anew(work)
            yield _well_formed(request)

    def _begin(self, method: _Method, context: Context) -> _Call:
        work = asyncio.current_task()
        assert work is not None, "gRPC makes one for each call"
        return _Call(method, context, work, time.perf_counter(), method.trace and method.trace(call_metadata.get()))

    async def _admit(self, call: _Call, request: Any = None) -> None:
        """Finds out who calls. Raises what a caller is refused for before anything is done."""
        found = await self._authenticator.authenticate(call_metadata.get())
        if self._limiter is not None:
            self._limiter.take(found.caller.credential_id)
        authentication.set(found)
        found.caller.require_scope(call.method.scopes, request)
        if call.method.query_names is not None:
            call.method.query_names.check(str(dict(call_metadata.get()).get(TARGET_HEADER, "")))

    async def _fail(self, call: _Call, error: BaseException) -> None:
        """Ends a call that was refused, failed or given up; returns where the error itself ends it."""
        method, context = call.method, call.context
        match error:
            case grpc.aio.AbortError():
                return
            case asyncio.CancelledError():
                if call.is_writing or not any(bound.end(call.work) for bound in method.bounds):
                    # The caller has gone away, set a deadline that is sooner, or takes no message, nor a refusal.
                    call.code = code_of_cancellation(context)
                    return
                call.work.uncancel()
                log.warning("call took too long", method=method.name)
                refusal: DaybookError = TimedOut()
            case DaybookError():
                refusal = error
                if isinstance(error, Internal | Unavailable):
                    log.warning("call failed", method=method.name, code=code_of(error).name, reason=error.reason)
            case Exception():
                refusal = InternalFailure()
                code = code_of(refusal).name
                log.error("call failed", method=method.name, code=code, reason=refusal.reason, exc_info=error)
            case _:
                return
        call.code, call.reason = code_of(refusal), refusal.reason
        await refuse(context, refusal, method.render)


def _end(call: _Call) -> None:
    for bound in call.method.bounds:
        bound.end(call.work)
    _tell(call.method, call.code, call.reason, call.started, call.end_trace)


def _tell(
    method: _Method,
    code: grpc.StatusCode,
    reason: str,
    started: float,
    end_trace: Callable[[grpc.StatusCode, str], None] | None,
) -> None:
    seconds = time.perf_counter() - started
    if method.measure is not None:
        method.measure(code, reason, seconds)
    if method.is_logged:
        log.debug("call", method=method.name, code=code.name, seconds=seconds)
    if end_trace is not None:
        end_trace(code, reason)


def _complete(method: _Method, request: Any) -> Any:
    """A well-formed request with all that its caller gave, wherever they gave it; None for a stream."""
    if method.inputs is not None:
        method.inputs.complete(_well_formed(request), call_metadata.get())
    return _well_formed(request)


def _well_formed(request: Any) -> Any:
    if isinstance(request, FieldInvalid):
        raise request
    return request


def _unless_malformed(handler: Handler) -> Handler:
    """Has an open service refuse what is no message; of a stream of requests it reads them itself."""
    parse, serialize = unless_malformed(handler.request_deserializer, "name"), handler.response_serializer
    inner: Any = handler.unary_unary or handler.unary_stream

    async def answer(request: Any, context: Context) -> Any:
        if isinstance(request, FieldInvalid):
            await refuse(context, request, None)
        return await inner(request, context)

    if handler.unary_unary is not None:
        return grpc.unary_unary_rpc_method_handler(answer, parse, serialize)
    if handler.unary_stream is not None:
        return grpc.unary_stream_rpc_method_handler(answer, parse, serialize)
    return handler


def _unless_bytes(serialize: Callable[[Any], bytes] | None) -> Callable[[Any], bytes]:
    """Lets a servicer answer with a message that is serialized already."""
    assert serialize is not None, "generated code always names one"
    return lambda answer: answer if type(answer) is bytes else serialize(answer)
