"""The dashboard and the alert rules of docs/deploy query metrics that a real server and a real Envoy export."""

from __future__ import annotations

import json
import os
import re
import select
import socket
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

import grpc
import promql_parser
import pytest
import yaml
from daybook.v1.error_reason_pb2 import ErrorReason
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families

from tests.support.demo import DREADNODE
from tests.support.http_client import send
from tests.support.methods import METHODS
from tests.support.processes import ROOT, Daybook, Ports, copy_database, free_range, sqlite_url
from tests.support.waiting import wait_until
from tests.support.words import BANNED

DASHBOARD: dict[str, Any] = json.loads((ROOT / "docs/deploy/dashboard.json").read_text())
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((ROOT / "docs/deploy/alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
WATCHING = (ROOT / "docs/operate/watching.md").read_text()
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
JOBS: list[dict[str, Any]] = yaml.safe_load(re.findall(r"(?s)```yaml\n(scrape_configs:.*?)```", WATCHING)[0])[
    "scrape_configs"
]

# The series and labels that Prometheus itself adds.
OF_PROMETHEUS = {"up"}
OF_TARGET = {"job", "instance"}
# Variables of Grafana, in place of a duration and of a label's value.
RANGE, VARIABLES = "$__rate_interval", {"$server", "$gateway"}
# Values that labels can have without a call that made them appear.
KNOWN = {
    "code": {code.name for code in grpc.StatusCode},
    "reason": set(ErrorReason.keys()),
    "method": {f"{method.containing_service.full_name}/{method.name}" for method in METHODS},
}

Labels = Mapping[str, set[str]]
"""The names of labels, each with its values."""


def queries() -> dict[str, str]:
    """Returns the queries of the panels and the rules, by where they are."""
    panels = {
        f"{panel['title']} {target['refId']}": target["expr"].replace(RANGE, "5m")
        for panel in PANELS
        for target in panel["targets"]
    }
    return panels | {rule["alert"]: rule["expr"] for rule in RULES}


QUERIES = queries()


@cache
def parsed(query: str) -> Any:
    """Returns the syntax tree of a query. Raises ValueError if it isn't PromQL."""
    return promql_parser.parse(query)


def nodes(query: str) -> list[Any]:
    """Returns all nodes of the syntax tree of a query."""
    found: list[Any] = []
    promql_parser.walk(parsed(query), found.append)
    return found


def selectors(query: str) -> Iterator[Any]:
    """Yields each selector of a query, which has a metric's name and matchers of labels."""
    for node in nodes(query):
        if isinstance(node, promql_parser.MatrixSelector):
            yield node.vector_selector
        elif isinstance(node, promql_parser.VectorSelector):
            yield node


def scraped(port: int) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Yields the series of a scrape: the name and the labels. A metric of the server without series has no labels."""
    text = send(f"http://127.0.0.1:{port}", "/metrics").body.decode()
    exact = set(re.findall(r"(?m)^\w+", text))
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            # The parser adds this suffix to counters without it, such as Envoy's.
            yield sample.name if sample.name in exact else sample.name.removesuffix("_total"), sample.labels
        if family.name.startswith("daybook_") and not family.samples:
            yield f"{family.name}_total" if family.type == "counter" else family.name, {}


@dataclass(frozen=True)
class Watched:
    """A `daybook up --demo` with the ports of its two metrics pages."""

    daybook: Daybook
    of_server: int
    of_gateway: int


@pytest.fixture(scope="module")
def watched(gateway: Daybook, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A server and a gateway with metrics, after a few calls."""
    folder, first = tmp_path_factory.mktemp("watched"), free_range(5)
    copy_database(gateway.folder / "daybook.db", folder / "daybook.db")
    ports, found = Ports(first, first + 1, first + 2), (first + 3, first + 4)
    daybook = Daybook.start(
        *("up", "--demo", "--database-url", sqlite_url(folder / "daybook.db"), *ports.flags),
        *("--metrics-port", str(found[0]), "--gateway-metrics-port", str(found[1])),
        folder=folder,
        ports=ports,
    )
    try:
        daybook.wait_for("Ctrl-C stops it.")
        for key in (DREADNODE, "unknown.key"):
            send(daybook.origin, "/v1/accounts/example/transactions", headers={"authorization": f"Bearer {key}"})
        # Envoy exports its histograms a few seconds after the first request.
        wait_until(lambda: "envoy_http_downstream_rq_time_bucket" in dict(scraped(found[1])), "histograms")
        yield Watched(daybook, *found)
        assert daybook.stop() == 0
    finally:
        daybook.kill()


def test_metrics_port_of_the_gateway_serves_only_metrics(watched: Watched) -> None:
    """Nothing else of Envoy's admin page can be reached, in particular nothing that changes Envoy."""
    for path in ("/", "/stats/prometheus", "/quitquitquit", "/metrics/../quitquitquit", "/metrics/"):
        assert send(f"http://127.0.0.1:{watched.of_gateway}", path, method="POST").status == 404


def test_scrapers_of_the_gateway_are_limited(watched: Watched) -> None:
    """The gateway closes connections to its metrics page beyond 64, and serves again when others have left."""
    # Threads of Envoy that accept at the same moment exceed the limit by one each, except for the first.
    surplus_max = 16 + (os.cpu_count() or 1)
    with ExitStack() as stack:
        opened = [
            socket.create_connection(("127.0.0.1", watched.of_gateway), timeout=30) for _ in range(64 + surplus_max)
        ]
        for each in opened:
            stack.enter_context(each)
        wait_until(lambda: len(select.select(opened, [], [], 0)[0]) > 16, "connections beyond the limit are closed")
        assert len(select.select(opened, [], [], 0)[0]) <= surplus_max + 1
    wait_until(lambda: bool(answered(watched.of_gateway)), "the gateway serves metrics again")


def answered(port: int) -> list[Any]:
    """Returns the series of a metrics page; none if the connection is refused."""
    try:
        return list(scraped(port))
    except OSError:
        return []


@pytest.fixture(scope="module")
def exported(watched: Watched) -> Mapping[str, Labels]:
    """The metrics of a server and its Envoy: the labels of each, with their values."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, labels in [*scraped(watched.of_server), *scraped(watched.of_gateway)]:
        known = found[name]
        for label, value in labels.items():
            known[label].add(value)
    # These two series exist only with a replica.
    found["daybook_database_list_reads_total"]["by"] = {"primary", "replica"}
    for name, values in found.items():
        for label in values.keys() & KNOWN.keys():
            values[label] |= KNOWN[label]
        # A panel that filters by the wrong variable would be empty.
        values["instance"] = {"$gateway"} if name.startswith("envoy_") else {"$server"}
    return found


def labels_of(query: str, exported: Mapping[str, Labels]) -> set[str]:
    """Returns the labels of the result of a query."""
    grouped = [node.modifier for node in nodes(query) if isinstance(node, promql_parser.AggregateExpr)]
    if grouped:
        return {label for modifier in grouped if modifier for label in modifier.labels}
    return {label for each in selectors(query) for label in exported.get(each.name, ())} | OF_TARGET


@pytest.mark.parametrize("place", QUERIES)
def test_queries_match_exported_metrics(exported: Mapping[str, Labels], place: str) -> None:
    """Each metric, label and value that a query names is exported, so no query is empty because of a wrong name."""
    query, known = QUERIES[place], set(exported) | OF_PROMETHEUS
    found = list(selectors(query))
    assert found
    for selector in found:
        assert selector.name in known, f"{selector.name} is not exported"
        values = {**exported.get(selector.name, {}), "job": {job["job_name"] for job in JOBS}}
        for matcher in selector.matchers.matchers:
            assert matcher.name in values, f"{selector.name} has no label {matcher.name}"
            is_pattern = matcher.op in (promql_parser.MatchOp.Re, promql_parser.MatchOp.NotRe)
            for value in alternatives(matcher.value) if is_pattern else [matcher.value]:
                pattern = value if is_pattern and value not in VARIABLES else re.escape(value)
                assert any(re.fullmatch(pattern, each) for each in values[matcher.name]), f"{matcher.name}={value}"
    labels = {label for selector in found for label in exported.get(selector.name, ())} | OF_TARGET
    for node in nodes(query):
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier:
            assert set(node.modifier.labels) <= labels


def alternatives(pattern: str) -> list[str]:
    """Returns the values of a pattern like `a|b` or `prefix(a|b)`."""
    match = re.fullmatch(r"([^()]*)\(([^()]*)\)", pattern)
    prefix, values = (match[1], match[2]) if match else ("", pattern)
    return [prefix + value for value in values.split("|")]


def test_texts_name_labels_of_the_result(exported: Mapping[str, Labels]) -> None:
    """Each label in a legend or a summary is a label of the query's result."""
    texts = [
        (target["expr"].replace(RANGE, "5m"), target["legendFormat"]) for panel in PANELS for target in panel["targets"]
    ] + [(rule["expr"], rule["annotations"]["summary"]) for rule in RULES]
    named = [(query, label) for query, text in texts for label in re.findall(r"{{ ?(?:\$labels\.)?(\w+) ?}}", text)]
    assert len(named) > 20
    assert not [each for each in named if each[1] not in labels_of(each[0], exported)]


def test_dashboard_has_the_schema_of_grafana() -> None:
    """Grafana's own model of a dashboard has each field of the file, with a value of the right type."""
    register_default_plugins()
    model = json.loads(JSONEncoder().encode(Dashboard.from_json(DASHBOARD)))
    assert not list(lost(DASHBOARD, model, ""))
    planted = json.loads(json.dumps(DASHBOARD).replace("legendFormat", "legend"))
    assert list(lost(planted, json.loads(JSONEncoder().encode(Dashboard.from_json(planted))), ""))


def lost(before: Any, after: Any, path: str) -> Iterator[str]:
    """Yields the path of each value of `before` that `after` lacks."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            yield from lost(value, after.get(key), f"{path}/{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, (value, other) in enumerate(zip(before, after, strict=True)):
            yield from lost(value, other, f"{path}/{number}")
    elif before != after:
        yield path


def test_panels_are_complete() -> None:
    """Each panel has a unit, a data source that can be chosen, its own place, and a text that says what to do."""
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    places: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(x + place["x"], y + place["y"]) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & places
        assert max(x for x, _ in cells) < 24
        places |= cells
    for panel in PANELS:
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert len(panel["description"].split()) > 8
        assert {each["datasource"]["uid"] for each in (panel, *panel["targets"])} == {"${datasource}"}


def test_alerts_named_in_the_dashboard_exist() -> None:
    """Each alert that a panel mentions is in the rules, and each panel with a threshold mentions one."""
    texts = {panel["title"]: panel["description"] for panel in PANELS}
    named = {name for text in texts.values() for name in re.findall(r"\bDaybook[A-Z]\w+", text)}
    assert named
    assert named <= {rule["alert"] for rule in RULES}


def test_rules_have_the_form_of_prometheus() -> None:
    """Each rule has a unique name, a duration, a severity, a summary and a runbook, and no other field."""
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.keys() == {"alert", "expr", "for", "labels", "annotations"}
        assert promql_parser.parse_duration(rule["for"]).total_seconds() >= 30
        assert rule["labels"].keys() == {"severity"}
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert rule["annotations"].keys() == {"summary", "runbook"}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_summary_states_the_threshold(rule: dict[str, Any]) -> None:
    """A rule compares with a constant, and its summary states the constant, as a percentage if it is a share."""
    tree = parsed(rule["expr"])
    if not isinstance(tree, promql_parser.BinaryExpr):
        assert "absent(" in rule["expr"]
        return
    assert isinstance(tree.rhs, promql_parser.NumberLiteral)
    threshold = tree.rhs.val
    stated = re.findall(r"\d+(?: %)?", rule["annotations"]["summary"])
    if threshold:
        assert (f"{threshold * 100:g} %" if threshold < 1 else f"{threshold:g}") in stated


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_runbook_exists(rule: dict[str, Any]) -> None:
    """The runbook of a rule is a section with the rule's name, with a text."""
    file, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert anchor == rule["alert"].lower()
    (section,) = re.findall(rf"(?ms)^## {rule['alert']}\n(.*?)(?=^## |\Z)", (ROOT / file).read_text())
    assert len(section.split()) > 8


def test_texts_are_plain() -> None:
    """Descriptions and summaries have no banned word."""
    texts = [panel["description"] for panel in PANELS] + [rule["annotations"]["summary"] for rule in RULES]
    assert not [match[0] for text in texts for match in BANNED.finditer(text)]


def test_jobs_scrape_the_documented_path() -> None:
    """The jobs of the page are those of the rules, and scrape Prometheus's default path, which both serve."""
    assert [job.keys() for job in JOBS] == [{"job_name", "static_configs"}] * 2
    assert {job for rule in RULES for job in re.findall(r'job="([^"]+)"', rule["expr"])} == {
        job["job_name"] for job in JOBS
    }
