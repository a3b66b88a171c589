"""The number of examples of property-based tests with slow examples."""

from __future__ import annotations

import os

_FACTOR = int(os.environ.get("EXAMPLES_FACTOR", "1"))


def examples(count: int) -> int:
    """Returns `max_examples` of a test: `count` times the environment variable EXAMPLES_FACTOR, by default 1."""
    return count * _FACTOR
