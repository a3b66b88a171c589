"""Time limits of calls, whatever their deadlines: DEADLINE_EXCEEDED, and everything posted stays."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator

import grpc
import pytest
from daybook.v1.admin_service_pb2 import ImportTransactionsRequest, VerifyAccountsRequest
from daybook.v1.ledger_service_pb2 import GetAccountRequest
from daybook.v1.transaction_pb2 import Transaction
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from server.app import serving
from server.book import Book
from server.config import Settings
from server.transport.deadlines import Deadlines
from server.usecases.verification import Progress
from tests.support.callers import Client, Server
from tests.support.databases import held_writer, readers_exhausted
from tests.support.markers import only_postgresql, only_sqlite
from tests.support.methods import facade_requests
from tests.support.refusals import read_refusal, refusal_of

CALL_SECONDS = 0.7
TIMED_OUT = ("DEADLINE_EXCEEDED", "TIMED_OUT")


@pytest.fixture
async def hurried(book: Book) -> AsyncIterator[Server]:
    """A server with a short time limit for calls, and twice that for streams."""
    settings = Settings(
        port=0,
        shutdown_grace_seconds=1,
        call_seconds_max=CALL_SECONDS,
        stream_seconds_max=2 * CALL_SECONDS,
        stream_idle_seconds_max=CALL_SECONDS,
    )
    async with serving(book, settings) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Server(book, channel)


@pytest.fixture
async def caller(hurried: Server) -> Client:
    """A caller with every scope in its own tenant."""
    return await hurried.client(await hurried.create_tenant("house"), scopes={"admin"})


@pytest.mark.parametrize("deadline", [None, 60.0], ids=["no deadline", "a longer one"])
@only_postgresql
async def test_call_ends_at_the_limit(hurried: Server, caller: Client, deadline: float | None) -> None:
    """A call that waits for the database ends at the limit, and the next one succeeds."""
    await caller.create_account("acme")
    request = GetAccountRequest(name="accounts/acme")
    async with readers_exhausted(hurried.book):
        started = time.monotonic()
        refusal = await refusal_of(caller.ledger.GetAccount(request, metadata=caller.metadata, timeout=deadline))
        took = time.monotonic() - started
    assert refusal.verdict == TIMED_OUT
    assert CALL_SECONDS <= took < 10 * CALL_SECONDS
    assert (await caller.ledger.GetAccount(request, metadata=caller.metadata)).name == "accounts/acme"
    async with asyncio.timeout(60):
        while tracked_calls():
            await asyncio.sleep(0.001)


def tracked_calls() -> list[object]:
    """The calls that any `Deadlines` still tracks."""
    bounds = [each for each in gc.get_objects() if isinstance(each, Deadlines)]
    return [work for each in bounds for work in (*each._ends, *each._cancelled)]


@pytest.mark.one_server
async def test_timed_out_posting_is_posted_once(caller: Client, database_url: str) -> None:
    """A posting that times out is still posted, once, and a repetition gets its answer."""
    await caller.create_account("acme")
    async with held_writer(database_url):
        refusal = await refusal_of(caller.post("acme", Transaction.GRANT, "1", request_id="id"))
    assert refusal.verdict == TIMED_OUT
    posted = await caller.post("acme", Transaction.GRANT, "1", request_id="id")
    assert posted.sequence == 1
    assert await caller.history() == [posted]
    assert await caller.verify() == []


@only_postgresql
async def test_facade_answers_504(hurried: Server, caller: Client) -> None:
    """Each method of a facade answers 504 with a message about the timeout."""

    async def error_of(method: MethodDescriptor, request: Message) -> tuple[str, str]:
        call: grpc.aio.UnaryStreamMultiCallable[bytes, bytes]
        # The refusals of unary and streaming calls are the same on the wire.
        call = hurried.channel.unary_stream(f"/{method.containing_service.full_name}/{method.name}")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(request.SerializeToString(), metadata=caller.metadata).read()
        assert read_refusal(caught.value).verdict == TIMED_OUT
        trailing = dict(caught.value.trailing_metadata())
        return str(trailing["x-error-status"]), str(trailing["x-error-body"])

    async with readers_exhausted(hurried.book):
        answers = await asyncio.gather(*(error_of(*each) for each in facade_requests("acme")))
    for status, body in answers:
        assert status == "504"
        assert '"The request took too long"' in body


@only_sqlite
async def test_silent_stream_ends(hurried: Server, caller: Client) -> None:
    """A stream without a message for too long ends, and stops counting as a running verification."""
    await caller.create_account("acme")
    for _ in range(3):
        # At most two verifications may run, so the third would be refused if the earlier ones still counted.
        async with readers_exhausted(hurried.book):
            call = caller.admin.VerifyAccounts(VerifyAccountsRequest(), metadata=caller.metadata)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
        assert read_refusal(caught.value).verdict == TIMED_OUT
    assert await caller.verify() == []


@only_sqlite
async def test_active_stream_is_not_cancelled(hurried: Server, caller: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that keeps sending messages may take longer than the limit between two messages."""

    async def verify_slowly(_tenant_number: int | None) -> AsyncIterator[Progress]:
        for _ in range(3):
            await asyncio.sleep(CALL_SECONDS / 2)
            yield Progress()
        yield Progress(is_done=True)

    monkeypatch.setattr(hurried.book.verification, "verify_all", verify_slowly)
    assert await caller.verify() == []


def item(second: int) -> ImportTransactionsRequest:
    """A message with one grant."""
    grant = Transaction(kind=Transaction.GRANT, category="test", amount="1")
    return ImportTransactionsRequest(
        items=[
            ImportTransactionsRequest.Item(
                parent="accounts/acme",
                transaction=grant,
                create_time=Timestamp(seconds=second),
                request_id=f"r{second}",
            )
        ]
    )


@only_sqlite
@pytest.mark.parametrize(("pause", "seconds"), [(3600.0, CALL_SECONDS), (CALL_SECONDS / 10, 2 * CALL_SECONDS)])
async def test_import_ends_at_the_limits(caller: Client, pause: float, seconds: float) -> None:
    """A stalled import ends at the limit between messages, an endless one at the limit of streams; its items stay."""
    await caller.create_account("acme")
    sent = 0

    async def messages() -> AsyncIterator[ImportTransactionsRequest]:
        nonlocal sent
        while True:
            sent += 1
            yield item(sent)
            await asyncio.sleep(pause)

    started = time.monotonic()
    refusal = await refusal_of(caller.admin.ImportTransactions(messages(), metadata=caller.metadata))
    took = time.monotonic() - started
    assert refusal.verdict == TIMED_OUT
    assert seconds <= took < 10 * seconds
    sequences = [each.sequence for each in await caller.history()]
    assert sequences == list(range(1, len(sequences) + 1))
    assert len(sequences) in range(1, sent + 1)
    assert await caller.verify() == []
