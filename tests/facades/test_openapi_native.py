"""Requests generated from the OpenAPI document of the native API get answers that conform to it."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode, Response
from schemathesis.checks import not_a_server_error
from schemathesis.generation.case import Case
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests.support.demo import create_key, create_tenant
from tests.support.examples import examples
from tests.support.openapi import NATIVE, document, operation
from tests.support.processes import Daybook
from tests.support.rest import Rest
from tests.support.waiting import SECONDS_MAX

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
OPERATIONS = [(path, verb.upper()) for path, operations in document(NATIVE)["paths"].items() for verb in operations]
EXAMPLES = settings(
    max_examples=examples(5),
    deadline=None,
    database=None,
    derandomize=True,
    # Schemathesis finds invalid requests by trial and error.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
FREE_TEXTS = {"account", "filter", "lastTransaction", "orderBy", "pageToken"}
"""Parameters whose valid values the document describes only in words."""


@dataclass(frozen=True)
class Tenant:
    """A tenant with an account, a transaction and an API key."""

    origin: str
    key: str
    ids: Mapping[str, str]
    """The parameters of paths."""

    def send(self, case: Case[Any]) -> Response:
        """Sends a request; fails unless the answer conforms to the document."""
        answer = case.call(base_url=self.origin, headers={"authorization": f"Bearer {self.key}"}, timeout=SECONDS_MAX)
        case.validate_response(answer, checks=CHECKS)
        return answer


@pytest.fixture(scope="module")
def tenant(gateway: Daybook) -> Tenant:
    """A new tenant."""
    slug = f"openapi-{uuid.uuid4()}"
    create_tenant(gateway, slug)
    key = create_key(gateway, slug, "--scope", "admin")
    rest = Rest(gateway.origin, key)
    account = rest.account()
    transaction = rest.post(account, "GRANT", "1000")
    created: Any = rest.call("POST", "/v1/apiKeys", {"scopes": ["transactions"]})
    ids = {
        "account": account,
        "transaction": str(transaction["uid"]),
        "apiKey": created["apiKey"]["name"].removeprefix("apiKeys/"),
    }
    return Tenant(gateway.origin, key, ids)


def path_parameters(tenant: Tenant, path: str) -> dict[str, str]:
    """The parameters of a path for the tenant's resources."""
    return {name: value for name, value in tenant.ids.items() if f"{{{name}}}" in path}


def has_null(body: Any) -> bool:
    """Whether a body has a null, which is the same as an absent field."""
    if isinstance(body, dict | list):
        return any(has_null(each) for each in (body.values() if isinstance(body, dict) else body))
    return body is None


def has_input(path: str, verb: str) -> bool:
    """Whether a request has more than its path."""
    described = document(NATIVE)["paths"][path][verb.lower()]
    return "requestBody" in described or any(each["in"] != "path" for each in described["parameters"])


@pytest.mark.parametrize(("path", "verb"), OPERATIONS)
def test_valid_request_conforms(tenant: Tenant, path: str, verb: str) -> None:
    """A request that the document allows gets a documented answer; a read without free texts gets 200."""

    @EXAMPLES
    @given(case=operation(NATIVE, path, verb).as_strategy(path_parameters=path_parameters(tenant, path)))
    def check(case: Case[Any]) -> None:
        answer = tenant.send(case)
        if verb == "GET" and not FREE_TEXTS & case.query.keys():
            assert answer.status_code == 200, answer.text

    check()


@pytest.mark.parametrize(("path", "verb"), [each for each in OPERATIONS if has_input(*each)])
def test_invalid_request_conforms(tenant: Tenant, path: str, verb: str) -> None:
    """A request that the document forbids gets a documented error."""
    strategy = operation(NATIVE, path, verb).as_strategy(
        GenerationMode.NEGATIVE, path_parameters=path_parameters(tenant, path)
    )

    @EXAMPLES
    @given(case=strategy)
    def check(case: Case[Any]) -> None:
        answer = tenant.send(case)
        if path.endswith(":submit") and answer.status_code == 200:
            # Each request of this method has an outcome of its own.
            assert any("error" in each for each in answer.json()["results"])
        elif answer.status_code != 431 and not has_null(case.body):
            # Schemathesis doesn't expect 431, for an invalid part that is too long for a header.
            case.validate_response(answer, checks=[negative_data_rejection])

    check()
