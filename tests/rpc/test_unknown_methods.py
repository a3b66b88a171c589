"""Calls of methods that are not there, and of those that gRPC's own services may lack: refused in our words."""

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
"""Each with a part of the message, which says what there is."""


async def refused(call: Any) -> Refusal:
    """The refusal that a call of any kind ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call.read() if hasattr(call, "read") else call)
    return read_refusal(caught.value)


@shares_a_server
@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_unary", "stream_stream"])
@pytest.mark.parametrize("method", METHODS)
async def test_unknown_method_is_told(
    shared_server: Server, method: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """UNIMPLEMENTED has a reason, names the method, and says which ones there are; no failure is logged."""
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
async def test_health_refuses_what_is_no_message(
    shared_server: Server, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A request that can't be parsed is the caller's mistake, and no failure in the log."""
    kind = shared_server.channel.unary_stream if method == "Watch" else shared_server.channel.unary_unary
    call: Any = kind(f"/grpc.health.v1.Health/{method}")
    refusal = await refused(call(b"\xff\xff", timeout=60))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID")
    assert not caplog.records


@shares_a_server
async def test_health_lists_every_service(shared_server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """List tells of all services at once what Check tells of each."""
    health: Any = health_pb2_grpc.HealthStub(shared_server.channel)
    listed = await health.List(cast("Any", health_pb2).HealthListRequest(), timeout=60)
    assert {name: each.status for name, each in listed.statuses.items()} == dict.fromkeys(
        ("", *SERVICES), health_pb2.HealthCheckResponse.SERVING
    )
    assert not caplog.records
