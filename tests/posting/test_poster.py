"""The poster on real databases: waiting calls are committed together, each with its own outcome."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any
from uuid import UUID

import grpc
import pytest
from daybook.v1.account_pb2 import Account
from daybook.v1.ledger_service_pb2 import TransferCreditsResponse
from daybook.v1.transaction_pb2 import Transaction, Usage
from google.protobuf.duration_pb2 import Duration
from sqlalchemy import event, func, select, text

from server.book import Book, open_book
from server.ledger.access import Caller
from server.ledger.accounts import AccountRecord
from server.ledger.audit import Finding
from server.ledger.errors import DaybookError, InsufficientCredits, RefundExceedsCharge, ServiceUnavailable
from server.ledger.idempotency import Request
from server.ledger.posting import Draft, Kind
from server.posting.poster import QUEUE_LENGTH_MAX, Poster
from server.store.database import Database
from server.store.tables import account_states, transactions
from server.usecases.transactions import NewTransaction
from tests.support.callers import Client, Server
from tests.support.clock import Clock
from tests.support.databases import database_occupied, held_writer, writing
from tests.support.markers import only_sqlite
from tests.support.refusals import read_refusal
from tests.support.waiting import until

GRANT, CHARGE = Transaction.GRANT, Transaction.CHARGE
CREDIT = 1_000_000
NEW = Request("", b"")
"""A request without an id."""


def new(account_id: str, kind: Kind, amount: int, *, is_usage: bool = False) -> NewTransaction:
    """A transaction to be posted; the amount is in credits."""
    category = "computing" if is_usage else "test"
    details = Transaction(usage=Usage(model="m")) if is_usage else Transaction()
    return NewTransaction(account_id, Draft(kind, category, amount * CREDIT, is_usage=is_usage), details, NEW)


@pytest.fixture
async def caller(book: Book) -> Caller:
    """A caller with its own tenant, which has the accounts `acme` and `other`."""
    number = await book.credentials.create_tenant(slug="t", uid="u", display_name="T", create_time=book.clock())
    caller = Caller(number, "u", "key", scopes=frozenset({"admin"}))
    for account_id in ("acme", "other"):
        record = AccountRecord(account_id, Account.SPACE, "", 0, b"")
        await book.accounts.create(caller, record, NEW, hour_anchor=None)
        # Caches the account number, so that calls enter the queue in the order in which they are made.
        await book.account_store.number(number, account_id)
    return caller


async def post(book: Book, caller: Caller, account_id: str, kind: Kind, amount: int, **flags: bool) -> Transaction:
    """Posts a transaction."""
    return Transaction.FromString(await book.transactions.create(caller, new(account_id, kind, amount, **flags)))


async def findings_of(book: Book) -> list[Finding]:
    """The findings of an audit of all books."""
    return [each async for each in book.verification.verify_all(None) if isinstance(each, Finding)]


async def rows_of(database: Database) -> list[Any]:
    """The account number, sequence, balance and amount of every transaction."""
    columns = transactions.c
    async with database.primary.snapshot() as connection:
        statement = select(columns.account_number, columns.sequence, columns.balance_after, columns.amount)
        return list(await connection.execute(statement.order_by(columns.account_number, columns.sequence)))


def check_rows(rows: Sequence[Any]) -> None:
    """Asserts that the rows of each account have gapless sequences and correct balances."""
    last: dict[int, tuple[int, int]] = {}
    for row in rows:
        sequence, balance = last.get(row.account_number, (0, 0))
        assert row.sequence == sequence + 1
        assert row.balance_after == balance + row.amount
        last[row.account_number] = row.sequence, row.balance_after


@contextmanager
def counting_commits(database: Database) -> Iterator[list[int]]:
    """Records the commits that insert transactions: for each, its number of INSERT statements."""
    engine = database.primary.writer
    commits: list[int] = []
    inserted: dict[int, int] = {}

    def execute(connection: Any, _cursor: object, statement: str, *_rest: object) -> None:
        if statement.startswith(("INSERT INTO transactions ", "INSERT OR FAIL INTO transactions ")):
            inserted[id(connection)] = inserted.get(id(connection), 0) + 1

    def commit(connection: Any) -> None:
        if id(connection) in inserted:
            commits.append(inserted.pop(id(connection)))

    event.listen(engine, "before_cursor_execute", execute)
    event.listen(engine, "commit", commit)
    try:
        yield commits
    finally:
        event.remove(engine, "before_cursor_execute", execute)
        event.remove(engine, "commit", commit)


async def test_waiting_calls_are_committed_together(book: Book, caller: Caller) -> None:
    """Calls that wait in the queue at the same time share one commit and one INSERT statement."""
    await post(book, caller, "acme", GRANT, 100)
    with counting_commits(book.database) as commits:
        posted = await asyncio.gather(*(post(book, caller, "acme", CHARGE, -1) for _ in range(64)))
    assert commits == [1]
    assert [row.sequence for row in posted] == list(range(2, 66)), "in the order of arrival"
    check_rows(await rows_of(book.database))
    assert await findings_of(book) == []


@pytest.mark.one_server
async def test_concurrent_callers_are_committed_together(server: Server, client: Client, database_url: str) -> None:
    """All calls that wait while the database is busy share one commit."""
    await client.create_account("acme", credit_limit="100")
    with counting_commits(server.book.database) as commits:
        async with held_writer(database_url):
            calls = [asyncio.create_task(client.post("acme", CHARGE, "-1"))]
            await poster_waits(server.book)
            calls += [asyncio.create_task(client.post("acme", CHARGE, "-1")) for _ in range(63)]
            await until(lambda: server.book.poster.queue_length == 63)
        await asyncio.gather(*calls)
    assert len(commits) == 2
    assert (await client.balance()).amount == "-64"


async def test_each_call_of_a_group_has_its_own_outcome(book: Book, caller: Caller) -> None:
    """Each call of a group succeeds or is refused independently, after the effects of earlier calls."""
    await post(book, caller, "acme", GRANT, 5)
    amounts = [-3, -3, -2, -1, 4, -5, -4]
    with counting_commits(book.database) as commits:
        outcomes = await asyncio.gather(
            *(post(book, caller, "acme", GRANT if amount > 0 else CHARGE, amount) for amount in amounts),
            return_exceptions=True,
        )
    assert len(commits) == 1
    results = [each.balance_after if isinstance(each, Transaction) else type(each) for each in outcomes]
    assert results == ["2", InsufficientCredits, "0", InsufficientCredits, "4", InsufficientCredits, "0"]
    check_rows(await rows_of(book.database))
    assert await findings_of(book) == []


async def test_calls_of_a_group_see_earlier_effects(book: Book, caller: Caller) -> None:
    """Charges, refunds, transfers and batches of one group see the effects of earlier calls."""
    await post(book, caller, "acme", GRANT, 10)
    charge = await post(book, caller, "acme", CHARGE, -6, is_usage=True)
    uid = UUID(charge.uid)

    def refund(credits_: int | None) -> Any:
        amount = None if credits_ is None else credits_ * CREDIT
        return book.transactions.refund(caller, "acme", uid, amount, Transaction(), NEW)

    def transfer(amount: int) -> Any:
        return book.transactions.transfer(caller, "acme", "other", amount * CREDIT, Transaction(), NEW)

    with counting_commits(book.database) as commits:
        outcomes: list[Any] = await asyncio.gather(
            transfer(5),
            refund(4),
            transfer(5),
            refund(3),
            refund(None),
            book.transactions.create_batch(caller, [new("other", CHARGE, -1), new("acme", CHARGE, -9)], NEW),
            book.transactions.create_batch(caller, [new("other", CHARGE, -1), new("acme", CHARGE, -1)], NEW),
            refund(None),
            post(book, caller, "acme", CHARGE, -1, is_usage=True),
            return_exceptions=True,
        )
    assert len(commits) == 1
    kinds = [type(each) if isinstance(each, Exception) else bytes for each in outcomes]
    # 10 - 6 leaves 4, too little to transfer 5; after the refund of 4 the balance is 8.
    assert kinds == [
        InsufficientCredits,
        bytes,
        bytes,
        RefundExceedsCharge,
        bytes,
        InsufficientCredits,
        bytes,
        RefundExceedsCharge,
        bytes,
    ]
    assert TransferCreditsResponse.FromString(outcomes[2]).outgoing.balance_after == "3"
    assert outcomes[8].balance_after == "3"
    balances = {row.account_number: row.balance_after // CREDIT for row in await rows_of(book.database)}
    assert list(balances.values()) == [3, 4]
    assert await findings_of(book) == []


@pytest.mark.parametrize("call_count", [600, 1200])
async def test_a_group_can_have_many_refunds(book: Book, caller: Caller, call_count: int) -> None:
    """Any number of waiting refunds is posted: a group never exceeds the parameter limit of a statement."""
    await post(book, caller, "acme", GRANT, 2000)
    charges = await asyncio.gather(*(post(book, caller, "acme", CHARGE, -1) for _ in range(call_count)))
    outcomes = await asyncio.gather(
        *(book.transactions.refund(caller, "acme", UUID(each.uid), None, Transaction(), NEW) for each in charges),
        return_exceptions=True,
    )
    failures = {repr(each) for each in outcomes if isinstance(each, BaseException)}
    assert not failures
    assert (await rows_of(book.database))[-1].balance_after == 2000 * CREDIT


async def poster_waits(book: Book) -> None:
    """Returns once the poster has emptied the queue and checked out a connection."""
    while not (poster_of(book)._queue.empty() and book.database.primary.writer.pool.checkedout()):  # type: ignore[attr-defined]
        await asyncio.sleep(0.001)


def poster_of(book: Book) -> Poster:
    """The poster of a book."""
    return book.transactions._poster


@pytest.mark.one_server
async def test_a_full_queue_refuses_calls(server: Server, client: Client, admin: Client, database_url: str) -> None:
    """A full queue refuses further calls with TOO_BUSY and a RetryInfo; the waiting calls are posted later."""
    await client.create_account("acme", credit_limit="10000")
    book = server.book
    tenant_number = await book.credentials.tenant_number("house")
    assert tenant_number is not None
    caller = Caller(tenant_number, "", "")
    await book.account_store.number(tenant_number, "acme")
    async with asyncio.timeout(60):
        async with held_writer(database_url):
            waiting = [asyncio.create_task(post(book, caller, "acme", CHARGE, -1))]
            await poster_waits(book)
            waiting += [asyncio.create_task(post(book, caller, "acme", CHARGE, -1)) for _ in range(QUEUE_LENGTH_MAX)]
            while not poster_of(book)._queue.full():
                await asyncio.sleep(0.001)
            for _ in range(3):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await client.post("acme", CHARGE, "-1", request_id="id")
                refusal = read_refusal(caught.value)
                assert refusal.verdict == ("RESOURCE_EXHAUSTED", "TOO_BUSY")
                assert refusal.retry_delay == Duration(seconds=1)
                # REST gets the delay from this header.
                assert dict(caught.value.trailing_metadata())["retry-after"] == "1"
            assert not any(task.done() for task in waiting)
        posted = await asyncio.gather(*waiting)
    assert [row.sequence for row in posted] == list(range(1, QUEUE_LENGTH_MAX + 2))
    assert (await client.post("acme", CHARGE, "-1", request_id="id")).sequence == QUEUE_LENGTH_MAX + 2
    assert await admin.verify() == []


@pytest.mark.one_server
async def test_nothing_is_answered_before_the_commit(server: Server, client: Client, database_url: str) -> None:
    """No caller is answered while the commit is blocked; afterwards all are."""
    await client.create_account("acme")
    await client.post("acme", GRANT, "1")
    async with asyncio.timeout(30):
        async with held_writer(database_url):
            calls = [asyncio.create_task(client.post("acme", GRANT, "1"))]
            await poster_waits(server.book)
            calls += [asyncio.create_task(client.post("acme", GRANT, "1")) for _ in range(8)]
            while poster_of(server.book)._queue.qsize() < 8:
                await asyncio.sleep(0.001)
            assert (await client.balance()).amount == "1"
            assert not any(call.done() for call in calls)
        assert len(await asyncio.gather(*calls)) == 9


async def test_an_answered_transaction_is_visible(client: Client, database_url: str) -> None:
    """Once a call is answered, another connection sees its transaction and its account's new state."""
    await client.create_account("acme")
    other = Database(database_url)

    async def post_and_read() -> None:
        posted = await client.post("acme", GRANT, "1")
        async with other.primary.snapshot() as connection:
            found = await connection.scalar(
                select(transactions.c.body).where(transactions.c.sequence == posted.sequence)
            )
            sequence = await connection.scalar(select(account_states.c.sequence))
        assert found is not None
        assert Transaction.FromString(bytes(found)) == posted
        assert sequence is not None
        assert sequence >= posted.sequence

    try:
        await asyncio.gather(*(post_and_read() for _ in range(48)))
    finally:
        await other.close()


async def test_a_cancelled_call_is_posted(book: Book, caller: Caller) -> None:
    """A waiting call whose caller is cancelled is still posted, and other calls are unaffected."""
    await post(book, caller, "acme", GRANT, 10)
    calls = [asyncio.create_task(post(book, caller, "acme", CHARGE, -1)) for _ in range(4)]
    while poster_of(book)._queue.qsize() < 4:
        await asyncio.sleep(0)
    calls[1].cancel()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(outcomes[1], asyncio.CancelledError)
    assert [each.balance_after for each in outcomes if isinstance(each, Transaction)] == ["9", "7", "6"]
    async with book.database.primary.snapshot() as connection:
        assert await connection.scalar(select(func.count()).select_from(transactions)) == 5


async def test_two_posters_lose_nothing(book: Book, caller: Caller, clock: Clock, database_url: str) -> None:
    """Two processes that post to the same accounts concurrently keep sequences gapless and books correct."""
    await post(book, caller, "acme", GRANT, 1000)
    await post(book, caller, "other", GRANT, 1000)
    charges = [await post(book, caller, "acme", CHARGE, -10) for _ in range(4)]
    async with open_book(database_url, clock, Random(2).randbytes) as second:

        async def work(side: Book, worker: int) -> list[int]:
            moved = [0, 0]
            for step in range(6):
                here, there = (0, 1) if (worker + step) % 2 else (1, 0)
                names = ("acme", "other")
                try:
                    match (worker + step) % 4:
                        case 0:
                            await post(side, caller, names[here], GRANT, 3)
                            moved[here] += 3
                        case 1:
                            await post(side, caller, names[here], CHARGE, -2, is_usage=True)
                            moved[here] -= 2
                        case 2:
                            await side.transactions.transfer(
                                caller, names[here], names[there], 5 * CREDIT, Transaction(), NEW
                            )
                            moved[here] -= 5
                            moved[there] += 5
                        case _:
                            uid = UUID(charges[step % 4].uid)
                            await side.transactions.refund(caller, "acme", uid, 4 * CREDIT, Transaction(), NEW)
                            moved[0] += 4
                except RefundExceedsCharge:
                    continue
            return moved

        moved = await asyncio.gather(*(work(side, worker) for worker in range(12) for side in (book, second)))
        rows = await rows_of(second.database)
        assert await findings_of(second) == []
    check_rows(rows)
    balances = list({row.account_number: row.balance_after // CREDIT for row in rows}.values())
    assert balances == [960 + sum(each[0] for each in moved), 1000 + sum(each[1] for each in moved)]
    assert await findings_of(book) == []


async def test_a_request_to_two_posters_is_posted_once(
    book: Book, caller: Caller, clock: Clock, database_url: str
) -> None:
    """A request that reaches two processes at once is posted once, and both give the same answer."""
    request = Request("id", b"f" * 32)
    one = NewTransaction("acme", Draft(GRANT, "test", CREDIT), Transaction(), request)
    async with open_book(database_url, clock) as second:
        answers = await asyncio.gather(
            *(side.transactions.create(caller, one) for _ in range(8) for side in (book, second))
        )
    assert len(set(answers)) == 1
    assert len(await rows_of(book.database)) == 1


async def test_two_sweepers_post_each_expiration_once(
    book: Book, caller: Caller, clock: Clock, database_url: str
) -> None:
    """Two concurrently sweeping processes post each expiration once."""
    draft = Draft(GRANT, "test", CREDIT, time_to_live=CREDIT)
    await book.transactions.create_batch(
        caller, [NewTransaction("acme", draft, Transaction(), NEW) for _ in range(20)], NEW
    )
    clock.advance(1)
    async with open_book(database_url, clock) as second:
        swept = await asyncio.gather(*(side.expirations.sweep() for side in (book, second)))
    assert sum(swept) == 20
    rows = await rows_of(book.database)
    check_rows(rows)
    assert (len(rows), rows[-1].balance_after) == (40, 0)
    assert await findings_of(book) == []


@only_sqlite
async def test_a_failing_call_does_not_affect_others(book: Book, caller: Caller) -> None:
    """A call that fails by a fault of the server gets INTERNAL; the others of its group are posted."""
    # Without a category, which servicers refuse.
    broken = NewTransaction("acme", Draft(GRANT, None, CREDIT), Transaction(), NEW)  # type: ignore[arg-type]
    outcomes = await asyncio.gather(
        post(book, caller, "acme", GRANT, 1),
        book.transactions.create(caller, broken),
        post(book, caller, "acme", GRANT, 2),
        return_exceptions=True,
    )
    assert isinstance(outcomes[1], DaybookError)
    assert outcomes[1].reason == "INTERNAL_FAILURE"
    assert [each.balance_after for each in outcomes if isinstance(each, Transaction)] == ["1", "3"]
    assert await findings_of(book) == []


@pytest.mark.one_server
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_accounts_are_locked_in_order(book: Book, caller: Caller, database_url: str) -> None:
    """A transaction that locks several accounts waits at the lowest locked one, without locking higher ones yet."""
    for index in range(6):
        record = AccountRecord(f"a{index}", Account.SPACE, "", 0, b"")
        await book.accounts.create(caller, record, NEW, hour_anchor=None)
    number, observer = account_states.c.account_number, Database(database_url)
    free = select(number).order_by(number).with_for_update(skip_locked=True)
    waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")

    async def read(statement: Any) -> list[int]:
        async with observer.primary.snapshot() as connection:
            return list((await connection.execute(statement)).scalars())

    all_numbers = await read(free)
    assert len(all_numbers) == 8
    async with book.database.primary.snapshot() as holder, book.database.primary.snapshot() as locker:
        await holder.run_sync(book.database.primary.lock_accounts, [all_numbers[3]])
        locking = asyncio.create_task(locker.run_sync(book.database.primary.lock_accounts, all_numbers[::-1]))
        while await read(waiting) == [0]:
            assert not locking.done()
        assert await read(free) == all_numbers[4:]
        await holder.rollback()
        await locking
        assert await read(free) == []
        # It keeps the locks until its transaction ends.
        await locker.rollback()
        assert await read(free) == all_numbers
    await observer.close()


LOSE_A_NODE = (
    """
CREATE FUNCTION lose_a_node() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.account_number = {number} THEN
        RAISE EXCEPTION 'connection to the remote node failed' USING ERRCODE = '08006';
    END IF;
    RETURN NEW;
END $$
""",
    "CREATE TRIGGER lose_a_node BEFORE INSERT ON transactions FOR EACH ROW EXECUTE FUNCTION lose_a_node()",
)


@pytest.mark.one_server
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_a_lost_node_affects_only_its_accounts(book: Book, caller: Caller) -> None:
    """Calls to accounts on a node that is down get UNAVAILABLE; the others of their group are posted.

    The error is that of Citus 13.2 while a worker is down.
    """
    lost = await book.account_store.number(caller.tenant_number, "acme")
    async with writing(book.database) as connection:
        for statement in LOSE_A_NODE:
            await connection.execute(text(statement.format(number=lost)))
    async with asyncio.timeout(60):
        async with database_occupied(book):
            ids = ["other", "acme", "other", "acme", "other"]
            calls = [asyncio.create_task(post(book, caller, each, GRANT, 1)) for each in ids]
            await poster_waits(book)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(each) for each in outcomes] == [
        Transaction if account_id == "other" else ServiceUnavailable for account_id in ids
    ]
    assert [row.account_number != lost for row in await rows_of(book.database)] == [True] * 3


@only_sqlite
@pytest.mark.parametrize("error", [sqlite3.OperationalError, sqlite3.InternalError])
async def test_a_group_with_an_unknown_outcome_is_not_retried(
    book: Book, caller: Caller, monkeypatch: pytest.MonkeyPatch, error: type[sqlite3.Error]
) -> None:
    """If the answer to a commit is lost, its calls are not posted again and get UNAVAILABLE."""
    dialect: Any = book.database.primary.writer.dialect
    commit = dialect.do_commit

    def commit_and_lose_the_answer(connection: object) -> None:
        commit(connection)
        raise error("lost")

    with monkeypatch.context() as patch:
        patch.setattr(dialect, "do_commit", commit_and_lose_the_answer)
        outcomes = await asyncio.gather(
            *(post(book, caller, "acme", GRANT, 1) for _ in range(3)), return_exceptions=True
        )
    assert [type(each) for each in outcomes] == [ServiceUnavailable] * 3
    assert [row.sequence for row in await rows_of(book.database)] == [1, 2, 3]
