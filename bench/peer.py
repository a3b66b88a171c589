"""The peer: a REST server to compare Daybook with, which serves the native list by FastAPI and SQLAlchemy.

It is written for speed: one process with uvloop and httptools; SQLAlchemy Core on its async engine; a table whose
columns are the fields of the response and whose index has the order of the list; keyset pagination; one statement per
page; cached API keys; no access log. Pydantic validates and serializes the page in one step, and Starlette gets bytes,
so that FastAPI converts nothing. `response_model` still documents the response.
"""

from __future__ import annotations

import argparse
import base64
import gc
import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import islice
from typing import Annotated, Any

import uvicorn
from cachetools import TTLCache
from daybook.v1.transaction_pb2 import Transaction
from fastapi import FastAPI, Header, HTTPException, Query, Response
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel
from sqlalchemy import (
    BigInteger,
    Column,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    event,
    insert,
    select,
    text,
    tuple_,
)
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from server.cli import COLLECTOR_THRESHOLDS

CONNECTIONS = 4
"""The number of database connections."""
KEY_CACHED_SECONDS_MAX = 5.0
PAGE_SIZE_MAX = 1000
_ROWS_PER_INSERT = 500

metadata = MetaData()
transactions = Table(
    "peer_transactions",
    metadata,
    Column("tenant_number", BigInteger, primary_key=True, autoincrement=False),
    Column("account_id", String(128), primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("uid", String(36), nullable=False),
    # Microseconds since 1970.
    Column("create_time", BigInteger, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("category", String(63), nullable=False),
    Column("state", String(16), nullable=False),
    Column("amount", String(20), nullable=False),
    Column("expiring_amount", String(20), nullable=False),
    Column("permanent_amount", String(20), nullable=False),
    Column("balance_after", String(20), nullable=False),
    Column("description", String(1024), nullable=True),
    Column("model", String(255), nullable=True),
    Column("input_tokens", Integer, nullable=True),
    Column("output_tokens", Integer, nullable=True),
    Column("cost_usd", String(20), nullable=True),
    Index("peer_transactions_by_time", "tenant_number", "account_id", "create_time", "sequence"),
)
_API_KEY = text("SELECT tenant_number, secret_hash FROM api_keys WHERE id = :id AND revoke_time IS NULL")


class _Answer(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)


class UsageOut(_Answer):
    """The usage that a transaction charges."""

    model: str
    input_tokens: str | None = None
    output_tokens: str | None = None
    cost_usd: str | None = None


class TransactionOut(_Answer):
    """One movement of credits."""

    name: str
    uid: str
    sequence: str
    create_time: datetime
    kind: str
    category: str
    state: str
    amount: str
    expiring_amount: str
    permanent_amount: str
    balance_after: str
    description: str = ""
    # Empty in the rows of the bench; included because Daybook returns empty fields too.
    labels: dict[str, str] = Field(default_factory=dict)
    receipt_uri: str = ""
    request_id: str = ""
    refund_of: str = ""
    transfer_peer: str = ""
    allocations: list[str] = Field(default_factory=list)
    priority: int = 0
    usage: UsageOut | None = None


class PageOut(_Answer):
    """A page of transactions."""

    transactions: list[TransactionOut] = Field(default_factory=list)
    next_page_token: str | None = None


def create_app(database_url: str) -> FastAPI:
    """Returns the application for a database that `fill` has filled."""
    engine = _engine(database_url)
    tenants: TTLCache[str, int] = TTLCache(10_000, KEY_CACHED_SECONDS_MAX, time.monotonic)

    async def tenant_of(authorization: str) -> int:
        cached = tenants.get(authorization)
        if cached is not None:
            return cached
        scheme, _, key = authorization.partition(" ")
        key_id, _, secret = key.partition(".")
        async with engine.connect() as connection:
            row = (await connection.execute(_API_KEY, {"id": key_id})).one_or_none()
        secret_hash = hashlib.sha256(secret.encode()).digest()
        if scheme != "Bearer" or row is None or not hmac.compare_digest(bytes(row.secret_hash), secret_hash):
            raise HTTPException(401, headers={"WWW-Authenticate": "Bearer"})
        tenants[authorization] = tenant = int(row.tenant_number)
        return tenant

    async def list_transactions(
        account: str,
        authorization: Annotated[str, Header()],
        page_size: Annotated[int, Query(alias="pageSize", ge=1, le=PAGE_SIZE_MAX)] = 50,
        page_token: Annotated[str, Query(alias="pageToken")] = "",
    ) -> Response:
        tenant = await tenant_of(authorization)
        columns = transactions.c
        statement = (
            select(transactions)
            .where(columns.tenant_number == tenant, columns.account_id == account)
            .order_by(columns.create_time.desc(), columns.sequence.desc())
            .limit(page_size + 1)
        )
        if page_token:
            statement = statement.where(tuple_(columns.create_time, columns.sequence) < _from_token(page_token))
        async with engine.connect() as connection:
            rows = (await connection.execute(statement)).all()
        page = PageOut(transactions=[_render(row) for row in rows[:page_size]])
        if len(rows) > page_size:
            page.next_page_token = _to_token(rows[page_size - 1])
        return Response(page.model_dump_json(by_alias=True, exclude_none=True), media_type="application/json")

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await engine.dispose()

    app = FastAPI(lifespan=lifespan)
    app.add_api_route("/v1/accounts/{account}/transactions", list_transactions, response_model=PageOut)
    return app


def _render(row: Any) -> TransactionOut:
    usage = None
    if row.model is not None:
        usage = UsageOut(
            model=row.model,
            input_tokens=None if row.input_tokens is None else str(row.input_tokens),
            output_tokens=None if row.output_tokens is None else str(row.output_tokens),
            cost_usd=row.cost_usd,
        )
    return TransactionOut(
        name=f"accounts/{row.account_id}/transactions/{row.uid}",
        uid=row.uid,
        sequence=str(row.sequence),
        create_time=datetime.fromtimestamp(row.create_time / 1_000_000, UTC),
        kind=row.kind,
        category=row.category,
        state=row.state,
        amount=row.amount,
        expiring_amount=row.expiring_amount,
        permanent_amount=row.permanent_amount,
        balance_after=row.balance_after,
        description=row.description or "",
        usage=usage,
    )


def _to_token(row: Any) -> str:
    return base64.urlsafe_b64encode(f"{row.create_time}.{row.sequence}".encode()).decode()


def _from_token(page_token: str) -> tuple[int, int]:
    try:
        time_text, _, sequence_text = base64.urlsafe_b64decode(page_token).decode().partition(".")
        return int(time_text), int(sequence_text)
    except ValueError:
        raise HTTPException(400, "pageToken is invalid") from None


def _engine(database_url: str) -> AsyncEngine:
    engine = create_async_engine(database_url, pool_size=CONNECTIONS, max_overflow=0)
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine.sync_engine, "connect")
        def prepare(connection: Any, _record: object) -> None:
            cursor = connection.cursor()
            cursor.execute("PRAGMA journal_mode = WAL")
            cursor.close()

    return engine


async def fill(database_url: str, account_id: str) -> None:
    """Creates the peer's table and copies an account's transactions into it, field by field."""
    engine = _engine(database_url)
    try:
        async with engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
            stored = await connection.execute(
                text(
                    "SELECT t.tenant_number, t.body FROM transactions t JOIN accounts a ON a.number = t.account_number "
                    "WHERE a.id = :id ORDER BY t.sequence"
                ),
                {"id": account_id},
            )
            rows = (_columns(row.tenant_number, account_id, Transaction.FromString(bytes(row.body))) for row in stored)
            for batch in _batches(rows):
                await connection.execute(insert(transactions), batch)
        if engine.dialect.name == "postgresql":
            async with engine.connect() as connection:
                await connection.execution_options(isolation_level="AUTOCOMMIT")
                await connection.execute(text("VACUUM ANALYZE"))
    finally:
        await engine.dispose()


def _batches(rows: Iterable[dict[str, object]]) -> Iterator[list[dict[str, object]]]:
    rest = iter(rows)
    while batch := list(islice(rest, _ROWS_PER_INSERT)):
        yield batch


def _columns(tenant_number: int, account_id: str, transaction: Transaction) -> dict[str, object]:
    usage = transaction.usage if transaction.HasField("usage") else None
    return {
        "tenant_number": tenant_number,
        "account_id": account_id,
        "sequence": transaction.sequence,
        "uid": transaction.uid,
        "create_time": transaction.create_time.ToMicroseconds(),
        "kind": Transaction.Kind.Name(transaction.kind),
        "category": transaction.category,
        "state": Transaction.State.Name(transaction.state),
        "amount": transaction.amount,
        "expiring_amount": transaction.expiring_amount,
        "permanent_amount": transaction.permanent_amount,
        "balance_after": transaction.balance_after,
        "description": transaction.description or None,
        "model": usage.model if usage else None,
        "input_tokens": usage.input_tokens if usage and usage.HasField("input_tokens") else None,
        "output_tokens": usage.output_tokens if usage and usage.HasField("output_tokens") else None,
        "cost_usd": usage.cost_usd if usage and usage.HasField("cost_usd") else None,
    }


def main() -> None:
    """Serves until the process is stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--database-url", required=True)
    arguments = parser.parse_args()
    gc.freeze()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)
    uvicorn.run(
        create_app(arguments.database_url),
        port=arguments.port,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
