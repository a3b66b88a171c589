"""Runs the load generators h2load and wrk, and parses their output."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import Message

TOOLS = {"h2load": "nghttp2-client", "wrk": "wrk"}
"""The load generators, and their Debian packages."""
CLIENTS = 8
"""The number of connections."""
STREAMS = 8
"""The number of concurrent calls of each connection."""
STREAMS_PACED = 32
"""The number of concurrent calls of each connection at a steady rate, which hardly ever reaches it."""
LATE_SECONDS_MAX = 60.0
"""The time after its duration at which a generator is killed, in seconds."""
GRPC_HEADERS = {"content-type": "application/grpc", "te": "trailers"}
_FRAME = struct.Struct(">BI")
_SIZES = {"B": 1, "KB": 1024, "MB": 1024**2, "GB": 1024**3}


class LoadFailed(Exception):
    """A figure can't be measured. The message is for the user of the bench."""


@dataclass(frozen=True, slots=True)
class Load:
    """The result of a load."""

    rate: float
    """Responses per second."""
    answers: int
    refused: int
    """The number of responses with an HTTP status other than 2xx, without the expected body, or missing."""
    body_bytes: int
    """The size of the bodies of all responses; with wrk, including their headers."""


@dataclass(frozen=True, slots=True)
class Offered:
    """The result of a load at a steady rate that the server may not be able to serve."""

    started: int
    """The number of calls that were sent."""
    microseconds: Mapping[int, Sequence[int]]
    """The latency of each response by HTTP status; -1 for calls that failed without a status."""
    end: float
    """When the load ended, in seconds of time.monotonic."""


@dataclass(frozen=True, slots=True)
class Post:
    """A request that h2load repeats."""

    path: str
    body: bytes
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Latencies:
    """Latencies in microseconds."""

    median: float
    p99: float


def require_tools() -> None:
    """Raises LoadFailed, with the command to install it, if a generator is missing."""
    missing = {tool: package for tool, package in TOOLS.items() if shutil.which(tool) is None}
    if missing:
        raise LoadFailed(
            f"{' and '.join(missing)} not found: `apt-get install {' '.join(missing.values())}` on Debian and Ubuntu, "
            "`brew install nghttp2 wrk` on macOS"
        )


def frame(request: Message) -> bytes:
    """Returns a gRPC message on the wire: compression flag, length, bytes."""
    body = request.SerializeToString()
    return _FRAME.pack(0, len(body)) + body


def framed_size(answer: bytes) -> int:
    """Returns the size of the body of a response with one message."""
    return _FRAME.size + len(answer)


def h2load(
    port: int,
    method: str,
    requests: Sequence[Message],
    seconds: int,
    *,
    headers: Mapping[str, str],
    clients: int = CLIENTS,
    streams: int = STREAMS,
) -> Load:
    """Repeats calls of a gRPC method, on `clients` connections with `streams` concurrent calls each.

    h2load repeats one request, so each request has its own process, with an equal share of the connections. The
    processes run at the same time.
    """
    assert clients % len(requests) == 0, "every request has the same number of connections"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="daybook-bench-")))
        processes = []
        for number, request in enumerate(requests):
            file = folder / str(number)
            file.write_bytes(frame(request))
            command = _h2load_command(
                port, method, file, seconds, {**GRPC_HEADERS, **headers}, clients // len(requests), streams
            )
            processes.append(stack.enter_context(_started(command)))
        loads = [parse_h2load(_output_of(process, seconds)) for process in processes]
    return Load(
        rate=sum(load.rate for load in loads),
        answers=sum(load.answers for load in loads),
        refused=sum(load.refused for load in loads),
        body_bytes=sum(load.body_bytes for load in loads),
    )


def h2load_latencies(
    port: int,
    method: str,
    request: Message,
    seconds: int,
    *,
    headers: Mapping[str, str],
    rate: float,
    clients: int = CLIENTS,
    streams: int = STREAMS_PACED,
) -> Latencies:
    """Calls a gRPC method at a steady rate. Returns the latencies."""
    with tempfile.TemporaryDirectory(prefix="daybook-bench-") as folder:
        file, log = Path(folder) / "request", Path(folder) / "log"
        file.write_bytes(frame(request))
        each = max(1, round(rate / clients))
        command = _h2load_command(port, method, file, seconds, {**GRPC_HEADERS, **headers}, clients, streams)
        with _started([*command[:-1], f"--rps={each}", f"--log-file={log}", command[-1]]) as process:
            load = parse_h2load(_output_of(process, seconds))
        if load.refused:
            raise LoadFailed(f"{load.refused} calls of {method} were refused")
        return parse_h2load_log(log.read_text())


def h2load_offered(
    port: int, posts: Sequence[Post], seconds: int, *, clients: int, streams: int, rate: float | None = None
) -> Offered:
    """Repeats requests, each in a process of its own with `clients` connections. Records latencies by status.

    With `rate`, sends that many requests per second in total, as far as `streams` concurrent requests of each
    connection permit. Without, each connection always has `streams` requests.
    """
    pace = [] if rate is None else [f"--rps={max(1, round(rate / len(posts) / clients))}"]
    microseconds: dict[int, list[int]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="daybook-bench-")))
        processes = []
        for number, post in enumerate(posts):
            file = folder / f"{number}.request"
            file.write_bytes(post.body)
            command = _h2load_command(port, post.path, file, seconds, post.headers, clients, streams)
            log = f"--log-file={folder / str(number)}.log"
            processes.append(stack.enter_context(_started([*command[:-1], *pace, log, command[-1]])))
        outputs = [_output_of(process, seconds) for process in processes]
        end = time.monotonic()
        for number in range(len(posts)):
            with (folder / f"{number}.log").open() as file_of_log:
                for line in file_of_log:
                    _, status, latency = map(int, line.split("\t"))
                    microseconds.setdefault(status, []).append(latency)
    started = sum(int(_groups(r"^requests: [0-9]+ total, ([0-9]+) started", output)[0]) for output in outputs)
    return Offered(started, microseconds, end)


def wrk(url: str, seconds: int, *, headers: Mapping[str, str], connections: int = 32) -> Load:
    """Repeats a GET request over HTTP/1.1, from one thread."""
    options = [option for name, value in headers.items() for option in ("--header", f"{name}: {value}")]
    with _started(["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", *options, url]) as process:
        return parse_wrk(_output_of(process, seconds))


def parse_h2load(text: str) -> Load:
    """Parses the summary of h2load."""
    total, failed = _groups(r"^requests: ([0-9]+) total, .*?, ([0-9]+) failed", text)
    refused = _groups(r"^status codes: [0-9]+ 2xx, ([0-9]+) 3xx, ([0-9]+) 4xx, ([0-9]+) 5xx", text)
    return Load(
        rate=_number(r"^finished in .*?, ([0-9.]+) req/s", text),
        answers=int(total),
        refused=int(failed) + sum(int(count) for count in refused),
        body_bytes=int(_number(r"^traffic: .*\(([0-9]+)\) data$", text)),
    )


def parse_h2load_log(text: str) -> Latencies:
    """Parses the log of h2load, which has the start, the status and the latency of each call."""
    spans = sorted(int(line.split("\t")[2]) for line in text.splitlines())
    if not spans:
        raise LoadFailed("h2load logged no call")
    return Latencies(median=spans[len(spans) // 2], p99=spans[len(spans) * 99 // 100])


def parse_wrk(text: str) -> Load:
    """Parses the summary of wrk."""
    answers, size, unit = _groups(r"^\s*([0-9]+) requests in .*?, ([0-9.]+)(B|KB|MB|GB) read$", text)
    refused = 0
    if "Non-2xx" in text:
        refused += int(_number(r"Non-2xx or 3xx responses: ([0-9]+)", text))
    if "Socket errors" in text:
        counts = _groups(r"Socket errors: connect ([0-9]+), read ([0-9]+), write ([0-9]+), timeout ([0-9]+)", text)
        refused += sum(int(count) for count in counts)
    return Load(
        rate=_number(r"^Requests/sec:\s+([0-9.]+)", text),
        answers=int(answers),
        refused=refused,
        body_bytes=round(float(size) * _SIZES[unit]),
    )


def _number(pattern: str, text: str) -> float:
    return float(_groups(pattern, text)[0])


def _groups(pattern: str, text: str) -> tuple[str, ...]:
    match = re.search(pattern, text, re.MULTILINE)
    if match is None:
        raise LoadFailed(f"no {pattern!r} in:\n{text}")
    return tuple(str(group) for group in match.groups())


def _h2load_command(
    port: int, path: str, file: Path, seconds: int, headers: Mapping[str, str], clients: int, streams: int
) -> list[str]:
    options = [f"--header={name}: {value}" for name, value in headers.items()]
    return [
        "h2load",
        f"--clients={clients}",
        f"--max-concurrent-streams={streams}",
        f"--duration={seconds}",
        f"--data={file}",
        *options,
        f"http://127.0.0.1:{port}/{path}",
    ]


@contextmanager
def _started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _output_of(process: subprocess.Popen[str], seconds: int) -> str:
    # Errors don't quote the arguments, because they contain an API key.
    try:
        output, _ = process.communicate(timeout=seconds + LATE_SECONDS_MAX)
    except subprocess.TimeoutExpired:
        raise LoadFailed("a load generator did not end") from None
    if process.returncode:
        raise LoadFailed(f"a load generator ended with {process.returncode}:\n{output}")
    return output
