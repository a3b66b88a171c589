"""Too many calls at once: admitted by their headers, shared out among keys, refused in our words, and none is lost."""

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
from tests.support.callers import OWN_CONNECTION, Client, Server
from tests.support.databases import held_writer
from tests.support.markers import only_sqlite
from tests.support.metrics import Measured
from tests.support.processes import free_port
from tests.support.refusals import read_refusal, refusal_of

PLACES = 8
STREAM_PLACES = 2
SHARE = PLACES // 2
"""What a key gets that calls alone."""
TOO_BUSY = ("RESOURCE_EXHAUSTED", "TOO_BUSY")
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
    """A caller with every scope, whom the server knows, and an account of theirs."""
    client = await crowded.server.client(await crowded.server.create_tenant("house"), scopes={"admin"})
    await client.create_account("acme")
    await client.post("acme", Transaction.GRANT, "1")
    return client


async def another(crowded: Crowded) -> Client:
    """A caller of the same tenant with another key."""
    tenant_number = await crowded.server.book.credentials.tenant_number("house")
    assert tenant_number is not None
    client = await crowded.server.client(tenant_number)
    await client.balance()
    return client


async def until_in_flight(crowded: Crowded, calls: int, kind: str = "call") -> None:
    """Returns when so many calls are under way."""
    await crowded.until(lambda found: found.one("daybook_rpc_in_flight_calls", kind=kind) == calls)


def start_posts(client: Client, count: int) -> list[asyncio.Task[Transaction]]:
    """Posts so many times at once."""
    return [asyncio.create_task(client.post("acme", Transaction.GRANT, "1")) for _ in range(count)]


@pytest.mark.one_server
async def test_a_key_gets_its_share_and_others_theirs(
    crowded: Crowded, client: Client, admin: Client, database_url: str
) -> None:
    """A key that has its share is refused at once; another one's calls are served, health too, and none is lost."""
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
                # What REST has of it.
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
async def test_a_call_is_refused_before_its_body_comes(crowded: Crowded, client: Client, database_url: str) -> None:
    """The headers alone are answered, where there is no place."""
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


@only_sqlite
async def test_unknown_credentials_share_one_share(crowded: Crowded, client: Client) -> None:
    """Callers that were not let in yet hold at most one share, however many credentials they make up."""
    release = asyncio.Event()

    async def body() -> AsyncIterator[Any]:
        await release.wait()
        yield b""

    upload: Any = crowded.server.channel.stream_unary(CREATE)
    async with asyncio.timeout(60):
        calls = [
            asyncio.create_task(refusal_of(upload(body(), metadata=(("authorization", f"Bearer made-up-{number}.x"),))))
            for number in range(PLACES)
        ]
        await until_in_flight(crowded, SHARE)
        await crowded.until(lambda found: found.one("daybook_rpc_rejected_calls_total", kind="call") == SHARE)
        assert (await client.balance()).amount == "1"
        release.set()
        verdicts = [refusal.verdict for refusal in await asyncio.gather(*calls)]
    assert sorted(verdicts) == sorted([TOO_BUSY] * SHARE + [("UNAUTHENTICATED", "CREDENTIAL_INVALID")] * SHARE)
    await until_in_flight(crowded, 0)


@only_sqlite
async def test_streams_and_calls_have_places_of_their_own(crowded: Crowded, client: Client) -> None:
    """A key's imports take no place from its calls, and one too many is refused."""
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
async def test_every_place_comes_back(crowded: Crowded, client: Client, database_url: str) -> None:
    """However a call ends, its place is free again: cancelled, late, malformed, refused, or its connection lost."""
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
            client.ledger.GetBalance(GetBalanceRequest(name="accounts/nobody/balance"), metadata=client.metadata)
        )
        await refusal_of(client.ledger.GetBalance(GetBalanceRequest(name="accounts/acme/balance")))
        verifying = client.admin.VerifyAccounts(VerifyAccountsRequest(), metadata=client.metadata)
        await verifying.read()
        verifying.cancel()
        await until_in_flight(crowded, 0)
        await until_in_flight(crowded, 0, "stream")
        # All of them can be taken again.
        assert [post.sequence > 1 for post in await asyncio.gather(*start_posts(client, SHARE))] == [True] * SHARE


@pytest.mark.one_server
async def test_calls_wait_for_a_place(book: Book, database_url: str) -> None:
    """More calls than places are all served, one after the other, and one that is malformed gets its own refusal."""
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


@pytest.mark.one_server
async def test_a_call_waits_only_so_long(book: Book, database_url: str) -> None:
    """Without a place in time a call is refused, and its request_id is not used up."""
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
async def test_thousands_at_once_are_ours(book: Book) -> None:
    """gRPC refuses no call by itself, though thousands wait until the server looks at them."""
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
            # Client and server share an event loop, so that all calls are sent before the first is looked at.
            amounts = await asyncio.gather(*(clients[number % connections].balance() for number in range(calls)))
        assert {balance.amount for balance in amounts} == {"0"}


async def test_a_body_that_never_comes_keeps_no_place(book: Book) -> None:
    """A call has only so long, from its headers on."""
    never = asyncio.Event()

    async def body() -> AsyncIterator[Any]:
        await never.wait()
        yield b""

    metrics_port = free_port()
    settings = Settings(port=0, metrics_port=metrics_port, shutdown_grace_seconds=1, call_seconds_max=1)
    async with serving(book, settings) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stalled: Any = channel.stream_unary(CREATE)(body())
        async with asyncio.timeout(60):
            crowded = Crowded(Server(book, channel), metrics_port, port)
            await until_in_flight(crowded, 1)
            await until_in_flight(crowded, 0)
        stalled.cancel()
