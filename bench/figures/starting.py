"""Figure 13: the time from the start to the first response."""

from __future__ import annotations

import time
from statistics import median

from bench.calls import authorization
from bench.comparison import spread
from bench.figures.rest import PATH
from bench.report import Finding, at_most
from bench.servers import daybook_with_gateway, wait_for_answer
from bench.stage import Stage

SECONDS_MAX = 1.5


def measure(stage: Stage) -> list[Finding]:
    """Measures the time from the start of `daybook up` on a migrated database to a page through Envoy."""
    ledger = stage.sqlite
    headers = authorization(ledger.key)
    spans = []
    for _ in range(stage.rounds.at_most):
        started = time.monotonic()
        with daybook_with_gateway(ledger.database_url) as gateway:
            wait_for_answer(gateway, PATH, headers)
            spans.append(time.monotonic() - started)
    return [
        Finding(
            13,
            "first answer through Envoy",
            median(spans),
            "s",
            at_most(SECONDS_MAX),
            spread(spans),
            {"seconds": spans},
        )
    ]
