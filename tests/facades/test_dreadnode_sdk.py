"""What Dreadnode's SDK sends and reads of credits (`dreadnode` 2.0.52, `dreadnode/app/api/client.py`).

The SDK depends on more than forty libraries, so its requests are sent here by httpx, as its client
builds them: headers, base URL, path.
"""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from daybook.v1.transaction_pb2 import Transaction

from server.demo import dreadnode
from server.demo.load import SECRET
from tests.support.callers import NativeCaller
from tests.support.demo import DREADNODE
from tests.support.processes import Daybook
from tests.support.waiting import SECONDS_MAX


def api_base(base_url: str) -> str:
    """The base URL of every request, out of the one that the SDK's user gives."""
    base_url = base_url.rstrip("/")
    return base_url if base_url.endswith(("/api/v1", "/api")) else f"{base_url}/api/v1"


@pytest.fixture(params=["", "/", "/api", "/api/", "/api/v1", "/api/v1/"])
def sdk(gateway: Daybook, request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    """The SDK's HTTP client, for every base URL that it understands."""
    headers = {
        "User-Agent": "dreadnode-sdk/2.0.52",
        "Accept": "application/json",
        "X-Dreadnode-Network": "public",
        "X-API-Key": f"{dreadnode.KEY}.{SECRET}",
    }
    base_url = api_base(f"{gateway.origin}{request.param}")
    with httpx.Client(headers=headers, base_url=base_url, timeout=SECONDS_MAX) as client:
        yield client


def test_balance(sdk: httpx.Client) -> None:
    """`credits.get_balance()`: a whole number and two flags, which the SDK's model takes as they are."""
    answer = sdk.get(f"/org/{dreadnode.ORGANIZATION}/credits")
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert {name: type(value) for name, value in body.items()} == {
        "balance": int,
        "is_low_balance": bool,
        "auto_refill_enabled": bool,
    }
    assert body["balance"] == 153


def test_list(sdk: httpx.Client) -> None:
    """The documented list is under the same base URLs."""
    answer = sdk.get(f"/org/{dreadnode.ORGANIZATION}/credits/transactions", params={"limit": 2})
    assert answer.status_code == 200, answer.text
    assert [row["transaction_type"] for row in answer.json()] == ["usage", "storage"]


def test_refusals(sdk: httpx.Client) -> None:
    """The SDK tells 401 and 404 apart by their status, and shows `detail`."""
    unknown = sdk.get("/org/nowhere/credits")
    assert (unknown.status_code, unknown.json()["detail"]) == (404, "Organization nowhere not found")
    refused = sdk.get("/org/example/credits", headers={"X-API-Key": "nobody.public"})
    assert (refused.status_code, refused.json()["detail"]) == (401, "Authentication failed")


@pytest.mark.parametrize(
    ("amount", "shown", "is_low"),
    [
        ("0.000001", "0", True),
        ("0.999999", "0", True),
        ("1", "1", False),
        ("2.999999", "2", False),
        ("-0.000001", "-1", True),
        ("-3", "-3", True),
        ("2147483648", "2147483648", False),
        ("999999999999.999999", "999999999999", False),
    ],
)
def test_balance_is_rounded_down(
    gateway: Daybook, native: NativeCaller, amount: str, shown: str, *, is_low: bool
) -> None:
    """No credit is shown that isn't there, and without a whole one the balance is low; a debt counts."""
    organization = native.create_account(DREADNODE, credit_limit="10")
    native.post(DREADNODE, organization, Transaction.ADJUSTMENT, "admin_adjustment", amount)
    answer = httpx.get(
        f"{gateway.origin}/api/v1/org/{organization}/credits", headers={"X-API-Key": DREADNODE}, timeout=SECONDS_MAX
    )
    # An integer of JSON has neither a point nor an exponent.
    assert f'"balance":{shown},' in answer.text
    assert answer.json()["is_low_balance"] is is_low


def test_balance_of_an_empty_organization(gateway: Daybook, native: NativeCaller) -> None:
    """Zeros and false are printed, for the SDK's model requires them."""
    organization = native.create_account(DREADNODE)
    url = f"{gateway.origin}/api/v1/org/{organization}/credits"
    answer = httpx.get(url, headers={"X-API-Key": DREADNODE}, timeout=SECONDS_MAX)
    assert answer.json() == {"balance": 0, "is_low_balance": True, "auto_refill_enabled": False}
