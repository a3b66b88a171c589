"""The API key methods of daybook.v1.Admin."""

from __future__ import annotations

from daybook.v1.admin_service_pb2 import (
    CreateApiKeyRequest,
    CreateApiKeyResponse,
    ListApiKeysRequest,
    ListApiKeysResponse,
    RevokeApiKeyRequest,
    RotateApiKeyRequest,
    RotateApiKeyResponse,
)
from daybook.v1.api_key_pb2 import ApiKey
from google.protobuf.timestamp_pb2 import Timestamp

from server.ledger.access import ApiKeyRecord
from server.ledger.instants import Instant, to_timestamp
from server.ledger.names import account_name, api_key_name, parse_account_name, parse_api_key_name
from server.ledger.paging import ApiKeyKey
from server.transport.auth import current_caller
from server.transport.calls import Context
from server.transport.page_tokens import Listing, PageTokens
from server.transport.validation import (
    Sizes,
    check_content,
    read_grace_period,
    read_lifetime,
    read_page_size,
    read_scopes,
    require_unset_by_caller,
)
from server.usecases.api_keys import ApiKeyDraft, ApiKeys


class ApiKeyMethods:
    """The part of the servicer for API keys."""

    _api_keys: ApiKeys
    _page_tokens: PageTokens
    _sizes: Sizes

    async def CreateApiKey(self, request: CreateApiKeyRequest, context: Context) -> CreateApiKeyResponse:
        """Parses the key, creates it, returns it with its secret."""
        record, key_string = await self._api_keys.create(current_caller(), _parse(request.api_key))
        return CreateApiKeyResponse(api_key=_render(record), key_string=key_string)

    async def ListApiKeys(self, request: ListApiKeysRequest, context: Context) -> ListApiKeysResponse:
        """Opens the page token, lists a page, seals the next token."""
        caller = current_caller()
        limit = read_page_size(request.page_size, self._sizes.page_size_max)
        listing = Listing.of("daybook.v1.Admin/ListApiKeys", caller, request, ("page_token", "page_size"))
        after = self._page_tokens.open(listing, request.page_token, ApiKeyKey)
        page = await self._api_keys.list(caller, after, limit)
        return ListApiKeysResponse(
            api_keys=[_render(record) for record in page.rows],
            next_page_token="" if page.next_key is None else self._page_tokens.seal(listing, page.next_key),
        )

    async def RevokeApiKey(self, request: RevokeApiKeyRequest, context: Context) -> ApiKey:
        """Parses the name, revokes the key."""
        key_id = parse_api_key_name("name", request.name)
        return _render(await self._api_keys.revoke(current_caller(), key_id))

    async def RotateApiKey(self, request: RotateApiKeyRequest, context: Context) -> RotateApiKeyResponse:
        """Parses the name and the grace period, rotates the key, returns it with its new secret."""
        key_id = parse_api_key_name("name", request.name)
        grace_period = read_grace_period(request.grace_period)
        record, key_string = await self._api_keys.rotate(current_caller(), key_id, grace_period)
        return RotateApiKeyResponse(api_key=_render(record), key_string=key_string)


def _parse(api_key: ApiKey) -> ApiKeyDraft:
    require_unset_by_caller("api_key", api_key)
    check_content("api_key", ApiKey(display_name=api_key.display_name))
    scopes = read_scopes("api_key.scopes", api_key.scopes)
    account_id = parse_account_name("api_key.account", api_key.account) if api_key.account else None
    expire_time, time_to_live = read_lifetime("api_key", api_key)
    return ApiKeyDraft(scopes, account_id, api_key.display_name, expire_time, time_to_live)


def _render(record: ApiKeyRecord) -> ApiKey:
    return ApiKey(
        name=api_key_name(record.id),
        display_name=record.display_name,
        scopes=record.scopes.split(),
        account="" if record.account_id is None else account_name(record.account_id),
        create_time=to_timestamp(record.create_time),
        expire_time=_time(record.expire_time),
        revoke_time=_time(record.revoke_time),
        last_use_time=_time(record.last_use_time),
    )


def _time(instant: Instant | None) -> Timestamp | None:
    return None if instant is None else to_timestamp(instant)
