"""The Python clients under test: both have the same blocking methods here, so that each test runs with both."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from daybook_client import AsyncDaybook, AsyncPages, Daybook
from tests.support import processes
from tests.support.command_line import printed
from tests.support.processes import Ports, sqlite_url

KINDS = ("threads", "asyncio")


class Blocking:
    """AsyncDaybook with the methods of Daybook. An event loop in another thread runs the calls."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        try:
            self._client = self._run(self._open(*arguments, **settings))
        except Exception:
            self._end()
            raise

    async def _open(self, *arguments: Any, **settings: Any) -> AsyncDaybook:
        return AsyncDaybook(*arguments, **settings)

    def _run(self, awaitable: Any) -> Any:
        async def run() -> Any:
            return await awaitable

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            return self._blocking(getattr(self._client, name)(*arguments, **named))

        return call

    def _blocking(self, result: Any) -> Any:
        if isinstance(result, AsyncPages):
            return _BlockingPages(self, result)
        return self._iterate(result) if hasattr(result, "__aiter__") else self._run(result)

    def _iterate(self, values: Any) -> Iterator[Any]:
        iterator = aiter(values)
        while (value := self._run(anext(iterator, self))) is not self:
            yield value

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._client.close())
        self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@dataclass(frozen=True)
class _BlockingPages:
    client: Blocking
    of: AsyncPages[Any]

    def page(self) -> Any:
        return self.client._run(self.of.page())

    def pages(self) -> Iterator[Any]:
        return self.client._iterate(self.of.pages())

    def __iter__(self) -> Iterator[Any]:
        return self.client._iterate(self.of)


def open_client(kind: str, *arguments: Any, **settings: Any) -> Any:
    """Returns a client of a kind of KINDS, as a context manager."""
    return (Daybook if kind == "threads" else Blocking)(*arguments, **settings)


def public_methods(client: type) -> set[str]:
    """Returns the names of the public methods of a client's class."""
    return {name for name, _ in inspect.getmembers(client, callable) if not name.startswith("_")}


def _serve(folder: Path, ports: Ports, settings: Mapping[str, str]) -> processes.Daybook:
    daybook = processes.Daybook.start("serve", folder=folder, ports=ports, settings=settings)
    daybook.wait_for("serving")
    return daybook


@dataclass
class ServedLedger:
    """A `daybook serve` process with a tenant, and a key of it with the scope `admin`."""

    folder: Path
    port: int
    settings: Mapping[str, str]
    key: str
    daybook: processes.Daybook

    @classmethod
    def start(cls, folder: Path, **settings: object) -> ServedLedger:
        """Starts a server on a new SQLite file, with settings by their names."""
        url = sqlite_url(folder / "daybook.db")
        printed(url, "tenants", "create", "house")
        key = printed(url, "keys", "create", "--tenant", "house", "--scope", "admin")
        ports = Ports.free()
        settings |= {"database_url": url, "port": ports.server}
        variables = {f"DAYBOOK_{name.upper()}": str(value) for name, value in settings.items()}
        return cls(folder, ports.server, variables, key, _serve(folder / "first", ports, variables))

    def start_again(self) -> None:
        """Starts the server again after its end, on the same port."""
        self.daybook = _serve(self.folder / "next", self.daybook.ports, self.settings)

    @property
    def address(self) -> str:
        """The address of the server."""
        return f"127.0.0.1:{self.port}"

    def client(self, **settings: Any) -> Daybook:
        """Returns a client for threads."""
        return Daybook(self.address, key=self.key, **settings)
