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
    """Parses a text that consists of several JSON values, one after the other."""
    decoder, values = json.JSONDecoder(), []
    while text := text.lstrip():
        value, end = decoder.raw_decode(text)
        values.append(value)
        text = text[end:]
    return values


@pytest.mark.parametrize("page", ["README.md", "docs/get-started.md"])
def test_documented_commands_succeed(gateway: Daybook, page: str, tmp_path: Path) -> None:
    """The commands of a page succeed, run in order; afterwards the balance and the list show the charge."""
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
