"""Figure 13: the time from the command to the first answer."""

from __future__ import annotations

import time
from statistics import median

from bench.calls import authorization
from bench.figures.rest import PATH
from bench.report import Finding, at_most
from bench.servers import daybook_with_gateway, wait_for_answer
from bench.settling import spread
from bench.stage import Stage

SECONDS_MAX = 1.5


def measure(stage: Stage) -> list[Finding]:
    """Figure 13: `daybook up` on a migrated database, until a page of it has come through Envoy."""
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
