"""Fixtures of the facade tests: one `daybook up --demo` per process, and its callers."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from tests.support.callers import NativeCaller
from tests.support.demo import create_key, create_tenant
from tests.support.gateways import CONDITIONS, OriginIn
from tests.support.http_client import send
from tests.support.native_methods import World
from tests.support.processes import Daybook, Ports, copy_database, sqlite_url
from tests.support.rest import Rest
from tests.support.waiting import wait_until


@pytest.fixture(scope="session")
def first_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of a run share, with the database and output of the first `daybook up --demo`."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "first-start"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def gateway(first_start: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daybook]:
    """The demo behind its gateway. At the end SIGINT must stop it with exit code 0 and without leftover processes.

    The first process of a run loads the demo data, which is slow; the others copy the database.
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


@pytest.fixture(scope="session")
def origin_in(gateway: Daybook, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OriginIn]:
    """Returns the origin of the gateway in a condition, which is started at its first use."""
    with ExitStack() as stack:
        origins = {"": gateway.origin}

        def origin_in(condition: str) -> str:
            if condition not in origins:
                context = CONDITIONS[condition](gateway, tmp_path_factory.mktemp(condition))
                origins[condition] = stack.enter_context(context)
            return origins[condition]

        yield origin_in


@pytest.fixture(scope="session")
def channel(gateway: Daybook) -> Iterator[grpc.Channel]:
    """A gRPC channel to the gateway."""
    with grpc.insecure_channel(f"127.0.0.1:{gateway.ports.gateway}") as channel:
        yield channel


@pytest.fixture(scope="session")
def native(channel: grpc.Channel) -> NativeCaller:
    """A native caller through the gateway."""
    return NativeCaller(channel)


@pytest.fixture
def rest(gateway: Daybook) -> Rest:
    """A caller of the native REST API with the default scopes."""
    return Rest(gateway.origin)


@pytest.fixture(scope="module")
def world(gateway: Daybook, channel: grpc.Channel) -> World:
    """A new tenant for the module, with two keys, of which one has the scope `admin`, and two accounts."""
    slug = f"fields-{uuid.uuid4()}"
    create_tenant(gateway, slug)
    key = create_key(gateway, slug, "--scope", "admin")
    create_key(gateway, slug)
    world = World(gateway.origin, key, channel)
    for account_id in ("first", "second"):
        world.grpc("CreateAccount", {"account": {"kind": "USER"}, "accountId": account_id})
    return world
