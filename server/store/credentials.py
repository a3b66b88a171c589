"""Tenants, API keys and the keys that seal page tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from sqlalchemy import (
    BigInteger,
    Connection,
    bindparam,
    case,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    tuple_,
    update,
)

from server.ledger.access import DEFAULT_SCOPES, ApiKeyRecord, RetiredSecret
from server.ledger.errors import ApiKeyNotFound
from server.ledger.instants import Instant
from server.ledger.names import api_key_name
from server.ledger.paging import ApiKeyKey
from server.store.database import Database
from server.store.lookups import in_parts
from server.store.query import Query
from server.store.tables import accounts, api_keys, retired_secrets, tenants, token_keys

TOKEN_KEYS_MAX = 100
"""The largest number of page token keys that are read. Rotations add fewer in a day."""


class TokenKey(NamedTuple):
    """A key that seals page tokens."""

    key: bytes
    create_time: Instant


class TenantRecord(NamedTuple):
    """A stored tenant."""

    number: int
    slug: str
    uid: str
    display_name: str
    create_time: Instant


_RECORDS = (
    select(
        *api_keys.c["id", "secret_hash"],
        *tenants.c["number", "uid"],
        accounts.c.id,
        *api_keys.c["scopes", "display_name", "create_time", "expire_time", "revoke_time", "last_use_time"],
    )
    .join(tenants, tenants.c.number == api_keys.c.tenant_number)
    .outerjoin(accounts, accounts.c.number == api_keys.c.account_number)
)
_newest_first = _RECORDS.where(api_keys.c.tenant_number == bindparam("tenant_number"))
_newest_first = _newest_first.order_by(api_keys.c.create_time.desc(), api_keys.c.id.desc()).limit(bindparam("limit"))
_API_KEY = Query(_RECORDS.where(api_keys.c.id == bindparam("key_id")))
_API_KEYS = Query(_newest_first)
_API_KEYS_AFTER = Query(
    _newest_first.where(
        tuple_(api_keys.c.create_time, api_keys.c.id) < tuple_(bindparam("create_time"), bindparam("key_id"))
    )
)
_SELECT_RETIRED = select(retired_secrets.c.secret_hash, retired_secrets.c.expire_time).where(
    retired_secrets.c.key_id == bindparam("key_id")
)
_RETIRED = Query(_SELECT_RETIRED)
_tenants = select(*tenants.c[TenantRecord._fields])
_TENANT = Query(_tenants.where(tenants.c.slug == bindparam("slug")))
_TENANTS = Query(
    _tenants.where(tenants.c.number > bindparam("after")).order_by(tenants.c.number).limit(bindparam("limit"))
)
_ANY_TENANT = Query(select(tenants.c.number).limit(1))
_DEMO_TENANT = Query(select(tenants.c.number).where(tenants.c.demo == 1).limit(1))
_TOKEN_KEYS = Query(
    select(token_keys.c.key, token_keys.c.create_time).order_by(token_keys.c.number.desc()).limit(TOKEN_KEYS_MAX)
)


class CredentialStore:
    """Reads and writes tenants, API keys and token keys."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.lookup_count = 0
        """Number of reads of a key: the misses of the authenticator's cache."""

    async def api_key(self, key_id: str) -> ApiKeyRecord | None:
        """The key with this id, of any tenant; None if there is none."""
        self.lookup_count += 1
        rows = await self._database.primary.fetch(_API_KEY, {"key_id": key_id})
        return ApiKeyRecord(*rows[0]) if rows else None

    async def retired_secrets(self, key_id: str) -> list[RetiredSecret]:
        """The replaced secrets of a key with their expire_times, which may be in the past."""
        rows = await self._database.primary.fetch(_RETIRED, {"key_id": key_id})
        return [RetiredSecret(*row) for row in rows]

    async def api_key_page(self, tenant_number: int, after: ApiKeyKey | None, limit: int) -> list[ApiKeyRecord]:
        """At most `limit` keys of a tenant after the key `after`, newest first."""
        parameters: dict[str, object] = {"tenant_number": tenant_number, "limit": limit}
        if after is None:
            rows = await self._database.primary.fetch(_API_KEYS, parameters)
        else:
            parameters |= {"create_time": after.create_time, "key_id": after.id}
            rows = await self._database.primary.fetch(_API_KEYS_AFTER, parameters)
        return [ApiKeyRecord(*row) for row in rows]

    async def revoke_api_key(self, tenant_number: int, key_id: str, now: Instant) -> ApiKeyRecord:
        """Revokes a key; a revoked key keeps its revoke_time. Raises ApiKeyNotFound."""

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
        """Gives a key a new secret. `retire` maps the key and its retired secrets to those that stay valid.

        Raises ApiKeyNotFound, and the errors of `retire`.
        """

        def work(connection: Connection) -> ApiKeyRecord:
            record = _lock_api_key(connection, tenant_number, key_id)
            stored = connection.execute(_SELECT_RETIRED, {"key_id": key_id})
            valid = retire(record, [RetiredSecret(*row) for row in stored])
            connection.execute(delete(retired_secrets).where(retired_secrets.c.key_id == key_id))
            if valid:
                connection.execute(insert(retired_secrets), [{"key_id": key_id, **each._asdict()} for each in valid])
            connection.execute(update(api_keys).where(api_keys.c.id == key_id).values(secret_hash=secret_hash))
            return replace(record, secret_hash=secret_hash)

        return await self._database.transact(work)

    async def record_uses(self, uses: Mapping[str, Instant]) -> None:
        """Stores the last uses of keys, by id, in few statements. Keeps a stored time that is later."""

        def work(connection: Connection) -> None:
            for some in in_parts(sorted(uses)):
                time = case({key_id: literal(uses[key_id], BigInteger) for key_id in some}, value=api_keys.c.id)
                stored = api_keys.c.last_use_time
                connection.execute(
                    update(api_keys)
                    .where(api_keys.c.id.in_(some), or_(stored.is_(None), stored < time))
                    .values(last_use_time=time)
                )

        await self._database.transact(work)

    async def create_tenant(
        self, *, slug: str, uid: str, display_name: str, create_time: Instant, demo: bool = False
    ) -> int:
        """Creates a tenant; returns its number. Raises ValueError if the slug is taken."""
        statement = insert(tenants).returning(tenants.c.number)
        statement = statement.values(
            slug=slug, uid=uid, display_name=display_name, create_time=create_time, demo=int(demo)
        )

        def work(connection: Connection) -> int:
            existing = connection.scalar(select(tenants.c.uid).where(tenants.c.slug == slug))
            if existing is not None:
                raise ValueError(f"a tenant {slug!r} exists already; its uid is {existing}")
            number: int = connection.execute(statement).scalar_one()
            return number

        return await self._database.transact(work)

    async def tenants(self, after: int, limit: int) -> Sequence[TenantRecord]:
        """At most `limit` tenants after the number `after`, by number."""
        rows = await self._database.primary.fetch(_TENANTS, {"after": after, "limit": limit})
        return [TenantRecord(*row) for row in rows]

    async def tenant(self, slug: str) -> TenantRecord | None:
        """The tenant of this slug, or None."""
        rows = await self._database.primary.fetch(_TENANT, {"slug": slug})
        return TenantRecord(*rows[0]) if rows else None

    async def tenant_number(self, slug: str) -> int | None:
        """The number of the tenant of this slug, or None."""
        found = await self.tenant(slug)
        return None if found is None else found.number

    async def has_tenant(self) -> bool:
        """Whether the database has a tenant."""
        return bool(await self._database.primary.fetch(_ANY_TENANT, {}))

    async def has_demo_tenant(self) -> bool:
        """Whether the database has demo data, whose keys are public."""
        return bool(await self._database.primary.fetch(_DEMO_TENANT, {}))

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
        """Stores the candidate as the first key that seals page tokens, unless there is one.

        If several processes start at once, one inserts its candidate; the others conflict, retry and find it.
        """

        def work(connection: Connection) -> None:
            if connection.scalar(select(token_keys.c.number).limit(1)) is None:
                connection.execute(insert(token_keys).values(number=1, key=candidate, create_time=create_time))

        await self._database.transact(work)

    async def add_token_key(self, key: bytes, create_time: Instant) -> None:
        """Adds a key for page tokens, which becomes the newest."""

        def work(connection: Connection) -> None:
            newest = connection.execute(select(func.max(token_keys.c.number))).scalar_one() or 0
            connection.execute(insert(token_keys).values(number=newest + 1, key=key, create_time=create_time))

        await self._database.transact(work)

    async def token_keys(self) -> list[TokenKey]:
        """The newest keys for page tokens, newest first."""
        return [TokenKey(*row) for row in await self._database.primary.fetch(_TOKEN_KEYS, {})]


def _lock_api_key(connection: Connection, tenant_number: int, key_id: str) -> ApiKeyRecord:
    """Locks a key of the tenant until the database transaction ends, and reads it. Raises ApiKeyNotFound."""
    statement = _RECORDS.where(api_keys.c.id == key_id, api_keys.c.tenant_number == tenant_number)
    row = connection.execute(statement.with_for_update(of=api_keys)).one_or_none()
    if row is None:
        raise ApiKeyNotFound(api_key_name(key_id))
    return ApiKeyRecord(*row)
