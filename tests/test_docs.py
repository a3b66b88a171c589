"""The documentation: generated tables are up to date, links work, examples parse, and the English is plain."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import yaml
from daybook.v1.error_reason_pb2 import ErrorReason
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.schema import CreateIndex

from daybook_client.configuration import VARIABLES
from docs import generate
from server.config import Settings
from server.store.tables import transactions
from server.transport import admission
from tests.support.blocks import FENCE, PAGES, blocks
from tests.support.command_line import require_command
from tests.support.methods import METHODS
from tests.support.words import BANNED

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs/reference"
SENTENCE_WORDS_MAX = 40

# Constants that are not limits for callers: sizes of caches, waits, retries, and lengths of echoed input.
INTERNAL = {
    "ANSWER_SECONDS_MAX",
    "ATTRIBUTE_CHARACTERS_MAX",
    "BUCKETS_MAX",
    "CALL_SECONDS_MAX",
    "CHANGED_MAX",
    "CHARACTERS_MAX",
    "CONFIGURED_KEYS_MAX",
    "CREDENTIALS_CACHED_MAX",
    "DIGITS_MAX",
    "EACH_SECONDS_MAX",
    "ECHOED_CHARACTERS_MAX",
    "END_SECONDS_MAX",
    "ENTRY_BYTES_MAX",
    "EXPORT_SECONDS_MAX",
    "FAILURES_MAX",
    "FETCH_SECONDS_MAX",
    "FILTERS_BYTES_MAX",
    "FLUSH_SECONDS_MAX",
    "GROUP_TRANSACTIONS_MAX",
    "IDS_CACHED_MAX",
    "KEYS_AT_ONCE_MAX",
    "KEYS_MAX",
    "KEY_CACHED_SECONDS_MAX",
    "LEFT_SECONDS_MAX",
    "LENGTHS_CACHED_MAX",
    "LINKS_MAX",
    "LOGGED_ID_CHARACTERS_MAX",
    "LOG_PAGES_MAX",
    "LOTS_EXPIRED_MAX",
    "METADATA_PATH_CHARACTERS_MAX",
    "NUMBERS_BYTES_MAX",
    "NUMERIC_ID_DIGITS_MAX",
    "PAGES_BYTES_MAX",
    "PART_BYTES_MAX",
    "PART_ITEMS_MAX",
    "PAUSE_SECONDS_MAX",
    "QUERIES_BYTES_MAX",
    "QUERIES_CACHED_MAX",
    "READ_LOCK_SECONDS_MAX",
    "REFUSED_REQUEST_SECONDS_MAX",
    "REFUSED_WAITING_MAX",
    "RENDERED_BYTES_MAX",
    "REPLICA_SECONDS_MAX",
    "RETRY_SECONDS_MAX",
    "ROWS_PER_STATEMENT_MAX",
    "SCRAPERS_MAX",
    "SCRAPE_SECONDS_MAX",
    "SET_BYTES_MAX",
    "SET_KEYS_MAX",
    "SPANS_WAITING_MAX",
    "START_SECONDS_MAX",
    "STATEMENTS_CACHED_MAX",
    "STATEMENT_BYTES_CACHED_MAX",
    "STOP_SECONDS_MAX",
    "TOKEN_KEYS_MAX",
    "TRIES_MAX",
    "WAIT_SECONDS_MAX",
    "WHOLE_LOTS_MAX",
}


def by_path(page: Path) -> str:
    """Returns the path of a page, as the id of a test case."""
    return str(page.relative_to(ROOT))


def without_code(text: str) -> str:
    """Returns a page without code blocks and comments."""
    return re.sub(r"(?s)<!--.*?-->", "", FENCE.sub("", text))


def anchors(page: Path) -> set[str]:
    """Returns the anchors of the headings of a page, as a forge generates them."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def targets(page: Path) -> Iterator[tuple[Path, str]]:
    """Yields the file and the anchor of each link from a page into the project."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if not re.match(r"https?:", target):
            file, _, anchor = target.partition("#")
            yield (page.parent / file).resolve() if file else page, anchor


@pytest.mark.parametrize("page", generate.pages(), ids=by_path)
def test_tables_are_up_to_date(page: Path) -> None:
    """The generated tables of a page equal the output of `make gen`."""
    assert page.read_text() == generate.generated(page.read_text()), "run `make gen`"


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("reference/settings.md", Settings.model_fields.keys()),
        ("reference/methods.md", {method.name for method in METHODS}),
        ("errors.md", set(ErrorReason.keys()[1:])),
    ],
)
def test_tables_are_complete(page: str, names: set[str]) -> None:
    """The generated tables have every setting, method and error reason."""
    block = generate.BLOCK.search((ROOT / "docs" / page).read_text())
    assert block is not None
    assert set(re.findall(r"^\| `(\w+)` \|", block[0], re.MULTILINE)) == names


def test_every_limit_is_in_the_table() -> None:
    """The table of limits has each setting that is a limit, and each constant that limits callers."""
    sources = {each for _, rows in generate.LIMITS for row in rows for each in (row.source, *row.equal)}
    assert sources & Settings.model_fields.keys() == {
        name for name in Settings.model_fields if name.endswith("_max") or "rate_limit" in name
    }
    files = [file for file in (ROOT / "server").rglob("*.py") if not {"demo", "seed"} & set(file.parts)]
    constants = {
        name for file in files for name in re.findall(r"^([A-Z][A-Z_]*_MAX)\b.* = ", file.read_text(), re.MULTILINE)
    }
    assert constants == {each.rpartition(".")[2] for each in sources if each.endswith("_MAX")} | INTERNAL
    assert {each.removeprefix("gateway: ") for each in sources if " " in each} == generate.gateway_limits().keys()


def test_limits_of_gateway_and_server_are_consistent() -> None:
    """Of two limits, the lower one is on the side that can explain the error better."""
    gateway, defaults = generate.gateway_limits(), Settings.model_fields
    (least,) = [each.ge for each in defaults["metadata_bytes_max"].metadata if hasattr(each, "ge")]
    # gRPC adds 32 bytes for each header (RFC 9113, 6.5.2).
    assert least > gateway["headers"] * 1024 + 32 * gateway["header count"]
    # The server must refuse reads first, because it knows the caller. It must be able to run all writes.
    assert gateway["writes"] <= defaults["calls_in_flight_max"].default
    running = defaults["calls_in_flight_max"].default + defaults["streams_in_flight_max"].default
    assert gateway["reads"] > running + admission.WAITING_CALLS_MAX
    # The server refuses streams on a full connection, and counts each stream slightly longer than Envoy.
    (cluster,) = yaml.safe_load((ROOT / "envoy.yaml").read_text())["static_resources"]["clusters"]
    (protocol,) = cluster["typed_extension_protocol_options"].values()
    streams = protocol["explicit_http_config"]["http2_protocol_options"]["max_concurrent_streams"]
    assert 2 * streams <= defaults["concurrent_streams_max"].default


@pytest.mark.parametrize("page", PAGES, ids=by_path)
def test_links_work(page: Path) -> None:
    """The target of each link is an existing file and heading."""
    dead = [
        f"{file.name}#{anchor}"
        for file, anchor in targets(page)
        if not file.exists() or (anchor and anchor not in anchors(file))
    ]
    assert not dead


def test_every_page_is_in_the_index() -> None:
    """docs/README.md or docs/adr/README.md links to every page."""
    indexes = [ROOT / "docs/README.md", ROOT / "docs/adr/README.md"]
    linked = {file for index in indexes for file, _ in targets(index)}
    assert not [by_path(page) for page in generate.pages() if page not in linked and page != indexes[0]]


def test_pages_named_in_code_exist() -> None:
    """Each page that code, tests or contracts mention exists."""
    files = [
        file
        for folder in ("server", "tests", "protos", "bench", ".ci")
        for file in (ROOT / folder).rglob("*")
        if file.suffix in {".py", ".proto", ".yaml", ".lua", ".md"}
    ]
    gone = [
        f"{file.relative_to(ROOT)}: {name}"
        for file in [*files, ROOT / "Makefile", ROOT / "envoy.yaml"]
        for name in re.findall(r"\bdocs/[\w./-]+\.md\b", file.read_text())
        if not (ROOT / name).exists()
    ]
    assert not gone


@pytest.mark.parametrize("page", PAGES, ids=by_path)
def test_examples_parse(page: Path) -> None:
    """Blocks of JSON, TOML and YAML parse, and `daybook` accepts the arguments of each command on a page."""
    parsers: Mapping[str, Callable[[str], object]] = {"json": json.loads, "toml": tomllib.loads, "yaml": yaml.safe_load}
    for block in blocks(by_path(page)):
        if block.language in parsers:
            parsers[block.language](block.text)
        for line in block.text.splitlines() if block.language == "sh" else ():
            command = line.strip().removeprefix(".venv/bin/")
            if command.startswith("daybook ") and not command.endswith("\\"):
                require_command(*shlex.split(command)[1:])


def test_indexes_in_the_upgrade_page_match_the_schema() -> None:
    """Each statement in the page of upgrades builds an index of the schema."""
    (block,) = blocks("docs/operate/upgrades.md", "sql")
    shown = {" ".join(each.split()) for each in re.sub(r"--.*", "", block.text).split(";") if each.strip()}
    dialect = PGDialect()  # type: ignore[no-untyped-call]  # SQLAlchemy's constructor has no types
    compiled = (CreateIndex(index).compile(dialect=dialect) for index in transactions.indexes)
    built = {" ".join(str(each).split()).replace("INDEX ", "INDEX CONCURRENTLY ", 1) for each in compiled}
    assert len(shown) == 6
    assert shown <= built


@pytest.mark.parametrize("page", PAGES, ids=by_path)
def test_mutations_in_examples_have_an_idempotency_key(page: Path) -> None:
    """Each curl example of a mutation sends the header Idempotency-Key."""
    for line in page.read_text().splitlines():
        if "curl" in line and " -d " in line and "/v1/" in line:
            assert "Idempotency-Key" in line


@pytest.mark.parametrize("page", PAGES, ids=by_path)
def test_pages_have_no_banned_words(page: Path) -> None:
    """No page has a banned word, outside of generated tables, whose text is checked in the code."""
    text = " ".join(without_code(generate.BLOCK.sub("", page.read_text())).split())
    assert not [match[0] for match in BANNED.finditer(text)]


def sentences(text: str) -> Iterator[str]:
    """Yields the sentences of a page. A table cell or a list item also ends a sentence."""
    text = re.sub(r"\]\([^)\s]*\)", "]", re.sub(r"`[^`]*`", "code", without_code(text)))
    for part in re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) |\||<br>|(?m:^#+ .*$)", text):
        yield from re.split(r"(?<=[.:?!])\s", " ".join(part.split()))


@pytest.mark.parametrize("page", PAGES, ids=by_path)
def test_sentences_are_short(page: Path) -> None:
    """No sentence has more than 40 words."""
    assert not [each for each in sentences(page.read_text()) if len(each.split()) > SENTENCE_WORDS_MAX]


def test_rules_of_language_find_violations() -> None:
    """The banned words and the length of sentences are detected."""
    text = "Whoever asks is told. Keys of before | a | " + "word " * 41 + "\n"
    assert [match[0] for match in BANNED.finditer(text)] == ["Whoever", "is told", "of before"]
    assert max(len(each.split()) for each in sentences(text)) == 41


def quoted() -> Iterator[tuple[str, str]]:
    """Yields every text between backticks in the documentation, without generated tables, with its page."""
    for page in PAGES:
        text = generate.BLOCK.sub("", without_code(page.read_text()))
        yield from ((by_path(page), each) for each in re.findall(r"`([^`\n]+)`", text) if page.name != "CHANGELOG.md")


SETTING = re.compile(
    r"DAYBOOK_[A-Z_0-9]+|(database|gateway|oauth2|tls|token_keys|rate_limit|keepalive|worker|otlp)_[a-z_]*[a-z]"
    r"|[a-z_]+_max"
)


def test_settings_named_in_pages_exist() -> None:
    """Each name of a setting, or a variable of the server or the client, exists. Vendors have similar names."""
    named = {(page, each) for page, each in quoted() if SETTING.fullmatch(each) and "facades" not in page}
    assert named
    known = Settings.model_fields.keys() | VARIABLES.keys()
    assert not {each for each in named if each[1].removeprefix("DAYBOOK_").lower() not in known}


def test_metrics_named_in_pages_exist() -> None:
    """Each metric in a page, without the suffix of its series, is in the table of metrics."""
    table = set(re.findall(r"^\| `(\w+)` \|", (REFERENCE / "metrics.md").read_text(), re.MULTILINE))
    named = {(page, name) for page, each in quoted() for name in re.findall(r"\bdaybook_(?!client\b)\w+", each)}
    assert named
    assert not {(page, name) for page, name in named if re.sub(r"_(bucket|count|sum)$", "", name) not in table}


def test_files_named_in_pages_exist() -> None:
    """Each path of the project in a page exists; `<vendor>` and `NNNN_name` match any name."""
    paths = {(page, each) for page, each in quoted() if re.match(r"(server|tests|protos|docs|bench|\.ci)/", each)}
    assert paths
    patterns = {each: re.sub(r"<\w+>|NNNN_name", "*", each[1].rstrip("/")) for each in paths}
    assert not [each for each, pattern in patterns.items() if not list(ROOT.glob(pattern))]


def test_events_named_in_pages_exist() -> None:
    """Each log event and span in a page for operators is in the code."""
    source = "".join(file.read_text() for file in (ROOT / "server").rglob("*.py"))
    events = {
        (page, each)
        for page, each in quoted()
        if page.startswith("docs/operate/")
        and re.fullmatch(r"(?!make |daybook |systemctl |database (?:read|snapshot|write)$)[a-z]+( [a-z]+)+", each)
    }
    assert events
    assert not {(page, each) for page, each in events if f'"{each}"' not in source}
