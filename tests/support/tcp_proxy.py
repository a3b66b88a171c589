"""A proxy for TCP connections, which can withhold what the server answers, and reset all connections."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class TcpProxy:
    """Forwards connections to a port of this machine."""

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._is_withholding = False
        self._bytes_left: int | None = None
        self._action: Callable[[], None] = self.cut
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()

    @classmethod
    @contextmanager
    def before(cls, upstream: int) -> Iterator[TcpProxy]:
        """A proxy that runs until the end of the block."""
        proxy = cls(upstream)
        threading.Thread(target=proxy._accept, daemon=True).start()
        try:
            yield proxy
        finally:
            # Ends `accept` in the other thread.
            proxy._listener.shutdown(socket.SHUT_RDWR)
            proxy._listener.close()
            proxy.cut()

    def withhold_answers(self) -> None:
        """Drops everything that the server sends from now on, until `cut`."""
        self._is_withholding = True

    def after(self, count: int, action: Callable[[], None]) -> None:
        """Calls `withhold_answers` or `cut` once the server has sent this many more bytes."""
        self._bytes_left, self._action = count, action

    def cut(self) -> None:
        """Resets every connection. Later ones are forwarded in both directions."""
        with self._lock:
            for each in self._sockets:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            self._sockets.clear()
            self._is_withholding = False

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._upstream))
            except OSError:
                client.close()
                continue
            with self._lock:
                self._sockets |= {client, server}
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(source, target, source is server), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        with contextlib.suppress(OSError), source:
            while data := source.recv(65_536):
                if is_answer and self._bytes_left is not None:
                    self._bytes_left -= len(data)
                    if self._bytes_left <= 0:
                        self._bytes_left = None
                        self._action()
                if not (is_answer and self._is_withholding):
                    target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)
