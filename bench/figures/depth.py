"""Figure 9: the cost of a page by its depth and by the size of the ledger."""

from __future__ import annotations

from bench.calls import Call, list_call, read_page
from bench.comparison import Compared
from bench.ledger import Ledger
from bench.report import Finding, at_most
from bench.servers import Server, daybook
from bench.stage import ROWS_SMALL, Stage
from server.ledger.names import ALL_ACCOUNTS

_STEP = 1000


def measure(stage: Stage) -> list[Finding]:
    """Measures both ratios of figure 9, for the list of all accounts."""
    large, small = stage.large, stage.small
    with daybook(large.database_url) as server:
        first = list_call(large.key, ALL_ACCOUNTS)
        deep = list_call(large.key, ALL_ACCOUNTS, _token_at(stage, server, large))
        by_depth = _compare(stage, (server, deep), (server, first))
        with daybook(small.database_url) as other:
            by_size = _compare(stage, (server, first), (other, list_call(small.key, ALL_ACCOUNTS)))
    return [
        _finding(f"page at depth {stage.depth:,} / first page", by_depth, ("deep", "first")),
        _finding(f"page of {stage.rows_large:,} rows / of {ROWS_SMALL:,}", by_size, ("large", "small")),
    ]


def _finding(what: str, compared: Compared, names: tuple[str, str]) -> Finding:
    above, below = (f"{name} ms" for name in names)
    sides = {above: compared.above, below: compared.below}
    return Finding(9, what, compared.ratio, "", at_most(1.2), compared.spread, sides)


def _compare(stage: Stage, above: tuple[Server, Call], below: tuple[Server, Call]) -> Compared:
    return stage.compare(lambda: _milliseconds(stage, *above), lambda: _milliseconds(stage, *below))


def _milliseconds(stage: Stage, server: Server, call: Call) -> float:
    """Measures the cost of a page: the inverse of the rate."""
    (page,) = call.answers(server.port)
    read_page(page)
    return 1000 / call.rate_of_same(server.port, stage.seconds, [page])


def _token_at(stage: Stage, server: Server, ledger: Ledger) -> str:
    """Returns the token of the deep page, after reading all pages before it."""
    stage.log(f"reading down {stage.depth:,} rows")
    token = ""
    for _ in range(stage.depth // _STEP):
        (answer,) = list_call(ledger.key, ALL_ACCOUNTS, token, _STEP).answers(server.port)
        token = read_page(answer, _STEP).next_page_token
    return token
