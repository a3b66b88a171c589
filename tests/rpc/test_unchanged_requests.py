"""No servicer changes the message of its request."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, cast

import grpc
import pytest
from daybook.v1 import admin_service_pb2 as admin
from daybook.v1 import ledger_service_pb2 as ledger
from daybook.v1.account_pb2 import Account, Company, User
from daybook.v1.api_key_pb2 import ApiKey
from daybook.v1.transaction_pb2 import Transaction, Usage
from google.protobuf.descriptor_pool import Default
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from server.app import SERVICES
from server.ledger.instants import SECOND
from server.transport import calls
from server.transport.parsing import parser
from tests.support.callers import Client, Server
from tests.support.clock import NOON
from tests.support.markers import only_sqlite
from tests.support.methods import facade_requests

METADATA = Struct()
METADATA["key"] = "value"
GRANT = Transaction(
    kind=Transaction.GRANT, category="purchase", amount="100", labels={"location": "here"}, metadata=METADATA
)
CHARGE = Transaction(
    kind=Transaction.CHARGE,
    category="ai_chat",
    amount="-1",
    description="memo",
    owner=User(id="owner"),
    usage=Usage(model="large"),
)


def create(transaction: Transaction = CHARGE, **fields: str) -> ledger.CreateTransactionRequest:
    """A request to post a transaction."""
    return ledger.CreateTransactionRequest(transaction=transaction, **fields)  # type: ignore[arg-type]  # all are texts


def item(request_id: str) -> admin.ImportTransactionsRequest.Item:
    """An item of an import."""
    return admin.ImportTransactionsRequest.Item(
        parent="accounts/past", transaction=GRANT, create_time=Timestamp(seconds=NOON // SECOND), request_id=request_id
    )


REQUESTS: list[tuple[str, Message]] = [
    ("CreateAccount", ledger.CreateAccountRequest(account_id="acme", account=Account(kind=Account.SPACE))),
    (
        "CreateAccount",
        ledger.CreateAccountRequest(
            account_id="past", account=Account(kind=Account.COMPANY, company=Company(title="x", metadata=METADATA))
        ),
    ),
    ("GetAccount", ledger.GetAccountRequest(name="accounts/acme")),
    ("ListAccounts", ledger.ListAccountsRequest(page_size=1)),
    (
        "UpdateAccount",
        ledger.UpdateAccountRequest(
            account=Account(name="accounts/acme", display_name="A", user=User(id="u")),
            update_mask=FieldMask(paths=["display_name", "user"]),
        ),
    ),
    ("CreateTransaction", create(GRANT, parent="accounts/acme", request_id="once")),
    ("CreateTransaction", create(GRANT, parent="accounts/acme", request_id="once")),
    ("CreateTransaction", create(parent="accounts/acme")),
    ("CreateTransaction", create(Transaction(uid="mine"), parent="accounts/acme")),
    (
        "BatchCreateTransactions",
        ledger.BatchCreateTransactionsRequest(
            parent="accounts/acme", requests=[create(), create(parent="accounts/acme")], request_id="batch"
        ),
    ),
    (
        "SubmitTransactions",
        ledger.SubmitTransactionsRequest(
            parent="accounts/acme", requests=[create(request_id="each"), create(Transaction(uid="mine"))]
        ),
    ),
    ("RefundTransaction", ledger.RefundTransactionRequest(name="accounts/acme/transactions/x", request_id="r")),
    (
        "TransferCredits",
        ledger.TransferCreditsRequest(
            name="accounts/acme", destination="accounts/past", amount="1", labels={"location": "x"}, metadata=METADATA
        ),
    ),
    ("GetTransaction", ledger.GetTransactionRequest(name="accounts/acme/transactions/x")),
    (
        "ListTransactions",
        ledger.ListTransactionsRequest(parent="accounts/acme", page_size=1, filter="kind = CHARGE", order_by="amount"),
    ),
    ("ExportTransactions", ledger.ExportTransactionsRequest(parent="accounts/acme", filter="kind = CHARGE")),
    ("ListLots", ledger.ListLotsRequest(parent="accounts/acme", page_size=1)),
    ("GetBalance", ledger.GetBalanceRequest(name="accounts/acme/balance")),
    ("ImportTransactions", admin.ImportTransactionsRequest(items=[item("a"), item("b"), item("")])),
    ("VerifyAccounts", admin.VerifyAccountsRequest(account="accounts/acme")),
    ("CreateApiKey", admin.CreateApiKeyRequest(api_key=ApiKey(scopes=["admin"], account="accounts/acme"))),
    ("ListApiKeys", admin.ListApiKeysRequest(page_size=1)),
    ("RevokeApiKey", admin.RevokeApiKeyRequest(name="apiKeys/nothing")),
    ("RotateApiKey", admin.RotateApiKeyRequest(name="apiKeys/nothing")),
    *((method.name, request) for optional in ("", "1") for method, request in facade_requests("acme", optional)),
]
"""Requests of every method, most of them accepted."""

METHODS = {method.name: method for service in SERVICES for method in Default().FindServiceByName(service).methods}


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Message, bytes]]:
    """Each request that the server has parsed, with its serialized form at that time."""
    received: list[tuple[Message, bytes]] = []

    def recording_parser(*arguments: Any) -> Callable[[bytes], Any]:
        parse = parser(*arguments)

        def parse_and_record(request: bytes) -> Any:
            message = parse(request)
            assert isinstance(message, Message)
            received.append((message, message.SerializeToString(deterministic=True)))
            return message

        return parse_and_record

    monkeypatch.setattr(calls, "parser", recording_parser)
    return received


def test_every_method_is_covered() -> None:
    """REQUESTS has a request for each method of each service."""
    assert {name for name, _ in REQUESTS} == METHODS.keys()


async def code_of(client: Client, name: str, request: Message, metadata: Sequence[tuple[str, str]]) -> grpc.StatusCode:
    """The status code of a call."""
    method = METHODS[name]
    path, channel = f"/{method.containing_service.full_name}/{name}", cast("Any", client.channel)
    serialized = request.SerializeToString()

    async def requests() -> AsyncIterator[bytes]:
        yield serialized

    try:
        if method.client_streaming:
            await channel.stream_unary(path)(requests(), metadata=metadata)
        elif method.server_streaming:
            await channel.unary_stream(path)(serialized, metadata=metadata).read()
        else:
            await channel.unary_unary(path)(serialized, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@only_sqlite
@pytest.mark.parametrize("has_key", [False, True])
async def test_requests_are_unchanged(received: list[tuple[Message, bytes]], server: Server, has_key: bool) -> None:
    """A request is the same after its call as when it was parsed, with and without the header Idempotency-Key."""
    client = await server.client(await server.create_tenant("house"), scopes={"admin"})
    for number, (name, request) in enumerate(REQUESTS):
        key = (("idempotency-key", f"key-{number}"),) if has_key else ()
        code = await code_of(client, name, request, (*client.metadata, *key))
        assert code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), name
    # A streaming method that refuses the key reads no request.
    assert len(received) >= len(REQUESTS) - has_key
    for message, before in received:
        assert message.SerializeToString(deterministic=True) == before, message
