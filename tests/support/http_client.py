"""An HTTP client that sends requests verbatim and reads JSON numbers as decimals."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from http.client import HTTPResponse
from typing import TypeAlias
from urllib.parse import urlsplit

import brotli

Json: TypeAlias = "dict[str, Json] | list[Json] | str | Decimal | bool | None"
_ANSWER_SECONDS_MAX = 60.0
_INTERNAL_HEADERS = ("grpc-", "x-envoy-", "x-error-")
_DECODERS: Mapping[str | None, Callable[[bytes], bytes]] = {
    None: bytes,
    "gzip": gzip.decompress,
    "br": brotli.decompress,
}


@dataclass(frozen=True, slots=True)
class Answer:
    """A response to an HTTP request."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        """Returns the value of a header, or None. Joins repeated headers with commas."""
        values = [value for each, value in self.headers if each == name.lower()]
        return ", ".join(values) if values else None

    def json(self) -> Json:
        """Returns the decompressed body, with numbers as decimals."""
        return read_json(_DECODERS[self.header("content-encoding")](self.body).decode())


def send(
    origin: str,
    target: str | bytes,
    *,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    body: bytes = b"",
    protocol: str = "HTTP/1.1",
) -> Answer:
    """Sends a request with exactly this request line, without normalising escapes.

    A header `host` replaces the host of the origin.
    """
    place = urlsplit(origin)
    assert place.hostname is not None
    lines = [
        b"%s %s %s" % (method.encode(), target.encode() if isinstance(target, str) else target, protocol.encode()),
        b"connection: close",
        # A byte outside UTF-8 is a surrogate escape in the header's text.
        *(
            f"{name}: {value}".encode(errors="surrogateescape")
            for name, value in {"host": place.netloc, **(headers or {})}.items()
        ),
    ]
    if body:
        lines.append(b"content-length: %d" % len(body))
    with socket.create_connection((place.hostname, place.port or 80), _ANSWER_SECONDS_MAX) as connection:
        connection.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        response = HTTPResponse(connection, method=method)
        response.begin()
        content = response.read()
        return Answer(response.status, [(name.lower(), value) for name, value in response.getheaders()], content)


def read_json(text: str) -> Json:
    """Parses JSON with numbers as decimals. Fails if a key occurs twice."""

    def to_dict(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
        assert len({key for key, _ in pairs}) == len(pairs), f"a key occurs twice in {pairs}"
        return dict(pairs)

    read: Json = json.loads(text, object_pairs_hook=to_dict, parse_float=Decimal, parse_int=Decimal)
    return read


def write_json(value: Json) -> str:
    """Formats JSON for messages of failed tests."""

    def to_number(number: object) -> object:
        assert isinstance(number, Decimal)
        return int(number) if number == number.to_integral_value() else float(number)

    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, default=to_number)


def problems_of_any_answer(answer: Answer) -> Iterator[str]:
    """Yields the rules for all REST responses that a response breaks."""
    is_file = answer.header("content-disposition") is not None
    if answer.body and not is_file and answer.header("content-type") != "application/json":
        yield f"content-type is {answer.header('content-type')!r}"
    if not answer.header("x-request-id"):
        yield "there is no x-request-id"
    for name, value in answer.headers:
        if name.startswith(_INTERNAL_HEADERS):
            yield f"{name}: {value} is for the filters only"
    if answer.header("cache-control") != "no-store":
        yield f"cache-control is {answer.header('cache-control')!r}"
    if "origin" not in (answer.header("vary") or ""):
        yield f"vary is {answer.header('vary')!r}"
    if answer.status == 401 and not answer.header("www-authenticate"):
        yield "a 401 needs www-authenticate"
    if answer.status == 429 and not answer.header("retry-after"):
        yield "a 429 needs retry-after"
