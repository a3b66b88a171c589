"""Tenants, API keys and the keys that seal page tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from sqlalchemy import BigInteger, Connection, case, delete, func, insert, literal, or_, select, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite

from server.ledger.access import DEFAULT_SCOPES, ApiKeyRecord, RetiredSecret
from server.ledger.errors import ApiKeyNotFound
from server.ledger.instants import Instant
from server.ledger.names import api_key_name
from server.ledger.paging import ApiKeyKey
from server.store.database import Database
from server.store.lookups import in_parts
from server.store.tables import accounts, api_keys, retired_secrets, tenants, token_keys

TOKEN_KEYS_MAX = 100
"""How many keys for page tokens are read. Nobody rotates more often in a day."""


class TokenKey(NamedTuple):
    """A key that seals page tokens."""

    key: bytes
    create_time: Instant


class Tenant(NamedTuple):
    """A tenant, as rows and callers know it."""

    number: int
    uid: str


class TenantRecord(NamedTuple):
    """A tenant as it is stored."""

    number: int
    slug: str
    uid: str
    display_name: str
    create_time: Instant


_RECORDS = (
    select(
        api_keys.c.id,
        api_keys.c.secret_hash,
        tenants.c.number,
        tenants.c.uid,
        accounts.c.id,
        api_keys.c.scopes,
        api_keys.c.display_name,
        api_keys.c.create_time,
        api_keys.c.expire_time,
        api_keys.c.revoke_time,
        api_keys.c.last_use_time,
    )
    .join(tenants, tenants.c.number == api_keys.c.tenant_number)
    .outerjoin(accounts, accounts.c.number == api_keys.c.account_number)
)


class CredentialStore:
    """Reads and writes tenants, API keys and token keys."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.lookup_count = 0
        """How often a key was looked up, because the authenticator did not remember it."""

    async def api_key(self, key_id: str) -> ApiKeyRecord | None:
        """The key of this id, of whatever tenant, or None."""
        self.lookup_count += 1
        statement = _RECORDS.where(api_keys.c.id == key_id)
        row = await self._database.look(lambda connection: connection.execute(statement).one_or_none())
        return None if row is None else ApiKeyRecord(*row)

    async def retired_secrets(self, key_id: str) -> list[RetiredSecret]:
        """The secrets of a key that rotations left good, some of them perhaps no longer."""
        return await self._database.look(lambda connection: _retired_secrets(connection, key_id))

    async def api_key_page(self, tenant_number: int, after: ApiKeyKey | None, limit: int) -> list[ApiKeyRecord]:
        """At most `limit` keys of a tenant, newest first, behind `after`."""
        place = tuple_(api_keys.c.create_time, api_keys.c.id)
        statement = _RECORDS.where(api_keys.c.tenant_number == tenant_number)
        if after is not None:
            statement = statement.where(place < (after.create_time, after.id))
        statement = statement.order_by(api_keys.c.create_time.desc(), api_keys.c.id.desc()).limit(limit)
        return await self._database.look(
            lambda connection: [ApiKeyRecord(*row) for row in connection.execute(statement)]
        )

    async def revoke_api_key(self, tenant_number: int, key_id: str, now: Instant) -> ApiKeyRecord:
        """Revokes a key, unless that was done before. Raises ApiKeyNotFound."""

        def work(connection: Connection) -> ApiKeyRecord:
            record = _lock_api_key(connection, tenant_number, key_id)
            if record.revoke_time is not None:
                return record
            connection.execute(update(api_keys).where(api_keys.c.id == key_id).values(revoke_time=now))
            return replace(record, revoke_time=now)

        return await self._database.transact(work)

    async def rotate_api_key(
        self,
        tenant_number: int,
        key_id: str,
        secret_hash: bytes,
        retire: Callable[[ApiKeyRecord, list[RetiredSecret]], list[RetiredSecret]],
    ) -> ApiKeyRecord:
        """Gives a key a new secret; `retire` says of the key and its older ones which stay good.

        Raises ApiKeyNotFound, and whatever `retire` raises.
        """

        def work(connection: Connection) -> ApiKeyRecord:
            record = _lock_api_key(connection, tenant_number, key_id)
            good = retire(record, _retired_secrets(connection, key_id))
            connection.execute(delete(retired_secrets).where(retired_secrets.c.key_id == key_id))
            if good:
                connection.execute(insert(retired_secrets), [{"key_id": key_id, **each._asdict()} for each in good])
            connection.execute(update(api_keys).where(api_keys.c.id == key_id).values(secret_hash=secret_hash))
            return replace(record, secret_hash=secret_hash)

        return await self._database.transact(work)

    async def record_uses(self, uses: Mapping[str, Instant]) -> None:
        """Keeps when keys were last used, by their ids: one statement for many. A later time stays."""

        def work(connection: Connection) -> None:
            for some in in_parts(sorted(uses)):
                time = case({key_id: literal(uses[key_id], BigInteger) for key_id in some}, value=api_keys.c.id)
                known = api_keys.c.last_use_time
                connection.execute(
                    update(api_keys)
                    .where(api_keys.c.id.in_(some), or_(known.is_(None), known < time))
                    .values(last_use_time=time)
                )

        await self._database.transact(work)

    async def create_tenant(
        self, *, slug: str, uid: str, display_name: str, create_time: Instant, demo: bool = False
    ) -> int:
        """Creates a tenant; answers with its number. Raises ValueError if the slug is taken."""
        statement = insert(tenants).returning(tenants.c.number)
        values = {
            "slug": slug,
            "uid": uid,
            "display_name": display_name,
            "create_time": create_time,
            "demo": int(demo),
        }

        def work(connection: Connection) -> int:
            existing = connection.scalar(select(tenants.c.uid).where(tenants.c.slug == slug))
            if existing is not None:
                raise ValueError(f"a tenant {slug!r} exists already; its uid is {existing}")
            number: int = connection.execute(statement, values).scalar_one()
            return number

        return await self._database.transact(work)

    async def tenants(self, after: int, limit: int) -> Sequence[TenantRecord]:
        """The first tenants behind a number, at most so many, in the order in which they were created."""
        columns = tenants.c["number", "slug", "uid", "display_name", "create_time"]
        statement = select(*columns).where(tenants.c.number > after).order_by(tenants.c.number).limit(limit)
        rows = await self._database.look(lambda connection: connection.execute(statement).all())
        return [TenantRecord(*row) for row in rows]

    async def tenant(self, slug: str) -> Tenant | None:
        """The tenant of this slug, or None."""
        statement = select(tenants.c.number, tenants.c.uid).where(tenants.c.slug == slug)
        row = await self._database.look(lambda connection: connection.execute(statement).one_or_none())
        return None if row is None else Tenant(*row)

    async def tenant_number(self, slug: str) -> int | None:
        """The number of the tenant of this slug, or None."""
        found = await self.tenant(slug)
        return None if found is None else found.number

    async def has_tenant(self) -> bool:
        """Whether the database holds anything yet."""
        statement = select(tenants.c.number).limit(1)
        return await self._database.look(lambda connection: connection.execute(statement).one_or_none()) is not None

    async def has_demo_tenant(self) -> bool:
        """Whether the database holds demo data, whose keys everybody knows."""
        statement = select(tenants.c.number).where(tenants.c.demo == 1).limit(1)
        return await self._database.look(lambda connection: connection.execute(statement).one_or_none()) is not None

    async def create_api_key(
        self,
        *,
        key_id: str,
        secret_hash: bytes,
        tenant_number: int,
        account_number: int | None,
        create_time: Instant,
        scopes: Iterable[str] = DEFAULT_SCOPES,
        display_name: str = "",
        expire_time: Instant | None = None,
    ) -> None:
        """Stores a new key."""
        statement = insert(api_keys).values(
            id=key_id,
            tenant_number=tenant_number,
            account_number=account_number,
            scopes=" ".join(scopes),
            secret_hash=secret_hash,
            create_time=create_time,
            display_name=display_name,
            expire_time=expire_time,
        )

        def work(connection: Connection) -> None:
            connection.execute(statement)

        await self._database.transact(work)

    async def ensure_token_key(self, candidate: bytes, create_time: Instant) -> None:
        """Makes the candidate the first key that seals page tokens, unless there is one.

        However many processes start at once, one of them succeeds.
        """

        def work(connection: Connection) -> None:
            dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
            connection.execute(
                dialect.insert(token_keys)
                .values(number=1, key=candidate, create_time=create_time)
                .on_conflict_do_nothing()
            )

        await self._database.transact(work)

    async def add_token_key(self, key: bytes, create_time: Instant) -> None:
        """Adds a key for page tokens, behind those that there are."""

        def work(connection: Connection) -> None:
            newest = connection.execute(select(func.max(token_keys.c.number))).scalar_one() or 0
            connection.execute(insert(token_keys).values(number=newest + 1, key=key, create_time=create_time))

        await self._database.transact(work)

    async def token_keys(self) -> list[TokenKey]:
        """The newest keys for page tokens, newest first."""
        statement = (
            select(token_keys.c.key, token_keys.c.create_time)
            .order_by(token_keys.c.number.desc())
            .limit(TOKEN_KEYS_MAX)
        )
        return await self._database.look(
            lambda connection: [TokenKey(bytes(row.key), row.create_time) for row in connection.execute(statement)]
        )


def _retired_secrets(connection: Connection, key_id: str) -> list[RetiredSecret]:
    rows = connection.execute(
        select(retired_secrets.c.secret_hash, retired_secrets.c.expire_time).where(retired_secrets.c.key_id == key_id)
    )
    return [RetiredSecret(*row) for row in rows]


def _lock_api_key(connection: Connection, tenant_number: int, key_id: str) -> ApiKeyRecord:
    """A key of the tenant that nobody else changes meanwhile. Raises ApiKeyNotFound."""
    statement = _RECORDS.where(api_keys.c.id == key_id, api_keys.c.tenant_number == tenant_number)
    row = connection.execute(statement.with_for_update(of=api_keys)).one_or_none()
    if row is None:
        raise ApiKeyNotFound(api_key_name(key_id))
    return ApiKeyRecord(*row)
