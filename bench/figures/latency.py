"""Figure 11: the tail latency at half of the peak rate."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from bench.calls import LIST, list_call, read_page
from bench.comparison import Rounds, compare, spread
from bench.ledger import ORGANIZATION
from bench.load import Latencies, h2load_latencies
from bench.report import Bar, Finding, at_most
from bench.servers import Server, ceiling, daybook
from bench.stage import Stage

WINDOW_SECONDS = 1
"""The length of a round: short, because one pause of a shared machine determines the tail of its round."""
ROUNDS = Rounds(31, 31)


def measure(stage: Stage) -> list[Finding]:
    """Measures the ratio of p99 to p50. Measures the peak before every round, because the machine's speed changes."""
    ledger = stage.sqlite
    call = list_call(ledger.key, ORGANIZATION)
    peaks: list[float] = []
    ours: list[Latencies] = []
    bare: list[Latencies] = []

    def paced(server: Server, found: list[Latencies]) -> float:
        found.append(
            h2load_latencies(
                server.port, LIST, call.requests[0], WINDOW_SECONDS, headers=call.headers, rate=peaks[-1] / 2
            )
        )
        return found[-1].p99 / found[-1].median

    def after_measuring_the_peak(server: Server) -> float:
        peaks.append(call.rate_of_same(server.port, WINDOW_SECONDS, page))
        return paced(server, ours)

    with daybook(ledger.database_url) as server:
        page = call.answers(server.port)
        read_page(page[0])
        with ceiling(page[0]) as other:
            rounds = stage.rounds if stage.is_quick else ROUNDS
            compared = compare(lambda: after_measuring_the_peak(server), lambda: paced(other, bare), rounds)
    what = "p99 / p50 at half of the peak"
    return [
        _finding(what, compared.above, ours, at_most(4), f"peak {median(peaks):,.0f}/s"),
        _finding("p99 / p50 of the ceiling", compared.below, bare, None, "at the same rate"),
    ]


def _finding(what: str, ratios: Sequence[float], found: Sequence[Latencies], bar: Bar | None, note: str) -> Finding:
    sides = {"p99 us": [each.p99 for each in found], "p50 us": [each.median for each in found]}
    return Finding(11, what, median(ratios), "", bar, spread(ratios), sides, note=note)
