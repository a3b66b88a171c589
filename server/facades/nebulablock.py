"""Nebula Block's `GET /users/credits/history`."""

from __future__ import annotations

from typing import Any
from zoneinfo import ZoneInfo

from daybook.facades.nebulablock.v1.users_service_pb2 import GetCreditsHistoryRequest, GetCreditsHistoryResponse
from daybook.facades.nebulablock.v1.users_service_pb2_grpc import UsersServicer, add_UsersServicer_to_server

from server.facades import Dependencies
from server.ledger import money
from server.ledger.bodies import join_messages
from server.ledger.errors import AccountNotPermitted, DaybookError, FieldInvalid
from server.ledger.instants import HOUR, Instant, write_wall_time
from server.ledger.money import Millionths
from server.ledger.names import ALL_ACCOUNTS, account_name
from server.transport.auth import current_caller
from server.transport.calls import Context
from server.transport.errors import http_status_of, plain_message
from server.transport.rendered import cache_rendered
from server.transport.rest import read_integer
from server.usecases.usage import Usage
from server.vendors.nebulablock import VENDOR
from server.vendors.vendor import Refusal

LIMIT_DEFAULT = 20
LIMIT_MAX = 100
OFFSET_MAX = 2**63 - 1
NUMERIC_ID_DIGITS_MAX = 15
"""Maximum digits of an integer that a double, and so a JSON number, represents exactly."""

SUCCESS = GetCreditsHistoryResponse(message="User credit history successfully retrieved", status="success")
"""The two fields that are the same in every answer."""

_SUCCESS = SUCCESS.SerializeToString()
_NEW_YORK = ZoneInfo("America/New_York")


class Users(UsersServicer):
    """Lists the hours in which the caller spent credits."""

    def __init__(self, usage: Usage) -> None:
        self._usage = usage

    async def GetCreditsHistory(  # type: ignore[override]  # the answer is bytes
        self, request: GetCreditsHistoryRequest, context: Context
    ) -> bytes:
        """Parses, gets a page of the caller's hours, renders."""
        caller = current_caller()
        if caller.account_id is None:
            raise AccountNotPermitted(account_name(ALL_ACCOUNTS))
        limit, offset = _parse(request)
        history = await self._usage.history(caller, caller.account_id, offset, limit)
        user_id = _user_id(caller.account_id, history.account_number)
        rest = GetCreditsHistoryResponse.Data(
            credit_balance=money.to_number(history.available), total_credit_histories=history.total
        )
        # Concatenated serialized messages are one message with the fields of all.
        data = b"".join([rest.SerializeToString(), *(_render(user_id, *window[1:]) for window in history.windows)])
        return join_messages([data]) + _SUCCESS


def add_to_server(server: Any, dependencies: Dependencies) -> None:
    """Adds the servicer."""
    add_UsersServicer_to_server(Users(dependencies.usage), server)


def _parse(request: GetCreditsHistoryRequest) -> tuple[int, int]:
    limit = read_integer(request.limit) if request.HasField("limit") else LIMIT_DEFAULT
    if limit is None or not 1 <= limit <= LIMIT_MAX:
        raise FieldInvalid("limit", f"must be a number between 1 and {LIMIT_MAX}")
    offset = read_integer(request.offset) if request.HasField("offset") else 0
    if offset is None or not 0 <= offset <= OFFSET_MAX:
        raise FieldInvalid("offset", f"must be a number between 0 and {OFFSET_MAX}")
    return limit, offset


def _user_id(account_id: str, account_number: int) -> int:
    if account_id.isascii() and account_id.isdigit() and len(account_id) <= NUMERIC_ID_DIGITS_MAX:
        return int(account_id)
    return account_number


@cache_rendered
def _render(user_id: int, start: Instant, computing: Millionths, serverless: Millionths) -> bytes:
    """A Data message with only this hour."""
    hour = GetCreditsHistoryResponse.CreditHistory(
        user_id=user_id,
        computing_amount=money.to_number(computing),
        serverless_amount=money.to_number(serverless),
        create_time=_render_time(start),
        update_time=_render_time(start + HOUR),
        total=money.to_number(computing + serverless),
    )
    return GetCreditsHistoryResponse.Data(credit_history=[hour]).SerializeToString()


def _render_time(instant: Instant) -> str:
    # The vendor prefixes the local time of New York with EST, in summer too.
    return f"EST {write_wall_time(instant, _NEW_YORK)}"


def render_error(error: DaybookError) -> Refusal:
    """Renders an error as `{data: null, message, status: "failed"}`."""
    match error:
        case AccountNotPermitted():
            message = "the credential is not bound to a user"
        case FieldInvalid():
            message = f"{error.field} {error.problem}"
        case _:
            message = plain_message(error)
    return VENDOR.refuse(http_status_of(error), message)
