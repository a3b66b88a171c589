"""The methods that the server serves, read from the contracts."""

from __future__ import annotations

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import Default

from server.app import SERVICES

METHODS: list[MethodDescriptor] = [
    method for service in SERVICES for method in Default().FindServiceByName(service).methods
]
"""Every method that the server serves, out of the contracts themselves."""
