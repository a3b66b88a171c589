"""Every native method with a valid request, called over gRPC and over REST."""

from __future__ import annotations

import copy
import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import urlencode

import grpc
from daybook.v1 import admin_service_pb2, ledger_service_pb2
from google.api.annotations_pb2 import http
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc.status_pb2 import Status

from tests.support.callers import credential
from tests.support.http_client import Answer, send
from tests.support.refusals import Refusal, read_status

JsonObject: TypeAlias = dict[str, Any]
Outcome: TypeAlias = tuple[str, object]
"""`OK` and the responses, or the status of an error and the fields that it names."""
Path: TypeAlias = tuple[FieldDescriptor, ...]
METHODS: Mapping[str, MethodDescriptor] = {
    method.name: method
    for file in (ledger_service_pb2, admin_service_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
VOLATILE = re.compile(
    r'"(uid|number|keyString|etag|nextPageToken)": "[^"]*"'
    r'|"name": "(accounts|apiKeys)/[^"]*"'
    r'|(?<=: )"[0-9-]{10}T[^"]*Z"'
)
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
GRANT = {"kind": "GRANT", "category": "test", "amount": "1"}
CHARGE = {"kind": "CHARGE", "category": "test", "amount": "-1"}
LONG_AGO = "2024-10-10T12:00:00Z"
FAR_AWAY = "2100-01-01T00:00:00Z"


@dataclass
class World:
    """A caller of every native method over gRPC and over REST, with the key of one tenant."""

    origin: str
    key: str
    channel: grpc.Channel
    message: str = ""
    """The message of the last error over gRPC."""

    def grpc(self, method: str, request: JsonObject, metadata: Mapping[str, str] | None = None) -> Outcome:
        """Makes a call over gRPC. Returns its outcome."""
        descriptor = METHODS[method]
        request_type, answer_type = GetMessageClass(descriptor.input_type), GetMessageClass(descriptor.output_type)
        message = ParseDict(request, request_type())
        outcome = self.grpc_bytes(method, message.SerializeToString(), answer_type, metadata)
        if method == "ImportTransactions" and outcome[0] == "OK":
            # The response has only counts, so the imported transactions are listed.
            return self.grpc("ListTransactions", {"parent": request["items"][0]["parent"]})
        return outcome

    def grpc_bytes(
        self, method: str, request: bytes, answer_type: Any = None, metadata: Mapping[str, str] | None = None
    ) -> Outcome:
        """Makes a call with a serialized request, as a bidirectional stream, which every method accepts."""
        descriptor = METHODS[method]
        assert descriptor.containing_service is not None
        call: Any = self.channel.stream_stream(f"/{descriptor.containing_service.full_name}/{method}")
        try:
            answers = list(call(iter([request]), metadata=(*credential(self.key), *(metadata or {}).items())))
        except grpc.RpcError as error:
            refusal = refusal_of(error)
            self.message = refusal.message
            return refusal.code.name, refusal.fields
        read = [readable(answer_type.FromString(answer)) for answer in answers] if answer_type else []
        return "OK", stable(read)

    def rest(
        self, method: str, request: JsonObject, metadata: Mapping[str, str] | None = None, query: str = ""
    ) -> Outcome:
        """Makes a call over REST. Returns its outcome."""
        answer = self.rest_answer(method, request, metadata, query)
        if answer.header("content-disposition"):
            return "OK", stable([lines_of(answer.body)])
        found = json.loads(answer.body)
        if answer.status == 200:
            return "OK", stable(found if isinstance(found, list) else [found])
        refusal = read_status(ParseDict(found, Status()))
        return refusal.code.name, refusal.fields

    def rest_answer(
        self, method: str, request: JsonObject, metadata: Mapping[str, str] | None = None, query: str = ""
    ) -> Answer:
        """Splits a request into path, body and query according to the contract, and sends it over REST."""
        rule = METHODS[method].GetOptions().Extensions[http]
        verb = rule.WhichOneof("pattern")
        rest = copy.deepcopy(request)

        def bind(match: re.Match[str]) -> str:
            *outer, name = match[1].split(".")
            inside = rest
            for each in outer:
                inside = inside[each]
            return str(inside.pop(name))

        path = re.sub(r"\{([a-z_.]+)=[^}]+\}", bind, getattr(rule, verb))
        body: object = None
        if rule.body == "*":
            body, rest = rest, {}
        elif rule.body:
            json_name = METHODS[method].input_type.fields_by_name[rule.body].json_name
            body = rest.pop(json_name, {})
        pairs = {name: json.dumps(value) if isinstance(value, bool) else value for name, value in rest.items()}
        target = f"{path}?{urlencode(pairs)}{query}" if pairs or query else path
        return self.send(verb.upper(), target, body, metadata)

    def send(self, verb: str, target: str, body: object = None, metadata: Mapping[str, str] | None = None) -> Answer:
        """Sends an HTTP request with the caller's key."""
        headers = {"authorization": f"Bearer {self.key}", "content-type": "application/json", **(metadata or {})}
        content = b"" if body is None else json.dumps(body).encode()
        return send(self.origin, target, method=verb, headers=headers, body=content)

    def base(self, method: str, path: Path = ()) -> JsonObject:
        """Returns a valid request of a method, without the field at `path`, for new accounts."""
        acme, other = f"acme-{uuid.uuid4()}", f"other-{uuid.uuid4()}"
        parent = f"accounts/{acme}"
        if method == "CreateAccount":
            return {"account": {"kind": "USER"}, "accountId": acme}
        if method in ("ListAccounts", "ListApiKeys"):
            return {}
        for account_id in (acme, other):
            created = self.grpc("CreateAccount", {"account": {"kind": "USER"}, "accountId": account_id})
            assert created[0] == "OK"
        posts = [{"transaction": each} for each in (GRANT, {**GRANT, "amount": "8"}, CHARGE)]
        assert self.grpc("BatchCreateTransactions", {"parent": parent, "requests": posts})[0] == "OK"
        names = {each.name for each in path}
        transaction = dict(CHARGE if "usage" in names else GRANT)
        if "record_declined" in names:
            # Without this field a declined charge is an error.
            transaction = {**CHARGE, "amount": "-1000"}
        item = {"parent": parent, "transaction": transaction}
        match method:
            case "GetAccount":
                return {"name": parent}
            case "UpdateAccount":
                return {"account": {"name": parent, "displayName": "new", "creditLimit": "3"}}
            case "CreateTransaction":
                return item
            case "BatchCreateTransactions" | "SubmitTransactions":
                return {"parent": parent, "requests": [{"transaction": transaction}]}
            case "RefundTransaction" | "GetTransaction":
                return {"name": self.charge(parent)}
            case "TransferCredits":
                return {"name": parent, "destination": f"accounts/{other}", "amount": "1"}
            case "ListTransactions" | "ListLots":
                return {"parent": parent}
            case "ExportTransactions":
                return {"parent": parent, "format": "NDJSON"}
            case "GetBalance":
                return {"name": f"{parent}/balance"}
            case "ImportTransactions":
                return {"items": [{**item, "createTime": "2026-01-01T00:00:00Z", "parent": f"accounts/{self.empty()}"}]}
            case "VerifyAccounts":
                return {"account": parent}
            case "CreateApiKey":
                return {"apiKey": {"scopes": ["transactions"]}}
            case "RevokeApiKey" | "RotateApiKey":
                made = json.loads(self.send("POST", "/v1/apiKeys", {"scopes": ["transactions"]}).body)
                return {"name": made["apiKey"]["name"]}
        raise AssertionError(f"no request for {method}")

    def charge(self, parent: str) -> str:
        """Returns the name of a charge of an account."""
        found = json.loads(self.send("GET", f"/v1/{parent}/transactions?filter=kind%3DCHARGE").body)
        return str(found["transactions"][0]["name"])

    def empty(self) -> str:
        """Creates an account with a credit limit and without transactions. Returns its id."""
        account_id = f"empty-{uuid.uuid4()}"
        account = {"kind": "USER", "creditLimit": "100"}
        assert self.grpc("CreateAccount", {"account": account, "accountId": account_id})[0] == "OK"
        return account_id


def refusal_of(error: Any) -> Refusal:
    """Returns the refusal of a call that raised this error."""
    return read_status(Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"]))


def readable(answer: Message) -> object:
    """Returns a response in JSON, or the lines of the file in it."""
    found = MessageToDict(answer)
    return lines_of(answer.file.data) if "file" in found else found  # type: ignore[attr-defined]


def lines_of(file: bytes) -> list[object]:
    """Returns the lines of a file, of which those in JSON are parsed."""
    return [json.loads(line) if line.startswith("{") else line for line in file.decode().split("\n")]


def stable(answers: object) -> str:
    """Returns responses as text, without the values that differ from call to call."""
    kept = (f'"{LONG_AGO}"', f'"{FAR_AWAY}"')
    text = VOLATILE.sub(lambda match: match[0] if match[0] in kept else "", json.dumps(answers, sort_keys=True))
    return UUID.sub("<uuid>", text)


REST_METHODS = [name for name, method in METHODS.items() if method.GetOptions().Extensions[http].WhichOneof("pattern")]
