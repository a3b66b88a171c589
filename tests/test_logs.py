"""Logs: all lines have one format, lines of calls have request ids, and no line has a secret."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import grpc
import pytest
from daybook.v1.ledger_service_pb2 import GetAccountRequest, ListAccountsRequest, ListTransactionsRequest
from daybook.v1.ledger_service_pb2_grpc import LedgerStub
from hpack import Encoder
from hyperframe.frame import Frame, GoAwayFrame, HeadersFrame, SettingsFrame

from server.gateway.envoy import JSON_LINES, envoy_path
from server.ledger.access import new_api_key
from server.logs import is_no_fault_of_a_client, without_secrets
from tests.support.ledgers import create_key
from tests.support.processes import Daybook, Ports, environment, sqlite_url
from tests.support.waiting import SECONDS_MAX, wait_until

Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Logged:
    """A running `daybook serve` that logs every call as JSON."""

    daybook: Daybook
    key: str

    @property
    def lines(self) -> list[Line]:
        """The lines logged so far, each of which must be a JSON object."""
        whole, _, _ = self.daybook.stderr.rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def of(self, **ids: str) -> list[Line]:
        """Returns the lines with these ids. Waits for the last one, which may be written after the response."""

        def found() -> list[Line]:
            return [line for line in self.lines if ids.items() <= line.items()]

        wait_until(lambda: [line["event"] for line in found()][-1:] == ["call finished"], f"the line of {ids}")
        return found()

    async def call(self, method: str, request: Any, *metadata: tuple[str, str]) -> grpc.StatusCode:
        """Calls a method of the ledger. Returns the status."""
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.daybook.ports.server}") as channel:
            try:
                answer = getattr(LedgerStub(channel), method)
                await answer(request, metadata=(("authorization", f"Bearer {self.key}"), *metadata))
            except grpc.aio.AioRpcError as error:
                return error.code()
            return grpc.StatusCode.OK


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logged]:
    """The server of this module, which must stop cleanly at the end."""
    folder, ports = tmp_path_factory.mktemp("logged"), Ports.free()
    url = sqlite_url(folder / "daybook.db")
    key = asyncio.run(create_key(url, {"transactions", "accounts"}))
    flags = ("--log-format", "json", "--log-level", "debug")
    daybook = Daybook.start(
        "serve", "--database-url", url, "--port", str(ports.server), *flags, folder=folder, ports=ports
    )
    try:
        daybook.wait_for('"event": "serving"')
        yield Logged(daybook, key)
        assert daybook.stop() == 0
        # All lines are JSON, and none has the secret.
        assert [json.loads(line)["event"] for line in daybook.stderr.splitlines()][-1] == "stopped"
        assert key.partition(".")[2] not in daybook.stderr
    finally:
        daybook.kill()


async def test_line_of_a_call_names_its_request(logged: Logged) -> None:
    """The line of a call has the method, the status, the duration, the request id and the caller's trace id."""
    trace_id = uuid.uuid4().hex
    code = await logged.call(
        "GetAccount",
        GetAccountRequest(name="accounts/absent"),
        ("x-request-id", "8f14"),
        ("traceparent", f"00-{trace_id}-00f067aa0ba902b7-01"),
    )
    assert code is grpc.StatusCode.NOT_FOUND
    (line,) = logged.of(request_id="8f14")
    assert line.pop("seconds") > 0
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "call finished",
        "level": "debug",
        "method": "daybook.v1.Ledger/GetAccount",
        "code": "NOT_FOUND",
        "request_id": "8f14",
        "trace_id": trace_id,
    }


async def test_concurrent_calls_keep_their_ids(logged: Logged) -> None:
    """Each of many concurrent calls has one line, with its own request id."""
    ids = [f"at-once-{number}" for number in range(50)]
    await asyncio.gather(*(logged.call("ListAccounts", ListAccountsRequest(), ("x-request-id", each)) for each in ids))
    assert [len(logged.of(request_id=each)) for each in ids] == [1] * 50


@pytest.mark.parametrize(
    ("sent", "logged_as"),
    [("a b c", "a?b?c"), ("x" * 300, "x" * 128), ('"}{', '"}{'), ("", "")],
    ids=["blanks", "long", "JSON", "empty"],
)
async def test_request_id_is_sanitised(logged: Logged, sent: str, logged_as: str) -> None:
    """A request id is truncated, its blanks are replaced, and it can't end its line or field."""
    trace_id = uuid.uuid4().hex
    traceparent = f"00-{trace_id}-00f067aa0ba902b7-01"
    await logged.call("ListAccounts", ListAccountsRequest(), ("x-request-id", sent), ("traceparent", traceparent))
    (line,) = logged.of(trace_id=trace_id)
    assert line["request_id"] == logged_as


@pytest.mark.parametrize("traceparent", ["", "00-xyz-1-01", f"00-{'A' * 32}-{'b' * 16}-01", f"{'a' * 400}"])
async def test_malformed_traceparent_is_not_logged(logged: Logged, traceparent: str) -> None:
    """A line has no trace id if the traceparent is malformed."""
    request_id = uuid.uuid4().hex
    await logged.call("ListAccounts", ListAccountsRequest(), ("x-request-id", request_id), ("traceparent", traceparent))
    (line,) = logged.of(request_id=request_id)
    assert "trace_id" not in line


@pytest.mark.parametrize(
    "frame",
    [
        GoAwayFrame(0, error_code=2, additional_data=b"\nBearer forged\xff"),
        HeadersFrame(1, Encoder().encode([(":method", "NONE"), ("te", "x")]), flags=["END_HEADERS"]),
    ],
    ids=["farewell", "header"],
)
def test_frames_of_a_client_write_no_line(logged: Logged, frame: Frame) -> None:
    """gRPC's core, which has a format of its own, logs nothing of a client without a credential."""
    with socket.create_connection(("127.0.0.1", logged.daybook.ports.server), SECONDS_MAX) as client:
        client.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame(0).serialize() + frame.serialize())
        client.shutdown(socket.SHUT_WR)
        # The server has read the frame once it closes the connection.
        while client.recv(65_536):
            pass
    assert "Bearer forged" not in logged.daybook.stderr
    assert all(line["level"] in {"debug", "info"} for line in logged.lines)


def test_path_that_ends_grpcs_server_writes_one_line(logged: Logged) -> None:
    """A path that is not UTF-8 ends a server of grpc.aio: the log has one warning, and no traceback."""

    def warnings() -> list[Line]:
        return [line for line in logged.lines if line["event"] == "grpc server ended by a request"]

    headers = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/\xff"), (b":authority", b"localhost")]
    block = Encoder().encode([*headers, (b"content-type", b"application/grpc"), (b"te", b"trailers")], huffman=False)
    with socket.create_connection(("127.0.0.1", logged.daybook.ports.server), SECONDS_MAX) as client:
        client.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame(0).serialize())
        client.sendall(HeadersFrame(1, block, flags=["END_HEADERS"]).serialize())
        wait_until(lambda: bool(warnings()), "the warning")
    (line,) = warnings()
    assert line.items() >= {"level": "warning", "error": "UnicodeDecodeError"}.items()
    assert not [line for line in logged.lines if line["level"] == "error"]


async def test_server_failure_is_logged_with_its_request(logged: Logged) -> None:
    """A call that fails because of the server has a warning in addition to the line of the call."""
    with closing(sqlite3.connect(logged.daybook.folder / "daybook.db")) as connection:
        connection.execute("ALTER TABLE transactions RENAME TO away")
    try:
        request = ListTransactionsRequest(parent="accounts/-")
        assert await logged.call("ListTransactions", request, ("x-request-id", "bad")) is grpc.StatusCode.UNAVAILABLE
    finally:
        with closing(sqlite3.connect(logged.daybook.folder / "daybook.db")) as connection:
            connection.execute("ALTER TABLE away RENAME TO transactions")
    lines = logged.of(request_id="bad")
    assert [(line["level"], line["event"]) for line in lines] == [
        ("warning", "database unavailable"),
        ("warning", "call failed"),
        ("debug", "call finished"),
    ]
    assert lines[1]["reason"] == "SERVICE_UNAVAILABLE"
    assert lines[1]["code"] == lines[2]["code"] == "UNAVAILABLE"


OF_LIBRARIES = """
import asyncio, logging, sys, warnings
import structlog
from sqlalchemy import text
import server.cli
from server.app import serving
from server.book import open_book
from server.config import Settings
from server.logs import configure_logs

async def fail(book, log):
    try:
        def work(connection):
            connection.execute(text("CREATE TABLE t (x INTEGER CHECK (x = 'y'))"))
            connection.execute(text("INSERT INTO t VALUES (:x)"), {"x": "hunter2"})
        await book.database.transact(work)
    except Exception:
        log.exception("ours")
        logging.getLogger("sqlalchemy.pool").exception("theirs")

async def lose():
    future = asyncio.get_running_loop().create_future()
    future.set_exception(ValueError("never looked at"))

async def main(settings):
    async with open_book(settings.database_url) as book, serving(book, settings):
        configure_logs(settings)
        await fail(book, structlog.get_logger())
        await lose()
        warnings.warn("something is old")
        logging.getLogger("grpc").info("not worth a line")
        logging.getLogger("httpx").warning("sent %s and %r", {"x-api-key": "hunter2"}, b"hunter2")
        structlog.get_logger().error("ours again", sent=[b"hunter2"], url="https://me:hunter2@example.com/")
        configure_logs(settings.model_copy(update={"log_level": "error"}))

warnings.simplefilter("always")
for log_format in ("json", "console"):
    settings = Settings(database_url=sys.argv[1], port=0, log_format=log_format, log_level="error")
    configure_logs(settings)
    print("-----", file=sys.stderr)
    asyncio.run(main(settings.model_copy(update={"log_level": "debug"})))
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""


@pytest.fixture(scope="module")
def of_libraries(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """Runs a server while libraries log: first in JSON, then in the console format."""
    url = sqlite_url(tmp_path_factory.mktemp("libraries") / "daybook.db")
    return subprocess.run(
        [sys.executable, "-c", OF_LIBRARIES, url],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=True,
    )


def test_libraries_log_in_json(of_libraries: subprocess.CompletedProcess[str]) -> None:
    """Errors of asyncio and SQLAlchemy, and warnings, are logged as JSON, without values of statements."""
    text = of_libraries.stderr.split("-----")[1]
    assert "hunter2" not in text
    lines = [json.loads(line) for line in text.splitlines() if line]
    assert [(line["level"], line.get("logger")) for line in lines] == [
        ("error", None),
        ("error", "sqlalchemy.pool"),
        ("error", "asyncio"),
        ("warning", "py.warnings"),
        ("warning", "httpx"),
        ("error", None),
    ]
    ours, theirs, lost, warning, sent, again = lines
    assert (ours["event"], theirs["event"]) == ("ours", "theirs")
    assert "IntegrityError" in ours["exception"]
    assert "IntegrityError" in theirs["exception"]
    assert "never looked at" in lost["exception"]
    assert "something is old" in warning["event"]
    assert sent["event"] == "sent {'x-api-key': [hidden] and [hidden]"
    assert (again["sent"], again["url"]) == (["[hidden]"], "https://[hidden]@example.com/")
    assert all(line["timestamp"] for line in lines)


def test_libraries_log_in_the_console_format(of_libraries: subprocess.CompletedProcess[str]) -> None:
    """In the console format, lines of libraries look like the server's, without values of statements."""
    text = of_libraries.stderr.split("-----")[2]
    assert "hunter2" not in text
    for event in ("[error    ] ours", "[error    ] theirs", "never looked at", "something is old"):
        assert event in text


def test_opentelemetry_is_not_imported_by_default(of_libraries: subprocess.CompletedProcess[str]) -> None:
    """A server without a collector imports no module of OpenTelemetry."""
    assert of_libraries.stdout == "[]\n"


KEY = new_api_key(Random(7).randbytes).text
SECRET = KEY.partition(".")[2]
JWT = "eyJhbGciOiJFUzI1NiIsImtpZCI6ImVjIiwidHlwIjoiYXQrand0In0.eyJzdWIiOiJqYW5lIn0.c2lnbmF0dXJl"
SECRETS = {
    f"Bearer {KEY}": "Bearer [hidden]",
    f"'authorization': 'bearer {JWT}', 'te': 'trailers'": "'authorization': [hidden] [hidden]', 'te': 'trailers'",
    f"Basic {SECRET}== and more": "Basic [hidden] and more",
    f"X-API-Key: {KEY}": "X-API-Key: [hidden]",
    f"no such key: {KEY}": f"no such key: {KEY.partition('.')[0]}.[hidden]",
    f"token {SECRET}{SECRET}.": "token [hidden].",
    f"-{SECRET}": "[hidden]",
    bytes(32).hex(): "[hidden]",
    repr(b"Bearer " + KEY[:-9].encode() + b"\xa0'" + KEY[-9:].encode()): "[hidden]",
    "postgresql://daybook:pass/word@db:5432/ledger": "postgresql://[hidden]@db:5432/ledger",
    "host=db password=hunter2 dbname=ledger": "host=db password=[hidden] dbname=ledger",
    "sslpassword=hunter2&sslmode=require": "sslpassword=[hidden]&sslmode=require",
}
"""Texts that contain a secret, and the texts that are logged instead."""
HARMLESS = (
    "call failed: accounts/acme is not found",
    "0192f3a4-5b6c-7d8e-9f01-23456789abcd",
    "4bf92f3577b34da6a3ce929d0e0e4736",
    'File "server/store/units.py", line 12, in the_longest_name_of_a_function_that_anybody_ever_wrote',
    "listening on http://127.0.0.1:4317, ops@example.com",
    "page_token: not a page token of this service",
)


@pytest.mark.parametrize(
    ("logger", "message", "is_logged"),
    [
        ("grpc._cython.cygrpc", "ExecuteBatchError raised in core by servicer method [/daybook.v1.Ledger/X]", False),
        ("grpc._cython.cygrpc", "Invalid encoding on b'x'", False),
        ("grpc._cython.cygrpc", "Unexpected [KeyError] raised by servicer method [/daybook.v1.Ledger/X]", True),
        ("asyncio", "ExecuteBatchError raised in core", True),
    ],
)
def test_errors_of_grpc_that_clients_cause_are_not_logged(logger: str, message: str, is_logged: bool) -> None:
    """An answer to a client that has left, and metadata that is not UTF-8, are no faults of the server."""
    record = logging.LogRecord(logger, logging.ERROR, "", 0, message, None, None)
    assert is_no_fault_of_a_client(record) == is_logged


@pytest.mark.parametrize("text", SECRETS)
def test_secret_is_hidden(text: str) -> None:
    """Text that looks like a credential, a page token or a password is hidden; the text around it stays."""
    assert without_secrets(text) == SECRETS[text]


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_text_is_not_hidden(text: str) -> None:
    """Names, ids and code locations are logged unchanged."""
    assert without_secrets(text) == text


def test_envoy_logs_in_json(tmp_path: Path) -> None:
    """Envoy's lines are JSON if the server logs JSON, even if they contain quotes and line breaks."""
    (tmp_path / "envoy.yaml").write_text('node: {"no such \\"thing": 1}')
    flags = ("--disable-hot-restart", "--log-level", "error", "--log-format", JSON_LINES)
    result = subprocess.run(
        [envoy_path(), "--config-path", str(tmp_path / "envoy.yaml"), *flags],
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    line = json.loads(result.stderr.splitlines()[0])
    assert line.keys() == {"event", "level", "timestamp", "logger"}
    assert (line["level"], line["logger"]) == ("critical", "envoy.main")
    assert "thing" in line["event"]
    assert "\n" in line["event"]
