"""Fixtures of the facade tests: callers of the demo."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import ExitStack

import grpc
import pytest

from tests.support.callers import NativeCaller
from tests.support.demo import create_key, create_tenant
from tests.support.gateways import CONDITIONS, OriginIn
from tests.support.native_methods import World
from tests.support.processes import Daybook
from tests.support.rest import Rest


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
