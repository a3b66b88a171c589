"""The operations of a method: one for each of its REST paths."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus

from daybook.v1.scope_pb2 import scope as scope_option
from google.api.annotations_pb2 import http
from google.api.field_behavior_pb2 import REQUIRED, field_behavior
from google.api.http_pb2 import HttpRule
from google.api.httpbody_pb2 import HttpBody
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor

from docs.generate import rest_path, verb_and_path
from docs.openapi import facts
from docs.openapi.comments import comments, summary
from docs.openapi.errors import REQUEST_ID
from docs.openapi.exchanges import Exchange
from docs.openapi.schemas import Schema, Schemas, Use
from server.gateway.contracts import NATIVE
from server.rpc.export_files import FORMS
from server.transport.inputs import IDEMPOTENCY_KEY
from server.transport.validation import REQUEST_ID_CHARACTERS_MAX

_VARIABLE = re.compile(r"\{([a-z_.]+)(?:=[^}]*)?\}")


def operations(
    method: MethodDescriptor, schemas: Schemas, statuses: Collection[int], exchanges: Sequence[Exchange]
) -> Iterator[tuple[str, str, Schema]]:
    """Yields the HTTP method, the path and the operation of each binding, with the exchanges as examples.

    `statuses` are those of the API's errors, which have a response each.
    """
    options = method.GetOptions()
    rule = options.Extensions[http]
    bindings = [rule, *rule.additional_bindings] if options.HasExtension(http) else []
    for number, binding in enumerate(bindings, start=1):
        verb, path = verb_and_path(binding)
        operation = _Operation(method, binding, schemas, statuses).write(f"{method.name}{number if number > 1 else ''}")
        for exchange in exchanges:
            variables = exchange.match(verb, rest_path(path))
            if variables is not None and exchange.status == HTTPStatus.OK:
                _show(operation, exchange, variables)
        yield verb, rest_path(path), operation


def scopes_of(method: MethodDescriptor) -> Sequence[str]:
    """Returns the scopes that permit a method."""
    return list(method.GetOptions().Extensions[scope_option])


@dataclass(frozen=True, slots=True)
class _Operation:
    """One binding of a method."""

    method: MethodDescriptor
    rule: HttpRule
    schemas: Schemas
    statuses: Collection[int]
    """The HTTP statuses of the API's errors."""

    @property
    def _is_native(self) -> bool:
        package: str = self.method.input_type.file.package
        return package == NATIVE

    @property
    def _path(self) -> str:
        return verb_and_path(self.rule)[1]

    def write(self, operation_id: str) -> Schema:
        """Returns the operation without its security and its examples."""
        comment = comments()[self.method.full_name]
        scopes = " or ".join(f"`{scope}`" for scope in scopes_of(self.method))
        operation: Schema = {
            "operationId": operation_id,
            "tags": [self.method.containing_service.name],
            "summary": summary(comment),
            "description": f"{comment}\n\nScope: {scopes}.",
            "parameters": [*self._path_parameters(), *self._query_parameters(), *self._header_parameters()],
        }
        if self.rule.body:
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": self._body()}}}
        return {**operation, "responses": {"200": self._success(), **self._errors()}}

    def _path_parameters(self) -> Iterator[Schema]:
        for match in _VARIABLE.finditer(self._path):
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
            schema = self.schemas.field(field, Use.REQUEST)
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
        return [name for name in _VARIABLE.findall(self._path) if "." not in name]

    def _body(self) -> Schema:
        request = self.method.input_type
        if self.rule.body == "*":
            return self.schemas.message(request, Use.REQUEST, without=self._bound())
        message = request.fields_by_name[self.rule.body].message_type
        assert message is not None, "a body is a message"
        return self.schemas.message(message, Use.PATCH if self.rule.patch else Use.REQUEST)

    def _success(self) -> Schema:
        response: Schema = {"description": HTTPStatus.OK.phrase, "headers": dict(REQUEST_ID)}
        field = self.method.output_type.fields_by_name.get(self.rule.response_body)
        if field is not None and field.message_type == HttpBody.DESCRIPTOR:
            response["content"] = {form.content_type: {"schema": {"type": "string"}} for form in FORMS.values()}
            return response
        if field is not None:
            schema = self.schemas.field(field, Use.ANSWER)
        else:
            schema = self.schemas.message(self.method.output_type, Use.ANSWER)
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
        statuses = [status for status in self.statuses if not self._is_native or status not in left_out]
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
        add_example(operation["requestBody"]["content"]["application/json"], exchange, exchange.body)
    add_example(operation["responses"]["200"]["content"][exchange.content_type], exchange, exchange.answer)


def add_example(content: Schema, exchange: Exchange, value: object) -> None:
    """Adds a part of an exchange to the examples of a request or response."""
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
