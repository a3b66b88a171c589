"""What a test run says on a machine without a browser."""

from __future__ import annotations

import subprocess
import sys

from tests.support.browsers import LEFT_OUT
from tests.support.processes import ROOT, environment


def test_left_out_tests_are_named() -> None:
    """Without a browser the tests of the page are not collected, and the last lines say so."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "--numprocesses", "0", "--collect-only", "--quiet", "tests/page"],
        cwd=ROOT,
        env=environment(PATH=""),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "tests/page/test_files.py" in result.stdout
    assert "tests/page/test_page" not in result.stdout.replace(LEFT_OUT, "")
    assert LEFT_OUT in result.stdout.splitlines()[-3:]
