"""Requests that are no messages are refused by the name of the field, where there is one."""

from __future__ import annotations

import pytest
from daybook.facades.teable.v1.billing_service_pb2 import GetSpaceCreditHistoryRequest
from daybook.v1.account_pb2 import Account
from daybook.v1.ledger_service_pb2 import CreateAccountRequest

from server.ledger.errors import FieldInvalid
from server.transport.parsing import Naming, unless_malformed

NOT_UTF_8 = b"\xff"
GOOD = GetSpaceCreditHistoryRequest(space_id="spc", month="2024-10", take="7", source_type="ai_chat")


@pytest.mark.parametrize(
    ("good", "naming", "field"),
    [
        (b"2024-10", "json_name", "month"),
        (b"ai_chat", "json_name", "sourceType"),
        (b"ai_chat", "name", "source_type"),
        (b"spc", "name", "space_id"),
    ],
)
def test_text_that_is_not_utf_8_is_named(good: bytes, naming: Naming, field: str) -> None:
    """The field is called by the name that the caller knows it by."""
    request = GOOD.SerializeToString().replace(good, NOT_UTF_8 * len(good))
    refusal = unless_malformed(GetSpaceCreditHistoryRequest.FromString, naming)(request)
    assert isinstance(refusal, FieldInvalid)
    assert (refusal.field, refusal.problem) == (field, "is not UTF-8")


def test_the_first_of_several_is_named() -> None:
    """In the order of the request."""
    request = GOOD.SerializeToString().replace(b"2024-10", NOT_UTF_8 * 7).replace(b"ai_chat", NOT_UTF_8 * 7)
    refusal = unless_malformed(GetSpaceCreditHistoryRequest.FromString, "name")(request)
    assert isinstance(refusal, FieldInvalid)
    assert refusal.field == "month"


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x0a\x05abc",
        b"\xff" * 20,
        # Inside another message.
        CreateAccountRequest(account=Account(display_name="name")).SerializeToString().replace(b"name", NOT_UTF_8 * 4),
    ],
    ids=["cut off", "noise", "nested"],
)
def test_what_has_no_name_is_the_request(request_bytes: bytes) -> None:
    """Bytes that are no message at all are the fault of the whole request."""
    refusal = unless_malformed(CreateAccountRequest.FromString, "name")(request_bytes)
    assert isinstance(refusal, FieldInvalid)
    assert refusal.field == "request"


def test_a_message_is_a_message() -> None:
    """What can be parsed is."""
    assert unless_malformed(GetSpaceCreditHistoryRequest.FromString, "name")(GOOD.SerializeToString()) == GOOD


# Field 999, a length, and so many bytes.
UNKNOWN = b"\xba\x3e\x03abc"


@pytest.mark.parametrize(
    ("request_bytes", "field"),
    [
        (CreateAccountRequest(account_id="acme").SerializeToString() + UNKNOWN, "request"),
        (UNKNOWN, "request"),
        # Inside of field 1, the account, and inside of its field 10, the user.
        (b"\x0a\x06" + UNKNOWN, "account"),
        (b"\x0a\x08\x52\x06" + UNKNOWN, "account.user"),
        # Field 2 is a text, and here a number.
        (b"\x10\x01", "request"),
    ],
)
def test_field_that_the_message_lacks_is_refused(request_bytes: bytes, field: str) -> None:
    """A field of a newer contract would be ignored: it is refused, and the message that lacks it is named."""
    refusal = unless_malformed(CreateAccountRequest.FromString, "name")(request_bytes)
    assert isinstance(refusal, FieldInvalid)
    assert (refusal.field, refusal.problem) == (field, "has a field that this version of the contract lacks")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"",
        # An empty text that is written all the same, and a text that is written twice.
        b"\x12\x00",
        b"\x12\x01a\x12\x01b",
    ],
)
def test_other_ways_to_write_a_message_are_read(request_bytes: bytes) -> None:
    """What isn't written as Daybook writes it is a message all the same."""
    parsed = unless_malformed(CreateAccountRequest.FromString, "name")(request_bytes)
    assert parsed == CreateAccountRequest.FromString(request_bytes)
