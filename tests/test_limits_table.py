"""The table of limits in docs/operating.md says what the code does, and leaves no limit out."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import yaml

from server import app
from server.config import Settings
from server.facades import all_facades, nebulablock
from server.ledger import access, paging, posting
from server.posting import poster
from server.rpc import transactions
from server.store import list_statements
from server.transport import admission, auth, filters, metadata, page_tokens, validation
from server.usecases import verification

ROOT = Path(__file__).parents[1]
Row: TypeAlias = tuple[str, str, str, str]

OF_FACADES = {"OFFSET_MAX", "NUMERIC_ID_DIGITS_MAX"}
"""The bounds of facades that are not about a page."""


def bounds_in(source: str) -> set[str]:
    """The names of the bounds that a module defines."""
    return set(re.findall(r"^([A-Z][A-Z_]*_MAX)\b.* = ", source, re.MULTILINE))


def page_sizes() -> dict[str, int]:
    """How many rows a page of each facade has at most, by the name of the facade's constant."""
    return {
        f"{facade.VENDOR.name}.{name}": getattr(facade, name)
        for facade in all_facades()
        for name in sorted(bounds_in(inspect.getsource(facade)) - OF_FACADES)  # type: ignore[arg-type]  # is a module
    }


CONSTANTS: Mapping[str, Mapping[str, int]] = {
    "an answer": {"ANSWER_BYTES_MAX": app.ANSWER_BYTES_MAX},
    "rows of a page": {"PAGE_SIZE_MAX": validation.PAGE_SIZE_MAX},
    "requests of a batch, items of a message of an import": {"BATCH_SIZE_MAX": validation.BATCH_SIZE_MAX},
    "requests of a batch together": {"BATCH_BYTES_MAX": transactions.BATCH_BYTES_MAX},
    "rows read for a page whose filter no index serves": {"ROWS_READ_MAX": list_statements.ROWS_READ_MAX},
    "combinations of category, kind and state of which a list is merged": {"WALKS_MAX": list_statements.WALKS_MAX},
    "rows of a page together": {"PAGE_BYTES_MAX": paging.PAGE_BYTES_MAX},
    "rows of a page of a documented API": page_sizes(),
    "calls that gRPC holds for a server process": {"PENDING_CALLS_MAX": app.PENDING_CALLS_MAX},
    "calls that wait for a place": {"WAITING_CALLS_MAX": admission.WAITING_CALLS_MAX},
    "calls that wait to be posted": {"QUEUE_LENGTH_MAX": poster.QUEUE_LENGTH_MAX},
    "verifications under way": {"UNDER_WAY_MAX": verification.UNDER_WAY_MAX},
    "a credential": {"CREDENTIAL_CHARACTERS_MAX": auth.CREDENTIAL_CHARACTERS_MAX},
    "a page token": {"TOKEN_CHARACTERS_MAX": page_tokens.TOKEN_CHARACTERS_MAX},
    "a filter": {"FILTER_CHARACTERS_MAX": filters.FILTER_CHARACTERS_MAX},
    "values of one field of a filter": {"VALUES_MAX": filters.VALUES_MAX},
    "a request_id": {"REQUEST_ID_CHARACTERS_MAX": validation.REQUEST_ID_CHARACTERS_MAX},
    "labels of a transaction": {"LABELS_MAX": validation.LABELS_MAX},
    "a label": {"LABEL_CHARACTERS_MAX": validation.LABEL_CHARACTERS_MAX},
    "a priority": {"PRIORITY_MAX": validation.PRIORITY_MAX},
    "metadata of a transaction or a company": {"METADATA_BYTES_MAX": metadata.METADATA_BYTES_MAX},
    "a number in that metadata": {"METADATA_NUMBER_MAX": metadata.METADATA_NUMBER_MAX},
    "depth of that metadata": {"METADATA_DEPTH_MAX": metadata.METADATA_DEPTH_MAX},
    "any text of a request": {"TEXT_CHARACTERS_MAX": validation.TEXT_CHARACTERS_MAX},
    "a display name": {"DISPLAY_NAME_CHARACTERS_MAX": validation.DISPLAY_NAME_CHARACTERS_MAX},
    "a time to live": {"TIME_TO_LIVE_DAYS_MAX": validation.TIME_TO_LIVE_DAYS_MAX},
    "a grace period of a key": {"GRACE_PERIOD_DAYS_MAX": validation.GRACE_PERIOD_DAYS_MAX},
    "secrets of a key that are good beside its newest": {"RETIRED_SECRETS_MAX": access.RETIRED_SECRETS_MAX},
    "lots that one transaction takes from": {"LOTS_TAKEN_MAX": posting.LOTS_TAKEN_MAX},
    "an offset (Nebula Block)": {"OFFSET_MAX": nebulablock.OFFSET_MAX},
}
"""The constants behind the rows."""

OF_OURS = {
    "ANSWER_SECONDS_MAX",
    "ATTRIBUTE_CHARACTERS_MAX",
    "BUCKETS_MAX",
    "CONFIGURED_KEYS_MAX",
    "CREDENTIALS_CACHED_MAX",
    "EACH_SECONDS_MAX",
    "END_SECONDS_MAX",
    "ENTRY_BYTES_MAX",
    "EXPORT_SECONDS_MAX",
    "FAILURES_MAX",
    "FETCH_SECONDS_MAX",
    "FILTERS_BYTES_MAX",
    "FLUSH_SECONDS_MAX",
    "GROUP_TRANSACTIONS_MAX",
    "HOLDERS_CACHED_MAX",
    "KEYS_AT_ONCE_MAX",
    "KEYS_MAX",
    "KEY_CACHED_SECONDS_MAX",
    "LEFT_SECONDS_MAX",
    "LENGTHS_CACHED_MAX",
    "LINKS_MAX",
    "LOG_PAGES_MAX",
    "LOTS_EXPIRED_MAX",
    "NUMBERS_BYTES_MAX",
    "PAGES_BYTES_MAX",
    "PART_BYTES_MAX",
    "PART_ITEMS_MAX",
    "PAUSE_SECONDS_MAX",
    "QUERIES_BYTES_MAX",
    "QUERIES_CACHED_MAX",
    "READ_LOCK_SECONDS_MAX",
    "RENDERED_BYTES_MAX",
    "REPLICA_SECONDS_MAX",
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
"""What is bounded of ours, and no caller can be beyond: caches, pools, waits, tries."""

OF_ANSWERS = {
    "CHARACTERS_MAX": "the row of other texts",
    "ECHOED_CHARACTERS_MAX": "how much of a wrong value is told back",
    "METADATA_PATH_CHARACTERS_MAX": "how much of a path in metadata is told back",
    "NUMERIC_ID_DIGITS_MAX": "from where on a number is shown for an id",
}
"""The rest, and what they are."""


def rows() -> list[Row]:
    """The table."""
    section = (ROOT / "docs/operating.md").read_text().partition("## Limits")[2].partition("\n## ")[0]
    found = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", section, re.MULTILINE)
    return [row for row in found if row[0] != "limit"]


ROWS = {row[0]: row for row in rows()}


def number_in(text: str) -> int:
    """The first number of a text, with commas between thousands."""
    found = re.match(r"[\d,]+", text)
    assert found, text
    return int(found[0].replace(",", ""))


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_row_says_what_the_code_does(name: str) -> None:
    """The number of a row is that of its constants."""
    assert set(CONSTANTS[name].values()) == {number_in(ROWS[name][1])}


def test_rows_of_settings_have_their_defaults() -> None:
    """Each row that names a setting has its default, and each setting that is a limit has a row."""
    of_settings = {row[2].strip("`"): number_in(row[1]) for row in rows() if row[2] != "fixed"}
    limits = {name for name in Settings.model_fields if name.endswith("_max") or "rate_limit" in name}
    assert of_settings == {name: Settings.model_fields[name].default for name in limits}


def test_every_constant_is_somewhere() -> None:
    """A limit that is new in the code has a row, or is none that a caller can meet."""
    found: set[str] = set()
    for file in (ROOT / "server").rglob("*.py"):
        if not {"demo", "seed"} & set(file.parts):
            found |= bounds_in(file.read_text())
    tabled = {name.rpartition(".")[2] for constants in CONSTANTS.values() for name in constants}
    assert found == tabled | OF_OURS | OF_ANSWERS.keys()


def test_rows_of_the_gateway() -> None:
    """What envoy.yaml bounds, its rows say; and the server takes more metadata than the gateway lets through."""
    configuration = yaml.safe_load((ROOT / "envoy.yaml").read_text())
    manager: Any = configuration["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    (buffer,) = [each["typed_config"] for each in manager["http_filters"] if each["name"].endswith(".buffer")]
    (cluster,) = configuration["static_resources"]["clusters"]
    (thresholds,) = cluster["circuit_breakers"]["thresholds"]
    assert {
        "a body over REST": buffer["max_request_bytes"],
        "headers of a request, its path among them": manager["max_request_headers_kb"],
        "number of headers": manager["common_http_protocol_options"]["max_headers_count"],
        "calls under way on a connection to the gateway": manager["http2_protocol_options"]["max_concurrent_streams"],
        "requests under way at a gateway": thresholds["max_requests"],
    } == {
        name: number_in(ROWS[name][1])
        for name in (
            "a body over REST",
            "headers of a request, its path among them",
            "number of headers",
            "calls under way on a connection to the gateway",
            "requests under way at a gateway",
        )
    }
    (least,) = [each.ge for each in Settings.model_fields["metadata_bytes_max"].metadata if hasattr(each, "ge")]
    # gRPC counts 32 bytes more for each header (RFC 9113, 6.5.2).
    largest = (
        manager["max_request_headers_kb"] * 1024 + 32 * manager["common_http_protocol_options"]["max_headers_count"]
    )
    assert least > largest
    # So that it is the server that refuses, which knows whose calls they are.
    defaults = Settings.model_fields
    of_server = defaults["calls_under_way_max"].default + defaults["streams_under_way_max"].default
    assert thresholds["max_requests"] > of_server + admission.WAITING_CALLS_MAX
    # The server refuses a stream where a connection is full, and counts each for a moment longer than Envoy.
    (protocol,) = cluster["typed_extension_protocol_options"].values()
    streams = protocol["explicit_http_config"]["http2_protocol_options"]["max_concurrent_streams"]
    assert 2 * streams <= defaults["concurrent_streams_max"].default


def test_every_row_is_held() -> None:
    """No row is there that nothing here looks at."""
    gateway = {name for name, row in ROWS.items() if row[2] == "fixed"} - CONSTANTS.keys()
    assert gateway == {
        "a body over REST",
        "headers of a request, its path among them",
        "number of headers",
        "calls under way on a connection to the gateway",
        "requests under way at a gateway",
        "other texts",
    }
