"""Credentials with bytes that no client library sends are refused, and are not logged."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from collections.abc import Iterator
from http.client import HTTPResponse

import h2.config
import h2.connection
import h2.events
import pytest
from daybook.v1.ledger_service_pb2 import ListAccountsRequest

from tests.support.ledgers import create_key
from tests.support.processes import Daybook, Ports, sqlite_url
from tests.support.waiting import SECONDS_MAX

STRAY_BYTES = [
    *(bytes([code]) for code in range(0x80, 0x100)),
    *(character.encode() for character in "\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\ufeff"),
]
"""Single bytes that are invalid UTF-8, and Unicode spaces in UTF-8."""
CONTROL_BYTES = [bytes([code]) for code in (0x0B, 0x0C, 0x1C, 0x1D, 0x1E, 0x1F)]
"""ASCII control characters that str.strip() removes. Envoy closes a connection with such a byte in a header."""
SIGNATURE = "c2lnbmF0dXJlLW9mLXRoaXMtdG9rZW4"
JWT = f"eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJqYW5lLWRvZSJ9.{SIGNATURE}"
UNAUTHENTICATED = "16"
_STREAMS = 50
"""The number of concurrent calls."""


@pytest.fixture(scope="module")
def daybook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daybook, str]]:
    """A `daybook up` with debug logs, and an API key."""
    folder, ports = tmp_path_factory.mktemp("raw"), Ports.free()
    url = sqlite_url(folder / "daybook.db")
    key = asyncio.run(create_key(url, {"admin"}))
    flags = (*ports.flags, "--log-level", "debug", "--log-format", "json")
    daybook = Daybook.start("up", "--database-url", url, *flags, folder=folder, ports=ports)
    try:
        daybook.wait_for('"event": "gateway started"')
        yield daybook, key
    finally:
        daybook.kill()


Header = tuple[bytes, bytes]


def headers_of(key: str) -> list[Header]:
    """Headers with a key in every format, and with an access token."""
    key_id, _, secret = key.partition(".")
    basic = base64.b64encode(f"{key_id}:{secret}".encode())
    return [
        (b"authorization", b"Bearer " + key.encode()),
        (b"authorization", b"Basic " + basic),
        (b"authorization", b"Bearer " + JWT.encode()),
        (b"x-api-key", key.encode()),
    ]


def spoiled(header: Header, strays: list[bytes]) -> Iterator[Header]:
    """A header with each stray byte at every position that the parser treats differently."""
    name, value = header
    positions = {0, value.find(b" ") + 1, value.find(b"."), value.find(b".") + 1, len(value) - 9, len(value)}
    for stray in strays:
        for position in sorted(positions - {-1}):
            yield name, value[:position] + stray + value[position:]


def secrets_of(key: str) -> list[str]:
    """Parts of the headers that must not be logged; short, since a stray byte may divide the rest."""
    key_id, _, secret = key.partition(".")
    basic = base64.b64encode(f"{key_id}:{secret}".encode()).decode()
    return [secret[:20], secret[-8:], basic[:20], basic[-8:], SIGNATURE[:20], SIGNATURE[-8:], JWT.split(".")[1]]


def call_with_each(port: int, headers: list[Header]) -> list[str]:
    """Calls ListAccounts once with each header; returns each grpc-status, empty for a reset stream."""
    connection = h2.connection.H2Connection(
        h2.config.H2Configuration(
            client_side=True, validate_outbound_headers=False, normalize_outbound_headers=False, header_encoding=None
        )
    )
    body = ListAccountsRequest().SerializeToString()
    frame = b"\0" + len(body).to_bytes(4, "big") + body
    outcomes: dict[int, str] = {}
    with socket.create_connection(("127.0.0.1", port), SECONDS_MAX) as wire:
        connection.initiate_connection()
        waiting, in_flight, order = list(reversed(headers)), set[int](), list[int]()
        while waiting or in_flight:
            while waiting and len(in_flight) < _STREAMS:
                stream = connection.get_next_available_stream_id()
                connection.send_headers(
                    stream,
                    [
                        (b":method", b"POST"),
                        (b":scheme", b"http"),
                        (b":path", b"/daybook.v1.Ledger/ListAccounts"),
                        (b":authority", b"localhost"),
                        (b"content-type", b"application/grpc"),
                        (b"te", b"trailers"),
                        waiting.pop(),
                    ],
                )
                connection.send_data(stream, frame, end_stream=True)
                in_flight.add(stream)
                order.append(stream)
            wire.sendall(connection.data_to_send())
            received = wire.recv(65_536)
            assert received, "the server closes the connection"
            for event in connection.receive_data(received):
                if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                    found = dict(event.headers or ()).get(b"grpc-status")
                    if found is not None:
                        outcomes[event.stream_id or 0] = found.decode()
                elif isinstance(event, h2.events.DataReceived):
                    connection.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id or 0)
                elif isinstance(event, h2.events.StreamEnded | h2.events.StreamReset):
                    in_flight.discard(event.stream_id or 0)
    return [outcomes.get(stream, "") for stream in order]


def get_with(port: int, header: Header) -> int:
    """Lists accounts over REST with a header; returns the status."""
    name, value = header
    with socket.create_connection(("127.0.0.1", port), SECONDS_MAX) as wire:
        wire.sendall(b"GET /v1/accounts HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n")
        wire.sendall(name + b": " + value + b"\r\n\r\n")
        response = HTTPResponse(wire)
        response.begin()
        return response.status


def test_credential_with_a_stray_byte_is_refused(daybook: tuple[Daybook, str]) -> None:
    """The server, with and without the gateway, refuses a credential with a stray byte and does not log it."""
    process, key = daybook
    for port, strays in (
        (process.ports.server, STRAY_BYTES + CONTROL_BYTES),
        (process.ports.gateway, STRAY_BYTES),
    ):
        assert call_with_each(port, headers_of(key)) == ["0", "0", UNAUTHENTICATED, "0"], (
            "the key without a stray byte is valid"
        )
        for header in headers_of(key):
            sent = list(spoiled(header, strays))
            outcomes = dict(zip(sent, call_with_each(port, sent), strict=True))
            # A byte that is invalid in a header may also reset the stream.
            accepted = {each: status for each, status in outcomes.items() if status not in (UNAUTHENTICATED, "", "13")}
            assert not accepted
            invalid_utf_8 = [status for (_, value), status in outcomes.items() if b"\xa0" in value]
            assert UNAUTHENTICATED in invalid_utf_8, "the server's own code refuses such a header"
    # Over HTTP/1.1 the gateway may refuse a header itself, with 400.
    statuses = {get_with(process.ports.gateway, header) for header in spoiled(headers_of(key)[0], STRAY_BYTES)}
    assert statuses <= {400, 401}
    assert 401 in statuses
    assert process.stop() == 0
    logged = process.stdout + process.stderr
    found = [secret for secret in secrets_of(key) if secret in logged]
    assert not found
    assert "Traceback" not in logged, "a malformed header is not logged as a server error"
    assert all(json.loads(line) for line in process.stderr.splitlines())
