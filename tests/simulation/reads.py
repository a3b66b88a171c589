"""What clients read. Each function is one action of a client, and checks what it has read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from daybook.facades.dreadnode.v1.credits_service_pb2 import (
    ListCreditTransactionsRequest,
    ListCreditTransactionsResponse,
)
from daybook.facades.nebulablock.v1.users_service_pb2 import GetCreditsHistoryRequest, GetCreditsHistoryResponse
from daybook.facades.paged.v1.statements_service_pb2 import (
    ListAccountTransactionsRequest,
    ListAccountTransactionsResponse,
)
from daybook.facades.spacebring.v1.transactions_service_pb2 import (
    GetCreditsTransactionsRequest,
    GetCreditsTransactionsResponse,
)
from daybook.facades.teable.v1.billing_service_pb2 import GetSpaceCreditHistoryRequest, GetSpaceCreditHistoryResponse
from daybook.v1.account_pb2 import Balance
from daybook.v1.admin_service_pb2 import (
    ListApiKeysRequest,
    ListApiKeysResponse,
    VerifyAccountsRequest,
    VerifyAccountsResponse,
)
from daybook.v1.ledger_service_pb2 import (
    ExportTransactionsRequest,
    ExportTransactionsResponse,
    GetBalanceRequest,
    GetTransactionRequest,
    ListAccountsRequest,
    ListAccountsResponse,
    ListLotsRequest,
    ListLotsResponse,
    ListTransactionsRequest,
    ListTransactionsResponse,
)
from daybook.v1.transaction_pb2 import Transaction

from server.facades import dreadnode, spacebring, teable
from server.ledger import money
from server.ledger.instants import HOUR, Instant
from server.ledger.usage import USAGE_CATEGORIES
from tests.simulation.books import HOUR_ANCHOR, Row, Violation
from tests.simulation.client import CASH_KEY, Client, Refused
from tests.simulation.writes import CHARGE, GRANT

FILTERS: dict[str, Callable[[Row], bool]] = {
    "": lambda _: True,
    'kind = "CHARGE"': lambda row: row.kind == CHARGE,
    'kind = "GRANT" AND category = "ai_chat"': lambda row: row.kind == GRANT and row.category == "ai_chat",
    'category = "booking" OR category = "ai_chat"': lambda row: row.category in ("booking", "ai_chat"),
    "state = FAILED": lambda row: row.state == Transaction.FAILED,
}
MONTH = "2024-10"
"""The month in which simulations take place."""


async def get_balance(client: Client) -> None:
    """The balance is that of some time during the call."""
    account, start = client.pick_account(), client.world.now
    answer = await client.read("Ledger", "GetBalance", GetBalanceRequest(name=f"accounts/{account}/balance"))
    client.world.model.check_balance(account, Balance.FromString(answer), start, client.world.now)


async def get_transaction(client: Client) -> None:
    """A transaction never changes."""
    if rows := client.world.model.accounts[client.pick_account()].rows:
        row = client.random.choice(rows)
        if await client.read("Ledger", "GetTransaction", GetTransactionRequest(name=row.message.name)) != row.body:
            raise Violation(f"{row.message.name} has changed")


def _books_since(client: Client, account: str, start: Instant) -> Iterator[list[Row]]:
    """The rows of an account, newest first, at each time since `start`."""
    books = client.world.model.accounts[account]
    for version in books.versions_between(start, client.world.now):
        yield books.rows[: version.sequence][::-1]


def _require(shown: list[Any], what: str, expected: list[list[Any]]) -> None:
    """Raises Violation unless a client was shown one of the expected answers."""
    if shown not in expected:
        raise Violation(f"{what} is {shown}, and should be one of {expected}")


async def get_first_page(client: Client) -> None:
    """The first page of a list, which servers cache, is that of some time during the call."""
    account, start = client.pick_account(), client.world.now
    request = ListTransactionsRequest(parent=f"accounts/{account}", page_size=2)
    page = ListTransactionsResponse.FromString(await client.read("Ledger", "ListTransactions", request))
    expected = [[row.sequence for row in rows[:2]] for rows in _books_since(client, account, start)]
    _require([each.sequence for each in page.transactions], f"the first page of {account}", expected)


async def export_transactions(client: Client) -> None:
    """An export has the transactions of some time during the call, and no later ones."""
    account, start = client.pick_account(), client.world.now
    request = ExportTransactionsRequest(parent=f"accounts/{account}", order_by="create_time")
    export = ExportTransactionsResponse.FromString(await client.read("Ledger", "ExportTransactions", request))
    expected = [[row.sequence for row in reversed(rows)] for rows in _books_since(client, account, start)]
    _require([each.sequence for each in export.transactions], f"the export of {account}", expected)


async def get_newest_for_dreadnode(client: Client) -> None:
    """Dreadnode's one list has the newest transactions of some time during the call."""
    account, start, limit = client.pick_account(), client.world.now, client.random.choice((1, 2, 7))
    request = ListCreditTransactionsRequest(org=account, limit=str(limit))
    answer = await client.read("Dreadnode", "ListCreditTransactions", request)
    listed = [
        [row for row in rows if (row.kind, row.category) in dreadnode.TYPES and row.state == Transaction.SUCCEEDED]
        for rows in _books_since(client, account, start)
    ]
    shown = [each.id for each in ListCreditTransactionsResponse.FromString(answer).transactions]
    _require(shown, f"Dreadnode's list of {account}", [[row.message.uid for row in rows[:limit]] for rows in listed])


async def audit(client: Client) -> None:
    """An audit finds nothing, also while others post."""
    try:
        answer = await client.read("Admin", "VerifyAccounts", VerifyAccountsRequest())
    except Refused as refusal:
        if refusal.reason != "TOO_BUSY":
            raise
        return
    if VerifyAccountsResponse.FromString(answer).progress.finding_count:
        raise Violation(f"the audit of a client ends with {VerifyAccountsResponse.FromString(answer)}")


@dataclass(frozen=True)
class Listing:
    """A list, and how its pages are requested and read."""

    service: str
    method: str
    request: Any
    """The request of the first page, without its size."""
    response: Any
    """The class of the answer."""
    rows: str
    """The field of the answer that has the rows."""
    key: Callable[[Any], Any]
    """What identifies a row."""
    names: tuple[str, str, str] = ("page_size", "page_token", "next_page_token")
    """The fields for the size and the token of the request, and for the token of the answer."""
    other: Any = None
    """A request for another list, which must refuse the tokens of this one."""


async def _walk(
    client: Client, listing: Listing, belonging: Callable[[], set[Any]], *, knows_all: bool = True
) -> list[Any]:
    """Reads all pages while others post, each from any server; gives the rows.

    `belonging` identifies the rows that belong to the list now. Those of the begin are each read exactly once, and no
    others than those of the end, if `belonging` knows all rows.
    """
    expected = belonging()
    size_name, token_name, next_name = listing.names
    as_size = int if size_name == "page_size" else str
    size = client.random.choice((1, 2, 3, 7))
    rows: list[Any] = []
    token = ""
    while True:
        request = type(listing.request)()
        request.CopyFrom(listing.request)
        setattr(request, size_name, as_size(size))
        if token:
            setattr(request, token_name, token)
            await _try_elsewhere(client, listing, token)
        page = listing.response.FromString(await client.read(listing.service, listing.method, request))
        rows += getattr(page, listing.rows)
        found = getattr(page, next_name)
        token = found if isinstance(found, str) else found.string_value
        if not token:
            break
        if client.random.random() < 0.3:
            size = client.random.choice((1, 2, 3, 7))
            await client.rest()
    name = f"{listing.method} of {str(listing.request)!r}"
    keys = list(map(listing.key, rows))
    if len(set(keys)) < len(keys):
        raise Violation(f"{name} shows a row twice")
    if missing := expected - set(keys):
        raise Violation(f"{name} does not show {len(missing)} of {len(expected)} rows, like {min(missing)!r}")
    if knows_all and (wrong := set(keys) - belonging()):
        raise Violation(f"{name} shows rows that are not its own, like {min(wrong)!r}")
    return rows


async def _try_elsewhere(client: Client, listing: Listing, token: str) -> None:
    """At times uses a page token for another list, which must refuse it."""
    if listing.other is None or client.random.random() > 0.3:
        return
    listing.other.page_token = token
    try:
        await client.read(listing.service, listing.method, listing.other)
    except Refused as refusal:
        if refusal.reason == "PAGE_TOKEN_MISMATCH":
            return
        raise
    raise Violation(f"a page token of {str(listing.request)!r} opens {str(listing.other)!r}")


def _rows(client: Client, account: str, selects: Callable[[Row], bool]) -> list[Row]:
    """The rows of an account, or of all accounts for "-"."""
    accounts = client.world.model.accounts
    return [row for each in accounts.values() if account in ("-", each.id) for row in each.rows if selects(row)]


async def list_transactions(client: Client) -> None:
    """Lists transactions of one account or of all, in one of the orders and with one of the filters."""
    random = client.random
    account = random.choice((client.pick_account(), client.pick_account(), "-"))
    criteria = random.choice(tuple(FILTERS))
    order = random.choice(
        ("", "create_time", "create_time desc", *(("amount", "amount desc") if account != "-" else ()))
    )
    request = ListTransactionsRequest(parent=f"accounts/{account}", filter=criteria, order_by=order)
    other = ListTransactionsRequest(parent=request.parent, filter=criteria, order_by=order)
    if random.random() < 0.5:
        other.parent = f"accounts/{'cash' if account != 'cash' else 'small'}"
    else:
        other.filter = random.choice([each for each in FILTERS if each != criteria])
    listing = Listing(
        "Ledger",
        "ListTransactions",
        request,
        ListTransactionsResponse,
        "transactions",
        lambda row: row.SerializeToString(deterministic=True),
        other=other,
    )
    found = await _walk(client, listing, lambda: {row.body for row in _rows(client, account, FILTERS[criteria])})
    keys = [money.parse(row.amount) if "amount" in order else row.create_time.ToNanoseconds() for row in found]
    if keys != sorted(keys, reverse=order in ("", "create_time desc", "amount desc")):
        raise Violation(f"a list by {order!r} is not in its order")


async def list_for_teable(client: Client) -> None:
    """Lists charges through the API of Teable."""
    account = client.pick_account()
    by, direction = client.random.choice(tuple(teable.ORDERS_BY)), client.random.choice(teable.ORDERS)
    listing = Listing(
        "Teable",
        "GetSpaceCreditHistory",
        GetSpaceCreditHistoryRequest(space_id=account, month=MONTH, order_by=by, order=direction),
        GetSpaceCreditHistoryResponse,
        "data",
        lambda row: row.id,
        ("take", "cursor", "next_cursor"),
    )

    def is_listed(row: Row) -> bool:
        return (row.kind, row.category) in teable.TYPES and row.state == Transaction.SUCCEEDED

    await _walk(client, listing, lambda: {row.message.uid for row in _rows(client, account, is_listed)})


async def list_for_spacebring(client: Client) -> None:
    """Lists transactions of all accounts through the API of Spacebring."""
    listing = Listing(
        "Spacebring",
        "GetCreditsTransactions",
        GetCreditsTransactionsRequest(),
        GetCreditsTransactionsResponse,
        "transactions",
        lambda row: row.id,
        ("limit", "next_page_token", "next_page_token"),
    )

    def is_listed(row: Row) -> bool:
        return (row.kind, row.category) in spacebring.TYPES

    await _walk(client, listing, lambda: {row.message.uid for row in _rows(client, "-", is_listed)})


async def list_for_paged(client: Client) -> None:
    """Reads pages by their numbers while others post. Each is right at some time, and no row is missed."""
    account, size, number = client.pick_account(), client.random.choice((1, 2, 3, 7)), 1
    missed = {row.message.uid for row in client.world.model.accounts[account].rows}
    has_next = True
    while has_next:
        start, first = client.world.now, size * (number - 1)
        request = ListAccountTransactionsRequest(account=account, page=str(number), page_size=str(size))
        answer = await client.read("Paged", "ListAccountTransactions", request)
        page = ListAccountTransactionsResponse.FromString(answer)
        shown = [each.id for each in page.results]
        expected = [
            [len(rows), *(row.message.uid for row in rows[first : first + size])]
            for rows in _books_since(client, account, start)
        ]
        _require([page.count, *shown], f"page {number} of {account}", expected)
        missed -= set(shown)
        number, has_next = number + 1, bool(page.next.string_value)
        await client.rest()
    if missed:
        raise Violation(f"the pages of {account} do not show {len(missed)} rows, like {min(missed)}")


def _hours(rows: list[Row]) -> list[tuple[Any, ...]]:
    """The usage of each hour that has some, newest first, as Nebula Block shows it."""
    hours: dict[Instant, list[int]] = {}
    for row in rows:
        if row.kind == CHARGE and row.category in USAGE_CATEGORIES and row.state == Transaction.SUCCEEDED:
            start = (row.create_time - HOUR_ANCHOR) // HOUR
            hours.setdefault(start, [0, 0])[USAGE_CATEGORIES.index(row.category)] -= row.amount
    return [tuple(amount / 1_000_000 for amount in amounts) for amounts in hours.values()]


async def list_for_nebulablock(client: Client) -> None:
    """Reads the hours of an account by their offsets. Each page is right at some time."""
    offset, total = 0, 1
    while offset < total:
        start, limit = client.world.now, client.random.choice((1, 2))
        request = GetCreditsHistoryRequest(limit=str(limit), offset=str(offset))
        answer = await client.read("NebulaBlock", "GetCreditsHistory", request, CASH_KEY)
        data = GetCreditsHistoryResponse.FromString(answer).data
        shown = [(each.computing_amount, each.serverless_amount) for each in data.credit_history]
        hours = [_hours(rows) for rows in _books_since(client, "cash", start)]
        expected = [[len(each), *each[offset : offset + limit]] for each in hours]
        _require([data.total_credit_histories, *shown], f"offset {offset} of Nebula Block's list", expected)
        offset, total = offset + limit, data.total_credit_histories
        await client.rest()


async def list_lots(client: Client) -> None:
    """Lists the lots of an account."""
    account = client.pick_account()
    request = ListLotsRequest(parent=f"accounts/{account}")
    listing = Listing("Ledger", "ListLots", request, ListLotsResponse, "lots", lambda row: row.name)
    books = client.world.model.accounts[account]
    await _walk(client, listing, lambda: {f"accounts/{account}/lots/{lot.number}" for lot in books.lots})


async def list_accounts(client: Client) -> None:
    """Lists the accounts."""
    listing = Listing(
        "Ledger", "ListAccounts", ListAccountsRequest(), ListAccountsResponse, "accounts", lambda row: row.name
    )
    await _walk(client, listing, lambda: {f"accounts/{each}" for each in client.world.model.accounts})


async def list_keys(client: Client) -> None:
    """Lists the API keys."""
    listing = Listing(
        "Admin", "ListApiKeys", ListApiKeysRequest(), ListApiKeysResponse, "api_keys", lambda row: row.name
    )
    # A key whose creation was not answered is listed, too.
    await _walk(client, listing, lambda: {key.name for key in client.world.keys}, knows_all=False)


READS = (
    (get_balance, 2),
    (get_transaction, 1),
    (get_first_page, 3),
    (export_transactions, 1),
    (get_newest_for_dreadnode, 1),
    (audit, 1),
    (list_transactions, 3),
    (list_for_teable, 1),
    (list_for_spacebring, 1),
    (list_for_paged, 1),
    (list_for_nebulablock, 1),
    (list_lots, 1),
    (list_accounts, 1),
    (list_keys, 1),
)
"""Each action, with its weight."""
