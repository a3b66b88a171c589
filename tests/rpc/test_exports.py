"""ExportTransactions: the rows of the list as one snapshot, resumable, with bounded resources."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any, TypeAlias

import grpc
import pytest
from daybook.v1.admin_service_pb2 import ImportTransactionsRequest
from daybook.v1.ledger_service_pb2 import ExportTransactionsRequest, ExportTransactionsResponse
from daybook.v1.transaction_pb2 import Transaction
from google.protobuf.json_format import MessageToDict
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import update

from server.app import serving
from server.book import Book
from server.config import Settings
from server.ledger.access import Caller
from server.ledger.instants import SECOND
from server.ledger.paging import EVERYTHING, NEWEST_FIRST, Order, TransactionRow
from server.rpc import export_files
from server.rpc.export_files import CSV_COLUMNS
from server.store import transactions as store
from server.store.engine import DatabaseLimits
from server.store.tables import transactions
from server.transport.filters import parse_filter, parse_order_by
from server.usecases import transactions as usecases
from tests.support.callers import Client, Server
from tests.support.clock import NOON, Clock
from tests.support.databases import writing
from tests.support.lists import (
    FILTERS,
    LISTS,
    Row,
    everything,
    expected,
    insert_rows,
    make_row,
    post_steps,
    two_tenants,
)
from tests.support.markers import only_sqlite
from tests.support.refusals import read_refusal

NDJSON, CSV = ExportTransactionsRequest.NDJSON, ExportTransactionsRequest.CSV
FILES = pytest.mark.parametrize("form", [NDJSON, CSV], ids=["ndjson", "csv"])
Call: TypeAlias = "grpc.aio.UnaryStreamCall[ExportTransactionsRequest, ExportTransactionsResponse]"


def start(
    client: Client,
    parent: str,
    *,
    metadata: Sequence[tuple[str, str]] = (),
    timeout: float | None = None,
    **fields: Any,
) -> Call:
    """Starts an export. `fields` are those of the request."""
    request = ExportTransactionsRequest(parent=parent, **fields)
    call: Call = client.ledger.ExportTransactions(request, metadata=(*client.metadata, *metadata), timeout=timeout)
    return call


async def exported(client: Client, parent: str, **fields: Any) -> list[Transaction]:
    """The transactions of an export."""
    return [each async for message in start(client, parent, **fields) for each in message.transactions]


async def read_file(client: Client, parent: str, **fields: Any) -> str:
    """The file of an export."""
    parts = [message.file.data async for message in start(client, parent, **fields)]
    return b"".join(parts).decode()


async def refused(call: Call) -> tuple[str, str, tuple[str, ...]]:
    """The status, the reason and the fields of a refused export."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    refusal = read_refusal(caught.value)
    return *refusal.verdict, refusal.fields


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports read two rows at once, heads of one account at once, few rows for a filter, and send each row."""
    monkeypatch.setattr(usecases, "EXPORTED_AT_ONCE", 2)
    monkeypatch.setattr(export_files, "PART_CHARACTERS", 1)
    monkeypatch.setattr(store, "HEADS_AT_ONCE", 1)
    monkeypatch.setattr(store, "ROWS_READ_MAX", 4)


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize(("parent", "order_by"), LISTS)
async def test_export_has_the_rows_of_the_list(server: Server, clock: Clock, parent: str, order_by: str) -> None:
    """An export agrees with the oracle of lists for every filter, and each row equals the posted one."""
    client, rows = await two_tenants(server, clock)
    truth = {row.transaction.name: row.transaction for row in rows}
    for filter_text, matches in FILTERS:
        found = await exported(client, parent, filter=filter_text, order_by=order_by)
        assert [each.name for each in found] == expected(rows, parent, matches, order_by), filter_text
        assert all(each == truth[each.name] for each in found), filter_text


INTERFERENCES = 5
"""The parts of an export during which others post."""
SNAPSHOT_FILTERS = ("", "kind = CHARGE OR kind = ADJUSTMENT", 'category = "ai_chat"', "state = SUCCEEDED")


async def caller_of(server: Server) -> Caller:
    """The holder of a credential of the tenant `house`."""
    tenant_number = await server.book.credentials.tenant_number("house")
    assert tenant_number is not None
    return Caller(tenant_number, "", "")


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize(("parent", "order_by"), LISTS)
async def test_export_is_a_snapshot(
    server: Server, client: Client, admin: Client, clock: Clock, parent: str, order_by: str
) -> None:
    """An export has the rows that existed at its beginning, each once, though others are posted before each part.

    The others are posted now, with an earlier clock, and into the past of the tenant, by an import.
    """
    rows = await post_steps(client, clock)
    clock.advance(60)
    numbers = {row.account_id: row.account_number for row in rows}
    caller = await caller_of(server)

    async def interfere() -> None:
        step = len(rows)
        clock.advance(-1 if step % 2 else 2)
        for account_id, number in numbers.items():
            for kind, amount in ((Transaction.GRANT, f"{step}"), (Transaction.CHARGE, "-2")):
                posted = await client.post(account_id, kind, amount, category="ai_chat")
                rows.append(Row(posted, number))
        past = f"past-{step}"
        number = (await client.create_account(past)).number
        adjustment = Transaction(kind=Transaction.ADJUSTMENT, amount="2", category="ai_chat")
        time = Timestamp(seconds=NOON // SECOND + step % 20)
        item = ImportTransactionsRequest.Item(parent=f"accounts/{past}", transaction=adjustment, create_time=time)
        messages = iter([ImportTransactionsRequest(items=[item])])
        await admin.admin.ImportTransactions(messages, metadata=admin.metadata)
        rows.extend(Row(each, number) for each in await client.history(past))

    account_id = None if parent == "accounts/-" else parent.removeprefix("accounts/")
    for filter_text in SNAPSHOT_FILTERS:
        names = expected(rows, parent, dict(FILTERS)[filter_text], order_by)
        found: list[str] = []
        export = server.book.transactions.export(
            caller, account_id, parse_filter(filter_text), parse_order_by(order_by), None
        )
        async with aclosing(export) as parts:
            posted = 0
            async for part in parts:
                found += [Transaction.FromString(row.body).name for row in part]
                if posted < INTERFERENCES:
                    posted += 1
                    await interfere()
        assert found == names, filter_text


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("parent", ["accounts/a", "accounts/-"])
@only_sqlite
async def test_export_ends_before_newer_transactions(server: Server, client: Client, clock: Clock, parent: str) -> None:
    """An export in ascending order ends, though more is posted during each part than the part has."""
    rows = await post_steps(client, clock)
    clock.advance(60)
    account_id = None if parent == "accounts/-" else "a"
    order, found = Order(descending=False), 0
    export = server.book.transactions.export(await caller_of(server), account_id, EVERYTHING, order, None)
    async with aclosing(export) as parts:
        async for part in parts:
            found += len(part)
            for _ in range(3):
                rows.append(Row(await client.post("a", Transaction.GRANT, "1"), 0))
            assert len(rows) < 100, "the export follows the new transactions"
    assert found == sum(each.transaction.category != "test" for each in rows if account_id in (None, each.account_id))


@pytest.mark.usefixtures("short_parts")
async def test_open_exports_hold_no_connection(server: Server, client: Client, clock: Clock) -> None:
    """More open exports than the database has connections don't delay postings, and all of them come to an end."""
    rows = await post_steps(client, clock)
    caller = await caller_of(server)
    names = expected(rows, "accounts/-", everything, "")
    async with AsyncExitStack() as stack:
        exports = []
        for _ in range(3 * DatabaseLimits().connections):
            export = server.book.transactions.export(caller, None, EVERYTHING, NEWEST_FIRST, None)
            exports.append(await stack.enter_async_context(aclosing(export)))
        firsts = [await anext(export) for export in exports]
        await client.post("a", Transaction.GRANT, "1")
        for first, export in zip(firsts, exports, strict=True):
            found = [*first, *[row async for part in export for row in part]]
            assert [Transaction.FromString(row.body).name for row in found] == names


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize(("parent", "order_by"), LISTS)
async def test_export_continues_after_any_transaction(server: Server, clock: Clock, parent: str, order_by: str) -> None:
    """An export that continues after a transaction has the rows behind it, also if the filter rejects that one."""
    client, rows = await two_tenants(server, clock)
    names = expected(rows, parent, everything, order_by)
    filter_text = 'category = "ai_chat"'
    matching = set(expected(rows, parent, dict(FILTERS)[filter_text], order_by))
    for index, name in enumerate(names):
        found = await exported(client, parent, order_by=order_by, last_transaction=name)
        assert [each.name for each in found] == names[index + 1 :]
        found = await exported(client, parent, order_by=order_by, last_transaction=name, filter=filter_text)
        assert [each.name for each in found] == [each for each in names[index + 1 :] if each in matching]


@FILES
async def test_continued_file_can_be_appended(client: Client, clock: Clock, form: Any) -> None:
    """A file that was cut off anywhere is completed by an export after the last transaction before its last line."""
    await post_steps(client, clock)
    whole = await read_file(client, "accounts/-", format=form)
    line_break = "\r\n" if form == CSV else "\n"
    assert whole.endswith(line_break)
    names = [each.name for each in await exported(client, "accounts/-")]
    header_lines = int(form == CSV)
    for end in range(0, len(whole), 101):
        # Without a line break at its end, the last line may be incomplete.
        lines = whole[:end].split(line_break)[:-1]
        if len(lines) <= header_lines:
            continue
        last = names[len(lines) - header_lines - 1]
        rest = await read_file(client, "accounts/-", format=form, last_transaction=last)
        assert line_break.join([*lines, rest]) == whole


async def test_files_have_the_transactions(client: Client, clock: Clock) -> None:
    """The lines of both files are the exported transactions, in the same order."""
    await post_steps(client, clock)
    rows = await exported(client, "accounts/-")
    lines = (await read_file(client, "accounts/-", format=NDJSON)).splitlines()
    assert [json.loads(line) for line in lines] == [
        MessageToDict(each, always_print_fields_with_no_presence=True) for each in rows
    ]
    text = await read_file(client, "accounts/-", format=CSV)
    header, *records = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""))
    assert header == list(CSV_COLUMNS)
    assert [dict(zip(header, record, strict=True))["name"] for record in records] == [each.name for each in rows]


@FILES
async def test_empty_file_is_complete(client: Client, form: Any) -> None:
    """An export without rows is a complete file: the header in CSV, nothing in NDJSON or after the last transaction."""
    await client.create_account("acme")
    header = "\ufeff" + ",".join(CSV_COLUMNS) + "\r\n" if form == CSV else ""
    assert await read_file(client, "accounts/acme", format=form) == header
    posted = await client.post("acme", Transaction.GRANT, "1")
    assert await read_file(client, "accounts/acme", format=form, last_transaction=posted.name) == ""


UID = "0192f3a4-5b6c-7d8e-9f01-23456789abcd"


@pytest.mark.parametrize(
    ("fields", "verdict"),
    [
        ({"parent": "accounts/none"}, ("NOT_FOUND", "ACCOUNT_NOT_FOUND", ())),
        ({"parent": "acme"}, ("INVALID_ARGUMENT", "FIELD_INVALID", ("parent",))),
        ({"filter": "uid = 1"}, ("INVALID_ARGUMENT", "FILTER_INVALID", ("filter",))),
        ({"order_by": "uid"}, ("INVALID_ARGUMENT", "FIELD_INVALID", ("order_by",))),
        ({"parent": "accounts/-", "order_by": "amount"}, ("INVALID_ARGUMENT", "FIELD_INVALID", ("order_by",))),
        ({"format": 3}, ("INVALID_ARGUMENT", "FIELD_INVALID", ("format",))),
        ({"last_transaction": "accounts/acme"}, ("INVALID_ARGUMENT", "FIELD_INVALID", ("last_transaction",))),
        (
            {"last_transaction": f"accounts/other/transactions/{UID}"},
            ("INVALID_ARGUMENT", "FIELD_INVALID", ("last_transaction",)),
        ),
        ({"last_transaction": f"accounts/acme/transactions/{UID}"}, ("NOT_FOUND", "TRANSACTION_NOT_FOUND", ())),
    ],
)
@only_sqlite
async def test_invalid_request_is_refused(
    client: Client, fields: dict[str, Any], verdict: tuple[str, str, tuple[str, ...]]
) -> None:
    """An invalid request is refused before the first message, with the field in the error."""
    await client.create_account("acme")
    await client.post("acme", Transaction.GRANT, "1")
    assert await refused(start(client, **{"parent": "accounts/acme", **fields})) == verdict


@only_sqlite
async def test_bound_key_exports_its_account_only(server: Server, client: Client) -> None:
    """A credential that is bound to an account exports this account, and neither the tenant nor another account."""
    for account_id in ("acme", "other"):
        await client.create_account(account_id)
        await client.post(account_id, Transaction.GRANT, "1")
    bound = await server.client((await caller_of(server)).tenant_number, account_id="acme")
    assert [each.name.split("/")[1] for each in await exported(bound, "accounts/acme")] == ["acme"]
    for parent in ("accounts/-", "accounts/other"):
        assert await refused(start(bound, parent)) == ("PERMISSION_DENIED", "ACCOUNT_NOT_PERMITTED", ())


LARGE_ROWS = 10_000
"""Rows of 20 MB together, several times what gRPC buffers."""


class Observed:
    """An export as the server sees it."""

    def __init__(self) -> None:
        self.row_count = 0
        self.has_ended = asyncio.Event()


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> Observed:
    """The export of the test, which is the only one."""
    found, export = Observed(), usecases.Transactions.export

    async def observe(*arguments: Any) -> AsyncGenerator[Sequence[TransactionRow], None]:
        try:
            async with aclosing(export(*arguments)) as parts:
                async for part in parts:
                    found.row_count += len(part)
                    yield part
        finally:
            found.has_ended.set()

    monkeypatch.setattr(usecases.Transactions, "export", observe)
    return found


@asynccontextmanager
async def large_account(book: Book, idle_seconds: float = 60) -> AsyncIterator[tuple[Server, Client]]:
    """A server with LARGE_ROWS transactions in the account `acme`, and a client that buffers little of an answer."""
    settings = Settings(port=0, shutdown_grace_seconds=1, stream_idle_seconds_max=idle_seconds)
    # Without this option gRPC enlarges the window of a connection to some megabytes when the machine is slow.
    options = [("grpc.http2.bdp_probe", 0)]
    async with serving(book, settings) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as channel:
        server = Server(book, channel)
        client = await server.client(await server.create_tenant("house"))
        number = (await client.create_account("acme")).number
        rows = [make_row("acme", number, each) for each in range(1, LARGE_ROWS + 1)]
        for row in rows:
            row.transaction.description = "x" * 2000
        await insert_rows(server, (await caller_of(server)).tenant_number, rows)
        yield server, client


@pytest.mark.parametrize("form", [0, NDJSON, CSV], ids=["messages", "ndjson", "csv"])
@only_sqlite
async def test_stalled_reader_is_cut_off(book: Book, observed: Observed, form: Any) -> None:
    """An export whose client reads nothing stops to read the database, and ends after stream_idle_seconds_max."""
    async with asyncio.timeout(60), large_account(book, idle_seconds=1) as (_, client):
        call = start(client, "accounts/acme", format=form)
        await call.read()
        await observed.has_ended.wait()
        assert observed.row_count < LARGE_ROWS / 2
        call.cancel()


@pytest.mark.parametrize("leaves", [True, False], ids=["cancelled", "deadline"])
@only_sqlite
async def test_export_ends_with_its_caller(book: Book, observed: Observed, leaves: bool) -> None:
    """An export ends when its caller leaves or its deadline passes, and reads no further rows."""
    async with asyncio.timeout(60), large_account(book) as (_, client):
        call = start(client, "accounts/acme", timeout=None if leaves else 2)
        await call.read()
        if leaves:
            call.cancel()
        await observed.has_ended.wait()
        assert observed.row_count < LARGE_ROWS / 2


@only_sqlite
async def test_export_of_large_rows_has_all(book: Book, observed: Observed) -> None:
    """Rows that together exceed the size of a message are all exported, in every form."""
    async with asyncio.timeout(60), large_account(book) as (_, client):
        assert len(await exported(client, "accounts/acme")) == LARGE_ROWS
        assert (await read_file(client, "accounts/acme", format=NDJSON)).count("\n") == LARGE_ROWS
        assert (await read_file(client, "accounts/acme", format=CSV)).count("\r\n") == LARGE_ROWS + 1
    assert observed.row_count == 3 * LARGE_ROWS


@only_sqlite
async def test_head_reads_the_first_part_only(book: Book, observed: Observed) -> None:
    """With the gateway's header for HEAD, the file of an export ends with its first part."""
    async with asyncio.timeout(60), large_account(book) as (_, client):
        call = start(client, "accounts/acme", format=CSV, metadata=[("x-daybook-head", "1")])
        assert len([message async for message in call]) == 1
    assert observed.row_count < LARGE_ROWS / 2


@pytest.mark.usefixtures("short_parts")
@FILES
async def test_failed_file_has_no_line_break_at_its_end(
    server: Server, client: Client, clock: Clock, form: Any
) -> None:
    """An export that fails midway ends with an error, and its file without a line break, unlike a complete one."""
    rows = [row for row in await post_steps(client, clock) if row.account_id == "a"]
    async with writing(server.book.database) as connection:
        await connection.execute(update(transactions).where(transactions.c.sequence == 2).values(body=b"\xff"))
    call = start(client, "accounts/a", format=form, order_by="create_time desc")
    found = b""
    with pytest.raises(grpc.aio.AioRpcError) as caught:  # noqa: PT012  # the messages before the error
        async for message in call:
            found += message.file.data
    assert read_refusal(caught.value).verdict == ("INTERNAL", "INTERNAL_FAILURE")
    assert found.count(b"accounts/a/transactions/") == len(rows) - 2
    assert not found.endswith(b"\n")
