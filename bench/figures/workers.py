"""Figure 10: the gain of a second worker, with the load generator on the same processors."""

from __future__ import annotations

from bench.calls import list_call, rate_together, read_page
from bench.ledger import ORGANIZATION
from bench.report import Finding
from bench.servers import daybook
from bench.stage import Stage


def measure(stage: Stage) -> list[Finding]:
    """Compares two processes, with half of the callers each, with one process that has all callers."""
    ledger = stage.sqlite
    call = list_call(ledger.key, ORGANIZATION)
    with daybook(ledger.database_url) as one, daybook(ledger.database_url) as other:
        page = call.answers(one.port)
        read_page(page[0])
        compared = stage.compare(
            lambda: rate_together((one.port, other.port), call, stage.seconds, page),
            lambda: call.rate_of_same(one.port, stage.seconds, page),
        )
    return [
        Finding(
            10,
            "2 workers / 1, native list, SQLite",
            compared.ratio,
            "",
            None,
            compared.spread,
            {"two/s": compared.above, "one/s": compared.below},
        )
    ]
