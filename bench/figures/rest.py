"""Figures 4, 5 and 15 to 18: lists over REST compared with other servers, and the processor time of a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from statistics import median
from typing import Any

from bench.calls import PAGE_SIZE, Call, authorization, list_call, rest_path
from bench.comparison import Compared, spread
from bench.figures.reading import FACADES, NATIVE, PagedList
from bench.ledger import ORGANIZATION, Ledger
from bench.load import LoadFailed, wrk
from bench.report import Bar, Finding, at_least
from bench.servers import Server, daybook, daybook_with_gateway, peer, wait_for_answer
from bench.stage import Stage

PATH = f"/v1/accounts/{ORGANIZATION}/transactions?pageSize={PAGE_SIZE}"
MICROSECOND = 1e-6


def sqlite(stage: Stage) -> list[Finding]:
    """Measures figure 4."""
    return [_to_peer(stage, 4, "REST list, SQLite", stage.sqlite, at_least(5.5))]


def postgresql(stage: Stage) -> list[Finding]:
    """Measures figure 5."""
    return [_to_peer(stage, 5, "REST list, PostgreSQL", stage.postgresql, at_least(2.8))]


def second_page(stage: Stage) -> list[Finding]:
    """Measures figure 15 for each engine."""
    ledgers = {"SQLite": stage.sqlite, "PostgreSQL": stage.postgresql}
    return [
        _to_peer(stage, 15, f"REST list, second page, {engine}", ledger, None, is_second=True)
        for engine, ledger in ledgers.items()
    ]


def to_grpc(stage: Stage) -> list[Finding]:
    """Measures figure 16."""
    ledger = stage.sqlite
    headers = authorization(ledger.key)
    call = list_call(ledger.key, ORGANIZATION)
    with daybook_with_gateway(ledger.database_url) as gateway, daybook(ledger.database_url) as server:
        wait_for_answer(gateway, PATH, headers)
        answers = call.answers(server.port)
        compared = stage.compare(
            lambda: _rate(stage, gateway, PATH, headers),
            lambda: call.rate_of_same(server.port, stage.seconds, answers),
        )
    return [_finding(16, "REST list, SQLite", compared, None, "grpc/s")]


def facades(stage: Stage) -> list[Finding]:
    """Measures figure 17 for each facade."""
    ledger = stage.sqlite
    with daybook_with_gateway(ledger.database_url) as gateway, peer(ledger.database_url) as other:
        wait_for_answer(gateway, PATH, authorization(ledger.key))
        return [_facade_to_peer(stage, listed, gateway, other, ledger) for listed in FACADES]


def processor_time(stage: Stage) -> list[Finding]:
    """Measures figure 18 for the first and second page of the native list and of each facade's list."""
    ledger = stage.sqlite
    findings = []
    with daybook_with_gateway(ledger.database_url) as gateway:
        wait_for_answer(gateway, PATH, authorization(ledger.key))
        for listed in (NATIVE, *FACADES):
            for page, call in zip(("first page", "second page"), _popular(listed, gateway, ledger), strict=False):
                costs = [_cost(stage, gateway, call) for _ in range(1 + stage.rounds.at_least)][1:]
                of_gateway, of_server = zip(*costs, strict=True)
                sums = [sum(cost) for cost in costs]
                sides = {"gateway": of_gateway, "server": of_server}
                what = f"{listed.name}, {page}, SQLite"
                findings.append(Finding(18, what, median(sums), "µs", None, spread(sums), sides))
    return findings


def _facade_to_peer(stage: Stage, listed: PagedList, gateway: Server, other: Server, ledger: Ledger) -> Finding:
    call = _popular(listed, gateway, ledger)[0]
    compared = stage.compare(
        lambda: _rate(stage, gateway, rest_path(call), call.headers),
        lambda: _rate(stage, other, PATH, authorization(ledger.key)),
    )
    return _finding(17, listed.name, compared, None, "peer/s")


def _popular(listed: PagedList, gateway: Server, ledger: Ledger) -> list[Call]:
    """Returns the calls for the pages of the most popular account. Waits until they succeed over REST."""
    calls = listed.calls(gateway, ledger)[0]
    for call in calls:
        wait_for_answer(gateway, rest_path(call), call.headers)
    return calls


def _to_peer(
    stage: Stage, number: int, what: str, ledger: Ledger, bar: Bar | None, *, is_second: bool = False
) -> Finding:
    headers = authorization(ledger.key)
    with daybook_with_gateway(ledger.database_url) as gateway, peer(ledger.database_url) as other:
        our_path, ours = _page(gateway, headers, is_second=is_second)
        their_path, theirs = _page(other, headers, is_second=is_second)
        if ours != theirs or len(ours) != PAGE_SIZE:
            raise LoadFailed(f"the rows of the peer differ: {ours[:1]} and {theirs[:1]}")
        compared = stage.compare(
            lambda: _rate(stage, gateway, our_path, headers), lambda: _rate(stage, other, their_path, headers)
        )
    return _finding(number, what, compared, bar, "peer/s")


def _page(server: Server, headers: Mapping[str, str], *, is_second: bool) -> tuple[str, list[dict[str, Any]]]:
    """Returns the path of a page and its rows."""
    path, page = PATH, json.loads(wait_for_answer(server, PATH, headers))
    if is_second:
        path = f"{PATH}&pageToken={page['nextPageToken']}"
        page = json.loads(wait_for_answer(server, path, headers))
    return path, page["transactions"]


def _rate(stage: Stage, server: Server, path: str, headers: Mapping[str, str]) -> float:
    return _load(stage, server, path, headers)[0]


def _cost(stage: Stage, gateway: Server, call: Call) -> tuple[float, float]:
    """Returns the microseconds of processor time per response: of the gateway and of the server."""
    before = gateway.processor_seconds
    _, answers = _load(stage, gateway, rest_path(call), call.headers)
    after = gateway.processor_seconds
    return (after[0] - before[0]) / answers / MICROSECOND, (after[1] - before[1]) / answers / MICROSECOND


def _load(stage: Stage, server: Server, path: str, headers: Mapping[str, str]) -> tuple[float, int]:
    """Returns the responses per second and their number. Raises LoadFailed if one is an error."""
    load = wrk(f"http://127.0.0.1:{server.port}{path}", stage.seconds, headers=headers)
    if load.refused or not load.answers:
        raise LoadFailed(f"{load.refused} of {load.answers} requests were refused")
    return load.rate, load.answers


def _finding(number: int, what: str, compared: Compared, bar: Bar | None, below: str) -> Finding:
    sides = {"daybook/s": compared.above, below: compared.below}
    return Finding(number, what, compared.ratio, "", bar, compared.spread, sides)
