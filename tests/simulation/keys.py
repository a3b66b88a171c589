"""API keys that clients create, use and revoke. Each function with one argument is one action of a client."""

from __future__ import annotations

from dataclasses import dataclass

from daybook.v1.admin_service_pb2 import CreateApiKeyRequest, CreateApiKeyResponse, RevokeApiKeyRequest
from daybook.v1.api_key_pb2 import ApiKey

from server.ledger.instants import SECOND, Instant
from server.transport.auth import KEY_CACHED_SECONDS_MAX
from tests.simulation.books import Violation
from tests.simulation.client import Client, Unknown


@dataclass
class KeyInUse:
    """An API key that clients created."""

    name: str
    text: str
    is_revoking: bool = False
    """Whether a client has asked to revoke it."""
    revoked_at: Instant | None = None
    """When the revocation was acknowledged."""


async def create_key(client: Client) -> None:
    """Creates an API key."""
    request = CreateApiKeyRequest(api_key=ApiKey(display_name=client.new_tag(), scopes=["accounts.readonly"]))
    try:
        answer = CreateApiKeyResponse.FromString(await client.call("Admin", "CreateApiKey", request))
    except Unknown:
        return
    client.world.keys.append(KeyInUse(answer.api_key.name, answer.key_string))


async def revoke_key(client: Client) -> None:
    """Revokes an API key."""
    if left := [key for key in client.world.keys if key.revoked_at is None]:
        key = client.random.choice(left)
        key.is_revoking = True
        await client.read("Admin", "RevokeApiKey", RevokeApiKeyRequest(name=key.name))
        key.revoked_at = key.revoked_at or client.world.now


async def use_key(client: Client) -> None:
    """An API key works until it is revoked, and not after servers may have it in their cache."""
    if client.world.keys:
        await check_key(client, client.random.choice(client.world.keys))


async def check_key(client: Client, key: KeyInUse) -> None:
    """Uses an API key once."""
    start, was_revoked_at = client.world.now, key.revoked_at
    is_accepted = await client.accepts(key.text)
    if is_accepted is False and not key.is_revoking:
        raise Violation(f"{key.name} is refused, although it was not revoked")
    if is_accepted and was_revoked_at is not None and start > was_revoked_at + KEY_CACHED_SECONDS_MAX * SECOND:
        raise Violation(f"{key.name} works after it was revoked")


KEYS = ((create_key, 2), (revoke_key, 1), (use_key, 4))
"""Each action, with its weight."""
