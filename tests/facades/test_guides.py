"""The commands of README.md and docs/get-started.md, run against the demo."""

from __future__ import annotations

import json
import os
import re
import subprocess
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.support import curl
from tests.support.processes import BIN, ROOT, Daybook, environment
from tests.support.waiting import SECONDS_MAX


def answers(text: str) -> list[Any]:
    """The concatenated JSON values of a text."""
    decoder, values, offset = json.JSONDecoder(), [], 0
    while text[offset:].strip():
        value, offset = decoder.raw_decode(text, offset + len(text[offset:]) - len(text[offset:].lstrip()))
        values.append(value)
    return values


@pytest.mark.parametrize("page", ["README.md", "docs/get-started.md"])
def test_documented_commands_succeed(gateway: Daybook, page: str, tmp_path: Path) -> None:
    """A page's commands succeed in order: no answer is an error, and balance and list have the charge."""
    account = f"acme-{uuid.uuid4()}"
    script = "".join(re.findall(r"(?ms)^```sh\n(.*?)^```", (ROOT / page).read_text()))
    script = script.replace(":8080", f":{gateway.ports.gateway}").replace(".venv/bin", str(BIN))
    script = re.sub(r"\bacme\b(?!-)", account, script)
    # Last on the path: used only if curl is not installed.
    curl.install(tmp_path)
    result = subprocess.run(
        ["sh", "-e"],
        input=script,
        env=environment(PATH=f"{os.environ['PATH']}{os.pathsep}{tmp_path}"),
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = answers(result.stdout)
    assert not [each for each in found if isinstance(each, dict) and "code" in each]
    assert {"19.75"} == {each["amount"] for each in found if "readTime" in each}
    lists = [each["transactions"] for each in found if "transactions" in each]
    assert lists
    assert {"-0.25"} <= {row["amount"] for rows in lists for row in rows}
