"""Accounts in the database."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, fields, replace

from sqlalchemy import Connection, bindparam, insert, not_, select, update

from server.caching import ByteLRU
from server.ledger.accounts import AccountRecord, AccountWithState
from server.ledger.errors import AccountExists, AccountNotFound
from server.ledger.idempotency import Request
from server.ledger.instants import Instant
from server.ledger.lots import Lot
from server.ledger.names import account_name, is_account_id
from server.store.answers import load_answer, save_answer
from server.store.database import Database
from server.store.query import Query
from server.store.states import LOT_COLUMNS, account_parameters, current_states_query, to_current_state, to_lot
from server.store.tables import account_states, accounts, lots

NUMBERS_BYTES_MAX = 16_777_216
"""The largest size of the cache of account numbers: about 50,000 accounts."""

_COLUMNS = tuple(accounts.c[field.name] for field in fields(AccountRecord))
_SELECT_ACCOUNT = select(*_COLUMNS).where(
    accounts.c.tenant_number == bindparam("tenant_number"), accounts.c.id == bindparam("account_id")
)
_ACCOUNT = Query(_SELECT_ACCOUNT)
_ACCOUNTS_AFTER = Query(
    select(*_COLUMNS)
    .where(accounts.c.tenant_number == bindparam("tenant_number"), accounts.c.id > bindparam("after"))
    .order_by(accounts.c.id)
    .limit(bindparam("limit"))
)
_LOTS_AFTER = Query(
    select(*LOT_COLUMNS)
    .where(lots.c.account_number == bindparam("account_number"), lots.c.number > bindparam("after"))
    .order_by(lots.c.number)
    .limit(bindparam("limit"))
)
_DUE_ACCOUNTS = Query(
    select(lots.c.account_number)
    .join(account_states, account_states.c.account_number == lots.c.account_number)
    .where(
        lots.c.remaining > 0,
        lots.c.expire_time <= bindparam("now"),
        not_(account_states.c.import_time.between(bindparam("import_since"), bindparam("import_until"))),
    )
    .order_by(lots.c.expire_time, lots.c.account_number)
    .limit(bindparam("limit"))
)


class AccountStore:
    """Reads and writes accounts."""

    def __init__(self, database: Database) -> None:
        self._database = database
        # The number of an account never changes, and accounts are never deleted.
        self._numbers: ByteLRU[tuple[int, str], int] = ByteLRU(NUMBERS_BYTES_MAX, lambda key, _: len(key[1]))

    async def number(self, tenant_number: int, account_id: str) -> int:
        """The number of an account. Raises AccountNotFound, also for an id that no account may have."""
        number = self._numbers.get((tenant_number, account_id))
        if number is None:
            if not is_account_id(account_id):
                # Facades do not validate ids.
                raise AccountNotFound(account_name(account_id))
            number = (await self.get(tenant_number, account_id)).number
            self._numbers.put((tenant_number, account_id), number)
        return number

    async def get(self, tenant_number: int, account_id: str) -> AccountRecord:
        """One account. Raises AccountNotFound."""
        rows = await self._database.primary.fetch(_ACCOUNT, {"tenant_number": tenant_number, "account_id": account_id})
        if not rows:
            raise AccountNotFound(account_name(account_id))
        return AccountRecord(*rows[0])

    async def page(self, tenant_number: int, after: str | None, limit: int) -> list[AccountRecord]:
        """At most `limit` accounts after the id `after`, in ascending order of their ids."""
        # No id is empty.
        parameters = {"tenant_number": tenant_number, "after": after or "", "limit": limit}
        rows = await self._database.lists.fetch(_ACCOUNTS_AFTER, parameters)
        return [AccountRecord(*row) for row in rows]

    async def accounts_with_states(
        self, tenant_number: int, account_ids: Collection[str], now: Instant
    ) -> list[AccountWithState]:
        """The existing accounts among these ids, each with its credits at `now`. All are of one snapshot."""
        numbers = await self._existing_numbers(tenant_number, account_ids)
        if not numbers:
            return []
        query = current_states_query(len(numbers), *_COLUMNS)
        rows = await self._database.primary.fetch(query, account_parameters(numbers) | {"now": now})
        width = len(_COLUMNS)
        return [AccountWithState(AccountRecord(*row[-width:]), to_current_state(row[:-width])) for row in rows]

    async def _existing_numbers(self, tenant_number: int, account_ids: Collection[str]) -> list[int]:
        """The numbers of the existing accounts among these ids, in ascending order."""
        numbers = {each: self._numbers.get((tenant_number, each)) for each in account_ids}
        if missing := [each for each, number in numbers.items() if number is None]:
            statement = select(accounts.c.id, accounts.c.number).where(
                accounts.c.tenant_number == tenant_number, accounts.c.id.in_(missing)
            )
            for account_id, number in await self._database.primary.fetch(Query(statement), {}):
                numbers[account_id] = number
                self._numbers.put((tenant_number, account_id), number)
        return sorted(number for number in numbers.values() if number is not None)

    async def lots(self, account_number: int, after: int, limit: int) -> list[Lot]:
        """At most `limit` lots of an account, open or not, by number, after the number `after`."""
        parameters = {"account_number": account_number, "after": after, "limit": limit}
        return [to_lot(*row) for row in await self._database.lists.fetch(_LOTS_AFTER, parameters)]

    async def due_accounts(self, now: Instant, import_pause: Instant, limit: int) -> list[int]:
        """The accounts of the first `limit` lots that have expired without a posted expiration.

        Skips accounts into which history was imported less than `import_pause` ago. An import_time
        ahead of `now` by more than that was stored by a wrong clock and is ignored.
        """
        parameters = {
            "now": now,
            "import_since": now - import_pause + 1,
            "import_until": now + import_pause,
            "limit": limit,
        }
        rows = await self._database.primary.fetch(_DUE_ACCOUNTS, parameters)
        return list(dict.fromkeys(number for (number,) in rows))

    async def create(self, tenant_number: int, record: AccountRecord, request: Request) -> bytes:
        """Creates an account; returns it serialized. Raises AccountExists."""

        def work(connection: Connection) -> bytes:
            existing = _find(connection, tenant_number, record.id)
            if existing is not None:
                answer = load_answer(connection, existing.number, request)
                if answer is None:
                    raise AccountExists(account_name(record.id))
                return answer
            number = connection.execute(
                insert(accounts).returning(accounts.c.number), new_account_row(tenant_number, record)
            ).scalar_one()
            state = dict.fromkeys(account_states.columns.keys(), 0) | {"account_number": number, "last_hash": b""}
            connection.execute(insert(account_states), state)
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
        """Applies a change to an account; returns the account serialized.

        Raises AccountNotFound, and the errors of `change`.
        """

        def work(connection: Connection) -> bytes:
            record = _find(connection, tenant_number, account_id, lock=True)
            if record is None:
                raise AccountNotFound(account_name(account_id))
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


def new_account_row(tenant_number: int, record: AccountRecord) -> dict[str, object]:
    """A row of accounts whose number the database assigns."""
    row = asdict(record) | {"tenant_number": tenant_number}
    del row["number"]
    return row


def _find(connection: Connection, tenant_number: int, account_id: str, *, lock: bool = False) -> AccountRecord | None:
    statement = _SELECT_ACCOUNT.with_for_update() if lock else _SELECT_ACCOUNT
    row = connection.execute(statement, {"tenant_number": tenant_number, "account_id": account_id}).one_or_none()
    return None if row is None else AccountRecord(*row)
