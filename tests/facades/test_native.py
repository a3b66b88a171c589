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
from server.transport.calls import OPEN_SERVICES
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
"""A person of whom nothing is known, as JSON shows them."""
NOTHING_MORE = {
    "description": "",
    "labels": {},
    "receiptUri": "",
    "requestId": "",
    "refundOf": "",
    "transferPeer": "",
    "allocations": [],
    "priority": 0,
}
"""What JSON shows of a transaction that lacks it."""


def test_account_is_created_and_read(rest: Rest) -> None:
    """A new account has what it was given, and can be read and listed as it was answered."""
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
    assert isinstance(number, str), "64-bit integers are texts in JSON"
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


def test_repeated_request_id_repeats_the_answer(rest: Rest) -> None:
    """The same request again gets the same account; another one under the same id is refused."""
    account_id = f"rest-{uuid.uuid4()}"
    target = f"/v1/accounts?accountId={account_id}&requestId=once"
    first = rest.call("POST", target, {"kind": "OTHER"})
    assert rest.call("POST", target, {"kind": "OTHER"}) == first
    refused = rest.send("POST", target, {"kind": "SPACE"})
    assert refused.status == 409
    assert reason_of(refused.json())[0] == "REQUEST_ID_REUSED"


def test_transaction_is_posted_and_read(rest: Rest) -> None:
    """A transaction is answered, read, listed and counted into the balance alike."""
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
                **NOTHING_MORE,
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


def test_list_is_read_by_pages_filter_and_order(rest: Rest) -> None:
    """Parameters in either spelling, a filter, and an order with a plus for its space."""
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
def test_update_writes_what_the_mask_names(rest: Rest, spelled: str) -> None:
    """A field outside of the mask stays; one inside that is left out is cleared."""
    account = rest.account(displayName="before", creditLimit="5")
    changed = rest.call("PATCH", f"/v1/accounts/{account}?{spelled}", {"displayName": "after", "creditLimit": "9"})
    assert (changed["displayName"], changed["creditLimit"]) == ("after", "5")
    cleared = rest.call("PATCH", f"/v1/accounts/{account}?{spelled}", {})
    assert (cleared["displayName"], cleared["creditLimit"]) == ("", "5")
    assert rest.call("GET", f"/v1/accounts/{account}") == cleared


def test_update_without_mask_writes_what_is_given(rest: Rest) -> None:
    """Without a mask the fields that are set are written, and no others."""
    account = rest.account(displayName="before", creditLimit="5", user={"id": "u1"})
    changed = rest.call("PATCH", f"/v1/accounts/{account}", {"creditLimit": "9"})
    assert (changed["displayName"], changed["creditLimit"], changed["user"]) == ("before", "9", USER)


def test_update_with_stale_etag_is_refused(rest: Rest) -> None:
    """Of two who read the same account, the second to write is told."""
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
        # A double rounds it, so that another number would come back.
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
def test_refusal_is_a_status_with_its_reason(
    rest: Rest, method: str, path: str, body: object, status: int, reason: str, fields: list[str]
) -> None:
    """Each refusal is a google.rpc.Status with one ErrorInfo, and names the field that is at fault."""
    answer = rest.send(method, path, body)
    assert answer.status == status, answer.body
    found_reason, metadata, found_fields = reason_of(answer.json())
    assert (found_reason, found_fields) == (reason, fields)
    assert [metadata["field"]] == fields if fields else "field" not in metadata


LIST = "/v1/accounts/example/transactions"
CREATE = "/v1/accounts?accountId=never"
CODES = {400: 3, 404: 5, 405: 12, 413: 8}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "reason", "field", "word"),
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
        ("GET", "/", None, 404, "METHOD_NOT_FOUND", "", "GET /"),
        ("DELETE", "/v1/accounts/example", None, 405, "METHOD_NOT_ALLOWED", "", "DELETE"),
        ("PUT", "/v1/accounts/example?a=b", {}, 405, "METHOD_NOT_ALLOWED", "", "PUT"),
        ("OPTIONS", "/v1/accounts", None, 405, "METHOD_NOT_ALLOWED", "", "OPTIONS"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_the_gateway_refuses_is_a_status_too(
    rest: Rest, method: str, path: str, body: object, status: int, reason: str, field: str, word: str
) -> None:
    """What doesn't reach the server is refused in the same form, with the reason and the field that is at fault."""
    answer = rest.send(method, path, body)
    found = answer.json()
    assert answer.status == status, answer.body
    assert isinstance(found, dict)
    assert found["code"] == CODES[status]
    assert word in str(found["message"])
    assert reason_of(found) == (reason, {"field": field} if field else {}, [field] if field else [])


def native_paths() -> dict[str, set[str]]:
    """The HTTP methods of each path of the native API, out of the contracts; an id for each `*`."""
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
def test_path_is_refused_to_other_methods_only(rest: Rest, path: str) -> None:
    """A path of the contracts answers 405 to what it isn't bound to, and names what it is."""
    allowed = native_paths()[path]
    for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"):
        for spelled in (path, f"{path}/", f"{path}?page_size=1"):
            answer = rest.send(method, spelled)
            if method in allowed:
                assert answer.status != 405, (method, spelled)
            else:
                assert answer.status == 405, (method, spelled)
                assert set((answer.header("allow") or "").split(", ")) == allowed


def test_json_that_is_broken_is_refused(rest: Rest) -> None:
    """A body that is no JSON is the caller's mistake."""
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
def test_text_that_is_no_utf_8(rest: Rest, target: str) -> None:
    """Bytes that are no text are the caller's mistake, and the answer tells nothing of how we parse."""
    answer = rest.send("GET", target)
    assert 400 <= answer.status < 500, answer.body
    assert b"DecodeError" not in answer.body


@pytest.mark.parametrize(
    ("key", "status", "reason"),
    [
        (None, 401, "CREDENTIAL_MISSING"),
        ("nobody.public", 401, "CREDENTIAL_INVALID"),
        ("demo-dreadnode.wrong", 401, "CREDENTIAL_INVALID"),
        (BOUND_KEY, 403, "ACCOUNT_NOT_PERMITTED"),
        ("demo-teable.public", 404, "ACCOUNT_NOT_FOUND"),
    ],
)
def test_credential(gateway: Daybook, key: str | None, status: int, reason: str) -> None:
    """Who may not see an account is told why, in this order, and never whether another tenant has it."""
    answer = Rest(gateway.origin, key).send("GET", "/v1/accounts/example")
    assert answer.status == status
    assert reason_of(answer.json())[0] == reason


def test_grpc_reads_what_rest_wrote(rest: Rest, native: NativeCaller) -> None:
    """Both doors lead to the same ledger."""
    account = rest.account(displayName="by REST")
    posted = rest.post(account, "GRANT", "3")
    read: Account = native.ledger.GetAccount(GetAccountRequest(name=f"accounts/{account}"), metadata=credential(KEY))
    listed = native.ledger.ListTransactions(
        ListTransactionsRequest(parent=f"accounts/{account}"), metadata=credential(KEY)
    )
    assert read.display_name == "by REST"
    assert [each.uid for each in listed.transactions] == [posted["uid"]]


def test_grpc_error_keeps_its_details(native: NativeCaller) -> None:
    """A gRPC client gets the status with its details through the gateway."""
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


def test_grpc_call_to_a_facade_has_no_vendors_body(channel: grpc.Channel) -> None:
    """A native caller of a method that isn't there gets gRPC's own status, not JSON."""
    call: Any = channel.unary_unary("/daybook.v1.Ledger/Nothing")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"", metadata=credential(KEY))
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "{" not in (caught.value.details() or "")


@pytest.mark.parametrize("service", ["", *SERVICES])
def test_health_of_each_service(channel: grpc.Channel, service: str) -> None:
    """Each service says that it serves, to anybody."""
    health: Any = HealthStub(channel)
    answer = health.Check(HealthCheckRequest(service=service))
    assert answer.status == HealthCheckResponse.SERVING


def test_reflection_lists_every_service(channel: grpc.Channel) -> None:
    """Reflection names what can be called, to anybody."""
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


def test_buf_curl_lists_every_service(gateway: Daybook) -> None:
    """An engineer finds the services without having the contracts at hand."""
    assert set(buf_curl("--list-services", gateway.origin).split()) == LISTED_BY_REFLECTION


def test_buf_curl_calls_by_reflection(gateway: Daybook) -> None:
    """An engineer calls a method without having the contracts at hand."""
    printed = buf_curl(
        *("-H", f"Authorization: Bearer {KEY}", "-d", '{"name": "accounts/example"}'),
        f"{gateway.origin}/daybook.v1.Ledger/GetAccount",
    )
    account = read_json(printed)
    assert isinstance(account, dict)
    assert (account["name"], account["displayName"]) == ("accounts/example", "Example")


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_buf_curl_finds_every_method(gateway: Daybook, version: str) -> None:
    """An engineer finds the methods too, in both versions of reflection."""
    printed = buf_curl("--reflect-protocol", f"grpc-{version}", "--list-methods", gateway.origin)
    served = {
        f"{service.full_name}/{method.name}"
        for service in map(Default().FindServiceByName, SERVICES)
        for method in service.methods
    }
    assert served < set(printed.split())


def test_unknown_method_of_grpc_is_told(channel: grpc.Channel) -> None:
    """The gateway leaves the refusal to the server, which has words for it."""
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
def test_gateway_tells_its_health(gateway: Daybook, path: str) -> None:
    """The gateway says to anybody that it is up, and that there is a server."""
    answer = send(gateway.origin, path)
    assert (answer.status, answer.body) == (200, b"")


def test_gateway_without_a_server_is_healthy_and_not_ready(origin_in: OriginIn) -> None:
    """Nobody should start the gateway again because of a server, and nobody should send it calls."""
    origin = origin_in("away")
    wait_until(lambda: send(origin, "/readyz").status == 503, "the server's absence is noticed")
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
    """Headers that mean something between our filters mean nothing when a caller sends them."""
    plain, forged = rest.send("GET", target), rest.send("GET", target, **FORGED)
    assert (forged.status, forged.body) == (plain.status, plain.body) == (status, plain.body)
    assert "forged" not in str(forged.headers)


def test_forged_headers_change_no_grpc_error(native: NativeCaller) -> None:
    """Nor do they come back to a gRPC client."""
    with pytest.raises(grpc.RpcError) as caught:
        native.ledger.GetAccount(
            GetAccountRequest(name="accounts/nowhere"), metadata=(*credential(KEY), ("x-error-body", "forged"))
        )
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert "forged" not in str(caught.value.trailing_metadata()) + str(caught.value.initial_metadata())


def test_request_id_of_the_caller_is_kept(rest: Rest) -> None:
    """A caller's x-request-id comes back unchanged; others get one each."""
    assert rest.send("GET", "/v1/accounts/example", **{"x-request-id": "mine"}).header("x-request-id") == "mine"
    given = {rest.send("GET", "/v1/accounts/example").header("x-request-id") for _ in range(3)}
    assert len(given) == 3


def test_grpc_headers_of_a_rest_caller_change_nothing(rest: Rest) -> None:
    """A timeout or an encoding meant for gRPC doesn't reach the server with a REST call."""
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
def test_http_2_answers_are_the_same(rest: Rest, gateway: Daybook, target: str) -> None:
    """Over HTTP/2 the same comes back, without gRPC's headers and trailers."""
    headers, trailers, body = get_over_http_2(gateway, target)
    plain = rest.send("GET", target)
    assert (headers[":status"], body) == (str(plain.status), plain.body)
    assert not [name for name in {**headers, **trailers} if name.startswith(("grpc-", "x-envoy-", "x-error-"))]


def test_query_names_no_other_resource(rest: Rest) -> None:
    """The resource is the one of the path: a parameter of the same name is refused, in whatever spelling."""
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
    """Headers, trailers and body of an answer; no client at hand shows trailers."""
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


def test_http_2_client(gateway: Daybook) -> None:
    """A client of HTTP/2 that knows it beforehand is served many calls on one connection."""
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
def test_empty_list_has_its_key(rest: Rest, target: str, empty: JsonObject) -> None:
    """A reader of JSON finds the list, also where nothing is in it, and that there are no more pages."""
    assert rest.call("GET", target.format(account=rest.account())) == empty


def test_answer_has_keys_for_what_is_empty(rest: Rest) -> None:
    """Zeros and empty texts have their keys; what is neither set nor plain (an owner, a subject) has none."""
    account = rest.account()
    balance = rest.call("GET", f"/v1/accounts/{account}/balance")
    assert (balance["amount"], balance["sequence"]) == ("0", "0")
    grant = rest.post(account, "GRANT", "1")
    assert NOTHING_MORE.items() <= grant.items()
    assert not grant.keys() & {"owner", "creator", "metadata", "expireTime", "ttl", "booking", "order", "usage"}
    lots = rest.call("GET", f"/v1/accounts/{account}/lots")["lots"]
    assert isinstance(lots, list)
    (lot,) = lots
    assert isinstance(lot, dict)
    assert (lot["priority"], "expireTime" in lot) == (Decimal(0), False)
    assert "UNSPECIFIED" not in json.dumps([rest.call("GET", f"/v1/accounts/{account}"), balance, lot], default=str)
