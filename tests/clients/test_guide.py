"""The programs of docs/python.md run one after the other against a real server, and print what their comments say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.support.processes import ROOT, environment
from tests.support.python_clients import ServedLedger
from tests.support.waiting import SECONDS_MAX

PAGE = (ROOT / "docs" / "python.md").read_text()


def test_guide_prints_what_it_says(tmp_path: Path) -> None:
    """Each `print` of the page prints what the comment after it says, once or in each round of its loop."""
    program = "\n".join(re.findall(r"(?s)```python\n(.*?)```", PAGE))
    (tmp_path / "guide.py").write_text(program)
    ledger = ServedLedger.start(tmp_path / "ledger")
    result = subprocess.run(
        [sys.executable, "guide.py"],
        cwd=tmp_path,
        env=environment(DAYBOOK_ADDRESS=ledger.address, DAYBOOK_KEY=ledger.key),
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    printed = result.stdout.splitlines()
    expected = re.findall(r"print\(.*\)  # (.*)", program)
    assert len(expected) > 10
    # A line in a loop is printed twice.
    assert [line for number, line in enumerate(printed) if printed[number - 1 : number] != [line]] == [
        line for number, line in enumerate(expected) if expected[number - 1 : number] != [line]
    ]
    assert ledger.daybook.stop() == 0
