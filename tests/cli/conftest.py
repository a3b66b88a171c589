"""Fixtures of the command line tests: a real server, and its connection as settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.support.python_clients import ServedLedger


@pytest.fixture(scope="session")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedLedger]:
    """A server for all tests of the command line."""
    started = ServedLedger.start(tmp_path_factory.mktemp("ledger"))
    yield started
    assert started.daybook.stop() == 0


@pytest.fixture
def connection(ledger: ServedLedger, tmp_path: Path) -> Mapping[str, str]:
    """The environment of a command that connects to the server, without profiles."""
    return {
        "DAYBOOK_ADDRESS": ledger.address,
        "DAYBOOK_KEY": ledger.key,
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
    }
