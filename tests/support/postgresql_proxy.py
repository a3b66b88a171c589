"""A proxy for PostgreSQL's protocol, which can hold, drop or split any message of the PostgreSQL server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

STARTUP_CODE = (196608).to_bytes(4, "big")
"""The protocol version 3.0 in a startup message."""


class PostgreSQLProxy:
    """Forwards every message immediately, except for the one that a test holds.

    It runs in the event loop of the test and uses Unix sockets, so `release` has written to the socket when it returns.
    """

    def __init__(self, folder: Path, upstream_folder: str) -> None:
        self._folder = folder
        self.upstream_folder = upstream_folder
        """The folder of the server's socket. A change applies to later connections."""
        self.names = ""
        """The types of the server's messages since `hold_at`, one letter each."""
        self.arrived = asyncio.Event()
        """Set when the message is held."""
        self._at: int | None = None
        self._held: tuple[_Side, bytes] | None = None
        self._sides: set[_Side] = set()
        self._connecting: set[asyncio.Task[None]] = set()

    def url(self, database: str) -> str:
        """Returns the SQLAlchemy URL of a database through the proxy."""
        return f"postgresql+asyncpg://postgres@/{database}?host={self._folder}"

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[PostgreSQLProxy]:
        """Serves until the end of the block."""
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(lambda: _Side(self, is_client=True), self._folder / ".s.PGSQL.5432")
        try:
            yield self
        finally:
            server.close()
            self.cut()
            if self._connecting:
                await asyncio.wait(self._connecting)

    def hold_at(self, number: int | None) -> None:
        """Holds the server's message of this number, counted from now and from 0, and all later messages."""
        self.names = ""
        self.arrived.clear()
        self._at = number
        self._held = None

    def release(self) -> None:
        """Forwards the held messages."""
        self._at = None
        if self._held is not None:
            side, message = self._held
            self._held = None
            side.other_write(message)
            side.forward()

    def release_half(self) -> None:
        """Forwards the first half of the held message, and resets the connection."""
        assert self._held is not None
        side, message = self._held
        side.other_write(message[: len(message) // 2])
        self.cut()

    def cut(self) -> None:
        """Resets every connection."""
        self._at = self._held = None
        for side in list(self._sides):
            side.abort()

    def connect_upstream(self, client: _Side) -> None:
        """Opens the connection to the server for a client's connection."""
        task = asyncio.create_task(self._connect_upstream(client))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect_upstream(self, client: _Side) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.create_unix_connection(
                lambda: _Side(self, is_client=False, other=client), f"{self.upstream_folder}/.s.PGSQL.5432"
            )
        except OSError:
            client.abort()

    def is_held(self, side: _Side, name: str, message: bytes) -> bool:
        """Records a message of the server. Returns whether it must be held."""
        self.names += name
        if self._at is None or len(self.names) - 1 != self._at:
            return False
        self._held = (side, message)
        self.arrived.set()
        return True

    def is_holding(self, side: _Side) -> bool:
        """Whether a message of this side is held."""
        return self._held is not None and self._held[0] is side

    def opened(self, side: _Side) -> None:
        """Registers a connection."""
        self._sides.add(side)

    def closed(self, side: _Side) -> None:
        """Unregisters a connection."""
        self._sides.discard(side)


class _Side(asyncio.Protocol):
    """One end of a connection: reads from the client or the server, and writes to the other end."""

    def __init__(self, proxy: PostgreSQLProxy, *, is_client: bool, other: _Side | None = None) -> None:
        self._proxy = proxy
        self._is_client = is_client
        self._is_started = not is_client
        self._other = other
        self._transport: asyncio.Transport | None = None
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._proxy.opened(self)
        if self._other is None:
            self._proxy.connect_upstream(self)
        else:
            self._other.set_other(self)

    def set_other(self, other: _Side) -> None:
        """Sets the other end, which is now connected."""
        self._other = other
        self.forward()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._other is not None:
            self.forward()

    def forward(self) -> None:
        """Forwards complete messages, up to a held one."""
        while not self._proxy.is_holding(self) and (message := self._next()) is not None:
            if self._is_client:
                self._note_start(message)
            elif self._proxy.is_held(self, chr(message[0]), message):
                return
            self.other_write(message)

    def _next(self) -> bytes | None:
        start = 1 if self._is_started else 0
        if len(self._buffer) < start + 4:
            return None
        length = start + int.from_bytes(self._buffer[start : start + 4], "big")
        if len(self._buffer) < length:
            return None
        message, self._buffer = self._buffer[:length], self._buffer[length:]
        return message

    def _note_start(self, message: bytes) -> None:
        # Only the startup message of a client has no type.
        self._is_started |= message[4:8] == STARTUP_CODE

    def other_write(self, data: bytes) -> None:
        """Writes to the other end."""
        if self._other is not None and self._other._transport is not None:
            self._other._transport.write(data)

    def abort(self) -> None:
        """Resets this connection."""
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._proxy.closed(self)
        if self._other is not None and self._other._transport is not None:
            self._other._transport.close()
