"""The credit requests of Dreadnode's SDK (`dreadnode` 2.0.52, `dreadnode/app/api/client.py`).

The SDK depends on more than forty libraries, so httpx sends its requests here, with the headers,
base URL and paths of the SDK's client.
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
    """The base URL that the SDK derives from its user's setting."""
    base_url = base_url.rstrip("/")
    return base_url if base_url.endswith(("/api/v1", "/api")) else f"{base_url}/api/v1"


@pytest.fixture(params=["", "/", "/api", "/api/", "/api/v1", "/api/v1/"])
def sdk(gateway: Daybook, request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    """The SDK's HTTP client, with each form of base URL that it accepts."""
    headers = {
        "User-Agent": "dreadnode-sdk/2.0.52",
        "Accept": "application/json",
        "X-Dreadnode-Network": "public",
        "X-API-Key": f"{dreadnode.KEY}.{SECRET}",
    }
    base_url = api_base(f"{gateway.origin}{request.param}")
    with httpx.Client(headers=headers, base_url=base_url, timeout=SECONDS_MAX) as client:
        yield client


def test_balance_has_the_types_of_the_sdk(sdk: httpx.Client) -> None:
    """`credits.get_balance()` gets an integer and two booleans, as the SDK's model requires."""
    answer = sdk.get(f"/org/{dreadnode.ORGANIZATION}/credits")
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert {name: type(value) for name, value in body.items()} == {
        "balance": int,
        "is_low_balance": bool,
        "auto_refill_enabled": bool,
    }
    assert body["balance"] == 153


def test_list_is_served_under_each_base_url(sdk: httpx.Client) -> None:
    """The documented list is served under each base URL."""
    answer = sdk.get(f"/org/{dreadnode.ORGANIZATION}/credits/transactions", params={"limit": 2})
    assert answer.status_code == 200, answer.text
    assert [row["transaction_type"] for row in answer.json()] == ["usage", "storage"]


def test_refusals_have_status_and_detail(sdk: httpx.Client) -> None:
    """Refusals have the status 401 or 404, by which the SDK distinguishes them, and a `detail`."""
    unknown = sdk.get("/org/nowhere/credits")
    assert (unknown.status_code, unknown.json()["detail"]) == (404, "Organization nowhere not found")
    refused = sdk.get("/org/example/credits", headers={"X-API-Key": "unknown.public"})
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
    """The balance is rounded down to whole credits, and is low below 1; a debt is negative."""
    organization = native.create_account(DREADNODE, credit_limit="10")
    native.post(DREADNODE, organization, Transaction.ADJUSTMENT, "admin_adjustment", amount)
    answer = httpx.get(
        f"{gateway.origin}/api/v1/org/{organization}/credits", headers={"X-API-Key": DREADNODE}, timeout=SECONDS_MAX
    )
    # A JSON integer has neither a decimal point nor an exponent.
    assert f'"balance":{shown},' in answer.text
    assert answer.json()["is_low_balance"] is is_low


def test_empty_organization_has_zeros(gateway: Daybook, native: NativeCaller) -> None:
    """The balance of a new organization has all fields, with 0 and false."""
    organization = native.create_account(DREADNODE)
    url = f"{gateway.origin}/api/v1/org/{organization}/credits"
    answer = httpx.get(url, headers={"X-API-Key": DREADNODE}, timeout=SECONDS_MAX)
    assert answer.json() == {"balance": 0, "is_low_balance": True, "auto_refill_enabled": False}
