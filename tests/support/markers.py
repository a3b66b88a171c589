"""Markers that select the engine or the event loop of a test."""

from __future__ import annotations

import pytest

only_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
only_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
"""Markers of tests that need only one engine."""

shares_a_server = pytest.mark.asyncio(loop_scope="module")
"""Marks tests with `shared_client`, which run in the event loop of its server."""
