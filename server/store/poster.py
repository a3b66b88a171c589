"""Posting: the one place that writes transactions."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from daybook.v1.transaction_pb2 import Transaction
from sqlalchemy import insert, update
from sqlalchemy.ext.asyncio import AsyncConnection

from server.ledger import money, posting
from server.ledger.instants import Clock, month_of, to_timestamp
from server.ledger.names import RandomBytes, transaction_name, uuid7
from server.ledger.posting import AccountState, Draft, Posting
from server.store.accounts import lock_state
from server.store.database import Database
from server.store.requests import Request, first_answer, remember
from server.store.tables import LABELS, account_states, transactions, usage_windows


@dataclass(frozen=True, slots=True)
class Order:
    """What the poster is asked to do."""

    tenant_number: int
    account_id: str
    draft: Draft
    details: Transaction
    """The fields that posting doesn't decide: description, subject, labels and so on."""
    request: Request


class Poster:
    """Posts transactions, one database transaction each."""

    def __init__(self, database: Database, clock: Clock, random_bytes: RandomBytes) -> None:
        self._database = database
        self._clock = clock
        self._random_bytes = random_bytes

    async def post(self, order: Order) -> bytes:
        """Posts a transaction and answers with it, serialized, once it is on disk.

        Raises AccountNotFound, RequestIdReused, and what server.ledger.posting refuses;
        then nothing has changed.
        """
        async with self._database.write() as connection:
            state = await lock_state(connection, order.tenant_number, order.account_id)
            answer = await first_answer(connection, state.account_number, order.request)
            if answer is not None:
                return answer
            after, posted = posting.post(state, order.draft, self._clock())
            uid = uuid7(posted.create_time, self._random_bytes)
            body = _body(order, posted, uid)
            await _save_transaction(connection, order, after, posted, uid, body)
            await _save_window(connection, state, after)
            await _save_state(connection, after)
            await remember(connection, state.account_number, order.request, body)
            return body


def _body(order: Order, posted: Posting, uid: UUID) -> bytes:
    """The transaction as it is stored and served, for good."""
    message = Transaction()
    message.CopyFrom(order.details)
    message.name = transaction_name(order.account_id, uid)
    message.uid = str(uid)
    message.sequence = posted.sequence
    message.create_time.CopyFrom(to_timestamp(posted.create_time))
    message.kind = posted.draft.kind
    message.category = posted.draft.category
    message.state = Transaction.SUCCEEDED
    message.amount = money.write(posted.draft.amount)
    message.expiring_amount = money.write(0)
    message.permanent_amount = money.write(posted.draft.amount)
    message.balance_after = money.write(posted.balance_after)
    message.request_id = order.request.request_id
    return message.SerializeToString(deterministic=True)


async def _save_transaction(
    connection: AsyncConnection, order: Order, after: AccountState, posted: Posting, uid: UUID, body: bytes
) -> None:
    labels = order.details.labels
    await connection.execute(
        insert(transactions).values(
            account_number=after.account_number,
            sequence=posted.sequence,
            tenant_number=order.tenant_number,
            uid=uid.bytes,
            create_time=posted.create_time,
            month=month_of(posted.create_time),
            kind=posted.draft.kind,
            category=posted.draft.category,
            state=Transaction.SUCCEEDED,
            amount=posted.draft.amount,
            balance_after=posted.balance_after,
            **{name: labels.get(name) for name in LABELS},
            body=body,
        )
    )


async def _save_window(connection: AsyncConnection, before: AccountState, after: AccountState) -> None:
    window = after.window
    if window is None or window == before.window:
        return
    amounts = {"computing": window.computing, "serverless": window.serverless}
    if before.window is not None and before.window.number == window.number:
        await connection.execute(
            update(usage_windows)
            .where(
                usage_windows.c.account_number == after.account_number,
                usage_windows.c.number == window.number,
            )
            .values(amounts)
        )
    else:
        await connection.execute(
            insert(usage_windows).values(
                account_number=after.account_number, number=window.number, start=window.start, **amounts
            )
        )


async def _save_state(connection: AsyncConnection, after: AccountState) -> None:
    await connection.execute(
        update(account_states)
        .where(account_states.c.account_number == after.account_number)
        .values(
            balance=after.balance,
            sequence=after.sequence,
            last_create_time=after.last_create_time,
            window_number=after.window.number if after.window else 0,
        )
    )
