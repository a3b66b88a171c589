"""Fixtures of the client tests: a real server, and both clients."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from daybook_client import AccountKind, Daybook, NewTransaction, TransactionKind
from tests.support.python_clients import KINDS, ServedLedger, open_client
from tests.support.tcp_proxy import TcpProxy


@pytest.fixture(scope="session")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedLedger]:
    """A server for all tests of the clients."""
    started = ServedLedger.start(tmp_path_factory.mktemp("ledger"))
    yield started
    assert started.daybook.stop() == 0


@pytest.fixture
def proxy(ledger: ServedLedger) -> Iterator[TcpProxy]:
    """A proxy before the server."""
    with TcpProxy.before(ledger.port) as proxy:
        yield proxy


@pytest.fixture(params=KINDS)
def opened(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Opens a client of each kind with its arguments; at the end of the test it is closed."""
    with ExitStack() as stack:
        yield lambda *arguments, **settings: stack.enter_context(open_client(request.param, *arguments, **settings))


@pytest.fixture
def client(ledger: ServedLedger, opened: Callable[..., Any]) -> Any:
    """A client of each kind."""
    return opened(ledger.address, key=ledger.key)


@pytest.fixture(scope="session")
def direct(ledger: ServedLedger) -> Iterator[Daybook]:
    """A client with a connection of its own, which no test disturbs."""
    with ledger.client(options=[("grpc.use_local_subchannel_pool", 1)]) as client:
        yield client


@pytest.fixture
def account(direct: Daybook) -> str:
    """The name of a new account with 10 credits."""
    name = direct.create_account(f"account-{uuid.uuid4()}", AccountKind.SPACE).name
    direct.create_transaction(name, NewTransaction(TransactionKind.GRANT, "purchase", 10))
    return name
