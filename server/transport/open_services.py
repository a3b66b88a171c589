"""Services without a credential: health and reflection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc

from server.ledger.errors import InvalidArgument, TimedOut, TooBusy
from server.transport.errors import refuse
from server.transport.parsing import parsed, parser, read_request

if TYPE_CHECKING:
    from server.transport.calls import Context, Handler

OPEN_SERVICES = (
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
)
"""Served without a credential. They reveal nothing of any tenant."""
OPEN_STREAMS_MAX = 256
"""Maximum number of streams of the open services, in a process. They may last as long as their connections."""
OPEN_REQUEST_SECONDS_MAX = 5.0
"""Longest wait for the request of a call of an open service, in seconds."""


class OpenServices:
    """Wraps the handlers of OPEN_SERVICES, whose calls are neither authenticated nor observed."""

    def __init__(self, text_characters_max: int) -> None:
        self._text_characters_max = text_characters_max
        self._streams = 0

    def wrap(self, handler: Handler) -> Handler:
        """Wraps a handler: refuses malformed and missing requests, and too many streams."""
        inner: Any = handler.unary_unary or handler.unary_stream
        if inner is None:
            return self._reflecting(handler)
        parse = parser(handler.request_deserializer, "name", self._text_characters_max)

        async def read(context: Context) -> Any:
            try:
                async with asyncio.timeout(OPEN_REQUEST_SECONDS_MAX):
                    return parsed(await read_request(context, parse))
            except InvalidArgument as error:
                await refuse(context, error, None)
            except TimeoutError:
                await refuse(context, TimedOut(), None)

        async def answer(_requests: Any, context: Context) -> Any:
            return await inner(await read(context), context)

        async def stream(_requests: Any, context: Context) -> None:
            async with self._counted(context):
                await inner(await read(context), context)

        if handler.unary_unary is not None:
            return grpc.stream_unary_rpc_method_handler(answer, None, handler.response_serializer)
        return grpc.stream_stream_rpc_method_handler(stream, None, handler.response_serializer)

    def _reflecting(self, handler: Handler) -> Handler:
        """Wraps the handler of reflection, which streams both ways: refuses too many streams.

        It refuses malformed requests itself.
        """
        inner: Any = handler.stream_stream

        async def stream(requests: Any, context: Context) -> None:
            async with self._counted(context), aclosing(inner(requests, context)) as answers:
                async for each in answers:
                    await context.write(each)

        return grpc.stream_stream_rpc_method_handler(stream, handler.request_deserializer, handler.response_serializer)

    @asynccontextmanager
    async def _counted(self, context: Context) -> AsyncIterator[None]:
        """Counts a stream, or refuses it if there are too many."""
        if self._streams >= OPEN_STREAMS_MAX:
            await refuse(context, TooBusy(), None)
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1
