"""Whole requests: messages of every RPC method at the gRPC port, and REST requests at the gateway."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import grpc
from google.api.annotations_pb2 import http
from google.api.http_pb2 import HttpRule
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import Default

from server.transport.open_services import OPEN_SERVICES
from tests.fuzz.drawing import Drawer
from tests.fuzz.http_connection import Connection
from tests.fuzz.mutations import mutated
from tests.fuzz.target import Target, Tenant
from tests.support.callers import OWN_CONNECTION, credential
from tests.support.methods import METHODS
from tests.support.waiting import SECONDS_MAX

FAULTS = {"INTERNAL", "UNKNOWN", "DATA_LOSS", "UNAVAILABLE", "DEADLINE_EXCEEDED", "UNIMPLEMENTED"}
"""Statuses that blame the server, or that no input of these kinds explains."""
MESSAGES_MAX = 3
"""Messages of a client stream, and answers read of a server stream."""
_VARIABLE = re.compile(r"\{([a-z_.]+)(?:=[^}]+)?\}")


def _rpc_methods() -> Iterator[tuple[str, MethodDescriptor]]:
    yield from ((f"/{each.full_name.rpartition('.')[0]}/{each.name}", each) for each in METHODS)
    for name in OPEN_SERVICES:
        # Both versions of reflection have the same messages.
        for method in Default().FindServiceByName(name.replace("reflection.v1.", "reflection.v1alpha.")).methods:
            yield f"/{name}/{method.name}", method


RPC_METHODS = dict(_rpc_methods())
"""Every method that the server serves, by its path."""
BINDINGS: list[tuple[MethodDescriptor, HttpRule]] = [
    (method, rule)
    for method in METHODS
    for whole in [method.GetOptions().Extensions[http]]
    for rule in (whole, *whole.additional_bindings)
    if rule.WhichOneof("pattern")
]
"""Every way to call a method over REST."""


@dataclass
class Messages:
    """Bytes as the message of an RPC method: random, drawn from the contract, or drawn and mutated."""

    target: Target
    tenant: Tenant

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{self.target.daybook.ports.server}", OWN_CONNECTION)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    def draw(self, random: Random) -> tuple[str, list[bytes], tuple[tuple[str, str], ...]]:
        """Draws a method, its messages, and metadata."""
        path, method = random.choice(list(RPC_METHODS.items()))
        drawer = Drawer(random, self.tenant.pools)
        messages = [_message(method, drawer) for _ in range(random.randint(1, MESSAGES_MAX))]
        metadata = credential(self.tenant.key) if random.random() < 0.95 else ()
        if random.random() < 0.1:
            name = random.choice(("idempotency-key", "x-api-key", "authorization", "traceparent", "x-request-id"))
            value = "".join(chr(random.randrange(0x20, 0x7F)) for _ in range(random.randrange(40))).strip()
            metadata = (*metadata, (name, value))
        return path, messages if method.client_streaming else messages[:1], metadata

    async def send(self, drawn: tuple[str, list[bytes], tuple[tuple[str, str], ...]]) -> list[str]:
        """Makes the call; returns its status."""
        path, messages, metadata = drawn
        method, channel = RPC_METHODS[path], self._channel
        # A stub for bytes; the types of the methods without serializers are missing.
        options: dict[str, Any] = {"metadata": metadata, "timeout": SECONDS_MAX}
        try:
            if method.client_streaming or method.server_streaming:
                any_channel: Any = channel
                call = any_channel.stream_stream(path)(iter(messages), **options)
                # A watch never ends.
                for _ in range(1 if path.endswith("/Watch") else MESSAGES_MAX):
                    if await call.read() is grpc.aio.EOF:
                        break
                else:
                    call.cancel()
            else:
                any_channel = channel
                await any_channel.unary_unary(path)(messages[0], **options)
        except grpc.aio.AioRpcError as error:
            # grpc.aio's client says so if the server refused a stream while the client was still sending.
            return ["refused early" if error.details() == "Internal error from Core" else error.code().name]
        return ["OK"]

    def is_fault(self, status: str) -> bool:
        """Whether a status blames the server."""
        return status in FAULTS


def _message(method: MethodDescriptor, drawer: Drawer) -> bytes:
    kind = drawer.random.random()
    if kind < 0.1:
        return drawer.random.randbytes(drawer.random.choice((0, 1, 8, 64, 512)))
    message = drawer.message(method.input_type).SerializeToString()
    return message if kind < 0.55 else mutated(message, drawer.random)


_HEADERS = (
    *("authorization", "x-api-key", "spacebring-network-id", "accept", "accept-encoding", "content-type", "origin"),
    *("content-encoding", "cookie", "forwarded", "grpc-encoding", "grpc-timeout", "grpc-status", "te", "range"),
    *("traceparent", "tracestate", "idempotency-key", "if-match", "x-bin", "x-http-method-override", "x-request-id"),
    *("x-error-body", "x-error-status", "x-envoy-original-path", "x-envoy-upstream-rq-timeout-ms", "x-forwarded-for"),
    *("x-forwarded-proto", "x-forwarded-host", "x_underscore", "access-control-request-method", "priority"),
)
_VALUES = (
    *(b"", b"Bearer", b"Bearer .", b"Basic", b"Basic Og==", b"Basic \xff", b"gzip;q=x", b"*", b"0", b"1S", b"-1"),
    *(b"application/grpc", b"application/grpc-web", b"application/json; charset=utf-16", b"null", b"99999999999H"),
    *(b"{}", b"200", b"a,b", b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-00", b"x" * 8000, b"http://[", b"\xc3\x28"),
)


@dataclass
class RestRequests:
    """Well-framed HTTP/1.1 requests whose path, query, headers and JSON body are drawn, and often mutated."""

    target: Target
    tenant: Tenant
    _connection: Connection = field(init=False)

    async def __aenter__(self) -> Self:
        self._connection = Connection(self.target.daybook.ports.gateway)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def draw(self, random: Random) -> tuple[bytes, bytes]:
        """Draws a request: its HTTP method, and its bytes."""
        method, rule = random.choice(BINDINGS)
        drawer = Drawer(random, self.tenant.pools)
        verb = str(rule.WhichOneof("pattern"))
        content = drawer.json(method.input_type)
        path = _VARIABLE.sub(lambda match: _path_part(match[1], drawer), getattr(rule, verb))
        body: Any = {}
        if rule.body == "*":
            body, content = content, {}
        elif rule.body:
            field_of_body = method.input_type.fields_by_name[rule.body]
            body = content.pop(field_of_body.json_name, content.pop(field_of_body.name, {}))
        pairs = [f"{_escaped(name, random)}={_escaped(_query_value(each), random)}" for name, each in content.items()]
        target = f"{path}?{'&'.join(pairs)}".encode() if pairs else path.encode()
        if random.random() < 0.2:
            target = re.sub(rb"[\x00-\x20\x7f]", b"%", b"/" + mutated(target, random)[1:])
        sent_verb = verb.upper() if random.random() < 0.95 else random.choice(("GET", "POST", "PUT", "HEAD", "OPTIONS"))
        content_bytes = b"" if verb == "get" and random.random() < 0.9 else _body(body, drawer)
        return sent_verb.encode(), b"".join(
            (
                b"%s %s HTTP/1.1\r\nhost: localhost\r\n" % (sent_verb.encode(), target),
                *self._headers(random),
                b"content-length: %d\r\n\r\n" % len(content_bytes),
                content_bytes,
            )
        )

    async def send(self, drawn: tuple[bytes, bytes]) -> list[str]:
        """Sends the request; returns its status."""
        verb, request = drawn
        return [str(await self._connection.status_of(request, is_head=verb == b"HEAD"))]

    def is_fault(self, status: str) -> bool:
        """Whether a status blames the server."""
        return int(status) >= 500

    def _headers(self, random: Random) -> Iterator[bytes]:
        if random.random() < 0.95:
            yield b"authorization: Bearer %s\r\n" % self.tenant.key.encode()
        if random.random() < 0.9:
            yield b"content-type: application/json\r\n"
        if random.random() < 0.5:
            yield b"spacebring-network-id: %s\r\n" % self.tenant.uid.encode()
        if random.random() < 0.3:
            value = random.choice((*_VALUES, re.sub(rb"[\x00-\x1f\x7f]", b"~", random.randbytes(12))))
            yield b"%s: %s\r\n" % (random.choice(_HEADERS).encode(), value)


def _path_part(name: str, drawer: Drawer) -> str:
    text = drawer.text(name.rpartition(".")[2])
    return (
        text
        if drawer.random.random() < 0.7 and text.isascii() and text.isprintable() and " " not in text
        else quote(text.encode(errors="surrogatepass"), safe=drawer.random.choice(("/", "")))
    )


def _escaped(text: str, random: Random) -> str:
    return quote(text.encode(errors="surrogatepass"), safe=random.choice(("", "/:()=")))


def _query_value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _body(value: Any, drawer: Drawer) -> bytes:
    random = drawer.random
    kind = random.random()
    if kind < 0.05:
        return random.randbytes(random.choice((1, 8, 64, 4096)))
    if kind < 0.1:
        value = drawer.any_json()
    text = json.dumps(value, ensure_ascii=random.random() < 0.5).encode(errors="surrogatepass")
    if kind < 0.15 and text.startswith(b"{") and len(text) > 2:
        # Every key twice.
        text = text[:-1] + b"," + text[1:]
    return mutated(text, random) if kind < 0.5 else text
