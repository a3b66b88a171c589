"""Several server processes behind one gateway: shared traffic, a process that dies, and what is tried again."""

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
    """The demo, served by two processes behind a gateway; SIGTERM stops it all with exit code 0."""
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
        wait_until(lambda: "gateway" in daybook.stderr and len(healthy(daybook.ports)) == 2, "both are asked")
        yield daybook
        assert daybook.stop(signal.SIGTERM) == 0
        assert "Traceback" not in daybook.stderr
    finally:
        daybook.kill()


def endpoints(ports: Ports) -> dict[int, dict[str, str]]:
    """What the gateway knows of each server, by its port."""
    try:
        text = send(f"http://127.0.0.1:{ports.admin}", "/clusters").body.decode()
    except OSError:
        return {}
    known: dict[int, dict[str, str]] = {}
    for port, name, value in re.findall(r"daybook::127\.0\.0\.1:(\d+)::(\w+)::(.*)", text):
        known.setdefault(int(port), {})[name] = value
    return known


def healthy(ports: Ports) -> list[int]:
    """The ports of the servers that get calls."""
    return [port for port, known in endpoints(ports).items() if known["health_flags"] == "healthy"]


def stat(ports: Ports, name: str) -> int:
    """A number that the gateway keeps of its servers."""
    text = send(f"http://127.0.0.1:{ports.admin}", f"/stats?filter=^cluster.daybook.{name}$").body.decode()
    return int(text.rpartition(":")[2])


def processes(daybook: Daybook) -> dict[int, psutil.Process]:
    """The workers, by their own ports."""
    known = sorted(endpoints(daybook.ports))
    found = {}
    for each in daybook.family():
        if "worker" in each.cmdline():
            found[known[int(each.cmdline()[-1])]] = each
    return found


def account(port: int) -> object:
    """Reads an account over gRPC, on a connection of its own."""
    with grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
        return ledger_stub(channel).GetAccount(GetAccountRequest(name="accounts/example"), metadata=credential(KEY))


def connections(process: psutil.Process, port: int) -> int:
    """How many connections a process has at a port of its own."""
    return sum(
        each.status == psutil.CONN_ESTABLISHED and each.laddr.port == port for each in process.net_connections("tcp")
    )


def test_gateway_gives_calls_to_every_worker(workers: Daybook) -> None:
    """Both get their share of what comes through the gateway."""
    before = {port: int(known["rq_total"]) for port, known in endpoints(workers.ports).items()}
    assert len(before) == 2
    assert {send(workers.origin, READS[number % 3], headers=BEARER).status for number in range(60)} == {200}
    shares = [int(known["rq_total"]) - before[port] for port, known in endpoints(workers.ports).items()]
    assert min(shares) >= 10


def test_direct_callers_share_one_port(workers: Daybook) -> None:
    """Connections to the common port are spread over the workers, and each worker's own port works."""
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


def test_health_command(workers: Daybook) -> None:
    """`daybook health` tells whether a server can answer, by its exit code; nobody at a port can't."""
    nobody = Ports.free().server
    for port, code, words in ((workers.ports.server, 0, "serving\n"), (nobody, 1, "daybook: not serving\n")):
        result = run("health", "--port", str(port), folder=workers.folder)
        assert (result.returncode, result.stdout + result.stderr) == (code, words)


def test_killed_worker_is_noticed_by_no_reader(workers: Daybook) -> None:
    """Under a load of reads a worker is killed: none fails. It is started again, and gets calls again.

    They are reads with one message as the answer. A stream that has begun can't be tried again.
    """
    answered: Counter[int] = Counter()
    is_over = threading.Event()

    def read(number: int) -> None:
        while not is_over.is_set():
            answered[send(workers.origin, READS[number % 2], headers=BEARER).status] += 1

    with ThreadPoolExecutor(CALLERS + 1) as pool:
        readers = [pool.submit(read, number) for number in range(CALLERS)]
        readers.append(pool.submit(read_natively, workers.ports.gateway, is_over))
        try:
            wait_until(lambda: answered[200] > 100, "the load is there")
            port, victim = processes(workers).popitem()
            victim.kill()
            seen = answered[200]
            wait_until(lambda: answered[200] > seen + 100, "the others are still answered")
            wait_until(lambda: processes(workers).get(port, victim) != victim, "it is started again")
            wait_until(lambda: len(healthy(workers.ports)) == 2, "it is asked again")
            total = int(endpoints(workers.ports)[port]["rq_total"])
            wait_until(lambda: int(endpoints(workers.ports)[port]["rq_total"]) > total + 50, "it gets its share again")
        finally:
            is_over.set()
        for reader in readers:
            reader.result(timeout=60)
    assert answered.keys() == {200}


def read_natively(port: int, is_over: threading.Event) -> None:
    """Reads over gRPC until it is over; fails with the first call that fails."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        ledger = ledger_stub(channel)
        while not is_over.is_set():
            ledger.GetAccount(GetAccountRequest(name="accounts/example"), metadata=credential(KEY))


def test_write_is_never_tried_again(workers: Daybook) -> None:
    """A posting whose worker is killed is UNAVAILABLE, and the gateway brings it to no other one."""
    grant = Transaction(kind=Transaction.GRANT, category="test", amount="1")
    request = CreateTransactionRequest(parent="accounts/example", transaction=grant, request_id="killed")
    retries = stat(workers.ports, "upstream_rq_retry")
    with (
        closing(sqlite3.connect(workers.folder / "daybook.db", isolation_level=None)) as other,
        grpc.insecure_channel(f"127.0.0.1:{workers.ports.gateway}") as channel,
    ):
        # While somebody else writes, no posting can end.
        other.execute("BEGIN IMMEDIATE")
        call = ledger_stub(channel).CreateTransaction.future(request, metadata=credential(KEY))
        busy: list[int] = []

        def is_passed_on() -> bool:
            busy[:] = [port for port, known in endpoints(workers.ports).items() if known["rq_active"] == "1"]
            return bool(busy)

        wait_until(is_passed_on, "the call is passed on")
        processes(workers)[busy[0]].kill()
        with pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
            call.result(timeout=60)
        other.execute("ROLLBACK")
        # Whatever comes now comes after what the gateway might have passed on in the meantime.
        request.request_id = "later"
        wait_until(lambda: is_posted(channel, request), "a posting that its caller repeats arrives")
        ids = [
            row[0] for row in other.execute("SELECT request_id FROM requests WHERE request_id IN ('killed', 'later')")
        ]
    assert ids == ["later"]
    assert stat(workers.ports, "upstream_rq_retry") == retries
    wait_until(lambda: len(processes(workers)) == 2 and len(healthy(workers.ports)) == 2, "it is started again")


def is_posted(channel: grpc.Channel, request: CreateTransactionRequest) -> bool:
    """Posts; whether it came through. No failure may be anything but UNAVAILABLE."""
    call = ledger_stub(channel).CreateTransaction.future(request, metadata=credential(KEY))
    code = call.code()
    assert code in {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    return bool(code is grpc.StatusCode.OK)


def retriable_methods() -> dict[str, bool]:
    """For each method of the contracts, by its path, whether envoy.yaml tries it again."""
    listener = yaml.safe_load((ROOT / "envoy.yaml").read_text())["static_resources"]["listeners"][0]
    (host,) = listener["filter_chains"][0]["filters"][0]["typed_config"]["route_config"]["virtual_hosts"]
    (rule,) = host["retry_policy"]["retriable_request_headers"]
    assert rule["name"] == ":path"
    pattern = rule["string_match"]["safe_regex"]["regex"]
    assert not [each for each in host["routes"] if "retry_policy" in each.get("route", {})]
    return {path: re.fullmatch(pattern, path) is not None for path in methods()}


def methods() -> dict[str, MethodDescriptorProto]:
    """Each method of the contracts, by its path in gRPC."""
    descriptors = FileDescriptorSet.FromString((ROOT / "gen" / "descriptors.binpb").read_bytes())
    return {
        f"/{file.package}.{service.name}/{method.name}": method
        for file in descriptors.file
        for service in file.service
        for method in service.method
    }


def test_what_is_tried_again_is_what_reads() -> None:
    """The gateway tries a method again if its contract binds a GET, and no other."""
    reads = {path: method.options.Extensions[http].HasField("get") for path, method in methods().items()}
    assert retriable_methods() == reads
    assert set(reads.values()) == {True, False}


def test_errors_take_no_server_away(origin_in: OriginIn) -> None:
    """A server that fails at what somebody stored is still asked."""
    origin = origin_in("damaged")
    assert {send(origin, READS[2], headers=BEARER).status for _ in range(15)} == {500}
    assert send(origin, "/readyz").status == 200


@pytest.fixture
def lost_port(gateway: Daybook, tmp_path: Path) -> Iterator[int]:
    """The port of a server that runs, and whose database fails at every list."""
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


def test_server_without_its_database_hurts_no_reader(gateway: Daybook, lost_port: int, tmp_path: Path) -> None:
    """What a server can't read, another one is asked for; and who fails ten times in a row is asked no more."""

    def both(configuration: dict[str, Any]) -> None:
        (cluster,) = configuration["static_resources"]["clusters"]
        (locality,) = cluster["load_assignment"]["endpoints"]
        locality["lb_endpoints"].append(deepcopy(locality["lb_endpoints"][0]))
        locality["lb_endpoints"][1]["endpoint"]["address"]["socket_address"]["port_value"] = gateway.ports.server

    ports = Ports.free()
    (tmp_path / "gateway").mkdir()
    with gateway_before(tmp_path / "gateway", lost_port, both, ports) as origin:
        wait_until(lambda: len(healthy(ports)) == 2, "both are asked")
        for _ in range(60):
            assert send(origin, READS[2], headers=BEARER).status == 200
        assert stat(ports, "upstream_rq_retry_success") >= 10
        assert stat(ports, "outlier_detection.ejections_enforced_consecutive_gateway_failure") >= 1
