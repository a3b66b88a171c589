"""Figure 19: a credential sends ten times the postings that the gateway lets through, over REST and over gRPC."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from math import inf
from statistics import median
from threading import Event, Thread

import grpc
from daybook.v1.admin_service_pb2 import CreateApiKeyRequest, CreateApiKeyResponse
from daybook.v1.api_key_pb2 import ApiKey
from daybook.v1.ledger_service_pb2 import CreateTransactionRequest
from google.protobuf.json_format import MessageToJson
from grpc_health.v1.health_pb2 import HealthCheckRequest

from bench.calls import CREATE, Call, authorization, list_call
from bench.comparison import spread
from bench.figures.memory import MEGABYTE
from bench.figures.rest import PATH
from bench.figures.writing import charge_of, create_call, posted
from bench.ledger import ORGANIZATION, Ledger
from bench.load import GRPC_HEADERS, Offered, Post, frame, h2load_offered
from bench.report import Bar, Finding, at_least, at_most
from bench.servers import Server, daybook_with_gateway, wait_for_answer
from bench.stage import Stage
from server.transport.addresses import NO_PROXY

OVERLOAD = 10
"""The offered load, as a multiple of the limit."""
LIMIT = 0.2
"""The gateway's rate limit of a credential, as a part of the peak.

Generators, gateway, server and database share the processors. Postings at the peak leave nothing for refusals.
"""
CLIENTS = 1
STREAMS = 8
"""At the peak: with eight requests, 64 callers."""
CLIENTS_OVERLOADED = 8
STREAMS_OVERLOADED = 64
"""With eight requests, at most 4,096 calls wait for an answer. h2load sends no more until one of them ends."""
GOODPUT_MIN = 0.8
GOODPUT_MAX = 1.2
"""Above it the gateway lets too much through: only a burst of one second exceeds the limit."""
REFUSED_MIN = 0.3
"""The part of the probe's postings that is refused. Below it too few are measured."""
REFUSAL_MILLISECONDS_MAX = 100
GROWTH_MEGABYTES_MAX = 200
OFFERED_MIN = 0.9
"""The part of the intended load that must be offered."""
READS_MIN = 0.99
READ_MILLISECONDS_MAX = 1000
HEALTH_SECONDS_MAX = 1.0
NORMAL_SECONDS_MAX = 1.0
READS_PER_SECOND = 10
POSTS_PER_SECOND = 50
CHECKS_PER_SECOND = 10
CALL_SECONDS_MAX = 10.0
ANSWERED = (HTTPStatus.OK, HTTPStatus.TOO_MANY_REQUESTS)
"""The statuses over REST of calls that are stored or refused. Over gRPC every answer has status 200."""
_SAMPLE_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Route:
    """A protocol."""

    name: str
    post: Callable[[Call, int], Post]
    """Returns the request that the load repeats, by the call and the number of its account."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A call of a probe."""

    started: float
    """In seconds of time.monotonic."""
    seconds: float
    """The time until its answer."""
    code: grpc.StatusCode
    says_when_to_retry: bool = False

    @property
    def is_ok(self) -> bool:
        """Whether the call succeeded."""
        return self.code is grpc.StatusCode.OK


@dataclass
class Probe:
    """Calls a method at a steady rate, whether or not earlier calls were answered, on a connection of its own."""

    call: Call
    per_second: int
    answers: list[Answer] = field(default_factory=list)

    def between(self, start: float, end: float) -> list[Answer]:
        """Returns the answers of the calls that were started in this time."""
        return [each for each in self.answers if start <= each.started < end]

    async def run(self, port: int, is_over: Event) -> None:
        """Calls until the event is set, then waits for the answers."""
        options = (*NO_PROXY, ("grpc.use_local_subchannel_pool", 1))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as channel, asyncio.TaskGroup() as calls:
            next_start = time.monotonic()
            while not is_over.is_set():
                calls.create_task(self._measure(channel))
                next_start += 1 / self.per_second
                await asyncio.sleep(max(0.0, next_start - time.monotonic()))

    async def _measure(self, channel: grpc.aio.Channel) -> None:
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{self.call.method}")
        started = time.monotonic()
        try:
            await method(
                self.call.requests[0].SerializeToString(),
                metadata=tuple(self.call.headers.items()),
                timeout=CALL_SECONDS_MAX,
            )
        except grpc.aio.AioRpcError as error:
            headers = {name for name, _ in (*error.initial_metadata(), *error.trailing_metadata())}
            answer = Answer(started, time.monotonic() - started, error.code(), "retry-after" in headers)
        else:
            answer = Answer(started, time.monotonic() - started, grpc.StatusCode.OK)
        self.answers.append(answer)


@dataclass(frozen=True, slots=True)
class Probes:
    """What callers see before, during and after the overload."""

    reads: Probe
    """Lists, with another credential than the overload's."""
    posts: Probe
    """Postings to another account, with the credential of the overload."""
    checks: Probe
    """Health checks."""

    @contextmanager
    def running(self, port: int) -> Iterator[None]:
        """Calls in another thread until the end of the block."""
        is_over = Event()

        async def run() -> None:
            await asyncio.gather(*(each.run(port, is_over) for each in (self.reads, self.posts, self.checks)))

        thread = Thread(target=asyncio.run, args=(run(),))
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()


@dataclass(frozen=True, slots=True)
class Overload:
    """The measurements of one overload."""

    peaks: Sequence[float]
    """The stored transactions per second of 64 callers without a limit."""
    limit: int
    """The requests per second that the gateway lets through."""
    stored: int
    """The transactions that the overload stored."""
    offered: Offered
    probes: Probes
    start: float
    """In seconds of time.monotonic."""
    sizes: Sequence[tuple[int, int]]
    """The memory of the server and of the gateway: before the overload, then during it."""


def measure(stage: Stage) -> list[Finding]:
    """Overloads the server on each engine and in each protocol."""
    ledgers = {"SQLite": stage.fresh_sqlite(), "PostgreSQL": stage.postgresql}
    return [
        finding
        for engine, ledger in ledgers.items()
        for route in (REST, GRPC)
        for finding in findings_of(f"{route.name}, {engine}", _overload(stage, ledger, route))
    ]


def _overload(stage: Stage, ledger: Ledger, route: Route) -> Overload:
    call = create_call(ledger)
    posts = [route.post(call, number) for number in range(len(call.requests))]
    with daybook_with_gateway(ledger.database_url) as server:
        wait_for_answer(server, PATH, authorization(ledger.key))
        # The first round warms up.
        peaks = [_peak(stage, server, ledger, posts) for _ in range(1 + 2 * stage.rounds.at_least)][1:]
    limit = round(LIMIT * median(peaks))
    rate = OVERLOAD * limit
    settings = {
        "DAYBOOK_GATEWAY_RATE_LIMIT_REQUESTS_PER_SECOND": str(limit),
        "DAYBOOK_GATEWAY_RATE_LIMIT_BURST": str(limit),
    }
    with daybook_with_gateway(ledger.database_url, settings) as server:
        wait_for_answer(server, PATH, authorization(ledger.key))
        # Warms up.
        h2load_offered(server.port, posts, stage.seconds, clients=CLIENTS, streams=STREAMS)
        stage.log(f"{route.name}: offering {rate:,.0f} calls a second for {stage.seconds_overloaded} seconds")
        probes = _probes(server, ledger)
        with probes.running(server.port):
            time.sleep(stage.seconds_around)
            before = posted(server.grpc_port, ledger)
            sizes = [(server.resident_bytes, server.gateway_resident_bytes)]
            start = time.monotonic()
            with _sampling(lambda: sizes.append((server.resident_bytes, server.gateway_resident_bytes))):
                offered = h2load_offered(
                    server.port,
                    posts,
                    stage.seconds_overloaded,
                    clients=CLIENTS_OVERLOADED,
                    streams=STREAMS_OVERLOADED,
                    rate=rate,
                )
            stored = posted(server.grpc_port, ledger) - before
            time.sleep(stage.seconds_around)
    return Overload(tuple(peaks), limit, stored, offered, probes, start, tuple(sizes))


def _peak(stage: Stage, server: Server, ledger: Ledger, posts: Sequence[Post]) -> float:
    before = posted(server.grpc_port, ledger)
    h2load_offered(server.port, posts, stage.seconds, clients=CLIENTS, streams=STREAMS)
    return (posted(server.grpc_port, ledger) - before) / stage.seconds


def _probes(server: Server, ledger: Ledger) -> Probes:
    request = CreateApiKeyRequest(api_key=ApiKey(scopes=["transactions"]))
    (answer,) = Call.of("daybook.v1.Admin/CreateApiKey", request, key=ledger.key).answers(server.grpc_port)
    reader_key = CreateApiKeyResponse.FromString(answer).key_string
    charge = charge_of(ORGANIZATION)
    return Probes(
        Probe(list_call(reader_key, ORGANIZATION), READS_PER_SECOND),
        Probe(Call.of(CREATE, charge, key=ledger.key), POSTS_PER_SECOND),
        Probe(
            Call("grpc.health.v1.Health/Check", (HealthCheckRequest(service="daybook.v1.Ledger"),), {}),
            CHECKS_PER_SECOND,
        ),
    )


@contextmanager
def _sampling(sample: Callable[[], None]) -> Iterator[None]:
    """Takes samples in another thread until the end of the block."""
    is_over = Event()

    def run() -> None:
        while not is_over.wait(_SAMPLE_SECONDS):
            sample()

    thread = Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _over_rest(call: Call, number: int) -> Post:
    request = call.requests[number]
    assert isinstance(request, CreateTransactionRequest)
    body = MessageToJson(request.transaction, indent=None).encode()
    return Post(f"v1/{request.parent}/transactions", body, {**call.headers, "content-type": "application/json"})


def _over_grpc(call: Call, number: int) -> Post:
    return Post(call.method, frame(call.requests[number]), {**GRPC_HEADERS, **call.headers})


REST = Route("REST", _over_rest)
GRPC = Route("gRPC", _over_grpc)


def findings_of(what: str, found: Overload) -> Iterator[Finding]:
    """Yields the findings of one overload."""
    seconds = found.offered.end - found.start

    def finding(of: str, value: float, unit: str = "", bar: Bar | None = None, note: str = "") -> Finding:
        return Finding(19, f"{what}: {of}", value, unit, bar, note=note)

    answers = {status: sorted(each) for status, each in sorted(found.offered.microseconds.items())}
    statuses = ", ".join(f"{len(each):,} times {status}" for status, each in answers.items())
    offered = found.offered.started / seconds / found.limit
    yield finding("offered / limit", offered, "", at_least(OFFERED_MIN * OVERLOAD), f"answers: {statuses}")
    yield Finding(
        19,
        f"{what}: offered / peak",
        found.offered.started / seconds / median(found.peaks),
        "",
        None,
        spread=spread(found.peaks),
        sides={"offered/s": [found.offered.started / seconds], "limit/s": [found.limit], "peak/s": found.peaks},
    )
    goodput = found.stored / seconds / found.limit
    yield finding("goodput / limit", goodput, "", at_least(GOODPUT_MIN))
    yield finding("goodput / limit, at most", goodput, "", at_most(GOODPUT_MAX))

    posts = found.probes.posts.between(found.start, found.offered.end)
    refusals = [each for each in posts if each.code is grpc.StatusCode.RESOURCE_EXHAUSTED]
    stored = [each for each in posts if each.is_ok]
    yield finding("postings refused / sent", len(refusals) / len(posts), "", at_least(REFUSED_MIN))
    if refusals:
        note = f"p99 {_milliseconds(refusals, 0.99):,.0f} ms, {len(refusals)} of {len(posts)} refused"
        bar = at_most(REFUSAL_MILLISECONDS_MAX)
        yield finding("p50 of refusals", _milliseconds(refusals, 0.5), "ms", bar, note)
        # Not p99: one pause of the machine of half a second is 1 % of the minute.
        yield finding("p95 of refusals", _milliseconds(refusals, 0.95), "ms", bar)
        silent = sum(not each.says_when_to_retry for each in refusals)
        yield finding("refusals without retry-after", silent, "", at_most(0))
    if stored:
        note = f"p99 {_milliseconds(stored, 0.99):,.0f} ms, {len(stored)} of {len(posts)} stored"
        yield finding("p50 of stored calls", _milliseconds(stored, 0.5), "ms", note=note)
    others = Counter(each.code.name for each in posts if not each.is_ok and each not in refusals)
    others.update({str(status): len(each) for status, each in answers.items() if status not in ANSWERED})
    if refused := answers.get(HTTPStatus.TOO_MANY_REQUESTS):
        note = f"p99 {refused[len(refused) * 99 // 100] / 1000:,.0f} ms, {len(refused):,} refused"
        yield finding("p50 of the load's refusals", refused[len(refused) // 2] / 1000, "ms", note=note)
    yield finding("other errors", others.total(), "", at_most(0), ", ".join(others))

    before = found.probes.reads.between(0, found.start)
    reads = found.probes.reads.between(found.start, found.offered.end)
    yield finding("reads served / sent", sum(each.is_ok for each in reads) / len(reads), "", at_least(READS_MIN))
    for name, part in (("p50", 0.5), ("p99", 0.99)):
        note = f"{_milliseconds(before, part):,.1f} ms before"
        yield finding(f"{name} of reads", _milliseconds(reads, part), "ms", at_most(READ_MILLISECONDS_MAX), note)
    checks = found.probes.checks.between(found.start, found.offered.end)
    slowest = max(each.seconds if each.is_ok else CALL_SECONDS_MAX for each in checks)
    yield finding("slowest health check", slowest, "s", at_most(HEALTH_SECONDS_MAX))
    yield finding("until normal", _seconds_until_normal(found), "s", at_most(NORMAL_SECONDS_MAX))
    for name, sizes in zip(("server", "gateway"), zip(*found.sizes, strict=True), strict=True):
        yield finding(f"growth of the {name}", (max(sizes) - sizes[0]) / MEGABYTE, "MB", at_most(GROWTH_MEGABYTES_MAX))


def _milliseconds(answers: Sequence[Answer], part: float) -> float:
    """Returns a quantile of the latencies."""
    spans = sorted(each.seconds for each in answers)
    return 1000 * spans[min(len(spans) - 1, int(len(spans) * part))]


def _seconds_until_normal(found: Overload) -> float:
    """Returns the time from the end of the overload to the last posting that fails or takes unusually long."""
    posts, end = found.probes.posts, found.offered.end
    longest = 2 * max(each.seconds for each in posts.between(0, found.start))
    unusual = [each for each in posts.between(end, inf) if not each.is_ok or each.seconds > longest]
    return max((each.started + each.seconds - end for each in unusual), default=0.0)
