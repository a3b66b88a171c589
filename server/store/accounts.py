"""Accounts in the database."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from sqlalchemy import BindParameter, Connection, Dialect, Select, bindparam, insert, not_, select, update

from server.ledger.accounts import AccountRecord
from server.ledger.errors import AccountExists, AccountNotFound
from server.ledger.idempotency import Request
from server.ledger.instants import Instant
from server.ledger.lots import Lot
from server.ledger.names import account_name, is_account_id
from server.ledger.posting import AccountState
from server.store.answers import load_answer, save_answer
from server.store.database import Database
from server.store.query import Query
from server.store.states import (
    LOT_COLUMNS,
    QUERIES_CACHED_MAX,
    account_parameters,
    holdings_query,
    to_holding,
    to_lot,
)
from server.store.tables import account_states, accounts, lots

ACCOUNT_NUMBERS_CACHED_MAX = 65_536
"""How many numbers are kept. Beyond it the one goes that was looked up first."""
HOLDINGS_CACHED_MAX = 1024
"""How many accounts are kept with what they hold. Beyond it the one goes that was read first."""
HOLDING_PROFILE_BYTES_MAX = 4096
"""Accounts with a larger profile are read each time, so that those that are kept take at most 8 MiB."""


_COLUMNS = (
    accounts.c.id,
    accounts.c.kind,
    accounts.c.display_name,
    accounts.c.credit_limit,
    accounts.c.profile,
    accounts.c.hour_anchor,
    accounts.c.create_time,
    accounts.c.update_time,
    accounts.c.number,
)
_NUMBER = len(_COLUMNS) - 1  # Which of them is the account's number.


class StoredAccount(NamedTuple):
    """An account, and what it held at an instant."""

    record: AccountRecord
    state: AccountState
    """Without what had expired. No lots are known."""
    head: bytes
    """The hash of its newest transaction, which stands for all of them; empty before the first."""
    read_time: Instant
    next_expire_time: Instant
    """Until then the account holds this, unless something is posted."""


class AccountStore:
    """Reads and writes accounts. A tenant's number comes first in every call."""

    def __init__(self, database: Database) -> None:
        self._database = database
        # An account's number never changes and accounts are never deleted.
        self._numbers: dict[tuple[int, str], int] = {}
        # With the row that they were read with.
        self._holdings: dict[int, tuple[tuple[object, ...], StoredAccount]] = {}

    async def number(self, tenant_number: int, account_id: str) -> int:
        """The number of an account. Raises AccountNotFound, also for an id that no account may have."""
        number = self._numbers.get((tenant_number, account_id))
        if number is None:
            if not is_account_id(account_id):
                # A facade takes its account's id as it comes.
                raise AccountNotFound(account_name(account_id))
            number = (await self.get(tenant_number, account_id)).number
            self._remember(tenant_number, account_id, number)
        return number

    def _remember(self, tenant_number: int, account_id: str, number: int) -> None:
        if len(self._numbers) >= ACCOUNT_NUMBERS_CACHED_MAX:
            del self._numbers[next(iter(self._numbers))]
        self._numbers[tenant_number, account_id] = number

    async def get(self, tenant_number: int, account_id: str) -> AccountRecord:
        """One account. Raises AccountNotFound."""
        return await self._database.look(lambda connection: _get(connection, tenant_number, account_id))

    async def page(self, tenant_number: int, after: str | None, limit: int) -> list[AccountRecord]:
        """At most `limit` accounts in ascending order of their ids, behind `after`."""
        statement = select(*_COLUMNS).where(accounts.c.tenant_number == tenant_number)
        if after is not None:
            statement = statement.where(accounts.c.id > after)
        statement = statement.order_by(accounts.c.id).limit(limit)
        return await self._database.look(
            lambda connection: [AccountRecord(*row) for row in connection.execute(statement)], at_replica=True
        )

    async def holdings(self, tenant_number: int, account_ids: Collection[str], now: Instant) -> list[StoredAccount]:
        """Those of the accounts that exist, each with what it holds at this instant.

        The hash of an account's newest transaction stands for all that came of its transactions,
        as it does for a first page of history. So nothing but the account and that hash is read
        where both are what they were when the rest was read, and nothing has expired since.
        """
        numbers = await self._existing_numbers(tenant_number, account_ids)
        if not numbers:
            return []
        query = _accounts_query(len(numbers), self._database.dialect)
        rows = await self._database.fetch(query, account_parameters(numbers), at_replica=False)
        known = [kept for row in rows if (kept := self._kept_holding(tuple(row), now)) is not None]
        if len(known) < len(rows):
            unknown = set(numbers).difference(each.record.number for each in known)
            known += await self._read_holdings(sorted(unknown), now)
        return known

    async def _read_holdings(self, numbers: Collection[int], now: Instant) -> list[StoredAccount]:
        """What these accounts hold, at one instant."""
        dialect, count = self._database.dialect, len(numbers)
        rows, states = await self._database.fetch_together(
            (_accounts_query(count, dialect), holdings_query(count, dialect)),
            account_parameters(numbers) | {"now": now},
        )
        held = {stored.state.account_number: (stored, until) for stored, until in map(to_holding, states)}
        found = []
        for row in rows:
            record = AccountRecord(*row[:-1])
            stored, next_expire_time = held[record.number]
            account = StoredAccount(record, *stored, now, next_expire_time)
            found.append(account)
            self._keep_holding(tuple(row), account)
        return found

    def _kept_holding(self, row: tuple[Any, ...], now: Instant) -> StoredAccount | None:
        kept = self._holdings.get(row[_NUMBER])
        if kept is None or kept[0] != row or not kept[1].read_time <= now < kept[1].next_expire_time:
            return None
        return kept[1]

    def _keep_holding(self, row: tuple[object, ...], account: StoredAccount) -> None:
        number = account.record.number
        self._holdings.pop(number, None)
        if len(account.record.profile) > HOLDING_PROFILE_BYTES_MAX:
            return
        if len(self._holdings) >= HOLDINGS_CACHED_MAX:
            del self._holdings[next(iter(self._holdings))]
        self._holdings[number] = (row, account)

    async def _existing_numbers(self, tenant_number: int, account_ids: Collection[str]) -> list[int]:
        """The numbers of those of the accounts that exist, in ascending order."""
        known = {each: self._numbers.get((tenant_number, each)) for each in account_ids}
        if unknown := [each for each, number in known.items() if number is None]:
            statement = select(accounts.c.id, accounts.c.number).where(
                accounts.c.tenant_number == tenant_number, accounts.c.id.in_(unknown)
            )
            for account_id, number in await self._database.look(lambda connection: connection.execute(statement).all()):
                known[account_id] = number
                self._remember(tenant_number, account_id, number)
        return sorted(number for number in known.values() if number is not None)

    async def lots(self, account_number: int, after: int, limit: int) -> list[Lot]:
        """At most `limit` lots of an account, open or not, by number, behind `after`."""
        statement = (
            select(*LOT_COLUMNS)
            .where(lots.c.account_number == account_number, lots.c.number > after)
            .order_by(lots.c.number)
            .limit(limit)
        )
        return await self._database.look(
            lambda connection: [to_lot(*row) for row in connection.execute(statement)], at_replica=True
        )

    async def due_accounts(self, now: Instant, import_rest: Instant, limit: int) -> list[int]:
        """Accounts with lots that have expired and are not posted as such: those of `limit` lots.

        Accounts into which history was imported less than `import_rest` ago are left alone. An
        import_time that is further ahead of `now` than that comes from a clock that was wrong.
        """
        statement = (
            select(lots.c.account_number)
            .join(account_states, account_states.c.account_number == lots.c.account_number)
            .where(
                lots.c.remaining > 0,
                lots.c.expire_time <= now,
                not_(account_states.c.import_time.between(now - import_rest + 1, now + import_rest)),
            )
            .order_by(lots.c.expire_time, lots.c.account_number)
            .limit(limit)
        )
        numbers = await self._database.look(lambda connection: connection.execute(statement).scalars().all())
        return list(dict.fromkeys(numbers))

    async def create(self, tenant_number: int, record: AccountRecord, request: Request) -> bytes:
        """Creates an account and answers with it, serialized. Raises AccountExists."""

        def work(connection: Connection) -> bytes:
            existing = _find(connection, tenant_number, record.id)
            if existing is not None:
                answer = load_answer(connection, existing.number, request)
                if answer is None:
                    raise AccountExists(account_name(record.id))
                return answer
            number = connection.execute(
                insert(accounts).returning(accounts.c.number),
                {
                    "tenant_number": tenant_number,
                    "id": record.id,
                    "kind": record.kind,
                    "display_name": record.display_name,
                    "credit_limit": record.credit_limit,
                    "hour_anchor": record.hour_anchor,
                    "profile": record.profile,
                    "create_time": record.create_time,
                    "update_time": record.update_time,
                },
            ).scalar_one()
            connection.execute(
                insert(account_states).values(
                    account_number=number,
                    balance=0,
                    debt=0,
                    lot_count=0,
                    sequence=0,
                    last_hash=b"",
                    last_create_time=0,
                    window_number=0,
                    import_time=0,
                )
            )
            answer = replace(record, number=number).to_message().SerializeToString()
            save_answer(connection, number, request, answer)
            return answer

        return await self._database.transact(work)

    async def update(
        self,
        tenant_number: int,
        account_id: str,
        change: Callable[[AccountRecord], AccountRecord],
        request: Request,
    ) -> bytes:
        """Applies a change to an account and answers with the account, serialized.

        Raises AccountNotFound, and whatever `change` raises.
        """

        def work(connection: Connection) -> bytes:
            record = _get(connection, tenant_number, account_id, lock=True)
            answer = load_answer(connection, record.number, request)
            if answer is not None:
                return answer
            changed = change(record)
            if changed != record:
                connection.execute(
                    update(accounts)
                    .where(accounts.c.number == record.number)
                    .values(
                        display_name=changed.display_name,
                        credit_limit=changed.credit_limit,
                        profile=changed.profile,
                        update_time=changed.update_time,
                    )
                )
            answer = changed.to_message().SerializeToString()
            save_answer(connection, record.number, request, answer)
            return answer

        return await self._database.transact(work)


@lru_cache(QUERIES_CACHED_MAX)
def _accounts_query(count: int, dialect: Dialect) -> Query:
    """All of so many accounts, and of each the hash of its newest transaction."""
    numbers: list[BindParameter[int]] = [bindparam(name) for name in account_parameters(range(count))]
    is_of_account = account_states.c.account_number == accounts.c.number
    statement = select(*_COLUMNS, account_states.c.last_hash).join_from(accounts, account_states, is_of_account)
    return Query.of(statement.where(accounts.c.number.in_(numbers)), dialect)


def _get(connection: Connection, tenant_number: int, account_id: str, *, lock: bool = False) -> AccountRecord:
    record = _find(connection, tenant_number, account_id, lock=lock)
    if record is None:
        raise AccountNotFound(account_name(account_id))
    return record


def _find(connection: Connection, tenant_number: int, account_id: str, *, lock: bool = False) -> AccountRecord | None:
    statement: Select[*tuple[Any, ...]] = select(*_COLUMNS).where(
        accounts.c.tenant_number == tenant_number, accounts.c.id == account_id
    )
    row = connection.execute(statement.with_for_update() if lock else statement).one_or_none()
    return None if row is None else AccountRecord(*row)
