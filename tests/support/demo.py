"""The running demo: its keys, its lists, and tenants, keys and networks that a test adds to it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from tests.support.command_line import printed
from tests.support.http_client import Answer, Json, problems_of_any_answer, send
from tests.support.processes import Daybook, sqlite_url
from tests.support.rest import KEY
from tests.support.vendors import APIS

TEABLE, DREADNODE = "demo-teable.public", "demo-dreadnode.public"


def get(gateway: Daybook, key: str, target: str, **headers: str) -> Json:
    """Sends a GET request, which must succeed. Returns the body."""
    answer = send(gateway.origin, target, headers={"authorization": f"Bearer {key}", **headers})
    assert answer.status == 200, answer.body
    return answer.json()


def create_tenant(gateway: Daybook, slug: str) -> str:
    """Creates a tenant while the server runs; returns its uid."""
    return printed(sqlite_url(gateway.folder / "daybook.db"), "tenants", "create", slug)


def create_key(gateway: Daybook, tenant: str, *options: str) -> str:
    """Creates a key of a tenant, with options of `daybook keys create`; returns it."""
    return printed(sqlite_url(gateway.folder / "daybook.db"), "keys", "create", "--tenant", tenant, *options)


@dataclass(frozen=True)
class Network:
    """A Spacebring network of one test. The list shows the whole network, and the demo's network must not change."""

    gateway: Daybook
    uid: str
    key: str

    def rows(self, location: str) -> list[Json]:
        """Returns the transactions of a location."""
        target = f"/transactions/credits/v1?limit=100&locationRef={location}"
        body = get(self.gateway, self.key, target, **{"spacebring-network-id": self.uid})
        assert isinstance(body, dict)
        assert body.keys() == {"transactions"}
        rows = body["transactions"]
        assert isinstance(rows, list)
        return rows


def make_network(gateway: Daybook) -> Network:
    """Creates a network without transactions."""
    slug = f"network-{uuid.uuid4()}"
    uid = create_tenant(gateway, slug)
    return Network(gateway, uid, create_key(gateway, slug))


NATIVE = {"authorization": f"Bearer {KEY}"}
ACCOUNT = "/v1/accounts/example"
TRANSACTIONS = "/v1/accounts/example/transactions"


@dataclass(frozen=True)
class Target:
    """A path, with the key and the expected status of a request for it."""

    target: str
    key: str
    status: int = 200

    def send(self, daybook: Daybook, method: str = "GET", **headers: str) -> Answer:
        """Sends a request; checks the rules for every response."""
        credential = {} if self.status == 401 else {"authorization": f"Bearer {self.key}.public"}
        network = {"spacebring-network-id": "1d1449b0-23e2-5ea8-8621-209f077c011f"}
        answer = send(daybook.origin, self.target, method=method, headers={**credential, **network, **headers})
        assert not list(problems_of_any_answer(answer))
        return answer


LISTS = {
    "paged": Target("/api/billing/accounts/example/transactions?page_size=100", "demo-dreadnode"),
    "teable": Target(f"{APIS['teable'].path}?month=2024-10&take=100", "demo-teable"),
    "nebulablock": Target("/users/credits/history?limit=100", "demo-nebulablock-busy"),
    "spacebring": Target("/transactions/credits/v1?limit=100", "demo-spacebring"),
    "dreadnode": Target("/api/v1/org/example/credits/transactions?limit=100", "demo-dreadnode"),
    "native": Target(TRANSACTIONS, "demo-dreadnode"),
}
