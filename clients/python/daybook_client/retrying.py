"""Deadlines and retries.

A call is repeated only if that can't take effect twice: the server refused it without effect, or it is a read, or its
request_id makes it idempotent. The delay grows exponentially with full jitter, after the delay that the server's
RetryInfo asks for. The deadline bounds all attempts of a call together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from daybook_client.calls import Call
from daybook_client.errors import (
    Cancelled,
    ClockSkewed,
    DeadlineExceeded,
    ResourceExhausted,
    Unavailable,
    from_rpc_error,
)

_REFUSED = (ResourceExhausted, ClockSkewed)
"""Errors of calls without effect, if the server says when to repeat them."""
_UNANSWERED = (Unavailable, Cancelled, DeadlineExceeded)
"""Errors of calls that may have taken effect."""


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and how fast a call is repeated."""

    attempts_max: int = 10
    """The number of attempts; 1 never repeats a call."""
    first_seconds: float = 0.1
    """The longest delay before the second attempt, in seconds. It doubles with each attempt."""
    seconds_max: float = 5.0
    """The longest delay before any attempt, in seconds, without the delay that the server asks for."""


class Attempts:
    """The attempts of one call."""

    def __init__(
        self, call: Call[Any], retry: Retry, timeout: float, clock: Callable[[], float], random: Callable[[], float]
    ) -> None:
        self._call, self._retry, self._clock, self._random = call, retry, clock, random
        self._deadline = clock() + timeout
        self._count = 0

    def seconds_left(self) -> float:
        """The time until the deadline, in seconds."""
        return self._deadline - self._clock()

    def delay_after(self, error: grpc.RpcError, *, is_final: bool) -> float:
        """Returns the delay until the next attempt, in seconds. Raises the exception of the error if there is none.

        `is_final` is whether the client has no use for another attempt.
        """
        found = from_rpc_error(error, self._call.request_id)
        backoff = min(self._retry.seconds_max, self._retry.first_seconds * 2.0**self._count) * self._random()
        self._count += 1
        delay = backoff + (found.retry_delay.total_seconds() if found.retry_delay else 0.0)
        had_no_effect = isinstance(found, _REFUSED) and found.retry_delay is not None
        may_repeat = had_no_effect or (self._call.is_idempotent and isinstance(found, _UNANSWERED))
        if is_final or not may_repeat or self._count >= self._retry.attempts_max or delay >= self.seconds_left():
            raise found from error
        return delay
