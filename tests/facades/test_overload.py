"""What clients of REST are told while as many calls are under way as may be: 429, in each vendor's words."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest

from server.demo import dreadnode, nebulablock, spacebring, teable
from tests.support.gateways import gateway_before
from tests.support.http_client import send
from tests.support.processes import Daybook, Ports, copy_database, sqlite_url
from tests.support.waiting import SECONDS_MAX

CREATE = "/daybook.v1.Ledger/CreateTransaction"
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
"""A request of each documented API, with its key, and what it is answered."""
NATIVE = f"/v1/accounts/{dreadnode.ORGANIZATION}/transactions"


@pytest.fixture(scope="module")
def full(gateway: Daybook, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daybook]:
    """The demo once more, with one place for calls."""
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


async def test_every_vendors_words(full: Daybook) -> None:
    """While the only place is taken, each API answers 429 with retry-after; before and after that it serves."""
    release = asyncio.Event()

    async def body() -> AsyncIterator[Any]:
        await release.wait()
        yield b""

    def statuses() -> set[int]:
        return {get(full.origin, target, key)[0] for target, (key, _) in ANSWERS.items()}

    async with asyncio.timeout(SECONDS_MAX), grpc.aio.insecure_channel(f"127.0.0.1:{full.ports.server}") as channel:
        assert await asyncio.to_thread(statuses) == {200}
        holding: Any = channel.stream_unary(CREATE)(body())
        while await asyncio.to_thread(statuses) != {429}:
            # One of these requests may have had the place when the call came, which is refused then.
            if holding.done():
                holding = channel.stream_unary(CREATE)(body())
        for target, (key, expected) in ANSWERS.items():
            found = await asyncio.to_thread(get, full.origin, target, key)
            assert found == (429, "1", expected), target
        status, retry_after, native = await asyncio.to_thread(get, full.origin, NATIVE, dreadnode.KEY)
        assert (status, retry_after, native["code"]) == (429, "1", 8)
        info, retry = native["details"]
        assert (info["reason"], info["domain"]) == ("TOO_BUSY", "daybook")
        assert retry["retryDelay"] == "1s"
        # Neither needs a place.
        assert (await asyncio.to_thread(send, full.origin, "/readyz")).status == 200
        assert (await asyncio.to_thread(send, full.origin, "/healthz")).status == 200
        release.set()
        assert await holding.code() is grpc.StatusCode.UNAUTHENTICATED
        while await asyncio.to_thread(statuses) != {200}:
            pass


def test_the_gateways_own_bound(gateway: Daybook, tmp_path: Path) -> None:
    """Where the gateway has too many requests under way itself, it says the same as the server."""

    def without_room(configuration: dict[str, Any]) -> None:
        (thresholds,) = configuration["static_resources"]["clusters"][0]["circuit_breakers"]["thresholds"]
        thresholds["max_requests"] = 0

    with gateway_before(tmp_path, gateway.ports.server, without_room) as origin:
        for target, (key, expected) in ANSWERS.items():
            assert get(origin, target, key) == (429, "1", expected), target
        status, retry_after, native = get(origin, NATIVE, dreadnode.KEY)
        assert (status, retry_after, native["code"], native["message"]) == (429, "1", 8, TOO_MANY)
