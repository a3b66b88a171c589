"""The OpenAPI documents: up to date, valid, and complete."""

from __future__ import annotations

import re
from typing import Any

import pytest
from daybook.v1.error_reason_pb2 import ErrorReason
from daybook.v1.scope_pb2 import scope
from google.api.annotations_pb2 import http
from google.api.field_behavior_pb2 import INPUT_ONLY, field_behavior
from google.protobuf.descriptor import Descriptor
from openapi_spec_validator import validate

from docs.generate import error_reasons, rest_path, verb_and_path
from docs.openapi import facts
from docs.openapi.documents import files
from docs.openapi.exchanges import FOLDER
from server.gateway.files import SITE
from server.ledger.access import SUFFICIENT
from tests.support.methods import METHODS
from tests.support.openapi import NATIVE, VENDORS, document

APIS = (NATIVE, *VENDORS)


def test_documents_are_up_to_date() -> None:
    """The committed documents equal the output of `make gen`, and there are no others."""
    committed = [SITE / "openapi.json", *(SITE / "openapi").iterdir()]
    assert {str(each.relative_to(SITE)): each.read_text() for each in committed} == files(), "run `make gen`"


@pytest.mark.parametrize("api", APIS)
def test_document_is_valid(api: str) -> None:
    """A document follows OpenAPI 3.1, with valid schemas, examples and references."""
    assert document(api)["openapi"].startswith("3.1")
    validate(document(api))


def test_documents_have_every_path_and_scope() -> None:
    """Each REST binding of each method is an operation, which requires exactly the scopes of the method."""
    expected = {
        (verb.lower(), rest_path(path)): (method.name, set(method.GetOptions().Extensions[scope]))
        for method in METHODS
        if method.GetOptions().HasExtension(http)
        for rule in [method.GetOptions().Extensions[http]]
        for verb, path in map(verb_and_path, (rule, *rule.additional_bindings))
    }
    found = {
        (verb, path): (
            re.sub(r"\d$", "", operation["operationId"]),
            {each for requirement in operation["security"] for (each,) in requirement.values()},
        )
        for api in APIS
        for path, operations in document(api)["paths"].items()
        for verb, operation in operations.items()
    }
    assert found == expected


@pytest.mark.parametrize("api", APIS)
def test_document_describes_credentials(api: str) -> None:
    """Each form of a credential has a description; the first one has every scope."""
    first, *others = document(api)["components"]["securitySchemes"].values()
    assert len(others) == 2
    assert all(f"`{name}`" in first["description"] for name in SUFFICIENT)
    assert all(each["description"] for each in others)


def test_native_document_has_every_reason() -> None:
    """The native document has each reason as a value, and in the response of each of its HTTP statuses."""
    components = document(NATIVE)["components"]
    assert components["schemas"]["ErrorReason"]["enum"] == ErrorReason.keys()[1:]
    for reason in error_reasons():
        for status in reason.http_statuses:
            assert f"- `{reason.name}`: " in components["responses"][str(status)]["description"]


def fields_of(message: Descriptor) -> set[str]:
    """The names of the fields that an answer may have."""
    return {each.json_name for each in message.fields if INPUT_ONLY not in each.GetOptions().Extensions[field_behavior]}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
def test_schemas_have_every_field(method: Any) -> None:
    """The schema of each answer has the fields of its message, each with a description."""
    api = NATIVE if method.full_name.startswith("daybook.v1.") else method.full_name.split(".")[2]
    schemas = document(api)["components"]["schemas"]
    if method.output_type.name in schemas:
        properties = schemas[method.output_type.name]["properties"]
        assert properties.keys() == fields_of(method.output_type)
        assert all(each["description"] for each in properties.values())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
def test_operations_have_every_field(method: Any) -> None:
    """Each field of a request that the path doesn't bind is in the query or in the body."""
    if not method.GetOptions().HasExtension(http):
        return
    rule = method.GetOptions().Extensions[http]
    verb, path = verb_and_path(rule)
    api = NATIVE if method.full_name.startswith("daybook.v1.") else method.full_name.split(".")[2]
    operation = document(api)["paths"][rest_path(path)][verb.lower()]
    found = {each["name"] for each in operation["parameters"] if each["in"] == "query"}
    if rule.body == "*":
        reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        found |= document(api)["components"]["schemas"][reference.rpartition("/")[2]]["properties"].keys()
    bound = re.findall(r"\{([a-z_]+)", path)
    assert found == {each.json_name for each in method.input_type.fields if each.name not in (*bound, rule.body)}


def test_facts_are_about_fields() -> None:
    """Every fact of the generator is about a field of a contract."""
    names = {field.full_name for name in messages() for field in name.fields}
    facts_of = {name.partition(":")[0] for name in facts.FACTS} | facts.OPTIONAL | facts.ALWAYS
    assert {name for name in facts_of if name.startswith("daybook.")} <= names
    assert names >= facts.REQUIRED_OVER_REST


def messages() -> set[Descriptor]:
    """The messages of all requests and answers, at any depth."""
    found: set[Descriptor] = set()
    open_ends = [each for method in METHODS for each in (method.input_type, method.output_type)]
    while open_ends:
        message = open_ends.pop()
        if message not in found:
            found.add(message)
            open_ends += [each.message_type for each in message.fields if each.message_type is not None]
    return found


def test_every_document_has_examples() -> None:
    """Each API has a file with exchanges."""
    assert {each.stem for each in FOLDER.iterdir()} == set(APIS)


@pytest.mark.parametrize("api", APIS)
def test_every_method_has_an_example(api: str) -> None:
    """The first path of each method has an example of its response."""
    for operations in document(api)["paths"].values():
        for operation in operations.values():
            if not re.search(r"\d$", operation["operationId"]):
                assert any("examples" in each for each in operation["responses"]["200"]["content"].values()), operation
