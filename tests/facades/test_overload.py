"""An overloaded server answers REST calls with 429 in each vendor's error format."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import grpc
import pytest
from daybook.v1.ledger_service_pb2 import CreateTransactionRequest, ListTransactionsRequest
from google.protobuf.message import Message
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthServicer, add_HealthServicer_to_server

from server.config import Settings
from server.demo import dreadnode, nebulablock, spacebring, teable
from tests.support.gateways import configuration_of, gateway_before
from tests.support.http_client import Answer, send
from tests.support.processes import Daybook, Ports, copy_database, sqlite_url
from tests.support.waiting import SECONDS_MAX, wait_until

CREATE = "/daybook.v1.Ledger/CreateTransaction"
LIST = "/daybook.v1.Ledger/ListTransactions"
TOO_MANY = "Too many requests"
ANSWERS: Mapping[str, tuple[str, object]] = {
    f"/api/space/{teable.SPACE}/billing/credit-history?month={teable.MONTH}": (
        teable.KEY,
        {"message": TOO_MANY, "status": 429, "code": "too_many_requests"},
    ),
    "/users/credits/history": (
        nebulablock.DOCUMENTED_KEY,
        {"data": None, "message": TOO_MANY, "status": "failed"},
    ),
    "/transactions/credits/v1": (spacebring.KEY, {"message": TOO_MANY, "type": "tooManyRequests"}),
    f"/api/v1/org/{dreadnode.ORGANIZATION}/credits/transactions": (
        dreadnode.KEY,
        {"code": 429, "detail": TOO_MANY, "type": "rate_limit_error"},
    ),
    f"/api/billing/accounts/{dreadnode.ORGANIZATION}/transactions": (dreadnode.KEY, {"detail": TOO_MANY}),
}
"""A request path of each facade, with its key and the body of its 429 answer."""
NATIVE = f"/v1/accounts/{dreadnode.ORGANIZATION}/transactions"


@pytest.fixture(scope="module")
def full(gateway: Daybook, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daybook]:
    """A second demo, which admits one call at a time."""
    folder, ports = tmp_path_factory.mktemp("full"), Ports.free()
    copy_database(gateway.folder / "daybook.db", folder / "daybook.db")
    settings = {
        "DAYBOOK_CALLS_IN_FLIGHT_MAX": "1",
        "DAYBOOK_CALL_SECONDS_MAX": "600",
        "DAYBOOK_ADMISSION_SECONDS_MAX": "0",
    }
    flags = ("up", "--database-url", sqlite_url(folder / "daybook.db"), *ports.flags)
    daybook = Daybook.start(*flags, folder=folder, ports=ports, settings=settings)
    try:
        daybook.wait_for("gateway")
        yield daybook
    finally:
        daybook.kill()


def get(origin: str, target: str, key: str) -> tuple[int, str | None, Any]:
    """Status, retry-after and body of an answer."""
    headers = {"authorization": f"Bearer {key}.public", "spacebring-network-id": spacebring.NETWORK}
    answer = send(origin, target, headers=headers)
    return answer.status, answer.header("retry-after"), json.loads(answer.body)


async def test_call_without_admission_gets_429(full: Daybook) -> None:
    """While another call occupies the only slot, each API answers 429 with retry-after; otherwise it serves."""
    release = asyncio.Event()

    async def body() -> AsyncIterator[Any]:
        await release.wait()
        yield b""

    def statuses() -> set[int]:
        return {get(full.origin, target, key)[0] for target, (key, _) in ANSWERS.items()}

    metadata = (("authorization", f"Bearer {dreadnode.KEY}.public"),)
    async with asyncio.timeout(SECONDS_MAX), grpc.aio.insecure_channel(f"127.0.0.1:{full.ports.server}") as channel:
        assert await asyncio.to_thread(statuses) == {200}
        holding: Any = channel.stream_unary(CREATE)(body(), metadata=metadata)
        while await asyncio.to_thread(statuses) != {429}:
            # One of the requests may have occupied the slot, so that the call was refused.
            if holding.done():
                holding = channel.stream_unary(CREATE)(body(), metadata=metadata)
        for target, (key, expected) in ANSWERS.items():
            found = await asyncio.to_thread(get, full.origin, target, key)
            assert found == (429, "1", expected), target
        status, retry_after, native = await asyncio.to_thread(get, full.origin, NATIVE, dreadnode.KEY)
        assert (status, retry_after, native["code"]) == (429, "1", 8)
        info, retry = native["details"]
        assert (info["reason"], info["domain"]) == ("TOO_BUSY", "daybook")
        assert retry["retryDelay"] == "1s"
        # Health checks need no admission.
        assert (await asyncio.to_thread(send, full.origin, "/readyz")).status == 200
        assert (await asyncio.to_thread(send, full.origin, "/healthz")).status == 200
        release.set()
        assert await holding.code() is grpc.StatusCode.INVALID_ARGUMENT
        while await asyncio.to_thread(statuses) != {200}:
            pass


def limits_of(configuration: dict[str, Any]) -> dict[str, Any]:
    """The gateway's limits of running requests: DEFAULT for writes, HIGH for reads and health checks."""
    thresholds = configuration["static_resources"]["clusters"][0]["circuit_breakers"]["thresholds"]
    return {each["priority"]: each for each in thresholds}


def test_gateway_circuit_breaker_answers_like_the_server(gateway: Daybook, tmp_path: Path) -> None:
    """A request over the gateway's limit of concurrent requests gets the server's 429, or RESOURCE_EXHAUSTED."""

    def without_capacity(configuration: dict[str, Any]) -> None:
        for each in limits_of(configuration).values():
            each["max_requests"] = 0

    with gateway_before(tmp_path, gateway.ports.server, without_capacity) as origin:
        for target, (key, expected) in ANSWERS.items():
            assert get(origin, target, key) == (429, "1", expected), target
        status, retry_after, native = get(origin, NATIVE, dreadnode.KEY)
        assert (status, retry_after, native["code"], native["message"]) == (429, "1", 8, TOO_MANY)
        assert native["details"][0]["reason"] == "TOO_BUSY"
        with grpc.insecure_channel(origin.removeprefix("http://")) as channel:
            call: Any = channel.unary_unary(CREATE)
            with pytest.raises(grpc.RpcError) as caught:
                call(b"", timeout=SECONDS_MAX)
    error: Any = caught.value
    assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, TOO_MANY)
    headers = (*error.initial_metadata(), *error.trailing_metadata())
    assert [value for name, value in headers if name == "retry-after"] == ["1"]


def test_reads_and_health_checks_are_served_while_writes_are_refused(gateway: Daybook, tmp_path: Path) -> None:
    """While the gateway runs as many writes as it may, it serves reads and health checks in each protocol."""

    def without_capacity(configuration: dict[str, Any]) -> None:
        limits_of(configuration)["DEFAULT"]["max_requests"] = 0

    credential = {"authorization": f"Bearer {dreadnode.KEY}.public"}
    parent = f"accounts/{dreadnode.ORGANIZATION}"
    page, posting = ListTransactionsRequest(parent=parent), CreateTransactionRequest(parent=parent)
    with gateway_before(tmp_path, gateway.ports.server, without_capacity) as origin:

        def answer(target: str, method: str, content_type: str, body: bytes, **headers: str) -> Answer:
            sent = {**credential, "content-type": content_type, **headers}
            return send(origin, target, method=method, headers=sent, body=body)

        def web_statuses(request: Message, path: str) -> tuple[int, int]:
            """The statuses over Connect and over gRPC-Web."""
            message = request.SerializeToString()
            frame = struct.pack(">BI", 0, len(message)) + message
            connect = {"connect-protocol-version": "1"}
            return (
                answer(path, "POST", "application/proto", message, **connect).status,
                answer(path, "POST", "application/grpc-web+proto", frame).status,
            )

        assert {get(origin, target, key)[0] for target, (key, _) in ANSWERS.items()} == {200}
        bodies = {"GET": b"", "HEAD": b"", "POST": b"{}"}
        statuses = {method: answer(NATIVE, method, "application/json", body).status for method, body in bodies.items()}
        assert statuses == {"GET": 200, "HEAD": 200, "POST": 429}
        assert web_statuses(page, LIST) == (200, 200)
        assert web_statuses(posting, CREATE) == (429, 429)
        with grpc.insecure_channel(origin.removeprefix("http://")) as channel:
            assert code_of_call(channel, LIST, page) is grpc.StatusCode.OK
            assert code_of_call(channel, CREATE, posting) is grpc.StatusCode.RESOURCE_EXHAUSTED
            check = HealthCheckRequest(service="daybook.v1.Ledger")
            assert code_of_call(channel, "/grpc.health.v1.Health/Check", check) is grpc.StatusCode.OK


class LateHealth(HealthServicer):
    """Answers a health check after two seconds, as a server that is busy with thousands of calls does."""

    def Check(self, request: HealthCheckRequest, context: grpc.ServicerContext) -> HealthCheckResponse:
        """SERVING."""
        Event().wait(2)
        return HealthCheckResponse(status=HealthCheckResponse.SERVING)


def test_server_that_answers_health_checks_late_is_ready(tmp_path: Path) -> None:
    """An overload of reads doesn't make the gateway unready: health checks wait behind the reads."""
    server = grpc.server(ThreadPoolExecutor())
    add_HealthServicer_to_server(LateHealth(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with gateway_before(tmp_path, port) as origin:
            wait_until(lambda: send(origin, "/readyz").status == 200, "the gateway is ready")
    finally:
        server.stop(None).wait()


def code_of_call(channel: grpc.Channel, method: str, request: Message) -> grpc.StatusCode:
    """The status of a unary call."""
    metadata = (("authorization", f"Bearer {dreadnode.KEY}.public"),)
    call: Any = channel.unary_unary(method)
    code: grpc.StatusCode = call.future(request.SerializeToString(), metadata=metadata, timeout=SECONDS_MAX).code()
    return code


def test_limit_of_writes_grows_with_the_servers() -> None:
    """The gateway runs 512 writes for each server."""
    limits = [limits_of(configuration_of(Settings(workers=count)))["DEFAULT"]["max_requests"] for count in (1, 3)]
    assert limits == [512, 1536]
