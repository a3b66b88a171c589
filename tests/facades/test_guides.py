"""The code blocks `sh` and `python` of the documentation, run page by page against the demo."""

from __future__ import annotations

import json
import os
import re
import subprocess
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support import curl
from tests.support.blocks import ALL, Block, is_run
from tests.support.processes import BIN, Daybook, environment, sqlite_url
from tests.support.waiting import SECONDS_MAX

PAGES: dict[str, list[Block]] = {
    page: [block for block in ALL if block.page == page and is_run(block)]
    for page in sorted({block.page for block in ALL if is_run(block)})
}
HISTORY = "account,create_time,category,amount\\nada,2025-01-01T00:00:00Z,purchase,10\\n"
FIRST: Mapping[str, str] = {
    "docs/export.md": "KEY=demo-dreadnode.public\n",
    "docs/import.md": "daybook tenants create acme\n",
    "docs/integrate.md": (
        "export DAYBOOK_ADDRESS=127.0.0.1:50051 DAYBOOK_KEY=demo-dreadnode.public\n"
        "daybook accounts create acme --kind user\n"
        "daybook transactions record acme --kind grant --category purchase --amount 20\n"
    ),
    "docs/move-in.md": (
        "daybook tenants create acme\n"
        "export DAYBOOK_ADDRESS=127.0.0.1:50051\n"
        'export DAYBOOK_KEY="$(daybook keys create --tenant acme --scope admin)"\n'
        f"printf '{HISTORY}' > history.csv\n"
    ),
    "docs/operate/keys.md": (
        "daybook tenants create acme\n"
        "export DAYBOOK_ADDRESS=127.0.0.1:50051\n"
        'export DAYBOOK_KEY="$(daybook keys create --tenant acme)"\n'
        "daybook accounts create spc1 --kind space\n"
        "ID=${DAYBOOK_KEY%%.*}\n"
    ),
}
"""What the reader of a page has done before."""
WITH_ITS_DATABASE = {"docs/import.md", "docs/move-in.md", "docs/operate/keys.md"}
"""Pages whose commands work on the database of the server that they call."""


def answers(text: str) -> list[Any]:
    """Parses a text that consists of several JSON values, one after the other."""
    decoder, values = json.JSONDecoder(), []
    while text := text.lstrip():
        value, end = decoder.raw_decode(text)
        values.append(value)
        text = text[end:]
    return values


def has_charge(printed: str, _folder: Path) -> None:
    """Fails unless the balance and the lists show the charge."""
    # The uid and the key of a new tenant come last.
    found = answers(printed[: printed.rindex("}") + 1])
    assert not [each for each in found if isinstance(each, dict) and "code" in each]
    assert {"19.75"} == {each["amount"] for each in found if "readTime" in each}
    lists = [each["transactions"] for each in found if "transactions" in each]
    assert lists
    assert {"-0.25"} <= {row["amount"] for rows in lists for row in rows}


def has_complete_export(printed: str, folder: Path) -> None:
    """Fails unless the export is complete, as the page checks it."""
    assert printed.splitlines()[-1] == "complete"
    assert (folder / "transactions.csv").read_text(encoding="utf-8-sig").startswith("name,")


def has_one_charge(printed: str, _folder: Path) -> None:
    """Fails unless both commands print the same transaction."""
    names = re.findall(r"\b[0-9a-f]{8}-[0-9a-f-]{27}\b", printed.partition("purchase")[2])
    assert len(names) >= 2, printed
    assert printed.count("19.75") == 2, printed


RESULTS: Mapping[str, Callable[[str, Path], None]] = {
    "README.md": has_charge,
    "docs/export.md": has_complete_export,
    "docs/get-started.md": has_charge,
    "docs/integrate.md": has_one_charge,
}
"""What the commands of a page must have done, besides to succeed."""


@pytest.mark.parametrize("page", PAGES)
def test_documented_commands_succeed(gateway: Daybook, page: str, tmp_path: Path) -> None:
    """The commands and programs of a page succeed, run in order, and do what the page says."""
    account, tools = f"acme-{uuid.uuid4()}", tmp_path / "tools"
    tools.mkdir()
    # Last on the path: used only if curl is not installed.
    curl.install(tools)
    database = gateway.folder / "daybook.db"
    script = FIRST.get(page, "")
    for block in PAGES[page]:
        script += block.text if block.language == "sh" else f"python - <<'END'\n{block.text}END\n"
    for documented, actual in {
        ":8080": f":{gateway.ports.gateway}",
        "127.0.0.1:50051": f"127.0.0.1:{gateway.ports.server}",
        ".venv/bin": str(BIN),
        "/var/lib/daybook/daybook.db": str(database),
        "/var/backups": str(tmp_path),
        "/etc/daybook": str(tmp_path),
        " ID ": " $ID ",
    }.items():
        script = script.replace(documented, actual)
    own = database if page in WITH_ITS_DATABASE else tmp_path / "daybook.db"
    result = subprocess.run(
        ["sh", "-e"],
        input=re.sub(r"\bacme\b(?!-)", account, script),
        cwd=tmp_path,
        env=environment(
            PATH=os.pathsep.join((str(BIN), os.environ["PATH"], str(tools))), DAYBOOK_DATABASE_URL=sqlite_url(own)
        ),
        capture_output=True,
        text=True,
        # A page starts up to ten commands.
        timeout=5 * SECONDS_MAX,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    if page in RESULTS:
        RESULTS[page](result.stdout, tmp_path)
