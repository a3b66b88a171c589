"""A client of HTTP/1.1 that sends requests verbatim over one connection."""

from __future__ import annotations

import asyncio
import re

from tests.support.waiting import SECONDS_MAX

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)


class Connection:
    """Connects at the first request, and again after the peer has closed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def status_of(self, request: bytes, *, is_head: bool) -> int:
        """Sends a request and reads the whole answer. Returns its status."""
        async with asyncio.timeout(SECONDS_MAX):
            is_reused = self._streams is not None
            try:
                return await self._exchange(request, is_head=is_head)
            except (asyncio.IncompleteReadError, ConnectionError):
                self.close()
                # The peer may have closed a reused connection before it read this request.
                if not is_reused:
                    raise
                return await self._exchange(request, is_head=is_head)

    def close(self) -> None:
        """Closes the connection."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None

    async def _exchange(self, request: bytes, *, is_head: bool) -> int:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        writer.write(request)
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            status = int(head[9:12])
            if status >= 200:
                break
        if not is_head and status != 204:
            if _CHUNKED.search(head):
                while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
                    await reader.readexactly(size + 2)
                await reader.readuntil(b"\r\n")
            elif length := _LENGTH.search(head):
                await reader.readexactly(int(length[1]))
        if _CLOSE.search(head):
            self.close()
        return status
