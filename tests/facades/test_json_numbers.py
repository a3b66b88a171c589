"""The precision of JSON numbers in facades is within the bounds that docs/facades documents.

The transcoder prints a double with 15 digits, or with 17 if 15 don't identify it.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from decimal import Decimal

import pytest
from daybook.v1.account_pb2 import Account
from daybook.v1.transaction_pb2 import Transaction, Usage
from hypothesis import example, given
from hypothesis import strategies as st

from server.ledger import money
from tests.support.callers import NativeCaller
from tests.support.demo import DREADNODE, TEABLE, Network, create_key, create_tenant, make_network
from tests.support.http_client import send
from tests.support.processes import ROOT, Daybook

EXACT_MAX = "999999999.999999"
"""The largest amount up to which every amount has at most 15 digits."""
AMOUNTS = {
    "0.000001": "1e-06",
    "0.000099": "9.9e-05",
    "0.0001": "0.0001",
    "0.1": "0.1",
    "1": "1",
    "0.3": "0.3",
    "123456.789012": "123456.789012",
    "999999999": "999999999",
    "999999999.999998": "999999999.999998",
    EXACT_MAX: EXACT_MAX,
    # Above EXACT_MAX the nearest double may differ from the amount.
    "33333333333.333333": "33333333333.333332",
    "999999999999.999999": "1000000000000",
}
"""Amounts, each with its JSON number."""
TOKENS = {
    0: "0",
    999_999_999_999_999: "999999999999999",
    2**53: "9007199254740992",
    2**53 + 1: "9007199254740992",
    2**63 - 1: "9.2233720368547758e+18",
}
"""Token counts, each with its JSON number."""


@given(st.integers(-(10**15) + 1, 10**15 - 1))
@example(10**15 - 1)
@example(1 - 10**15)
def test_amounts_are_exact_within_the_bound(amount: int) -> None:
    """Amounts up to EXACT_MAX equal their number with the transcoder's 15 digits."""
    exact = Decimal(amount).scaleb(-6)
    assert Decimal(f"{money.to_number(amount):.15g}") == exact
    assert money.to_number(amount) == float(exact)


@given(st.integers(-money.LARGEST, money.LARGEST))
def test_amounts_beyond_the_bound_are_the_nearest_double(amount: int) -> None:
    """Every number is the double nearest to its amount, with an error below 0.0001."""
    number = money.to_number(amount)
    assert number == float(Decimal(amount).scaleb(-6))
    assert abs(Decimal(number) - Decimal(amount).scaleb(-6)) < Decimal("0.0001")


def numbers(gateway: Daybook, key: str, target: str, name: str, **headers: str) -> Sequence[str]:
    """The printed numbers of a field in an answer; `name` is a regular expression."""
    answer = send(gateway.origin, target, headers={"authorization": f"Bearer {key}", **headers})
    assert answer.status == 200, answer.body
    return re.findall(rf'"{name}":([^,}}]*)', answer.body.decode())


@pytest.fixture(scope="module")
def network(gateway: Daybook) -> Network:
    """A network without transactions."""
    return make_network(gateway)


def test_teable_amounts(gateway: Daybook, native: NativeCaller) -> None:
    """`amount` has the printed numbers of AMOUNTS."""
    space = native.create_account(TEABLE, credit_limit="999999999999.999999")
    for amount in AMOUNTS:
        charge = native.post(TEABLE, space, Transaction.CHARGE, "ai_chat", f"-{amount}")
        native.post(TEABLE, space, Transaction.GRANT, "purchase", amount)
    month = charge.create_time.ToJsonString()[:7]
    target = f"/api/space/{space}/billing/credit-history?month={month}&order=asc"
    assert numbers(gateway, TEABLE, target, "amount") == list(AMOUNTS.values())


def test_nebulablock_amounts(gateway: Daybook, native: NativeCaller) -> None:
    """An hour's usage and `credit_balance` have the printed numbers of AMOUNTS."""
    slug = f"numbers-{uuid.uuid4()}"
    create_tenant(gateway, slug)
    owner = create_key(gateway, slug)
    for amount in ("0.000001", EXACT_MAX, "33333333333.333333"):
        shown = AMOUNTS[amount]
        user = native.create_account(owner)
        native.post(owner, user, Transaction.GRANT, "purchase", amount)
        key = create_key(gateway, slug, "--account", user)
        assert numbers(gateway, key, "/users/credits/history", "credit_balance") == [shown]
        native.post(owner, user, Transaction.CHARGE, "computing", f"-{amount}", usage=Usage(model="m"))
        assert numbers(gateway, key, "/users/credits/history", "(?:computing_amount|total)") == [shown, shown]


def test_spacebring_amounts(gateway: Daybook, network: Network, native: NativeCaller) -> None:
    """A transaction's amounts and a company's credits have the printed numbers of AMOUNTS."""
    headers = {"spacebring-network-id": network.uid}
    for amount, shown in AMOUNTS.items():
        company = native.create_account(network.key, Account.COMPANY)
        labels = {"location": str(uuid.uuid4()), "company": company}
        native.post(network.key, company, Transaction.GRANT, "credit_package", amount, labels=labels)
        target = f"/transactions/credits/v1?locationRef={labels['location']}"
        for name in ("amount", "permanentAmount", "permanent"):
            assert numbers(gateway, network.key, target, name, **headers) == [shown]


def test_dreadnode_costs_and_token_counts(gateway: Daybook, native: NativeCaller) -> None:
    """Costs and token counts have the printed numbers of AMOUNTS and TOKENS. Amounts are whole credits, so exact."""
    organization = native.create_account(DREADNODE, credit_limit="100")
    target = f"/api/v1/org/{organization}/credits/transactions?limit=1"
    for cost, shown in AMOUNTS.items():
        native.post(DREADNODE, organization, Transaction.CHARGE, "inference", "-1", usage=Usage(cost_usd=cost))
        assert numbers(gateway, DREADNODE, target, "inference_cost_usd") == [shown]
    for tokens, shown in TOKENS.items():
        usage = Usage(input_tokens=tokens, output_tokens=tokens)
        native.post(DREADNODE, organization, Transaction.CHARGE, "inference", "-1", usage=usage)
        for name in ("input_tokens", "output_tokens"):
            assert numbers(gateway, DREADNODE, target, name) == [shown]


@pytest.mark.parametrize("vendor", ["teable", "nebulablock", "spacebring", "dreadnode", "paged"])
def test_pages_document_the_bounds(vendor: str) -> None:
    """Each facade's page has a section with the bound, and links to the rules for JSON numbers."""
    section = (ROOT / f"docs/facades/{vendor}.md").read_text().partition("## Numbers\n")[2].partition("\n## ")[0]
    if vendor == "paged":
        assert "2^53" in section
        return
    assert "999,999,999.999999" in section
    assert "(../http.md#json-numbers)" in section
    rules = (ROOT / "docs/http.md").read_text().partition("## JSON numbers\n")[2].partition("\n## ")[0]
    assert {f"`{printed}`" for printed in ("33333333333.333332", "1000000000000", "1e-06")} <= set(
        re.findall(r"`[^`]+`", rules)
    )
