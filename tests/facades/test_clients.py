"""HTTP client libraries with their default settings read a long page.

Libraries differ in the headers that they add: accepted types, accepted encodings, connection reuse.
The page is the same with each.
"""

from __future__ import annotations

import subprocess
import urllib.request
from collections.abc import Callable
from http.client import HTTPConnection
from urllib.parse import urlsplit

import httpx
import pytest
import requests

from server.demo import dreadnode
from server.demo.load import SECRET
from tests.support.http_client import read_json
from tests.support.openapi import require_page
from tests.support.processes import NODE, Daybook
from tests.support.waiting import SECONDS_MAX

PAGE = f"/api/v1/org/{dreadnode.ORGANIZATION}/credits/transactions?limit=100"
HEADERS = {"Authorization": f"Bearer {dreadnode.KEY}.{SECRET}"}


def with_http_client(origin: str) -> str:
    """Python's http.client: accepts no compression."""
    connection = HTTPConnection(urlsplit(origin).netloc)
    connection.request("GET", PAGE, headers=HEADERS)
    body = connection.getresponse().read()
    connection.close()
    return body.decode()


def with_urllib(origin: str) -> str:
    """Python's urllib: closes the connection."""
    request = urllib.request.Request(f"{origin}{PAGE}", headers=HEADERS)  # noqa: S310  # the gateway's, over HTTP
    with urllib.request.urlopen(request) as answer:  # noqa: S310  # the same
        body: bytes = answer.read()
    return body.decode()


def with_requests(origin: str) -> str:
    """requests: accepts gzip, deflate and other installed encodings."""
    return requests.get(f"{origin}{PAGE}", headers=HEADERS, timeout=SECONDS_MAX).text


def with_httpx(origin: str) -> str:
    """httpx over HTTP/1.1."""
    return httpx.get(f"{origin}{PAGE}", headers=HEADERS).text


def with_httpx_over_http_2(origin: str) -> str:
    """httpx over HTTP/2 with prior knowledge."""
    with httpx.Client(http1=False, http2=True) as client:
        return client.get(f"{origin}{PAGE}", headers=HEADERS).text


def with_fetch(origin: str) -> str:
    """Node's fetch: accepts gzip and deflate, and keeps the connection."""
    return run_node(f"""
        const answer = await fetch('{origin}{PAGE}', {{headers: {{Authorization: '{HEADERS["Authorization"]}'}}}});
        process.stdout.write(await answer.text());
    """)


def with_fetch_and_brotli(origin: str) -> str:
    """fetch as browsers call it: accepts br too."""
    return run_node(f"""
        const headers = {{Authorization: '{HEADERS["Authorization"]}', 'Accept-Encoding': 'gzip, deflate, br'}};
        const answer = await fetch('{origin}{PAGE}', {{headers}});
        process.stdout.write(await answer.text());
    """)


def run_node(program: str) -> str:
    """Runs a JavaScript program; returns its standard output."""
    result = subprocess.run(
        [NODE, "--input-type=module", "--eval", program],
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


CLIENTS = (
    with_http_client,
    with_urllib,
    with_requests,
    with_httpx,
    with_httpx_over_http_2,
    with_fetch,
    with_fetch_and_brotli,
)


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.__name__)
def test_library_reads_the_page(gateway: Daybook, client: Callable[[str], str]) -> None:
    """A library with default settings reads the whole page in the documented shape."""
    text = client(gateway.origin)
    require_page("dreadnode", text.encode())
    rows = read_json(text)
    assert isinstance(rows, list)
    assert len(rows) == 100
