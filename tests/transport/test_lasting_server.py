"""The replacement of a server that has ended, with servers that fail. tests/rpc/test_connections.py tests real ones."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from structlog.testing import capture_logs

from server.transport.lasting_server import lasting_server


class Server:
    """A server that ends as a test says."""

    def __init__(self, *, ends: bool = False, fails_to_stop: bool = False) -> None:
        self.is_running = self.is_stopped = False
        self._ends = ends
        self._fails_to_stop = fails_to_stop

    async def start(self) -> None:
        """Starts."""
        self.is_running = True

    async def wait_for_termination(self, _seconds: float) -> None:
        """Raises the error of a request that has ended the server."""
        if self._ends:
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
        await asyncio.sleep(0.01)

    async def stop(self, _grace_seconds: float) -> None:
        """Stops; fails the first time if a request ends the server meanwhile."""
        if self._fails_to_stop:
            self._fails_to_stop = False
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
        self.is_stopped = True


async def test_server_is_replaced_after_failed_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts to create a server are repeated, each after a longer wait, and the log has the errors."""
    ended, replacement = Server(ends=True), Server()
    created: list[Any] = [ended, RuntimeError("port taken"), RuntimeError("no file"), replacement]
    waits: list[float] = []
    sleep = asyncio.sleep

    def create(_port: int) -> tuple[Any, int]:
        found = created.pop(0)
        if isinstance(found, Exception):
            raise found
        return found, 1

    async def note(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    with capture_logs() as logs:
        async with lasting_server(create, 1, 0.0):
            monkeypatch.setattr(asyncio, "sleep", note)
            while not replacement.is_running:
                await sleep(0)
            monkeypatch.undo()
    assert [seconds for seconds in waits if seconds > 0.01] == [0.05, 0.1]
    assert [line["error"] for line in logs if "not replaced" in line["event"]] == ["port taken", "no file"]
    assert ended.is_stopped
    assert replacement.is_stopped


async def test_server_that_a_request_ends_during_its_stop_is_stopped() -> None:
    """The error of such a request doesn't keep the server from being stopped with its grace period."""
    server = Server(fails_to_stop=True)
    created: Any = server
    async with lasting_server(lambda _: (created, 1), 1, 0.0):
        assert server.is_running
    assert server.is_stopped
