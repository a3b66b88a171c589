"""Idempotency: a mutation that is repeated with its request_id gets its first answer.

The answer is stored in the same database transaction as the effect and never deleted. A refused
call stores no answer, so its request_id can be used again.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from server.ledger.errors import RequestIdReused


class Request(NamedTuple):
    """What identifies a mutation if it is repeated."""

    request_id: str
    """Empty if the caller sent none; no answer is stored then."""
    fingerprint: bytes
    """SHA-256 over the method and the request without its request_id."""


class Answer(NamedTuple):
    """The first answer to a request."""

    request: Request
    sequence: int | None
    """The sequence of the transaction that is the answer; None for any other answer."""
    response: bytes
    """The serialized answer."""

    def to(self, request: Request) -> bytes:
        """The serialized answer to the same request. Raises RequestIdReused for a different request."""
        if self.request.fingerprint != request.fingerprint:
            raise RequestIdReused(request.request_id)
        return self.response


AnswerKey: TypeAlias = tuple[int, str]
"""The number of an account, and a request_id."""
