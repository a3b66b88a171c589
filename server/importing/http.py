"""Reads JSON from a live API: retries, rate limits, and bounds."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self

import httpx

from server.transport.addresses import is_loopback

ATTEMPTS = 10
"""The number of attempts of a request."""
FIRST_DELAY_SECONDS = 0.5
LONGEST_DELAY_SECONDS = 60.0
"""The delay after an attempt doubles from the first to the longest, with jitter."""
LONGEST_RETRY_AFTER_SECONDS = 3600.0
"""The longest wait that a server may ask for."""
TIMEOUT_SECONDS = 60.0
BODY_BYTES = 64 * 1024 * 1024
"""The largest response."""
RETRIED = {408, 429, 500, 502, 503, 504}


class SourceFailed(OSError):
    """The source can't be read."""


def parse_json(text: bytes | str) -> Any:
    """Parses JSON with exact numbers. Raises ValueError."""
    try:
        return json.loads(text, parse_float=Decimal, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


class Api:
    """A live API at one address. A context manager."""

    def __init__(
        self,
        address: str,
        headers: Mapping[str, str],
        *,
        sleep: Callable[[float], None] = time.sleep,
        chance: Callable[[], float] = random.random,
        on_wait: Callable[[float, str], None] = lambda _seconds, _reason: None,
    ) -> None:
        """Raises ValueError if the address is no https:// URL; http:// is for this machine only."""
        try:
            url = httpx.URL(address.rstrip("/"))
        except httpx.InvalidURL as error:
            raise ValueError(f"{address!r}: {error}") from None
        if not url.host or not (url.scheme == "https" or (url.scheme == "http" and _is_local(url.host))):
            raise ValueError(f"{address!r}: give an address with https://, so that the token stays secret")
        self._address, self._sleep, self._chance, self._on_wait = str(url), sleep, chance, on_wait
        self._has_answered = False
        # Redirects are not followed: they could send the token to another host.
        self._client = httpx.Client(headers={"accept": "application/json", **headers}, timeout=TIMEOUT_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._client.close()

    def get(self, path: str, **parameters: str | int) -> Any:
        """Returns the JSON of a path below the address. Waits and repeats if the API is busy or away.

        Raises SourceFailed for an answer other than 200, after the last attempt, or if the first connection fails.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                status, headers, body = self._request(path, parameters)
            except httpx.RequestError as error:
                problem, retry_after = f"no answer: {error or type(error).__name__}", 0.0
                if isinstance(error, httpx.ConnectError) and not self._has_answered:
                    raise SourceFailed(f"{self._address}: {problem}; check the address") from None
            else:
                self._has_answered = True
                if status == 200:
                    try:
                        return parse_json(body)
                    except ValueError:
                        raise SourceFailed(f"{self._address}{path}: the answer is no JSON") from None
                problem, retry_after = f"status {status}: {_excerpt(body)}", _retry_after(headers)
                if status not in RETRIED:
                    raise SourceFailed(f"{self._address}{path}: {problem}")
            if attempt == ATTEMPTS:
                break
            backoff = min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2 ** (attempt - 1)) * self._chance()
            self._on_wait(retry_after + backoff, problem)
            self._sleep(retry_after + backoff)
        raise SourceFailed(f"{self._address}{path}: {problem} ({ATTEMPTS} attempts)")

    def place(self, path: str, number: int) -> str:
        """How people find a page."""
        return f"{self._address}{path}, page {number}"

    def _request(self, path: str, parameters: Mapping[str, str | int]) -> tuple[int, httpx.Headers, bytes]:
        with self._client.stream("GET", self._address + path, params=dict(parameters)) as response:
            body = bytearray()
            for part in response.iter_bytes():
                body += part
                if len(body) > BODY_BYTES:
                    raise SourceFailed(f"{self._address}{path}: the answer is larger than {BODY_BYTES} bytes")
            return response.status_code, response.headers, bytes(body)


def _is_local(host: str) -> bool:
    return host == "localhost" or is_loopback(host)


def _excerpt(body: bytes) -> str:
    text = body[:300].decode(errors="replace")
    return "".join(each if each.isprintable() else " " for each in text)


def _retry_after(headers: httpx.Headers) -> float:
    """The wait in seconds that the header retry-after asks for, a number or a date; 0 without one."""
    value = headers.get("retry-after", "").strip()
    if value.isdecimal():
        return min(float(value), LONGEST_RETRY_AFTER_SECONDS)
    try:
        seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_SECONDS)
