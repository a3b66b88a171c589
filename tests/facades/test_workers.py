"""Several server processes behind one gateway: load balancing, crashes and retries."""

from __future__ import annotations

import re
import signal
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from copy import deepcopy
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import yaml
from daybook.v1.ledger_service_pb2 import CreateTransactionRequest, GetAccountRequest
from daybook.v1.transaction_pb2 import Transaction
from google.api.annotations_pb2 import http
from google.protobuf.descriptor_pb2 import FileDescriptorSet, MethodDescriptorProto

from tests.support.callers import credential, ledger_stub
from tests.support.gateways import OriginIn, gateway_before
from tests.support.http_client import send
from tests.support.processes import ROOT, Daybook, Ports, copy_database, free_range, run, sqlite_url
from tests.support.waiting import wait_until

KEY = "demo-dreadnode.public"
BEARER = {"authorization": f"Bearer {KEY}"}
CALLERS = 8
READS = (
    "/v1/accounts/example",
    "/v1/accounts/example/transactions?pageSize=5",
    "/api/v1/org/example/credits/transactions?limit=3",
)


@pytest.fixture(scope="module")
def workers(gateway: Daybook, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daybook]:
    """The demo with two workers behind a gateway; SIGTERM stops all with exit code 0."""
    folder, ports = tmp_path_factory.mktemp("workers"), Ports.free()
    copy_database(gateway.folder / "daybook.db", folder / "daybook.db")
    daybook = Daybook.start(
        *("up", "--workers", "2", "--worker-port-base", str(free_range(2))),
        *("--database-url", sqlite_url(folder / "daybook.db")),
        *ports.flags,
        folder=folder,
        ports=ports,
    )
    try:
        wait_until(lambda: "gateway" in daybook.stderr and len(healthy(daybook.ports)) == 2, "both servers are healthy")
        yield daybook
        assert daybook.stop(signal.SIGTERM) == 0
        assert "Traceback" not in daybook.stderr
    finally:
        daybook.kill()


def endpoints(ports: Ports) -> dict[int, dict[str, str]]:
    """Envoy's statistics of each server, by its port."""
    try:
        text = send(f"http://127.0.0.1:{ports.admin}", "/clusters").body.decode()
    except OSError:
        return {}
    statistics: dict[int, dict[str, str]] = {}
    for port, name, value in re.findall(r"daybook::127\.0\.0\.1:(\d+)::(\w+)::(.*)", text):
        statistics.setdefault(int(port), {})[name] = value
    return statistics


def healthy(ports: Ports) -> list[int]:
    """The ports of the healthy servers, which get calls."""
    return [port for port, statistics in endpoints(ports).items() if statistics["health_flags"] == "healthy"]


def stat(ports: Ports, name: str) -> int:
    """A counter of Envoy's cluster of servers."""
    text = send(f"http://127.0.0.1:{ports.admin}", f"/stats?filter=^cluster.daybook.{name}$").body.decode()
    return int(text.rpartition(":")[2])


def processes(daybook: Daybook) -> dict[int, psutil.Process]:
    """The worker processes, by their own ports."""
    ports = sorted(endpoints(daybook.ports))
    found = {}
    for each in daybook.family():
        if "worker" in each.cmdline():
            found[ports[int(each.cmdline()[-1])]] = each
    return found


def account(port: int) -> object:
    """Reads an account over gRPC, on a new connection."""
    with grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
        return ledger_stub(channel).GetAccount(GetAccountRequest(name="accounts/example"), metadata=credential(KEY))


def connections(process: psutil.Process, port: int) -> int:
    """The number of connections that a process has accepted at a port."""
    return sum(
        each.status == psutil.CONN_ESTABLISHED and each.laddr.port == port for each in process.net_connections("tcp")
    )


def test_gateway_balances_calls_over_workers(workers: Daybook) -> None:
    """Each of two workers gets at least 10 of 60 calls through the gateway."""
    totals = {port: int(statistics["rq_total"]) for port, statistics in endpoints(workers.ports).items()}
    assert len(totals) == 2
    assert {send(workers.origin, READS[number % 3], headers=BEARER).status for number in range(60)} == {200}
    shares = [int(statistics["rq_total"]) - totals[port] for port, statistics in endpoints(workers.ports).items()]
    assert min(shares) >= 10


def test_workers_share_the_common_port(workers: Daybook) -> None:
    """Connections to the common port are distributed over the workers, and each worker also has its own port."""
    for port in (workers.ports.server, *endpoints(workers.ports)):
        assert account(port)
    channels = [
        grpc.insecure_channel(f"127.0.0.1:{workers.ports.server}", [("grpc.use_local_subchannel_pool", 1)])
        for _ in range(24)
    ]
    try:
        for channel in channels:
            ledger_stub(channel).GetAccount(GetAccountRequest(name="accounts/example"), metadata=credential(KEY))
        shares = [connections(each, workers.ports.server) for each in processes(workers).values()]
        assert sum(shares) == 24
        assert min(shares) >= 1
    finally:
        for channel in channels:
            channel.close()


def test_health_command_reports_workers(workers: Daybook) -> None:
    """`daybook health` exits with 0 if a server is serving at a port, and with 1 if none is."""
    unused = Ports.free().server
    for port, code, output in ((workers.ports.server, 0, "serving\n"), (unused, 1, "daybook: not serving\n")):
        result = run("health", "--port", str(port), folder=workers.folder)
        assert (result.returncode, result.stdout + result.stderr) == (code, output)


def test_reads_survive_a_killed_worker(workers: Daybook) -> None:
    """No unary read fails when a worker is killed under load; the worker is restarted and gets calls again.

    Streaming reads are excluded, since the gateway can't retry a stream that has begun.
    """
    answered: Counter[int] = Counter()
    is_stopped = threading.Event()

    def read(number: int) -> None:
        while not is_stopped.is_set():
            answered[send(workers.origin, READS[number % 2], headers=BEARER).status] += 1

    with ThreadPoolExecutor(CALLERS + 1) as pool:
        readers = [pool.submit(read, number) for number in range(CALLERS)]
        readers.append(pool.submit(read_natively, workers.ports.gateway, is_stopped))
        try:
            wait_until(lambda: answered[200] > 100, "100 reads are answered")
            port, victim = processes(workers).popitem()
            victim.kill()
            count = answered[200]
            wait_until(lambda: answered[200] > count + 100, "100 more reads are answered")
            wait_until(lambda: processes(workers).get(port, victim) != victim, "the worker is restarted")
            wait_until(lambda: len(healthy(workers.ports)) == 2, "both workers are healthy")
            total = int(endpoints(workers.ports)[port]["rq_total"])
            wait_until(
                lambda: int(endpoints(workers.ports)[port]["rq_total"]) > total + 50, "the new worker gets 50 calls"
            )
        finally:
            is_stopped.set()
        for reader in readers:
            reader.result(timeout=60)
    assert answered.keys() == {200}


def read_natively(port: int, is_stopped: threading.Event) -> None:
    """Reads over gRPC until `is_stopped` is set; raises the error of the first call that fails."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        ledger = ledger_stub(channel)
        while not is_stopped.is_set():
            ledger.GetAccount(GetAccountRequest(name="accounts/example"), metadata=credential(KEY))


def test_write_is_never_retried(workers: Daybook) -> None:
    """A posting whose worker is killed gets UNAVAILABLE, and the gateway does not retry it."""
    grant = Transaction(kind=Transaction.GRANT, category="test", amount="1")
    request = CreateTransactionRequest(parent="accounts/example", transaction=grant, request_id="killed")
    retries = stat(workers.ports, "upstream_rq_retry")
    with (
        closing(sqlite3.connect(workers.folder / "daybook.db", isolation_level=None)) as other,
        grpc.insecure_channel(f"127.0.0.1:{workers.ports.gateway}") as channel,
    ):
        # SQLite has one writer: no posting can commit during this transaction.
        other.execute("BEGIN IMMEDIATE")
        call = ledger_stub(channel).CreateTransaction.future(request, metadata=credential(KEY))
        busy: list[int] = []

        def is_passed_on() -> bool:
            busy[:] = [port for port, statistics in endpoints(workers.ports).items() if statistics["rq_active"] == "1"]
            return bool(busy)

        wait_until(is_passed_on, "the call is passed on")
        processes(workers)[busy[0]].kill()
        with pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
            call.result(timeout=60)
        other.execute("ROLLBACK")
        # A retry by the gateway would be posted before this later call.
        request.request_id = "later"
        wait_until(lambda: is_posted(channel, request), "a later posting succeeds")
        ids = [
            row[0] for row in other.execute("SELECT request_id FROM requests WHERE request_id IN ('killed', 'later')")
        ]
    assert ids == ["later"]
    assert stat(workers.ports, "upstream_rq_retry") == retries
    wait_until(lambda: len(processes(workers)) == 2 and len(healthy(workers.ports)) == 2, "the worker is restarted")


def is_posted(channel: grpc.Channel, request: CreateTransactionRequest) -> bool:
    """Posts a transaction; whether it succeeded. Fails on another error than UNAVAILABLE."""
    call = ledger_stub(channel).CreateTransaction.future(request, metadata=credential(KEY))
    code = call.code()
    assert code in {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    return bool(code is grpc.StatusCode.OK)


def retriable_methods() -> dict[str, bool]:
    """Whether envoy.yaml retries each method of the contracts, by its path."""
    listener = yaml.safe_load((ROOT / "envoy.yaml").read_text())["static_resources"]["listeners"][0]
    (host,) = listener["filter_chains"][0]["filters"][0]["typed_config"]["route_config"]["virtual_hosts"]
    (rule,) = host["retry_policy"]["retriable_request_headers"]
    assert rule["name"] == ":path"
    pattern = rule["string_match"]["safe_regex"]["regex"]
    assert not [each for each in host["routes"] if "retry_policy" in each.get("route", {})]
    return {path: re.fullmatch(pattern, path) is not None for path in methods()}


def methods() -> dict[str, MethodDescriptorProto]:
    """Each method of the contracts, by its gRPC path."""
    descriptors = FileDescriptorSet.FromString((ROOT / "gen" / "descriptors.binpb").read_bytes())
    return {
        f"/{file.package}.{service.name}/{method.name}": method
        for file in descriptors.file
        for service in file.service
        for method in service.method
    }


def test_only_reads_are_retried() -> None:
    """The gateway retries exactly the methods that the contracts bind to GET."""
    reads = {path: method.options.Extensions[http].HasField("get") for path, method in methods().items()}
    assert retriable_methods() == reads
    assert set(reads.values()) == {True, False}


def test_internal_errors_eject_no_server(origin_in: OriginIn) -> None:
    """A server that answers INTERNAL, as for damaged rows, is not ejected."""
    origin = origin_in("damaged")
    assert {send(origin, READS[2], headers=BEARER).status for _ in range(15)} == {500}
    assert send(origin, "/readyz").status == 200


@pytest.fixture
def lost_port(gateway: Daybook, tmp_path: Path) -> Iterator[int]:
    """The port of a running server whose database fails for every list."""
    copy_database(gateway.folder / "daybook.db", tmp_path / "daybook.db")
    with closing(sqlite3.connect(tmp_path / "daybook.db")) as connection:
        connection.executescript("DROP TABLE transactions")
    ports = Ports.free()
    flags = ("--database-url", sqlite_url(tmp_path / "daybook.db"), "--port", str(ports.server))
    daybook = Daybook.start("serve", *flags, folder=tmp_path / "run", ports=ports)
    try:
        daybook.wait_for("serving")
        yield ports.server
        assert daybook.stop() == 0
    finally:
        daybook.kill()


def test_reads_survive_a_server_without_its_database(gateway: Daybook, lost_port: int, tmp_path: Path) -> None:
    """The gateway retries a failed read on another server, and ejects a server after ten consecutive failures."""

    def both(configuration: dict[str, Any]) -> None:
        (cluster,) = configuration["static_resources"]["clusters"]
        (locality,) = cluster["load_assignment"]["endpoints"]
        locality["lb_endpoints"].append(deepcopy(locality["lb_endpoints"][0]))
        locality["lb_endpoints"][1]["endpoint"]["address"]["socket_address"]["port_value"] = gateway.ports.server

    ports = Ports.free()
    (tmp_path / "gateway").mkdir()
    with gateway_before(tmp_path / "gateway", lost_port, both, ports) as origin:
        wait_until(lambda: len(healthy(ports)) == 2, "both servers are healthy")
        for _ in range(60):
            assert send(origin, READS[2], headers=BEARER).status == 200
        assert stat(ports, "upstream_rq_retry_success") >= 10
        assert stat(ports, "outlier_detection.ejections_enforced_consecutive_gateway_failure") >= 1
