"""The handler that every call passes through: admission, authentication, deadlines, observation, errors.

It is one generic handler, which wraps each method once. grpc.aio asks each interceptor for a
handler at every call.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import structlog
from google.protobuf.descriptor_pool import Default

from server.ledger.errors import (
    DaybookError,
    Internal,
    InternalFailure,
    MethodUnknown,
    ServiceUnavailable,
    TimedOut,
    TooBusy,
    Unavailable,
)
from server.transport.admission import Admission, Admissions
from server.transport.auth import Authenticator, authentication, current_caller
from server.transport.call_metadata import call_metadata
from server.transport.deadlines import CallBounds, Deadlines, Work
from server.transport.errors import RenderError, code_of, code_of_cancellation, refuse
from server.transport.inputs import Inputs
from server.transport.limits import RateLimiter
from server.transport.observation import EndTrace, MethodObserver, Observation
from server.transport.open_services import OPEN_SERVICES, OpenServices
from server.transport.parsing import Naming, parsed, parser, read_request
from server.transport.query_names import TARGET_HEADER, QueryNames
from server.transport.rest import cut_of, echo
from server.transport.scopes import declared_scopes

log = structlog.get_logger(__name__)

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
REFUSED_REQUEST_SECONDS_MAX = 1.0
"""Longest wait for the request of a call without a valid credential, in seconds."""
REFUSED_WAITING_MAX = 64
"""Maximum number of such calls that wait, in a process. The gateway counts them as requests in progress."""


@dataclass(frozen=True, slots=True)
class _Method:
    observer: MethodObserver
    scopes: Sequence[str]
    render: RenderError | None
    bounds: Sequence[Deadlines]
    inputs: Inputs | None
    """None for a facade: its vendor defines which input is ignored."""
    query_names: QueryNames | None
    """The query parameters of a facade's method; None for a native method."""
    cut: bytes | None
    """The message that cuts off the file of a failed stream over REST; None for a method without files."""


@dataclass(slots=True)
class _Call:
    """A call in progress, and its outcome."""

    method: _Method
    context: Context
    work: Work
    started: float
    end_trace: EndTrace | None
    code: grpc.StatusCode = grpc.StatusCode.OK
    reason: str = ""
    is_writing: bool = False
    """Whether a message of a stream waits for the client to receive it."""
    has_sent: bool = False
    """Whether a message of a stream was sent."""


def _refusal(error: DaybookError, render: RenderError | None) -> Handler:
    """A handler that refuses every call, streaming or not."""

    async def refused(_requests: object, context: Context) -> None:
        await refuse(context, error, render)

    return grpc.stream_stream_rpc_method_handler(refused)


class StartingHandler(grpc.GenericRpcHandler):
    """Refuses every method with SERVICE_UNAVAILABLE while the server starts."""

    def __init__(self, renderers: Mapping[str, RenderError]) -> None:
        self._renderers = renderers

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler:
        """A handler that refuses, in the error format of the method's service."""
        service = handler_call_details.method.lstrip("/").partition("/")[0]
        return _refusal(ServiceUnavailable(), self._renderers.get(service))


class CallHandler(grpc.GenericRpcHandler):
    """Serves every method of a server; methods of OPEN_SERVICES need no credential.

    Works like an interceptor, without the further coroutines per call of grpc.aio's.
    """

    def __init__(
        self,
        services: Sequence[grpc.GenericRpcHandler],
        authenticator: Authenticator,
        limiter: RateLimiter | None,
        renderers: Mapping[str, RenderError],
        bounds: CallBounds,
        admissions: Admissions,
        observation: Observation,
        text_characters_max: int,
    ) -> None:
        """`renderers` has the error format of each facade, by the full name of its service.

        Without a limiter there is no rate limit.
        """
        self._authenticator = authenticator
        self._limiter = limiter
        self._renderers = renderers
        self._admissions = admissions
        self._observation = observation
        self._open_services = OpenServices(text_characters_max)
        self._text_characters_max = text_characters_max
        self._refused_waiting = 0
        self._calls = (Deadlines(bounds.call),)
        self._idle = Deadlines(bounds.idle)
        self._streams = (Deadlines(bounds.stream), self._idle)
        self._services = services
        self._handlers: dict[str, Handler] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler:
        """The wrapped handler of a method, or a handler that refuses if there is no such method."""
        # The handler runs in the same task. Reading the metadata from its context would convert it again.
        call_metadata.set(handler_call_details.invocation_metadata or ())
        found = self._handlers.get(handler_call_details.method) or self._find(handler_call_details)
        return found or self._refusing(handler_call_details.method.lstrip("/"))

    def _find(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        method = handler_call_details.method
        for service in self._services:
            if (handler := service.service(handler_call_details)) is not None:
                # Bounded by the number of methods.
                wrapped = self._handlers[method] = self._wrap(method.lstrip("/"), handler)
                return wrapped
        return None

    def _refusing(self, name: str) -> Handler:
        """A handler that refuses every call of an unknown method, and names the existing ones."""
        service = name.partition("/")[0]
        services = sorted(each.service_name() for each in self._services if isinstance(each, grpc.ServiceRpcHandler))
        if service in services:
            methods = sorted(method.name for method in Default().FindServiceByName(service).methods)
            hint = f"{service} has {', '.join(methods)}"
        else:
            hint = f"the services are {', '.join(services)}"
        return _refusal(MethodUnknown(echo(name), hint), None)

    def _wrap(self, name: str, handler: Handler) -> Handler:
        """Wraps a handler. gRPC reads a message only when the new handler asks for it, also of a unary request.

        So a call waits for its place before its request is read, and one without a message is refused: gRPC's own
        unary handlers would never answer it.
        """
        service = name.partition("/")[0]
        if service in OPEN_SERVICES:
            return self._open_services.wrap(handler)
        render = self._renderers.get(service)
        method = _Method(
            observer=self._observation.of(name),
            scopes=declared_scopes(name),
            render=render,
            bounds=self._calls if handler.unary_unary is not None else self._streams,
            inputs=Inputs(name) if service not in self._renderers else None,
            query_names=None if render is None else QueryNames(name),
            cut=cut_of(name),
        )
        admission = self._admissions.calls if handler.unary_unary is not None else self._admissions.streams
        return self._around(method, handler, admission)

    def _around(self, method: _Method, handler: Handler, admission: Admission) -> Handler:
        # A facade's fields have the names of the vendor's JSON.
        naming: Naming = "name" if method.render is None else "json_name"
        parse = parser(handler.request_deserializer, naming, self._text_characters_max)
        serialize = _unless_bytes(handler.response_serializer)
        # The stubs declare synchronous handlers; those of grpc.aio are coroutines.
        answer: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary

        async def unary(_requests: Any, context: Context) -> Any:
            async with self._call(method, context) as call:
                leave = await self._take_place(call, admission)
                await self._authenticate_caller(context, leave)
                return await answer(self._authorise(call, await read_request(context, parse)), context)

        # Writes instead of yielding: gRPC leaves an async generator of a broken stream unclosed at its yield.
        async def stream(_requests: Any, context: Context) -> None:
            async with self._call(method, context) as call:
                leave = await self._take_place(call, admission)
                await self._authenticate_caller(context, leave)
                await self._send_all(call, answer(self._authorise(call, await read_request(context, parse)), context))

        async def upload(requests: Any, context: Context) -> Any:
            async with self._call(method, context) as call:
                await self._take_place(call, admission)
                await self._authenticate()
                self._authorise(call, None)
                async with aclosing(self._all_parsed(requests, call.work)) as messages:
                    return await answer(messages, context)

        # gRPC passes a single request on as bytes, so that only authenticated calls have theirs parsed. The requests of
        # an upload are read after it is authenticated.
        if handler.unary_unary is not None:
            return grpc.stream_unary_rpc_method_handler(unary, None, serialize)
        if handler.unary_stream is not None:
            return grpc.stream_stream_rpc_method_handler(stream, None, serialize)
        assert handler.stream_unary is not None, f"{method.observer.method} does not stream both ways"
        return grpc.stream_unary_rpc_method_handler(upload, parse, serialize)

    @asynccontextmanager
    async def _call(self, method: _Method, context: Context) -> AsyncIterator[_Call]:
        """Ends a call whose block fails with the error, and reports every call at its end."""
        work = asyncio.current_task()
        assert work is not None, "gRPC runs each call in a task"
        call = _Call(method, context, work, time.perf_counter(), method.observer.begin())
        try:
            yield call
        except BaseException as error:
            await self._fail(call, error)
            raise
        finally:
            for bound in method.bounds:
                bound.end(work)
            method.observer.end(call.code, call.reason, call.started, call.end_trace)

    async def _take_place(self, call: _Call, admission: Admission) -> Callable[[], None]:
        """Waits for a place, and returns a function that frees it. Raises TooBusy if none becomes free in time."""
        holder = self._authenticator.cached_credential_id(call_metadata.get())
        if not (admission.enter(holder) or await admission.wait(holder)):
            raise TooBusy
        leave = admission.hold(holder, call.method.bounds)
        # The duration of a call doesn't include its wait.
        call.started = time.perf_counter()
        return leave

    async def _send_all(self, call: _Call, answers: AsyncGenerator[Any, None]) -> None:
        async with aclosing(answers) as messages:
            async for each in messages:
                self._idle.restart(call.work)
                call.is_writing = True
                await call.context.write(each)
                call.is_writing, call.has_sent = False, True

    async def _all_parsed(self, requests: AsyncIterator[Any], work: Work) -> AsyncGenerator[Any, None]:
        async for request in requests:
            self._idle.restart(work)
            yield parsed(request)

    async def _authenticate_caller(self, context: Context, leave: Callable[[], None]) -> None:
        """Authenticates a call before its request is read. `leave` frees the place of a refused call."""
        try:
            await self._authenticate()
        except DaybookError:
            leave()
            await self._await_request(context)
            raise

    async def _await_request(self, context: Context) -> None:
        """Waits a short time for the request of a refused call, unless many of them wait.

        grpc.aio's client (1.85) may report INTERNAL if a call ends before the request is sent.
        """
        if self._refused_waiting >= REFUSED_WAITING_MAX:
            return
        self._refused_waiting += 1
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(REFUSED_REQUEST_SECONDS_MAX):
                    await context.read()
        finally:
            self._refused_waiting -= 1

    async def _authenticate(self) -> None:
        """Finds the caller. Raises a DaybookError for one without a valid credential, or beyond its rate limit."""
        found = await self._authenticator.authenticate(call_metadata.get())
        if self._limiter is not None:
            self._limiter.take(found.caller.credential_id)
        authentication.set(found)

    def _authorise(self, call: _Call, request: Any) -> Any:
        """Checks the rights of the caller. Returns the request, completed by the input in the call's headers.

        The request of a stream is None. Raises a DaybookError if the call is refused.
        """
        current_caller().require_scope(call.method.scopes, request)
        if call.method.query_names is not None:
            call.method.query_names.check(str(dict(call_metadata.get()).get(TARGET_HEADER, "")))
        message, inputs = parsed(request), call.method.inputs
        return message if inputs is None else inputs.complete(message, call_metadata.get())

    async def _fail(self, call: _Call, error: BaseException) -> None:
        """Ends the call with a status for the error; returns if the error itself ends the call."""
        method, context, name = call.method, call.context, call.method.observer.method
        match error:
            case grpc.aio.AbortError():
                return
            case asyncio.CancelledError():
                if call.is_writing or not any(bound.end(call.work) for bound in method.bounds):
                    # The client disconnected, its own deadline passed, or it reads nothing, not even a refusal.
                    call.code = code_of_cancellation(context)
                    return
                call.work.uncancel()
                log.warning("call timed out", method=name)
                refusal: DaybookError = TimedOut()
            case DaybookError():
                refusal = error
                if isinstance(error, Internal | Unavailable):
                    log.warning("call failed", method=name, code=code_of(error).name, reason=error.reason)
            case Exception():
                refusal = InternalFailure()
                code = code_of(refusal).name
                log.error("call failed", method=name, code=code, reason=refusal.reason, exc_info=error)
            case _:
                return
        call.code, call.reason = code_of(refusal), refusal.reason
        is_file = call.has_sent and TARGET_HEADER in dict(call_metadata.get())
        await refuse(context, refusal, method.render, method.cut if is_file else None)


def _unless_bytes(serialize: Callable[[Any], bytes] | None) -> Callable[[Any], bytes]:
    """A serializer that leaves bytes unchanged: a servicer may return serialized messages."""
    assert serialize is not None, "generated code always has a serializer"
    return lambda answer: answer if type(answer) is bytes else serialize(answer)
