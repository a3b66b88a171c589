"""Figure 11: how much longer the slowest of a hundred lists takes, with room to spare."""

from __future__ import annotations

from statistics import median

from bench.calls import LIST, list_call, read_page
from bench.ledger import ORGANIZATION
from bench.load import h2load_latencies
from bench.report import Finding, at_most
from bench.servers import daybook
from bench.stage import Stage


def measure(stage: Stage) -> list[Finding]:
    """Figure 11. The peak is measured anew before every round: the machine may have changed."""
    ledger = stage.sqlite
    call = list_call(ledger.key, ORGANIZATION)
    with daybook(ledger.database_url) as server:
        page = call.answers(server.port)
        read_page(page[0])

        def latencies() -> tuple[float, float]:
            peak = call.rate_of_same(server.port, stage.seconds, page)
            peaks.append(peak)
            found = h2load_latencies(
                server.port, LIST, call.requests[0], stage.seconds, headers=call.headers, rate=peak / 2
            )
            medians.append(found.median)
            return found.p99, found.median

        peaks: list[float] = []
        medians: list[float] = []
        compared = stage.compare(lambda: latencies()[0], lambda: medians[-1])
    return [
        Finding(
            11,
            "p99 / p50 at half of the peak",
            compared.ratio,
            "",
            at_most(4),
            compared.spread,
            {"p99 us": compared.above, "p50 us": compared.below},
            note=f"peak {median(peaks):,.0f}/s",
        )
    ]
