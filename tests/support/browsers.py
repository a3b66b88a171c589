"""The browser of this machine, for the tests of the page and of the reference."""

from __future__ import annotations

import shutil

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
"""The path of a Chromium, or None."""
LEFT_OUT = "Chromium is missing, so the tests in a browser were left out: tests/page/test_page*.py, test_reference.py"
