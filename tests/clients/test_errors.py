"""Each reason and each status of an error has its own exception."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import grpc
import pytest
from daybook.v1.error_reason_pb2 import ErrorReason
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from daybook_client import Daybook, DaybookError, Retry, Violation
from daybook_client.errors import BY_REASON, BY_STATUS, AccountNotFound, FieldInvalid, Unavailable
from protos.generate import PROTOS

CONTRACT = (PROTOS / "daybook/v1/error_reason.proto").read_text()
STATUSES = {
    name: re.findall(r"Status\s+(?://\s+)?([A-Z_]+)", comment)[-1]
    for comment, name in re.findall(r"((?:  //.*\n)+)  ([A-Z_]+) = [1-9]", CONTRACT)
}
"""The gRPC status of each reason, from the contract."""


def packed(*details: Message) -> list[AnyMessage]:
    """Returns messages as details of a status."""
    found = [AnyMessage() for _ in details]
    for each, detail in zip(found, details, strict=True):
        each.Pack(detail)
    return found


class Refusing(grpc.GenericRpcHandler):
    """Ends each call with a status: the one of the test, with details if there are any."""

    def __init__(self) -> None:
        self.status = Status()
        self.calls = 0

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The handler of every method."""
        del handler_call_details

        def refuse(_request: bytes, context: grpc.ServicerContext) -> bytes:
            self.calls += 1
            code = next(each for each in grpc.StatusCode if each.value[0] == self.status.code)
            details = [("grpc-status-details-bin", self.status.SerializeToString())] if self.status.details else []
            context.set_trailing_metadata(details)  # type: ignore[arg-type]  # its stub requires a tuple
            context.abort(code, self.status.message)

        return grpc.unary_unary_rpc_method_handler(refuse)


@pytest.fixture(scope="module")
def refusing() -> Iterator[tuple[Refusing, str]]:
    """A gRPC server that refuses every call, and its address."""
    handler = Refusing()
    server = grpc.server(ThreadPoolExecutor(1), handlers=[handler])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield handler, f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_every_reason_has_an_exception() -> None:
    """There is one exception for each reason of the contract, and no other."""
    assert BY_REASON.keys() == set(ErrorReason.keys()[1:]) == STATUSES.keys()


@pytest.mark.parametrize("reason", ErrorReason.keys()[1:])
def test_reason_raises_its_exception(refusing: tuple[Refusing, str], opened: Any, reason: str) -> None:
    """An error with a reason raises the reason's class, below the class of its status, with the error's facts."""
    handler, address = refusing
    code = grpc.StatusCode[STATUSES[reason]]
    field = BadRequest.FieldViolation(field="transaction.amount", description="must not be 0")
    retry = RetryInfo()
    retry.retry_delay.FromMilliseconds(1500)
    info = ErrorInfo(reason=reason, domain="daybook", metadata={"account": "accounts/acme"})
    handler.status = Status(
        code=code.value[0], message="no", details=packed(info, BadRequest(field_violations=[field]), retry)
    )
    client = opened(address, key="x", retry=Retry(attempts_max=1))
    with pytest.raises(DaybookError) as raised:
        client.get_account("accounts/acme")
    error = raised.value
    assert type(error) is BY_REASON[reason]
    assert isinstance(error, BY_STATUS[code])
    assert (str(error), error.reason, error.code) == ("no", reason, code)
    assert error.metadata == {"account": "accounts/acme"}
    assert error.violations == (Violation("transaction.amount", "must not be 0"),)
    assert error.retry_delay == timedelta(seconds=1.5)


@pytest.mark.parametrize("code", [each for each in grpc.StatusCode if each is not grpc.StatusCode.OK])
def test_status_without_details_raises_its_exception(refusing: tuple[Refusing, str], code: grpc.StatusCode) -> None:
    """An error of a network or a gateway, without a reason, raises the class of its status, or DaybookError."""
    handler, address = refusing
    handler.status = Status(code=code.value[0], message="no")
    with Daybook(address, key="x", retry=Retry(attempts_max=1)) as client, pytest.raises(DaybookError) as raised:
        client.get_account("accounts/acme")
    assert type(raised.value) is BY_STATUS.get(code, DaybookError)
    assert (raised.value.code, raised.value.reason) == (code, "")


def test_newer_reason_raises_the_exception_of_its_status(refusing: tuple[Refusing, str]) -> None:
    """A reason that the client doesn't know raises the class of its status, and is readable."""
    handler, address = refusing
    details = packed(ErrorInfo(reason="ON_FIRE", domain="daybook"))
    handler.status = Status(code=grpc.StatusCode.UNAVAILABLE.value[0], message="no", details=details)
    with Daybook(address, key="x", retry=Retry(attempts_max=1)) as client, pytest.raises(Unavailable) as raised:
        client.get_account("accounts/acme")
    assert (type(raised.value), raised.value.reason) == (Unavailable, "ON_FIRE")


RETRIED = {"UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED"}


@pytest.mark.parametrize("code", [each.name for each in grpc.StatusCode if each is not grpc.StatusCode.OK])
def test_only_safe_statuses_are_retried(refusing: tuple[Refusing, str], opened: Any, code: str) -> None:
    """Without a reason, only statuses of unanswered calls are retried; UNKNOWN and RESOURCE_EXHAUSTED never are."""
    handler, address = refusing
    handler.status = Status(code=grpc.StatusCode[code].value[0], message="no")
    before = handler.calls
    client = opened(address, key="x", retry=Retry(attempts_max=3, first_seconds=0.001))
    with pytest.raises(DaybookError):
        client.get_account("accounts/acme")
    assert handler.calls - before == (3 if code in RETRIED else 1)


@pytest.mark.parametrize("code", ["RESOURCE_EXHAUSTED", "UNKNOWN"])
def test_only_a_refusal_with_a_delay_is_retried(refusing: tuple[Refusing, str], opened: Any, code: str) -> None:
    """With a RetryInfo, RESOURCE_EXHAUSTED is retried even for a call that is not idempotent; UNKNOWN is not."""
    handler, address = refusing
    retry = RetryInfo()
    retry.retry_delay.FromMilliseconds(1)
    handler.status = Status(code=grpc.StatusCode[code].value[0], message="no", details=packed(retry))
    before = handler.calls
    client = opened(address, key="x", retry=Retry(attempts_max=3, first_seconds=0.001))
    with pytest.raises(DaybookError):
        client.create_api_key(["accounts"])
    assert handler.calls - before == (3 if code == "RESOURCE_EXHAUSTED" else 1)


def test_exception_can_be_copied_to_another_process(refusing: tuple[Refusing, str]) -> None:
    """Pickling keeps the class and the facts of an exception."""
    handler, address = refusing
    info = ErrorInfo(reason="ACCOUNT_NOT_FOUND", domain="daybook", metadata={"account": "accounts/acme"})
    handler.status = Status(code=grpc.StatusCode.NOT_FOUND.value[0], message="no", details=packed(info))
    with Daybook(address, key="x") as client, pytest.raises(AccountNotFound) as raised:
        client.get_account("accounts/acme")
    copy = pickle.loads(pickle.dumps(raised.value))  # noqa: S301  # this process wrote it
    assert (type(copy), str(copy), copy.code) == (AccountNotFound, "no", grpc.StatusCode.NOT_FOUND)
    assert (copy.reason, copy.metadata) == ("ACCOUNT_NOT_FOUND", {"account": "accounts/acme"})


def test_ledger_names_the_field(client: Any, account: str) -> None:
    """An invalid field of a request is in the violations of the exception."""
    with pytest.raises(FieldInvalid) as raised:
        client.transfer_credits(account, account, "1.0000001")
    (violation,) = raised.value.violations
    assert violation.field in {"amount", "destination"}
    assert len(raised.value.request_id) == 36
