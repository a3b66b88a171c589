"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Sequence,
)
from contextlib import aclosing
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

import grpc
from daybook.v1.admin_service_pb2 import ImportTransactionsRequest, ImportTransactionsResponse

from daybook_client import calls
from daybook_client.calls import Call, ImportMessages
from daybook_client.errors import from_rpc_error
from daybook_client.shared import Client
from daybook_client.values import Imported, Page, PastTransaction

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def _unary(build: Callable[P, Call[R]]) -> Callable[Concatenate[AsyncDaybook, P], Coroutine[Any, Any, R]]:
    async def method(self: AsyncDaybook, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self._run(build(*args, **kwargs))

    calls.describe(method, build)
    return method


def _listing(build: Callable[P, Call[Page[T]]]) -> Callable[Concatenate[AsyncDaybook, P], AsyncPages[T]]:
    def method(self: AsyncDaybook, /, *args: P.args, **kwargs: P.kwargs) -> AsyncPages[T]:
        return AsyncPages(self._run, build(*args, **kwargs))

    calls.describe(method, build)
    return method


def _streaming(build: Callable[P, Call[list[R]]]) -> Callable[Concatenate[AsyncDaybook, P], AsyncGenerator[R, None]]:
    def method(self: AsyncDaybook, /, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[R, None]:
        return self._stream(build(*args, **kwargs))

    calls.describe(method, build)
    return method


class AsyncPages(Generic[T]):
    """A list, read page by page: iterate over its items, over its `pages()`, or get one `page()`."""

    def __init__(self, run: Callable[[Call[Page[T]]], Awaitable[Page[T]]], call: Call[Page[T]]) -> None:
        self._run, self._call = run, call

    async def page(self) -> Page[T]:
        """Reads the first page, or that of the page_token. Pass its next_page_token to the method for the next one."""
        return await self._run(self._call)

    async def pages(self) -> AsyncGenerator[Page[T], None]:
        """Reads all pages, each when it is due."""
        page = await self.page()
        yield page
        while page.next_page_token:
            page = await self._run(self._call.with_page_token(page.next_page_token))
            yield page

    async def __aiter__(self) -> AsyncIterator[T]:
        async with aclosing(self.pages()) as pages:
            async for page in pages:
                for item in page.items:
                    yield item


class AsyncDaybook(Client):
    """A client of a ledger. Tasks of one event loop may share it. It is a context manager, or `close` closes it.

    Make it inside a coroutine. A cancelled task cancels its call.
    """

    create_account = _unary(calls.create_account)
    get_account = _unary(calls.get_account)
    list_accounts = _listing(calls.list_accounts)
    update_account = _unary(calls.update_account)
    create_transaction = _unary(calls.create_transaction)
    batch_create_transactions = _unary(calls.batch_create_transactions)
    submit_transactions = _unary(calls.submit_transactions)
    refund_transaction = _unary(calls.refund_transaction)
    transfer_credits = _unary(calls.transfer_credits)
    get_transaction = _unary(calls.get_transaction)
    list_transactions = _listing(calls.list_transactions)
    list_lots = _listing(calls.list_lots)
    get_balance = _unary(calls.get_balance)
    export_transactions = _streaming(calls.export_transactions)
    verify_accounts = _streaming(calls.verify_accounts)
    create_api_key = _unary(calls.create_api_key)
    list_api_keys = _listing(calls.list_api_keys)
    revoke_api_key = _unary(calls.revoke_api_key)
    rotate_api_key = _unary(calls.rotate_api_key)

    async def import_transactions(
        self, items: Iterable[PastTransaction] | AsyncIterable[PastTransaction], *, timeout: float | None = None
    ) -> Imported:
        """Imports past transactions in time order.

        The client does not retry. After an error, call it again with the same items: those that were imported are
        skipped. The metadata of an error has the `index` of the item that failed.
        """
        invoke: Any = self._channel.stream_unary(
            calls.IMPORT_PATH, ImportTransactionsRequest.SerializeToString, ImportTransactionsResponse.FromString
        )
        messages = ImportMessages()
        seconds = self._stream_timeout if timeout is None else timeout
        call = invoke(timeout=seconds, metadata=self._metadata)
        try:
            if isinstance(items, AsyncIterable):
                async for item in items:
                    if (full := messages.add(item)) is not None:
                        await call.write(full)
                if (rest := messages.rest()) is not None:
                    await call.write(rest)
            else:
                for message in calls.import_messages(items):
                    await call.write(message)
            await call.done_writing()
            return calls.to_imported(await call)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        finally:
            call.cancel()

    async def close(self) -> None:
        """Closes the connection; running calls fail with Cancelled."""
        self._is_closed = True
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _open(
        self,
        target: str,
        credentials: grpc.ChannelCredentials | None,
        options: Sequence[tuple[str, Any]],
        sleep: Callable[[float], Any] | None,
    ) -> None:
        self._sleep = sleep or asyncio.sleep
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, options)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, options)

    async def _run(self, call: Call[R]) -> R:
        attempts = self._attempts(call, self._timeout)
        invoke: Any = self._channel.unary_unary(
            call.path, type(call.request).SerializeToString, call.response.FromString
        )
        while True:
            try:
                return call.read(await invoke(call.request, timeout=attempts.seconds_left(), metadata=self._metadata))
            except grpc.RpcError as error:
                delay = attempts.delay_after(error, is_final=self._is_closed)
            await self._sleep(delay)

    async def _stream(self, call: Call[list[R]]) -> AsyncGenerator[R, None]:
        attempts = self._attempts(call, self._stream_timeout)
        invoke: Any = self._channel.unary_stream(
            call.path, type(call.request).SerializeToString, call.response.FromString
        )
        while True:
            responses = invoke(call.request, timeout=attempts.seconds_left(), metadata=self._metadata)
            is_begun = False
            try:
                async for message in responses:
                    is_begun = True
                    for result in call.read(message):
                        yield result
            except grpc.RpcError as error:
                delay = attempts.delay_after(error, is_final=is_begun or self._is_closed)
            else:
                return
            finally:
                responses.cancel()
            await self._sleep(delay)
