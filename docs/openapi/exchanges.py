"""Examples: exchanges with a gateway in front of demo data, which tests/facades/test_openapi.py repeats.

A file `examples/<api>.http` has exchanges, separated by lines that begin with `###`:

    # What the example shows.
    POST /v1/accounts?accountId=acme
    authorization: Bearer KEY

    {"kind": "COMPANY"}

    HTTP 200
    content-type: application/json

    {"name": "accounts/acme"}

A request without a body has no such part. Values that are new in each run, such as
uids and times, are those of the run in which the exchange was recorded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

FOLDER = Path(__file__).parent / "examples"


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request and its response."""

    title: str
    method: str
    target: str
    """The path with its query."""
    headers: Mapping[str, str]
    body: Any
    """The JSON of the request, or None."""
    status: int
    content_type: str
    answer: Any
    """The JSON of the response, or its text."""

    @property
    def query(self) -> Mapping[str, str]:
        """The parameters of the query."""
        return dict(parse_qsl(urlsplit(self.target).query))

    def match(self, method: str, path: str) -> Mapping[str, str] | None:
        """Returns the parameters of the path if this is a request for the operation; otherwise None."""
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/:]+)", re.escape(path))
        found = re.fullmatch(pattern, urlsplit(self.target).path) if method == self.method else None
        return None if found is None else {name: unquote(value) for name, value in found.groupdict().items()}


def read_exchanges(api: str) -> Sequence[Exchange]:
    """Returns the exchanges of an API; none if it has no file."""
    file = FOLDER / f"{api}.http"
    if not file.exists():
        return []
    return [_read(part) for part in re.split(r"(?m)^###.*\n", file.read_text())]


def _read(text: str) -> Exchange:
    request, _, response = text.partition("\nHTTP ")
    head, _, body = request.strip().partition("\n\n")
    title, first_line, *headers = head.splitlines()
    method, target = first_line.split(" ")
    response_head, _, answer = response.strip().partition("\n\n")
    status, content_type = response_head.splitlines()
    content_type = content_type.removeprefix("content-type: ")
    return Exchange(
        title.removeprefix("# "),
        method,
        target,
        dict(line.split(": ", 1) for line in headers),
        json.loads(body) if body else None,
        int(status),
        content_type,
        json.loads(answer) if content_type == "application/json" else answer,
    )
