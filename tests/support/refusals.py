"""Refused calls, and the details that every error carries."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status


@dataclass(frozen=True, slots=True)
class Refusal:
    """The error of a call, as its caller sees it."""

    code: grpc.StatusCode
    reason: str
    fields: tuple[str, ...]
    """The fields that the BadRequest names."""
    message: str
    metadata: Mapping[str, str]
    """The metadata of the ErrorInfo."""
    retry_delay: Duration | None
    """The delay in the RetryInfo, if there is one."""

    @property
    def verdict(self) -> tuple[str, str]:
        """The status and the reason."""
        return self.code.name, self.reason


def read_status(status: Status) -> Refusal:
    """Reads the details of a status; checks the contract's rules for every error."""
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    infos: list[ErrorInfo] = []
    fields: list[str] = []
    retry_delay: Duration | None = None
    for detail in status.details:
        info, bad_request, retry = ErrorInfo(), BadRequest(), RetryInfo()
        if detail.Unpack(info):
            infos.append(info)
        elif detail.Unpack(bad_request):
            fields += [violation.field for violation in bad_request.field_violations]
        elif detail.Unpack(retry):
            retry_delay = retry.retry_delay
    assert len(infos) == 1, "every error carries exactly one ErrorInfo"
    assert infos[0].domain == "daybook"
    assert bool(fields) == (code is grpc.StatusCode.INVALID_ARGUMENT), (
        "INVALID_ARGUMENT, and no other status, names fields"
    )
    return Refusal(code, infos[0].reason, tuple(fields), status.message, dict(infos[0].metadata), retry_delay)


def read_refusal(error: grpc.aio.AioRpcError) -> Refusal:
    """Reads the refusal of a call that raised this error."""
    status = Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    refusal = read_status(status)
    assert (refusal.code, refusal.message) == (error.code(), error.details()), (
        "the details agree with the status of the call"
    )
    return refusal


async def refusal_of(call: Awaitable[object]) -> Refusal:
    """Makes a call that must be refused. Returns the refusal."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return read_refusal(caught.value)
