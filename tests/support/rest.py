"""A caller of the native REST API."""

from __future__ import annotations

import json
import uuid

from tests.support.http_client import Answer, Json, problems_of_any_answer, send

KEY = "demo-dreadnode.public"
JsonObject = dict[str, Json]


class Rest:
    """A caller of the native REST API."""

    def __init__(self, origin: str, key: str | None = KEY) -> None:
        self.origin = origin
        self._credential = {} if key is None else {"authorization": f"Bearer {key}"}

    def send(self, method: str, target: str, body: object = None, **headers: str) -> Answer:
        """Sends a request; checks the rules for every REST response."""
        content = b"" if body is None else json.dumps(body).encode()
        more = {"content-type": "application/json"} if content else {}
        answer = send(self.origin, target, method=method, headers={**self._credential, **more, **headers}, body=content)
        assert not list(problems_of_any_answer(answer))
        return answer

    def call(self, method: str, target: str, body: object = None) -> JsonObject:
        """Sends a request, which must succeed. Returns the body."""
        answer = self.send(method, target, body)
        assert answer.status == 200, answer.body
        found = answer.json()
        assert isinstance(found, dict)
        return found

    def account(self, **fields: object) -> str:
        """Creates an account with a new id; returns the id."""
        account_id = f"rest-{uuid.uuid4()}"
        self.call("POST", f"/v1/accounts?accountId={account_id}", {"kind": "OTHER", **fields})
        return account_id

    def post(self, account_id: str, kind: str, amount: str, **fields: object) -> JsonObject:
        """Posts a transaction of category `test`."""
        transaction = {"kind": kind, "category": "test", "amount": amount, **fields}
        return self.call("POST", f"/v1/accounts/{account_id}/transactions", transaction)


def reason_of(body: Json) -> tuple[str, dict[str, Json], list[str]]:
    """Returns the reason and metadata of the ErrorInfo of a google.rpc.Status, and the fields of its BadRequest."""
    assert isinstance(body, dict)
    assert body.keys() == {"code", "message", "details"}
    details = body["details"]
    assert isinstance(details, list)
    by_type: dict[str, JsonObject] = {}
    for detail in details:
        assert isinstance(detail, dict)
        name = detail["@type"]
        assert isinstance(name, str)
        assert name not in by_type
        by_type[name.removeprefix("type.googleapis.com/google.rpc.")] = detail
    info = by_type.pop("ErrorInfo")
    assert info["domain"] == "daybook"
    bad_request = by_type.pop("BadRequest", {})
    assert not by_type
    violations = bad_request.get("fieldViolations", [])
    assert isinstance(violations, list)
    fields = []
    for violation in violations:
        assert isinstance(violation, dict)
        assert violation["description"]
        fields.append(str(violation["field"]))
    metadata = info.get("metadata", {})
    assert isinstance(metadata, dict)
    return str(info["reason"]), metadata, fields
