"""Golden exchanges: readable files with requests to the gateway and the expected responses.

A file `<vendor>/<NN-name>.http` has exchanges, separated by lines that begin with `###`. The format of an exchange:

    # The claim of the exchange.
    GET /path?query
    name: value

    HTTP 200
    name: value

    {"body": "JSON in any layout"}

Request lines and headers are sent verbatim; a request line may end with `HTTP/1.0`, and is HTTP/1.1 otherwise. `body: 9
bytes` is not a header: a body of that size is sent. The response must have the listed headers with these values; a
header `name: <absent>` must be missing. The decoded body must be the same JSON: the same keys, nulls and types, the
same order in arrays, and numbers that are equal as decimals (2.0 equals 2). If no body is given, as for HEAD, the
response must have none. Values that vary have a placeholder instead of a string:

    "<uuid7>"              a UUID of version 7, unique in its body
    "<uuid7: name>"        the same UUID wherever the file has this name
    "<page token: name>"   an opaque text that is safe in a URL; later request lines may contain it as `<name>`
    "<text>"               any text, if the vendor does not document it
    "<text: word>"         any text that contains the word
    <seconds>              in a header: a whole number, at least 1

The requests go to the gateway of the demo. If the first line of a file is, for example, `@ slow`, they go to a gateway
in that condition, see tests/support/gateways.py:

    @ limited   the server admits two calls of each key
    @ crowded   the gateway refuses every call
    @ away      the gateway has no server
    @ slow      the gateway has a timeout of half a second, and the server never responds
    @ damaged   the server can't parse the stored data
    @ lost      the server's database fails
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.http_client import Answer, Json, problems_of_any_answer, read_json, send, write_json
from tests.support.processes import ROOT

FILES = sorted((ROOT / "tests/facades").glob("*/*.http"))

_PLACEHOLDER = re.compile(r"<(uuid7|page token|text)(?:: ([^<>]+))?>")
_UUID_7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_PAGE_TOKEN = re.compile(r"[A-Za-z0-9_.~-]+")
_CONDITION = re.compile(r"@ (\w+)\n")
_SECONDS = re.compile(r"[1-9][0-9]*")
_CAPTURED = re.compile(r"<([^<>]+)>")
_ABSENT = "<absent>"


class Matcher:
    """Compares bodies, and stores the values of named placeholders."""

    def __init__(self) -> None:
        self.captured: dict[str, str] = {}
        self._seen: set[str] = set()

    def differences(self, expected: Json, actual: Json) -> list[str]:
        """Returns the differences of two bodies."""
        self._seen = set()
        return list(self._compare("$", expected, actual))

    def _compare(self, place: str, expected: Json, actual: Json) -> Iterator[str]:
        if isinstance(expected, str) and (placeholder := _PLACEHOLDER.fullmatch(expected)):
            yield from self._compare_placeholder(place, placeholder[1], placeholder[2], actual)
        elif type(expected) is not type(actual):
            yield f"{place}: expected {write_json(expected)}, got {write_json(actual)}"
        elif isinstance(expected, dict) and isinstance(actual, dict):
            for key in expected.keys() - actual.keys():
                yield f"{place}.{key}: is missing, expected {write_json(expected[key])}"
            for key in actual.keys() - expected.keys():
                yield f"{place}.{key}: should not be there, got {write_json(actual[key])}"
            for key in expected.keys() & actual.keys():
                yield from self._compare(f"{place}.{key}", expected[key], actual[key])
        elif isinstance(expected, list) and isinstance(actual, list):
            if len(expected) != len(actual):
                yield f"{place}: expected {len(expected)} elements, got {len(actual)}"
            for index, (one, other) in enumerate(zip(expected, actual, strict=False)):
                yield from self._compare(f"{place}[{index}]", one, other)
        elif expected != actual:
            yield f"{place}: expected {write_json(expected)}, got {write_json(actual)}"

    def _compare_placeholder(self, place: str, kind: str, name: str | None, actual: Json) -> Iterator[str]:
        if not isinstance(actual, str) or not actual:
            yield f"{place}: expected a text for <{kind}>, got {write_json(actual)}"
        elif kind == "text":
            if name is not None and name not in actual:
                yield f"{place}: expected a text with {name!r}, got {actual!r}"
        elif not (_UUID_7 if kind == "uuid7" else _PAGE_TOKEN).fullmatch(actual):
            yield f"{place}: {actual!r} is not a {kind}"
        elif actual in self._seen:
            yield f"{place}: {actual} occurs twice"
        else:
            self._seen.add(actual)
            if name is not None and self.captured.setdefault(name, actual) != actual:
                yield f"{place}: expected the same {name} as earlier, {self.captured[name]}, got {actual}"


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request and the expected response."""

    place: str
    method: str
    target: str
    protocol: str
    headers: dict[str, str]
    content: bytes
    status: int
    answer_headers: dict[str, str]
    body: str
    """The expected JSON; empty if the response must have no body."""

    def replay(self, origin: str, matcher: Matcher) -> list[str]:
        """Sends the request. Returns the differences of the response, after a line that names the request."""
        missing = [name for name in _CAPTURED.findall(self.target) if name not in matcher.captured]
        if missing:
            return [f"{self.place}: {self.method} {self.target}", f"no earlier exchange captured {missing}"]
        target = _CAPTURED.sub(lambda reference: matcher.captured[reference[1]], self.target)
        answer = send(
            origin, target, method=self.method, headers=self.headers, body=self.content, protocol=self.protocol
        )
        problems = list(problems_of_any_answer(answer))
        if answer.status != self.status:
            problems.append(f"expected status {self.status}, got {answer.status}")
        for name, value in self.answer_headers.items():
            found = answer.header(name)
            if not (
                _SECONDS.fullmatch(found or "")
                if value == "<seconds>"
                else found == value or (found is None and value == _ABSENT)
            ):
                problems.append(f"expected {name}: {value}, got {found}")
        problems += self._problems_of_body(answer, matcher)
        return [f"{self.place}: {self.method} {target}", *problems] if problems else []

    def _problems_of_body(self, answer: Answer, matcher: Matcher) -> list[str]:
        if not self.body:
            return [f"expected no body, got {answer.body!r}"] if answer.body else []
        try:
            actual = answer.json()
        except ValueError:
            return [f"the body is not JSON: {answer.body!r}"]
        differences = matcher.differences(read_json(self.body), actual)
        return [*differences, f"the whole body: {write_json(actual)}"] if differences else []


def read_condition(file: Path) -> str:
    """Returns the condition of the gateway for a file; empty for the demo."""
    found = _CONDITION.match(file.read_text())
    return found[1] if found else ""


def read_exchanges(file: Path) -> list[Exchange]:
    """Returns the exchanges of a file."""
    parts = re.split(r"(?m)^###.*\n", _CONDITION.sub("", file.read_text()))
    return [_read_exchange(f"{file.name}, exchange {number}", part) for number, part in enumerate(parts, start=1)]


def _read_exchange(place: str, text: str) -> Exchange:
    request, answer, *body = re.sub(r"(?m)^#.*\n", "", text).strip().split("\n\n", 2)
    request_line, *header_lines = request.splitlines()
    method, target, *protocol = request_line.split(" ")
    headers = _read_headers(header_lines)
    content_length = int(headers.pop("body", "0 bytes").removesuffix(" bytes"))
    status_line, *answer_headers = answer.splitlines()
    http, status = status_line.split(" ")
    assert http == "HTTP", f"{place}: {status_line}"
    return Exchange(
        place,
        method,
        target,
        protocol[0] if protocol else "HTTP/1.1",
        headers,
        b"x" * content_length,
        int(status),
        _read_headers(answer_headers),
        "".join(body),
    )


def _read_headers(lines: list[str]) -> dict[str, str]:
    return {name: value for name, _, value in (line.partition(": ") for line in lines)}
