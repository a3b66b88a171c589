"""How long a call may take, whatever its caller asks for: DEADLINE_EXCEEDED, and what was posted stays."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

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
from server.store.postgresql import PostgreSQL
from server.transport.deadlines import Deadlines
from server.usecases.verification import Progress
from tests.support.callers import Client, Server
from tests.support.databases import held_writer
from tests.support.markers import only_postgresql, only_sqlite
from tests.support.methods import facade_requests
from tests.support.refusals import read_refusal, refusal_of

CALL_SECONDS = 0.7
TIMED_OUT = ("DEADLINE_EXCEEDED", "TIMED_OUT")


@pytest.fixture
async def hurried(book: Book) -> AsyncIterator[Server]:
    """A server that lets no call take longer than a moment, and no stream longer than twice that."""
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
    """A caller with every scope in a tenant of their own."""
    return await hurried.client(await hurried.create_tenant("house"), scopes={"admin"})


@asynccontextmanager
async def no_reader_left(book: Book) -> AsyncIterator[None]:
    """Whoever wants to read waits until the end of the block."""
    engine, released = book.database.primary, asyncio.Event()
    size = engine.pools["read"].size

    async def hold(_session: object) -> None:
        await released.wait()

    async with AsyncExitStack() as stack:
        if isinstance(engine, PostgreSQL):
            holding = [asyncio.create_task(engine.run(hold)) for _ in range(size)]
            stack.push_async_callback(asyncio.wait, holding)
            stack.callback(released.set)
            async with asyncio.timeout(60):
                while engine.pools["read"].in_use < size:
                    await asyncio.sleep(0.01)
        else:
            for _ in range(size):
                await stack.enter_async_context(engine.snapshot())
        yield


@pytest.mark.parametrize("deadline", [None, 60.0], ids=["no deadline", "a longer one"])
@only_postgresql
async def test_a_call_ends(hurried: Server, caller: Client, deadline: float | None) -> None:
    """A call that waits for the database ends at the bound, and the next one is well."""
    await caller.create_account("acme")
    request = GetAccountRequest(name="accounts/acme")
    async with no_reader_left(hurried.book):
        started = time.monotonic()
        refusal = await refusal_of(caller.ledger.GetAccount(request, metadata=caller.metadata, timeout=deadline))
        took = time.monotonic() - started
    assert refusal.verdict == TIMED_OUT
    assert CALL_SECONDS <= took < 10 * CALL_SECONDS
    assert (await caller.ledger.GetAccount(request, metadata=caller.metadata)).name == "accounts/acme"
    async with asyncio.timeout(60):
        while watched():
            await asyncio.sleep(0.001)


def watched() -> list[object]:
    """The calls that some bound still counts."""
    bounds = [each for each in gc.get_objects() if isinstance(each, Deadlines)]
    return [work for each in bounds for work in (*each._ends, *each._cancelled)]


@pytest.mark.one_server
async def test_what_was_posted_stays(caller: Client, database_url: str) -> None:
    """A posting that waits too long is answered in time, is posted once it can be, and a repeat gets its answer."""
    await caller.create_account("acme")
    async with held_writer(database_url):
        refusal = await refusal_of(caller.post("acme", Transaction.GRANT, "1", request_id="id"))
    assert refusal.verdict == TIMED_OUT
    posted = await caller.post("acme", Transaction.GRANT, "1", request_id="id")
    assert posted.sequence == 1
    assert await caller.history() == [posted]
    assert await caller.verify() == []


@only_postgresql
async def test_a_vendors_client_is_told_in_its_words(hurried: Server, caller: Client) -> None:
    """Each method of a facade answers 504 and says that it took too long."""

    async def told(method: MethodDescriptor, request: Message) -> tuple[str, str]:
        call: grpc.aio.UnaryStreamMultiCallable[bytes, bytes]
        # Which of one or many answers come makes no difference to a refusal.
        call = hurried.channel.unary_stream(f"/{method.containing_service.full_name}/{method.name}")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(request.SerializeToString(), metadata=caller.metadata).read()
        assert read_refusal(caught.value).verdict == TIMED_OUT
        trailing = dict(caught.value.trailing_metadata())
        return str(trailing["x-error-status"]), str(trailing["x-error-body"])

    async with no_reader_left(hurried.book):
        answers = await asyncio.gather(*(told(*each) for each in facade_requests("acme")))
    for status, body in answers:
        assert status == "504"
        assert '"The request took too long"' in body


@only_sqlite
async def test_a_silent_answer_ends(hurried: Server, caller: Client) -> None:
    """A stream that has nothing to say for too long ends, and whoever verifies next is not told to wait."""
    await caller.create_account("acme")
    for _ in range(3):
        # Two may be under way: a third would be refused if they were still counted.
        async with no_reader_left(hurried.book):
            call = caller.admin.VerifyAccounts(VerifyAccountsRequest(), metadata=caller.metadata)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
        assert read_refusal(caught.value).verdict == TIMED_OUT
    assert await caller.verify() == []


@only_sqlite
async def test_a_stream_that_goes_on_is_left_alone(
    hurried: Server, caller: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream with a message now and then takes longer in all than it may be silent."""

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
async def test_an_import_ends(caller: Client, pause: float, seconds: float) -> None:
    """An import that stalls ends at the bound of silence, and one that never ends at the other; what it did stays."""
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
