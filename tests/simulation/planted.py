"""Faults planted in the server, to prove that the simulation finds such faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from sqlalchemy import false, update

from server.ledger import posting
from server.ledger.errors import DaybookError, InsufficientCredits, ServiceUnavailable
from server.ledger.idempotency import Answer, Request
from server.ledger.instants import EARLIEST, SECOND, Instant
from server.ledger.paging import EVERYTHING, Order, Page, TransactionKey
from server.ledger.posting import AccountState, Draft
from server.posting.commands import BatchCreate, Expire, Transfer
from server.posting.unit import Attempt
from server.store import accounts, units
from server.store.answers import load_answer, save_answer
from server.store.database import Database
from server.store.first_pages import FirstPages
from server.store.list_statements import parameters_of
from server.store.transactions import TransactionStore
from server.transport import auth
from server.transport.page_tokens import Listing
from server.transport.token_keys import TokenKeys
from tests.simulation.disk import Disk


def _lost_answer_posted_again() -> AbstractContextManager[object]:
    """The server repeats a database transaction whose outcome is unknown, as if it had failed."""
    transact = Database.transact

    async def fault(database: Database, work: Any) -> Any:
        try:
            return await transact(database, work)
        except ServiceUnavailable:
            return await transact(database, work)

    return patch.object(Database, "transact", fault)


def _answer_before_commit() -> AbstractContextManager[object]:
    """A call is answered although its commit failed."""
    transact = Database.transact

    async def fault(database: Database, work: Any) -> Any:
        results = []

        def noted(connection: Any) -> Any:
            results.append(work(connection))
            return results[-1]

        try:
            return await transact(database, noted)
        except ServiceUnavailable:
            if not results:
                raise
            return results[-1]

    return patch.object(Database, "transact", fault)


def _answer_forgotten() -> AbstractContextManager[object]:
    """The server looks for an earlier answer in the group that it posts only, not in the database."""

    def fault(attempt: Attempt, account_number: int, request: Request) -> bytes | None:
        found = attempt._unit.changes.answers.get((account_number, request.request_id))
        return None if found is None else found.to(request)

    return patch.object(Attempt, "answer", fault)


def _other_body_replayed() -> AbstractContextManager[object]:
    """A request_id with another body gets the first answer."""
    return patch.object(Answer, "to", lambda answer, _: answer.response)


def _refusal_leaves_trace() -> AbstractContextManager[object]:
    """The items of a refused batch that precede the refused one are posted."""
    run = BatchCreate.run

    def fault(command: BatchCreate, attempt: Attempt, now: Instant) -> bytes:
        try:
            return run(command, attempt, now)
        except DaybookError:
            attempt.accept()
            raise

    return patch.object(BatchCreate, "run", fault)


def _expired_lot_spent() -> AbstractContextManager[object]:
    """A lot expires a second late."""
    expire_due = posting.expire_due
    return patch.object(posting, "expire_due", lambda state, now: expire_due(state, now - SECOND))


def _lot_expired_early() -> AbstractContextManager[object]:
    """A sweep expires lots two seconds early."""

    def fault(command: Expire, attempt: Attempt, now: Instant) -> int:
        sequence = attempt.sequence(command.account_number)
        return attempt.expire(command.account_number, now + 2 * SECOND).sequence - sequence

    return patch.object(Expire, "run", fault)


@contextmanager
def _unlocked_account() -> Iterator[None]:
    """Two servers post to one account at the same time, and the later write replaces the earlier one.

    A missing lock alone is harmless: the primary key of transactions makes the later one a conflict, and its retry
    is right.
    """
    write = units._write

    def fault(connection: Any, table: Any, rows: Any, **_: bool) -> None:
        write(connection, table, rows, is_update=True)

    with patch.object(Disk, "lock_accounts", lambda *_: None), patch.object(units, "_write", fault):
        yield


def _create_time_decreases() -> AbstractContextManager[object]:
    """A transaction has the time of the clock, also if the account's newest transaction is ahead of it."""
    post = posting.post

    def fault(state: AccountState, draft: Draft, now: Instant) -> Any:
        return post(state._replace(last_create_time=EARLIEST), draft, now)

    return patch.object(posting, "post", fault)


def _refunds_uncounted() -> AbstractContextManager[object]:
    """Refunds of a charge are not added up."""
    return patch.object(Attempt, "add_refund", lambda *_: None)


def _limit_ignored() -> AbstractContextManager[object]:
    """A charge may exceed the credit limit by one credit."""
    post = posting.post

    def fault(state: AccountState, draft: Draft, now: Instant) -> Any:
        return post(state._replace(credit_limit=state.credit_limit + SECOND), draft, now)

    return patch.object(posting, "post", fault)


def _update_not_stored() -> AbstractContextManager[object]:
    """A change of an account is answered, and not stored."""
    return patch.object(accounts, "update", lambda table: update(table).where(false()))


@contextmanager
def _update_applied_again() -> Iterator[None]:
    """A repeated change of an account replaces later changes."""

    def fault(connection: Any, account_number: int, request: Request, response: bytes) -> None:
        if load_answer(connection, account_number, request) is None:
            save_answer(connection, account_number, request, response)

    with patch.object(accounts, "load_answer", lambda *_: None), patch.object(accounts, "save_answer", fault):
        yield


def _older_token_keys_forgotten() -> AbstractContextManager[object]:
    """Only the newest key opens page tokens."""
    return patch.object(TokenKeys, "opening", property(lambda keys: [cipher for cipher, _ in keys._keys[:1]]))


def _refuse(*_: object) -> bytes:
    raise InsufficientCredits("accounts/cash", available_amount="0", amount="-1")


def _batches_refused() -> AbstractContextManager[object]:
    """Every batch is refused."""
    return patch.object(BatchCreate, "run", _refuse)


def _transfers_refused() -> AbstractContextManager[object]:
    """Every transfer is refused."""
    return patch.object(Transfer, "run", _refuse)


def _token_of_another_list() -> AbstractContextManager[object]:
    """A page token opens any list of its method and tenant."""
    of = Listing.of
    return patch.object(Listing, "of", lambda *arguments: of(*arguments)._replace(arguments_hash=b""))


def _equal_rows_skipped() -> AbstractContextManager[object]:
    """A page begins after the time or amount of the last row, and skips other rows that have the same."""

    def fault(query: Any) -> Any:
        if query.after is not None:
            edge = 0 if query.order.descending else 2**62
            query = replace(query, after=TransactionKey(query.after.position, edge, edge))
        return parameters_of(query)

    return patch("server.store.transactions.parameters_of", fault)


def _row_on_two_pages() -> AbstractContextManager[object]:
    """The last row of a page is the first row of the next page too."""
    of = Page.of

    def fault(rows: Any, limit: int, key: Callable[[Any], Any]) -> Any:
        page = of(rows, limit, key=key)
        if page.next_key is None or len(page.rows) < 2:
            return page
        return Page(page.rows, key(page.rows[-2]))

    return patch.object(Page, "of", fault)


def _stale_first_page() -> AbstractContextManager[object]:
    """The cached first page of a list stays after newer transactions."""

    async def fault(*_: object) -> bytes:
        return b"the same head"

    return patch.object(FirstPages, "_read_one_head", fault)


def _filter_ignored() -> AbstractContextManager[object]:
    """A native list has also rows that its filter excludes. A facade could not show them."""
    read = TransactionStore.list

    async def fault(store: TransactionStore, query: Any) -> Any:
        return await read(store, query if query.filter.kind_categories else replace(query, filter=EVERYTHING))

    return patch.object(TransactionStore, "list", fault)


def _offset_skips_row() -> AbstractContextManager[object]:
    """Each page of a list by offset, except the first one, begins a row late."""
    read = TransactionStore.slice

    async def fault(store: TransactionStore, account_number: int, offset: int, limit: int) -> Any:
        return await read(store, account_number, offset + min(offset, 1), limit)

    return patch.object(TransactionStore, "slice", fault)


def _export_cut_short() -> AbstractContextManager[object]:
    """An export ends after its first read."""
    return patch.object(Order, "reaches", lambda *_: True)


def _revoked_key_works() -> AbstractContextManager[object]:
    """A server keeps a key in its cache for an hour."""
    return patch.object(auth, "KEY_CACHED_SECONDS_MAX", 3600.0)


PLANTED: Mapping[str, Callable[[], AbstractContextManager[object]]] = {
    "lost-answer-posted-again": _lost_answer_posted_again,
    "answer-before-commit": _answer_before_commit,
    "answer-forgotten": _answer_forgotten,
    "other-body-replayed": _other_body_replayed,
    "refusal-leaves-trace": _refusal_leaves_trace,
    "expired-lot-spent": _expired_lot_spent,
    "lot-expired-early": _lot_expired_early,
    "unlocked-account": _unlocked_account,
    "create-time-decreases": _create_time_decreases,
    "refunds-uncounted": _refunds_uncounted,
    "limit-ignored": _limit_ignored,
    "batches-refused": _batches_refused,
    "transfers-refused": _transfers_refused,
    "update-not-stored": _update_not_stored,
    "update-applied-again": _update_applied_again,
    "older-token-keys-forgotten": _older_token_keys_forgotten,
    "token-of-another-list": _token_of_another_list,
    "equal-rows-skipped": _equal_rows_skipped,
    "row-on-two-pages": _row_on_two_pages,
    "stale-first-page": _stale_first_page,
    "filter-ignored": _filter_ignored,
    "offset-skips-row": _offset_skips_row,
    "export-cut-short": _export_cut_short,
    "revoked-key-works": _revoked_key_works,
}
"""Each fault, by its name."""
