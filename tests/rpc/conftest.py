"""What the tests of the native API share: a refusal, read from the wire as a caller reads it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Mapping
from dataclasses import dataclass
from random import Random

import grpc
import pytest
import pytest_asyncio
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from google.rpc.status_pb2 import Status

from server.app import open_book, serving
from server.config import Settings
from tests.conftest import Client, Clock, Server

only_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""For what is decided before any database is asked: once is enough."""

shares_a_server = pytest.mark.asyncio(loop_scope="module")
"""For tests with `shared_client`, which must run in the loop of its server."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_client(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Client]:
    """A caller of one server for all tests of a module, with the account `acme`.

    For long tables of calls that change nothing: a server for each would take most of the time.
    """
    database_url = f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('shared')}/daybook.db"
    async with (
        open_book(database_url, Clock(), Random(1).randbytes) as book,
        serving(book, Settings(port=0)) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        server = Server(book, channel)
        client = await server.client(await server.create_tenant("house"))
        await client.create_account("acme")
        yield client


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a caller learns from a refused call."""

    code: grpc.StatusCode
    reason: str
    fields: tuple[str, ...]
    """The fields that the BadRequest names."""
    message: str
    metadata: Mapping[str, str]
    """That of the ErrorInfo."""

    @property
    def verdict(self) -> tuple[str, str]:
        """The status and the reason, as tables of tests write them."""
        return self.code.name, self.reason


def read_refusal(error: grpc.aio.AioRpcError) -> Refusal:
    """Reads the details of an error, and holds it to what the contract says of every error."""
    trailing = dict(error.trailing_metadata())
    status = Status.FromString(trailing["grpc-status-details-bin"])
    assert status.code == error.code().value[0], "the details and the call tell of different statuses"
    assert status.message == error.details()
    infos: list[ErrorInfo] = []
    fields: list[str] = []
    for detail in status.details:
        info, bad_request = ErrorInfo(), BadRequest()
        if detail.Unpack(info):
            infos.append(info)
        elif detail.Unpack(bad_request):
            fields += [violation.field for violation in bad_request.field_violations]
    assert len(infos) == 1, "every error carries exactly one ErrorInfo"
    assert infos[0].domain == "daybook"
    assert bool(fields) == (error.code() is grpc.StatusCode.INVALID_ARGUMENT), "a field is named where one is wrong"
    return Refusal(error.code(), infos[0].reason, tuple(fields), status.message, dict(infos[0].metadata))


async def refusal_of(call: Awaitable[object]) -> Refusal:
    """The refusal of a call that must be refused."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return read_refusal(caught.value)
