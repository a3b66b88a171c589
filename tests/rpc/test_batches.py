"""Batches over the wire: atomic batches, item-by-item submissions, and recorded declined charges."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import grpc
import pytest
from daybook.v1.ledger_service_pb2 import (
    BatchCreateTransactionsRequest,
    BatchCreateTransactionsResponse,
    CreateTransactionRequest,
    SubmitTransactionsRequest,
    SubmitTransactionsResponse,
)
from daybook.v1.transaction_pb2 import Transaction
from google.protobuf.duration_pb2 import Duration

from server.ledger.instants import SECOND, to_timestamp
from server.ledger.posting import Kind
from tests.support.callers import Client, Server
from tests.support.clock import NOON, Clock
from tests.support.markers import only_sqlite
from tests.support.refusals import read_refusal, read_status, refusal_of

GRANT, CHARGE, ADJUSTMENT = Transaction.GRANT, Transaction.CHARGE, Transaction.ADJUSTMENT
INSUFFICIENT = ("FAILED_PRECONDITION", "INSUFFICIENT_CREDITS")


def item(
    kind: Kind = GRANT, amount: str = "1", *, parent: str = "", request_id: str = "", declined: bool = False
) -> CreateTransactionRequest:
    """A request for one transaction."""
    return CreateTransactionRequest(
        parent=parent,
        transaction=Transaction(kind=kind, category="test", amount=amount),
        request_id=request_id,
        record_declined=declined,
    )


async def batch(
    client: Client, requests: Iterable[CreateTransactionRequest], *, parent: str = "accounts/acme", request_id: str = ""
) -> list[Transaction]:
    """Posts all of these requests, or none."""
    request = BatchCreateTransactionsRequest(parent=parent, requests=requests, request_id=request_id)
    return list((await client.ledger.BatchCreateTransactions(request, metadata=client.metadata)).transactions)


async def submit(
    client: Client, requests: Iterable[CreateTransactionRequest], *, parent: str = "accounts/acme"
) -> list[SubmitTransactionsResponse.Result]:
    """Posts each of these requests by itself."""
    request = SubmitTransactionsRequest(parent=parent, requests=requests)
    return list((await client.ledger.SubmitTransactions(request, metadata=client.metadata)).results)


def outcome_of(result: SubmitTransactionsResponse.Result) -> tuple[str, ...]:
    """The outcome of an item: its balance_after, or its status and reason."""
    if result.WhichOneof("result") == "transaction":
        return (result.transaction.balance_after,)
    return read_status(result.error).verdict


async def test_batch(client: Client, admin: Client) -> None:
    """A batch posts its items in order, each on top of the previous one, all at the same time."""
    await client.create_account("acme")
    rows = await batch(client, [item(GRANT, "10"), item(CHARGE, "-9"), item(ADJUSTMENT, "0.5"), item(CHARGE, "-1.5")])
    assert [(row.sequence, row.kind, row.balance_after) for row in rows] == [
        (1, GRANT, "10"),
        (2, CHARGE, "1"),
        (3, ADJUSTMENT, "1.5"),
        (4, CHARGE, "0"),
    ]
    assert {row.create_time.ToMicroseconds() for row in rows} == {NOON}
    assert len({row.uid for row in rows}) == 4
    assert await client.history() == rows
    assert await admin.verify() == []


@pytest.mark.parametrize("place", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("wrong", "verdict", "field"),
    [
        (item(CHARGE, "-5000"), INSUFFICIENT, None),
        (item(GRANT, "999999999999"), ("FAILED_PRECONDITION", "BALANCE_OUT_OF_RANGE"), None),
        (item(GRANT, "-1"), ("INVALID_ARGUMENT", "FIELD_INVALID"), "transaction.amount"),
        (item(GRANT, "1.x"), ("INVALID_ARGUMENT", "FIELD_INVALID"), "transaction.amount"),
        (item(Transaction.REFUND), ("INVALID_ARGUMENT", "FIELD_INVALID"), "transaction.kind"),
        (item(parent="accounts/other"), ("INVALID_ARGUMENT", "FIELD_INVALID"), "parent"),
        (item(request_id="id"), ("INVALID_ARGUMENT", "FIELD_INVALID"), "request_id"),
    ],
    ids=["insufficient", "out of range", "sign", "amount", "kind", "parent", "request_id"],
)
@only_sqlite
async def test_refused_item_undoes_the_batch(
    client: Client,
    place: int,
    wrong: CreateTransactionRequest,
    verdict: tuple[str, str],
    field: str | None,
) -> None:
    """If any item is refused, nothing is posted, the refusal has the item's index, and the request_id stays free."""
    await client.create_account("acme")
    await client.create_account("other")
    await client.post("acme", GRANT, "5")
    before = await client.history(), await client.lots(), await client.balance()
    requests = [item(GRANT, "2"), item(CHARGE, "-3"), item(GRANT, "999")]
    requests.insert(place, wrong)
    refusal = await refusal_of(batch(client, requests, request_id="id"))
    assert refusal.verdict == verdict
    if field is None:
        assert refusal.metadata["index"] == str(place)
        assert refusal.metadata["account"] == "accounts/acme"
    else:
        assert refusal.fields == (f"requests[{place}].{field}",)
        assert refusal.metadata["field"] == f"requests[{place}].{field}"
    assert (await client.history(), await client.lots(), await client.balance()) == before
    del requests[place]
    assert (await batch(client, requests, request_id="id"))[-1].balance_after == "1003"


async def test_refused_item_undoes_the_batch_on_each_engine(client: Client, admin: Client) -> None:
    """A refused item undoes the earlier items in every account."""
    for account_id in ("acme", "other"):
        await client.create_account(account_id)
    requests = [
        item(GRANT, "5", parent="accounts/acme"),
        item(GRANT, "5", parent="accounts/other"),
        item(CHARGE, "-4", parent="accounts/acme"),
        item(CHARGE, "-6", parent="accounts/other"),
    ]
    refusal = await refusal_of(batch(client, requests, parent="accounts/-"))
    assert refusal.verdict == INSUFFICIENT
    assert refusal.metadata == {
        "account": "accounts/other",
        "available_amount": "5",
        "amount": "-6",
        "index": "3",
    }
    assert await client.history("-") == []
    assert await admin.verify() == []


async def test_batch_over_accounts(client: Client, admin: Client) -> None:
    """With the parent accounts/- each item names its account, and the answer keeps the items' order."""
    for account_id in ("a", "b", "c"):
        await client.create_account(account_id)
    names = ["c", "a", "b", "a", "c", "c"]
    requests = [item(GRANT, str(n + 1), parent=f"accounts/{name}") for n, name in enumerate(names)]
    rows = await batch(client, requests, parent="accounts/-")
    assert [row.name.split("/")[1] for row in rows] == names
    assert [row.balance_after for row in rows] == ["1", "2", "3", "6", "6", "12"]
    assert [row.sequence for row in rows] == [1, 1, 1, 2, 2, 3]
    assert await admin.verify() == []


@pytest.mark.parametrize(
    ("request_message", "verdict"),
    [
        (BatchCreateTransactionsRequest(parent="accounts/acme"), ("INVALID_ARGUMENT", "FIELD_INVALID", "requests")),
        (
            BatchCreateTransactionsRequest(parent="accounts/acme", requests=[item()] * 1001),
            ("INVALID_ARGUMENT", "FIELD_INVALID", "requests"),
        ),
        (BatchCreateTransactionsRequest(requests=[item()]), ("INVALID_ARGUMENT", "FIELD_INVALID", "parent")),
        (
            BatchCreateTransactionsRequest(parent="accounts/a/b", requests=[item()]),
            ("INVALID_ARGUMENT", "FIELD_INVALID", "parent"),
        ),
        (
            BatchCreateTransactionsRequest(parent="accounts/-", requests=[item(parent="accounts/acme"), item()]),
            ("INVALID_ARGUMENT", "FIELD_INVALID", "requests[1].parent"),
        ),
        (
            BatchCreateTransactionsRequest(parent="accounts/-", requests=[item(parent="accounts/-")]),
            ("INVALID_ARGUMENT", "FIELD_INVALID", "requests[0].parent"),
        ),
        (
            BatchCreateTransactionsRequest(parent="accounts/acme", requests=[item(declined=True)]),
            ("INVALID_ARGUMENT", "FIELD_INVALID", "requests[0].record_declined"),
        ),
        (
            BatchCreateTransactionsRequest(parent="accounts/acme", requests=[item()], request_id="x" * 129),
            ("INVALID_ARGUMENT", "FIELD_INVALID", "request_id"),
        ),
        (
            BatchCreateTransactionsRequest(
                parent="accounts/acme",
                requests=[
                    item(),
                    CreateTransactionRequest(
                        transaction=Transaction(kind=GRANT, category="x", amount="1", ttl=Duration())
                    ),
                ],
            ),
            ("INVALID_ARGUMENT", "FIELD_INVALID", "requests[1].transaction.ttl"),
        ),
        (
            BatchCreateTransactionsRequest(parent="accounts/unknown", requests=[item()]),
            ("NOT_FOUND", "ACCOUNT_NOT_FOUND"),
        ),
        (
            BatchCreateTransactionsRequest(
                parent="accounts/-", requests=[item(parent="accounts/acme"), item(parent="accounts/unknown")]
            ),
            ("NOT_FOUND", "ACCOUNT_NOT_FOUND"),
        ),
    ],
    ids=[
        "none",
        "1001",
        "no parent",
        "wrong parent",
        "no account",
        "wildcard",
        "record_declined",
        "request_id",
        "ttl",
        "unknown account",
        "unknown account among others",
    ],
)
@only_sqlite
async def test_malformed_batch_is_refused(
    client: Client, request_message: BatchCreateTransactionsRequest, verdict: tuple[str, ...]
) -> None:
    """A malformed batch is refused with the name of the field or the account, and posts nothing."""
    await client.create_account("acme")
    refusal = await refusal_of(client.ledger.BatchCreateTransactions(request_message, metadata=client.metadata))
    assert (*refusal.verdict, *refusal.fields) == verdict
    if verdict[0] == "NOT_FOUND":
        index = len(request_message.requests) - 1
        assert refusal.metadata == {"account": "accounts/unknown", "index": str(index)}
    assert await client.history() == []


async def test_batch_of_a_thousand_items(client: Client, admin: Client) -> None:
    """A batch of a thousand items is posted, and listed in order."""
    await client.create_account("acme")
    rows = await batch(client, [item(GRANT, "1000"), *[item(CHARGE, "-1")] * 999])
    assert [row.sequence for row in rows] == list(range(1, 1001))
    assert rows[-1].balance_after == "1"
    assert await client.history() == rows
    assert await admin.verify() == []


async def test_batch_is_replayed(client: Client, clock: Clock) -> None:
    """A repeated batch gets the same bytes and posts nothing more."""
    for account_id in ("acme", "other"):
        await client.create_account(account_id)
    request = BatchCreateTransactionsRequest(
        parent="accounts/-",
        requests=[item(GRANT, "5", parent="accounts/acme"), item(GRANT, "7", parent="accounts/other")],
        request_id="id",
    )
    first = await client.raw_call("BatchCreateTransactions", request.SerializeToString())
    clock.advance(100)
    await client.post("acme", CHARGE, "-5")
    assert await client.raw_call("BatchCreateTransactions", request.SerializeToString()) == first
    rows = BatchCreateTransactionsResponse.FromString(first).transactions
    assert [row.balance_after for row in rows] == ["5", "7"]
    assert len(await client.history("-")) == 3


async def test_request_id_belongs_to_the_first_account(client: Client) -> None:
    """A batch's request_id belongs to the account of its first item: this account can't reuse it, others can."""
    for account_id in ("acme", "other"):
        await client.create_account(account_id)
    home = item(GRANT, "5", parent="accounts/acme")
    away = item(GRANT, "7", parent="accounts/other")
    await batch(client, [home, away], parent="accounts/-", request_id="id")
    for call in (
        batch(client, [home], parent="accounts/-", request_id="id"),
        batch(client, [home, home], parent="accounts/-", request_id="id"),
        batch(client, [item(GRANT, "5")], request_id="id"),
        client.post("acme", GRANT, "5", request_id="id"),
    ):
        assert (await refusal_of(call)).verdict == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")
    assert (await batch(client, [away, home], parent="accounts/-", request_id="id"))[0].balance_after == "14"
    assert (await client.balance()).amount == "10"


async def test_concurrent_repetitions(client: Client) -> None:
    """A batch that is sent many times at once is posted once, and every call gets the same answer."""
    await client.create_account("acme")
    answers = await asyncio.gather(*(batch(client, [item(), item()], request_id="id") for _ in range(16)))
    assert all(answer == answers[0] for answer in answers)
    assert (await client.balance()).amount == "2"


async def test_submission(client: Client, admin: Client) -> None:
    """Each item has its own outcome, in the order of the request; a refused item stops no later one."""
    for account_id in ("acme", "other"):
        await client.create_account(account_id)
    results = await submit(
        client,
        [
            item(GRANT, "5", parent="accounts/acme"),
            item(CHARGE, "-6", parent="accounts/acme"),
            item(CHARGE, "-5", parent="accounts/acme"),
            item(GRANT, "x", parent="accounts/acme"),
            item(GRANT, "1", parent="accounts/unknown"),
            item(GRANT, "7", parent="accounts/other"),
            item(GRANT, "1"),
            item(CHARGE, "-8", parent="accounts/other", declined=True),
            item(GRANT, "2", parent="accounts/acme"),
        ],
        parent="accounts/-",
    )
    assert [outcome_of(result) for result in results] == [
        ("5",),
        INSUFFICIENT,
        ("0",),
        ("INVALID_ARGUMENT", "FIELD_INVALID"),
        ("NOT_FOUND", "ACCOUNT_NOT_FOUND"),
        ("7",),
        ("INVALID_ARGUMENT", "FIELD_INVALID"),
        ("7",),
        ("2",),
    ]
    assert read_status(results[1].error).metadata == {
        "account": "accounts/acme",
        "available_amount": "5",
        "amount": "-6",
    }
    assert read_status(results[3].error).fields == ("transaction.amount",)
    assert read_status(results[6].error).fields == ("parent",)
    assert results[7].transaction.state == Transaction.FAILED
    assert [row.sequence for row in await client.history("acme")] == [1, 2, 3]
    assert await admin.verify() == []


async def test_submitted_ids(client: Client, clock: Clock) -> None:
    """The items of one call have separate request_ids: each is replayed, reused or new by itself."""
    await client.create_account("acme")
    single = await client.post("acme", GRANT, "5", request_id="one")
    requests = [
        item(GRANT, "5", request_id="one"),
        item(GRANT, "6", request_id="two"),
        item(GRANT, "6", request_id="two"),
        item(GRANT, "7", request_id="two"),
        item(CHARGE, "-100", request_id="three"),
    ]
    clock.advance(10)
    results = await submit(client, requests)
    assert results[0].transaction == single, "the same as by CreateTransaction"
    assert results[1] == results[2]
    assert [outcome_of(result) for result in results[1:]] == [
        ("11",),
        ("11",),
        ("ALREADY_EXISTS", "REQUEST_ID_REUSED"),
        INSUFFICIENT,
    ]
    clock.advance(10)
    assert await submit(client, requests) == results
    assert (await client.post("acme", GRANT, "6", request_id="two")) == results[1].transaction
    await client.post("acme", GRANT, "100")
    assert outcome_of((await submit(client, requests))[4]) == ("11",), "a refused item left its id free"
    assert len(await client.history()) == 4


@pytest.mark.parametrize(
    ("request_message", "field"),
    [
        (SubmitTransactionsRequest(parent="accounts/acme"), "requests"),
        (SubmitTransactionsRequest(parent="accounts/acme", requests=[item()] * 1001), "requests"),
        (SubmitTransactionsRequest(requests=[item()]), "parent"),
        (
            SubmitTransactionsRequest(parent="accounts/acme", requests=[item(), item(parent="accounts/other")]),
            "requests[1].parent",
        ),
    ],
    ids=["none", "1001", "no parent", "another parent"],
)
@only_sqlite
async def test_malformed_submission(client: Client, request_message: SubmitTransactionsRequest, field: str) -> None:
    """A call that is malformed as a whole is refused as a whole."""
    for account_id in ("acme", "other"):
        await client.create_account(account_id)
    refusal = await refusal_of(client.ledger.SubmitTransactions(request_message, metadata=client.metadata))
    assert (*refusal.verdict, *refusal.fields) == ("INVALID_ARGUMENT", "FIELD_INVALID", field)
    assert await client.history("-") == []


async def test_submission_of_a_thousand(client: Client, admin: Client) -> None:
    """A thousand items are posted in order, without gaps in the sequence where some are refused."""
    await client.create_account("acme")
    # Of every three, the first grants 2, the second charges 1, the third exceeds the balance.
    kinds = [(GRANT, "2"), (CHARGE, "-1"), (CHARGE, "-1000")]
    results = await submit(client, [item(*kinds[n % 3]) for n in range(1000)])
    assert len(results) == 1000
    posted = [result.transaction for result in results if result.HasField("transaction")]
    assert [row.sequence for row in posted] == list(range(1, 668))
    assert {outcome_of(result) for result in results[2::3]} == {INSUFFICIENT}
    assert await client.history() == posted
    assert posted[-1].balance_after == "335"
    assert await admin.verify() == []


@pytest.mark.parametrize("method", ["BatchCreateTransactions", "SubmitTransactions"])
@only_sqlite
async def test_answer_beyond_the_message_size(client: Client, method: str) -> None:
    """A request whose answer exceeds the message size is answered or posts nothing; no refusal follows a posting."""
    await client.create_account("acme")
    transaction = Transaction(
        kind=CHARGE,
        category="test",
        amount="-1",
        state=Transaction.CANCELED,
        description="d" * 1024,
        receipt_uri="r" * 2048,
        labels={f"label_{n}": "v" * 120 for n in range(8)},
    )
    requests = [CreateTransactionRequest(transaction=transaction)] * 1000
    request = BatchCreateTransactionsRequest(parent="accounts/acme", requests=requests)
    assert 4_130_000 < request.ByteSize() < 4_190_000, "as large as a request may be"
    try:
        # The two requests are the same on the wire.
        answer = await client.raw_call(method, request.SerializeToString())
    except grpc.aio.AioRpcError as error:
        refusal = error
        answer = None
    if answer is None:
        assert read_refusal(refusal).reason
    assert (await client.balance()).sequence == (0 if answer is None else 1000)


async def test_bound_credential(server: Server, client: Client) -> None:
    """A bound credential posts batches to its account; a batch with another account is refused as a whole."""
    for account_id in ("acme", "other"):
        await client.create_account(account_id)
    tenant_number = await server.book.credentials.tenant_number("house")
    assert tenant_number is not None
    bound = await server.client(tenant_number, account_id="acme")
    denied = ("PERMISSION_DENIED", "ACCOUNT_NOT_PERMITTED")
    requests = [item(parent="accounts/acme"), item(parent="accounts/other")]
    refusal = await refusal_of(batch(bound, requests, parent="accounts/-"))
    assert (refusal.verdict, refusal.metadata["index"]) == (denied, "1")
    assert await client.history("-") == []
    assert [outcome_of(result) for result in await submit(bound, requests, parent="accounts/-")] == [("1",), denied]
    assert len(await batch(bound, requests[:1], parent="accounts/-")) == 1
    assert await client.history("other") == []


async def test_declined_charge_is_recorded(client: Client, admin: Client, clock: Clock) -> None:
    """With record_declined a charge without enough credits is stored as FAILED, and its repetition is replayed."""
    await client.create_account("acme", credit_limit="1")
    await client.post("acme", GRANT, "5")
    request = item(CHARGE, "-6.000001", parent="accounts/acme", request_id="id", declined=True)
    clock.advance(1)
    failed = await client.ledger.CreateTransaction(request, metadata=client.metadata)
    assert failed == Transaction(
        name=f"accounts/acme/transactions/{failed.uid}",
        uid=failed.uid,
        sequence=2,
        create_time=to_timestamp(NOON + SECOND),
        kind=CHARGE,
        category="test",
        state=Transaction.FAILED,
        amount="-6.000001",
        expiring_amount="0",
        permanent_amount="0",
        balance_after="5",
        request_id="id",
    )
    await client.post("acme", GRANT, "100")
    assert await client.ledger.CreateTransaction(request, metadata=client.metadata) == failed
    assert not (await client.full(failed.name)).allocations
    refusal = await refusal_of(client.post("acme", CHARGE, "-6.000001", request_id="id"))
    assert refusal.verdict == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")
    request.request_id = "other"
    assert (await client.ledger.CreateTransaction(request, metadata=client.metadata)).state == Transaction.SUCCEEDED
    assert (await client.balance()).amount == "98.999999"
    assert await admin.verify() == []


async def test_record_declined_records_no_other_refusal(client: Client) -> None:
    """record_declined records only a lack of credits; any other fault is refused."""
    await client.create_account("acme", credit_limit="999999999999.999999")
    await client.post("acme", GRANT, "5")
    for request, verdict in (
        (item(CHARGE, "1", declined=True), ("INVALID_ARGUMENT", "FIELD_INVALID")),
        # The field applies to charges only.
        (item(GRANT, "1", declined=True), ("INVALID_ARGUMENT", "FIELD_INVALID")),
        (item(ADJUSTMENT, "-1", declined=True), ("INVALID_ARGUMENT", "FIELD_INVALID")),
        (item(CHARGE, "-1", declined=True, parent="accounts/unknown"), ("NOT_FOUND", "ACCOUNT_NOT_FOUND")),
    ):
        request.parent = request.parent or "accounts/acme"
        call = client.ledger.CreateTransaction(request, metadata=client.metadata)
        assert (await refusal_of(call)).verdict == verdict
    assert len(await client.history()) == 1


@pytest.mark.parametrize("state", [Transaction.FAILED, Transaction.CANCELED])
async def test_failed_transaction_moves_no_credits(
    client: Client, admin: Client, state: Transaction.State.ValueType
) -> None:
    """A FAILED or CANCELED transaction moves no credits, whatever its amount, and takes a sequence number."""
    await client.create_account("acme")
    await client.post("acme", GRANT, "5")
    tries: list[tuple[Kind, str]] = [
        (CHARGE, "-999999999999"),
        (GRANT, "999999999999.999999"),
        (ADJUSTMENT, "-7"),
        (CHARGE, "-1"),
    ]
    for sequence, (kind, amount) in enumerate(tries, start=2):
        row = await client.post("acme", kind, amount, state=state)
        assert (row.sequence, row.state, row.amount, row.balance_after) == (sequence, state, amount, "5")
        assert (row.expiring_amount, row.permanent_amount) == ("0", "0")
        assert not (await client.full(row.name)).allocations
    for kind, amount in ((CHARGE, "1"), (GRANT, "-1"), (ADJUSTMENT, "0")):
        refusal = await refusal_of(client.post("acme", kind, amount, state=state))
        assert (*refusal.verdict, *refusal.fields) == ("INVALID_ARGUMENT", "FIELD_INVALID", "transaction.amount")
    held = await client.balance()
    assert (held.amount, held.sequence) == ("5", 5)
    assert len(await client.lots()) == 1
    assert (await client.post("acme", CHARGE, "-5")).sequence == 6
    assert await admin.verify() == []
