"""Idempotency: a mutation that is repeated with its request_id gets its first answer.

Kept in the same database transaction as the effect, for good. A refused call leaves no
row, so it does not use its id up.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

from sqlalchemy import Connection, Dialect, and_, insert, select

from server.ledger.errors import RequestIdReused
from server.store.lookups import in_parts, with_keys
from server.store.tables import requests, transactions

STATEMENTS_CACHED_MAX = 32


class Request(NamedTuple):
    """What makes a mutation the same mutation."""

    request_id: str
    """Empty where the caller gave none: then nothing is remembered."""
    fingerprint: bytes
    """SHA-256 over the method and the request without its request_id."""


class Answer(NamedTuple):
    """The first answer to a request: a transaction, or anything else serialized."""

    request: Request
    sequence: int | None
    response: bytes

    def to(self, request: Request) -> bytes:
        """The answer, if it is this request's. Raises RequestIdReused."""
        if self.request.fingerprint != request.fingerprint:
            raise RequestIdReused(request.request_id)
        return self.response


AnswerKey = tuple[int, str]
"""The number of an account, and a request_id."""


def first_answers(connection: Connection, keys: Collection[AnswerKey]) -> dict[AnswerKey, Answer]:
    """The answers that these requests got before. Those that are new have none.

    The accounts must be locked, or two calls with one id could both be new.
    """
    found: dict[AnswerKey, Answer] = {}
    for some in in_parts(sorted(keys)):
        # Made as long as a statement that is known, by asking for the last one again.
        padded = some + some[-1:] * ((1 << (len(some) - 1).bit_length()) - len(some))
        statement = _answers_statement(len(padded), connection.dialect)
        rows: Iterable[Any] = connection.exec_driver_sql(statement, tuple(chain.from_iterable(padded)))
        for account_number, request_id, fingerprint, sequence, response, body in rows:
            request = Request(request_id, bytes(fingerprint))
            found[account_number, request_id] = Answer(request, sequence, bytes(body if response is None else response))
    return found


@lru_cache(STATEMENTS_CACHED_MAX)
def _answers_statement(count: int, dialect: Dialect) -> str:
    """Asks for so many keys; its parameters are the parts of each. A fast path, like that of `save_unit`."""
    statement = select(
        requests.c.account_number,
        requests.c.request_id,
        requests.c.fingerprint,
        requests.c.sequence,
        requests.c.response,
        transactions.c.body,
    ).outerjoin(
        transactions,
        and_(
            transactions.c.account_number == requests.c.account_number,
            transactions.c.sequence == requests.c.sequence,
        ),
    )
    key = (requests.c.account_number, requests.c.request_id)
    statement = with_keys(statement, key, [(0, "")] * count, dialect)
    return str(statement.compile(dialect=dialect, compile_kwargs={"render_postcompile": True}))


def first_answer(connection: Connection, account_number: int, request: Request) -> bytes | None:
    """The answer that this request got before, or None if it is new. Raises RequestIdReused."""
    if not request.request_id:
        return None
    key = (account_number, request.request_id)
    answer = (first_answers(connection, [key])).get(key)
    return None if answer is None else answer.to(request)


def remember(connection: Connection, account_number: int, request: Request, response: bytes) -> None:
    """Keeps the answer of a request that has an id."""
    if request.request_id:
        connection.execute(
            insert(requests).values(
                account_number=account_number,
                request_id=request.request_id,
                fingerprint=request.fingerprint,
                response=response,
            )
        )
