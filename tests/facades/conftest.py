"""A real `daybook up --demo` for all tests of a process, and a way to add data of one's own."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pytest
from daybook.v1.account_pb2 import Account
from daybook.v1.ledger_service_pb2 import CreateAccountRequest, CreateTransactionRequest
from daybook.v1.ledger_service_pb2_grpc import LedgerStub
from daybook.v1.transaction_pb2 import Transaction

from tests.facades.conditions import CONDITIONS
from tests.facades.exchanges import send
from tests.facades.processes import Daybook, Ports, copy_database, sqlite_url, wait_until


@pytest.fixture(scope="session")
def first_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what the first `daybook up --demo` left, once for all processes of a run.

    In it are its database, as loaded, and what it printed and logged.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "first-start"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def gateway(first_start: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daybook]:
    """The demo behind its gateway; at the end Ctrl-C stops it with exit code 0 and leaves no process.

    Whoever comes first loads the demo, which takes most of a start; the others copy it.
    """
    folder, ports, loaded = tmp_path_factory.mktemp("demo"), Ports.free(), first_start / "daybook.db"
    with ExitStack() as stack:
        lock = stack.enter_context((first_start / "lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        if loaded.exists():
            shutil.copyfile(loaded, folder / "daybook.db")
            lock.close()
        daybook = Daybook.start(
            *("up", "--demo", "--database-url", sqlite_url(folder / "daybook.db")),
            *ports.flags,
            folder=folder,
            ports=ports,
        )
        stack.callback(daybook.kill)
        daybook.wait_for("Ctrl-C stops it.")
        wait_until(lambda: send(daybook.origin, "/readyz").status == 200, "/readyz answers 200")
        if not loaded.exists():
            (first_start / "stdout").write_text(daybook.stdout)
            (first_start / "stderr").write_text(daybook.stderr)
            copy_database(folder / "daybook.db", loaded)
            lock.close()
        yield daybook
        assert daybook.stop() == 0


OriginIn: TypeAlias = Callable[[str], str]


@pytest.fixture(scope="session")
def origin_in(gateway: Daybook, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OriginIn]:
    """Where a gateway in a condition is, which is made when it is first asked for; the demo's for none."""
    with ExitStack() as stack:
        origins = {"": gateway.origin}

        def origin_in(condition: str) -> str:
            if condition not in origins:
                made = CONDITIONS[condition](gateway, tmp_path_factory.mktemp(condition))
                origins[condition] = stack.enter_context(made)
            return origins[condition]

        yield origin_in


def ledger_stub(channel: grpc.Channel) -> Any:
    """The native API, called without asyncio, for which alone the generated stubs have types."""
    return LedgerStub(channel)  # type: ignore[arg-type]


class NativeCaller:
    """Writes to the running demo over gRPC through the gateway, in accounts of the test's own."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.ledger = ledger_stub(channel)

    def create_account(self, key: str, kind: Account.Kind.ValueType = Account.OTHER, **fields: object) -> str:
        """Creates an account in the tenant of the key; answers with its id, which no other test has."""
        account_id = f"test-{uuid.uuid4()}"
        account = Account(kind=kind, **fields)  # type: ignore[arg-type]
        self.ledger.CreateAccount(
            CreateAccountRequest(account_id=account_id, account=account), metadata=credential(key)
        )
        return account_id

    def post(
        self, key: str, account_id: str, kind: Transaction.Kind.ValueType, category: str, amount: str, **fields: object
    ) -> Transaction:
        """Posts a transaction."""
        transaction = Transaction(kind=kind, category=category, amount=amount, **fields)  # type: ignore[arg-type]
        posted: Transaction = self.ledger.CreateTransaction(
            CreateTransactionRequest(parent=f"accounts/{account_id}", transaction=transaction),
            metadata=credential(key),
        )
        return posted


def credential(key: str) -> tuple[tuple[str, str], ...]:
    """The metadata that lets a native call in."""
    return (("authorization", f"Bearer {key}"),)


@pytest.fixture(scope="session")
def channel(gateway: Daybook) -> Iterator[grpc.Channel]:
    """A gRPC channel to the gateway."""
    with grpc.insecure_channel(f"127.0.0.1:{gateway.ports.gateway}") as channel:
        yield channel


@pytest.fixture(scope="session")
def native(channel: grpc.Channel) -> NativeCaller:
    """A native caller through the gateway."""
    return NativeCaller(channel)
