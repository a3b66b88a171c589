"""`daybook import` from each vendor's API into an empty tenant: our facade then answers with the same rows.

The live address is our own gateway with the demo's keys.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from daybook_client import Daybook as Client
from server.demo import dreadnode, nebulablock, spacebring, teable
from server.facades import dreadnode as dreadnode_facade
from tests.support.command_line import invoke
from tests.support.demo import create_key, create_tenant, get
from tests.support.processes import Daybook


@dataclass(frozen=True)
class Target:
    """An empty tenant to import into, behind the same gateway."""

    gateway: Daybook
    slug: str
    uid: str
    key: str
    """A key with the scope `admin`."""

    @property
    def address(self) -> str:
        """The address for native calls."""
        return f"http://127.0.0.1:{self.gateway.ports.gateway}"

    def run(self, *arguments: str, token: str = "") -> Result:
        """Runs `daybook import`."""
        settings = {"DAYBOOK_ADDRESS": self.address, "DAYBOOK_KEY": self.key, "SOURCE_TOKEN": token}
        return invoke("import", *arguments, settings=settings)

    def imported(self, *arguments: str, token: str = "") -> str:
        """Runs `daybook import`, which must succeed. Returns its output."""
        result = self.run(*arguments, token=token)
        assert result.exit_code == 0, result.output
        return result.stdout

    def client(self) -> Client:
        """A native client."""
        return Client(self.address, key=self.key)


@pytest.fixture
def target(gateway: Daybook) -> Target:
    """An empty tenant."""
    slug = f"import-{uuid.uuid4()}"
    uid = create_tenant(gateway, slug)
    return Target(gateway, slug, uid, create_key(gateway, slug, "--scope", "admin"))


def without_ids(rows: Any) -> Any:
    """Rows without their ids, which the ledger assigns."""
    return [{name: value for name, value in row.items() if name != "id"} for row in rows]


def teable_pages(gateway: Daybook, key: str, space: str) -> list[Any]:
    """All pages of a space, of the months of the demo, newest first."""
    pages: list[Any] = []
    for month in ("2024-11", "2024-10", "2024-09", "2024-08", "2024-07", "2024-06"):
        target: str | None = f"/api/space/{space}/billing/credit-history?month={month}"
        while target:
            page: Any = get(gateway, key, target)
            pages.append(page)
            cursor = page["nextCursor"]
            target = cursor and f"{target.partition('&')[0]}&cursor={cursor}"
    return pages


def teable_rows(pages: list[Any]) -> list[Any]:
    """The records of pages."""
    return [record for page in pages for record in page["data"]]


def nebulablock_pages(gateway: Daybook, key: str) -> list[Any]:
    """All pages of a user."""
    pages: list[Any] = []
    offset, total = 0, 1
    while offset < total:
        page: Any = get(gateway, key, f"/users/credits/history?offset={offset}")
        pages.append(page)
        offset, total = offset + 20, page["data"]["total_credit_histories"]
    return pages


def spacebring_pages(gateway: Daybook, key: str, network: str) -> list[Any]:
    """All pages of a network."""
    pages: list[Any] = []
    target = "/transactions/credits/v1"
    while target:
        page: Any = get(gateway, key, target, **{"spacebring-network-id": network})
        pages.append(page)
        token = page.get("nextPageToken")
        target = f"/transactions/credits/v1?nextPageToken={token}" if token else ""
    return pages


def spacebring_rows(pages: list[Any], without: tuple[str, ...] = ("id",)) -> list[Any]:
    """The transactions of pages."""
    rows = (row for page in pages for row in page["transactions"])
    return [{name: value for name, value in row.items() if name not in without} for row in rows]


def dreadnode_pages(gateway: Daybook, key: str, organization: str) -> list[Any]:
    """The balance, the list of all types, and that of each type."""
    path = f"/api/v1/org/{organization}/credits"
    types = ("", *(f"&transaction_type={name}" for name in sorted(set(dreadnode_facade.TYPES.values()))))
    return [
        get(gateway, key, path),
        *(get(gateway, key, f"{path}/transactions?limit=100{type_}") for type_ in types),
    ]


def save(folder: Path, pages: list[Any]) -> list[str]:
    """Writes each page to a file. Returns their paths."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number}.json" for number in range(len(pages))]
    for path, page in zip(paths, pages, strict=True):
        path.write_text(json.dumps(page, default=float))
    return [str(path) for path in paths]


@pytest.mark.parametrize("way", ["live", "saved"])
@pytest.mark.parametrize("space", [teable.SPACE, teable.LABORATORY])
def test_teable_rows_come_back(gateway: Daybook, target: Target, tmp_path: Path, space: str, way: str) -> None:
    """Each month has the same records, in the same order; a second import adds nothing."""
    pages = teable_pages(gateway, f"{teable.KEY}.public", space)
    source = ["--source-address", f"{gateway.origin}/api", "--since", "2024-06-01T00:00:00Z"]
    arguments = ["--from", "teable", "--account", space, *(save(tmp_path, pages) if way == "saved" else source)]
    target.imported(*arguments, token=f"{teable.KEY}.public")
    found = teable_rows(teable_pages(gateway, target.key, space))
    assert found
    assert without_ids(found) == without_ids(teable_rows(pages))
    with target.client() as client:
        # Teable shows no balance: just enough is brought forward.
        assert client.get_balance(f"accounts/{space}").amount == 0
    assert f"0 transactions imported, {len(found)} already there, 0 accounts created" in target.imported(
        *arguments, token=f"{teable.KEY}.public"
    )


@pytest.mark.parametrize("way", ["live", "saved"])
@pytest.mark.parametrize(
    ("user", "user_key"),
    [
        (nebulablock.DOCUMENTED_USER, nebulablock.DOCUMENTED_KEY),
        (nebulablock.BUSY_USER, nebulablock.BUSY_KEY),
        (nebulablock.SEASONED_USER, nebulablock.SEASONED_KEY),
    ],
)
def test_nebulablock_hours_come_back(
    gateway: Daybook, target: Target, tmp_path: Path, user: str, user_key: str, way: str
) -> None:
    """All pages are the same: hours, balance and total; a second import adds nothing."""
    pages = nebulablock_pages(gateway, f"{user_key}.public")
    source = save(tmp_path, pages) if way == "saved" else ["--source-address", gateway.origin]
    arguments = ["--from", "nebulablock", *source]
    target.imported(*arguments, token=f"{user_key}.public")
    key = create_key(gateway, target.slug, "--account", user)
    assert nebulablock_pages(gateway, key) == pages
    assert "0 transactions imported" in target.imported(*arguments, token=f"{user_key}.public")
    assert nebulablock_pages(gateway, key) == pages


@pytest.mark.parametrize("way", ["basic", "bearer", "saved"])
def test_spacebring_transactions_come_back(gateway: Daybook, target: Target, tmp_path: Path, way: str) -> None:
    """All transactions are the same, with their companies' balances; only links of refunds are lost."""
    pages = spacebring_pages(gateway, f"{spacebring.KEY}.public", spacebring.NETWORK)
    arguments = {
        "basic": ["--source-address", gateway.origin],
        "bearer": ["--source-address", gateway.origin, "--network", spacebring.NETWORK],
        "saved": save(tmp_path, pages),
    }[way]
    arguments += ["--from", "spacebring"]
    token = f"{spacebring.KEY}:public" if way == "basic" else f"{spacebring.KEY}.public"
    output = target.imported(*arguments, token=token)
    assert "1 differences:" in output
    assert "shows no refund" in output
    found = spacebring_pages(gateway, target.key, target.uid)
    assert spacebring_rows(found, ("id", "refund")) == spacebring_rows(pages, ("id", "refund"))
    assert [row.get("refund") for row in spacebring_rows(found)] != [
        row.get("refund") for row in spacebring_rows(pages)
    ]
    assert "0 transactions imported" in target.imported(*arguments, token=token)


@pytest.mark.parametrize("way", ["live", "saved"])
@pytest.mark.parametrize("organization", [dreadnode.ORGANIZATION, dreadnode.LABORATORY])
def test_dreadnode_rows_come_back(
    gateway: Daybook, target: Target, tmp_path: Path, organization: str, way: str
) -> None:
    """The balance and the lists of all types are the same; only the usage of a refund is lost."""
    key = f"{dreadnode.KEY}.public"
    pages = dreadnode_pages(gateway, key, organization)
    source = save(tmp_path, pages) if way == "saved" else ["--source-address", gateway.origin]
    arguments = ["--from", "dreadnode", "--account", organization, *source]
    target.imported(*arguments, token=key)
    found = dreadnode_pages(gateway, target.key, organization)
    assert found[0] == pages[0]
    assert [without_refund_usage(rows) for rows in found[1:]] == [without_refund_usage(rows) for rows in pages[1:]]
    assert "0 transactions imported" in target.imported(*arguments, token=key)


def without_refund_usage(rows: Any) -> Any:
    """Rows without their ids, and refunds without the usage of their charges."""
    usage = {"inference_cost_usd": None, "input_tokens": None, "output_tokens": None, "model": None}
    return [{**row, **usage} if row["transaction_type"] == "refund" else row for row in without_ids(rows)]


DOCUMENTED_HOURS = {
    "data": {
        "credit_balance": 9.8682,
        "credit_history": [
            {
                "user_id": 266,
                "computing_amount": 2.004,
                "serverless_amount": 0.0,
                "create_time": "EST 2024-10-10 06:54:58",
                "update_time": "EST 2024-10-10 07:54:58",
                "total": 2.004,
            },
            {
                "user_id": 266,
                "computing_amount": 2.004,
                "serverless_amount": 0.0,
                "create_time": "EST 2024-10-10 05:54:58",
                "update_time": "EST 2024-10-10 06:54:58",
                "total": 2.004,
            },
        ],
        "total_credit_histories": 2,
    },
    "message": "User credit history successfully retrieved",
    "status": "success",
}
"""The example of Nebula Block's page."""


def test_documented_page_comes_back(gateway: Daybook, target: Target, tmp_path: Path) -> None:
    """The page that Nebula Block documents comes back as it is."""
    target.imported("--from", "nebulablock", *save(tmp_path, [DOCUMENTED_HOURS]))
    key = create_key(gateway, target.slug, "--account", "266")
    found = get(gateway, key, "/users/credits/history?limit=2&offset=0")
    assert json.loads(json.dumps(found, default=float)) == DOCUMENTED_HOURS
