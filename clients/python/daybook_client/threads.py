"""The client for threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

import grpc
from daybook.v1.admin_service_pb2 import ImportTransactionsRequest, ImportTransactionsResponse

from daybook_client import calls
from daybook_client.calls import Call
from daybook_client.errors import from_rpc_error
from daybook_client.shared import Client
from daybook_client.values import Imported, Page, PastTransaction

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def _unary(build: Callable[P, Call[R]]) -> Callable[Concatenate[Daybook, P], R]:
    def method(self: Daybook, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._run(build(*args, **kwargs))

    calls.describe(method, build)
    return method


def _listing(build: Callable[P, Call[Page[T]]]) -> Callable[Concatenate[Daybook, P], Pages[T]]:
    def method(self: Daybook, /, *args: P.args, **kwargs: P.kwargs) -> Pages[T]:
        return Pages(self._run, build(*args, **kwargs))

    calls.describe(method, build)
    return method


def _streaming(build: Callable[P, Call[list[R]]]) -> Callable[Concatenate[Daybook, P], Iterator[R]]:
    def method(self: Daybook, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[R]:
        return self._stream(build(*args, **kwargs))

    calls.describe(method, build)
    return method


class Pages(Generic[T]):
    """A list, read page by page: iterate over its items, over its `pages()`, or get one `page()`."""

    def __init__(self, run: Callable[[Call[Page[T]]], Page[T]], call: Call[Page[T]]) -> None:
        self._run, self._call = run, call

    def page(self) -> Page[T]:
        """Reads the first page, or that of the page_token. Pass its next_page_token to the method for the next one."""
        return self._run(self._call)

    def pages(self) -> Iterator[Page[T]]:
        """Reads all pages, each when it is due."""
        page = self.page()
        yield page
        while page.next_page_token:
            page = self._run(self._call.with_page_token(page.next_page_token))
            yield page

    def __iter__(self) -> Iterator[T]:
        for page in self.pages():
            yield from page.items


class Daybook(Client):
    """A client of a ledger. Threads may share it. It is a context manager, or `close` closes it."""

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

    def import_transactions(self, items: Iterable[PastTransaction], *, timeout: float | None = None) -> Imported:
        """Imports past transactions in time order.

        The client does not retry. After an error, call it again with the same items: those that were imported are
        skipped. The metadata of an error has the `index` of the item that failed.
        """
        failures: list[Exception] = []

        def requests() -> Iterator[ImportTransactionsRequest]:
            try:
                yield from calls.import_messages(items)
            except Exception as error:
                # gRPC hides it from the caller.
                failures.append(error)
                raise

        invoke = self._channel.stream_unary(
            calls.IMPORT_PATH, ImportTransactionsRequest.SerializeToString, ImportTransactionsResponse.FromString
        )
        try:
            seconds = self._stream_timeout if timeout is None else timeout
            return calls.to_imported(invoke(requests(), timeout=seconds, metadata=self._metadata))
        except grpc.RpcError as error:
            raise failures[0] if failures else from_rpc_error(error) from error

    def close(self) -> None:
        """Closes the connection; running calls fail with Cancelled."""
        self._is_closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open(
        self,
        target: str,
        credentials: grpc.ChannelCredentials | None,
        options: Sequence[tuple[str, Any]],
        sleep: Callable[[float], Any] | None,
    ) -> None:
        self._sleep = sleep or time.sleep
        if credentials is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            self._channel = grpc.secure_channel(target, credentials, options)

    def _run(self, call: Call[R]) -> R:
        attempts = self._attempts(call, self._timeout)
        invoke: Any = self._channel.unary_unary(
            call.path, type(call.request).SerializeToString, call.response.FromString
        )
        while True:
            try:
                return call.read(invoke(call.request, timeout=attempts.seconds_left(), metadata=self._metadata))
            except grpc.RpcError as error:
                delay = attempts.delay_after(error, is_final=self._is_closed)
            self._sleep(delay)

    def _stream(self, call: Call[list[R]]) -> Iterator[R]:
        attempts = self._attempts(call, self._stream_timeout)
        invoke: Any = self._channel.unary_stream(
            call.path, type(call.request).SerializeToString, call.response.FromString
        )
        while True:
            responses = invoke(call.request, timeout=attempts.seconds_left(), metadata=self._metadata)
            is_begun = False
            try:
                for message in responses:
                    is_begun = True
                    yield from call.read(message)
            except grpc.RpcError as error:
                delay = attempts.delay_after(error, is_final=is_begun or self._is_closed)
            else:
                return
            finally:
                responses.cancel()
            self._sleep(delay)
