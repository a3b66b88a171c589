"""The OpenAPI documents."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from importlib.metadata import version

from daybook.v1.scope_pb2 import scope as scope_option
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.descriptor_pool import Default

from docs.generate import LIMITS, limit_row, table
from docs.openapi import facts
from docs.openapi.comments import comments
from docs.openapi.errors import facade_errors, native_errors
from docs.openapi.exchanges import read_exchanges
from docs.openapi.operations import add_example, operations, scopes_of
from docs.openapi.schemas import Schema, Schemas
from server.app import FACADES, SERVICES
from server.facades import all_facades

_NATIVE = "native"
_SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, `ID.SECRET`, or an access token."},
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "An API key, `ID.SECRET`."},
    "basic": {"type": "http", "scheme": "basic", "description": "An API key: ID as the user name, SECRET as password."},
}
"""The forms of a credential."""


def files() -> Mapping[str, str]:
    """Returns the text of each file by its path in the gateway's site: the documents, and a list of them."""
    written = documents()
    paths = {api: "openapi.json" if api == _NATIVE else f"openapi/{api}.json" for api in written}
    listed = [{"name": written[api]["info"]["title"], "url": f"/{path}"} for api, path in paths.items()]
    contents = {**{path: written[api] for api, path in paths.items()}, "openapi/index.json": listed}
    return {path: json.dumps(each, indent=1, ensure_ascii=False) + "\n" for path, each in contents.items()}


def documents() -> Mapping[str, Schema]:
    """Returns the document of each API by its name, which is the vendor's package or `native`."""
    facades = {facade.VENDOR.service: facade for facade in all_facades()}
    native = [service for service in map(_service, SERVICES) if service.full_name not in FACADES]
    schemas = Schemas(facts.FACTS, facts.OPTIONAL)
    found = {_NATIVE: _document(_NATIVE, "Daybook", native, schemas, native_errors(schemas))}
    for name in sorted(FACADES):
        service, schemas = _service(name), Schemas(facts.FACTS, always=facts.ALWAYS)
        parameters = [field.json_name for method in service.methods for field in method.input_type.fields]
        api, vendor = name.split(".")[2], facades[name].VENDOR
        responses = facade_errors(facades[name], parameters)
        found[api] = _document(api, vendor.name, [service], schemas, responses)
    return found


def _service(name: str) -> ServiceDescriptor:
    return Default().FindServiceByName(name)


def _document(
    api: str, title: str, services: Sequence[ServiceDescriptor], schemas: Schemas, errors: Mapping[int, Schema]
) -> Schema:
    """The document of an API. `errors` are its error responses by HTTP status."""
    paths: dict[str, Schema] = {}
    exchanges = read_exchanges(api)
    for method in (method for service in services for method in service.methods):
        for verb, path, operation in operations(method, schemas, errors, exchanges):
            operation["security"] = [{form: [scope]} for scope in scopes_of(method) for form in _SECURITY]
            paths.setdefault(path, {})[verb.lower()] = operation
    for exchange in exchanges:
        if exchange.status != HTTPStatus.OK:
            add_example(errors[exchange.status]["content"][exchange.content_type], exchange, exchange.answer)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": title,
            "version": version("daybook"),
            "description": f"{comments()[services[0].file.package]}\n\n## Rates\n\n{_limits('Rates')}",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": each.name, "description": comments()[each.full_name]} for each in services],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(schemas.components.items())),
            "responses": {str(status): response for status, response in errors.items()},
            "securitySchemes": _with_scopes(_SECURITY),
        },
    }


def _limits(heading: str) -> str:
    """The table of limits with this heading, without their settings."""
    (rows,) = (map(limit_row, rows) for each, rows in LIMITS if each == heading)
    return table(("limit", "default", "beyond it"), ((name, value, beyond) for name, value, _, beyond in rows))


def _with_scopes(schemes: Mapping[str, Schema]) -> Mapping[str, Schema]:
    """The forms of a credential. The first one describes the scopes."""
    first = next(iter(schemes))
    description = f"{schemes[first]['description']}\n\n{comments()[scope_option.full_name]}"
    return {**schemes, first: {**schemes[first], "description": description}}
