"""The methods that the server serves, read from the contracts."""

from __future__ import annotations

from collections.abc import Iterator

from google.api.field_behavior_pb2 import REQUIRED, field_behavior
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import Default
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from server.app import FACADES, SERVICES

METHODS: list[MethodDescriptor] = [
    method for service in SERVICES for method in Default().FindServiceByName(service).methods
]
"""The methods that the server serves."""

_REQUIRED_VALUES = {"month": "2024-10"}
"""Values of required facade fields that do not name an account."""


def facade_requests(account_id: str, optional: str = "") -> Iterator[tuple[MethodDescriptor, Message]]:
    """Yields each method of the facades with a request about an account.

    Every optional parameter has the value `optional`, or is absent if that is empty.
    """
    for method in METHODS:
        if method.containing_service.full_name in FACADES:
            request = GetMessageClass(method.input_type)()
            for field in method.input_type.fields:
                if REQUIRED in field.GetOptions().Extensions[field_behavior]:
                    setattr(request, field.name, _REQUIRED_VALUES.get(field.name, account_id))
                elif optional and field.is_repeated:
                    getattr(request, field.name).append(optional)
                elif optional:
                    setattr(request, field.name, optional)
            yield method, request
