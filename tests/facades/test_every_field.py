"""No input is dropped without a word: each field of each method changes what comes of a call, or is refused by name.

The fields are read from the contracts. Each is set in a request that is sound without it, over gRPC and,
where the method has a path, over REST. What comes of the call then differs from what came without it, or
the refusal names the field. A field for which neither is true is in EXPLAINED, with the reason.
"""

from __future__ import annotations

import copy
import json
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import urlencode

import grpc
import pytest
from daybook.v1 import admin_service_pb2, ledger_service_pb2
from google.api.annotations_pb2 import http
from google.api.field_behavior_pb2 import REQUIRED, field_behavior
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass
from google.rpc.status_pb2 import Status

from tests.conftest import Refusal, read_status
from tests.facades.conftest import credential
from tests.facades.exchanges import Answer, send
from tests.facades.processes import Daybook
from tests.facades.test_live import printed

JsonObject: TypeAlias = dict[str, Any]
Outcome: TypeAlias = tuple[str, object]
"""`OK` and what was answered, or the status of a refusal and the fields that it names."""
Path: TypeAlias = tuple[FieldDescriptor, ...]

METHODS: Mapping[str, MethodDescriptor] = {
    method.name: method
    for file in (ledger_service_pb2, admin_service_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
WHOLE = {f"google.protobuf.{name}" for name in ("Timestamp", "Duration", "Struct", "FieldMask")}
"""Messages that JSON has as one value."""
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
VALUES: Mapping[str, object] = {
    "kind": "ADJUSTMENT",
    "account.kind": "COMPANY",
    "state": "CANCELED",
    "amount": "0.5",
    "credit_limit": "7.5",
    "scopes": ["accounts"],
    "account_id": "-",
    "view": "TRANSACTION_VIEW_FULL",
    "filter": "kind = GRANT",
    "order_by": "create_time",
    "country_code": "DE",
    "cost_usd": "0.5",
    "ttl": "3600s",
    # What these do shows only in calls that follow, which other tests make.
    "grace_period": "-1s",
    "request_id": "é",
    "update_mask": "displayName",
    "page_token": "x",
    "expire_time": FAR_AWAY,
    "labels": {"location": "here"},
    "metadata": {"key": "value"},
}
"""By the name of a field, or by its path; what any other gets says its type."""
EXPLAINED = {
    ("UpdateAccount", "account.update_time"): "is as old as the caller's copy; see the contract",
}
IDS = {"User", "Booking", "Order", "EventTicket"}
"""Messages of the contract that need their id."""


def paths(descriptor: Descriptor, before: Path = ()) -> Iterator[Path]:
    """Every field of a message that has one value in JSON, at any depth."""
    for each in descriptor.fields:
        inside = each.message_type
        if inside is None or inside.full_name in WHOLE or inside.GetOptions().map_entry:
            yield (*before, each)
        else:
            yield from paths(inside, (*before, each))


def text_of(path: Path) -> str:
    """A path by the names of the contract."""
    return ".".join(each.name for each in path)


def value_of(path: Path) -> object:
    """A value that a field takes and that no request here has for it otherwise."""
    last = path[-1]
    for name in (text_of(path), last.name):
        if name in VALUES:
            return VALUES[name]
    match last.cpp_type:
        case FieldDescriptor.CPPTYPE_BOOL:
            return True
        case FieldDescriptor.CPPTYPE_INT32 | FieldDescriptor.CPPTYPE_INT64:
            return 1
        case FieldDescriptor.CPPTYPE_MESSAGE:
            assert last.message_type is not None
            return [] if last.is_repeated else LONG_AGO
        case _:
            return "other"


def put(request: JsonObject, path: Path, value: object) -> JsonObject:
    """A copy of a request in which a field has a value; a message that needs an id has one."""
    changed = copy.deepcopy(request)
    inside: Any = changed
    for each in path[:-1]:
        assert each.message_type is not None
        fresh: JsonObject = {"id": "id"} if each.message_type.name in IDS else {}
        if each.is_repeated:
            inside = inside.setdefault(each.json_name, [fresh])[0]
        else:
            inside = inside.setdefault(each.json_name, fresh)
    inside[path[-1].json_name] = value
    return changed


@dataclass
class World:
    """A tenant, its credential, and both doors to it."""

    origin: str
    key: str
    channel: grpc.Channel
    message: str = ""
    """That of the last refusal over gRPC."""

    def grpc(self, method: str, request: JsonObject, metadata: Mapping[str, str] | None = None) -> Outcome:
        """What comes of a call over gRPC."""
        descriptor = METHODS[method]
        request_type, answer_type = GetMessageClass(descriptor.input_type), GetMessageClass(descriptor.output_type)
        message = ParseDict(request, request_type())
        outcome = self.grpc_bytes(method, message.SerializeToString(), answer_type, metadata)
        if method == "ImportTransactions" and outcome[0] == "OK":
            # Its answer says only how many there are.
            return self.grpc("ListTransactions", {"parent": request["items"][0]["parent"]})
        return outcome

    def grpc_bytes(
        self, method: str, request: bytes, answer_type: Any = None, metadata: Mapping[str, str] | None = None
    ) -> Outcome:
        """The same for a request that is serialized. On the wire every method is a stream both ways."""
        descriptor = METHODS[method]
        assert descriptor.containing_service is not None
        call: Any = self.channel.stream_stream(f"/{descriptor.containing_service.full_name}/{method}")
        try:
            answers = list(call(iter([request]), metadata=(*credential(self.key), *(metadata or {}).items())))
        except grpc.RpcError as error:
            refusal = refusal_of(error)
            self.message = refusal.message
            return refusal.code.name, refusal.fields
        read = [MessageToDict(answer_type.FromString(answer)) for answer in answers] if answer_type else []
        return "OK", stable(read)

    def rest(
        self, method: str, request: JsonObject, metadata: Mapping[str, str] | None = None, query: str = ""
    ) -> Outcome:
        """What comes of it over REST."""
        answer = self.rest_answer(method, request, metadata, query)
        found = json.loads(answer.body)
        if answer.status == 200:
            return "OK", stable(found if isinstance(found, list) else [found])
        refusal = read_status(ParseDict(found, Status()))
        return refusal.code.name, refusal.fields

    def rest_answer(
        self, method: str, request: JsonObject, metadata: Mapping[str, str] | None = None, query: str = ""
    ) -> Answer:
        """The answer over REST to a request whose path, body and query the contract tells apart."""
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
        """Sends a request of the caller's."""
        headers = {"authorization": f"Bearer {self.key}", "content-type": "application/json", **(metadata or {})}
        content = b"" if body is None else json.dumps(body).encode()
        return send(self.origin, target, method=verb, headers=headers, body=content)

    def base(self, method: str, path: Path = ()) -> JsonObject:
        """A sound request of a method that lacks the field, about things that no other request is about."""
        acme, other = f"acme-{uuid.uuid4()}", f"other-{uuid.uuid4()}"
        parent = f"accounts/{acme}"
        if method == "CreateAccount":
            return {"account": {"kind": "USER"}, "accountId": acme}
        for account_id in (acme, other):
            created = self.grpc("CreateAccount", {"account": {"kind": "USER"}, "accountId": account_id})
            assert created[0] == "OK"
        posts = [{"transaction": each} for each in (GRANT, {**GRANT, "amount": "8"}, CHARGE)]
        assert self.grpc("BatchCreateTransactions", {"parent": parent, "requests": posts})[0] == "OK"
        names = {each.name for each in path}
        transaction = dict(CHARGE if "usage" in names else GRANT)
        if "record_declined" in names:
            # Without it, this is refused.
            transaction = {**CHARGE, "amount": "-1000"}
        item = {"parent": parent, "transaction": transaction}
        match method:
            case "GetAccount":
                return {"name": parent}
            case "UpdateAccount":
                return {"account": {"name": parent, "displayName": "new", "creditLimit": "3"}}
            case "CreateTransaction":
                return item
            case "BatchCreateTransactions" | "BulkCreateTransactions":
                return {"parent": parent, "requests": [{"transaction": transaction}]}
            case "RefundTransaction" | "GetTransaction":
                return {"name": self.charge(parent)}
            case "TransferCredits":
                return {"name": parent, "destination": f"accounts/{other}", "amount": "1"}
            case "ListTransactions" | "ListLots":
                return {"parent": parent}
            case "GetBalance":
                return {"name": f"{parent}/balance"}
            case "ImportTransactions":
                return {"items": [{**item, "createTime": "2026-01-01T00:00:00Z", "parent": f"accounts/{self.empty()}"}]}
            case "VerifyLedger":
                return {"account": parent}
            case "CreateApiKey":
                return {"apiKey": {"scopes": ["transactions"]}}
            case "RevokeApiKey" | "RotateApiKey":
                made = json.loads(self.send("POST", "/v1/apiKeys", {"scopes": ["transactions"]}).body)
                return {"name": made["apiKey"]["name"]}
        assert method in ("ListAccounts", "ListApiKeys")
        return {}

    def charge(self, parent: str) -> str:
        """The name of a charge of an account."""
        found = json.loads(self.send("GET", f"/v1/{parent}/transactions?filter=kind%3DCHARGE").body)
        return str(found["transactions"][0]["name"])

    def empty(self) -> str:
        """The id of an account without transactions, which may be charged all the same."""
        account_id = f"empty-{uuid.uuid4()}"
        account = {"kind": "USER", "creditLimit": "100"}
        assert self.grpc("CreateAccount", {"account": account, "accountId": account_id})[0] == "OK"
        return account_id


def refusal_of(error: Any) -> Refusal:
    """A refusal over gRPC."""
    return read_status(Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"]))


def stable(answers: object) -> str:
    """Answers without what differs from call to call."""
    kept = (f'"{LONG_AGO}"', f'"{FAR_AWAY}"')
    text = VOLATILE.sub(lambda match: match[0] if match[0] in kept else "", json.dumps(answers, sort_keys=True))
    return UUID.sub("<uuid>", text)


@pytest.fixture(scope="module")
def world(gateway: Daybook, channel: grpc.Channel) -> World:
    """A tenant of the module's own."""
    slug = f"fields-{uuid.uuid4()}"
    printed(gateway, "tenants", "create", slug)
    key = printed(gateway, "keys", "create", "--tenant", slug, "--scope", "admin")
    return World(gateway.origin, key, channel)


REST_METHODS = [name for name, method in METHODS.items() if method.GetOptions().Extensions[http].WhichOneof("pattern")]
DOORS = [("grpc", name) for name in METHODS] + [("rest", name) for name in REST_METHODS]


NAMES = {"name", "parent", "account", "destination", "etag"}
"""Fields that name something: a refusal may be about what they name."""


def plain(place: object) -> str:
    """The path of a field, without which of several it is in."""
    return re.sub(r"\[\d*\]", "", str(place))


@pytest.mark.parametrize(("door", "method"), DOORS, ids=map("-".join, DOORS))
def test_every_field_counts(world: World, door: str, method: str) -> None:
    """What comes of a call differs with the field, or the call is refused and the field is named."""
    call = getattr(world, door)
    ignored: list[str] = []
    without: dict[str, Outcome] = {}
    for path in paths(METHODS[method].input_type):
        given, lacking = (world.base(method, path) for _ in range(2))
        owner = path[-1].containing_type
        assert owner is not None
        if owner.name in IDS and path[-1].name != "id":
            lacking = put(lacking, (*path[:-1], owner.fields_by_name["id"]), "id")
        shape = UUID.sub("", json.dumps(lacking))
        if shape not in without:
            without[shape] = call(method, lacking)
        outcome = call(method, put(given, path, value_of(path)))
        if outcome == without[shape]:
            ignored.append(text_of(path))
        elif outcome[0] != "OK" and path[-1].name not in NAMES:
            (place,) = outcome[1]
            # An error about a message that only Daybook sets names all of it.
            assert f"{text_of(path)}.".startswith(f"{plain(place)}.")
    assert [each for each in ignored if (method, each) not in EXPLAINED] == []


@pytest.mark.parametrize(("door", "method"), DOORS, ids=map("-".join, DOORS))
def test_the_same_request_has_the_same_outcome(world: World, door: str, method: str) -> None:
    """What test_every_field_counts compares differs by nothing but the field."""
    call = getattr(world, door)
    assert call(method, world.base(method)) == call(method, world.base(method))


REQUIRED_PATHS = [
    (name, path)
    for name, method in METHODS.items()
    for path in paths(method.input_type)
    if REQUIRED in path[-1].GetOptions().Extensions[field_behavior]
    and (name, text_of(path))
    not in {
        # An update keeps it, and a batch gives its requests its own.
        ("UpdateAccount", "account.kind"),
        ("BatchCreateTransactions", "requests.parent"),
        ("BulkCreateTransactions", "requests.parent"),
    }
]


@pytest.mark.parametrize(
    ("method", "path"), REQUIRED_PATHS, ids=[f"{name}-{text_of(path)}" for name, path in REQUIRED_PATHS]
)
def test_required_field_is_called_missing(world: World, method: str, path: Path) -> None:
    """A required field that isn't given is refused by its name, and called required."""
    request = put(world.base(method), path, value_of(path))
    inside: Any = request
    for each in path[:-1]:
        inside = inside[each.json_name]
        inside = inside[0] if each.is_repeated else inside
    del inside[path[-1].json_name]
    if method == "BulkCreateTransactions" and path[0].name == "requests":
        # The transactions of it are refused one by one.
        answer = world.rest_answer(method, request)
        assert "is required" in answer.body.decode()
        return
    code, fields = world.grpc(method, request)
    assert isinstance(fields, tuple)
    (field,) = fields
    assert (code, plain(field).removeprefix("items.")) == ("INVALID_ARGUMENT", text_of(path).removeprefix("items."))
    assert world.message.startswith(f"{field}: is required")


def messages(descriptor: Descriptor, before: Path = ()) -> Iterator[Path]:
    """The path of each message in a request, whose own is empty."""
    yield before
    for each in descriptor.fields:
        inside = each.message_type
        if inside is not None and inside.full_name not in WHOLE and not inside.GetOptions().map_entry:
            yield from messages(inside, (*before, each))


@pytest.mark.parametrize("method", METHODS)
def test_field_that_the_contract_lacks_is_refused(world: World, method: str) -> None:
    """A field of a newer contract is refused, in whatever message of a request it is."""
    request_type = GetMessageClass(METHODS[method].input_type)
    for path in messages(METHODS[method].input_type):
        message = ParseDict(world.base(method), request_type())
        inside: Any = message
        for each in path:
            inside = getattr(inside, each.name)
            if each.is_repeated:
                inside = inside[0] if len(inside) else inside.add()
        # Field 999, a length, and so many bytes.
        inside.MergeFromString(b"\xba\x3e\x03abc")
        code, fields = world.grpc_bytes(method, message.SerializeToString())
        assert isinstance(fields, tuple)
        assert (code, [plain(each) for each in fields]) == ("INVALID_ARGUMENT", [text_of(path) or "request"])


WITH_BODY = [name for name in REST_METHODS if METHODS[name].GetOptions().Extensions[http].body]


@pytest.mark.parametrize("method", WITH_BODY)
def test_key_that_a_message_lacks_is_refused(world: World, method: str) -> None:
    """A key of a body that the contract lacks is refused by its path, in whatever message it is."""
    body = METHODS[method].GetOptions().Extensions[http].body
    for path in messages(METHODS[method].input_type):
        if body != "*" and (not path or path[0].name != body):
            continue
        request, inside = world.base(method), {"colour": "red"}
        holder: Any = request
        for each in path:
            holder = holder.setdefault(each.json_name, [{}] if each.is_repeated else {})
            holder = holder[0] if each.is_repeated else holder
        holder.update(inside)
        code, fields = world.rest(method, request)
        assert isinstance(fields, tuple)
        where = ".".join([*(each.name for each in path), "colour"])
        assert (code, [plain(each) for each in fields]) == ("INVALID_ARGUMENT", [where])


@pytest.mark.parametrize("method", REST_METHODS)
def test_parameter_that_would_be_dropped_is_refused(world: World, method: str) -> None:
    """A parameter that is unknown, bound by the path, without a value, or there twice is refused by its name."""
    rule = METHODS[method].GetOptions().Extensions[http]
    bound = re.findall(r"\{([a-z_.]+)=", getattr(rule, rule.WhichOneof("pattern")))
    bad = [("colour=red", "colour"), ("colour", "colour"), *((f"{name}=accounts/x", name) for name in bound)]
    for each in METHODS[method].input_type.fields:
        if each.message_type is None and each.name not in bound:
            value = {FieldDescriptor.CPPTYPE_STRING: "a", FieldDescriptor.CPPTYPE_BOOL: "true"}.get(each.cpp_type, "1")
            bad += [
                (each.json_name, each.name),
                (f"{each.json_name}={value}&{each.json_name}={value}", each.name),
                (f"{each.name}={value}&{each.json_name}={value}", each.name),
            ]
    for query, name in bad:
        request = world.base(method)
        if name not in ("colour", *bound):
            request.pop(METHODS[method].input_type.fields_by_name[name].json_name, None)
        assert world.rest(method, request, query=f"&{query}") == ("INVALID_ARGUMENT", (name,)), query


TWICE = [
    ('{"kind": "GRANT", "category": "a", "category": "b", "amount": "1"}', "transaction.category"),
    (
        '{"kind": "GRANT", "category": "a", "amount": "1", "receiptUri": "a", "receipt_uri": "b"}',
        "transaction.receipt_uri",
    ),
    (
        '{"kind": "GRANT", "category": "a", "amount": "1", "owner": {"id": "a", "i\\u0064": "b"}}',
        "transaction.owner.id",
    ),
]
NO_JSON = [
    "{kind: 'GRANT', category: 'a', 'amount': '1'}",
    '{"kind": "GRANT", "category": "a", "amount": "1",}',
    '{"kind": "GRANT", "category": "a", "amount": "1"} {}',
    '{"kind": "GRANT", "category": "a", "amount": "1"',
    '{"kind": "GRANT", "category": "a", "amount": "1", "metadata": {"a": NaN}}',
    '{"kind": "GRANT", "category": "a", "amount": "1", "metadata": {"a": 01}}',
    '{"kind": "GRANT" "category": "a", "amount": "1"}',
    '{"kind": "GRANT", "category": "a", "amount": "1", "metadata": ' + '{"a": ' * 100 + "1" + "}" * 101,
    '{"kind": "GRANT", "category": "a", "amount": "1", "metadata": ' + "[" * 100_000,
]


@pytest.mark.parametrize(
    ("body", "field"), [*TWICE, *((body, "request") for body in NO_JSON)], ids=lambda text: text[-40:]
)
def test_body_that_would_be_read_in_part_is_refused(world: World, body: str, field: str) -> None:
    """A key that is there twice is refused by its name, and so is what only looks like JSON."""
    parent = world.base("ListLots")["parent"]
    headers = {"authorization": f"Bearer {world.key}", "content-type": "application/json"}
    answer = send(world.origin, f"/v1/{parent}/transactions", method="POST", headers=headers, body=body.encode())
    refusal = read_status(ParseDict(json.loads(answer.body), Status()))
    assert (answer.status, refusal.code.name, refusal.fields) == (400, "INVALID_ARGUMENT", (field,))


def test_keys_inside_of_what_is_the_callers_own_are_free(world: World) -> None:
    """Labels and metadata have whatever keys a caller likes, also those that look like ours, or like anything."""
    parent = world.base("ListLots")["parent"]
    metadata = {"requestId": "x", "a.b,c": {"": [{'é😀\n"\\': None}]}, "category": "x", "category_": "y", "x" * 999: {}}
    transaction = {**GRANT, "metadata": metadata, "labels": {"amount": "x", "colour": "y"}}
    answer = world.send("POST", f"/v1/{parent}/transactions", transaction)
    assert answer.status == 200, answer.body
    posted = json.loads(answer.body)
    assert (posted["metadata"], posted["labels"]) == (metadata, transaction["labels"])


def test_value_in_query_and_body_is_refused(world: World) -> None:
    """What both the query and the body give is taken from neither."""
    charge = world.base("RefundTransaction")["name"]
    answer = world.send("POST", f"/v1/{charge}:refund?requestId=a", {"requestId": "b"})
    refusal = read_status(ParseDict(json.loads(answer.body), Status()))
    assert (answer.status, refusal.fields) == (400, ("request_id",))


def test_number_of_history_that_a_double_rounds_is_refused(world: World) -> None:
    """What an import brings in is held to the same as what is posted."""
    request = world.base("ImportTransactions")
    request["items"][0]["transaction"]["metadata"] = {"order": 2**53 + 1}
    assert world.grpc("ImportTransactions", request) == (
        "INVALID_ARGUMENT",
        ("items[0].transaction.metadata.order",),
    )
