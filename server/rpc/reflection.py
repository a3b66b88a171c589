"""Reflection: describes every contract to clients that don't have them, such as grpcurl, ghz and buf curl.

The services grpc.reflection.v1 and grpc.reflection.v1alpha have the same messages under two names,
so one servicer answers both. Only the messages of grpcio-reflection are used, because its
servicer has only v1alpha, doesn't find methods, and omits json_name.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import grpc
from daybook.v1 import error_reason_pb2
from google.protobuf import text_format
from google.protobuf.descriptor import Descriptor, FileDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import Default
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection_pb2 import (
    ErrorResponse,
    ExtensionNumberResponse,
    FileDescriptorResponse,
    ListServiceResponse,
    ServerReflectionRequest,
    ServerReflectionResponse,
    ServiceResponse,
)

from server.ledger.errors import InvalidArgument
from server.transport.parsing import parser

NAMES = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
# Clients need ErrorReason to read errors, but no service imports it. The import adds it to the pool.
_LOADED = (error_reason_pb2.DESCRIPTOR,)


def add_reflection_to_server(services: Iterable[str], server: Any) -> None:
    """Adds both versions of reflection, which list these services by their full names."""
    _describe_v1()
    method = grpc.stream_stream_rpc_method_handler(
        Reflection(services).answers,
        parser(ServerReflectionRequest.FromString, "name"),
        ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        tuple(grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": method}) for name in NAMES)
    )


class Reflection:
    """Answers from the descriptors that are loaded in this process."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = sorted(services)
        self._pool = Default()
        # Bounded by the number of loaded files.
        self._described: dict[str, bytes] = {}

    async def answers(
        self, requests: AsyncIterator[ServerReflectionRequest | InvalidArgument], _context: object
    ) -> AsyncIterator[ServerReflectionResponse]:
        """Answers each request in turn. A failed request gets an error and doesn't end the stream."""
        async for request in requests:
            if isinstance(request, InvalidArgument):
                yield _error(grpc.StatusCode.INVALID_ARGUMENT, request.message)
                continue
            answer = self._answer(request)
            answer.original_request.CopyFrom(request)
            yield answer

    def _answer(self, request: ServerReflectionRequest) -> ServerReflectionResponse:
        kind = request.WhichOneof("message_request")
        if kind is None:
            return _error(grpc.StatusCode.INVALID_ARGUMENT, "message_request: is required")
        answer: Callable[[Any], ServerReflectionResponse] = getattr(self, f"_{kind}")
        value = getattr(request, kind)
        try:
            return answer(value)
        except KeyError:
            return _error(grpc.StatusCode.NOT_FOUND, f"{kind} {value!r} is not found")

    def _list_services(self, _unused: str) -> ServerReflectionResponse:
        services = [ServiceResponse(name=name) for name in self._services]
        return ServerReflectionResponse(list_services_response=ListServiceResponse(service=services))

    def _file_by_filename(self, name: str) -> ServerReflectionResponse:
        return self._files(self._pool.FindFileByName(name))

    def _file_containing_symbol(self, symbol: str) -> ServerReflectionResponse:
        try:
            file = self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            # FindFileContainingSymbol doesn't find methods.
            file = self._pool.FindMethodByName(symbol).containing_service.file
        return self._files(file)

    def _file_containing_extension(self, requested: reflection_pb2.ExtensionRequest) -> ServerReflectionResponse:
        extended = self._pool.FindMessageTypeByName(requested.containing_type)
        extension = self._pool.FindExtensionByNumber(extended, requested.extension_number)
        return self._files(self._pool.FindFileContainingSymbol(extension.full_name))

    def _all_extension_numbers_of_type(self, name: str) -> ServerReflectionResponse:
        extended = self._pool.FindMessageTypeByName(name)
        numbers = sorted(extension.number for extension in self._pool.FindAllExtensions(extended))
        return ServerReflectionResponse(
            all_extension_numbers_response=ExtensionNumberResponse(
                base_type_name=extended.full_name, extension_number=numbers
            )
        )

    def _files(self, file: FileDescriptor) -> ServerReflectionResponse:
        """The file, followed by all files that it imports, directly or indirectly."""
        found: dict[str, FileDescriptor] = {}
        waiting = [file]
        while waiting:
            each = waiting.pop()
            if each.name not in found:
                found[each.name] = each
                waiting += each.dependencies
        described = [self._describe(each) for each in found.values()]
        return ServerReflectionResponse(
            file_descriptor_response=FileDescriptorResponse(file_descriptor_proto=described)
        )

    def _describe(self, file: FileDescriptor) -> bytes:
        if file.name not in self._described:
            self._described[file.name] = _with_json_names(file).SerializeToString()
        return self._described[file.name]


def _error(code: grpc.StatusCode, message: str) -> ServerReflectionResponse:
    return ServerReflectionResponse(error_response=ErrorResponse(error_code=code.value[0], error_message=message))


def _with_json_names(file: FileDescriptor) -> FileDescriptorProto:
    """A file as protoc describes it. Generated Python code omits each json_name that follows from the name."""
    described = FileDescriptorProto()
    file.CopyToProto(described)
    for extension in described.extension:
        extension.json_name = file.extensions_by_name[extension.name].json_name
    for message in described.message_type:
        _add_json_names(message, file.message_types_by_name[message.name])
    return described


def _add_json_names(described: DescriptorProto, message: Descriptor) -> None:
    for field in described.field:
        field.json_name = message.fields_by_name[field.name].json_name
    for extension in described.extension:
        extension.json_name = message.extensions_by_name[extension.name].json_name
    for nested in described.nested_type:
        _add_json_names(nested, message.nested_types_by_name[nested.name])


def _describe_v1() -> None:
    """Loads the descriptors of grpc.reflection.v1: the descriptors of v1alpha with v1 in their names."""
    alpha = FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(alpha)
    described = FileDescriptorProto()
    text_format.Parse(text_format.MessageToString(alpha).replace("v1alpha", "v1"), described)
    Default().AddSerializedFile(described.SerializeToString())
