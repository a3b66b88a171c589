"""The settings of a client, for threads or for asyncio."""

from __future__ import annotations

import random as random_numbers
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from daybook_client.calls import Call
from daybook_client.configuration import Connection, channel_options
from daybook_client.retrying import Attempts, Retry

TIMEOUT_SECONDS = 30.0
"""The default deadline of a call, in seconds."""
STREAM_TIMEOUT_SECONDS = 3600.0
"""The default deadline of an import or a verification, in seconds."""


def new_uuid() -> str:
    """Returns a random UUID."""
    return str(uuid.uuid4())


class Client(ABC):
    """What both clients share."""

    def __init__(
        self,
        address: str | None = None,
        *,
        key: str | None = None,
        ca_file: str | None = None,
        client_certificate_file: str | None = None,
        client_key_file: str | None = None,
        timeout: float = TIMEOUT_SECONDS,
        stream_timeout: float = STREAM_TIMEOUT_SECONDS,
        retry: Retry | None = None,
        options: Sequence[tuple[str, Any]] = (),
        new_request_id: Callable[[], str] = new_uuid,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Any] | None = None,
        random: Callable[[], float] = random_numbers.random,
    ) -> None:
        """Opens no connection yet; the first call does.

        `address` is `host:port`, `https://host:port` or `http://host:port`. Without a scheme, the client uses TLS,
        unless the server is on this machine and no file is given. `key` is an API key or an access token. The other
        arguments up to `client_key_file` are PEM files. Those that are None are read from the environment:
        DAYBOOK_ADDRESS, DAYBOOK_KEY, DAYBOOK_CA_FILE, DAYBOOK_CLIENT_CERTIFICATE_FILE, DAYBOOK_CLIENT_KEY_FILE.

        `timeout` and `stream_timeout` are the deadlines of calls and of streams, in seconds. `options` are options of
        the gRPC channel. The last four replace the sources of request_ids, of time and of chance, for tests.

        Raises ValueError if the address or the key is missing or wrong, and OSError if a file can't be read.
        """
        connection = Connection.of(
            address=address,
            key=key,
            ca_file=ca_file,
            client_certificate_file=client_certificate_file,
            client_key_file=client_key_file,
        )
        self._metadata = connection.metadata
        self._timeout, self._stream_timeout = timeout, stream_timeout
        self._retry = retry or Retry()
        self._new_request_id, self._clock, self._random = new_request_id, clock, random
        self._is_closed = False
        self._open(connection.target, connection.channel_credentials(), channel_options(options), sleep)

    @abstractmethod
    def _open(
        self,
        target: str,
        credentials: grpc.ChannelCredentials | None,
        options: Sequence[tuple[str, Any]],
        sleep: Callable[[float], Any] | None,
    ) -> None:
        """Makes the channel."""

    def _attempts(self, call: Call[Any], default: float) -> Attempts:
        """Begins the attempts of a call, whose deadline is the call's or the default."""
        call.with_request_ids(self._new_request_id)
        timeout = default if call.timeout is None else call.timeout
        return Attempts(call, self._retry, timeout, self._clock, self._random)
