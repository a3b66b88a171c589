"""Fixtures of the tests of imports: a server, and a tenant for each test."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from daybook_client import Daybook
from tests.support.command_line import printed
from tests.support.importing import Importer
from tests.support.processes import sqlite_url
from tests.support.python_clients import ServedLedger


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedLedger]:
    """A server for all tests of imports."""
    started = ServedLedger.start(tmp_path_factory.mktemp("ledger"))
    yield started
    assert started.daybook.stop() == 0


@pytest.fixture
def importer(served: ServedLedger) -> Iterator[Importer]:
    """A command for an empty tenant."""
    database: Path = served.folder / "daybook.db"
    slug = f"import-{uuid.uuid4()}"
    printed(sqlite_url(database), "tenants", "create", slug)
    key = printed(sqlite_url(database), "keys", "create", "--tenant", slug, "--scope", "admin")
    with Daybook(served.address, key=key) as client:
        yield Importer(served.address, key, client)
