"""Pages of rows with texts of maximum length are answered in full by every list."""

from __future__ import annotations

import uuid
from datetime import UTC
from typing import TypeVar

import pytest
from daybook.v1.account_pb2 import Account, Company, User
from daybook.v1.transaction_pb2 import Transaction, Usage
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

from server.transport.validation import CHARACTERS_MAX
from tests.support.callers import NativeCaller
from tests.support.demo import DREADNODE, TEABLE, Network, get, make_network
from tests.support.http_client import Json
from tests.support.processes import Daybook

ROWS = 100
# A character of four bytes, the longest in UTF-8.
WIDE = "🪚"

_Filled = TypeVar("_Filled", bound=Message)


def filled(message: _Filled) -> _Filled:
    """Fills the empty texts of a message to their maximum length; returns the message."""
    for name, characters in CHARACTERS_MAX[message.DESCRIPTOR.full_name].items():
        if not getattr(message, name):
            setattr(message, name, WIDE * characters)
    return message


def metadata() -> Struct:
    """Metadata of nearly the maximum size."""
    struct = Struct()
    struct.update({"saw": WIDE * 2000})
    return struct


@pytest.fixture(scope="module")
def network(gateway: Daybook) -> Network:
    """A network without transactions."""
    return make_network(gateway)


def pages_of(network: Network, location: str) -> list[list[Json]]:
    """A location's transactions, page by page."""
    pages: list[list[Json]] = []
    token: Json = ""
    while token is not None:
        more = f"&nextPageToken={token}" if token else ""
        target = f"/transactions/credits/v1?limit={ROWS}&locationRef={location}{more}"
        body = get(network.gateway, network.key, target, **{"spacebring-network-id": network.uid})
        assert isinstance(body, dict)
        rows = body["transactions"]
        assert isinstance(rows, list)
        pages.append(rows)
        token = body.get("nextPageToken")
    return pages


@pytest.mark.parametrize("is_long", [False, True], ids=["company", "company and row"])
def test_spacebring_shortens_large_pages(network: Network, native: NativeCaller, is_long: bool) -> None:
    """100 rows with large companies are listed completely, on shorter pages if an answer would be too large."""
    profile = Company(business_address=filled(Company.Address(country_code="NL")), metadata=metadata())
    company = native.create_account(network.key, Account.COMPANY, company=filled(profile))
    native.post(network.key, company, Transaction.GRANT, "credit_package", str(ROWS))
    labels = {"location": str(uuid.uuid4()), "company": company}
    details = {"owner": filled(User()), "description": WIDE * 512} if is_long else {}
    posted = [
        native.post(network.key, company, Transaction.CHARGE, "order", "-1", labels=labels, **details).uid
        for _ in range(ROWS)
    ]
    pages = pages_of(network, labels["location"])
    rows = [row for page in pages for row in page if isinstance(row, dict)]
    assert [row["id"] for row in rows] == posted[::-1]
    assert len(pages) > 1
    assert isinstance(rows[0]["company"], dict)
    assert rows[0]["company"]["notes"] == WIDE * 4096
    if is_long:
        assert isinstance(rows[0]["userOwner"], dict)
        assert rows[0]["userOwner"]["about"] == WIDE * 2048


def test_teable_shows_long_texts(gateway: Daybook, native: NativeCaller) -> None:
    """A page of 100 records shows its texts in full."""
    space = native.create_account(TEABLE)
    native.post(TEABLE, space, Transaction.GRANT, "purchase", str(ROWS))
    charge = {"creator": filled(User()), "description": WIDE * 1024}
    posted = [native.post(TEABLE, space, Transaction.CHARGE, "ai_chat", "-1", **charge) for _ in range(ROWS)]
    month = posted[0].create_time.ToDatetime(UTC).strftime("%Y-%m")
    body = get(gateway, TEABLE, f"/api/space/{space}/billing/credit-history?month={month}&take={ROWS}")
    assert isinstance(body, dict)
    assert isinstance(body["data"], list)
    newest = body["data"][0]
    assert isinstance(newest, dict)
    assert newest["displayName"] == WIDE * 1024
    user = {"id": WIDE * 128, "name": f"{WIDE * 255} {WIDE * 255}", "avatar": WIDE * 2048}
    assert newest["user"] == user


def test_dreadnode_keeps_the_limit_for_long_rows(gateway: Daybook, native: NativeCaller) -> None:
    """A page of long rows has as many as the limit, since the list has no next page."""
    organization = native.create_account(DREADNODE)
    native.post(DREADNODE, organization, Transaction.GRANT, "bonus", str(ROWS))
    charge = {"creator": filled(User()), "description": WIDE * 1024, "usage": filled(Usage()), "metadata": metadata()}
    for _ in range(ROWS):
        native.post(DREADNODE, organization, Transaction.CHARGE, "usage", "-1", **charge)
    rows = get(gateway, DREADNODE, f"/api/v1/org/{organization}/credits/transactions?limit={ROWS}")
    assert isinstance(rows, list)
    assert len(rows) == ROWS
    assert all(isinstance(row, dict) and row["model"] == WIDE * 255 for row in rows)
