"""The commands of README.md and docs/get-started.md, run against the demo as a reader would paste them."""

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
    """The JSON values that stand in a text one after another."""
    decoder, values, place = json.JSONDecoder(), [], 0
    while text[place:].strip():
        value, place = decoder.raw_decode(text, place + len(text[place:]) - len(text[place:].lstrip()))
        values.append(value)
    return values


@pytest.mark.parametrize("page", ["README.md", "docs/get-started.md"])
def test_commands_work(gateway: Daybook, page: str, tmp_path: Path) -> None:
    """All commands succeed in their order: no answer is an error, the charge is in the balance, and in the list."""
    account = f"acme-{uuid.uuid4()}"
    script = "".join(re.findall(r"(?ms)^```sh\n(.*?)^```", (ROOT / page).read_text()))
    script = script.replace(":8080", f":{gateway.ports.gateway}").replace(".venv/bin", str(BIN))
    script = re.sub(r"\bacme\b(?!-)", account, script)
    # Last on the path, so that it is used only on a machine without curl.
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
