"""Idempotency: a call that is repeated with its request_id takes effect once and gets the same answer."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from daybook.v1.account_pb2 import Account, User
from daybook.v1.admin_service_pb2 import ImportTransactionsRequest
from daybook.v1.ledger_service_pb2 import (
    BatchCreateTransactionsRequest,
    CreateAccountRequest,
    CreateTransactionRequest,
    GetAccountRequest,
    RefundTransactionRequest,
    SubmitTransactionsRequest,
    TransferCreditsRequest,
    UpdateAccountRequest,
)
from daybook.v1.transaction_pb2 import Transaction
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from tests.support.callers import Client, Server
from tests.support.clock import Clock
from tests.support.markers import only_sqlite
from tests.support.refusals import read_status, refusal_of

GRANT, CHARGE = Transaction.GRANT, Transaction.CHARGE
REUSED = ("ALREADY_EXISTS", "REQUEST_ID_REUSED")


async def raw_call(client: Client, method: str, request: bytes) -> bytes:
    """The serialized answer of a call."""
    call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = client.channel.unary_unary(f"/daybook.v1.Ledger/{method}")
    return await call(request, metadata=client.metadata)


def grant(*, amount: str = "5", request_id: str = "id", account_id: str = "acme") -> CreateTransactionRequest:
    """A request for a grant, with labels, which protobuf may serialize in any order."""
    transaction = Transaction(kind=GRANT, category="test", amount=amount)
    for key in ("location", "company", "project"):
        transaction.labels[key] = "x"
    return CreateTransactionRequest(parent=f"accounts/{account_id}", transaction=transaction, request_id=request_id)


def create_account(
    *, display_name: str = "Acme", request_id: str = "id", account_id: str = "acme"
) -> CreateAccountRequest:
    """A request to create an account."""
    account = Account(kind=Account.SPACE, display_name=display_name, user=User(id="u"))
    return CreateAccountRequest(account_id=account_id, account=account, request_id=request_id)


def update_account(*, display_name: str = "New", request_id: str = "id", etag: str = "") -> UpdateAccountRequest:
    """A request to change the display name."""
    return UpdateAccountRequest(
        account=Account(name="accounts/acme", display_name=display_name, etag=etag),
        update_mask=FieldMask(paths=["display_name"]),
        request_id=request_id,
    )


async def test_transaction_is_replayed(client: Client, clock: Clock) -> None:
    """A repeated request gets the same bytes and posts once."""
    await client.create_account("acme")
    request = grant().SerializeToString()
    first = await raw_call(client, "CreateTransaction", request)
    clock.advance(3600)
    await client.post("acme", GRANT, "1")
    assert await raw_call(client, "CreateTransaction", request) == first
    rows = await client.history()
    assert [row.balance_after for row in rows] == ["5", "6"]
    assert rows[0] == Transaction.FromString(first)
    assert rows[0].request_id == "id"


@only_sqlite
async def test_labels_in_another_order_are_the_same_request(client: Client) -> None:
    """Requests whose labels differ only in their order are the same."""
    await client.create_account("acme")
    first = await client.ledger.CreateTransaction(grant(), metadata=client.metadata)
    other = grant()
    other.transaction.labels.clear()
    for key in ("project", "location", "company"):
        other.transaction.labels[key] = "x"
    assert await client.ledger.CreateTransaction(other, metadata=client.metadata) == first
    assert len(await client.history()) == 1


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"amount": "6"}, REUSED),
        ({"amount": "5.0"}, REUSED),
        ({"description": "more"}, REUSED),
        ({"category": "other"}, REUSED),
        ({"labels": {"extra": "x"}}, REUSED),
    ],
)
@only_sqlite
async def test_other_transaction_with_a_used_id(
    client: Client, changes: dict[str, object], verdict: tuple[str, str]
) -> None:
    """Another request with a used id is refused and posts nothing; the first request is still replayed."""
    await client.create_account("acme")
    first = await client.ledger.CreateTransaction(grant(), metadata=client.metadata)
    other = grant()
    other.transaction.MergeFrom(Transaction(**changes))  # type: ignore[arg-type]
    refusal = await refusal_of(client.ledger.CreateTransaction(other, metadata=client.metadata))
    assert refusal.verdict == verdict
    assert refusal.metadata == {"request_id": "id"}
    assert await client.ledger.CreateTransaction(grant(), metadata=client.metadata) == first
    assert await client.history() == [first]


async def test_refused_call_leaves_its_id_free(client: Client) -> None:
    """A charge that was refused for insufficient credits succeeds with the same id after a grant."""
    await client.create_account("acme")
    refusal = await refusal_of(client.post("acme", CHARGE, "-3", request_id="charge"))
    assert refusal.reason == "INSUFFICIENT_CREDITS"
    await client.post("acme", GRANT, "3")
    charged = await client.post("acme", CHARGE, "-3", request_id="charge")
    assert charged.balance_after == "0"
    assert await client.post("acme", CHARGE, "-3", request_id="charge") == charged, "and is replayed, not refused"
    assert len(await client.history()) == 2


@only_sqlite
async def test_refused_id_is_free_for_another_request(client: Client) -> None:
    """The id of a refused call may be used for another request."""
    await client.create_account("acme")
    await refusal_of(client.post("acme", CHARGE, "-3", request_id="id"))
    await refusal_of(client.post("acme", GRANT, "x", request_id="id"))
    assert (await client.post("acme", GRANT, "7", request_id="id")).sequence == 1


@only_sqlite
async def test_calls_without_an_id_are_all_new(client: Client) -> None:
    """Without an id an equal request posts again."""
    await client.create_account("acme")
    posted = [await client.post("acme", GRANT, "1") for _ in range(3)]
    assert [each.sequence for each in posted] == [1, 2, 3]


async def test_ids_are_per_account(server: Server) -> None:
    """An id posts once in each account, also in accounts with the same id of different tenants."""
    one = await server.client(await server.create_tenant("one"))
    two = await server.client(await server.create_tenant("two"))
    for client, account_id in ((one, "acme"), (one, "other"), (two, "acme")):
        await client.create_account(account_id)
        posted = await client.ledger.CreateTransaction(grant(account_id=account_id), metadata=client.metadata)
        assert posted.sequence == 1
        assert await client.history(account_id) == [posted]


async def test_concurrent_calls_with_one_id(client: Client) -> None:
    """Of 16 concurrent calls with one id, one posts, and all get its answer."""
    await client.create_account("acme")
    request = grant().SerializeToString()
    answers = await asyncio.gather(*(raw_call(client, "CreateTransaction", request) for _ in range(16)))
    assert len(set(answers)) == 1
    assert await client.history() == [Transaction.FromString(answers[0])]


async def test_concurrent_requests_that_share_an_id(client: Client) -> None:
    """Of 8 different concurrent requests with one id, one posts, and the others are refused."""
    await client.create_account("acme")
    answers = await asyncio.gather(
        *(client.post("acme", GRANT, str(number), request_id="id") for number in range(1, 9)), return_exceptions=True
    )
    posted = [answer for answer in answers if isinstance(answer, Transaction)]
    codes = [answer.code() for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert await client.history() == posted
    assert len(posted) == 1
    assert codes == [grpc.StatusCode.ALREADY_EXISTS] * 7


@only_sqlite
async def test_account_is_replayed(client: Client, clock: Clock) -> None:
    """A repeated CreateAccount gets its first answer, also after an update of the account."""
    request = create_account().SerializeToString()
    first = await raw_call(client, "CreateAccount", request)
    clock.advance(60)
    await client.ledger.UpdateAccount(update_account(request_id=""), metadata=client.metadata)
    assert await raw_call(client, "CreateAccount", request) == first
    current = await client.ledger.GetAccount(GetAccountRequest(name="accounts/acme"), metadata=client.metadata)
    assert current.display_name == "New"


@only_sqlite
@pytest.mark.parametrize(
    ("request_message", "verdict"),
    [
        (create_account(display_name="Other"), REUSED),
        (create_account(request_id="other"), ("ALREADY_EXISTS", "ACCOUNT_EXISTS")),
        (create_account(request_id=""), ("ALREADY_EXISTS", "ACCOUNT_EXISTS")),
    ],
)
async def test_other_creation_of_an_existing_account(
    client: Client, request_message: CreateAccountRequest, verdict: tuple[str, str]
) -> None:
    """Another CreateAccount for an existing account is refused and leaves its request_id free."""
    first = await client.ledger.CreateAccount(create_account(), metadata=client.metadata)
    refusal = await refusal_of(client.ledger.CreateAccount(request_message, metadata=client.metadata))
    assert refusal.verdict == verdict
    assert await client.ledger.GetAccount(GetAccountRequest(name=first.name), metadata=client.metadata) == first
    if request_message.request_id == "other":
        assert (await client.post("acme", GRANT, "1", request_id="other")).sequence == 1


async def test_concurrent_creations_with_one_id(client: Client) -> None:
    """Of 16 concurrent CreateAccount calls with one id, one creates, and all get its answer."""
    for turn in range(4):
        request = create_account(account_id=f"account-{turn}").SerializeToString()
        answers = await asyncio.gather(*(raw_call(client, "CreateAccount", request) for _ in range(16)))
        assert len(set(answers)) == 1


async def test_concurrent_creations_without_an_id(client: Client) -> None:
    """Of 16 concurrent CreateAccount calls for one account, one creates it, and the others get ALREADY_EXISTS."""
    for turn in range(4):
        request = create_account(account_id=f"account-{turn}", request_id="").SerializeToString()
        answers = await asyncio.gather(
            *(raw_call(client, "CreateAccount", request) for _ in range(16)), return_exceptions=True
        )
        codes = [answer.code() for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
        assert codes == [grpc.StatusCode.ALREADY_EXISTS] * 15


async def test_update_is_replayed(client: Client, clock: Clock) -> None:
    """A repeated UpdateAccount gets its first answer and doesn't undo later updates."""
    created = await client.ledger.CreateAccount(create_account(request_id=""), metadata=client.metadata)
    request = update_account(etag=created.etag).SerializeToString()
    first = await raw_call(client, "UpdateAccount", request)
    clock.advance(60)
    newer = await client.ledger.UpdateAccount(
        update_account(display_name="Newer", request_id="2"), metadata=client.metadata
    )
    assert await raw_call(client, "UpdateAccount", request) == first, "though the etag is stale by now"
    current = await client.ledger.GetAccount(GetAccountRequest(name="accounts/acme"), metadata=client.metadata)
    assert current == newer


@only_sqlite
async def test_other_update_with_a_used_id(client: Client) -> None:
    """Another UpdateAccount with a used id is refused and writes nothing."""
    await client.ledger.CreateAccount(create_account(request_id=""), metadata=client.metadata)
    first = await client.ledger.UpdateAccount(update_account(), metadata=client.metadata)
    call = client.ledger.UpdateAccount(update_account(display_name="Newer"), metadata=client.metadata)
    assert (await refusal_of(call)).verdict == REUSED
    assert await client.ledger.GetAccount(GetAccountRequest(name="accounts/acme"), metadata=client.metadata) == first


@only_sqlite
async def test_refused_update_leaves_its_id_free(client: Client) -> None:
    """An update that was refused for its etag succeeds with the same id and the current etag."""
    created = await client.ledger.CreateAccount(create_account(request_id=""), metadata=client.metadata)
    call = client.ledger.UpdateAccount(update_account(etag="stale"), metadata=client.metadata)
    assert (await refusal_of(call)).reason == "ETAG_MISMATCH"
    updated = await client.ledger.UpdateAccount(update_account(etag=created.etag), metadata=client.metadata)
    assert updated.display_name == "New"


async def test_concurrent_updates_with_one_id(client: Client) -> None:
    """Of 16 concurrent UpdateAccount calls with one id, one writes, and all get its answer."""
    await client.ledger.CreateAccount(create_account(request_id=""), metadata=client.metadata)
    request = update_account().SerializeToString()
    answers = await asyncio.gather(*(raw_call(client, "UpdateAccount", request) for _ in range(16)))
    assert len(set(answers)) == 1


@only_sqlite
async def test_id_of_another_method(client: Client) -> None:
    """An id that one method has used is refused by every other method of the account."""
    await client.ledger.CreateAccount(create_account(request_id="a"), metadata=client.metadata)
    await client.ledger.UpdateAccount(update_account(request_id="b"), metadata=client.metadata)
    await client.post("acme", GRANT, "1", request_id="c")
    for call in (
        client.post("acme", GRANT, "1", request_id="a"),
        client.post("acme", GRANT, "1", request_id="b"),
        client.ledger.UpdateAccount(update_account(request_id="a"), metadata=client.metadata),
        client.ledger.UpdateAccount(update_account(request_id="c"), metadata=client.metadata),
        client.ledger.CreateAccount(create_account(request_id="b"), metadata=client.metadata),
        client.ledger.CreateAccount(create_account(request_id="c"), metadata=client.metadata),
    ):
        assert (await refusal_of(call)).verdict == REUSED
    assert len(await client.history()) == 1


async def test_concurrent_methods_that_share_an_id(client: Client) -> None:
    """Of a concurrent update and posting with one id, one succeeds, and the other is refused."""
    await client.ledger.CreateAccount(create_account(request_id=""), metadata=client.metadata)
    for turn in range(8):
        request_id = f"turn-{turn}"
        answers = await asyncio.gather(
            client.post("acme", GRANT, "1", request_id=request_id),
            client.ledger.UpdateAccount(
                update_account(display_name=request_id, request_id=request_id), metadata=client.metadata
            ),
            return_exceptions=True,
        )
        codes = [answer.code() for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
        assert codes == [grpc.StatusCode.ALREADY_EXISTS]


@only_sqlite
@pytest.mark.parametrize(
    ("request_id", "accepted"),
    [
        ("x" * 128, True),
        (" !~", True),
        ("0", True),
        ("x" * 129, False),
        ("é", False),
        ("a\n", False),
        ("a\0", False),
        ("\x7f", False),
        ("\t", False),
        ("\u0661", False),
    ],
)
async def test_request_id(client: Client, request_id: str, accepted: bool) -> None:
    """An id has at most 128 characters, all printable ASCII, in every method."""
    for account_id in ("posted", "updated"):
        await client.create_account(account_id)
    for call in (
        client.ledger.CreateAccount(create_account(request_id=request_id), metadata=client.metadata),
        client.post("posted", GRANT, "1", request_id=request_id),
        client.ledger.UpdateAccount(
            UpdateAccountRequest(account=Account(name="accounts/updated"), request_id=request_id),
            metadata=client.metadata,
        ),
    ):
        if accepted:
            await call
        else:
            refusal = await refusal_of(call)
            assert (*refusal.verdict, *refusal.fields) == ("INVALID_ARGUMENT", "FIELD_INVALID", "request_id")


def with_key(client: Client, *keys: str) -> list[tuple[str, str]]:
    """A client's metadata with these entries `idempotency-key`."""
    return [*client.metadata, *(("idempotency-key", key) for key in keys)]


async def test_idempotency_key_is_the_request_id(client: Client) -> None:
    """The entry idempotency-key is equivalent to request_id, and either replays the other."""
    await client.create_account("acme")
    first = await client.ledger.CreateTransaction(grant(request_id=""), metadata=with_key(client, "id"))
    assert first.request_id == "id"
    assert await client.ledger.CreateTransaction(grant(request_id=""), metadata=with_key(client, "id")) == first
    assert await client.ledger.CreateTransaction(grant(request_id="id"), metadata=client.metadata) == first
    assert await client.ledger.CreateTransaction(grant(request_id="id"), metadata=with_key(client, "id")) == first
    refusal = await refusal_of(
        client.ledger.CreateTransaction(grant(request_id="", amount="6"), metadata=with_key(client, "id"))
    )
    assert refusal.verdict == REUSED
    assert await client.history() == [first]


@pytest.mark.parametrize(
    ("request_id", "keys", "field"),
    [
        ("one", ["another"], "request_id"),
        ("", ["same", "same"], "Idempotency-Key"),
        ("same", ["same", "same"], "Idempotency-Key"),
        ("", [""], "Idempotency-Key"),
        ("one", [""], "Idempotency-Key"),
        ("", ["x" * 129], "Idempotency-Key"),
    ],
)
@only_sqlite
async def test_invalid_idempotency_key_is_refused(client: Client, request_id: str, keys: list[str], field: str) -> None:
    """A key that contradicts the request_id, is repeated or is malformed is refused, and nothing is posted."""
    await client.create_account("acme")
    call = client.ledger.CreateTransaction(grant(request_id=request_id), metadata=with_key(client, *keys))
    refusal = await refusal_of(call)
    assert (*refusal.verdict, *refusal.fields) == ("INVALID_ARGUMENT", "FIELD_INVALID", field)
    assert "Idempotency-Key" in refusal.message
    assert all(each[:64] in refusal.message for each in (request_id, *keys) if field == "request_id")
    assert await client.history() == []


@only_sqlite
async def test_credential_is_checked_before_the_key(client: Client) -> None:
    """A call without a credential gets CREDENTIAL_MISSING, even if its keys are invalid."""
    refusal = await refusal_of(
        client.ledger.CreateTransaction(grant(), metadata=[("idempotency-key", ""), ("idempotency-key", "")])
    )
    assert refusal.verdict == ("UNAUTHENTICATED", "CREDENTIAL_MISSING")


MALFORMED_ID = "\x7f"
INVALID_GRANT = Transaction(kind=GRANT, category="test", amount="nothing")


@pytest.mark.parametrize(
    "request_message",
    [
        CreateAccountRequest(request_id=MALFORMED_ID),
        UpdateAccountRequest(request_id=MALFORMED_ID),
        CreateTransactionRequest(transaction=INVALID_GRANT, request_id=MALFORMED_ID),
        RefundTransactionRequest(amount="nothing", request_id=MALFORMED_ID),
        TransferCreditsRequest(amount="nothing", request_id=MALFORMED_ID),
        BatchCreateTransactionsRequest(parent="nothing", request_id=MALFORMED_ID),
    ],
    ids=lambda value: type(value).__name__,
)
@only_sqlite
async def test_malformed_id_is_reported_first(client: Client, request_message: Message) -> None:
    """A request with a malformed request_id and another fault is refused for its request_id."""
    method = getattr(client.ledger, type(request_message).__name__.removesuffix("Request"))
    assert (await refusal_of(method(request_message, metadata=client.metadata))).fields == ("request_id",)


@only_sqlite
async def test_malformed_id_of_an_item_is_reported_first(server: Server) -> None:
    """An item of a submission or an import with a malformed request_id is refused for it, whatever its other faults."""
    client = await server.client(await server.create_tenant("house"), scopes={"admin", "transactions"})
    part = CreateTransactionRequest(transaction=INVALID_GRANT, request_id=MALFORMED_ID)
    request = SubmitTransactionsRequest(parent="accounts/-", requests=[part])
    (result,) = (await client.ledger.SubmitTransactions(request, metadata=client.metadata)).results
    assert read_status(result.error).fields == ("request_id",)
    item = ImportTransactionsRequest.Item(transaction=INVALID_GRANT, request_id=MALFORMED_ID)
    imported = client.admin.ImportTransactions(
        iter([ImportTransactionsRequest(items=[item])]), metadata=client.metadata
    )
    assert (await refusal_of(imported)).fields == ("items[0].request_id",)
