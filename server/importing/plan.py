"""Plans an import: what is already in the ledger, which balances to bring forward, and what will be posted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal

from daybook_client import (
    AccountKind,
    Daybook,
    NewTransaction,
    PastTransaction,
    TransactionKind,
    TransactionState,
)
from daybook_client.errors import AccountNotFound
from server.importing.found import Difference, Kept, NewAccount, Options, Row, ShownBalance, shown
from server.importing.gathering import Gathered

OPENING = "opening_balance"
"""The category of a grant before the first row, of credits whose origin the source doesn't show."""
CORRECTION = "balance_correction"
"""The category of an adjustment after the last row, of credits whose use the source doesn't show."""
ZERO = Decimal(0)
HOUR = timedelta(hours=1)


class ImportRefused(ValueError):
    """The ledger refuses a row."""


@dataclass(slots=True)
class Pool:
    """The expiring or the permanent credits of an account during the rows that are new to the ledger."""

    held: Decimal = ZERO
    """The credits in the ledger before these rows."""
    total: Decimal = ZERO
    lowest: Decimal = ZERO
    """The lowest sum of the rows up to any of them; at most 0."""
    shown: Decimal | None = None
    """The credits that the source shows after these rows."""

    def add(self, amount: Decimal) -> None:
        """Adds a row."""
        self.total += amount
        self.lowest = min(self.lowest, self.total)

    def settle(self, credit_limit: Decimal = ZERO) -> tuple[Decimal, Decimal]:
        """The opening balance, at least 0, and the correction, at most 0.

        With them the rows never take more than there is, and the balance at the end is the one that the source shows.
        """
        needed = max(ZERO, -(self.held + self.lowest) - credit_limit)
        if self.shown is None:
            return needed, ZERO
        missing = self.shown - self.held - self.total
        return (missing, ZERO) if missing >= needed else (needed, missing - needed)


@dataclass(slots=True)
class AccountPlan:
    """The import of one account."""

    name: str
    """`accounts/{account}`."""
    new: NewAccount | None
    """The account to create, unless `exists`."""
    exists: bool = False
    credit_limit: Decimal = ZERO
    newest_time: datetime | None = None
    """The create_time of the newest transaction in the ledger."""
    newest_ids: frozenset[str] = frozenset()
    """The request_ids of the transactions with that time."""
    permanent: Pool = field(default_factory=Pool)
    expiring: Pool = field(default_factory=Pool)
    shows_parts: bool = False
    """Whether the source shows the expiring part of amounts."""
    row_count: int = 0
    new_count: int = 0
    """The number of rows that are not in the ledger yet."""
    first: Row | None = None
    first_new: Row | None = None
    last: Row | None = None

    def is_new(self, past: PastTransaction) -> bool:
        """Whether the ledger lacks the row. The ledger itself checks rows before its newest transaction."""
        if self.newest_time is None or past.create_time > self.newest_time:
            return True
        return past.create_time == self.newest_time and past.request_id not in self.newest_ids

    def add(self, row: Row) -> None:
        """Adds a row, in the order of time."""
        self.row_count += 1
        self.first = self.first or row
        self.last = row
        if not self.is_new(row.past):
            return
        self.new_count += 1
        self.first_new = self.first_new or row
        self.shows_parts = self.shows_parts or row.expiring_amount is not None
        if row.past.transaction.state == TransactionState.SUCCEEDED:
            expiring = row.expiring_amount or ZERO
            self.expiring.add(expiring)
            self.permanent.add(Decimal(row.past.transaction.amount) - expiring)

    def use(self, balance: ShownBalance | None) -> None:
        """Takes the balance that the source shows, unless the ledger has newer transactions than the source."""
        if not self.shows_parts:
            self.permanent.held += self.expiring.held
            self.expiring.held = ZERO
        if balance is None:
            return
        if self.newest_time is not None and (self.last is None or self.newest_time > self.last.past.create_time):
            return
        if self.shows_parts:
            self.expiring.shown, self.permanent.shown = balance.expiring_amount, balance.permanent_amount
        else:
            self.permanent.shown = balance.expiring_amount + balance.permanent_amount

    def openings(self, vendor: str, expire_time: datetime) -> Iterator[PastTransaction]:
        """The grants before the first new row."""
        for pool, expiry, suffix in ((self.expiring, expire_time, "-expiring"), (self.permanent, None, "")):
            opening, _ = pool.settle(ZERO if expiry else self.credit_limit)
            if opening and self.first_new is not None:
                yield self._past(
                    NewTransaction(TransactionKind.GRANT, OPENING, opening, expire_time=expiry),
                    self.first_new.past.create_time,
                    f"{vendor}:opening{suffix}:{self.first_new.past.request_id}"[:128],
                )

    def missing(self) -> Decimal:
        """The credits that the source shows and the import does not post, because there is no new row."""
        return ZERO if self.first_new else self.permanent.settle(self.credit_limit)[0] + self.expiring.settle()[0]

    def corrections(self, vendor: str) -> Iterator[PastTransaction]:
        """The adjustments after the last row."""
        for pool, suffix in ((self.expiring, "-expiring"), (self.permanent, "")):
            _, correction = pool.settle(ZERO if suffix else self.credit_limit)
            if correction and self.last is not None:
                yield self._past(
                    NewTransaction(TransactionKind.ADJUSTMENT, CORRECTION, correction),
                    self.last.past.create_time,
                    f"{vendor}:correction{suffix}:{self.last.past.request_id}"[:128],
                )

    def _past(self, transaction: NewTransaction, time: datetime, request_id: str) -> PastTransaction:
        return PastTransaction(self.name, transaction, time, request_id)


@dataclass(slots=True)
class Plan:
    """An import that is ready to be posted."""

    vendor: str
    expire_time: datetime
    accounts: dict[str, AccountPlan]
    """By name, in the order of their first rows."""
    differences: Kept

    @property
    def row_count(self) -> int:
        """The number of rows, with those that are already in the ledger."""
        return sum(each.row_count for each in self.accounts.values())

    def items(self, rows: Iterable[Row]) -> Iterator[PastTransaction]:
        """The items to post: rows, opening balances and corrections. `rows` are those that were planned."""
        left = {name: account.row_count for name, account in self.accounts.items()}
        held = {name: account.expiring.held for name, account in self.accounts.items()}
        for row in rows:
            name = row.past.account
            account = self.accounts[name]
            if account.first_new is not None and row.past.request_id == account.first_new.past.request_id:
                for opening in account.openings(self.vendor, self.expire_time):
                    if opening.transaction.expire_time is not None:
                        held[name] += Decimal(opening.transaction.amount)
                    yield opening
            yield row.past
            if account.shows_parts and account.is_new(row.past):
                held[name] = self._compare_parts(row, held[name])
            left[name] -= 1
            if not left[name]:
                yield from account.corrections(self.vendor)

    def _compare_parts(self, row: Row, held: Decimal) -> Decimal:
        """The expiring credits after a row. Notes a row that took others than the ledger takes."""
        transaction = row.past.transaction
        if transaction.state != TransactionState.SUCCEEDED:
            return held
        amount = Decimal(transaction.amount)
        expected = row.expiring_amount or ZERO
        moved = expected if amount > 0 else -min(held, -amount)
        if moved != expected:
            reason = f"shows {shown(moved)} expiring credits instead of {shown(expected)}"
            self.differences.add(Difference(row.place, f"{reason}: Daybook spends expiring credits first"))
        return held + moved


def make_plan(
    vendor: str,
    rows: Iterable[Row],
    gathered: Gathered,
    client: Daybook,
    options: Options,
) -> Plan:
    """Reads all rows once, and the state of each of their accounts. Changes nothing.

    Raises ImportRefused if the history of an account begins before transactions that are not of this source.
    """
    accounts: dict[str, AccountPlan] = {}
    for row in rows:
        name = row.past.account
        if name not in accounts:
            id_ = name.removeprefix("accounts/")
            new = gathered.accounts.get(id_, NewAccount(id=id_, kind=options.account_kind))
            accounts[name] = _account_plan(name, new, client, gathered.differences)
        accounts[name].add(row)
    for id_, new in gathered.accounts.items():
        if f"accounts/{id_}" not in accounts:
            accounts[f"accounts/{id_}"] = _account_plan(f"accounts/{id_}", new, client, gathered.differences)
    for account in accounts.values():
        account.use(gathered.balances.get(account.name.removeprefix("accounts/")))
        if account.first is not None:
            _require_beginning(account.first.past, account, client)
        if missing := account.missing():
            reason = f"has {shown(missing)} credits more, and no new row from which to bring them forward: grant them"
            gathered.differences.add(Difference(account.name, reason))
    return Plan(vendor, options.expire_time, accounts, gathered.differences)


def _require_beginning(first: PastTransaction, account: AccountPlan, client: Daybook) -> None:
    """Raises ImportRefused if the ledger lacks the first row of an account, but has transactions after it."""
    if account.is_new(first):
        return
    time = first.create_time.isoformat()
    for each in client.list_transactions(account.name, filter=f'create_time >= "{time}"', order_by="create_time"):
        if each.request_id == first.request_id:
            return
        if each.create_time != first.create_time:
            break
    raise ImportRefused(
        f"{first.request_id} of {account.name} at {time} is not in the ledger, and the account's newest transaction "
        f"is of {account.newest_time:%Y-%m-%dT%H:%M:%SZ}: history can only follow it; nothing is imported"
    )


def _account_plan(name: str, new: NewAccount, client: Daybook, differences: Kept) -> AccountPlan:
    try:
        account = client.get_account(name)
    except AccountNotFound:
        return AccountPlan(name, new)
    if new.kind not in {account.kind, AccountKind.OTHER}:
        differences.add(Difference(name, f"is of kind {account.kind}, not {new.kind}"))
    if new.hour_anchor_time is not None and (account.hour_anchor_time - new.hour_anchor_time) % HOUR:
        differences.add(Difference(name, f"has hours that begin at {account.hour_anchor_time:%M:%S}"))
    balance = client.get_balance(name)
    plan = AccountPlan(name, new, exists=True, credit_limit=account.credit_limit)
    plan.permanent.held, plan.expiring.held = balance.permanent_amount, balance.expiring_amount
    newest: set[str] = set()
    for transaction in client.list_transactions(name):
        if plan.newest_time is None:
            plan.newest_time = transaction.create_time
        if transaction.create_time != plan.newest_time:
            break
        newest.add(transaction.request_id)
    plan.newest_ids = frozenset(newest)
    return plan
