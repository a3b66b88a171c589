"""The OpenAPI documents that the gateway serves, parsed by Schemathesis."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import requests
import schemathesis
from schemathesis import BaseSchema, Response
from schemathesis.schemas import APIOperation

from server.app import FACADES
from server.gateway.files import SITE

NATIVE = "native"
VENDORS = tuple(sorted(service.split(".")[2] for service in FACADES))
# Tests send their own credentials; generated ones are tested in test_bad_input.py.
_CONFIG = schemathesis.Config.from_dict({"seed": 1, "generation": {"with-security-parameters": False}})


def document(api: str) -> dict[str, Any]:
    """Returns the document of a vendor, or of the native API."""
    path = "openapi.json" if api == NATIVE else f"openapi/{api}.json"
    found: dict[str, Any] = json.loads((SITE / path).read_text())
    return found


def closed(schema: Any) -> Any:
    """Returns a document whose objects have no fields but the documented ones, to detect undocumented fields.

    A client must accept new fields, so the document itself doesn't say this.
    """
    match schema:
        case dict():
            more = {"additionalProperties": False} if "properties" in schema and "type" in schema else {}
            return {**more, **{name: closed(each) for name, each in schema.items()}}
        case list():
            return [closed(each) for each in schema]
    return schema


@cache
def contract(api: str) -> BaseSchema:
    """Returns the document of an API, with closed objects."""
    return schemathesis.openapi.from_dict(closed(document(api)), config=_CONFIG)


def operation(api: str, path: str = "", method: str = "GET") -> APIOperation[Any, Any, Any, Any]:
    """Returns an operation of an API; without a path, its first one."""
    return contract(api)[path or next(iter(document(api)["paths"]))][method]


def require_page(vendor: str, body: bytes) -> None:
    """Fails unless the body matches the documented response of a list with status 200."""
    request = requests.Request("GET", "http://localhost/").prepare()
    answer = Response(200, {"content-type": ["application/json"]}, body, request, 0.0, verify=False)
    operation(vendor).validate_response(answer)
