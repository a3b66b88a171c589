"""Requests generated from the OpenAPI documents get answers that conform to them.

Schemathesis generates valid and invalid requests, which the real gateway answers. Its strategies are used without its
plugin for pytest, so that the number of requests and the checks are explicit.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from daybook.v1.account_pb2 import Account, Company, User
from daybook.v1.ledger_service_pb2 import CreateAccountRequest, RefundTransactionRequest, TransferCreditsRequest
from daybook.v1.transaction_pb2 import Booking, EventTicket, Order, Transaction
from google.protobuf.duration_pb2 import Duration
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode, Response
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.generation.case import Case
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from server.demo import dreadnode, nebulablock, spacebring, teable
from server.demo.load import SECRET
from tests.support.callers import NativeCaller, credential
from tests.support.demo import make_network
from tests.support.examples import examples
from tests.support.openapi import VENDORS, contract, operation
from tests.support.processes import Daybook
from tests.support.waiting import SECONDS_MAX, wait_until

ANY_ANSWER = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = settings(
    max_examples=examples(25),
    deadline=None,
    database=None,
    derandomize=True,
    # Schemathesis finds invalid requests by trial and error.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@dataclass(frozen=True)
class Api:
    """A documented operation, with the parameters of every request to the demo."""

    vendor: str
    key: str
    path: str = ""
    """Empty for the first path of the document."""
    path_parameters: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    populated: dict[str, str | int] = field(default_factory=dict)
    """A query for which the demo has rows; half of the generated queries extend it."""
    cursor: str | None = None
    """The parameter for the next page; a generated value is refused."""
    next_cursor: str = ""
    """The field of a page with the next cursor."""
    dependent: str = ""
    """Another parameter whose valid values depend on the data."""

    @property
    def operation(self) -> APIOperation[Any, Any, Any, Any]:
        """The operation of the document."""
        return operation(self.vendor, self.path)

    def cases(self, mode: GenerationMode) -> st.SearchStrategy[Case[Any]]:
        """Requests whose query the contract allows or forbids; half of them extend `populated`."""
        unrestricted, extended = (
            self.operation.as_strategy(mode, path_parameters=self.path_parameters, headers=self.headers, query=query)
            for query in (None, self.populated)
        )
        return st.one_of(unrestricted, extended)

    def boundary_cases(self, mode: GenerationMode) -> Iterator[Case[Any]]:
        """Requests at the contract's bounds, or just past them; the same in every run."""
        schema = contract(self.vendor)
        for case in schema.iter_coverage_cases(
            self.operation,
            generation_modes=[mode],
            generation_config=schema.config.generation_for(operation=self.operation),
        ):
            case.path_parameters.update(self.path_parameters)
            case.headers.update(self.headers)
            # GET is the only documented method.
            if case.method == "GET":
                yield case

    def case(self) -> Case[Any]:
        """A valid request for rows of the demo."""
        return self.operation.Case(
            path_parameters=self.path_parameters, headers=self.headers, query=dict(self.populated)
        )

    def send(self, gateway: Daybook, case: Case[Any]) -> Response:
        """Sends a request with a valid credential; fails unless the answer conforms to the contract."""
        answer = case.call(
            base_url=gateway.origin,
            headers={"authorization": f"Bearer {self.key}"},
            timeout=SECONDS_MAX,
        )
        case.validate_response(answer, checks=ANY_ANSWER)
        return answer


_TEABLE = Api(
    "teable",
    f"{teable.KEY}.{SECRET}",
    path_parameters={"spaceId": teable.SPACE},
    populated={"month": teable.MONTH},
    cursor="cursor",
    next_cursor="nextCursor",
)
_NEBULABLOCK = Api("nebulablock", f"{nebulablock.BUSY_KEY}.{SECRET}", populated={"offset": 1})
_DREADNODE = Api("dreadnode", f"{dreadnode.KEY}.{SECRET}", path_parameters={"org": dreadnode.ORGANIZATION})
APIS = {
    "teable": _TEABLE,
    "teable-without-api": replace(_TEABLE, path="/space/{spaceId}/billing/credit-history"),
    "nebulablock": _NEBULABLOCK,
    "nebulablock-api": replace(_NEBULABLOCK, path="/api/v1/users/credits/history"),
    "spacebring": Api(
        "spacebring",
        f"{spacebring.KEY}.{SECRET}",
        headers={"spacebring-network-id": spacebring.NETWORK},
        populated={"createDate[gte]": "2024-08-01T00:00:00+02:00", "locationRef": spacebring.HARBOUR},
        cursor="nextPageToken",
        next_cursor="nextPageToken",
    ),
    "dreadnode": _DREADNODE,
    "dreadnode-without-v1": replace(_DREADNODE, path="/api/org/{org}/credits/transactions"),
    "dreadnode-balance": replace(_DREADNODE, path="/api/v1/org/{org}/credits"),
    "dreadnode-balance-without-v1": replace(_DREADNODE, path="/api/org/{org}/credits"),
    "paged": Api(
        "paged",
        f"{dreadnode.KEY}.{SECRET}",
        path_parameters={"account": dreadnode.ORGANIZATION},
        populated={"page_size": 100},
        dependent="page",
    ),
}
LISTS = [name for name in APIS if "balance" not in name]
"""The operations with parameters in the query."""


@pytest.mark.parametrize("vendor", VENDORS)
def test_contract_is_valid_openapi(vendor: str) -> None:
    """A vendor's contract is a valid OpenAPI document."""
    contract(vendor).validate()


def test_every_vendor_has_an_api() -> None:
    """APIS has every vendor with a contract."""
    assert {api.vendor for api in APIS.values()} == set(VENDORS)


@pytest.mark.parametrize("name", APIS)
def test_allowed_request_succeeds(gateway: Daybook, name: str) -> None:
    """A request that the contract allows, and the request for its next page, get 200."""
    api = APIS[name]

    @EXAMPLES
    @given(case=api.cases(GenerationMode.POSITIVE))
    def check(case: Case[Any]) -> None:
        for parameter in (api.cursor or "", api.dependent):
            case.query.pop(parameter, None)
        first = api.send(gateway, case)
        assert first.status_code == 200, first.text
        if api.cursor is not None and first.json().get(api.next_cursor):
            case.query[api.cursor] = first.json()[api.next_cursor]
            second = api.send(gateway, case)
            assert second.status_code == 200, second.text

    check()


@pytest.mark.parametrize("name", LISTS)
def test_forbidden_request_gets_a_documented_error(gateway: Daybook, name: str) -> None:
    """A request that the contract forbids gets a documented error."""
    api = APIS[name]

    @EXAMPLES
    @given(case=api.cases(GenerationMode.NEGATIVE))
    def check(case: Case[Any]) -> None:
        case.validate_response(api.send(gateway, case), checks=[negative_data_rejection])

    check()


@pytest.mark.parametrize("name", LISTS)
def test_boundary_values_succeed(gateway: Daybook, name: str) -> None:
    """Each parameter at its bounds and with each of its values gets 200, alone and with others."""
    api = APIS[name]
    cases = list(api.boundary_cases(GenerationMode.POSITIVE))
    assert len(cases) >= 8
    for case in cases:
        for parameter in (api.cursor or "", api.dependent):
            case.query.pop(parameter, None)
        answer = api.send(gateway, case)
        assert answer.status_code == 200, f"{case}: {answer.text}"


@pytest.mark.parametrize("name", LISTS)
def test_values_past_the_bounds_are_refused(gateway: Daybook, name: str) -> None:
    """A parameter that is out of range, of another type, empty or missing is refused; an unknown one is ignored."""
    api = APIS[name]
    cases = list(api.boundary_cases(GenerationMode.NEGATIVE))
    assert len(cases) >= 20
    for case in cases:
        answer = api.send(gateway, case)
        is_only_unknown = "x-schemathesis-unknown-property" in case.query
        assert (answer.status_code == 200) == is_only_unknown, f"{case}: {answer.text}"


@pytest.mark.parametrize("name", [name for name, api in APIS.items() if api.cursor is not None])
def test_unknown_cursor_is_refused(gateway: Daybook, name: str) -> None:
    """A cursor that no page returned is refused, although the contract allows any text."""
    api = APIS[name]

    @EXAMPLES
    @given(case=api.cases(GenerationMode.POSITIVE), cursor=st.text(st.characters(codec="utf-8"), min_size=1))
    def check(case: Case[Any], cursor: str) -> None:
        assert api.cursor is not None
        case.query[api.cursor] = cursor
        assert api.send(gateway, case).status_code == 400

    check()


@pytest.mark.parametrize("name", APIS)
def test_pages_of_the_demo_conform(gateway: Daybook, name: str) -> None:
    """The longest page conforms to the contract or, with a cursor, every page to the last."""
    api = APIS[name]
    case = api.case()
    if api.cursor is None:
        case.query["limit"] = 100
    body = api.send(gateway, case).json()
    pages = 1
    while api.cursor is not None and (cursor := body.get(api.next_cursor)):
        case.query[api.cursor] = cursor
        body = api.send(gateway, case).json()
        pages += 1
    assert pages > 1 or api.cursor is None


def test_spacebring_types_conform(gateway: Daybook, native: NativeCaller) -> None:
    """Rows with all eleven types, all statuses and all fields conform to Spacebring's contract."""
    network = make_network(gateway)
    key = network.key
    api = replace(APIS["spacebring"], key=key, headers={"spacebring-network-id": network.uid}, populated={})
    company, other = str(uuid.uuid4()), str(uuid.uuid4())
    for account_id in (company, other):
        account = Account(kind=Account.COMPANY, company=Company(title="Studio", location=str(uuid.uuid4())))
        native.ledger.CreateAccount(
            CreateAccountRequest(account_id=account_id, account=account), metadata=credential(key)
        )
    person = User(id=str(uuid.uuid4()), name="Ада", surname="Лавлейс", membership=str(uuid.uuid4()))
    labels = {"location": str(uuid.uuid4()), "membership": str(uuid.uuid4()), "company": company}

    def post(kind: Transaction.Kind.ValueType, category: str, amount: str, **fields: Any) -> Transaction:
        return native.post(key, company, kind, category, amount, labels=labels, creator=person, owner=person, **fields)

    def transfer(amount: str) -> None:
        request = TransferCreditsRequest(
            name=f"accounts/{company}", destination=f"accounts/{other}", amount=amount, labels=labels, creator=person
        )
        native.ledger.TransferCredits(request, metadata=credential(key))

    post(Transaction.GRANT, "subscription_renewal", "20", ttl=Duration(seconds=3600))
    post(Transaction.CHARGE, "admin_charge", "-1")
    transfer("19")
    post(Transaction.GRANT, "credit_package", "50", description="50 credits")
    post(Transaction.CHARGE, "admin_charge", "-1")
    transfer("1")
    booking = post(
        Transaction.CHARGE,
        "booking",
        "-2.000001",
        booking=Booking(id=str(uuid.uuid4()), resource=Booking.Resource(id=str(uuid.uuid4()), title="Room")),
    )
    native.ledger.RefundTransaction(RefundTransactionRequest(name=booking.name, amount="0.5"), metadata=credential(key))
    post(Transaction.CHARGE, "order", "-3", order=Order(id=str(uuid.uuid4())), state=Transaction.FAILED)
    post(Transaction.CHARGE, "event_ticket", "-3", event_ticket=EventTicket(id=str(uuid.uuid4())))
    post(Transaction.CHARGE, "order", "-3", order=Order(id=str(uuid.uuid4())), state=Transaction.CANCELED)
    post(Transaction.GRANT, "credit_package", "1", ttl=Duration(seconds=1))

    def rows() -> list[dict[str, Any]]:
        # A posting first posts due expirations.
        post(Transaction.GRANT, "not_listed", "1")
        answer = api.send(gateway, api.case())
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert "nextPageToken" not in body
        listed: list[dict[str, Any]] = body["transactions"]
        return listed

    wait_until(lambda: rows()[0]["type"] == "subscriptionExpiration", "the credits of one second expire")
    schema = contract("spacebring").raw_schema["components"]["schemas"]["CreditsTransaction"]["properties"]
    listed = rows()
    assert {row["type"] for row in listed} == set(schema["type"]["enum"])
    assert {row["status"] for row in listed} == set(schema["status"]["enum"])
    assert {field for row in listed for field in row} == set(schema)


BAD_BODIES: dict[str, tuple[str, Callable[[Any], object]]] = {
    "teable: unknown field in a row": ("teable", lambda body: body["data"][0].update(unit="credit")),
    "teable: unknown field in a user": ("teable", lambda body: user_of(body).update(email="a@example.com")),
    "teable: missing avatar": ("teable", lambda body: user_of(body).pop("avatar")),
    "teable: missing displayName": ("teable", lambda body: body["data"][0].pop("displayName")),
    "teable: amount as text": ("teable", lambda body: body["data"][0].update(amount="1")),
    "teable: invalid day": ("teable", lambda body: body["data"][0].update(createdTime="2024-10-32T06:54:58.000Z")),
    "teable: no milliseconds": ("teable", lambda body: body["data"][0].update(createdTime="2024-10-10T06:54:58Z")),
    "teable: unknown source": ("teable", lambda body: body["data"][0].update(sourceType="ai")),
    "teable: missing cursor": ("teable", lambda body: body.pop("nextCursor")),
    "nebulablock: user_id as text": ("nebulablock", lambda body: hour_of(body).update(user_id="271")),
    "nebulablock: undocumented id": ("nebulablock", lambda body: hour_of(body).update(id=1)),
    "nebulablock: missing total": ("nebulablock", lambda body: hour_of(body).pop("total")),
    "nebulablock: time in ISO 8601": (
        "nebulablock",
        lambda body: hour_of(body).update(create_time="2024-10-10T06:54:58Z"),
    ),
    "nebulablock: another message": ("nebulablock", lambda body: body.update(message="OK")),
    "nebulablock: failed": ("nebulablock", lambda body: body.update(status="failed")),
    "spacebring: id is not a UUID": ("spacebring", lambda body: body["transactions"][0].update(id="1")),
    "spacebring: reference is not a UUID": (
        "spacebring",
        lambda body: body["transactions"][0].update(locationRef="here"),
    ),
    "spacebring: invalid hour": (
        "spacebring",
        lambda body: body["transactions"][0].update(createDate="2024-10-10T25:54:58.000000Z"),
    ),
    "spacebring: time without a zone": (
        "spacebring",
        lambda body: body["transactions"][0].update(createDate="2024-10-10T06:54:58"),
    ),
    "spacebring: time without a fraction": (
        "spacebring",
        lambda body: body["transactions"][0].update(createDate="2024-10-10T06:54:58Z"),
    ),
    "spacebring: unknown type": ("spacebring", lambda body: body["transactions"][0].update(type="gift")),
    "spacebring: null token": ("spacebring", lambda body: body.update(nextPageToken=None)),
    "spacebring: empty text": ("spacebring", lambda body: body["transactions"][0].update(description="")),
    "spacebring: signed amount": ("spacebring", lambda body: body["transactions"][0].update(amount=-1)),
    "dreadnode: id is not a UUID": ("dreadnode", lambda body: body[0].update(id="1")),
    "dreadnode: fraction of a credit": ("dreadnode", lambda body: body[0].update(amount=0.5)),
    "dreadnode: date without time": ("dreadnode", lambda body: body[0].update(created_at="2024-10-10")),
    "dreadnode: unknown type": ("dreadnode", lambda body: body[0].update(transaction_type="gift")),
    "dreadnode: unknown field": ("dreadnode", lambda body: body[0].update(currency="USD")),
}


def user_of(page: dict[str, Any]) -> dict[str, Any]:
    """The first user on a page of Teable."""
    return next(record["user"] for record in page["data"] if record["user"])


def hour_of(history: dict[str, Any]) -> dict[str, Any]:
    """The first hour on a page of Nebula Block."""
    hour: dict[str, Any] = history["data"]["credit_history"][0]
    return hour


@pytest.mark.parametrize("name", BAD_BODIES)
def test_contract_rejects_invalid_pages(gateway: Daybook, name: str) -> None:
    """A contract rejects a page with one change that makes it invalid."""
    vendor, spoil = BAD_BODIES[name]
    case = APIS[vendor].case()
    answer = APIS[vendor].send(gateway, case)
    body = answer.json()
    spoil(body)
    with pytest.raises(FailureGroup, match="schema"):
        case.validate_response(answer_of(answer, 200, body), checks=ANY_ANSWER)


@pytest.mark.parametrize(
    ("vendor", "status", "body"),
    [
        ("teable", 400, {"message": "m", "status": 400, "code": "unauthorized"}),
        ("teable", 400, {"message": "m", "status": "400", "code": "validation_error"}),
        ("teable", 418, {"message": "m", "status": 418, "code": "validation_error"}),
        ("teable", 500, {"message": "m", "status": 500, "code": "internal_server_error"}),
        ("nebulablock", 400, {"message": "m", "status": "failed"}),
        ("nebulablock", 400, {"data": {}, "message": "m", "status": "failed"}),
        ("spacebring", 400, {"message": "m", "type": "unauthorized"}),
        ("spacebring", 400, {"message": "", "type": "invalidParams"}),
        ("dreadnode", 422, {"code": 422, "detail": "d", "type": "validation_error"}),
        ("dreadnode", 422, {"code": 422, "detail": "d", "type": "validation_error", "errors": []}),
        ("dreadnode", 404, {"code": 422, "detail": "d", "type": "not_found_error"}),
        ("dreadnode", 503, {"code": 503, "detail": "d", "type": "bad_gateway_error"}),
    ],
)
def test_contract_rejects_invalid_errors(gateway: Daybook, vendor: str, status: int, body: Any) -> None:
    """A contract rejects an undocumented error, and one of the server."""
    case = APIS[vendor].case()
    answer = APIS[vendor].send(gateway, case)
    with pytest.raises(FailureGroup):
        case.validate_response(answer_of(answer, status, body), checks=ANY_ANSWER)


def answer_of(like: Response, status: int, body: Any) -> Response:
    """An answer to the same request with another status and body."""
    return Response(
        status,
        {"content-type": ["application/json"]},
        json.dumps(body).encode(),
        like.request,
        like.elapsed,
        verify=True,
    )
