"""Tenants, API keys and the keys that seal page tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import insert, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from server.ledger.access import DEFAULT_SCOPES
from server.ledger.instants import Instant
from server.store.database import Conflict, Database
from server.store.tables import accounts, api_keys, tenants, token_keys


@dataclass(frozen=True, slots=True)
class ApiKeyRecord:
    """An API key as it is stored, with the tenant and the account it is good for."""

    id: str
    secret_hash: bytes
    tenant_number: int
    tenant_uid: str
    account_id: str | None
    scopes: str
    """Words with a space between them."""


class CredentialStore:
    """Reads and writes tenants, API keys and token keys."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def api_key(self, key_id: str) -> ApiKeyRecord | None:
        """The key of this id, or None."""
        statement = (
            select(
                api_keys.c.id,
                api_keys.c.secret_hash,
                tenants.c.number,
                tenants.c.uid,
                accounts.c.id,
                api_keys.c.scopes,
            )
            .join(tenants, tenants.c.number == api_keys.c.tenant_number)
            .outerjoin(accounts, accounts.c.number == api_keys.c.account_number)
            .where(api_keys.c.id == key_id)
        )
        async with self._database.read() as connection:
            row = (await connection.execute(statement)).one_or_none()
        return None if row is None else ApiKeyRecord(*row)

    async def create_tenant(
        self, *, slug: str, uid: str, display_name: str, create_time: Instant, demo: bool = False
    ) -> int:
        """Creates a tenant; answers with its number. Raises ValueError if the slug is taken."""
        try:
            async with self._database.write() as connection:
                number: int = (
                    await connection.execute(
                        insert(tenants).returning(tenants.c.number),
                        {
                            "slug": slug,
                            "uid": uid,
                            "display_name": display_name,
                            "create_time": create_time,
                            "demo": int(demo),
                        },
                    )
                ).scalar_one()
                return number
        except (IntegrityError, Conflict) as error:
            raise ValueError(f"a tenant {slug!r} exists already") from error

    async def tenant_number(self, slug: str) -> int | None:
        """The number of the tenant of this slug, or None."""
        async with self._database.read() as connection:
            return (
                await connection.execute(select(tenants.c.number).where(tenants.c.slug == slug))
            ).scalar_one_or_none()

    async def has_tenant(self) -> bool:
        """Whether the database holds anything yet."""
        async with self._database.read() as connection:
            return (await connection.execute(select(tenants.c.number).limit(1))).one_or_none() is not None

    async def has_demo_tenant(self) -> bool:
        """Whether the database holds demo data, whose keys everybody knows."""
        async with self._database.read() as connection:
            found = await connection.execute(select(tenants.c.number).where(tenants.c.demo == 1).limit(1))
            return found.one_or_none() is not None

    async def create_api_key(
        self,
        *,
        key_id: str,
        secret_hash: bytes,
        tenant_number: int,
        account_number: int | None,
        create_time: Instant,
        scopes: Iterable[str] = DEFAULT_SCOPES,
    ) -> None:
        """Stores a new key."""
        async with self._database.write() as connection:
            await connection.execute(
                insert(api_keys).values(
                    id=key_id,
                    tenant_number=tenant_number,
                    account_number=account_number,
                    scopes=" ".join(scopes),
                    secret_hash=secret_hash,
                    create_time=create_time,
                )
            )

    async def token_key(self, candidate: bytes, create_time: Instant) -> bytes:
        """The key that seals page tokens: the candidate, if there was none yet.

        However many processes start at once, all get the same.
        """
        async with self._database.write() as connection:
            dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
            await connection.execute(
                dialect.insert(token_keys)
                .values(number=1, key=candidate, create_time=create_time)
                .on_conflict_do_nothing()
            )
            key: bytes = (
                await connection.execute(select(token_keys.c.key).where(token_keys.c.number == 1))
            ).scalar_one()
            return key
