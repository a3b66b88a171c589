"""No field is ignored: each field of each method changes the outcome of a call, or is refused by name.

The fields are read from the contracts. Each is added to a valid request, over gRPC and, if the method
has a path, over REST. The outcome must differ from the outcome without the field, or the refusal must name
the field. EXPLAINED lists the exceptions, with the reason.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from google.api.annotations_pb2 import http
from google.api.field_behavior_pb2 import REQUIRED, field_behavior
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.json_format import ParseDict
from google.protobuf.message_factory import GetMessageClass
from google.rpc.status_pb2 import Status

from tests.support.http_client import send
from tests.support.native_methods import (
    FAR_AWAY,
    GRANT,
    LONG_AGO,
    METHODS,
    REST_METHODS,
    UUID,
    JsonObject,
    Outcome,
    Path,
    World,
)
from tests.support.refusals import read_status

ATOMIC = {f"google.protobuf.{name}" for name in ("Timestamp", "Duration", "Struct", "FieldMask")}
"""Messages that are one value in JSON."""

VALUES: Mapping[str, object] = {
    "kind": "ADJUSTMENT",
    "account.kind": "COMPANY",
    "state": "CANCELED",
    "amount": "0.5",
    "credit_limit": "7.5",
    "scopes": ["accounts"],
    "account_id": "-",
    "view": "TRANSACTION_VIEW_FULL",
    "format": "CSV",
    "filter": "kind = GRANT",
    "order_by": "create_time",
    "country_code": "DE",
    "cost_usd": "0.5",
    "ttl": "3600s",
    # Invalid or harmless: other tests show the effect of these fields, which is in later calls.
    "grace_period": "-1s",
    "request_id": "é",
    "update_mask": "displayName",
    "page_token": "x",
    "expire_time": FAR_AWAY,
    "labels": {"location": "here"},
    "metadata": {"key": "value"},
}
"""A value by the name or the path of a field; for other fields the type decides."""
EXPLAINED = {
    (
        "UpdateAccount",
        "account.update_time",
    ): "output only, and ignored: a caller may send back the account that it read",
}
IDS = {"User", "Booking", "Order", "EventTicket"}
"""Messages whose id is required."""


def paths(descriptor: Descriptor, prefix: Path = ()) -> Iterator[Path]:
    """The paths of all fields that are one value in JSON, at any depth."""
    for each in descriptor.fields:
        inside = each.message_type
        if inside is None or inside.full_name in ATOMIC or inside.GetOptions().map_entry:
            yield (*prefix, each)
        else:
            yield from paths(inside, (*prefix, each))


def text_of(path: Path) -> str:
    """A path in the contract's field names, joined by dots."""
    return ".".join(each.name for each in path)


def value_of(path: Path) -> object:
    """A valid value of a field that no base request has."""
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
    """A copy of a request with a field set; messages with a required id get one."""
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


ENTRIES = [("grpc", name) for name in METHODS] + [("rest", name) for name in REST_METHODS]


NAMES = {"name", "parent", "account", "destination", "etag"}
"""Fields that name a resource: a refusal may be about the resource."""


def plain(place: object) -> str:
    """The path of a field without list indexes."""
    return re.sub(r"\[\d*\]", "", str(place))


@pytest.mark.parametrize(("protocol", "method"), ENTRIES, ids=map("-".join, ENTRIES))
def test_every_field_has_an_effect(world: World, protocol: str, method: str) -> None:
    """Setting a field changes the outcome of a call, or the refusal names the field."""
    call = getattr(world, protocol)
    ignored: list[str] = []
    without: dict[str, Outcome] = {}
    for path in paths(METHODS[method].input_type):
        given = world.base(method, path)
        owner = path[-1].containing_type
        assert owner is not None
        id_path = (*path[:-1], owner.fields_by_name["id"]) if owner.name in IDS and path[-1].name != "id" else None

        def without_field(request: JsonObject, id_path: Path | None = id_path) -> JsonObject:
            return request if id_path is None else put(request, id_path, "id")

        # Base requests of different fields often differ only in their accounts: one call serves for all.
        shape = UUID.sub("", json.dumps(without_field(given)))
        if shape not in without:
            without[shape] = call(method, without_field(world.base(method, path)))
        outcome = call(method, put(given, path, value_of(path)))
        if outcome == without[shape]:
            ignored.append(text_of(path))
        elif outcome[0] != "OK" and path[-1].name not in NAMES:
            (place,) = outcome[1]
            # A refusal of an output-only message names the message.
            assert f"{text_of(path)}.".startswith(f"{plain(place)}.")
    assert [each for each in ignored if (method, each) not in EXPLAINED] == []


@pytest.mark.parametrize(("protocol", "method"), ENTRIES, ids=map("-".join, ENTRIES))
def test_equal_requests_have_equal_outcomes(world: World, protocol: str, method: str) -> None:
    """A base request always has the same outcome, so test_every_field_has_an_effect compares fields only."""
    call = getattr(world, protocol)
    assert call(method, world.base(method)) == call(method, world.base(method))


REQUIRED_PATHS = [
    (name, path)
    for name, method in METHODS.items()
    for path in paths(method.input_type)
    if REQUIRED in path[-1].GetOptions().Extensions[field_behavior]
    and (name, text_of(path))
    not in {
        # An update keeps the kind, and the requests of a batch inherit its parent.
        ("UpdateAccount", "account.kind"),
        ("BatchCreateTransactions", "requests.parent"),
        ("SubmitTransactions", "requests.parent"),
    }
]


@pytest.mark.parametrize(
    ("method", "path"), REQUIRED_PATHS, ids=[f"{name}-{text_of(path)}" for name, path in REQUIRED_PATHS]
)
def test_missing_required_field_is_named(world: World, method: str, path: Path) -> None:
    """A request without a required field is refused with the field's name and `is required`."""
    request = put(world.base(method), path, value_of(path))
    inside: Any = request
    for each in path[:-1]:
        inside = inside[each.json_name]
        inside = inside[0] if each.is_repeated else inside
    del inside[path[-1].json_name]
    if method == "SubmitTransactions" and path[0].name == "requests":
        # Each transaction has its own refusal.
        answer = world.rest_answer(method, request)
        assert "is required" in answer.body.decode()
        return
    code, fields = world.grpc(method, request)
    assert isinstance(fields, tuple)
    (field,) = fields
    assert (code, plain(field).removeprefix("items.")) == ("INVALID_ARGUMENT", text_of(path).removeprefix("items."))
    assert world.message.startswith(f"{field}: is required")


def messages(descriptor: Descriptor, prefix: Path = ()) -> Iterator[Path]:
    """The path of each message in a request; that of the request is empty."""
    yield prefix
    for each in descriptor.fields:
        inside = each.message_type
        if inside is not None and inside.full_name not in ATOMIC and not inside.GetOptions().map_entry:
            yield from messages(inside, (*prefix, each))


@pytest.mark.parametrize("method", METHODS)
def test_unknown_field_is_refused(world: World, method: str) -> None:
    """An unknown field, as of a newer contract, is refused in every message of a request."""
    request_type = GetMessageClass(METHODS[method].input_type)
    for path in messages(METHODS[method].input_type):
        message = ParseDict(world.base(method), request_type())
        inside: Any = message
        for each in path:
            inside = getattr(inside, each.name)
            if each.is_repeated:
                inside = inside[0] if len(inside) else inside.add()
        # Field 999, of three bytes.
        inside.MergeFromString(b"\xba\x3e\x03abc")
        code, fields = world.grpc_bytes(method, message.SerializeToString())
        assert isinstance(fields, tuple)
        assert (code, [plain(each) for each in fields]) == ("INVALID_ARGUMENT", [text_of(path) or "request"])


WITH_BODY = [name for name in REST_METHODS if METHODS[name].GetOptions().Extensions[http].body]


@pytest.mark.parametrize("method", WITH_BODY)
def test_unknown_key_of_a_body_is_refused(world: World, method: str) -> None:
    """An unknown key of a JSON body is refused by its path, in every message."""
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
def test_ambiguous_parameter_is_refused(world: World, method: str) -> None:
    """A parameter that is unknown, bound by the path, without a value, or repeated is refused by its name."""
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


REPEATED = [
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
NOT_JSON = [
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
    ("body", "field"), [*REPEATED, *((body, "request") for body in NOT_JSON)], ids=lambda text: text[-40:]
)
def test_repeated_key_and_invalid_json_are_refused(world: World, body: str, field: str) -> None:
    """A repeated key is refused by its name, and invalid JSON as the field `request`."""
    parent = world.base("ListLots")["parent"]
    headers = {"authorization": f"Bearer {world.key}", "content-type": "application/json"}
    answer = send(world.origin, f"/v1/{parent}/transactions", method="POST", headers=headers, body=body.encode())
    refusal = read_status(ParseDict(json.loads(answer.body), Status()))
    assert (answer.status, refusal.code.name, refusal.fields) == (400, "INVALID_ARGUMENT", (field,))


def test_labels_and_metadata_have_any_keys(world: World) -> None:
    """Labels and metadata may have any keys, also names of the contract's fields."""
    parent = world.base("ListLots")["parent"]
    metadata = {"requestId": "x", "a.b,c": {"": [{'é😀\n"\\': None}]}, "category": "x", "category_": "y", "x" * 999: {}}
    transaction = {**GRANT, "metadata": metadata, "labels": {"amount": "x", "colour": "y"}}
    answer = world.send("POST", f"/v1/{parent}/transactions", transaction)
    assert answer.status == 200, answer.body
    posted = json.loads(answer.body)
    assert (posted["metadata"], posted["labels"]) == (metadata, transaction["labels"])


def test_value_in_query_and_body_is_refused(world: World) -> None:
    """A request_id in both the query and the body is refused."""
    charge = world.base("RefundTransaction")["name"]
    answer = world.send("POST", f"/v1/{charge}:refund?requestId=a", {"requestId": "b"})
    refusal = read_status(ParseDict(json.loads(answer.body), Status()))
    assert (answer.status, refusal.fields) == (400, ("request_id",))


def test_import_refuses_a_number_that_a_double_rounds(world: World) -> None:
    """Imported metadata may have no integer that a double would round."""
    request = world.base("ImportTransactions")
    request["items"][0]["transaction"]["metadata"] = {"order": 2**53 + 1}
    assert world.grpc("ImportTransactions", request) == (
        "INVALID_ARGUMENT",
        ("items[0].transaction.metadata.order",),
    )
