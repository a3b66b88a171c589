"""Figures 1 to 3: what a page costs beside a method that has nothing to do."""

from __future__ import annotations

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

from bench.calls import PAGE_SIZE, Call, list_call, read_page
from bench.ledger import MONTH, NETWORK, ORGANIZATION, SPACE, Ledger
from bench.load import LoadFailed
from bench.report import Bar, Finding, at_least
from bench.servers import ceiling, daybook
from bench.stage import Stage

_LIMIT = str(PAGE_SIZE)


def sqlite(stage: Stage) -> list[Finding]:
    """Figure 1."""
    return _native(stage, 1, "SQLite", stage.sqlite, at_least(0.75))


def postgresql(stage: Stage) -> list[Finding]:
    """Figure 2."""
    return _native(stage, 2, "PostgreSQL", stage.postgresql, at_least(0.33))


def _native(stage: Stage, number: int, engine: str, ledger: Ledger, bar: Bar) -> list[Finding]:
    first = list_call(ledger.key, ORGANIZATION)
    with daybook(ledger.database_url) as server:
        (page,) = first.answers(server.port)
        second = list_call(ledger.key, ORGANIZATION, read_page(page).next_page_token)
        (page_behind,) = second.answers(server.port)
        read_page(page_behind)
        return [
            _to_ceiling(stage, number, f"native list, {engine}", server.port, first, page, bar),
            _to_ceiling(stage, number, f"its second page, {engine}", server.port, second, page_behind, None),
        ]


def facades(stage: Stage) -> list[Finding]:
    """Figure 3, once for each facade."""
    ledger = stage.sqlite
    (native,) = _answers_of(ledger, list_call(ledger.key, ORGANIZATION))
    with daybook(ledger.database_url) as server:
        findings = []
        for name, call in facade_calls(ledger).items():
            if (rows := count_rows(name, call.answers(server.port))) != PAGE_SIZE:
                raise LoadFailed(f"{name} shows {rows} rows and not {PAGE_SIZE}")
            findings.append(_to_ceiling(stage, 3, name, server.port, call, native, at_least(0.35)))
        return findings


def facade_calls(ledger: Ledger) -> dict[str, Call]:
    """How each facade is asked for its first page, by its name."""
    space = GetSpaceCreditHistoryRequest(space_id=SPACE, month=MONTH, take=_LIMIT)
    statement = ListAccountTransactionsRequest(account=ORGANIZATION, page_size=_LIMIT)
    return {
        "teable": Call.of("daybook.facades.teable.v1.Billing/GetSpaceCreditHistory", space, key=ledger.key),
        "nebulablock": Call.of(
            "daybook.facades.nebulablock.v1.Users/GetCreditsHistory",
            GetCreditsHistoryRequest(limit=_LIMIT),
            key=ledger.user_key,
        ),
        "spacebring": Call.of(
            "daybook.facades.spacebring.v1.Transactions/GetCreditsTransactions",
            GetCreditsTransactionsRequest(limit=_LIMIT),
            key=ledger.network_key,
            spacebring_network_id=NETWORK,
        ),
        "dreadnode": Call.of(
            "daybook.facades.dreadnode.v1.Credits/ListCreditTransactions",
            ListCreditTransactionsRequest(org=ORGANIZATION, limit=_LIMIT),
            key=ledger.key,
        ),
        "paged": Call.of("daybook.facades.paged.v1.Statements/ListAccountTransactions", statement, key=ledger.key),
    }


def count_rows(name: str, answers: list[bytes]) -> int:
    """How many rows a facade's answer shows."""
    match name:
        case "teable":
            return len(GetSpaceCreditHistoryResponse.FromString(answers[0]).data)
        case "nebulablock":
            return len(GetCreditsHistoryResponse.FromString(answers[0]).data.credit_history)
        case "spacebring":
            return len(GetCreditsTransactionsResponse.FromString(answers[0]).transactions)
        case "paged":
            return len(ListAccountTransactionsResponse.FromString(answers[0]).results)
        case "dreadnode":
            return len(ListCreditTransactionsResponse.FromString(answers[0]).transactions)
    raise AssertionError(f"{name} is no facade")


def _answers_of(ledger: Ledger, call: Call) -> list[bytes]:
    with daybook(ledger.database_url) as server:
        return call.answers(server.port)


def _to_ceiling(stage: Stage, number: int, what: str, port: int, call: Call, page: bytes, bar: Bar | None) -> Finding:
    before = call.answers(port)
    with ceiling(page) as bare:
        compared = stage.compare(
            lambda: call.rate_of_same(port, stage.seconds, before),
            lambda: call.rate_of_same(bare.port, stage.seconds, [page]),
        )
    if [len(each) for each in call.answers(port)] != [len(each) for each in before]:
        raise LoadFailed(f"{call.method} answers otherwise after the load")
    return Finding(
        number,
        what,
        compared.ratio,
        "",
        bar,
        compared.spread,
        {"daybook/s": compared.above, "ceiling/s": compared.below},
    )
