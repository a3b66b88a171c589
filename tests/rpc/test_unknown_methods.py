"""Calls of unknown methods, and malformed calls of gRPC's own services: each is refused with a reason."""

from __future__ import annotations

from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.app import SERVICES
from tests.support.callers import Server
from tests.support.markers import shares_a_server
from tests.support.refusals import Refusal, read_refusal

METHODS = {
    "/daybook.v1.Ledger/ListTransaction": "daybook.v1.Ledger has ",
    "/daybook.v1.Ledger/": "ListTransactions",
    "/daybook.v1.Nothing/GetAccount": "daybook.v1.Ledger",
    "/daybook.v1.Ledger.GetAccount": "daybook.v1.Ledger",
    "/grpc.health.v1.Health/Checks": "Check, List, Watch",
    "/grpc.reflection.v1.ServerReflection/Info": "ServerReflectionInfo",
    "/nothing": "daybook.v1.Admin",
    "/" + "x" * 4000: "daybook.v1.Admin",
}
"""Unknown methods, each with a part of the message, which lists known names."""


async def refused(call: Any) -> Refusal:
    """The refusal of a call of any kind."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call.read() if hasattr(call, "read") else call)
    return read_refusal(caught.value)


@shares_a_server
@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_unary", "stream_stream"])
@pytest.mark.parametrize("method", METHODS)
async def test_unknown_method_is_refused(
    shared_server: Server, method: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """UNIMPLEMENTED has a reason, names the method, and lists known methods; no failure is logged."""
    call: Any = getattr(shared_server.channel, kind)(method)
    # A stream is refused before its first message.
    requests = () if kind.startswith("stream") else (b"anything",)
    refusal = await refused(call(*requests, timeout=60))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNIMPLEMENTED, "METHOD_UNKNOWN")
    assert METHODS[method] in refusal.message
    assert refusal.metadata["method"].removesuffix("...") in method
    assert len(refusal.message) < 1000
    assert not caplog.records


@shares_a_server
@pytest.mark.parametrize("method", ["Check", "List", "Watch"])
async def test_health_refuses_a_malformed_request(
    shared_server: Server, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A malformed request gets INVALID_ARGUMENT, and logs no failure."""
    kind = shared_server.channel.unary_stream if method == "Watch" else shared_server.channel.unary_unary
    call: Any = kind(f"/grpc.health.v1.Health/{method}")
    refusal = await refused(call(b"\xff\xff", timeout=60))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID")
    assert not caplog.records


@shares_a_server
async def test_health_lists_every_service(shared_server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """List has the status of every service."""
    health: Any = health_pb2_grpc.HealthStub(shared_server.channel)
    listed = await health.List(cast("Any", health_pb2).HealthListRequest(), timeout=60)
    assert {name: each.status for name, each in listed.statuses.items()} == dict.fromkeys(
        ("", *SERVICES), health_pb2.HealthCheckResponse.SERVING
    )
    assert not caplog.records
