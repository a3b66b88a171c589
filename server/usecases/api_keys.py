"""The use cases of API keys."""

from __future__ import annotations

from dataclasses import dataclass

from server.ledger.access import ApiKeyRecord, Caller, RetiredSecret, is_active, new_api_key, retire
from server.ledger.errors import ApiKeyInactive, FieldInvalid
from server.ledger.instants import Clock, Instant
from server.ledger.names import RandomBytes, api_key_name
from server.ledger.paging import ApiKeyKey, Page
from server.store.accounts import AccountStore
from server.store.credentials import CredentialStore


@dataclass(frozen=True, slots=True)
class ApiKeyDraft:
    """A key to be created."""

    scopes: tuple[str, ...]
    account_id: str | None = None
    """The account to bind it to; None for the whole tenant."""
    display_name: str = ""
    expire_time: Instant | None = None
    time_to_live: Instant | None = None
    """Its lifetime from its creation on, instead of expire_time."""


class ApiKeys:
    """Creates, lists, revokes and rotates the API keys of a tenant.

    Every method raises AccountNotPermitted for a caller that is bound to one account.
    """

    def __init__(
        self,
        store: CredentialStore,
        accounts: AccountStore,
        clock: Clock,
        checked_clock: Clock,
        random_bytes: RandomBytes,
    ) -> None:
        """`clock` is for revoking, which must always work; `checked_clock` may raise ClockSkewed."""
        self._store = store
        self._accounts = accounts
        self._clock = clock
        self._checked_clock = checked_clock
        self._random_bytes = random_bytes

    async def create(self, caller: Caller, draft: ApiKeyDraft) -> tuple[ApiKeyRecord, str]:
        """Creates a key; returns it with its text, which is not stored.

        Raises ScopeMissing for a scope that the caller's scopes do not include, FieldInvalid for
        an expire_time that is not in the future, and AccountNotFound.
        """
        caller.require_tenant()
        caller.require_grant(draft.scopes)
        now = self._checked_clock()
        expire_time = draft.expire_time if draft.time_to_live is None else now + draft.time_to_live
        if not is_active(None, expire_time, now):
            raise FieldInvalid("api_key.expire_time", "must be in the future")
        account_number = None
        if draft.account_id is not None:
            account_number = await self._accounts.number(caller.tenant_number, draft.account_id)
        key = new_api_key(self._random_bytes)
        record = ApiKeyRecord(
            id=key.key_id,
            secret_hash=key.secret_hash,
            tenant_number=caller.tenant_number,
            tenant_uid=caller.tenant_uid,
            account_id=draft.account_id,
            scopes=" ".join(draft.scopes),
            display_name=draft.display_name,
            create_time=now,
            expire_time=expire_time,
            revoke_time=None,
            last_use_time=None,
        )
        await self._store.create_api_key(
            key_id=record.id,
            secret_hash=record.secret_hash,
            tenant_number=record.tenant_number,
            account_number=account_number,
            create_time=record.create_time,
            scopes=draft.scopes,
            display_name=record.display_name,
            expire_time=record.expire_time,
        )
        return record, key.text

    async def list(self, caller: Caller, after: ApiKeyKey | None, limit: int) -> Page[ApiKeyRecord, ApiKeyKey]:
        """A page of the tenant's keys after the key `after`, newest first."""
        caller.require_tenant()
        rows = await self._store.api_key_page(caller.tenant_number, after, limit + 1)
        return Page.of(rows, limit, key=lambda row: row.key)

    async def revoke(self, caller: Caller, key_id: str) -> ApiKeyRecord:
        """Revokes a key; a revoked key keeps its revoke_time. Raises ApiKeyNotFound."""
        caller.require_tenant()
        return await self._store.revoke_api_key(caller.tenant_number, key_id, self._clock())

    async def rotate(self, caller: Caller, key_id: str, grace_period: Instant) -> tuple[ApiKeyRecord, str]:
        """Gives a key a new secret; returns the key with its new text, which is not stored.

        Its earlier secrets stay valid for at most the grace period. Raises ApiKeyNotFound,
        ApiKeyInactive, and ScopeMissing for a key with scopes that the caller lacks.
        """
        caller.require_tenant()
        now = self._checked_clock()

        def retire_secret(record: ApiKeyRecord, older: list[RetiredSecret]) -> list[RetiredSecret]:
            caller.require_grant(record.scopes.split())
            if not is_active(record.revoke_time, record.expire_time, now):
                raise ApiKeyInactive(api_key_name(key_id))
            return retire(record.secret_hash, older, now=now, until=now + grace_period)

        key = new_api_key(self._random_bytes, key_id)
        record = await self._store.rotate_api_key(caller.tenant_number, key_id, key.secret_hash, retire_secret)
        return record, key.text
