"""The samples of vendors' pages run unchanged, except for the host, the token and TLS.

Each `<vendor>/samples/sample.*` has the form of a call on the vendor's page, or of the generator
of such pages: a curl command, Python's http.client, JavaScript's fetch, Node's http. Node is
installed from the package index. curl isn't, so a sample runs with a substitute (`curl.py`);
`test_up.py` uses the real curl if it is installed.
"""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from server.demo import dreadnode, nebulablock, spacebring, teable
from server.demo.load import SECRET
from tests.support import curl
from tests.support.http_client import read_json
from tests.support.openapi import VENDORS, require_page
from tests.support.processes import NODE, Daybook
from tests.support.waiting import SECONDS_MAX

SAMPLES = sorted(Path(__file__).parent.glob("*/samples/sample.*"))
KEYS = {
    "dreadnode": dreadnode.KEY,
    "nebulablock": nebulablock.DOCUMENTED_KEY,
    "spacebring": spacebring.KEY,
    "teable": teable.KEY,
}
# console.log abbreviates nested objects; this prints them in full.
PRINT_ALL = "console.log = (value) => process.stdout.write(typeof value === 'string' ? value : JSON.stringify(value));"
PROGRAMS = {
    ".sh": ["sh"],
    ".py": [sys.executable],
    ".mjs": [NODE, "--import", f"data:text/javascript,{PRINT_ALL}"],
    ".cjs": [NODE, "--import", f"data:text/javascript,{PRINT_ALL}"],
}


def directed_at(gateway: Daybook, vendor: str, text: str) -> str:
    """A sample with the gateway's address and a credential of the demo."""
    address, key = urlsplit(gateway.origin).netloc, KEYS[vendor]
    replacements = {
        "https://api.example.com": gateway.origin,
        'HTTPSConnection("api.example.com")': f'HTTPConnection("{address}")',
        "require('https')": "require('http')",
        "hostname: 'api.example.com'": "hostname: '127.0.0.1'",
        "port: null": f"port: {gateway.ports.gateway}",
        "REPLACE_BEARER_TOKEN": f"{key}.{SECRET}",
        "REPLACE_BASIC_AUTH": base64.b64encode(f"{key}:{SECRET}".encode()).decode(),
        "REPLACE_NETWORK_ID": spacebring.NETWORK,
    }
    for old, new in replacements.items():
        text = text.replace(old, new)
    assert "example.com" not in text
    assert "REPLACE" not in text
    return text


def rows_of(vendor: str, body: Any) -> list[Any]:
    """The rows of a page."""
    match vendor:
        case "teable":
            rows = body["data"]
        case "nebulablock":
            rows = body["data"]["credit_history"]
        case "spacebring":
            rows = body["transactions"]
        case _:
            rows = body
    assert isinstance(rows, list)
    return rows


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: f"{sample.parent.parent.name}{sample.suffix}")
def test_sample_prints_a_page(gateway: Daybook, tmp_path: Path, sample: Path) -> None:
    """A sample exits with 0 and prints two rows in the documented shape."""
    vendor = sample.parent.parent.name
    program = tmp_path / sample.name
    program.write_text(directed_at(gateway, vendor, sample.read_text()))
    curl.install(tmp_path)
    result = subprocess.run(
        [*PROGRAMS[sample.suffix], str(program)],
        env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, b"")
    require_page(vendor, result.stdout)
    assert len(rows_of(vendor, read_json(result.stdout.decode()))) == 2


def test_every_vendor_has_samples() -> None:
    """Each vendor has samples in three languages; Paged is Daybook's own."""
    found = {(sample.parent.parent.name, sample.suffix) for sample in SAMPLES}
    documented = set(VENDORS) - {"paged"}
    assert {(vendor, suffix) for vendor in documented for suffix in (".sh", ".py", ".mjs")} <= found
