"""Idempotency: a mutation that is repeated with its request_id gets its first answer.

Kept in the same database transaction as the effect, for good. A refused call leaves no
row, so it does not use its id up.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from server.ledger.errors import RequestIdReused
from server.store.tables import requests


@dataclass(frozen=True, slots=True)
class Request:
    """What makes a mutation the same mutation."""

    request_id: str
    """Empty where the caller gave none: then nothing is remembered."""
    fingerprint: bytes
    """SHA-256 over the method and the request without its request_id."""


async def first_answer(connection: AsyncConnection, account_number: int, request: Request) -> bytes | None:
    """The answer that this request got before, or None if it is new.

    Raises RequestIdReused if the id was used for another request. The account must be
    locked, or two calls with one id could both be new.
    """
    if not request.request_id:
        return None
    row = (
        await connection.execute(
            select(requests.c.fingerprint, requests.c.response).where(
                requests.c.account_number == account_number,
                requests.c.request_id == request.request_id,
            )
        )
    ).one_or_none()
    if row is None:
        return None
    if row.fingerprint != request.fingerprint:
        raise RequestIdReused(request.request_id)
    return bytes(row.response)


async def remember(connection: AsyncConnection, account_number: int, request: Request, response: bytes) -> None:
    """Keeps the answer of a request that has an id."""
    if request.request_id:
        await connection.execute(
            insert(requests).values(
                account_number=account_number,
                request_id=request.request_id,
                fingerprint=request.fingerprint,
                response=response,
            )
        )
