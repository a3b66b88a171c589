"""A server that runs out of memory for a message, or of disk space, refuses calls, loses nothing and keeps serving."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import grpc
import psutil
import pytest
import pytest_asyncio
from daybook.v1.ledger_service_pb2 import SubmitTransactionsResponse
from daybook.v1.transaction_pb2 import Transaction
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.descriptor_pool import Default
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.struct_pb2 import Struct

from server.app import SERVICES
from tests.support.callers import Client
from tests.support.ledgers import prepare
from tests.support.processes import Daybook, Ports, sqlite_url
from tests.support.refusals import Refusal, read_refusal, read_status

GRANT, CHARGE = Transaction.GRANT, Transaction.CHARGE
MEBIBYTE = 1 << 20
BOMB_BYTES = 400 * MEBIBYTE
"""Uncompressed size of a message that takes about 400 kB on the wire."""
GROWTH_BYTES_MAX = 64 * MEBIBYTE
TEXTS_GROWTH_BYTES_MAX = 16 * MEBIBYTE
CALLS_MAX = 5000


@pytest.fixture
def daybook(tmp_path: Path) -> Iterator[tuple[Daybook, str]]:
    """A server on SQLite in its own process, and a key."""
    url = sqlite_url(tmp_path / "daybook.db")
    key = asyncio.run(prepare(url))
    ports = Ports.free()
    flags = ("--database-url", url, "--port", str(ports.server))
    started = Daybook.start("serve", *flags, folder=tmp_path / "server", ports=ports)
    try:
        started.wait_for(" serving ")
        yield started, key
        assert started.stop() == 0
        assert "Traceback" not in started.stderr
    finally:
        started.kill()


@pytest_asyncio.fixture
async def client(daybook: tuple[Daybook, str]) -> AsyncIterator[Client]:
    """A caller of the server."""
    started, key = daybook
    async with grpc.aio.insecure_channel(f"127.0.0.1:{started.ports.server}") as channel:
        yield Client(channel, key)


async def test_compressed_message_is_bounded_by_its_uncompressed_size(
    daybook: tuple[Daybook, str], client: Client
) -> None:
    """A message of 400 MiB that travels as 400 kB is refused, and the server's memory doesn't grow by it."""
    process = psutil.Process(daybook[0].process.pid)
    await client.create_account("acme")
    before = process.memory_info().rss
    bomb: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = client.channel.unary_unary(
        "/daybook.v1.Ledger/CreateTransaction", request_serializer=bytes
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bomb(bytes(BOMB_BYTES), metadata=client.metadata, compression=grpc.Compression.Gzip)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert process.memory_info().rss < before + GROWTH_BYTES_MAX
    assert (await client.post("acme", GRANT, "1")).sequence == 1


def _texts(
    message: Descriptor, naming: str, text: str, seen: tuple[Descriptor, ...] = ()
) -> Iterator[tuple[Message, str]]:
    """A message for each text field, at any depth, that has `text` in it, with the field's path (empty in a Struct)."""
    filled: Any
    for field in message.fields:
        name, inner = getattr(field, naming), field.message_type
        filled = GetMessageClass(message)()
        if inner is not None and inner.full_name == Struct.DESCRIPTOR.full_name:
            getattr(filled, field.name)["key"] = text
            yield filled, ""
        elif inner is not None and inner.GetOptions().map_entry:
            getattr(filled, field.name)["key"] = text
            yield filled, f"{name}.key"
            filled = GetMessageClass(message)()
            getattr(filled, field.name)[text] = "value"
            yield filled, name
        elif inner is not None and inner not in seen:
            for value, path in _texts(inner, naming, text, (*seen, message)):
                filled = GetMessageClass(message)(**{field.name: [value] if field.is_repeated else value})
                place = f"{name}{'[0]' if field.is_repeated else ''}"
                is_mask = inner.full_name == FieldMask.DESCRIPTOR.full_name
                yield filled, place if is_mask else path and f"{place}.{path}"
        elif field.type == FieldDescriptor.TYPE_STRING:
            yield (
                GetMessageClass(message)(**{field.name: [text] if field.is_repeated else text}),
                f"{name}[0]" if field.is_repeated else name,
            )


async def _refusal_of(client: Client, method: MethodDescriptor, request: bytes) -> Refusal:
    """The refusal of a request: of its call, its stream, or its only item in SubmitTransactions."""
    name = f"/{method.containing_service.full_name}/{method.name}"
    # Without a serializer mypy can't infer the type of a request.
    channel: Any = client.channel

    async def requests() -> AsyncIterator[bytes]:
        yield request

    try:
        if method.client_streaming:
            await channel.stream_unary(name)(requests(), metadata=client.metadata)
        elif method.server_streaming:
            await channel.unary_stream(name)(request, metadata=client.metadata).read()
        else:
            answer = cast("bytes", await channel.unary_unary(name)(request, metadata=client.metadata))
            (result,) = SubmitTransactionsResponse.FromString(answer).results
            return read_status(result.error)
    except grpc.aio.AioRpcError as error:
        return read_refusal(error)
    raise AssertionError(f"{method.full_name} accepted the request")


@pytest.mark.long
async def test_long_texts_leak_no_memory(daybook: tuple[Daybook, str], client: Client) -> None:
    """Each text of each request is refused with its path if it is too long, and the server's memory doesn't grow.

    A Struct is bounded as a whole, after the rest of its request is checked.
    """
    process = psutil.Process(daybook[0].process.pid)
    methods = [each for service in SERVICES for each in Default().FindServiceByName(service).methods]
    sizes = []
    # The first round warms up, with other texts, so that no text of the second round is cached.
    for letter in "xy":
        count = 0
        for method in methods:
            naming = "name" if method.full_name.startswith("daybook.v1.") else "json_name"
            for request, path in _texts(method.input_type, naming, letter * MEBIBYTE):
                refusal = await _refusal_of(client, method, request.SerializeToString())
                assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT, (method.full_name, path)
                assert not path or list(refusal.fields) == [path], method.full_name
                assert len(refusal.message) < 1000
                count += 1
        assert count > 300, "too few texts were found"
        sizes.append(process.memory_info().rss)
    assert sizes[1] < sizes[0] + TEXTS_GROWTH_BYTES_MAX


async def test_many_tiny_elements(client: Client) -> None:
    """Four MiB of empty items are refused for their number, or for a missing credential."""
    call: Any = client.channel.unary_unary("/daybook.v1.Ledger/SubmitTransactions", request_serializer=bytes)
    # Field 1, the parent, and field 2, the requests.
    request = b"\x0a\x0aaccounts/-" + b"\x12\x00" * (2 * MEBIBYTE - 100)
    for metadata, code, fields in (
        (client.metadata, grpc.StatusCode.INVALID_ARGUMENT, ("requests",)),
        ((), grpc.StatusCode.UNAUTHENTICATED, ()),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(request, metadata=metadata)
        assert (caught.value.code(), read_refusal(caught.value).fields) == (code, fields)
    await client.create_account("acme")


async def test_full_disk_refuses_postings(daybook: tuple[Daybook, str], client: Client) -> None:
    """While files can't grow postings are UNAVAILABLE and lists work; postings succeed once there is space."""
    process = psutil.Process(daybook[0].process.pid)
    await client.create_account("acme")
    await client.post("acme", GRANT, str(CALLS_MAX))
    database = daybook[0].folder.parent / "daybook.db"
    room = max(file.stat().st_size for file in (database, database.with_name("daybook.db-wal"))) + MEBIBYTE
    process.rlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    acknowledged = 0

    async def keep_charging() -> None:
        nonlocal acknowledged
        for _ in range(CALLS_MAX):
            await client.post("acme", CHARGE, "-1", description="x" * 1000)
            acknowledged += 1

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await keep_charging()
    assert (caught.value.code(), read_refusal(caught.value).reason) == (
        grpc.StatusCode.UNAVAILABLE,
        "SERVICE_UNAVAILABLE",
    )
    assert acknowledged > 0
    assert len(await client.history("acme")) == acknowledged + 1

    process.rlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert (await client.post("acme", CHARGE, "-1")).sequence == acknowledged + 2
    assert (await client.balance("acme")).amount == str(CALLS_MAX - acknowledged - 1)
    assert await client.verify() == []
