"""The OpenAPI documents."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from importlib.metadata import version

from daybook.v1.scope_pb2 import scope as scope_option
from google.api.annotations_pb2 import http
from google.api.field_behavior_pb2 import REQUIRED, field_behavior
from google.api.http_pb2 import HttpRule
from google.api.httpbody_pb2 import HttpBody
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pool import Default

from docs.generate import LIMITS, limit_row, rest_path, table, verb_and_path
from docs.openapi import facts
from docs.openapi.comments import comments, summary
from docs.openapi.errors import REQUEST_ID, facade_errors, native_errors
from docs.openapi.exchanges import Exchange, read_exchanges
from docs.openapi.schemas import Schema, Schemas, Use
from server.app import FACADES, SERVICES
from server.facades import all_facades
from server.gateway.contracts import NATIVE
from server.rpc.export_files import FORMS
from server.transport.inputs import IDEMPOTENCY_KEY
from server.transport.validation import REQUEST_ID_CHARACTERS_MAX

_VARIABLE = re.compile(r"\{([a-z_.]+)(?:=[^}]*)?\}")
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
    found = {_NATIVE: _Document(_NATIVE, "Daybook", native, schemas, native_errors(schemas)).write()}
    for name in sorted(FACADES):
        service, schemas = _service(name), Schemas(facts.FACTS, always=facts.ALWAYS)
        parameters = [field.json_name for method in service.methods for field in method.input_type.fields]
        api, vendor = name.split(".")[2], facades[name].VENDOR
        responses = facade_errors(facades[name], parameters)
        found[api] = _Document(api, vendor.name, [service], schemas, responses).write()
    return found


def _service(name: str) -> ServiceDescriptor:
    return Default().FindServiceByName(name)


@dataclass
class _Document:
    """A document in the making."""

    api: str
    title: str
    services: Sequence[ServiceDescriptor]
    schemas: Schemas
    errors: Mapping[int, Schema]
    """The error responses by HTTP status."""

    @cached_property
    def _exchanges(self) -> Sequence[Exchange]:
        return read_exchanges(self.api)

    def write(self) -> Schema:
        """Returns the document."""
        paths: dict[str, Schema] = {}
        for method in (method for service in self.services for method in service.methods):
            for number, rule in enumerate(_bindings(method), start=1):
                verb, path = verb_and_path(rule)
                operation = _Operation(self, method, rule, verb, path, number).write()
                paths.setdefault(rest_path(path), {})[verb.lower()] = operation
        package = self.services[0].file.package
        for exchange in self._exchanges:
            if exchange.status != HTTPStatus.OK:
                _add_example(self.errors[exchange.status]["content"][exchange.content_type], exchange, exchange.answer)
        return {
            "openapi": "3.1.0",
            "info": {
                "title": self.title,
                "version": version("daybook"),
                "description": f"{comments()[package]}\n\n## Rates\n\n{_limits('Rates')}",
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "servers": [{"url": "/"}],
            "tags": [{"name": each.name, "description": comments()[each.full_name]} for each in self.services],
            "paths": paths,
            "components": {
                "schemas": dict(sorted(self.schemas.components.items())),
                "responses": {str(status): response for status, response in self.errors.items()},
                "securitySchemes": _with_scopes(_SECURITY),
            },
        }

    def examples(self, verb: str, path: str) -> Iterator[tuple[Exchange, Mapping[str, str]]]:
        """Yields the exchanges of an operation, with the parameters of their paths."""
        for exchange in self._exchanges:
            if (variables := exchange.match(verb, path)) is not None:
                yield exchange, variables


def _bindings(method: MethodDescriptor) -> Sequence[HttpRule]:
    options = method.GetOptions()
    if not options.HasExtension(http):
        return ()
    rule = options.Extensions[http]
    return (rule, *rule.additional_bindings)


def _limits(heading: str) -> str:
    """The table of limits with this heading, without their settings."""
    (rows,) = (map(limit_row, rows) for each, rows in LIMITS if each == heading)
    return table(("limit", "default", "beyond it"), ((name, value, beyond) for name, value, _, beyond in rows))


def _with_scopes(schemes: Mapping[str, Schema]) -> Mapping[str, Schema]:
    """The forms of a credential. The first one describes the scopes."""
    first = next(iter(schemes))
    description = f"{schemes[first]['description']}\n\n{comments()[scope_option.full_name]}"
    return {**schemes, first: {**schemes[first], "description": description}}


@dataclass
class _Operation:
    """One binding of a method."""

    document: _Document
    method: MethodDescriptor
    rule: HttpRule
    verb: str
    path: str
    number: int
    """1 is the first binding of the method."""

    @property
    def _is_native(self) -> bool:
        package: str = self.method.input_type.file.package
        return package == NATIVE

    def write(self) -> Schema:
        comment = comments()[self.method.full_name]
        scopes = list(self.method.GetOptions().Extensions[scope_option])
        shown = " or ".join(f"`{scope}`" for scope in scopes)
        operation: Schema = {
            "operationId": f"{self.method.name}{self.number if self.number > 1 else ''}",
            "tags": [self.method.containing_service.name],
            "summary": summary(comment),
            "description": f"{comment}\n\nScope: {shown}.",
            "security": [{scheme: [scope]} for scope in scopes for scheme in _SECURITY],
            "parameters": [*self._path_parameters(), *self._query_parameters(), *self._header_parameters()],
        }
        if self.rule.body:
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": self._body()}}}
        operation["responses"] = {"200": self._success(), **self._errors()}
        for exchange, variables in self.document.examples(self.verb, rest_path(self.path)):
            if exchange.status == HTTPStatus.OK:
                _show(operation, exchange, variables)
        return operation

    def _path_parameters(self) -> Iterator[Schema]:
        for match in _VARIABLE.finditer(self.path):
            comment = comments()[_field(self.method, match[1]).full_name]
            for name in re.findall(r"\{(\w+)\}", rest_path(match[0])):
                schema = facts.PATH[name] if self._is_native else {"type": "string"}
                if "`accounts/-`" in comment:
                    schema = {"anyOf": [schema, {"const": "-"}]}
                yield {"name": name, "in": "path", "required": True, "description": comment, "schema": schema}

    def _query_parameters(self) -> Iterator[Schema]:
        if self.rule.body == "*":
            return
        for field in self.method.input_type.fields:
            if field.name in (self.rule.body, *self._bound()):
                continue
            schema = self.document.schemas.field(field, Use.REQUEST)
            required = field.full_name in facts.REQUIRED_OVER_REST or (
                REQUIRED in field.GetOptions().Extensions[field_behavior]
            )
            description = schema.pop("description")
            yield {
                "name": field.json_name,
                "in": "query",
                **({"required": True} if required else {}),
                "description": description,
                "schema": schema,
            }

    def _header_parameters(self) -> Iterator[Schema]:
        if self._is_native and "request_id" in self.method.input_type.fields_by_name:
            yield {
                "name": IDEMPOTENCY_KEY,
                "in": "header",
                "description": comments()[f"{self.method.input_type.full_name}.request_id"],
                "schema": {"type": "string", "pattern": rf"^[\x20-\x7e]{{1,{REQUEST_ID_CHARACTERS_MAX}}}$"},
            }
        yield from facts.HEADERS.get(self.method.containing_service.full_name, ())

    def _bound(self) -> Sequence[str]:
        return [name for name in _VARIABLE.findall(self.path) if "." not in name]

    def _body(self) -> Schema:
        request = self.method.input_type
        if self.rule.body == "*":
            return self.document.schemas.message(request, Use.REQUEST, without=self._bound())
        message = request.fields_by_name[self.rule.body].message_type
        assert message is not None, "a body is a message"
        return self.document.schemas.message(message, Use.PATCH if self.verb == "PATCH" else Use.REQUEST)

    def _success(self) -> Schema:
        response: Schema = {"description": HTTPStatus.OK.phrase, "headers": dict(REQUEST_ID)}
        field = self.method.output_type.fields_by_name.get(self.rule.response_body)
        if field is not None and field.message_type == HttpBody.DESCRIPTOR:
            response["content"] = {form.content_type: {"schema": {"type": "string"}} for form in FORMS.values()}
            return response
        if field is not None:
            schema = self.document.schemas.field(field, Use.ANSWER)
        else:
            schema = self.document.schemas.message(self.method.output_type, Use.ANSWER)
            if self.method.server_streaming:
                schema = {"type": "array", "items": schema}
        response["content"] = {"application/json": {"schema": schema}}
        return response

    def _errors(self) -> Schema:
        left_out = {
            # Of other HTTP methods.
            405,
            *(() if self.rule.body else (413,)),
            *(() if not self._is_native or "request_id" in self.method.input_type.fields_by_name else (409,)),
        }
        statuses = [status for status in self.document.errors if not self._is_native or status not in left_out]
        return {str(status): {"$ref": f"#/components/responses/{status}"} for status in statuses}


def _field(method: MethodDescriptor, path: str) -> FieldDescriptor:
    """The field of a request at a path of at most two names, such as `account.name`."""
    outer, _, inner = path.rpartition(".")
    message = method.input_type.fields_by_name[outer].message_type if outer else method.input_type
    assert message is not None, "protoc refuses a path through anything but messages"
    return message.fields_by_name[inner]


def _show(operation: Schema, exchange: Exchange, variables: Mapping[str, str]) -> None:
    """Adds an exchange to its operation as an example."""
    given = {**exchange.headers, **exchange.query, **variables}
    for parameter in operation["parameters"]:
        if parameter["name"] in given:
            parameter.setdefault("example", _typed(given[parameter["name"]], parameter["schema"]))
    if exchange.body is not None:
        _add_example(operation["requestBody"]["content"]["application/json"], exchange, exchange.body)
    _add_example(operation["responses"]["200"]["content"][exchange.content_type], exchange, exchange.answer)


def _add_example(content: Schema, exchange: Exchange, value: object) -> None:
    examples = content.setdefault("examples", {})
    examples[f"example{len(examples) + 1}"] = {"summary": exchange.title, "value": value}


def _typed(text: str, schema: Schema) -> object:
    """The value of a parameter in its schema's type."""
    match schema.get("type"):
        case "integer" | "boolean":
            return json.loads(text)
        case "array":
            return [text]
    return text
