"""Reflection, in both versions: a client finds all contracts, as protoc describes them."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.reflection_pb2 import (
    ErrorResponse,
    ExtensionRequest,
    ServerReflectionRequest,
    ServerReflectionResponse,
)

from protos import generate
from server.app import SERVICES
from server.transport.open_services import OPEN_SERVICES
from tests.support.callers import Server
from tests.support.markers import shares_a_server


def describe() -> list[FileDescriptorProto]:
    """The contracts as protoc describes them now."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "contracts.binpb"
        generate.write_descriptors(path)
        return list(FileDescriptorSet.FromString(path.read_bytes()).file)


OWN_FILES = [file for file in describe() if file.package.startswith("daybook.")]
OPTIONS = "google.protobuf.MethodOptions"
HTTP_RULE = 72295728
"""The number of the extension google.api.http."""
VERSIONS = ("v1", "v1alpha")


async def ask(server: Server, version: str, requests: Sequence[ServerReflectionRequest]) -> list[Any]:
    """Sends requests one after the other on one stream; returns the answers."""

    async def all_requests() -> AsyncIterator[ServerReflectionRequest]:
        for request in requests:
            yield request

    call: Any = server.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        ServerReflectionRequest.SerializeToString,
        ServerReflectionResponse.FromString,
    )
    answers = [answer async for answer in call(all_requests(), timeout=60)]
    assert [answer.original_request for answer in answers] == list(requests)
    return answers


def files_of(answer: ServerReflectionResponse) -> list[FileDescriptorProto]:
    """The files of an answer, the requested one first."""
    assert answer.WhichOneof("message_response") == "file_descriptor_response", answer.error_response
    return [FileDescriptorProto.FromString(each) for each in answer.file_descriptor_response.file_descriptor_proto]


def symbols_of(file: FileDescriptorProto) -> Iterator[str]:
    """The full name of everything that a file declares."""

    def of_enum(scope: str, enum: EnumDescriptorProto) -> Iterator[str]:
        yield f"{scope}.{enum.name}"
        yield from (f"{scope}.{value.name}" for value in enum.value)

    def of_message(scope: str, message: DescriptorProto) -> Iterator[str]:
        name = f"{scope}.{message.name}"
        yield name
        yield from (f"{name}.{field.name}" for field in (*message.field, *message.extension))
        yield from (f"{name}.{oneof.name}" for oneof in message.oneof_decl)
        for nested in message.nested_type:
            yield from of_message(name, nested)
        for enum in message.enum_type:
            yield from of_enum(name, enum)

    for message in file.message_type:
        yield from of_message(file.package, message)
    for enum in file.enum_type:
        yield from of_enum(file.package, enum)
    for extension in file.extension:
        yield f"{file.package}.{extension.name}"
    for service in file.service:
        yield f"{file.package}.{service.name}"
        yield from (f"{file.package}.{service.name}.{method.name}" for method in service.method)


@shares_a_server
@pytest.mark.parametrize("version", VERSIONS)
async def test_services_are_listed(shared_server: Server, version: str) -> None:
    """The list has every service, also gRPC's own."""
    (answer,) = await ask(shared_server, version, [ServerReflectionRequest(list_services="")])
    names = [service.name for service in answer.list_services_response.service]
    assert names == sorted({*SERVICES, *OPEN_SERVICES})
    assert "grpc.reflection.v1.ServerReflection" in names


@shares_a_server
@pytest.mark.parametrize("version", VERSIONS)
async def test_every_symbol_is_found(shared_server: Server, version: str) -> None:
    """Every symbol leads to its file: messages, fields, oneofs, enums, values, services, methods, extensions."""
    expected = {symbol: file.name for file in OWN_FILES for symbol in symbols_of(file)}
    assert {"daybook.v1.Ledger.ListTransactions", "daybook.v1.ErrorReason", "daybook.v1.scope"} <= expected.keys()
    requests = [ServerReflectionRequest(file_containing_symbol=symbol) for symbol in expected]
    answers = await ask(shared_server, version, requests)
    missing = [
        symbol
        for symbol, answer in zip(expected, answers, strict=True)
        if not answer.HasField("file_descriptor_response")
    ]
    assert not missing
    assert [files_of(answer)[0].name for answer in answers] == list(expected.values())


@shares_a_server
@pytest.mark.parametrize("version", VERSIONS)
async def test_files_equal_the_descriptor_set(shared_server: Server, version: str) -> None:
    """A file found by its name equals that of the descriptor set, json_name included."""
    requests = [ServerReflectionRequest(file_by_filename=file.name) for file in OWN_FILES]
    for expected, answer in zip(OWN_FILES, await ask(shared_server, version, requests), strict=True):
        assert files_of(answer)[0] == expected


@shares_a_server
@pytest.mark.parametrize("version", VERSIONS)
async def test_files_come_with_their_imports(shared_server: Server, version: str) -> None:
    """A client can build each listed service, also gRPC's own, from one answer alone."""
    services = (*SERVICES, *OPEN_SERVICES)
    requests = [ServerReflectionRequest(file_containing_symbol=service) for service in services]
    for service, answer in zip(services, await ask(shared_server, version, requests), strict=True):
        pool, files = DescriptorPool(), {file.name: file for file in files_of(answer)}

        def add(name: str, pool: DescriptorPool = pool, files: dict[str, FileDescriptorProto] = files) -> None:
            if name in files:
                file = files.pop(name)
                for dependency in file.dependency:
                    add(dependency)
                pool.AddSerializedFile(file.SerializeToString())

        for name in list(files):
            add(name)
        assert pool.FindServiceByName(service).methods


@shares_a_server
@pytest.mark.parametrize("version", VERSIONS)
async def test_extensions_are_found(shared_server: Server, version: str) -> None:
    """Extensions are found by the type that they extend, and by their number."""
    numbers, file, no_number, no_type = await ask(
        shared_server,
        version,
        [
            ServerReflectionRequest(all_extension_numbers_of_type=OPTIONS),
            extension(OPTIONS, HTTP_RULE),
            extension(OPTIONS, 99999),
            ServerReflectionRequest(all_extension_numbers_of_type="daybook.v1.Nothing"),
        ],
    )
    assert HTTP_RULE in numbers.all_extension_numbers_response.extension_number
    assert numbers.all_extension_numbers_response.base_type_name == OPTIONS
    assert files_of(file)[0].name == "google/api/annotations.proto"
    assert {no_number.error_response.error_code, no_type.error_response.error_code} == {5}


def extension(containing_type: str, number: int) -> ServerReflectionRequest:
    """A request for the file of an extension."""
    inner = ExtensionRequest(containing_type=containing_type, extension_number=number)
    return ServerReflectionRequest(file_containing_extension=inner)


@shares_a_server
@pytest.mark.parametrize("version", VERSIONS)
async def test_unknown_name_is_not_found(shared_server: Server, version: str) -> None:
    """The answer to an unknown name has the name, and the stream continues."""
    *missing, nothing, last = await ask(
        shared_server,
        version,
        [
            ServerReflectionRequest(file_containing_symbol="daybook.v1.Ledger.Nothing"),
            ServerReflectionRequest(file_containing_symbol="Nothing"),
            ServerReflectionRequest(file_containing_symbol=""),
            ServerReflectionRequest(file_by_filename="daybook/v1/nothing.proto"),
            ServerReflectionRequest(),
            ServerReflectionRequest(file_containing_symbol="daybook.v1.Ledger"),
        ],
    )
    for answer, name in zip(missing, ("daybook.v1.Ledger.Nothing", "Nothing", "", "nothing.proto"), strict=True):
        assert answer.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
        assert name in answer.error_response.error_message
    assert nothing.error_response == ErrorResponse(
        error_code=grpc.StatusCode.INVALID_ARGUMENT.value[0], error_message="message_request: is required"
    )
    assert files_of(last)[0].name == "daybook/v1/ledger_service.proto"


@shares_a_server
@pytest.mark.parametrize("version", VERSIONS)
async def test_malformed_request_is_refused(
    shared_server: Server, version: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A malformed request gets INVALID_ARGUMENT, and logs no failure."""
    call: Any = shared_server.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        response_deserializer=ServerReflectionResponse.FromString,
    )(timeout=60)
    await call.write(b"\xff\xff")
    assert (await call.read()).error_response.error_code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    await call.done_writing()
    assert await call.code() is grpc.StatusCode.OK
    assert not caplog.records
