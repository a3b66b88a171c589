"""A server per module, for parametrized tests of calls that change nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from random import Random

import grpc
import pytest
import pytest_asyncio

from server.app import serving
from server.book import open_book
from server.config import Settings
from tests.support.callers import Client, Server
from tests.support.clock import Clock


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """One server for all tests of a module, because starting one for each test would be slow."""
    database_url = f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('shared')}/daybook.db"
    async with (
        open_book(database_url, Clock(), Random(1).randbytes) as book,
        serving(book, Settings(port=0)) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield Server(book, channel)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_client(shared_server: Server) -> Client:
    """A caller with the account `acme`, for parametrized tests of calls that change nothing."""
    client = await shared_server.client(await shared_server.create_tenant("house"))
    await client.create_account("acme")
    return client
