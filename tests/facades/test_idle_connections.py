"""A thousand idle connections at each port: little memory, no descriptor left behind, and other callers are served."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.http_client import send
from tests.support.processes import Daybook, Ports, copy_database, sqlite_url
from tests.support.waiting import SECONDS_MAX, wait_until

CONNECTIONS = 1000
KILOBYTES_MAX = 64
"""Maximum growth of the resident memory per idle connection. gRPC and Envoy take about 18."""
HTTP_2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
HTTP_1 = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.fixture
def alone(gateway: Daybook, tmp_path: Path) -> Iterator[Daybook]:
    """A second demo, which no other test calls."""
    ports = Ports.free()
    copy_database(gateway.folder / "daybook.db", tmp_path / "daybook.db")
    flags = ("up", "--database-url", sqlite_url(tmp_path / "daybook.db"), *ports.flags)
    daybook = Daybook.start(*flags, folder=tmp_path, ports=ports)
    try:
        daybook.wait_for("gateway")
        wait_until(lambda: send(daybook.origin, "/readyz").status == 200, "/readyz answers 200")
        yield daybook
    finally:
        daybook.kill()


@pytest.fixture(autouse=True)
def enough_descriptors() -> Iterator[None]:
    """Raises the limit of open files of this process to the largest that it may have."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def is_served(daybook: Daybook) -> bool:
    """Whether a call on a new connection is answered at each port."""
    with grpc.insecure_channel(f"127.0.0.1:{daybook.ports.server}") as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(service="daybook.v1.Ledger"), timeout=SECONDS_MAX)
    return (answer.status, send(daybook.origin, "/v1/accounts/-/transactions").status) == (
        health_pb2.HealthCheckResponse.SERVING,
        401,
    )


@pytest.mark.parametrize("port", ["server", "gateway over HTTP/1.1", "gateway over HTTP/2"])
def test_thousand_idle_connections_cost_little(alone: Daybook, port: str) -> None:
    """Memory and descriptors of a thousand idle connections are bounded, and a new call succeeds."""
    process = psutil.Process(alone.process.pid)
    (envoy,) = [each for each in process.children(recursive=True) if each.name() == "envoy"]
    holder, number = (process, alone.ports.server) if port == "server" else (envoy, alone.ports.gateway)
    assert is_served(alone)
    memory, descriptors = holder.memory_info().rss, holder.num_fds()
    with ExitStack() as stack:
        for _ in range(CONNECTIONS):
            idle = stack.enter_context(socket.create_connection(("127.0.0.1", number), SECONDS_MAX))
            idle.sendall(HTTP_1 if "HTTP/1.1" in port else HTTP_2)
            assert idle.recv(9)
        grown = (holder.memory_info().rss - memory) / CONNECTIONS / 1024
        assert grown < KILOBYTES_MAX
        assert 0.9 * CONNECTIONS < holder.num_fds() - descriptors < 1.1 * CONNECTIONS
        assert is_served(alone)
    wait_until(lambda: holder.num_fds() < descriptors + 0.1 * CONNECTIONS, "the connections are closed")
