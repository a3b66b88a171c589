"""Accounts over the wire, as account.proto and ledger_service.proto document them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from daybook.v1.account_pb2 import Account, Balance, Company, User
from daybook.v1.ledger_service_pb2 import (
    GetAccountRequest,
    GetBalanceRequest,
    ListAccountsRequest,
    UpdateAccountRequest,
)
from daybook.v1.transaction_pb2 import Transaction
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from server.caching import ENTRY_BYTES, ByteLRU
from server.ledger.instants import to_timestamp
from tests.support.callers import Client, Server
from tests.support.clock import NOON, Clock
from tests.support.markers import only_sqlite, shares_a_server
from tests.support.refusals import refusal_of

PERSON = User(id="u-1", name="Ada", surname="Lovelace", email="ada@example.com", membership="m-1")
COMPANY = Company(
    title="Acme",
    business_address=Company.Address(line1="1 Main Street", country_code="US"),
    expiring_day_passes=0,
    metadata=Struct(),
    create_time=Timestamp(seconds=1),
)


async def get(client: Client, account_id: str) -> Account:
    """The account as it is now."""
    return await client.ledger.GetAccount(GetAccountRequest(name=f"accounts/{account_id}"), metadata=client.metadata)


async def balance(client: Client, account_id: str) -> Balance:
    """The account's balance."""
    return await client.ledger.GetBalance(
        GetBalanceRequest(name=f"accounts/{account_id}/balance"), metadata=client.metadata
    )


async def update(client: Client, account: Account, paths: list[str] | None = None) -> Account:
    """Updates an account; without paths the mask is unset."""
    mask = None if paths is None else FieldMask(paths=paths)
    return await client.ledger.UpdateAccount(
        UpdateAccountRequest(account=account, update_mask=mask), metadata=client.metadata
    )


async def list_pages(client: Client, page_size: int) -> list[list[str]]:
    """The names of all accounts, page by page."""
    pages: list[list[str]] = []
    token = ""
    while not pages or token:
        page = await client.ledger.ListAccounts(
            ListAccountsRequest(page_size=page_size, page_token=token), metadata=client.metadata
        )
        pages.append([account.name for account in page.accounts])
        token = page.next_page_token
    return pages


async def test_new_account(client: Client) -> None:
    """A new account has the given fields, and Daybook sets the output-only fields."""
    created = await client.create_account(
        "acme", kind=Account.COMPANY, display_name="Acme Ltd", credit_limit="5.50", company=COMPANY
    )
    assert created == Account(
        name="accounts/acme",
        number=created.number,
        kind=Account.COMPANY,
        display_name="Acme Ltd",
        credit_limit="5.5",
        hour_anchor_time=to_timestamp(NOON),
        create_time=to_timestamp(NOON),
        update_time=to_timestamp(NOON),
        etag=created.etag,
        company=COMPANY,
    )
    assert created.number > 0
    assert created.etag
    assert await get(client, "acme") == created


@shares_a_server
@pytest.mark.parametrize(
    ("account_id", "accepted"),
    [
        ("a", True),
        ("Z", True),
        ("0", True),
        ("a" * 128, True),
        ("9_.-", True),
        ("a..b", True),
        ("", False),
        ("a" * 129, False),
        ("_a", False),
        (".a", False),
        ("-", False),
        ("-a", False),
        ("a/b", False),
        ("a b", False),
        ("a\n", False),
        ("a\0", False),
        ("é", False),
        ("٣", False),
        ("a:b", False),
    ],
)
async def test_account_id(shared_client: Client, account_id: str, accepted: bool) -> None:
    """An id has 1 to 128 letters, digits, `_`, `.` and `-`, the first a letter or a digit."""
    if accepted:
        created = await shared_client.create_account(account_id)
        assert created.name == f"accounts/{account_id}"
        assert await get(shared_client, account_id) == created
    else:
        refusal = await refusal_of(shared_client.create_account(account_id))
        assert (*refusal.verdict, *refusal.fields) == ("INVALID_ARGUMENT", "FIELD_INVALID", "account_id")


async def test_ids_are_case_sensitive(client: Client) -> None:
    """Ids that differ only by case are different accounts."""
    numbers = {(await client.create_account(account_id)).number for account_id in ("acme", "Acme", "ACME")}
    assert len(numbers) == 3
    assert (await get(client, "Acme")).name == "accounts/Acme"
    assert (await refusal_of(get(client, "aCME"))).verdict == ("NOT_FOUND", "ACCOUNT_NOT_FOUND")


async def test_number_cache_is_bounded(client: Client, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of account numbers evicts entries when full, and evicted accounts are still found."""
    size = ENTRY_BYTES + 5
    numbers: ByteLRU[tuple[int, str], int] = ByteLRU(2 * size, lambda key, _: len(key[1]))
    monkeypatch.setattr(server.book.account_store, "_numbers", numbers)
    names = ["one", "two", "three"]
    for name in names:
        await client.create_account(name)
        await client.post(name, Transaction.GRANT, "1")
    assert 0 < numbers.bytes <= 2 * size
    assert [len(await client.history(name)) for name in names] == [1, 1, 1]


async def test_duplicate_account_is_refused(client: Client) -> None:
    """Creating an account whose id exists gets ALREADY_EXISTS, and changes nothing."""
    created = await client.create_account("acme", display_name="first")
    refusal = await refusal_of(client.create_account("acme", display_name="second"))
    assert refusal.verdict == ("ALREADY_EXISTS", "ACCOUNT_EXISTS")
    assert refusal.metadata == {"account": "accounts/acme"}
    assert await get(client, "acme") == created


async def test_numbers_are_unique_across_tenants(server: Server) -> None:
    """Two tenants may use the same account id; the numbers of the accounts still differ."""
    numbers = set()
    for slug in ("one", "two"):
        tenant_client = await server.client(await server.create_tenant(slug))
        numbers.add((await tenant_client.create_account("acme")).number)
    assert len(numbers) == 2
    assert min(numbers) > 0


@shares_a_server
@pytest.mark.parametrize(
    ("kind", "accepted"),
    [(0, False), (1, True), (2, True), (3, True), (4, True), (5, True), (6, True), (7, False), (-1, False)],
)
async def test_kind(shared_client: Client, kind: int, accepted: bool) -> None:
    """Every kind of the contract is stored; an unset or unknown kind is refused."""
    account_id = f"of-kind-{kind}"
    if accepted:
        assert (await shared_client.create_account(account_id, kind=kind)).kind == kind
        assert (await get(shared_client, account_id)).kind == kind
    else:
        refusal = await refusal_of(shared_client.create_account(account_id, kind=kind))
        assert (*refusal.verdict, *refusal.fields) == ("INVALID_ARGUMENT", "FIELD_INVALID", "account.kind")


@pytest.mark.parametrize(
    "given",
    [
        {"name": "accounts/other"},
        {"number": 7_000_000},
        {"create_time": Timestamp(seconds=1)},
        {"update_time": Timestamp(seconds=1)},
        {"etag": "mine"},
    ],
    ids=lambda given: next(iter(given)),
)
@only_sqlite
async def test_new_account_refuses_output_only_fields(client: Client, given: dict[str, Any]) -> None:
    """A value in a field that only Daybook sets is refused, and no account is created."""
    refusal = await refusal_of(client.create_account("acme", **given))
    (field,) = given
    assert (*refusal.verdict, *refusal.fields) == ("INVALID_ARGUMENT", "FIELD_INVALID", f"account.{field}")
    assert (await refusal_of(get(client, "acme"))).verdict == ("NOT_FOUND", "ACCOUNT_NOT_FOUND")


@pytest.mark.parametrize("paths", [None, [], ["*"]])
async def test_read_account_can_be_sent_back(client: Client, clock: Clock, paths: list[str] | None) -> None:
    """A caller may read an account, change its mutable fields, and send all of it back."""
    read = await client.create_account("acme", kind=Account.USER, credit_limit="5", user=PERSON)
    clock.advance(60)
    read.display_name = "New"
    changed = await update(client, read, paths)
    assert (changed.display_name, changed.credit_limit, changed.user) == ("New", "5", PERSON)
    # A stale update_time is accepted, and equal values change nothing.
    read.etag = ""
    assert (await update(client, read, paths)).update_time == changed.update_time


@pytest.mark.parametrize("paths", [None, [], ["*"]])
@pytest.mark.parametrize(
    "given",
    [
        {"number": 9},
        {"kind": Account.COMPANY},
        {"hour_anchor_time": Timestamp()},
        {"create_time": Timestamp(seconds=1)},
    ],
    ids=lambda given: next(iter(given)),
)
@only_sqlite
async def test_update_of_an_immutable_field_is_refused(
    client: Client, given: dict[str, Any], paths: list[str] | None
) -> None:
    """An update of an immutable field is refused with the field's name, and changes no other field."""
    before = await client.create_account("acme", kind=Account.USER)
    refusal = await refusal_of(update(client, Account(name="accounts/acme", display_name="New", **given), paths))
    (field,) = given
    assert (*refusal.verdict, *refusal.fields) == ("INVALID_ARGUMENT", "FIELD_INVALID", f"account.{field}")
    assert await get(client, "acme") == before


@shares_a_server
@pytest.mark.parametrize(
    ("credit_limit", "stored"),
    [
        ("", "0"),
        ("0", "0"),
        ("-0", "0"),
        ("000000000005.500000", "5.5"),
        ("0.000001", "0.000001"),
        ("999999999999.999999", "999999999999.999999"),
        ("-0.000001", None),
        ("1000000000000", None),
        ("0.0000001", None),
        ("+1", None),
        ("1e3", None),
        (" 1", None),
        ("1\n", None),
        ("1,000", None),
        (".5", None),
        ("5.", None),
        ("٣", None),
        ("NaN", None),
    ],
)
async def test_credit_limit(
    shared_client: Client, request: pytest.FixtureRequest, credit_limit: str, stored: str | None
) -> None:
    """A credit limit is an exact decimal from 0 to 999999999999.999999, and empty means 0."""
    # Each case needs its own account.
    account_id = f"limit-{request.node.callspec.indices['credit_limit']}"
    if stored is not None:
        assert (await shared_client.create_account(account_id, credit_limit=credit_limit)).credit_limit == stored
        return
    for call in (
        shared_client.create_account(account_id, credit_limit=credit_limit),
        update(shared_client, Account(name="accounts/acme", credit_limit=credit_limit)),
    ):
        refusal = await refusal_of(call)
        assert (*refusal.verdict, *refusal.fields) == ("INVALID_ARGUMENT", "FIELD_INVALID", "account.credit_limit")
    assert (await get(shared_client, "acme")).credit_limit == "0"


async def test_largest_credit_limit_can_be_used(client: Client) -> None:
    """An account with the largest limit can be charged down to it, and no further."""
    await client.create_account("acme", credit_limit="999999999999.999999")
    charged = await client.post("acme", Transaction.CHARGE, "-999999999999.999999")
    assert charged.balance_after == "-999999999999.999999"
    assert (await balance(client, "acme")).available_amount == "0"
    refusal = await refusal_of(client.post("acme", Transaction.CHARGE, "-0.000001"))
    assert refusal.verdict == ("FAILED_PRECONDITION", "INSUFFICIENT_CREDITS")


async def test_lowered_credit_limit(client: Client) -> None:
    """A lowered limit changes no past charge; it only refuses further charges."""
    await client.create_account("acme", credit_limit="10")
    await client.post("acme", Transaction.CHARGE, "-8")
    await update(client, Account(name="accounts/acme"), ["credit_limit"])
    held = await balance(client, "acme")
    assert (held.amount, held.permanent_amount, held.available_amount) == ("-8", "-8", "0")
    refusal = await refusal_of(client.post("acme", Transaction.CHARGE, "-0.000001"))
    assert refusal.verdict == ("FAILED_PRECONDITION", "INSUFFICIENT_CREDITS")
    assert refusal.metadata["available_amount"] == "0"
    assert (await client.post("acme", Transaction.GRANT, "3")).balance_after == "-5"


@pytest.mark.parametrize(
    ("hour_anchor", "stored"),
    [
        (None, to_timestamp(NOON)),
        (Timestamp(), Timestamp()),
        (Timestamp(seconds=1_700_000_123, nanos=999_999_999), Timestamp(seconds=1_700_000_123)),
        (Timestamp(seconds=-2, nanos=500_000_000), Timestamp(seconds=-2)),
    ],
    ids=["unset", "1970", "fraction", "before-1970"],
)
async def test_hour_anchor(client: Client, clock: Clock, hour_anchor: Timestamp | None, stored: Timestamp) -> None:
    """An anchor is truncated to the second, 1970 included; if unset, it is the second of creation."""
    clock.advance(0.75)
    created = await client.create_account("acme", hour_anchor_time=hour_anchor)
    assert created.HasField("hour_anchor_time")
    assert created.hour_anchor_time == stored
    assert (await get(client, "acme")).hour_anchor_time == stored


@pytest.mark.parametrize("call", ["GetAccount", "UpdateAccount", "GetBalance"])
@only_sqlite
async def test_account_not_found(client: Client, call: str) -> None:
    """A call for an unknown account gets NOT_FOUND with the account's name."""
    await client.create_account("acme")
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "GetAccount": lambda: get(client, "unknown"),
        "UpdateAccount": lambda: update(client, Account(name="accounts/unknown", display_name="x")),
        "GetBalance": lambda: balance(client, "unknown"),
    }
    refusal = await refusal_of(calls[call]())
    assert refusal.verdict == ("NOT_FOUND", "ACCOUNT_NOT_FOUND")
    assert refusal.metadata == {"account": "accounts/unknown"}


OLD_FIELDS = {"display_name": "Old", "credit_limit": "5", "profile": PERSON}
"""The fields of the account of test_update_mask before the update."""


@only_sqlite
@pytest.mark.parametrize(
    ("paths", "sent", "changes"),
    [
        (None, {}, {}),
        (None, {"display_name": "New"}, {"display_name": "New"}),
        (None, {"display_name": ""}, {}),
        (None, {"credit_limit": "0"}, {"credit_limit": "0"}),
        (["credit_limit"], {"kind": Account.COMPANY, "number": 9, "credit_limit": "5"}, {}),
        # An empty mask is equivalent to none.
        ([], {"display_name": "New"}, {"display_name": "New"}),
        (None, {"company": COMPANY}, {"profile": COMPANY}),
        (["display_name"], {}, {"display_name": ""}),
        (
            ["display_name"],
            {"display_name": "New", "credit_limit": "9", "user": User(id="u-2")},
            {"display_name": "New"},
        ),
        (["credit_limit"], {}, {"credit_limit": "0"}),
        (
            ["credit_limit", "display_name"],
            {"display_name": "N", "credit_limit": "1.5"},
            {"display_name": "N", "credit_limit": "1.5"},
        ),
        (["user"], {}, {"profile": None}),
        (["user"], {"user": User(id="u-2")}, {"profile": User(id="u-2")}),
        (["company"], {"company": COMPANY}, {"profile": COMPANY}),
        (["company"], {}, {}),
        (["user", "company"], {}, {"profile": None}),
        (["*"], {"display_name": "New"}, {"display_name": "New", "credit_limit": "0", "profile": None}),
        (["*"], {"company": COMPANY}, {"display_name": "", "credit_limit": "0", "profile": COMPANY}),
    ],
)
async def test_update_mask(
    client: Client, clock: Clock, paths: list[str] | None, sent: dict[str, Any], changes: dict[str, object]
) -> None:
    """An update writes the fields of its mask and no others; update_time changes only if a field does."""
    before = await client.create_account("acme", kind=Account.USER, display_name="Old", credit_limit="5", user=PERSON)
    clock.advance(60)
    after = await update(client, Account(name="accounts/acme", **sent), paths)
    profile = after.WhichOneof("profile")
    assert {
        "display_name": after.display_name,
        "credit_limit": after.credit_limit,
        "profile": getattr(after, profile) if profile else None,
    } == {**OLD_FIELDS, **changes}
    assert (after.name, after.number, after.kind) == (before.name, before.number, before.kind)
    assert (after.create_time, after.hour_anchor_time) == (before.create_time, before.hour_anchor_time)
    assert after.update_time == (to_timestamp(clock.now) if changes else before.update_time)
    assert (after.etag != before.etag) == bool(changes)
    assert await get(client, "acme") == after


@shares_a_server
@pytest.mark.parametrize(
    ("paths", "field"),
    [
        (["name"], "update_mask"),
        (["kind"], "update_mask"),
        (["number"], "update_mask"),
        (["hour_anchor_time"], "update_mask"),
        (["etag"], "update_mask"),
        (["profile"], "update_mask"),
        (["user.name"], "update_mask"),
        (["display_name", "nonsense"], "update_mask"),
        ([""], "update_mask"),
        (["x" * 100_000], "update_mask"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_unknown_path_is_refused(shared_client: Client, paths: list[str], field: str) -> None:
    """Any other path in a mask gets INVALID_ARGUMENT, and nothing is written."""
    before = await get(shared_client, "acme")
    refusal = await refusal_of(update(shared_client, Account(name="accounts/acme", display_name="New"), paths))
    assert (*refusal.verdict, *refusal.fields) == ("INVALID_ARGUMENT", "FIELD_INVALID", field)
    assert len(refusal.message) < 1000, "a long path is not quoted in full"
    assert await get(shared_client, "acme") == before


@only_sqlite
async def test_update_with_equal_values_changes_nothing(client: Client, clock: Clock) -> None:
    """An update with equal values, however they are spelled, leaves the account unchanged."""
    before = await client.create_account("acme", display_name="Old", credit_limit="5", user=PERSON)
    clock.advance(60)
    after = await update(
        client, Account(name="accounts/acme", display_name="Old", credit_limit="05.00", user=PERSON), ["*"]
    )
    assert after == before
    assert await get(client, "acme") == before


@only_sqlite
async def test_transaction_leaves_the_account_unchanged(client: Client, clock: Clock) -> None:
    """A transaction changes the balance, not update_time or etag."""
    before = await client.create_account("acme")
    clock.advance(60)
    await client.post("acme", Transaction.GRANT, "1")
    assert await get(client, "acme") == before


async def test_etag(client: Client) -> None:
    """An update with the current etag succeeds, one with a stale etag is ABORTED and writes nothing."""
    first = await client.create_account("acme", display_name="one")
    second = await update(client, Account(name="accounts/acme", display_name="two", etag=first.etag))
    assert second.etag != first.etag
    refusal = await refusal_of(update(client, Account(name="accounts/acme", display_name="three", etag=first.etag)))
    assert refusal.verdict == ("ABORTED", "ETAG_MISMATCH")
    assert refusal.metadata == {"account": "accounts/acme"}
    assert await get(client, "acme") == second
    third = await update(client, Account(name="accounts/acme", display_name="three"))
    assert third.display_name == "three", "without an etag nothing is compared"


@only_sqlite
async def test_unknown_etag_is_refused(client: Client) -> None:
    """An etag that the account never had is refused even if the update would change nothing."""
    await client.create_account("acme", display_name="one")
    refusal = await refusal_of(update(client, Account(name="accounts/acme", display_name="one", etag="0" * 16)))
    assert refusal.verdict == ("ABORTED", "ETAG_MISMATCH")


@only_sqlite
@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"display_name": "other"}, True),
        ({"credit_limit": "0.000001"}, True),
        ({"user": User(id="u-2")}, True),
        ({"company": Company()}, True),
        ({"credit_limit": "0"}, False),
        ({"display_name": "Old"}, False),
    ],
)
async def test_etag_covers_every_field(client: Client, change: dict[str, Any], differs: bool) -> None:
    """The etag changes with each field that a caller can set, and only then."""
    before = await client.create_account("acme", display_name="Old")
    after = await update(client, Account(name="accounts/acme", **change))
    assert (after.etag != before.etag) == differs


async def test_new_balance(client: Client) -> None:
    """A new account has a balance of 0, at sequence 0."""
    await client.create_account("acme", credit_limit="2.5")
    assert await balance(client, "acme") == Balance(
        name="accounts/acme/balance",
        amount="0",
        expiring_amount="0",
        permanent_amount="0",
        available_amount="2.5",
        sequence=0,
        read_time=to_timestamp(NOON),
    )


async def test_balance(client: Client, clock: Clock) -> None:
    """The balance is the newest transaction's balance_after; the available amount adds the credit limit."""
    await client.create_account("acme", credit_limit="2.5")
    await client.create_account("other")
    await client.post("other", Transaction.GRANT, "1000")
    await client.post("acme", Transaction.GRANT, "10")
    clock.advance(1)
    newest = await client.post("acme", Transaction.CHARGE, "-11.000001")
    held = await balance(client, "acme")
    assert held.amount == held.permanent_amount == newest.balance_after == "-1.000001"
    assert held.available_amount == "1.499999"
    assert held.sequence == newest.sequence == 2
    assert held.read_time == to_timestamp(clock.now)


async def test_read_time_follows_a_clock_that_went_back(client: Client, clock: Clock) -> None:
    """If the clock went back, read_time is the clock's time, by which credits expire."""
    await client.create_account("acme")
    await client.post("acme", Transaction.GRANT, "10")
    clock.advance(-3600)
    held = await balance(client, "acme")
    assert (held.amount, held.read_time) == ("10", to_timestamp(clock.now))


IDS = ["B", "a", "b", "A", "a_", "a-", "a.", "aB", "ab", "Ab", "10", "9", "Zz", "z"]
"""Ids that no locale sorts by code point, since locales mix cases and skip punctuation."""
NAMES = [f"accounts/{account_id}" for account_id in sorted(IDS)]


@only_sqlite
@pytest.mark.parametrize(
    ("page_size", "page_lengths"),
    [
        (1, [1] * 14),
        (2, [2] * 7),
        (13, [13, 1]),
        (14, [14]),
        (15, [14]),
        (0, [14]),
        (2_147_483_647, [14]),
    ],
)
async def test_list_accounts(server: Server, page_size: int, page_lengths: list[int]) -> None:
    """All pages together have the tenant's accounts once each, by code point; only the last has no token."""
    client = await server.client(await server.create_tenant("house"))
    neighbour = await server.client(await server.create_tenant("neighbour"))
    await neighbour.create_account("aa")
    for account_id in IDS:
        await client.create_account(account_id)
    pages = await list_pages(client, page_size)
    assert [name for page in pages for name in page] == NAMES
    assert [len(page) for page in pages] == page_lengths


async def test_ids_sort_by_code_point(client: Client) -> None:
    """Accounts are listed by code point on every engine, also across pages."""
    for account_id in IDS:
        await client.create_account(account_id)
    assert [name for page in await list_pages(client, 3) for name in page] == NAMES


@only_sqlite
async def test_listed_account_is_complete(client: Client) -> None:
    """A list has the same message of an account as GetAccount."""
    await client.create_account("acme", display_name="Acme", credit_limit="1.5", company=COMPANY)
    page = await client.ledger.ListAccounts(ListAccountsRequest(), metadata=client.metadata)
    assert list(page.accounts) == [await get(client, "acme")]
    assert page.next_page_token == ""


@only_sqlite
async def test_no_accounts(client: Client) -> None:
    """A tenant without accounts gets an empty page."""
    assert await list_pages(client, 1) == [[]]


async def test_accounts_created_between_pages(client: Client) -> None:
    """Accounts created between pages neither repeat nor hide others."""
    for account_id in ("b", "d", "f"):
        await client.create_account(account_id)
    names: list[str] = []
    token = ""
    for newcomer in ("a", "e", "g"):
        page = await client.ledger.ListAccounts(
            ListAccountsRequest(page_size=1, page_token=token), metadata=client.metadata
        )
        names += [account.name for account in page.accounts]
        token = page.next_page_token
        await client.create_account(newcomer)
    page = await client.ledger.ListAccounts(
        ListAccountsRequest(page_size=1000, page_token=token), metadata=client.metadata
    )
    names += [account.name for account in page.accounts]
    assert names == [f"accounts/{account_id}" for account_id in ("b", "d", "e", "f", "g")]


@only_sqlite
async def test_default_page_size_of_accounts(client: Client) -> None:
    """A page has 50 accounts by default."""
    for number in range(51):
        await client.create_account(f"account-{number:02d}")
    assert [len(page) for page in await list_pages(client, 0)] == [50, 1]


@only_sqlite
async def test_negative_page_size_of_accounts(client: Client) -> None:
    """A negative page size is refused."""
    refusal = await refusal_of(client.ledger.ListAccounts(ListAccountsRequest(page_size=-1), metadata=client.metadata))
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.fields == ("page_size",)


@only_sqlite
async def test_long_accounts_make_short_pages(client: Client) -> None:
    """A page that would exceed the message size ends early, and the next one continues after it."""
    company = Company(notes="ж" * 4096, metadata=Struct())
    company.metadata.update({"note": "x" * 8000})
    ids = [f"long-{number:03}" for number in range(280)]
    for account_id in ids:
        await client.create_account(account_id, company=company)
    request = ListAccountsRequest(page_size=1000)
    pages = 0
    listed: list[str] = []
    while not pages or request.page_token:
        page = await client.ledger.ListAccounts(request, metadata=client.metadata)
        assert 0 < page.ByteSize() < 4_000_000
        listed += [each.name for each in page.accounts]
        pages += 1
        request.page_token = page.next_page_token
    assert pages == 3
    assert listed == [f"accounts/{each}" for each in ids]
