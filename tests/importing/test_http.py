"""The HTTP client of imports: retries, rate limits, and where it refuses to send a token."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import NamedTuple

import pytest

from server.importing.http import ATTEMPTS, Api, SourceFailed
from tests.support.processes import free_port


class Answer(NamedTuple):
    """An answer of the API."""

    status: int
    body: bytes = b"{}"
    headers: tuple[tuple[str, str], ...] = ()


class ScriptedApi:
    """An API that gives these answers, one after the other; the last one again and again."""

    def __init__(self, answers: list[Answer]) -> None:
        self.requests: list[tuple[str, str | None]] = []
        self.waits: list[float] = []
        script = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                script.requests.append((self.path, self.headers["authorization"]))
                answer = answers.pop(0) if len(answers) > 1 else answers[0]
                self.send_response(answer.status)
                for name, value in (*answer.headers, ("content-length", str(len(answer.body)))):
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer.body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name of the base class
                """Prints nothing."""

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.origin = f"http://127.0.0.1:{self._server.server_port}"

    @classmethod
    @contextmanager
    def serving(cls, *answers: Answer) -> Iterator[ScriptedApi]:
        """An API that runs until the end of the block."""
        script = cls(list(answers))
        thread = threading.Thread(target=script._server.serve_forever)
        thread.start()
        try:
            yield script
        finally:
            script._server.shutdown()
            thread.join()
            script._server.server_close()

    def client(self, chance: float = 0.0) -> Api:
        """A client whose waits are only written down; its jitter is fixed."""
        return Api(self.origin, {"authorization": "Bearer secret"}, sleep=self.waits.append, chance=lambda: chance)


def test_rate_limit_is_waited_for() -> None:
    """After a 429 the client waits as long as retry-after says, in seconds or as a date."""
    later = format_datetime(datetime.now(UTC) + timedelta(minutes=10), usegmt=True)
    busy = [Answer(429, headers=(("retry-after", value),)) for value in ("7", later, "soon")]
    with ScriptedApi.serving(*busy, Answer(200, b'{"amount": 0.1}')) as script, script.client() as api:
        assert str(api.get("/rows", limit=2)) == "{'amount': Decimal('0.1')}"
    assert script.requests == [("/rows?limit=2", "Bearer secret")] * 4
    assert script.waits[0] == 7
    assert 590 < script.waits[1] <= 600
    assert script.waits[2] == 0


def test_delay_doubles_up_to_a_minute() -> None:
    """Without retry-after, the delay doubles; after the last attempt the error is raised."""
    failed = pytest.raises(SourceFailed, match=rf"status 503: away \({ATTEMPTS} attempts\)")
    with ScriptedApi.serving(Answer(503, b"away")) as script, script.client(chance=1.0) as api, failed:
        api.get("/rows")
    assert script.waits == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 422])
def test_refusal_is_not_repeated(status: int) -> None:
    """A refusal ends the import at once. A redirect is one: the token stays with its host."""
    refusal = Answer(status, b"no\x07", (("location", "https://example.com/"),))
    failed = pytest.raises(SourceFailed, match=f"/rows: status {status}: no $")
    with ScriptedApi.serving(refusal) as script, script.client() as api, failed:
        api.get("/rows")
    assert len(script.requests) == 1


def test_answer_that_is_no_json_is_refused() -> None:
    """NaN and text are no JSON, and neither is what no parser takes."""
    for body in (b"<html>", b'{"amount": NaN}', b"[" * 100_000):
        failed = pytest.raises(SourceFailed, match="no JSON")
        with ScriptedApi.serving(Answer(200, body)) as script, script.client() as api, failed:
            api.get("/rows")


def test_address_without_a_server_is_reported_at_once() -> None:
    """If the first connection fails, the address is probably wrong. A server that answered before is waited for."""
    with pytest.raises(SourceFailed, match="check the address"), Api(f"http://127.0.0.1:{free_port()}", {}) as api:
        api.get("/rows")
    with ScriptedApi.serving(Answer(200)) as script:
        api = script.client()
        api.get("/rows")
    with api, pytest.raises(SourceFailed, match=rf"\({ATTEMPTS} attempts\)"):
        api.get("/rows")
    assert len(script.waits) == ATTEMPTS - 1


@pytest.mark.parametrize(
    "address", ["http://api.example.com", "api.example.com", "ftp://localhost", "https://", "http://[::"]
)
def test_address_without_tls_is_refused(address: str) -> None:
    """The token is sent over TLS only, except on this machine."""
    with pytest.raises(ValueError, match="http"):
        Api(address, {})
    Api("http://localhost:1", {}).__exit__(None, None, None)
