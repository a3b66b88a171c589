"""Figures 4 and 5: the native list over REST beside the same list by FastAPI."""

from __future__ import annotations

import json
from typing import Any

from bench.calls import PAGE_SIZE, authorization
from bench.ledger import ORGANIZATION, Ledger
from bench.load import LoadFailed, wrk
from bench.report import Bar, Finding, at_least
from bench.servers import Server, daybook_with_gateway, peer, wait_for_answer
from bench.stage import Stage

PATH = f"/v1/accounts/{ORGANIZATION}/transactions?pageSize={PAGE_SIZE}"


def sqlite(stage: Stage) -> list[Finding]:
    """Figure 4."""
    return [_to_peer(stage, 4, "REST list, SQLite", stage.sqlite, at_least(5.5))]


def postgresql(stage: Stage) -> list[Finding]:
    """Figure 5."""
    return [_to_peer(stage, 5, "REST list, PostgreSQL", stage.postgresql, at_least(2.8))]


def _to_peer(stage: Stage, number: int, what: str, ledger: Ledger, bar: Bar) -> Finding:
    headers = authorization(ledger.key)
    with daybook_with_gateway(ledger.database_url) as gateway, peer(ledger.database_url) as other:
        ours = _rows(wait_for_answer(gateway, PATH, headers))
        theirs = _rows(wait_for_answer(other, PATH, headers))
        if ours != theirs or len(ours) != PAGE_SIZE:
            raise LoadFailed(f"the peer shows other rows: {ours[:1]} and {theirs[:1]}")
        compared = stage.compare(lambda: _rate(stage, gateway, headers), lambda: _rate(stage, other, headers))
    return Finding(
        number, what, compared.ratio, "", bar, compared.spread, {"daybook/s": compared.above, "peer/s": compared.below}
    )


def _rows(answer: bytes) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(answer)["transactions"]
    return rows


def _rate(stage: Stage, server: Server, headers: dict[str, str]) -> float:
    load = wrk(f"http://127.0.0.1:{server.port}{PATH}", stage.seconds, headers=headers)
    if load.refused or not load.answers:
        raise LoadFailed(f"{load.refused} of {load.answers} requests were refused")
    return load.rate
