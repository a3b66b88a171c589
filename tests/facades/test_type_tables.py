"""The mapping of transactions to vendors' types: code, docs/facades and the vendors' enumerations agree."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from daybook.v1.transaction_pb2 import Transaction

from server.facades import dreadnode, spacebring, teable
from server.ledger.posting import Kind
from server.ledger.usage import USAGE_CATEGORIES
from tests.support.golden import FILES, read_exchanges
from tests.support.http_client import Json, read_json

DOCUMENTS = Path(__file__).parents[2] / "docs/facades"

Table = dict[tuple[Kind, str], tuple[str, ...]]

# The enumerations of the vendors' pages.
TYPES_OF_PAGES = {
    "teable": {"automation_ai_action", "ai_generation", "field_ai_generation", "ai_chat", "app_generation"},
    "spacebring": {
        "booking",
        "chargeExpiringCredits",
        "chargePermanentCredits",
        "creditPackage",
        "eventTicket",
        "order",
        "refund",
        "subscriptionExpiration",
        "subscriptionRenewal",
        "transferExpiringCredits",
        "transferPermanentCredits",
    },
    "dreadnode": {
        "purchase",
        "auto_refill",
        "usage",
        "inference",
        "span_ingestion",
        "storage",
        "signup_allocation",
        "refund",
        "admin_adjustment",
        "web_search",
    },
}
STATUSES_OF_SPACEBRING = {"canceled", "failed", "succeeded"}


def table_of(types: Mapping[tuple[Kind, str], str | spacebring.ByLots]) -> Table:
    """A facade's table: the possible types of each pair of kind and category."""
    return {pair: (named,) if isinstance(named, str) else tuple(named) for pair, named in types.items()}


TABLES: dict[str, Table] = {
    "teable": table_of(teable.TYPES),
    "nebulablock": {(Transaction.CHARGE, category): (f"{category}_amount",) for category in USAGE_CATEGORIES},
    "spacebring": table_of(spacebring.TYPES),
    "dreadnode": table_of(dreadnode.TYPES),
}


def documented_table(vendor: str) -> Table:
    """The first table of a facade's page: `| KIND, KIND `category` | `type` ... |`."""
    text = (DOCUMENTS / f"{vendor}.md").read_text().partition("\n| transaction |")[2].partition("\n\n")[0]
    rows = re.findall(r"(?m)^\|(.*)\|(.*)\|$", text)
    table: Table = {}
    for transaction, types in rows[1:-1]:
        (category,) = re.findall(r"`(\w+)`", transaction)
        for kind in re.findall(r"\b[A-Z_]{5,}\b", transaction):
            assert (Transaction.Kind.Value(kind), category) not in table, f"{kind} {category} is repeated"
            table[Transaction.Kind.Value(kind), category] = tuple(re.findall(r"`(\w+)`", types))
    assert rows[-1] == (" any other kind or category ", " not shown ")
    return table


@pytest.mark.parametrize("vendor", TABLES)
def test_documented_table_equals_the_code(vendor: str) -> None:
    """The table of types in docs/facades equals the facade's."""
    assert documented_table(vendor) == TABLES[vendor]


@pytest.mark.parametrize("vendor", TYPES_OF_PAGES)
def test_table_has_every_type(vendor: str) -> None:
    """A facade's table has exactly the types of the vendor's page."""
    assert {name for names in TABLES[vendor].values() for name in names} == TYPES_OF_PAGES[vendor]


def values_of(body: Json, name: str) -> Iterator[str]:
    """The text values of a field in a body, at any depth."""
    if isinstance(body, list):
        for element in body:
            yield from values_of(element, name)
    elif isinstance(body, dict):
        for key, value in body.items():
            if key == name and isinstance(value, str):
                yield value
            yield from values_of(value, name)


@pytest.mark.parametrize(
    ("vendor", "name", "expected"),
    [
        ("teable", "sourceType", TYPES_OF_PAGES["teable"]),
        ("spacebring", "type", TYPES_OF_PAGES["spacebring"]),
        ("spacebring", "status", STATUSES_OF_SPACEBRING),
        ("dreadnode", "transaction_type", TYPES_OF_PAGES["dreadnode"]),
    ],
)
def test_exchanges_show_every_type(vendor: str, name: str, expected: set[str]) -> None:
    """The golden exchanges show exactly the documented types and statuses."""
    shown = {
        value
        for file in FILES
        if file.parent.name == vendor
        for exchange in read_exchanges(file)
        if exchange.status == 200 and exchange.body
        for value in values_of(read_json(exchange.body), name)
    }
    assert shown == expected
