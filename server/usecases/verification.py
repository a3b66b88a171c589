"""The use cases of audits."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TypeVar

from server.ledger.access import Caller
from server.ledger.audit import AccountAudit, Finding, refund_fingerprint
from server.ledger.errors import TooBusy
from server.store.accounts import AccountStore
from server.store.books import AccountKey, Books, BookStore
from server.store.tables import LABELS

IN_FLIGHT_MAX = 2
"""The largest number of concurrent verifications by callers: each keeps a database connection checked out."""

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a verification."""

    accounts: int = 0
    transactions: int = 0
    findings: int = 0
    is_done: bool = False


class Verification:
    """Recomputes books and yields each divergence."""

    def __init__(self, accounts: AccountStore, store: BookStore) -> None:
        self._accounts = accounts
        self._store = store
        self._in_flight = 0

    async def verify(self, caller: Caller, account_id: str | None) -> AsyncGenerator[Finding | Progress, None]:
        """Verifies an account of the caller's tenant, or all of them if it is None.

        Raises AccountNotFound, and TooBusy if IN_FLIGHT_MAX verifications run.
        """
        if account_id is None:
            caller.require_tenant()
            verifying = self.verify_all(caller.tenant_number)
        else:
            caller.require_account(account_id)
            number = await self._accounts.number(caller.tenant_number, account_id)
            verifying = self._verify(AccountKey(number, account_id, caller.tenant_number), Progress())
        if self._in_flight >= IN_FLIGHT_MAX:
            raise TooBusy
        self._in_flight += 1
        try:
            async with aclosing(verifying) as events:
                async for event in events:
                    yield event
        finally:
            self._in_flight -= 1

    async def verify_all(self, tenant_number: int | None) -> AsyncGenerator[Finding | Progress, None]:
        """Verifies a tenant, or all tenants for None. The last event is a Progress that is done."""
        progress = Progress()
        last_number = 0
        async with aclosing(self._store.accounts(tenant_number)) as keys:
            async for key in keys:
                if tenant_number is None:
                    async with aclosing(self._orphans(last_number, key.number)) as findings:
                        async for finding in findings:
                            progress = replace(progress, findings=progress.findings + 1)
                            yield finding
                last_number = key.number
                async with aclosing(self._verify(key, progress)) as events:
                    async for event in events:
                        if isinstance(event, Progress):
                            progress = event
                            if event.is_done:
                                continue
                        yield event
        if tenant_number is None:
            async with aclosing(self._orphans(last_number, None)) as findings:
                async for finding in findings:
                    progress = replace(progress, findings=progress.findings + 1)
                    yield finding
        yield replace(progress, is_done=True)

    async def _orphans(self, after: int, before: int | None) -> AsyncGenerator[Finding, None]:
        """Orphaned rows between two account numbers: their account is missing.

        Account numbers have few gaps, so this rarely reads the database.
        """
        while before is None or after + 1 < before:
            orphan = await self._store.orphan(after, before)
            if orphan is None:
                return
            yield Finding(str(orphan), 0, "account", "a row of accounts", "none")
            after = orphan

    async def counts(self) -> tuple[int, int]:
        """The numbers of accounts and transactions of all tenants."""
        return await self._store.counts(None)

    async def _verify(self, key: AccountKey, before: Progress) -> AsyncGenerator[Finding | Progress, None]:
        transactions, findings = before.transactions, before.findings
        async with self._store.open(key.number) as books:
            stored = await books.state()
            if stored is None:
                yield Finding(key.id, 0, "state", "a row of account_states", "none")
                yield Progress(before.accounts + 1, transactions, findings + 1, is_done=True)
                return
            audit = AccountAudit(key.id, key.tenant_number, stored.state.hour_anchor, LABELS)
            async with aclosing(books.entries()) as parts:
                async for entries in parts:
                    for entry in entries:
                        audit.read(entry)
                    await _compare(audit, books)
                    for finding in _drained(audit.findings):
                        findings += 1
                        yield finding
                    transactions += len(entries)
                    yield Progress(before.accounts, transactions, findings)
            refunded = 0
            async with aclosing(books.refund_totals()) as parts_of_refunds:
                async for totals in parts_of_refunds:
                    for total in totals:
                        refunded += refund_fingerprint(total.uid, total.amount)
                        audit.check_refund(total.sequence, total.last_create_time, is_dated=total.is_dated_by_a_refund)
            open_lots = await books.open_lots()
            audit.finish(stored.state, stored.last_hash, open_lots, refunded, *await books.totals())
            await _compare(audit, books)
            for finding in _drained(audit.findings):
                findings += 1
                yield finding
        yield Progress(before.accounts + 1, transactions, findings, is_done=True)


async def _compare(audit: AccountAudit, books: Books) -> None:
    """Compares the lots, windows and answers that the audit has computed with the stored ones."""
    if opened := _drained(audit.opened_lots):
        audit.check_lots(opened, await books.lots(opened[0].number, opened[-1].number))
    if closed := _drained(audit.closed_windows):
        audit.check_windows(closed, await books.windows(closed[0].number, closed[-1].number))
    if posted := _drained(audit.posted):
        audit.check_answers(posted, await books.answers([each.request_id for each in posted]))


def _drained(items: list[Item]) -> list[Item]:
    taken = items[:]
    items.clear()
    return taken
