"""How many examples the tests draw whose examples take long."""

from __future__ import annotations

import os

_FACTOR = int(os.environ.get("EXAMPLES_FACTOR", "1"))


def examples(count: int) -> int:
    """A test's `max_examples`: this count times EXAMPLES_FACTOR of the environment, which is 1 if it isn't set."""
    return count * _FACTOR
