"""Tests of the bench: the parsers of the generators, the comparison of two sides, and its calls.

The outputs are from h2load 1.52 and wrk 4.1.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import grpc
import pytest

from bench import depth, load, report
from bench.__main__ import main
from bench.calls import PAGE_SIZE, list_call, read_page
from bench.comparison import Rounds, compare, spread
from bench.figures import FIGURES, Figure
from bench.figures.overload import Answer, Overload, Probe, Probes, findings_of
from bench.figures.reading import FACADES, NATIVE, PagedList
from bench.figures.writing import BATCH, batch_call, create_call
from bench.ledger import ORGANIZATION, POOLS, WRITERS, Ledger, build, seed
from bench.load import Latencies, Load, LoadFailed, Offered, parse_h2load, parse_h2load_log, parse_wrk
from bench.report import Finding, at_least, at_most
from bench.servers import Server, daybook
from bench.traffic import PICKS, Mix, Traffic

README = Path(__file__).resolve().parents[2] / "bench" / "README.md"

H2LOAD = """\
starting benchmark...
spawning thread #0: 8 total client(s).
Warm-up started for thread #0.
progress: 100% of clients started
Warm-up phase is over for thread #0.
Main benchmark duration is started for thread #0.
Application protocol: h2c
Main benchmark duration is over for thread #0. Stopping all clients.
Stopped all clients for thread #0

finished in 1.01s, 437.00 req/s, 97.13KB/s
requests: 437 total, 501 started, 437 done, 437 succeeded, 0 failed, 0 errored, 0 timeout
status codes: 437 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 97.13KB (99457) total, 86.87KB (88951) headers (space savings 20.18%), 4.20KB (4302) data
                     min         max         mean         sd        +/- sd
time for request:    11.00ms    443.66ms    137.02ms     60.12ms    69.79%
time for connect:       88us       223us       165us        45us    62.50%
time to 1st byte:    55.35ms    214.45ms    153.26ms     57.27ms    75.00%
req/s           :      44.96       57.95       54.58        4.17    87.50%
"""
WRK = """\
Running 2s test @ http://127.0.0.1:52080/v1/accounts/example/transactions?pageSize=50
  1 threads and 8 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency    25.24ms   10.71ms  72.37ms   72.53%
    Req/Sec   319.85     56.52   400.00     70.00%
  639 requests in 2.01s, 12.65MB read
Requests/sec:    318.38
Transfer/sec:      6.30MB
"""


def test_h2load_summary_is_parsed() -> None:
    """The summary of h2load yields the rate, the responses and the bytes of their bodies."""
    assert parse_h2load(H2LOAD) == Load(rate=437.0, answers=437, refused=0, body_bytes=4302)


def test_refusals_that_h2load_counts_are_parsed() -> None:
    """Failed requests and responses with a status other than 2xx count as refused."""
    text = H2LOAD.replace("437 succeeded, 0 failed", "420 succeeded, 2 failed")
    text = text.replace("437 2xx, 0 3xx, 0 4xx, 0 5xx", "420 2xx, 1 3xx, 4 4xx, 10 5xx")
    assert parse_h2load(text).refused == 17


def test_streams_that_h2load_cut_off_are_not_refused() -> None:
    """A stream with a status but without an end counts as 2xx, but not as an answer."""
    text = H2LOAD.replace("437 2xx", "453 2xx")
    assert (parse_h2load(text).answers, parse_h2load(text).refused) == (437, 0)


def test_h2load_log_is_parsed() -> None:
    """Latencies are read from the third column of the log."""
    log = "".join(f"{1795331534237746 + 10 * number}\t200\t{number}\n" for number in range(200, 0, -1))
    assert parse_h2load_log(log) == Latencies(median=101, p99=199)


def test_wrk_summary_is_parsed() -> None:
    """The summary of wrk yields the rate, the responses and their bytes."""
    assert parse_wrk(WRK) == Load(rate=318.38, answers=639, refused=0, body_bytes=round(12.65 * 1024 * 1024))


def test_refusals_that_wrk_counts_are_parsed() -> None:
    """Responses with a status other than 2xx and socket errors count as refused."""
    text = WRK.replace(
        "Requests/sec",
        "  Socket errors: connect 1, read 2, write 3, timeout 4\n  Non-2xx or 3xx responses: 421\nRequests/sec",
    )
    assert parse_wrk(text).refused == 431


def test_statuses_of_an_overload_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An overload has the statuses of all generators, and the requests that they sent, at a share of the rate each."""
    (tmp_path / "h2load").write_text(
        '#!/bin/sh\nfor option; do case "$option" in\n--rps=*) test "$option" = --rps=25 || exit 1;;\n'
        f'--log-file=*) printf "1\\t200\\t5\\n1\\t429\\t5\\n" > "${{option#*=}}";;\n'
        f"esac; done\ncat << END\n{H2LOAD}END\n"
    )
    (tmp_path / "h2load").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    posts = [load.Post("v1/accounts", b"{}", {"authorization": "Bearer secret"})] * 2
    offered = load.h2load_offered(1, posts, 1, clients=4, streams=8, rate=200)
    found = {status: len(each) for status, each in offered.microseconds.items()}
    assert (offered.started, found) == (2 * 501, {200: 2, 429: 2})


def overloaded(
    posts: list[Answer], reads: Sequence[Answer] = (), *, started: int = 100_000, check_seconds: float = 0.1
) -> Overload:
    """An overload of ten seconds from second 10 on, with these answers to the probe that posts."""
    call = list_call("key", ORGANIZATION)
    lists = Probe(call, 10, [Answer(5, 0.01, grpc.StatusCode.OK), Answer(15, 0.02, grpc.StatusCode.OK), *reads])
    checks = Probe(call, 10, [Answer(15, check_seconds, grpc.StatusCode.OK)])
    before = Answer(5, 0.01, grpc.StatusCode.OK)
    probes = Probes(lists, Probe(call, 50, [before, *posts]), checks)
    offered = Offered(started, {200: [4_000] * 9_000, 429: [2_000] * 91_000}, 20)
    return Overload((3900.0, 4000.0, 4100.0), 1000, 9_000, offered, probes, 10, ((100, 100), (100, 200_000_100)))


def test_overload_that_is_refused_at_once_holds_every_bar() -> None:
    """Goodput, refusals with retry-after, reads, health checks, memory and the time until normal are findings."""
    refused = Answer(15, 0.005, grpc.StatusCode.RESOURCE_EXHAUSTED, says_when_to_retry=True)
    late = Answer(20.5, 0.4, grpc.StatusCode.OK)
    findings = {each.what: each for each in findings_of("x", overloaded([refused, late]))}
    assert not [each.what for each in findings.values() if each.is_short]
    values = {what.removeprefix("x: "): round(each.value, 6) for what, each in findings.items()}
    assert values == {
        "offered / limit": 10,
        "offered / peak": 2.5,
        "goodput / limit": 0.9,
        "goodput / limit, at most": 0.9,
        "postings refused / sent": 1,
        "p50 of refusals": 5,
        "p95 of refusals": 5,
        "refusals without retry-after": 0,
        "other errors": 0,
        "p50 of the load's refusals": 2,
        "reads served / sent": 1,
        "p50 of reads": 20,
        "p99 of reads": 20,
        "slowest health check": 0.1,
        "until normal": 0.9,
        "growth of the server": 0,
        "growth of the gateway": 200,
    }


def test_overload_that_is_not_refused_well_misses_bars() -> None:
    """A small load, late refusals, or ones without retry-after, other errors, slow checks and recovery are short."""
    posts = [
        Answer(15, 3, grpc.StatusCode.RESOURCE_EXHAUSTED),
        Answer(15, 1, grpc.StatusCode.CANCELLED),
        Answer(21, 0.5, grpc.StatusCode.OK),
    ]
    reads = [Answer(15, 2, grpc.StatusCode.OK), Answer(15, 3, grpc.StatusCode.UNAVAILABLE)]
    short = [
        each.what
        for each in findings_of("x", overloaded(posts, reads, started=80_000, check_seconds=2))
        if each.is_short
    ]
    assert short == [
        "x: offered / limit",
        "x: p50 of refusals",
        "x: p95 of refusals",
        "x: refusals without retry-after",
        "x: other errors",
        "x: reads served / sent",
        "x: p50 of reads",
        "x: p99 of reads",
        "x: slowest health check",
        "x: until normal",
    ]


@pytest.mark.parametrize("parse", [parse_h2load, parse_wrk, parse_h2load_log])
def test_unexpected_output_is_refused(parse: object) -> None:
    """Output that can't be parsed raises LoadFailed."""
    assert callable(parse)
    with pytest.raises(LoadFailed):
        parse("")


def test_missing_generators_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """If generators are missing, the error names the packages to install."""
    monkeypatch.setenv("PATH", "")
    assert main(["--only", "1"]) == 2
    assert "nghttp2-client wrk" in capsys.readouterr().err


def processors_of_this_process() -> set[int] | None:
    """Returns the processors of this process; None on a system without processor affinity."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


@pytest.mark.parametrize(
    ("values", "code", "verdicts"), [([2.0], 0, ["held"]), ([2.0, 0.5], 1, ["held", "short"]), ([], 1, [])]
)
def test_results_are_written_and_decide_the_exit_code(
    values: list[float], code: int, verdicts: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The exit code is 0 only if every bar is held and every figure was measured; results are always written."""

    def measure(_stage: object) -> list[Finding]:
        if not values:
            raise RuntimeError("failed")
        return [Finding(1, "what", value, "", at_least(1)) for value in values]

    for tool in load.TOOLS:
        (tmp_path / tool).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("bench.__main__.PROCESSORS", 1)
    monkeypatch.setattr("bench.__main__.FIGURES", {1: Figure("a figure", measure)})
    # matplotlib is only installed by `make bench`.
    monkeypatch.setattr(report, "plot", lambda _findings, file: file.touch())
    processors = processors_of_this_process()
    assert main(["--only", "1", "--out", str(tmp_path / "out")]) == code
    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [each["verdict"] for each in written["findings"]] == verdicts
    # The databases are deleted, and the process has all its processors again.
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"bench.json", "bench.txt", "bench.png"}
    assert processors_of_this_process() == processors


def test_both_sides_are_measured_in_turns_until_the_ratio_is_stable() -> None:
    """A comparison ends after three rounds if their ratios agree."""
    turns: list[str] = []
    values = iter([10.0, 20.0, 20.0, 40.0, 11.0, 22.0])

    def side(name: str) -> float:
        turns.append(name)
        return next(values)

    compared = compare(lambda: side("above"), lambda: side("below"), Rounds())
    assert turns == ["above", "below"] * 3
    assert (compared.ratio, compared.spread) == (0.5, 0)


def test_rounds_are_bounded_when_the_ratio_is_unstable() -> None:
    """A comparison ends after nine rounds; the ratio is the median."""
    values: Iterator[float] = iter([1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 4.0, 6.0, 5.0, 1.0])
    compared = compare(lambda: next(values), lambda: 1.0, Rounds())
    assert (len(compared.ratios), compared.ratio) == (9, 5.0)


def test_spread_is_the_distance_of_the_quartiles() -> None:
    """The spread is the interquartile range divided by the median, so a single outlier doesn't count."""
    assert spread([1.0, 2.0, 3.0, 4.0, 100.0]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("bar", "value", "verdict"),
    [
        (at_least(0.75), 0.75, "held"),
        (at_least(0.75), 0.7499, "short"),
        (at_most(3), 3.0, "held"),
        (at_most(3), 3.01, "short"),
        (None, 0.0, "reported"),
    ],
)
def test_bar_is_inclusive(bar: report.Bar | None, value: float, verdict: str) -> None:
    """A value that equals its bar is held."""
    finding = Finding(1, "what", value, "", bar)
    assert (finding.verdict, finding.is_short) == (verdict, verdict == "short")
    (written,) = json.loads(report.as_json([finding], {}))["findings"]
    assert (written["value"], written["verdict"]) == (value, verdict)


def test_readme_explains_every_figure() -> None:
    """The README has a paragraph for each figure, under the title of the figure."""
    titles = re.findall(r"^### ([0-9]+)\. (.*?): .+\n\n\S", README.read_text(), re.MULTILINE)
    assert {int(number): title for number, title in titles} == {n: each.title for n, each in FIGURES.items()}
    assert list(FIGURES) == list(range(1, 20))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Ledger, Server]]:
    """Yields a small ledger like the ones that are measured, and a server for it in another process."""
    ledger = build(f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('bench')}/bench.db", 200, POOLS, 3)
    with daybook(ledger.database_url) as server:
        yield ledger, server


def test_ledger_has_full_pages(measured: tuple[Ledger, Server]) -> None:
    """The ledger has a native page of 50 rows with a next page. read_page rejects a page of another size."""
    ledger, server = measured
    (page,) = list_call(ledger.key, ORGANIZATION).answers(server.port)
    assert read_page(page).next_page_token
    with pytest.raises(LoadFailed, match="of 50 transactions and not of 49"):
        read_page(page, PAGE_SIZE - 1)


@pytest.mark.parametrize("listed", [NATIVE, *FACADES], ids=lambda listed: listed.name)
def test_mixed_traffic_is_answered(measured: tuple[Ledger, Server], listed: PagedList) -> None:
    """Mixed traffic reads two full pages of each account of a pool while commits are posted."""
    ledger, server = measured
    calls = listed.calls(server, ledger)
    assert [len(each) for each in calls] == {"spacebring": [2], "dreadnode": [1, 1, 1]}.get(listed.name, [2, 2, 2])
    # The length of this header takes two bytes in HPACK.
    calls[0][0] = replace(calls[0][0], headers={**calls[0][0].headers, "x-note": 200 * "n"})
    lists, commits = Traffic(Mix.by_zipf(calls), Mix.by_zipf(listed.commits(ledger))).run(server.port, 0.5)
    assert lists.answers > 0
    assert commits.answers > 0
    assert lists.refused == commits.refused == 0
    assert listed.calls(server, ledger)


def test_refused_lists_and_responses_of_another_size_raise(measured: tuple[Ledger, Server]) -> None:
    """LoadFailed is raised if a list is refused, or if responses differ in size from the page read before."""
    ledger, server = measured
    calls, commits = NATIVE.calls(server, ledger), Mix.by_zipf(NATIVE.commits(ledger))
    with pytest.raises(LoadFailed, match="lists and 0 commits were refused"):
        Traffic(Mix.by_zipf([[list_call("unknown.key", ORGANIZATION)]]), commits).rate(server.port, 0.2, 5000)
    with pytest.raises(LoadFailed, match="bytes on average and not with 10"):
        Traffic(Mix.by_zipf(calls), commits).rate(server.port, 0.2, 10)


def test_popular_accounts_are_picked_more_often() -> None:
    """Accounts are picked in proportion to the inverse of their rank, and in the same order in every run."""
    mix = Mix.by_zipf([[list_call("key", account_id)] * 2 for account_id in ("first", "second", "third", "fourth")])
    picks = list(islice(mix.picks(), PICKS))
    counts = [count for _, count in Counter(picks).most_common()]
    assert [count / counts[0] for count in counts] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4], rel=0.05)
    assert list(islice(mix.picks(), PICKS)) == picks


def test_ledger_has_accounts_to_charge(measured: tuple[Ledger, Server]) -> None:
    """The request of each writer posts a transaction."""
    ledger, server = measured
    for call in (create_call(ledger), batch_call(ledger)):
        assert len(call.requests) == len(WRITERS)
        call.answers(server.port)
    (newest,) = list_call(ledger.key, WRITERS[0], page_size=1).answers(server.port)
    assert read_page(newest, 1).transactions[0].sequence == 1 + 1 + BATCH


def test_refused_call_raises(measured: tuple[Ledger, Server]) -> None:
    """A refused call raises LoadFailed with its status."""
    with pytest.raises(LoadFailed, match="UNAUTHENTICATED"):
        list_call("unknown.key", ORGANIZATION).answers(measured[1].port)


def test_sizes_of_bodies_are_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """LoadFailed is raised if the bodies are smaller or larger than expected."""
    text = H2LOAD.replace("(4302) data", f"({437 * 20 + 3 * 20}) data")
    (tmp_path / "h2load").write_text(f"#!/bin/sh\ncat << END\n{text}END\n")
    (tmp_path / "h2load").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    call = list_call("unknown.key", ORGANIZATION)
    # A gRPC message has a prefix of five bytes.
    assert call.rate_of_same(1, 1, [bytes(15)]) == 437.0
    assert call.rate_of_same(1, 1, [bytes(7), bytes(3)]) == 437.0
    for other in (bytes(16), bytes(10)):
        with pytest.raises(LoadFailed, match="437 answers of"):
            call.rate_of_same(1, 1, [other])


def test_failed_generator_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A failed generator raises LoadFailed with its exit code and output, but without the API key."""
    failing = tmp_path / "wrk"
    failing.write_text("#!/bin/sh\necho broken\nexit 3\n")
    failing.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(LoadFailed, match="ended with 3:\nbroken") as caught:
        load.wrk("http://127.0.0.1:1/", 1, headers={"authorization": "Bearer secret"})
    assert "secret" not in str(caught.value)


def test_every_list_is_measured_at_every_depth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every list with a full page is measured at the top and, if it has more pages, at greater depths."""
    monkeypatch.setattr(depth, "PAGES", 2)
    monkeypatch.setattr(depth, "WARM_ROUNDS", 0)
    ledger = seed(f"sqlite+aiosqlite:///{tmp_path}/seeded.db", 20_000)
    out = tmp_path / "depth.json"
    arguments = ["--database-url", ledger.database_url, "--tenant", "bench", "--depth", "1500", "--rounds", "1"]
    assert depth.main([*arguments, "--out", str(out)]) in {0, 1}, "either verdict is possible: these figures are noise"
    found = {each["name"]: each["pages"] for each in json.loads(out.read_text())["found"]}
    assert "teable createdTime asc has no full page" in capsys.readouterr().err
    assert {name.split()[0].partition(",")[0] for name in found} == {
        *("accounts/hot", "accounts/-", "lots", "nebulablock", "spacebring", "dreadnode", "paged")
    }
    assert list(found["accounts/-"]) == list(found["spacebring"]) == list(found["paged"]) == ["0", "1000", "1500"]
    assert [len(pages) for pages in found["accounts/-"].values()] == [2, 2, 2]
    assert {place: len(pages) for place, pages in found["dreadnode"].items()} == {"0": 1}
