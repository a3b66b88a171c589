"""The stored answers to requests: see server/ledger/idempotency.py."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import lru_cache
from itertools import chain
from typing import Any

from sqlalchemy import Connection, and_, insert, select

from server.ledger.idempotency import Answer, AnswerKey, Request
from server.store.engine import Engine, engine_of
from server.store.lookups import in_parts
from server.store.tables import requests, transactions

STATEMENTS_CACHED_MAX = 32


def load_answers(connection: Connection, keys: Collection[AnswerKey]) -> dict[AnswerKey, Answer]:
    """The stored answers by key; a new request has none.

    The accounts must be locked, or two calls with one request_id could both be new.
    """
    found: dict[AnswerKey, Answer] = {}
    for some in in_parts(sorted(keys)):
        # Padded to a power of two with the last key, so that few statements are compiled.
        padded = some + some[-1:] * ((1 << (len(some) - 1).bit_length()) - len(some))
        statement = _answers_statement(len(padded), engine_of(connection))
        rows: Iterable[Any] = connection.exec_driver_sql(statement, tuple(chain.from_iterable(padded)))
        for account_number, request_id, fingerprint, sequence, response, body in rows:
            request = Request(request_id, bytes(fingerprint))
            found[account_number, request_id] = Answer(request, sequence, bytes(body if response is None else response))
    return found


@lru_cache(STATEMENTS_CACHED_MAX)
def _answers_statement(count: int, engine: Engine) -> str:
    """The statement for `count` keys; its parameters are the columns of each key in turn."""
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
    statement = engine.with_keys(statement, key, [(0, "")] * count)
    return str(statement.compile(dialect=engine.dialect, compile_kwargs={"render_postcompile": True}))


def load_answer(connection: Connection, account_number: int, request: Request) -> bytes | None:
    """The stored answer to a request, or None if it is new. Raises RequestIdReused."""
    if not request.request_id:
        return None
    key = (account_number, request.request_id)
    answer = load_answers(connection, [key]).get(key)
    return None if answer is None else answer.to(request)


def save_answer(connection: Connection, account_number: int, request: Request, response: bytes) -> None:
    """Stores the answer to a request that has a request_id."""
    if request.request_id:
        connection.execute(
            insert(requests).values(
                account_number=account_number,
                request_id=request.request_id,
                fingerprint=request.fingerprint,
                response=response,
            )
        )
