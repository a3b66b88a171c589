"""Imports of history: items keep their times, in order and by every rule, and an import can be repeated safely."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence

import grpc
import pytest
from daybook.v1.admin_service_pb2 import ImportTransactionsRequest, ImportTransactionsResponse
from daybook.v1.ledger_service_pb2 import CreateTransactionRequest
from daybook.v1.transaction_pb2 import Transaction, Usage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from server.ledger.access import Caller
from server.ledger.idempotency import Request
from server.ledger.instants import HOUR, SECOND, Instant, from_timestamp, to_timestamp
from server.ledger.money import ONE_CREDIT
from server.ledger.posting import Draft, Kind
from server.posting.commands import ImportOutcome
from server.usecases import imports
from server.usecases.imports import HistoryMessage, PastTransaction
from server.usecases.transactions import NewTransaction
from tests.support.callers import Client, Server
from tests.support.clock import NOON, Clock
from tests.support.databases import held_writer
from tests.support.markers import only_sqlite
from tests.support.refusals import refusal_of

GRANT, CHARGE = Transaction.GRANT, Transaction.CHARGE
DAY = 24 * HOUR
Item = ImportTransactionsRequest.Item


def ago(days: float) -> Instant:
    """The time `days` before NOON, which is the present."""
    return NOON - round(days * DAY)


def item(
    days: float,
    kind: Kind = GRANT,
    amount: str = "1",
    *,
    account_id: str = "acme",
    request_id: str = "",
    **fields: object,
) -> Item:
    """A transaction that happened `days` ago."""
    transaction = Transaction(**{"kind": kind, "amount": amount, "category": "test", **fields})  # type: ignore[arg-type]
    return Item(
        parent=f"accounts/{account_id}",
        transaction=transaction,
        create_time=to_timestamp(ago(days)),
        request_id=request_id,
    )


async def import_messages(client: Client, *messages: Iterable[Item]) -> ImportTransactionsResponse:
    """Imports a stream of these messages."""

    async def stream() -> AsyncIterator[ImportTransactionsRequest]:
        for items in messages:
            yield ImportTransactionsRequest(items=items)

    return await client.admin.ImportTransactions(stream(), metadata=client.metadata)


async def test_imported_transactions_keep_their_times(admin: Client) -> None:
    """An imported transaction keeps its time to the microsecond; the rest is as if it were posted then."""
    await admin.create_account("acme")
    fine = item(30, GRANT, "10", description="First", labels={"location": "l-1"})
    fine.create_time.nanos += 123_456_789
    answer = await import_messages(
        admin, [fine, item(20, CHARGE, "-4", request_id="id"), item(20, CHARGE, "-1"), item(0)]
    )
    assert answer == ImportTransactionsResponse(imported_count=4)
    rows = await admin.history()
    assert [from_timestamp(row.create_time) - NOON for row in rows] == [
        -30 * DAY + 123_456,
        -20 * DAY,
        -20 * DAY,
        0,
    ]
    first = rows[0]
    assert first == Transaction(
        name=f"accounts/acme/transactions/{first.uid}",
        uid=first.uid,
        sequence=1,
        create_time=to_timestamp(ago(30) + 123_456),
        kind=GRANT,
        category="test",
        state=Transaction.SUCCEEDED,
        amount="10",
        expiring_amount="0",
        permanent_amount="10",
        balance_after="10",
        description="First",
        labels={"location": "l-1"},
    )
    assert int(first.uid.replace("-", "")[:12], 16) == (ago(30) + 123_456) // 1000, "the uid has the same time"
    assert [row.balance_after for row in rows] == ["10", "6", "5", "6"]
    assert rows[1].request_id == "id"
    assert (await admin.balance()).amount == "6"
    assert await admin.verify() == []


@only_sqlite
async def test_import_needs_the_scope_admin(server: Server, client: Client, admin: Client) -> None:
    """Only a credential with the scope `admin` can import; a bound one only into its account."""
    for account_id in ("acme", "other"):
        await client.create_account(account_id)
    for items in ([item(1)], []):
        refusal = await refusal_of(import_messages(client, items))
        assert refusal.verdict == ("PERMISSION_DENIED", "SCOPE_MISSING")
        assert refusal.metadata == {"scope": "admin"}
    tenant_number = await server.book.credentials.tenant_number("house")
    assert tenant_number is not None
    bound = await server.client(tenant_number, account_id="acme", scopes={"admin"})
    refusal = await refusal_of(import_messages(bound, [item(2), item(1, account_id="other")]))
    assert refusal.verdict == ("PERMISSION_DENIED", "ACCOUNT_NOT_PERMITTED")
    assert refusal.metadata == {"account": "accounts/other", "index": "1"}
    stranger = await server.client(await server.create_tenant("stranger"), scopes={"admin"})
    assert (await refusal_of(import_messages(stranger, [item(1)]))).verdict == ("NOT_FOUND", "ACCOUNT_NOT_FOUND")
    call = admin.admin.ImportTransactions(iter([ImportTransactionsRequest(items=[item(1)])]))
    assert (await refusal_of(call)).verdict == ("UNAUTHENTICATED", "CREDENTIAL_MISSING")
    assert len(await client.history("-")) == 1


def without(field: str) -> Item:
    """An item without a field."""
    each = item(1)
    each.ClearField(field)  # type: ignore[arg-type]
    return each


@pytest.mark.parametrize("messages", [1, 2, 4], ids=["in one message", "in two", "each in its own"])
@pytest.mark.parametrize(
    ("wrong", "verdict", "field"),
    [
        (item(1, CHARGE, "-100"), ("FAILED_PRECONDITION", "INSUFFICIENT_CREDITS"), None),
        (item(1, GRANT, "999999999999.999999"), ("FAILED_PRECONDITION", "BALANCE_OUT_OF_RANGE"), None),
        (item(1, account_id="unknown"), ("NOT_FOUND", "ACCOUNT_NOT_FOUND"), None),
        (item(1, request_id="taken"), ("ALREADY_EXISTS", "REQUEST_ID_REUSED"), None),
        (item(1, GRANT, "-1"), ("INVALID_ARGUMENT", "FIELD_INVALID"), "transaction.amount"),
        (item(1, GRANT, "x"), ("INVALID_ARGUMENT", "FIELD_INVALID"), "transaction.amount"),
        (item(1, Transaction.EXPIRATION), ("INVALID_ARGUMENT", "FIELD_INVALID"), "transaction.kind"),
        (item(1, ttl=Duration()), ("INVALID_ARGUMENT", "FIELD_INVALID"), "transaction.ttl"),
        (
            item(1, expire_time=to_timestamp(ago(1))),
            ("INVALID_ARGUMENT", "FIELD_INVALID"),
            "transaction.expire_time",
        ),
        (item(3.1), ("INVALID_ARGUMENT", "FIELD_INVALID"), "create_time"),
        (item(-0.000001), ("INVALID_ARGUMENT", "FIELD_INVALID"), "create_time"),
        (without("create_time"), ("INVALID_ARGUMENT", "FIELD_INVALID"), "create_time"),
        (without("parent"), ("INVALID_ARGUMENT", "FIELD_INVALID"), "parent"),
        (without("transaction"), ("INVALID_ARGUMENT", "FIELD_INVALID"), "transaction.kind"),
        (item(1, request_id="é"), ("INVALID_ARGUMENT", "FIELD_INVALID"), "request_id"),
        (
            Item(parent="accounts/acme", transaction=item(1).transaction, create_time=Timestamp(nanos=-1)),
            ("INVALID_ARGUMENT", "FIELD_INVALID"),
            "create_time",
        ),
    ],
    ids=[
        "insufficient",
        "out of range",
        "unknown account",
        "reused",
        "sign",
        "amount",
        "kind",
        "ttl",
        "past lifetime",
        "before the newest",
        "in the future",
        "no time",
        "no parent",
        "no transaction",
        "request_id",
        "malformed time",
    ],
)
@only_sqlite
async def test_refused_item_ends_the_import(
    admin: Client, wrong: Item, verdict: tuple[str, str], field: str | None, messages: int
) -> None:
    """The first refused item ends the import, and the refusal has its index; earlier items stay."""
    await admin.create_account("acme")
    items = [item(9, request_id="taken"), item(3, GRANT, "2"), wrong, item(0.5, GRANT, "5")]
    parts: dict[int, Sequence[list[Item]]] = {
        1: [items],
        2: [items[:1], items[1:]],
        4: [[each] for each in items],
    }
    refusal = await refusal_of(import_messages(admin, *parts[messages]))
    assert refusal.verdict == verdict
    assert refusal.metadata["index"] == "2"
    if field is not None:
        assert refusal.fields == (f"items[2].{field}",)
    assert [row.amount for row in await admin.history()] == ["1", "2"]
    assert await admin.verify() == []


async def test_history_may_begin_before_1970(admin: Client) -> None:
    """History may have any time of a Timestamp, also before 1970; within an account times never decrease."""
    await admin.create_account("acme")
    times = [Timestamp(seconds=seconds) for seconds in (-62_135_596_800, -14_182_940, -1, 0, 1)]
    items = [item(1, GRANT, "1") for _ in times]
    for each, time in zip(items, times, strict=True):
        each.create_time.CopyFrom(time)
    assert (await import_messages(admin, items[:1], items[1:])).imported_count == 5
    assert [row.create_time for row in await admin.history()] == times
    assert (await refusal_of(import_messages(admin, items[2:3]))).fields == ("items[0].create_time",)
    assert await admin.verify() == []


@only_sqlite
async def test_message_with_too_many_items_is_refused(admin: Client) -> None:
    """A message has at most 1,000 items; the items of earlier messages stay."""
    await admin.create_account("acme")
    refusal = await refusal_of(import_messages(admin, [item(2)], [item(1)] * 1001))
    assert (*refusal.verdict, *refusal.fields) == ("INVALID_ARGUMENT", "FIELD_INVALID", "items")
    assert len(await admin.history()) == 1
    assert (
        await import_messages(admin, [item(1, Transaction.CHARGE, "-1", state=Transaction.FAILED)] * 1000)
    ).imported_count == 1000
    assert await import_messages(admin) == ImportTransactionsResponse()
    assert await import_messages(admin, []) == ImportTransactionsResponse()


@pytest.mark.parametrize(
    ("items", "verdict", "index", "count"),
    [
        ([item(2), item(1)], ("INVALID_ARGUMENT", "FIELD_INVALID"), None, 2),
        ([item(2), item(1, CHARGE, "-5")], ("FAILED_PRECONDITION", "INSUFFICIENT_CREDITS"), "1", 1),
        ([item(2, account_id="unknown")], ("NOT_FOUND", "ACCOUNT_NOT_FOUND"), "0", 0),
    ],
    ids=["all good", "refused", "unknown account"],
)
@only_sqlite
async def test_malformed_message_ends_the_import(
    server: Server, admin: Client, items: list[Item], verdict: tuple[str, str], index: str | None, count: int
) -> None:
    """A malformed message ends the import after the earlier messages, whose own refusals come first."""
    await admin.create_account("acme")
    call: grpc.aio.StreamUnaryMultiCallable[bytes, ImportTransactionsResponse] = server.channel.stream_unary(
        "/daybook.v1.Admin/ImportTransactions", response_deserializer=ImportTransactionsResponse.FromString
    )
    messages = [ImportTransactionsRequest(items=items).SerializeToString(), b"\xff\xff"]
    refusal = await refusal_of(call(iter(messages), metadata=admin.metadata))
    assert (refusal.verdict, refusal.metadata.get("index")) == (verdict, index)
    assert len(await admin.history()) == count


async def test_interrupted_import_can_be_repeated(admin: Client) -> None:
    """An interrupted import can be repeated as a whole: posted items are skipped, the rest is posted."""
    for account_id in ("acme", "other"):
        await admin.create_account(account_id)
    items = [
        item(100 - n, GRANT, str(n + 1), account_id=("acme", "other")[n % 2], request_id=f"id-{n}") for n in range(40)
    ]
    messages = [items[n : n + 8] for n in range(0, 40, 8)]
    some_are_posted = asyncio.Event()

    async def interrupted() -> AsyncIterator[ImportTransactionsRequest]:
        for message in messages[:3]:
            yield ImportTransactionsRequest(items=message)
        # The caller disconnects once some of these messages are posted.
        await some_are_posted.wait()
        raise RuntimeError("the caller disconnects")

    call = admin.admin.ImportTransactions(interrupted(), metadata=admin.metadata)
    async with asyncio.timeout(30):
        while len(await admin.history("-")) < 8:
            await asyncio.sleep(0.01)
    some_are_posted.set()
    with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError, RuntimeError)):
        await call
    answer = await import_messages(admin, *messages)
    assert answer.imported_count + answer.skipped_count == 40
    assert answer.skipped_count in (8, 16, 24), "messages are committed whole"
    assert await import_messages(admin, *messages) == ImportTransactionsResponse(skipped_count=40)
    rows = await admin.history("-")
    assert [row.request_id for row in rows] == [f"id-{n}" for n in range(40)]
    assert [row.sequence for row in rows[:4]] == [1, 1, 2, 2]
    assert (await admin.balance("acme")).amount == str(sum(range(1, 41, 2)))
    assert await admin.verify() == []


async def test_import_continues_after_a_refusal(admin: Client) -> None:
    """A refused import continues from the refused item once its cause is removed; the index counts skipped items."""
    await admin.create_account("acme")
    items = [item(5, request_id="a"), item(4, CHARGE, "-3", request_id="b"), item(3, request_id="c")]
    refusal = await refusal_of(import_messages(admin, items))
    assert (refusal.reason, refusal.metadata["index"]) == ("INSUFFICIENT_CREDITS", "1")
    assert (await refusal_of(import_messages(admin, items))).metadata["index"] == "1"
    items.insert(1, item(4.5, GRANT, "2", request_id="a-2"))
    assert await import_messages(admin, items) == ImportTransactionsResponse(imported_count=3, skipped_count=1)
    assert [row.balance_after for row in await admin.history()] == ["1", "3", "0", "1"]


async def test_request_ids_of_an_import(admin: Client) -> None:
    """An item's request_id belongs to its account: no other request can use it, and equal items post once."""
    for account_id in ("acme", "other"):
        await admin.create_account(account_id)
    twin = item(5, request_id="id")
    items = [twin, twin, item(5, account_id="other", request_id="id")]
    assert await import_messages(admin, items) == ImportTransactionsResponse(imported_count=2, skipped_count=1)
    for call in (
        admin.post("acme", GRANT, "1", request_id="id"),
        import_messages(admin, [item(4, request_id="id")]),
        import_messages(admin, [item(5, GRANT, "2", request_id="id")]),
    ):
        assert (await refusal_of(call)).verdict == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")
    assert len(await admin.history("-")) == 2


async def test_order_is_per_account(admin: Client) -> None:
    """Times may not decrease within an account; the order between accounts is free."""
    for account_id in ("acme", "other"):
        await admin.create_account(account_id)
    await import_messages(admin, [item(5), item(9, account_id="other"), item(5), item(7, account_id="other"), item(4)])
    refusal = await refusal_of(import_messages(admin, [item(6, account_id="other"), item(4.000001)]))
    assert (refusal.fields, refusal.metadata["index"]) == (("items[1].create_time",), "1")
    await admin.post("other", GRANT, "1")
    refusal = await refusal_of(import_messages(admin, [item(0.000001, account_id="other")]))
    assert refusal.fields == ("items[0].create_time",)
    assert await admin.verify() == []


async def test_expirations_are_posted_in_time_order(admin: Client) -> None:
    """Expirations within the history are posted in time order, so later items can't spend the expired credits."""
    await admin.create_account("acme")
    answer = await import_messages(
        admin,
        [
            item(100, GRANT, "10", ttl=Duration(seconds=30 * 24 * 3600)),
            item(90, GRANT, "5", expire_time=to_timestamp(ago(80))),
            item(85, CHARGE, "-3"),
            item(60, GRANT, "1"),
        ],
        [item(50, GRANT, "4", expire_time=to_timestamp(ago(-10))), item(40, CHARGE, "-2")],
    )
    assert answer.imported_count == 6
    rows = [(row.kind, row.amount, (from_timestamp(row.create_time) - NOON) // DAY) for row in await admin.history()]
    assert rows == [
        (GRANT, "10", -100),
        (GRANT, "5", -90),
        (CHARGE, "-3", -85),
        (Transaction.EXPIRATION, "-2", -80),
        (Transaction.EXPIRATION, "-10", -70),
        (GRANT, "1", -60),
        (GRANT, "4", -50),
        (CHARGE, "-2", -40),
    ]
    held = await admin.balance()
    assert (held.amount, held.expiring_amount) == ("3", "2")
    refusal = await refusal_of(import_messages(admin, [item(30, CHARGE, "-3.000001")]))
    assert refusal.metadata["available_amount"] == "3"
    assert await admin.verify() == []


async def test_imported_charge_spends_unexpired_lots(admin: Client) -> None:
    """History is judged at its own time: credits that have expired by now were valid then."""
    await admin.create_account("acme")
    await import_messages(
        admin,
        [
            item(10, GRANT, "5", expire_time=to_timestamp(ago(8))),
            item(8.000001, CHARGE, "-2"),
        ],
    )
    refusal = await refusal_of(import_messages(admin, [item(8, CHARGE, "-1")]))
    assert (refusal.reason, refusal.metadata["available_amount"]) == ("INSUFFICIENT_CREDITS", "0")
    assert (await admin.balance()).amount == "0"


@only_sqlite
async def test_sweep_between_parts_of_an_import(server: Server, admin: Client) -> None:
    """A sweep between two parts of an import doesn't block the second part."""
    await admin.create_account("acme")
    items = [
        item(10, GRANT, "5", expire_time=to_timestamp(ago(8)), request_id="a"),
        item(9, CHARGE, "-2", request_id="b"),
        item(7, GRANT, "1", request_id="c"),
    ]
    await import_messages(admin, items[:1])
    await server.book.expirations.sweep()
    assert await import_messages(admin, items) == ImportTransactionsResponse(imported_count=2, skipped_count=1)
    assert [row.amount for row in await admin.history()] == ["5", "-2", "-3", "1"]


@only_sqlite
async def test_sweep_after_an_import(server: Server, admin: Client, clock: Clock) -> None:
    """An account is swept again some time after its import; until then its balance has no expired credits either."""
    await admin.create_account("acme")
    await import_messages(admin, [item(10, GRANT, "5", expire_time=to_timestamp(ago(8)))])
    assert (await admin.balance()).amount == "0"
    clock.advance(3600)
    assert await server.book.expirations.sweep() == 1
    rows = [(row.amount, row.create_time) for row in await admin.history()]
    assert rows == [("5", to_timestamp(ago(10))), ("-5", to_timestamp(ago(8)))]
    assert await admin.verify() == []


async def test_imported_usage_counts_in_its_own_hour(server: Server, admin: Client) -> None:
    """Imported usage counts in the hour in which it happened."""
    account = await admin.create_account(
        "acme", credit_limit="100", hour_anchor_time=to_timestamp(ago(500) + 90 * SECOND)
    )
    hour = 1 / 24
    await import_messages(
        admin,
        [
            item(10, CHARGE, "-1", category="computing", usage=Usage(model="m")),
            item(10 - hour / 120, CHARGE, "-2", category="serverless", usage=Usage(model="m")),
            # 90 seconds after the full hour the next window begins.
            item(10 - hour / 40, CHARGE, "-4", category="computing", usage=Usage(model="m")),
            item(10 - hour, CHARGE, "-8", category="computing", usage=Usage(model="m")),
            item(9, CHARGE, "-16", category="computing"),
            item(5, CHARGE, "-32", category="computing", usage=Usage(model="m")),
        ],
    )
    tenant_number = await server.book.credentials.tenant_number("house")
    assert tenant_number is not None
    history = await server.book.usage.history(Caller(tenant_number, "", ""), "acme", 0, 10)
    assert history.account_number == account.number
    windows = [(each.number, each.start - ago(10), each.computing, each.serverless) for each in history.windows]
    credit = 1_000_000
    assert windows == [
        (3, 5 * DAY - HOUR + 90 * SECOND, 32 * credit, 0),
        (2, 90 * SECOND, 12 * credit, 0),
        (1, -HOUR + 90 * SECOND, credit, 2 * credit),
    ]
    assert await admin.verify() == []


async def test_posting_after_an_import(admin: Client) -> None:
    """A transaction that is posted after an import has the next sequence and the present time."""
    await admin.create_account("acme")
    await import_messages(admin, [item(3, GRANT, "2"), item(1, Transaction.CHARGE, "-9", state=Transaction.FAILED)])
    request = CreateTransactionRequest(
        parent="accounts/acme", transaction=Transaction(kind=CHARGE, category="test", amount="-2")
    )
    posted = await admin.ledger.CreateTransaction(request, metadata=admin.metadata)
    assert (posted.sequence, posted.create_time, posted.balance_after) == (3, to_timestamp(NOON), "0")
    assert (await admin.history())[1].state == Transaction.FAILED


async def test_many_messages(admin: Client) -> None:
    """A long import is posted in order, whatever the size of its messages."""
    await admin.create_account("acme")
    items = [item(400 - n / 8, CHARGE if n % 2 else GRANT, "-1" if n % 2 else "2") for n in range(3000)]
    answer = await import_messages(admin, items[:1000], items[1000:1001], [], items[1001:2001], items[2001:])
    assert answer.imported_count == 3000
    rows = await admin.history()
    assert [row.sequence for row in rows] == list(range(1, 3001))
    assert [from_timestamp(row.create_time) for row in rows] == [ago(400 - n / 8) for n in range(3000)]
    assert rows[-1].balance_after == "1500"
    assert await admin.verify() == []


@pytest.mark.parametrize("bound", ["PART_ITEMS_MAX", "PART_BYTES_MAX"])
@only_sqlite
async def test_waiting_messages_are_bounded(
    server: Server, admin: Client, bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While nothing can be posted, an import reads only as many messages as may wait, by items and by bytes."""
    monkeypatch.setattr(imports, bound, 30)
    await admin.create_account("acme")
    past = PastTransaction(
        NewTransaction("acme", Draft(GRANT, "test", ONE_CREDIT), Transaction(), Request("", b"")), ago(1)
    )
    taken: asyncio.Queue[int] = asyncio.Queue()

    async def messages() -> AsyncIterator[HistoryMessage]:
        for number in range(10):
            taken.put_nowait(number)
            yield HistoryMessage([past] * 10, byte_count=10)

    tenant_number = await server.book.credentials.tenant_number("house")
    assert tenant_number is not None
    async with held_writer(server.book.database.url.render_as_string(hide_password=False)):
        importing = asyncio.create_task(server.book.imports.import_history(Caller(tenant_number, "", ""), messages()))
        # The first message is being posted, and three more fill the next part.
        assert [await taken.get() for _ in range(4)] == [0, 1, 2, 3]
        for _ in range(100):
            await asyncio.sleep(0)
        assert taken.empty()
    assert await importing == ImportOutcome(100, 0)
    assert len(await admin.history()) == 100
