"""Admission: calls wait once their headers arrive, keys share the places, and an overload is refused with TOO_BUSY."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from daybook.v1.admin_service_pb2 import ImportTransactionsRequest, VerifyAccountsRequest
from daybook.v1.ledger_service_pb2 import (
    CreateTransactionRequest,
    GetAccountRequest,
    GetBalanceRequest,
    ListTransactionsRequest,
)
from daybook.v1.transaction_pb2 import Transaction
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.app import serving
from server.book import Book
from server.config import Settings
from server.transport import calls
from tests.support.callers import OWN_CONNECTION, Client, Server
from tests.support.databases import held_writer, readers_exhausted
from tests.support.markers import only_postgresql, only_sqlite
from tests.support.methods import METHODS
from tests.support.metrics import Measured
from tests.support.processes import free_port
from tests.support.refusals import read_refusal, refusal_of

PLACES = 8
STREAM_PLACES = 2
SHARE = PLACES // 2
"""The places of a key while no other key calls."""
TOO_BUSY = ("RESOURCE_EXHAUSTED", "TOO_BUSY")
CREDENTIAL_INVALID = ("UNAUTHENTICATED", "CREDENTIAL_INVALID")
CREATE = "/daybook.v1.Ledger/CreateTransaction"


@dataclass(frozen=True, slots=True)
class Crowded(Measured):
    """A server with few places, and metrics."""

    port: int


@pytest.fixture
async def crowded(book: Book) -> AsyncIterator[Crowded]:
    """A server with few places, and metrics."""
    metrics_port = free_port()
    settings = Settings(
        port=0,
        metrics_port=metrics_port,
        shutdown_grace_seconds=1,
        calls_in_flight_max=PLACES,
        streams_in_flight_max=STREAM_PLACES,
        admission_seconds_max=0,
    )
    async with serving(book, settings) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Crowded(Server(book, channel), metrics_port, port)


@pytest.fixture
async def client(crowded: Crowded) -> Client:
    """A caller with every scope, a cached credential and an account `acme`."""
    client = await crowded.server.client(await crowded.server.create_tenant("house"), scopes={"admin"})
    await client.create_account("acme")
    await client.post("acme", Transaction.GRANT, "1")
    return client


async def another(crowded: Crowded) -> Client:
    """A caller of the same tenant with another key, whose credential is cached."""
    tenant_number = await crowded.server.book.credentials.tenant_number("house")
    assert tenant_number is not None
    client = await crowded.server.client(tenant_number)
    await client.balance()
    return client


async def until_in_flight(crowded: Crowded, calls: int, kind: str = "call") -> None:
    """Returns once exactly `calls` calls of this kind are in flight."""
    await crowded.until(lambda found: found.one("daybook_rpc_in_flight_calls", kind=kind) == calls)


def start_posts(client: Client, count: int) -> list[asyncio.Task[Transaction]]:
    """Starts `count` concurrent postings."""
    return [asyncio.create_task(client.post("acme", Transaction.GRANT, "1")) for _ in range(count)]


@pytest.mark.one_server
async def test_key_beyond_its_share_is_refused(
    crowded: Crowded, client: Client, admin: Client, database_url: str
) -> None:
    """A key beyond its share is refused at once; calls of other keys and health checks are served, and none is lost."""
    other = await another(crowded)
    async with asyncio.timeout(60):
        async with held_writer(database_url):
            posts = start_posts(client, SHARE)
            await until_in_flight(crowded, SHARE)
            for call in (
                client.ledger.ListTransactions(
                    ListTransactionsRequest(parent="accounts/acme"), metadata=client.metadata
                ),
                client.ledger.GetAccount(GetAccountRequest(name="no name"), metadata=client.metadata),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                refusal = read_refusal(caught.value)
                assert refusal.verdict == TOO_BUSY
                assert refusal.retry_delay == Duration(seconds=1)
                # The gateway passes it on as the header Retry-After.
                assert dict(caught.value.trailing_metadata())["retry-after"] == "1"
            listing = ListTransactionsRequest(parent="accounts/acme")
            assert len((await other.ledger.ListTransactions(listing, metadata=other.metadata)).transactions) == 1
            posts += start_posts(other, 1)
            await until_in_flight(crowded, SHARE + 1)
            health: Any = health_pb2_grpc.HealthStub(crowded.server.channel)
            checked = await health.Check(health_pb2.HealthCheckRequest(service="daybook.v1.Ledger"))
            assert checked.status == health_pb2.HealthCheckResponse.SERVING
            assert not any(post.done() for post in posts)
        posted = await asyncio.gather(*posts)
    assert sorted(row.sequence for row in posted) == list(range(2, SHARE + 3))
    assert (await client.balance()).amount == str(SHARE + 2)
    found = await crowded.until(lambda found: found.one("daybook_rpc_in_flight_calls", kind="call") == 0)
    assert found.one("daybook_rpc_in_flight_limit_calls", kind="call") == PLACES
    assert found.one("daybook_rpc_rejected_calls_total", kind="call") == 2
    assert found.one("daybook_rpc_refusals_total", reason="TOO_BUSY") == 2
    assert await admin.verify() == []


@pytest.fixture
async def admin(crowded: Crowded) -> Client:
    """A caller who may verify."""
    return await crowded.server.client(await crowded.server.create_tenant("auditors"), scopes={"admin"})


@pytest.mark.one_server
async def test_call_is_refused_before_its_body_arrives(crowded: Crowded, client: Client, database_url: str) -> None:
    """Without a free place a call is refused once its headers arrive, without its body."""
    never = asyncio.Event()

    async def body() -> AsyncIterator[Any]:
        await never.wait()
        yield b""

    async with asyncio.timeout(60):
        async with held_writer(database_url):
            posts = start_posts(client, SHARE)
            await until_in_flight(crowded, SHARE)
            upload: Any = crowded.server.channel.stream_unary(CREATE)
            assert (await refusal_of(upload(body(), metadata=client.metadata))).verdict == TOO_BUSY
        await asyncio.gather(*posts)


@only_postgresql
async def test_unauthenticated_calls_have_one_share(crowded: Crowded, client: Client) -> None:
    """Calls whose credentials are looked up hold at most one share of places, however many they invent."""
    callers = [Client(crowded.server.channel, key(number)) for number in range(PLACES)]
    async with asyncio.timeout(60):
        async with readers_exhausted(crowded.server.book):
            balances = [asyncio.create_task(refusal_of(caller.balance())) for caller in callers]
            await until_in_flight(crowded, SHARE)
            await crowded.until(lambda found: found.one("daybook_rpc_rejected_calls_total", kind="call") == SHARE)
            balance = asyncio.create_task(client.balance())
            await until_in_flight(crowded, SHARE + 1)
        verdicts = [refusal.verdict for refusal in await asyncio.gather(*balances)]
        assert (await balance).amount == "1"
    assert sorted(verdicts) == sorted([TOO_BUSY] * SHARE + [CREDENTIAL_INVALID] * SHARE)
    await until_in_flight(crowded, 0)


@pytest.mark.parametrize("method", ["CreateTransaction", "ExportTransactions"])
async def test_unauthenticated_call_is_refused_before_its_body_arrives(crowded: Crowded, method: str) -> None:
    """A call without a valid credential is refused although its body never arrives, and holds no place then."""
    never = asyncio.Event()

    async def body() -> AsyncIterator[Any]:
        await never.wait()
        yield b""

    upload: Any = crowded.server.channel.stream_unary(f"/daybook.v1.Ledger/{method}")
    async with asyncio.timeout(60):
        metadata = Client(crowded.server.channel, key(1)).metadata
        assert (await refusal_of(upload(body(), metadata=metadata))).verdict == CREDENTIAL_INVALID
        assert (await refusal_of(upload(body()))).verdict == ("UNAUTHENTICATED", "CREDENTIAL_MISSING")
        await until_in_flight(crowded, 0)


async def test_waiting_refused_calls_take_no_places(
    crowded: Crowded, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused calls that wait for their bodies leave all places free. When too many wait, others don't wait."""
    monkeypatch.setattr(calls, "REFUSED_REQUEST_SECONDS_MAX", 60.0)
    monkeypatch.setattr(calls, "REFUSED_WAITING_MAX", SHARE - 1)
    never = asyncio.Event()

    async def body() -> AsyncIterator[Any]:
        await never.wait()
        yield b""

    upload: Any = crowded.server.channel.stream_unary(CREATE)
    callers = [Client(crowded.server.channel, key(number)) for number in range(SHARE)]
    async with asyncio.timeout(60):
        refusals = [asyncio.create_task(refusal_of(upload(body(), metadata=each.metadata))) for each in callers]
        (refused,), waiting = await asyncio.wait(refusals, return_when=asyncio.FIRST_COMPLETED)
        assert refused.result().verdict == CREDENTIAL_INVALID
        await until_in_flight(crowded, 0)
        assert (await client.post("acme", Transaction.GRANT, "1")).amount == "1"
        assert not any(each.done() for each in waiting)
        for each in waiting:
            each.cancel()
        await asyncio.wait(waiting)


def key(number: int) -> str:
    """A well-formed API key that doesn't exist."""
    return f"{number:020}.secret"


@only_sqlite
async def test_streams_and_calls_have_separate_places(crowded: Crowded, client: Client) -> None:
    """A key's streams take no place from its calls, and a stream beyond the limit is refused."""
    never = asyncio.Event()

    async def items() -> AsyncIterator[ImportTransactionsRequest]:
        await never.wait()
        yield ImportTransactionsRequest()

    async with asyncio.timeout(60):
        stream = client.admin.ImportTransactions(items(), metadata=client.metadata)
        await until_in_flight(crowded, 1, "stream")
        assert (
            await refusal_of(client.admin.ImportTransactions(items(), metadata=client.metadata))
        ).verdict == TOO_BUSY
        verify = client.admin.VerifyAccounts(VerifyAccountsRequest(), metadata=client.metadata)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await verify.read()
        assert read_refusal(caught.value).verdict == TOO_BUSY
        assert (await client.balance()).amount == "1"
        stream.cancel()
        await until_in_flight(crowded, 0, "stream")
        assert await client.verify() == []
        await until_in_flight(crowded, 0, "stream")


@pytest.mark.one_server
async def test_every_place_is_released(crowded: Crowded, client: Client, database_url: str) -> None:
    """A call frees its place however it ends: cancelled, timed out, malformed, refused or disconnected."""
    address = f"127.0.0.1:{crowded.port}"
    async with asyncio.timeout(60):
        async with held_writer(database_url):
            cancelled = start_posts(client, SHARE)
            await until_in_flight(crowded, SHARE)
            for post in cancelled:
                post.cancel()
            await until_in_flight(crowded, 0)
            grant = Transaction(kind=Transaction.GRANT, amount="1", category="test")
            posting = CreateTransactionRequest(parent="accounts/acme", transaction=grant)
            late = client.ledger.CreateTransaction(posting, metadata=client.metadata, timeout=0.2)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await late
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await until_in_flight(crowded, 0)
            async with grpc.aio.insecure_channel(address, options=OWN_CONNECTION) as lost:
                dropped = start_posts(Client(lost, client.key), SHARE)
                await until_in_flight(crowded, SHARE)
            await until_in_flight(crowded, 0)
            await asyncio.wait(dropped)
        for bad in (b"\xff", b"\x0a\x01\xff"):
            with pytest.raises(grpc.aio.AioRpcError):
                await client.raw_call("CreateTransaction", bad)
        headers_alone: Any = crowded.server.channel.stream_unary(CREATE)
        with pytest.raises(grpc.aio.AioRpcError):
            await headers_alone(iter(()), metadata=client.metadata, timeout=0.5)
        await refusal_of(
            client.ledger.GetBalance(GetBalanceRequest(name="accounts/unknown/balance"), metadata=client.metadata)
        )
        await refusal_of(client.ledger.GetBalance(GetBalanceRequest(name="accounts/acme/balance")))
        verifying = client.admin.VerifyAccounts(VerifyAccountsRequest(), metadata=client.metadata)
        await verifying.read()
        verifying.cancel()
        await until_in_flight(crowded, 0)
        await until_in_flight(crowded, 0, "stream")
        # Every place can be used again.
        assert [post.sequence > 1 for post in await asyncio.gather(*start_posts(client, SHARE))] == [True] * SHARE


@pytest.mark.one_server
async def test_calls_wait_for_a_place(book: Book, database_url: str) -> None:
    """More calls than places are all served in turn, and a malformed call gets its own refusal."""
    settings = Settings(port=0, shutdown_grace_seconds=1, calls_in_flight_max=4, admission_seconds_max=60)
    async with serving(book, settings) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        server = Server(book, channel)
        client = await server.client(await server.create_tenant("house"))
        await client.create_account("acme")
        await client.post("acme", Transaction.GRANT, "1")
        async with asyncio.timeout(60):
            async with held_writer(database_url):
                posts = start_posts(client, 20)
                nothing: Any = channel.stream_unary(CREATE)(iter(()), metadata=client.metadata)
                await asyncio.sleep(0)
            rows = await asyncio.gather(*posts)
            assert sorted(row.sequence for row in rows) == list(range(2, 22))
            assert (await refusal_of(nothing)).verdict == ("INVALID_ARGUMENT", "FIELD_INVALID")


WITH_ONE_MESSAGE = [
    *(f"/{method.containing_service.full_name}/{method.name}" for method in METHODS if not method.client_streaming),
    *("/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"),
]
"""The methods whose request is one message."""


@only_sqlite
@pytest.mark.parametrize("method", WITH_ONE_MESSAGE)
async def test_call_without_a_message_is_refused(server: Server, admin: Client, method: str) -> None:
    """A call that ends before its message is answered: grpc.aio's own unary handlers would never do so."""
    call: Any = server.channel.stream_stream(method)(iter(()), metadata=admin.metadata)
    async with asyncio.timeout(60):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.one_server
async def test_wait_for_a_place_is_bounded(book: Book, database_url: str) -> None:
    """A call that gets no place in time is refused, and its request_id stays free."""
    settings = Settings(port=0, shutdown_grace_seconds=1, calls_in_flight_max=2, admission_seconds_max=0.1)
    async with serving(book, settings) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        server = Server(book, channel)
        client = await server.client(await server.create_tenant("house"))
        await client.create_account("acme")
        await client.post("acme", Transaction.GRANT, "1")
        async with asyncio.timeout(60):
            async with held_writer(database_url):
                posts = [
                    asyncio.create_task(client.post("acme", Transaction.GRANT, "1", request_id=f"r-{number}"))
                    for number in range(2)
                ]
                done, pending = await asyncio.wait(posts, return_when=asyncio.FIRST_COMPLETED)
                assert [await refusal_of(each) for each in done] != []
            await asyncio.gather(*pending)
            for number in range(2):
                await client.post("acme", Transaction.GRANT, "1", request_id=f"r-{number}")
        assert (await client.balance()).amount == "3"


@only_sqlite
async def test_grpc_refuses_none_of_thousands_of_calls(book: Book) -> None:
    """gRPC itself refuses no call, even while thousands wait for the server's event loop."""
    calls, connections = 4000, 4
    settings = Settings(port=0, shutdown_grace_seconds=1, calls_in_flight_max=4 * calls)
    async with AsyncExitStack() as stack:
        port = await stack.enter_async_context(serving(book, settings))
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OWN_CONNECTION))
            for _ in range(connections)
        ]
        first = Server(book, channels[0])
        client = await first.client(await first.create_tenant("house"))
        await client.create_account("acme")
        clients = [Client(channel, client.key) for channel in channels]
        async with asyncio.timeout(60):
            # Client and server share an event loop, so all calls are sent before the first is handled.
            amounts = await asyncio.gather(*(clients[number % connections].balance() for number in range(calls)))
        assert {balance.amount for balance in amounts} == {"0"}


async def test_call_without_a_body_releases_its_place(book: Book) -> None:
    """The time limit of a call starts with its headers, so a call without a body frees its place."""
    never = asyncio.Event()

    async def body() -> AsyncIterator[Any]:
        await never.wait()
        yield b""

    metrics_port = free_port()
    settings = Settings(port=0, metrics_port=metrics_port, shutdown_grace_seconds=1, call_seconds_max=1)
    async with serving(book, settings) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        crowded = Crowded(Server(book, channel), metrics_port, port)
        client = await crowded.server.client(await crowded.server.create_tenant("house"))
        stalled: Any = channel.stream_unary(CREATE)(body(), metadata=client.metadata)
        async with asyncio.timeout(60):
            await until_in_flight(crowded, 1)
            await until_in_flight(crowded, 0)
        stalled.cancel()
