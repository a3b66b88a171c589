"""The vendors' contracts, `tests/facades/<vendor>/openapi.yaml`, parsed by Schemathesis."""

from __future__ import annotations

from functools import cache
from typing import Any

import requests
import schemathesis
from schemathesis import BaseSchema, Response
from schemathesis.schemas import APIOperation

from tests.support.processes import ROOT

VENDORS = tuple(sorted(each.parent.name for each in (ROOT / "tests/facades").glob("*/openapi.yaml")))
# Tests send their own credentials; generated ones are tested in test_bad_input.py.
_CONFIG = schemathesis.Config.from_dict({"seed": 1, "generation": {"with-security-parameters": False}})


@cache
def contract(vendor: str) -> BaseSchema:
    """Returns the contract of a vendor."""
    return schemathesis.openapi.from_path(ROOT / "tests/facades" / vendor / "openapi.yaml", config=_CONFIG)


def operation(vendor: str) -> APIOperation[Any, Any, Any, Any]:
    """Returns the only operation of a contract."""
    (path,) = contract(vendor)
    return contract(vendor)[path]["GET"]


def require_page(vendor: str, body: bytes) -> None:
    """Fails unless the body matches the documented response with status 200."""
    request = requests.Request("GET", "http://localhost/").prepare()
    answer = Response(200, {"content-type": ["application/json"]}, body, request, 0.0, verify=False)
    operation(vendor).validate_response(answer)
