"""Figures 1 to 3: pages under mixed traffic, compared with the ceiling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

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
from daybook.v1.ledger_service_pb2 import CreateTransactionRequest, ListTransactionsRequest, ListTransactionsResponse
from google.protobuf.message import Message

from bench.calls import CREATE, LIST, PAGE_SIZE, Call, answer_each, list_call, read_page
from bench.comparison import Compared
from bench.ledger import (
    COMPANIES,
    MONTH,
    NETWORK,
    ORGANIZATION,
    ORGANIZATIONS,
    SPACES,
    USERS,
    Ledger,
    Pool,
)
from bench.load import LoadFailed, framed_size
from bench.report import Bar, Finding, at_least
from bench.servers import Server, ceiling, daybook
from bench.stage import Stage
from bench.traffic import Mix, Traffic

_LIMIT = str(PAGE_SIZE)


@dataclass(frozen=True, slots=True)
class PagedList:
    """A list of the native API or of a facade, over the accounts of a pool."""

    name: str
    method: str
    pool: Pool
    """The accounts that the lists read and the commits charge."""
    request: Callable[[str, str], Message]
    """Returns the request for a page of PAGE_SIZE rows, by account and place; the place is empty for the first page."""
    read: Callable[[bytes], tuple[int, str]]
    """Returns the number of rows of a first page and the place of the second page, empty if there is none."""
    is_of_tenant: bool = False
    """Whether the list has the rows of all accounts of the tenant."""
    headers: Mapping[str, str] = field(default_factory=dict)

    def keys(self, ledger: Ledger) -> list[str]:
        """Returns the API key for the list of each account."""
        if self.pool is USERS:
            return list(ledger.user_keys)
        return [self.tenant_key(ledger)] * ledger.pool_size

    def tenant_key(self, ledger: Ledger) -> str:
        """Returns the API key that is valid for all accounts."""
        return ledger.network_key if self.pool is COMPANIES else ledger.key

    def calls(self, server: Server, ledger: Ledger) -> list[list[Call]]:
        """Returns for each account the calls for its first and second page. Raises LoadFailed unless both are full."""
        accounts = list(zip(self.pool.account_ids(ledger.pool_size), self.keys(ledger), strict=True))
        if self.is_of_tenant:
            accounts = accounts[:1]
        firsts = [self._call(account_id, "", key) for account_id, key in accounts]
        places = [self._read_full(answer) for answer in answer_each(server.port, firsts)]
        if not any(places):
            return [[first] for first in firsts]
        if not all(places):
            raise LoadFailed(f"{self.name} has a first page without a second one")
        seconds = [
            self._call(account_id, place, key) for (account_id, key), place in zip(accounts, places, strict=True)
        ]
        for answer in answer_each(server.port, seconds):
            self._read_full(answer)
        return [[first, second] for first, second in zip(firsts, seconds, strict=True)]

    def commits(self, ledger: Ledger) -> list[list[Call]]:
        """Returns for each account a call that charges it, without a request_id, so that each repetition posts."""
        return [
            [
                Call.of(
                    CREATE,
                    CreateTransactionRequest(
                        parent=f"accounts/{account_id}", transaction=self.pool.event(account_id, number)
                    ),
                    key=self.tenant_key(ledger),
                )
            ]
            for number, account_id in enumerate(self.pool.account_ids(ledger.pool_size))
        ]

    def _call(self, account_id: str, place: str, key: str) -> Call:
        return Call.of(self.method, self.request(account_id, place), key=key, **self.headers)

    def _read_full(self, answer: bytes) -> str:
        rows, place = self.read(answer)
        if rows != PAGE_SIZE:
            raise LoadFailed(f"{self.name} shows {rows} rows and not {PAGE_SIZE}")
        return place


def _read_native(answer: bytes) -> tuple[int, str]:
    page = ListTransactionsResponse.FromString(answer)
    return len(page.transactions), page.next_page_token


def _read_teable(answer: bytes) -> tuple[int, str]:
    page = GetSpaceCreditHistoryResponse.FromString(answer)
    return len(page.data), page.next_cursor.string_value


def _read_nebulablock(answer: bytes) -> tuple[int, str]:
    return len(GetCreditsHistoryResponse.FromString(answer).data.credit_history), _LIMIT


def _read_spacebring(answer: bytes) -> tuple[int, str]:
    page = GetCreditsTransactionsResponse.FromString(answer)
    return len(page.transactions), page.next_page_token


def _read_dreadnode(answer: bytes) -> tuple[int, str]:
    return len(ListCreditTransactionsResponse.FromString(answer).transactions), ""


def _read_paged(answer: bytes) -> tuple[int, str]:
    return len(ListAccountTransactionsResponse.FromString(answer).results), "2"


NATIVE = PagedList(
    "native list",
    LIST,
    ORGANIZATIONS,
    lambda account_id, place: ListTransactionsRequest(
        parent=f"accounts/{account_id}", page_size=PAGE_SIZE, page_token=place
    ),
    _read_native,
)
FACADES = (
    PagedList(
        "teable",
        "daybook.facades.teable.v1.Billing/GetSpaceCreditHistory",
        SPACES,
        lambda account_id, place: GetSpaceCreditHistoryRequest(
            space_id=account_id, month=MONTH, take=_LIMIT, cursor=place or None
        ),
        _read_teable,
    ),
    PagedList(
        "nebulablock",
        "daybook.facades.nebulablock.v1.Users/GetCreditsHistory",
        USERS,
        lambda _account_id, place: GetCreditsHistoryRequest(limit=_LIMIT, offset=place or None),
        _read_nebulablock,
    ),
    PagedList(
        "spacebring",
        "daybook.facades.spacebring.v1.Transactions/GetCreditsTransactions",
        COMPANIES,
        lambda _account_id, place: GetCreditsTransactionsRequest(limit=_LIMIT, next_page_token=place or None),
        _read_spacebring,
        is_of_tenant=True,
        headers={"spacebring_network_id": NETWORK},
    ),
    PagedList(
        "dreadnode",
        "daybook.facades.dreadnode.v1.Credits/ListCreditTransactions",
        ORGANIZATIONS,
        lambda account_id, _place: ListCreditTransactionsRequest(org=account_id, limit=_LIMIT),
        _read_dreadnode,
    ),
    PagedList(
        "paged",
        "daybook.facades.paged.v1.Statements/ListAccountTransactions",
        ORGANIZATIONS,
        lambda account_id, place: ListAccountTransactionsRequest(
            account=account_id, page_size=_LIMIT, page=place or None
        ),
        _read_paged,
    ),
)


def sqlite(stage: Stage) -> list[Finding]:
    """Measures figure 1."""
    return _native(stage, 1, "SQLite", stage.sqlite, at_least(0.5))


def postgresql(stage: Stage) -> list[Finding]:
    """Measures figure 2."""
    return _native(stage, 2, "PostgreSQL", stage.postgresql, at_least(0.3))


def _native(stage: Stage, number: int, engine: str, ledger: Ledger, bar: Bar) -> list[Finding]:
    with daybook(ledger.database_url) as server:
        same = list_call(ledger.key, ORGANIZATION)
        (page,) = same.answers(server.port)
        read_page(page)
        return [
            _mixed_to_ceiling(stage, number, f"native list, {engine}", server, ledger, NATIVE, page, bar),
            _same_to_ceiling(stage, number, f"one page, no commits, {engine}", server, same, page),
        ]


def facades(stage: Stage) -> list[Finding]:
    """Measures figure 3 for each facade. The ceiling returns a native page."""
    ledger = stage.sqlite
    with daybook(ledger.database_url) as server:
        (page,) = list_call(ledger.key, ORGANIZATION).answers(server.port)
        return [_mixed_to_ceiling(stage, 3, each.name, server, ledger, each, page, at_least(0.28)) for each in FACADES]


def _mixed_to_ceiling(
    stage: Stage, number: int, what: str, server: Server, ledger: Ledger, listed: PagedList, page: bytes, bar: Bar
) -> Finding:
    calls = listed.calls(server, ledger)
    traffic = Traffic(Mix.by_zipf(calls), Mix.by_zipf(listed.commits(ledger)))
    size = framed_size(calls[0][0].answers(server.port)[0])
    with ceiling(page) as bare:
        compared = stage.compare(
            lambda: traffic.rate(server.port, stage.seconds, size),
            lambda: traffic.rate(bare.port, stage.seconds, framed_size(page)),
        )
    # All pages must still be full after the commits.
    listed.calls(server, ledger)
    return _finding(number, what, compared, bar)


def _same_to_ceiling(stage: Stage, number: int, what: str, server: Server, call: Call, page: bytes) -> Finding:
    with ceiling(page) as bare:
        compared = stage.compare(
            lambda: call.rate_of_same(server.port, stage.seconds, [page]),
            lambda: call.rate_of_same(bare.port, stage.seconds, [page]),
        )
    (last,) = call.answers(server.port)
    if read_page(last).transactions != read_page(page).transactions:
        raise LoadFailed(f"{call.method} has another answer after the load")
    return _finding(number, what, compared, None)


def _finding(number: int, what: str, compared: Compared, bar: Bar | None) -> Finding:
    sides = {"daybook/s": compared.above, "ceiling/s": compared.below}
    return Finding(number, what, compared.ratio, "", bar, compared.spread, sides)
