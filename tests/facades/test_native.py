"""The native API through the gateway: REST under /v1, and gRPC on the same port."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import uuid
from decimal import Decimal
from typing import Any
from urllib.parse import quote, urlencode

import grpc
import h2.config
import h2.connection
import h2.events
import httpx
import pytest
from daybook.v1 import admin_service_pb2, ledger_service_pb2
from daybook.v1.account_pb2 import Account
from daybook.v1.ledger_service_pb2 import GetAccountRequest, ListTransactionsRequest
from daybook.v1.transaction_pb2 import Transaction
from google.api.annotations_pb2 import http
from google.protobuf.descriptor_pool import Default
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from server.app import SERVICES
from server.transport.open_services import OPEN_SERVICES
from tests.support.callers import NativeCaller, credential
from tests.support.gateways import OriginIn
from tests.support.http_client import Json, problems_of_any_answer, read_json, send
from tests.support.processes import BIN, Daybook
from tests.support.rest import KEY, JsonObject, Rest, reason_of
from tests.support.waiting import wait_until

BOUND_KEY = "demo-nebulablock.public"
LISTED_BY_REFLECTION = {*SERVICES, *OPEN_SERVICES}


USER = {
    "id": "u1",
    "name": "",
    "surname": "",
    "email": "",
    "phoneNumber": "",
    "photoUri": "",
    "about": "",
    "membership": "",
}
"""A user with only an id, in JSON."""
EMPTY_FIELDS = {
    "description": "",
    "labels": {},
    "receiptUri": "",
    "requestId": "",
    "refundOf": "",
    "transferPeer": "",
    "allocations": [],
    "priority": 0,
}
"""The fields of a transaction that JSON shows when they are empty."""


def test_account_is_created_and_read(rest: Rest) -> None:
    """A new account has the requested fields, and is read and listed as it was answered."""
    account_id = f"rest-{uuid.uuid4()}"
    user = {"id": "u1", "name": "Ada", "surname": "Lovelace", "photoUri": "https://example.com/ada.png"}
    created = rest.call(
        "POST",
        f"/v1/accounts?accountId={account_id}&requestId={account_id}",
        {"kind": "USER", "displayName": "Ada — Ωmega", "creditLimit": "2.50", "user": user},
    )
    number, times, etag = (
        created.pop("number"),
        [created.pop("createTime"), created.pop("updateTime")],
        created.pop("etag"),
    )
    hour_anchor = created.pop("hourAnchorTime")
    assert created == {
        "name": f"accounts/{account_id}",
        "kind": "USER",
        "displayName": "Ada — Ωmega",
        "creditLimit": "2.5",
        "user": {**USER, **user},
    }
    assert isinstance(number, str), "64-bit integers are strings in JSON"
    assert int(number) > 0
    assert times[0] == times[1]
    # The anchor is the time of creation, without its fraction of a second.
    assert str(hour_anchor).removesuffix("Z") == str(times[0])[:19]
    read = rest.call("GET", f"/v1/accounts/{account_id}")
    assert read == {
        **created,
        "number": number,
        "createTime": times[0],
        "updateTime": times[1],
        "etag": etag,
        "hourAnchorTime": hour_anchor,
    }
    accounts = rest.call("GET", "/v1/accounts?pageSize=1000")["accounts"]
    assert isinstance(accounts, list)
    assert read in accounts


def test_repeated_request_gets_the_same_answer(rest: Rest) -> None:
    """A repeated request gets the same account; another request with the same request_id is refused."""
    account_id = f"rest-{uuid.uuid4()}"
    target = f"/v1/accounts?accountId={account_id}&requestId=once"
    first = rest.call("POST", target, {"kind": "OTHER"})
    assert rest.call("POST", target, {"kind": "OTHER"}) == first
    refused = rest.send("POST", target, {"kind": "SPACE"})
    assert refused.status == 409
    assert reason_of(refused.json())[0] == "REQUEST_ID_REUSED"


def test_transaction_is_posted_and_read(rest: Rest) -> None:
    """A transaction is read and listed as it was answered, and is in the balance."""
    account = rest.account()
    grant = rest.post(account, "GRANT", "10", description="ten")
    charge = rest.call(
        "POST",
        f"/v1/accounts/{account}/transactions?requestId=r1",
        {
            "kind": "CHARGE",
            "category": "inference",
            "amount": "-2.500",
            "labels": {"location": "here"},
            "creator": {"id": "u1"},
            "metadata": {"deep": {"er": [1, None, "x"]}},
            "usage": {"model": "m", "inputTokens": "9007199254740993", "costUsd": "0.1"},
        },
    )
    uid, create_time = charge["uid"], charge["createTime"]
    assert charge == read_json(
        json.dumps(
            {
                "name": f"accounts/{account}/transactions/{uid}",
                "uid": uid,
                "sequence": "2",
                "createTime": create_time,
                "kind": "CHARGE",
                "category": "inference",
                "state": "SUCCEEDED",
                "amount": "-2.5",
                "expiringAmount": "0",
                "permanentAmount": "-2.5",
                "balanceAfter": "7.5",
                **EMPTY_FIELDS,
                "requestId": "r1",
                "labels": {"location": "here"},
                "creator": USER,
                "metadata": {"deep": {"er": [1, None, "x"]}},
                "usage": {"model": "m", "inputTokens": "9007199254740993", "costUsd": "0.1"},
            }
        )
    )
    assert rest.call("GET", f"/v1/accounts/{account}/transactions/{uid}") == charge
    assert rest.call("GET", f"/v1/accounts/{account}/transactions") == {
        "transactions": [charge, grant],
        "nextPageToken": "",
    }
    balance = rest.call("GET", f"/v1/accounts/{account}/balance")
    read_time = balance.pop("readTime")
    assert str(read_time) >= str(create_time)
    assert balance == {
        "name": f"accounts/{account}/balance",
        "amount": "7.5",
        "expiringAmount": "0",
        "permanentAmount": "7.5",
        "availableAmount": "7.5",
        "sequence": "2",
    }


def test_list_has_pages_filter_and_order(rest: Rest) -> None:
    """A list takes parameters in snake_case and camelCase, a filter, and an order with `+` as a space."""
    account = rest.account()
    rest.post(account, "GRANT", "100")
    charges = [rest.post(account, "CHARGE", f"-{amount}")["uid"] for amount in (3, 1, 2)]

    def uids(query: str) -> tuple[list[Json], Json]:
        body = rest.call("GET", f"/v1/accounts/{account}/transactions?{query}")
        rows = body["transactions"]
        assert isinstance(rows, list)
        return [row["uid"] for row in rows if isinstance(row, dict)], body["nextPageToken"]

    only_charges = f"filter={quote('kind = CHARGE')}"
    assert uids(only_charges) == ([charges[2], charges[1], charges[0]], "")
    first, token = uids(f"{only_charges}&page_size=2")
    assert first == [charges[2], charges[1]]
    assert uids(f"{only_charges}&pageSize=2&pageToken={token}") == ([charges[0]], "")
    # The largest charge is the smallest amount.
    assert uids(f"{only_charges}&orderBy=amount+desc")[0] == [charges[1], charges[2], charges[0]]
    assert uids(f"{only_charges}&order_by=amount")[0] == [charges[0], charges[2], charges[1]]
    stale = rest.send("GET", f"/v1/accounts/{account}/transactions?pageToken={token}")
    assert stale.status == 400
    assert reason_of(stale.json()) == ("PAGE_TOKEN_MISMATCH", {"field": "page_token"}, ["page_token"])


@pytest.mark.parametrize("spelled", ["updateMask=displayName", "update_mask=display_name"])
def test_update_writes_the_fields_of_the_mask(rest: Rest, spelled: str) -> None:
    """An update keeps fields outside the mask, and clears absent fields in the mask."""
    account = rest.account(displayName="before", creditLimit="5")
    changed = rest.call("PATCH", f"/v1/accounts/{account}?{spelled}", {"displayName": "after", "creditLimit": "9"})
    assert (changed["displayName"], changed["creditLimit"]) == ("after", "5")
    cleared = rest.call("PATCH", f"/v1/accounts/{account}?{spelled}", {})
    assert (cleared["displayName"], cleared["creditLimit"]) == ("", "5")
    assert rest.call("GET", f"/v1/accounts/{account}") == cleared


def test_update_without_mask_writes_the_set_fields(rest: Rest) -> None:
    """Without a mask an update writes only the fields that are set."""
    account = rest.account(displayName="before", creditLimit="5", user={"id": "u1"})
    changed = rest.call("PATCH", f"/v1/accounts/{account}", {"creditLimit": "9"})
    assert (changed["displayName"], changed["creditLimit"], changed["user"]) == ("before", "9", USER)


def test_update_with_stale_etag_is_refused(rest: Rest) -> None:
    """An update with the etag of an earlier version is refused."""
    account = rest.account()
    etag = rest.call("GET", f"/v1/accounts/{account}")["etag"]
    rest.call("PATCH", f"/v1/accounts/{account}", {"displayName": "first", "etag": etag})
    refused = rest.send("PATCH", f"/v1/accounts/{account}", {"displayName": "second", "etag": etag})
    assert refused.status == 409
    assert reason_of(refused.json())[0] == "ETAG_MISMATCH"
    assert rest.call("GET", f"/v1/accounts/{account}")["displayName"] == "first"


GRANT = {"kind": "GRANT", "category": "test", "amount": "1"}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "reason", "fields"),
    [
        ("POST", "/v1/accounts", {"kind": "OTHER"}, 400, "FIELD_INVALID", ["account_id"]),
        ("POST", "/v1/accounts?accountId=-", {"kind": "OTHER"}, 400, "FIELD_INVALID", ["account_id"]),
        ("POST", "/v1/accounts?accountId=never", {}, 400, "FIELD_INVALID", ["account.kind"]),
        ("POST", "/v1/accounts?accountId=example", {"kind": "OTHER"}, 409, "ACCOUNT_EXISTS", []),
        ("GET", "/v1/accounts/nowhere", None, 404, "ACCOUNT_NOT_FOUND", []),
        ("GET", "/v1/accounts/spcExampleStudio", None, 404, "ACCOUNT_NOT_FOUND", []),
        ("PATCH", "/v1/accounts/nowhere", {"displayName": "x"}, 404, "ACCOUNT_NOT_FOUND", []),
        ("PATCH", "/v1/accounts/example?updateMask=kind", {}, 400, "FIELD_INVALID", ["update_mask"]),
        ("GET", "/v1/accounts/nowhere/balance", None, 404, "ACCOUNT_NOT_FOUND", []),
        ("GET", "/v1/accounts?pageSize=-1", None, 400, "FIELD_INVALID", ["page_size"]),
        ("GET", "/v1/accounts?pageToken=abc", None, 400, "PAGE_TOKEN_INVALID", ["page_token"]),
        ("POST", "/v1/accounts/nowhere/transactions", GRANT, 404, "ACCOUNT_NOT_FOUND", []),
        (
            "POST",
            "/v1/accounts/example/transactions",
            {**GRANT, "amount": "1.0000001"},
            400,
            "FIELD_INVALID",
            ["transaction.amount"],
        ),
        # A double would round this integer.
        (
            "POST",
            "/v1/accounts/example/transactions",
            {**GRANT, "metadata": {"order": 9007199254740993}},
            400,
            "FIELD_INVALID",
            ["transaction.metadata.order"],
        ),
        (
            "POST",
            "/v1/accounts/example/transactions:batchCreate",
            {"requests": [{"transaction": {**GRANT, "metadata": {"orders": [1, {"id": -(10**20)}]}}}]},
            400,
            "FIELD_INVALID",
            ["requests[0].transaction.metadata.orders[1].id"],
        ),
        (
            "POST",
            "/v1/accounts?accountId=never",
            {"kind": "COMPANY", "company": {"metadata": {"order": 2**63}}},
            400,
            "FIELD_INVALID",
            ["account.company.metadata.order"],
        ),
        (
            "POST",
            "/v1/accounts/example/transactions",
            {**GRANT, "amount": "-1"},
            400,
            "FIELD_INVALID",
            ["transaction.amount"],
        ),
        (
            "POST",
            "/v1/accounts/example/transactions",
            {**GRANT, "kind": "REFUND"},
            400,
            "FIELD_INVALID",
            ["transaction.kind"],
        ),
        (
            "POST",
            "/v1/accounts/example/transactions",
            {**GRANT, "category": "Ä"},
            400,
            "FIELD_INVALID",
            ["transaction.category"],
        ),
        (
            "POST",
            "/v1/accounts/example/transactions",
            {"kind": "CHARGE", "category": "test", "amount": "-999999999999"},
            400,
            "INSUFFICIENT_CREDITS",
            [],
        ),
        ("GET", "/v1/accounts/example/transactions?filter=x%20%3D%201", None, 400, "FILTER_INVALID", ["filter"]),
        ("GET", "/v1/accounts/example/transactions?orderBy=x", None, 400, "FIELD_INVALID", ["order_by"]),
        ("GET", "/v1/accounts/example/transactions?pageToken=abc", None, 400, "PAGE_TOKEN_INVALID", ["page_token"]),
        ("GET", f"/v1/accounts/example/transactions/{uuid.UUID(int=0)}", None, 404, "TRANSACTION_NOT_FOUND", []),
        ("GET", "/v1/accounts/example/transactions/abc", None, 400, "FIELD_INVALID", ["name"]),
    ],
)
def test_refusal_is_a_status_with_a_reason(
    rest: Rest, method: str, path: str, body: object, status: int, reason: str, fields: list[str]
) -> None:
    """Each refusal is a google.rpc.Status with one ErrorInfo, and names the invalid field."""
    answer = rest.send(method, path, body)
    assert answer.status == status, answer.body
    found_reason, metadata, found_fields = reason_of(answer.json())
    assert (found_reason, found_fields) == (reason, fields)
    assert [metadata["field"]] == fields if fields else "field" not in metadata


LIST = "/v1/accounts/example/transactions"
CREATE = "/v1/accounts?accountId=never"
CODES = {400: 3, 404: 5, 405: 12, 413: 8}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "reason", "field", "text"),
    [
        ("GET", "/v1/accounts/example?colour=red", None, 400, "FIELD_INVALID", "colour", "colour"),
        ("GET", f"{LIST}?page_size=2&pagesize=3", None, 400, "FIELD_INVALID", "pagesize", "pagesize"),
        ("GET", f"{LIST}?pageSize=abc", None, 400, "FIELD_INVALID", "request", "abc"),
        ("GET", f"{LIST}?page_size=", None, 400, "FIELD_INVALID", "request", '""'),
        ("GET", f"{LIST}?pageSize=99999999999", None, 400, "FIELD_INVALID", "request", "99999999999"),
        ("GET", "/v1/accounts/a%00b", None, 400, "FIELD_INVALID", "request", "malformed"),
        ("POST", f"{CREATE}&kind=OTHER", {"kind": "OTHER"}, 400, "FIELD_INVALID", "kind", "kind"),
        ("POST", CREATE, {"kind": 77.5}, 400, "FIELD_INVALID", "request", "77.5"),
        ("POST", CREATE, {"kind": "COLOUR"}, 400, "FIELD_INVALID", "request", "COLOUR"),
        ("POST", CREATE, {"displayName": 5.5}, 400, "FIELD_INVALID", "request", "5.5"),
        ("POST", LIST, {"amount": -0.05}, 400, "FIELD_INVALID", "request", "transaction.amount: invalid value"),
        ("POST", LIST, {"amount": 5}, 400, "FIELD_INVALID", "request", "transaction.amount: invalid value"),
        ("POST", LIST, {"amount": True}, 400, "FIELD_INVALID", "request", "transaction.amount: invalid value"),
        (
            "POST",
            LIST,
            {"usage": {"costUsd": 1}},
            400,
            "FIELD_INVALID",
            "request",
            "usage.cost_usd: invalid",
        ),
        ("POST", CREATE, {"user": {"id": 5}}, 400, "FIELD_INVALID", "request", "5"),
        ("POST", CREATE, [], 400, "FIELD_INVALID", "request", "list"),
        ("PATCH", "/v1/accounts/example", {"name": "accounts/b"}, 400, "FIELD_INVALID", "request", "accounts/b"),
        ("POST", CREATE, {"displayName": "x" * 2_000_000}, 413, "REQUEST_TOO_LARGE", "", "too large"),
        ("GET", "/v1/nowhere", None, 404, "METHOD_NOT_FOUND", "", "GET /v1/nowhere"),
        ("GET", "/v1/accounts/example/nowhere?a=b", None, 404, "METHOD_NOT_FOUND", "", "/v1/accounts/example/nowhere"),
        ("POST", "/v1/accounts/example:nothing", {}, 404, "METHOD_NOT_FOUND", "", "/v1/accounts/example:nothing"),
        ("GET", "/nowhere", None, 404, "METHOD_NOT_FOUND", "", "/nowhere"),
        ("DELETE", "/v1/accounts/example", None, 405, "METHOD_NOT_ALLOWED", "", "DELETE"),
        ("PUT", "/v1/accounts/example?a=b", {}, 405, "METHOD_NOT_ALLOWED", "", "PUT"),
        ("OPTIONS", "/v1/accounts", None, 405, "METHOD_NOT_ALLOWED", "", "OPTIONS"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusal_by_the_gateway_is_a_status(
    rest: Rest, method: str, path: str, body: object, status: int, reason: str, field: str, text: str
) -> None:
    """The gateway's refusals are google.rpc.Status too, with a reason and the invalid field."""
    answer = rest.send(method, path, body)
    found = answer.json()
    assert answer.status == status, answer.body
    assert isinstance(found, dict)
    assert found["code"] == CODES[status]
    assert text in str(found["message"])
    assert reason_of(found) == (reason, {"field": field} if field else {}, [field] if field else [])


def native_paths() -> dict[str, set[str]]:
    """The HTTP methods of each native path in the contracts; `an-id` replaces each `*`."""
    methods: dict[str, set[str]] = {}
    services = (ledger_service_pb2.DESCRIPTOR, admin_service_pb2.DESCRIPTOR)
    for method in (each for file in services for service in file.services_by_name.values() for each in service.methods):
        rule = method.GetOptions().Extensions[http]
        for each in (rule, *rule.additional_bindings) if rule.WhichOneof("pattern") else ():
            verb = each.WhichOneof("pattern")
            path = re.sub(r"\{[^=]+=([^}]+)\}", r"\1", getattr(each, verb)).replace("*", "an-id")
            methods.setdefault(path, set()).update({"get": {"GET", "HEAD"}}.get(verb, {verb.upper()}))
    return methods


@pytest.mark.parametrize("path", sorted(native_paths()))
def test_unbound_method_gets_405(rest: Rest, path: str) -> None:
    """A path answers 405 to the methods that it isn't bound to, with the bound ones in `allow`."""
    allowed = native_paths()[path]
    for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"):
        for spelled in (path, f"{path}/", f"{path}?page_size=1"):
            answer = rest.send(method, spelled)
            if method in allowed:
                assert answer.status != 405, (method, spelled)
            else:
                assert answer.status == 405, (method, spelled)
                assert set((answer.header("allow") or "").split(", ")) == allowed


def test_broken_json_is_refused(rest: Rest) -> None:
    """A body of invalid JSON gets 400."""
    answer = send(
        rest.origin,
        "/v1/accounts?accountId=never",
        method="POST",
        headers={"authorization": f"Bearer {KEY}", "content-type": "application/json"},
        body=b'{"kind": "OTHER",',
    )
    assert answer.status == 400
    assert not list(problems_of_any_answer(answer))
    assert reason_of(answer.json()) == ("FIELD_INVALID", {"field": "request"}, ["request"])


@pytest.mark.parametrize(
    "target", ["/v1/accounts/%FF", "/v1/accounts?pageToken=%FF", "/v1/accounts/example/transactions?filter=%C3%28"]
)
def test_invalid_utf_8_is_refused(rest: Rest, target: str) -> None:
    """Invalid UTF-8 gets a 4xx answer without internal details."""
    answer = rest.send("GET", target)
    assert 400 <= answer.status < 500, answer.body
    assert b"DecodeError" not in answer.body


@pytest.mark.parametrize(
    ("key", "status", "reason"),
    [
        (None, 401, "CREDENTIAL_MISSING"),
        ("unknown.public", 401, "CREDENTIAL_INVALID"),
        ("demo-dreadnode.wrong", 401, "CREDENTIAL_INVALID"),
        (BOUND_KEY, 403, "ACCOUNT_NOT_PERMITTED"),
        ("demo-teable.public", 404, "ACCOUNT_NOT_FOUND"),
    ],
)
def test_credential_is_checked_before_the_account(gateway: Daybook, key: str | None, status: int, reason: str) -> None:
    """A caller gets 401 without a valid credential, 403 for an account out of scope, 404 for another tenant's."""
    answer = Rest(gateway.origin, key).send("GET", "/v1/accounts/example")
    assert answer.status == status
    assert reason_of(answer.json())[0] == reason


def test_grpc_reads_what_rest_wrote(rest: Rest, native: NativeCaller) -> None:
    """gRPC reads an account and a transaction that REST created."""
    account = rest.account(displayName="by REST")
    posted = rest.post(account, "GRANT", "3")
    read: Account = native.ledger.GetAccount(GetAccountRequest(name=f"accounts/{account}"), metadata=credential(KEY))
    listed = native.ledger.ListTransactions(
        ListTransactionsRequest(parent=f"accounts/{account}"), metadata=credential(KEY)
    )
    assert read.display_name == "by REST"
    assert [each.uid for each in listed.transactions] == [posted["uid"]]


def test_grpc_error_keeps_its_details(native: NativeCaller) -> None:
    """The details of a status reach a gRPC client through the gateway."""
    with pytest.raises(grpc.RpcError) as caught:
        native.post(KEY, "example", Transaction.CHARGE, "test", "1")
    error = caught.value
    assert isinstance(error, grpc.Call)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    trailers = dict(error.trailing_metadata())
    details = trailers["grpc-status-details-bin"]
    assert isinstance(details, bytes)
    status = Status.FromString(details)
    info, bad_request = ErrorInfo(), BadRequest()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(bad_request)
    assert (status.code, status.message) == (3, error.details())
    assert (info.reason, info.domain) == ("FIELD_INVALID", "daybook")
    assert [violation.field for violation in bad_request.field_violations] == ["transaction.amount"]


def test_unknown_grpc_method_has_no_json_error(channel: grpc.Channel) -> None:
    """A gRPC call of an unknown method gets UNIMPLEMENTED, without a JSON body."""
    call: Any = channel.unary_unary("/daybook.v1.Ledger/Nothing")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"", metadata=credential(KEY))
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "{" not in (caught.value.details() or "")


@pytest.mark.parametrize("service", ["", *SERVICES])
def test_health_check_needs_no_credential(channel: grpc.Channel, service: str) -> None:
    """The health check of each service answers SERVING without a credential."""
    health: Any = HealthStub(channel)
    answer = health.Check(HealthCheckRequest(service=service))
    assert answer.status == HealthCheckResponse.SERVING


def test_reflection_lists_every_service(channel: grpc.Channel) -> None:
    """Reflection lists the services without a credential."""
    requests = iter([ServerReflectionRequest(list_services="")])
    reflection: Any = ServerReflectionStub(channel)
    (answer,) = list(reflection.ServerReflectionInfo(requests))
    assert {service.name for service in answer.list_services_response.service} == LISTED_BY_REFLECTION


def buf_curl(*arguments: str) -> str:
    """Runs `buf curl` over gRPC."""
    result = subprocess.run(
        [str(BIN / "buf"), "curl", "--protocol", "grpc", "--http2-prior-knowledge", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_buf_curl_lists_services(gateway: Daybook) -> None:
    """buf curl lists the services by reflection."""
    assert set(buf_curl("--list-services", gateway.origin).split()) == LISTED_BY_REFLECTION


def test_buf_curl_calls_by_reflection(gateway: Daybook) -> None:
    """buf curl calls a method by reflection."""
    printed = buf_curl(
        *("-H", f"Authorization: Bearer {KEY}", "-d", '{"name": "accounts/example"}'),
        f"{gateway.origin}/daybook.v1.Ledger/GetAccount",
    )
    account = read_json(printed)
    assert isinstance(account, dict)
    assert (account["name"], account["displayName"]) == ("accounts/example", "Example")


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_buf_curl_lists_methods(gateway: Daybook, version: str) -> None:
    """buf curl lists the methods by both versions of reflection."""
    printed = buf_curl("--reflect-protocol", f"grpc-{version}", "--list-methods", gateway.origin)
    served = {
        f"{service.full_name}/{method.name}"
        for service in map(Default().FindServiceByName, SERVICES)
        for method in service.methods
    }
    assert served < set(printed.split())


def test_unknown_grpc_method_is_named(channel: grpc.Channel) -> None:
    """A gRPC call of an unknown method is refused with its name and a similar method's."""
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/daybook.v1.Ledger/GetAcount")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"", timeout=60)
    error = caught.value
    assert isinstance(error, grpc.Call)
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    status = Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    info = ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.metadata["method"]) == ("METHOD_UNKNOWN", "daybook.v1.Ledger/GetAcount")
    assert "GetAccount" in status.message


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_gateway_answers_health_checks(gateway: Daybook, path: str) -> None:
    """The gateway's health checks succeed without a credential."""
    answer = send(gateway.origin, path)
    assert (answer.status, answer.body) == (200, b"")


def test_gateway_without_a_server_is_healthy_but_not_ready(origin_in: OriginIn) -> None:
    """Without a server /readyz fails, so the gateway gets no calls; /healthz succeeds, so it isn't restarted."""
    origin = origin_in("away")
    wait_until(lambda: send(origin, "/readyz").status == 503, "/readyz fails")
    refusal = send(origin, "/readyz").json()
    assert isinstance(refusal, dict)
    assert (refusal["code"], refusal["message"]) == (14, "The service is unavailable")
    assert send(origin, "/healthz").status == 200


FORGED = {"x-error-body": '{"forged": true}', "x-error-status": "418", "x-envoy-original-path": "/users/x"}


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/v1/accounts/example", 200),
        ("/v1/accounts/nowhere", 404),
        ("/v1/accounts/example?colour=red", 400),
        ("/nowhere", 404),
        ("/api/v1/org/example/credits/transactions?limit=1", 200),
        ("/api/v1/org/nowhere/credits/transactions", 404),
        ("/api/v1/org/example/credits/transactions?limit=abc", 422),
    ],
)
def test_forged_headers_change_nothing(rest: Rest, target: str, status: int) -> None:
    """The gateway's internal headers have no effect in a request."""
    plain, forged = rest.send("GET", target), rest.send("GET", target, **FORGED)
    assert (forged.status, forged.body) == (plain.status, plain.body) == (status, plain.body)
    assert "forged" not in str(forged.headers)


def test_forged_headers_change_no_grpc_error(native: NativeCaller) -> None:
    """An internal header in a gRPC request does not appear in the answer."""
    with pytest.raises(grpc.RpcError) as caught:
        native.ledger.GetAccount(
            GetAccountRequest(name="accounts/nowhere"), metadata=(*credential(KEY), ("x-error-body", "forged"))
        )
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert "forged" not in str(caught.value.trailing_metadata()) + str(caught.value.initial_metadata())


def test_request_id_of_the_caller_is_kept(rest: Rest) -> None:
    """An answer has the request's x-request-id, or else a new one."""
    assert rest.send("GET", "/v1/accounts/example", **{"x-request-id": "mine"}).header("x-request-id") == "mine"
    given = {rest.send("GET", "/v1/accounts/example").header("x-request-id") for _ in range(3)}
    assert len(given) == 3


def test_grpc_headers_of_a_rest_call_are_ignored(rest: Rest) -> None:
    """A gRPC timeout or encoding in a REST request has no effect."""
    headers = {"grpc-timeout": "1n", "grpc-encoding": "gzip", "grpc-accept-encoding": "gzip"}
    assert rest.send("GET", "/v1/accounts/example", **headers).status == 200


@pytest.mark.parametrize(
    "target",
    [
        "/v1/accounts/example",
        "/v1/accounts/nowhere",
        "/api/v1/org/example/credits/transactions?limit=2",
        "/api/v1/org/nowhere/credits/transactions",
        "/nowhere",
    ],
)
def test_http_2_answer_equals_http_1(rest: Rest, gateway: Daybook, target: str) -> None:
    """An HTTP/2 answer has the status and body of HTTP/1.1, without gRPC's headers and trailers."""
    headers, trailers, body = get_over_http_2(gateway, target)
    plain = rest.send("GET", target)
    assert (headers[":status"], body) == (str(plain.status), plain.body)
    assert not [name for name in {**headers, **trailers} if name.startswith(("grpc-", "x-envoy-", "x-error-"))]


def test_query_cannot_change_the_resource(rest: Rest) -> None:
    """A query parameter with the name of a path variable is refused in every spelling."""
    mine, other = rest.account(displayName="mine"), rest.account(displayName="other")
    grant = {"kind": "GRANT", "category": "test", "amount": "1"}
    for method, target, body, field in (
        ("GET", f"/v1/accounts/{mine}?name=accounts/{other}", None, "name"),
        ("GET", f"/v1/accounts/{mine}?n%61me=accounts/{other}", None, "name"),
        ("GET", f"/v1/accounts/{mine}/transactions?parent=accounts/{other}", None, "parent"),
        ("POST", f"/v1/accounts/{mine}/transactions?parent=accounts/{other}", grant, "parent"),
        ("PATCH", f"/v1/accounts/{mine}?account.name=accounts/{other}", {"displayName": "changed"}, "account.name"),
    ):
        refused = rest.send(method, target, body)
        assert (refused.status, reason_of(refused.json())[2]) == (400, [field]), target
    for account in (mine, other):
        assert rest.call("GET", f"/v1/accounts/{account}")["displayName"] in ("mine", "other")
        assert rest.call("GET", f"/v1/accounts/{account}/transactions")["transactions"] == []


def get_over_http_2(gateway: Daybook, target: str) -> tuple[dict[str, str], dict[str, str], bytes]:
    """Headers, trailers and body of an answer. Uses h2, since httpx does not show trailers."""
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    connection.initiate_connection()
    request = {":method": "GET", ":scheme": "http", ":authority": "localhost", ":path": target}
    connection.send_headers(1, [*request.items(), ("authorization", f"Bearer {KEY}")], end_stream=True)
    headers: dict[str, str] = {}
    trailers: dict[str, str] = {}
    body = b""
    with socket.create_connection(("127.0.0.1", gateway.ports.gateway), 60) as raw:
        raw.sendall(connection.data_to_send())
        while True:
            received = raw.recv(65536)
            assert received, "the connection was closed before the answer was complete"
            for event in connection.receive_data(received):
                if isinstance(event, h2.events.ResponseReceived):
                    headers = {str(name): str(value) for name, value in event.headers or []}
                elif isinstance(event, h2.events.TrailersReceived):
                    trailers = {str(name): str(value) for name, value in event.headers or []}
                elif isinstance(event, h2.events.DataReceived):
                    body += event.data or b""
                elif isinstance(event, h2.events.StreamEnded):
                    return headers, trailers, body
            raw.sendall(connection.data_to_send())


def test_http_2_connection_is_reused(gateway: Daybook) -> None:
    """A client with prior knowledge of HTTP/2 makes several calls on one connection."""
    with httpx.Client(http1=False, http2=True, base_url=gateway.origin) as client:
        for limit in (1, 2, 3):
            query = urlencode({"limit": limit})
            answer = client.get(
                f"/api/v1/org/example/credits/transactions?{query}", headers={"authorization": f"Bearer {KEY}"}
            )
            assert (answer.http_version, answer.status_code, len(answer.json())) == ("HTTP/2", 200, limit)


@pytest.mark.parametrize(
    ("target", "empty"),
    [
        ("/v1/accounts/{account}/transactions", {"transactions": [], "nextPageToken": ""}),
        ("/v1/accounts/{account}/lots", {"lots": [], "nextPageToken": ""}),
    ],
)
def test_empty_list_is_printed(rest: Rest, target: str, empty: JsonObject) -> None:
    """An empty page has an empty array and an empty page token."""
    assert rest.call("GET", target.format(account=rest.account())) == empty


def test_empty_fields_are_printed(rest: Rest) -> None:
    """JSON has zeros and empty texts, and omits unset messages such as an owner or a subject."""
    account = rest.account()
    balance = rest.call("GET", f"/v1/accounts/{account}/balance")
    assert (balance["amount"], balance["sequence"]) == ("0", "0")
    grant = rest.post(account, "GRANT", "1")
    assert EMPTY_FIELDS.items() <= grant.items()
    assert not grant.keys() & {"owner", "creator", "metadata", "expireTime", "ttl", "booking", "order", "usage"}
    lots = rest.call("GET", f"/v1/accounts/{account}/lots")["lots"]
    assert isinstance(lots, list)
    (lot,) = lots
    assert isinstance(lot, dict)
    assert (lot["priority"], "expireTime" in lot) == (Decimal(0), False)
    assert "UNSPECIFIED" not in json.dumps([rest.call("GET", f"/v1/accounts/{account}"), balance, lot], default=str)
