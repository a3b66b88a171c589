"""Marks that choose the engine or the event loop of a test."""

from __future__ import annotations

import pytest

only_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
only_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
"""For what is decided before any database is asked: once is enough."""

shares_a_server = pytest.mark.asyncio(loop_scope="module")
"""For tests with `shared_client`, which must run in the loop of its server."""
