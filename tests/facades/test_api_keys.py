"""API keys over REST: an administrator creates, rotates and revokes a key that a facade accepts."""

from __future__ import annotations

import json
import uuid

from tests.support.demo import create_key, create_tenant
from tests.support.http_client import Json, send
from tests.support.processes import Daybook
from tests.support.waiting import wait_until


def test_key_created_over_rest_reads_a_facade(gateway: Daybook) -> None:
    """A facade accepts a key that is created over REST, and its rotated secret, until the key is revoked."""
    slug = f"keys-{uuid.uuid4()}"
    uid = create_tenant(gateway, slug)
    admin = create_key(gateway, slug, "--scope", "admin")

    def call(method: str, target: str, body: object = None) -> dict[str, Json]:
        content = b"" if body is None else json.dumps(body).encode()
        headers = {"authorization": f"Bearer {admin}", "content-type": "application/json"}
        answer = send(gateway.origin, target, method=method, headers=headers, body=content)
        assert answer.status == 200, answer.body
        found = answer.json()
        assert isinstance(found, dict)
        return found

    def status_of(key: Json) -> int:
        headers = {"authorization": f"Bearer {key}", "spacebring-network-id": uid}
        return send(gateway.origin, "/transactions/credits/v1", headers=headers).status

    created = call("POST", "/v1/apiKeys", {"scopes": ["transactions.readonly"], "displayName": "Lists", "ttl": "3600s"})
    assert created.keys() == {"apiKey", "keyString"}
    key = created["apiKey"]
    assert isinstance(key, dict)
    assert key.keys() == {"name", "displayName", "scopes", "account", "createTime", "expireTime"}
    listed = call("GET", "/v1/apiKeys?pageSize=1")
    assert listed.keys() == {"apiKeys", "nextPageToken"}
    assert listed["apiKeys"] == [key]
    assert status_of(created["keyString"]) == 200
    rotated = call("POST", f"/v1/{key['name']}:rotate", {"gracePeriod": "60s"})
    assert rotated["apiKey"] == key
    assert (status_of(created["keyString"]), status_of(rotated["keyString"])) == (200, 200)
    revoked = call("POST", f"/v1/{key['name']}:revoke", {})
    assert revoked.keys() == {*key, "revokeTime"}
    # The server may accept a revoked key for up to five seconds more.
    wait_until(lambda: status_of(rotated["keyString"]) == 401, "the key is refused")
