"""Every list of the native API and of the facades, called on its servicer in this process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from itertools import product
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
from daybook.v1.ledger_service_pb2 import (
    ListAccountsRequest,
    ListAccountsResponse,
    ListLotsRequest,
    ListLotsResponse,
    ListTransactionsRequest,
    ListTransactionsResponse,
)
from google.protobuf.message import Message

from server.book import Book
from server.facades import dreadnode, nebulablock, paged, spacebring, teable
from server.ledger.access import Caller
from server.ledger.instants import Instant, month_of, write
from server.ledger.names import ALL_ACCOUNTS
from server.rpc.ledger import Ledger
from server.seed.load import HOT_ACCOUNT
from server.store.tables import LABELS
from server.transport.auth import Authentication, Scheme, authentication
from server.transport.page_tokens import PageTokens
from server.transport.token_keys import KEY_BYTES, ConfiguredTokenKeys
from server.transport.validation import PAGE_SIZE_MAX, Sizes

FACADE_PAGE_SIZE_MAX = 100


class _Context:
    """The part of a gRPC context that servicers use."""

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """Returns no headers; the facades need none with X-API-Key."""
        return ()


_CONTEXT: Any = _Context()


@dataclass(frozen=True, slots=True)
class List:
    """A list method of a servicer, with its arguments."""

    name: str
    call: Callable[[str, int], Awaitable[bytes]]
    """Gets a page by its place, a page token or an offset that is empty at the start, and its number of rows."""
    read: Callable[[bytes], tuple[int, str]]
    """Returns the number of rows of a page, and the next place, empty at the end, or with offsets the total of rows."""
    page_size_max: int = FACADE_PAGE_SIZE_MAX
    has_offsets: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """Values in rows of the tenant, for filters."""

    first_time: Instant
    last_time: Instant
    location: str
    membership: str
    company: str

    def time(self, part: float) -> Instant:
        """Returns the instant at a fraction of the history."""
        return self.first_time + int((self.last_time - self.first_time) * part)


def lists(book: Book, caller: Caller, sample: Sample) -> list[List]:
    """Returns all lists of a seeded tenant. Lists of one account read the account with the most rows."""
    tokens = PageTokens(ConfiguredTokenKeys([book.random_bytes(KEY_BYTES)]), book.random_bytes)
    ledger = Ledger(book.accounts, book.transactions, tokens, Sizes())
    authentication.set(Authentication(caller, Scheme.API_KEY))
    return [
        *_native(ledger, sample),
        *_teable(teable.Billing(book.transactions, tokens), sample),
        _nebulablock(nebulablock.Users(book.usage), caller),
        *_spacebring(spacebring.CreditsTransactions(book.transactions, tokens), sample),
        _dreadnode(dreadnode.Credits(book.transactions, book.accounts)),
        _paged(paged.Statements(book.transactions)),
    ]


def _native(ledger: Ledger, sample: Sample) -> list[List]:
    orders = ("", "create_time", "amount", "amount desc")
    of_account = (
        *product([(), ("times",), ("category = ai_chat",)], orders),
        (("category = ai_chat", "kind = CHARGE"), ""),
        *product([("kind = CHARGE",), ("kind = REFUND",), ("state = FAILED",), ("location",)], ("", "amount")),
    )
    of_tenant = (
        *product([(), ("times",)], ("", "create_time")),
        (("category = booking",), ""),
        (("category = booking", "kind = CHARGE"), ""),
        (("kind = CHARGE",), ""),
        (("kind = REFUND",), ""),
        (("state = FAILED",), ""),
        *(((label,), "") for label in LABELS),
        (("location", "times"), ""),
        (("location", "kind = CHARGE"), ""),
        (("location", "company"), ""),
    )
    return [
        *(_transactions(ledger, sample, HOT_ACCOUNT, *each) for each in of_account),
        *(_transactions(ledger, sample, ALL_ACCOUNTS, *each) for each in of_tenant),
        List(
            "accounts",
            _caller_of(ledger.ListAccounts, lambda place, size: ListAccountsRequest(page_token=place, page_size=size)),
            lambda answer: _read(ListAccountsResponse.FromString(answer), "accounts", "next_page_token"),
            PAGE_SIZE_MAX,
        ),
        List(
            "lots",
            _caller_of(
                ledger.ListLots,
                lambda place, size: ListLotsRequest(parent=f"accounts/{HOT_ACCOUNT}", page_token=place, page_size=size),
            ),
            lambda answer: _read(ListLotsResponse.FromString(answer), "lots", "next_page_token"),
            PAGE_SIZE_MAX,
        ),
    ]


def _transactions(ledger: Ledger, sample: Sample, account_id: str, factors: tuple[str, ...], order_by: str) -> List:
    """Returns the native list with a filter. A factor is an expression, or the name of a value of the sample."""
    values = {
        "times": f'create_time >= "{write(sample.time(0.25))}" AND create_time < "{write(sample.time(0.75))}"',
        **{label: f'labels.{label} = "{getattr(sample, label)}"' for label in LABELS},
    }
    filter_text = " AND ".join(values.get(factor, factor) for factor in factors)

    def request(place: str, size: int) -> Message:
        return ListTransactionsRequest(
            parent=f"accounts/{account_id}", filter=filter_text, order_by=order_by, page_token=place, page_size=size
        )

    return List(
        ", ".join([f"accounts/{account_id}", *factors, *([f"by {order_by}"] if order_by else [])]),
        _caller_of(ledger.ListTransactions, request),
        lambda answer: _read(ListTransactionsResponse.FromString(answer), "transactions", "next_page_token"),
        PAGE_SIZE_MAX,
    )


def _teable(servicer: teable.Billing, sample: Sample) -> list[List]:
    month = month_of(sample.time(0.5))

    def read(answer: bytes) -> tuple[int, str]:
        page = GetSpaceCreditHistoryResponse.FromString(answer)
        return len(page.data), page.next_cursor.string_value

    def of(order_by: str, order: str, source_type: str | None = None) -> List:
        def request(place: str, size: int) -> Message:
            return GetSpaceCreditHistoryRequest(
                space_id=HOT_ACCOUNT,
                month=f"{month // 100}-{month % 100:02}",
                order_by=order_by,
                order=order,
                source_type=source_type,
                take=str(size),
                cursor=place or None,
            )

        parts = ("teable", order_by, order, source_type)
        return List(" ".join(part for part in parts if part), _caller_of(servicer.GetSpaceCreditHistory, request), read)

    return [
        *(of(order_by, order) for order_by in teable.ORDERS_BY for order in teable.ORDERS),
        of("createdTime", "desc", "ai_chat"),
        of("amount", "desc", "ai_chat"),
    ]


def _nebulablock(servicer: nebulablock.Users, caller: Caller) -> List:
    user = Authentication(replace(caller, account_id=HOT_ACCOUNT), Scheme.API_KEY)
    call_as_user = _caller_of(
        servicer.GetCreditsHistory, lambda place, size: GetCreditsHistoryRequest(offset=place or None, limit=str(size))
    )

    async def call(place: str, size: int) -> bytes:
        before = authentication.set(user)
        try:
            return await call_as_user(place, size)
        finally:
            authentication.reset(before)

    def read(answer: bytes) -> tuple[int, str]:
        data = GetCreditsHistoryResponse.FromString(answer).data
        return len(data.credit_history), str(data.total_credit_histories)

    return List("nebulablock", call, read, has_offsets=True)


def _spacebring(servicer: spacebring.CreditsTransactions, sample: Sample) -> list[List]:
    def read(answer: bytes) -> tuple[int, str]:
        return _read(GetCreditsTransactionsResponse.FromString(answer), "transactions", "next_page_token")

    def of(**filters: str) -> List:
        def request(place: str, size: int) -> Message:
            return GetCreditsTransactionsRequest(limit=str(size), next_page_token=place or None, **filters)

        return List(" ".join(["spacebring", *filters]), _caller_of(servicer.GetCreditsTransactions, request), read)

    half = {"create_date_gte": write(sample.time(0.25)), "create_date_lte": write(sample.time(0.75))}
    return [
        of(),
        of(**half),
        of(location_ref=sample.location),
        of(membership_ref=sample.membership),
        of(company_ref=sample.company),
        of(location_ref=sample.location, **half),
        of(location_ref=sample.location, membership_ref=sample.membership, company_ref=sample.company),
    ]


def _dreadnode(servicer: dreadnode.Credits) -> List:
    def request(_place: str, size: int) -> Message:
        return ListCreditTransactionsRequest(org=HOT_ACCOUNT, limit=str(size))

    def read(answer: bytes) -> tuple[int, str]:
        return len(ListCreditTransactionsResponse.FromString(answer).transactions), ""

    return List("dreadnode", _caller_of(servicer.ListCreditTransactions, request), read)


def _paged(servicer: paged.Statements) -> List:
    def request(place: str, size: int) -> Message:
        number = int(place or "0") // size + 1
        return ListAccountTransactionsRequest(account=HOT_ACCOUNT, page=str(number), page_size=str(size))

    def read(answer: bytes) -> tuple[int, str]:
        page = ListAccountTransactionsResponse.FromString(answer)
        return len(page.results), str(int(page.count))

    return List("paged", _caller_of(servicer.ListAccountTransactions, request), read, has_offsets=True)


def _caller_of(
    method: Callable[[Any, Any], Awaitable[Any]], request: Callable[[str, int], Message]
) -> Callable[[str, int], Awaitable[bytes]]:
    async def call(place: str, size: int) -> bytes:
        answer: bytes | Message = await method(request(place, size), _CONTEXT)
        return answer if isinstance(answer, bytes) else answer.SerializeToString()

    return call


def _read(page: Any, rows: str, place: str) -> tuple[int, str]:
    return len(getattr(page, rows)), getattr(page, place)
