"""Long imports: processes beside the server work them out ahead, and nothing about them is different for it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from random import Random

import psutil
import pytest
from daybook.v1.account_pb2 import Account
from daybook.v1.admin_service_pb2 import ImportTransactionsRequest
from daybook.v1.ledger_service_pb2 import UpdateAccountRequest
from daybook.v1.transaction_pb2 import Transaction, Usage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from sqlalchemy import update
from structlog.testing import capture_logs

from server.ledger.access import Caller
from server.ledger.errors import DaybookError
from server.ledger.instants import to_timestamp
from server.rpc import importing, preparing
from server.rpc.history import read_item
from server.rpc.importing import Upload
from server.rpc.preparing import PROCESSES, PROGRAM, PreparingProcesses, preparing_processes
from server.store.tables import account_states
from server.store.unit import Prepared
from server.usecases.commands import ImportOutcome
from server.usecases.preparing import Preparer
from server.usecases.transactions import Transactions
from tests.conftest import Client, Server, only_sqlite
from tests.rpc.test_import import CHARGE, GRANT, Item, ago, bring_in, item


class Watched(Transactions):
    """Notes of each group of prepared parts how many there were and how many of them held."""

    prepared: list[tuple[int, int]]

    async def import_prepared(self, parts: Sequence[Prepared]) -> int:
        """Posts them."""
        taken = await super().import_prepared(parts)
        self.prepared.append((len(parts), taken))
        return taken


@dataclass
class Importer:
    """Imports with processes that have started."""

    transactions: Watched
    caller: Caller
    processes: PreparingProcesses

    def upload(self) -> Upload:
        """A new import."""
        return Upload(self.transactions, self.caller, self.processes)

    async def bring_in(self, *messages: Iterable[Item]) -> ImportOutcome:
        """Imports these messages, each posted before the next."""
        upload = self.upload()
        try:
            for items in messages:
                await upload.add(ImportTransactionsRequest(items=items))
            return await upload.finish()
        finally:
            await upload.close()


@pytest.fixture
async def importer(server: Server, admin: Client, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Importer]:
    """An importer whose every message is prepared."""
    del admin  # Asked for because it makes the tenant.
    monkeypatch.setattr(importing, "PREPARED_ITEMS_MIN", 0)
    tenant_number = await server.book.credentials.tenant_number("house")
    assert tenant_number is not None
    book = server.book
    transactions = Watched(book.account_store, book.transactions._store, book.poster)
    transactions.prepared = []
    async with preparing_processes(Random(3).randbytes) as processes:
        assert processes.take()
        processes.give_back()
        await ready(processes)
        yield Importer(transactions, Caller(tenant_number, "", ""), processes)


async def ready(processes: PreparingProcesses) -> None:
    """Waits until they have started."""
    async with asyncio.timeout(60):
        while not processes.are_ready:
            await asyncio.sleep(0.01)


def pids_of(processes: PreparingProcesses) -> set[int]:
    """The processes, as the system knows them."""
    assert processes.are_ready
    children = psutil.Process().children()
    found = {each.pid for each in children if "server.rpc.preparing" in " ".join(each.cmdline())}
    assert len(found) == PROCESSES
    return found


def years(account_id: str) -> list[list[Item]]:
    """History with all that can happen in one: lots that expire, labels, usage, declined charges, ids."""

    def one(days: float, kind: int = GRANT, amount: str = "1", **fields: object) -> Item:
        return item(days, kind, amount, account_id=account_id, **fields)  # type: ignore[arg-type]

    return [
        [
            one(100, GRANT, "10", ttl=Duration(seconds=30 * 24 * 3600), labels={"location": "l"}, request_id="a"),
            one(99, CHARGE, "-3", category="computing", usage=Usage(model="m"), request_id="b"),
        ],
        [
            one(98.99, CHARGE, "-1.5", category="computing", usage=Usage(model="m"), description="é"),
            one(98, GRANT, "5", priority=-1),
            one(98, CHARGE, "-6"),
            one(97, CHARGE, "-100", state=Transaction.FAILED),
        ],
        # What was left of the first grant has expired by then.
        [one(60, GRANT, "1"), one(59, CHARGE, "-9", request_id="c")],
        [one(58, Transaction.ADJUSTMENT, "20"), one(57, CHARGE, "-0.000001")],
    ]


def stripped(rows: Iterable[Transaction]) -> list[Transaction]:
    """Transactions without what tells one account's from another's."""
    shown = []
    for row in rows:
        row.ClearField("uid")
        row.ClearField("name")
        shown.append(row)
    return shown


async def test_prepared_history_is_the_same(importer: Importer, admin: Client) -> None:
    """What was worked out ahead leaves the same books as what was not, and they prove right."""
    for account_id in ("plain", "ahead"):
        await admin.create_account(account_id, credit_limit="10")
    assert await bring_in(admin, *years("plain"))
    outcome = await importer.bring_in(*years("ahead"))
    assert outcome == ImportOutcome(10, 0)
    assert sum(taken for _, taken in importer.transactions.prepared) == 4, "every message was prepared"
    plain, ahead = stripped(await admin.history("plain")), stripped(await admin.history("ahead"))
    assert len(plain) == 11, "an expiration was posted between"
    assert ahead == plain
    assert (await admin.balance("ahead")).amount == (await admin.balance("plain")).amount
    assert await admin.verify() == []
    await admin.post("ahead", GRANT, "1")
    assert await importer.bring_in([item(0, account_id="ahead")]) == ImportOutcome(1, 0), "a new import begins anew"
    assert await admin.verify() == []


async def test_messages_under_way_together(importer: Importer, admin: Client) -> None:
    """Many messages one after another keep their order, whatever is posted together."""
    for account_id in ("acme", "other"):
        await admin.create_account(account_id)
    items = [
        item(
            400 - n / 8,
            CHARGE if n // 2 % 2 else GRANT,
            "-2" if n // 2 % 2 else "2",
            account_id=("acme", "other")[n % 2],
        )
        for n in range(3000)
    ]
    outcome = await importer.bring_in(*(items[n : n + 250] for n in range(0, 3000, 250)))
    assert outcome == ImportOutcome(3000, 0)
    assert sum(taken for _, taken in importer.transactions.prepared) == 12
    rows = await admin.history()
    assert [row.create_time for row in rows] == [each.create_time for each in items[::2]]
    assert [row.sequence for row in rows] == list(range(1, 1501))
    assert rows[-1].balance_after == "0"
    assert await admin.verify() == []


@only_sqlite
async def test_an_account_with_many_lots(importer: Importer, admin: Client) -> None:
    """It is left to the server, which doesn't load all of its lots."""
    for account_id in ("acme", "other"):
        await admin.create_account(account_id)
    assert await importer.bring_in([item(9) for _ in range(70)]) == ImportOutcome(70, 0)
    assert importer.transactions.prepared == [(1, 1)]
    charges = [item(8, CHARGE, "-1", account_id=account_id) for account_id in ("acme", "other") for _ in range(66)]
    grants = [item(8, GRANT, "66", account_id="other")]
    assert await importer.bring_in([*grants, *charges]) == ImportOutcome(133, 0)
    assert importer.transactions.prepared == [(1, 1)]
    assert (await admin.balance()).amount == "4"
    assert await importer.bring_in([item(7, CHARGE, "-1")]) == ImportOutcome(1, 0)
    assert importer.transactions.prepared == [(1, 1), (1, 1)]
    assert await admin.verify() == []


@only_sqlite
async def test_messages_that_wait_are_bounded_by_their_bytes(
    importer: Importer, admin: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large messages don't pile up: as many as may wait are posted before the next is taken in."""
    monkeypatch.setattr(importing, "PART_BYTES_MIN", 1)
    await admin.create_account("acme")
    outcome = await importer.bring_in(*([item(400 - n)] for n in range(20)))
    assert outcome == ImportOutcome(20, 0)
    assert importer.transactions.prepared == [(1, 1)] * 20


@only_sqlite
async def test_a_change_in_between(importer: Importer, admin: Client) -> None:
    """What was worked out on a state that isn't true any more is worked out again, on the one that is."""
    await admin.create_account("acme", credit_limit="5")
    await admin.create_account("other")
    upload = importer.upload()
    await upload.add(ImportTransactionsRequest(items=[item(9, CHARGE, "-4"), item(9, account_id="other")]))
    await upload.finish()
    await bring_in(admin, [item(8, GRANT, "100")])
    await upload.add(ImportTransactionsRequest(items=[item(7, CHARGE, "-50"), item(7, account_id="other")]))
    assert await upload.finish() == ImportOutcome(4, 0)
    assert importer.transactions.prepared == [(1, 1)], "the second can't be worked out on what the process knows"
    await upload.add(ImportTransactionsRequest(items=[item(6, account_id="other")]))
    await upload.finish()
    await upload.add(ImportTransactionsRequest(items=[item(5, account_id="other"), item(5, CHARGE, "-1")]))
    assert importer.transactions.prepared == [(1, 1)], "one goes without"
    update = UpdateAccountRequest(
        account=Account(name="accounts/acme", credit_limit="0"), update_mask=FieldMask(paths=["credit_limit"])
    )
    await upload.finish()
    assert importer.transactions.prepared == [(1, 1), (1, 1)]
    await admin.ledger.UpdateAccount(update, metadata=admin.metadata)
    await upload.add(ImportTransactionsRequest(items=[item(4, CHARGE, "-46")]))
    with pytest.raises(DaybookError) as refused:
        await upload.finish()
    assert importer.transactions.prepared == [(1, 1), (1, 1), (1, 0)]
    assert (refused.value.reason, refused.value.metadata["index"]) == ("INSUFFICIENT_CREDITS", "7")
    await upload.close()
    assert [row.balance_after for row in await admin.history()] == ["-4", "96", "46", "45"]
    assert await admin.verify() == []


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (item(1, CHARGE, "-100"), "INSUFFICIENT_CREDITS"),
        (item(1, GRANT, "x"), "FIELD_INVALID"),
        (item(1, account_id="nobody"), "ACCOUNT_NOT_FOUND"),
        (item(1, account_id="no/body"), "FIELD_INVALID"),
        (item(20), "FIELD_INVALID"),
        (item(-0.000001), "FIELD_INVALID"),
        (item(1, GRANT, "4", request_id="taken"), "REQUEST_ID_REUSED"),
    ],
    ids=["insufficient", "no amount", "nobody", "no parent", "before the newest", "in the future", "reused"],
)
@only_sqlite
async def test_refused_item(importer: Importer, admin: Client, wrong: Item, reason: str) -> None:
    """The first item that is refused ends a prepared import too, by its index, and nothing behind it is posted."""
    for account_id in ("acme", "other"):
        await admin.create_account(account_id)
    messages = [
        [item(9, request_id="taken")],
        [item(3, GRANT, "2"), wrong],
        [item(0.5, GRANT, "5", account_id="other")],
    ]
    with pytest.raises(DaybookError) as refused:
        await importer.bring_in(*messages)
    assert (refused.value.reason, refused.value.metadata["index"]) == (reason, "2")
    assert [row.amount for row in await admin.history()] == ["1", "2"]
    assert await admin.history("other") == []
    assert await admin.verify() == []


async def test_prepared_history_is_repeated(importer: Importer, admin: Client) -> None:
    """Requests that were imported before are skipped, by whatever way they came, also within one import."""
    await admin.create_account("acme")
    items = [item(100 - n, GRANT, str(n + 1), request_id=f"id-{n}") for n in range(40)]
    messages = [items[n : n + 8] for n in range(0, 40, 8)]
    assert await importer.bring_in(*messages[:2]) == ImportOutcome(16, 0)
    assert await importer.bring_in(*messages) == ImportOutcome(24, 16)
    assert await bring_in(admin, *messages)
    assert await importer.bring_in([*items, item(1, request_id="x")], [item(1, request_id="x")]) == ImportOutcome(1, 41)
    assert await importer.bring_in(*([[item(1, request_id="y")]] * 5)) == ImportOutcome(1, 4)
    assert len(await admin.history()) == 42
    assert await admin.verify() == []


async def test_a_call_behind_it_in_its_group(server: Server, admin: Client) -> None:
    """Who is posted in the same database transaction sees it: its requests, its balance, and what opened its lots."""
    await admin.create_account("acme")
    tenant_number = await server.book.credentials.tenant_number("house")
    assert tenant_number is not None
    caller, transactions = Caller(tenant_number, "", ""), server.book.transactions
    preparer = Preparer()
    preparer.learn(await transactions.known(caller, {"acme"}))
    grant = item(9, GRANT, "5", expire_time=to_timestamp(ago(8)), labels={"location": "l"}, request_id="id")
    again = Item.FromString(grant.SerializeToString())
    prepared = preparer.prepare([read_item(grant)], server.book.random_bytes)
    assert prepared is not None
    with capture_logs() as logs:
        taken, behind = await asyncio.gather(
            transactions.import_prepared([prepared]),
            transactions.import_history(caller, [read_item(again), read_item(item(7, GRANT, "2"))]),
        )
    assert logs == [], "they were posted together, without a second try"
    assert (taken, behind) == (1, ImportOutcome(1, 1))
    rows = await admin.history()
    assert [(row.amount, row.balance_after) for row in rows] == [("5", "5"), ("-5", "0"), ("2", "2")]
    assert rows[1].labels == {"location": "l"}
    assert await admin.verify() == []


@only_sqlite
async def test_accounts_are_dealt_out(importer: Importer, admin: Client) -> None:
    """Each process works out what is of its accounts; what is of nobody's, none."""
    names = ("acme", "other", "third", "fourth")
    for account_id in names:
        await admin.create_account(account_id)
    known = await importer.transactions.known(importer.caller, set(names[:3]))
    message = ImportTransactionsRequest(items=[item(9, account_id=account_id) for account_id in (*names, *names)])
    shares = [
        share
        for share in await importer.processes.prepare(message.SerializeToString(), known, is_first=True)
        if share is not None
    ]
    assert [share.item_count for share in shares] == [4, 2], "the fourth account isn't known"
    numbers = [set(share.before) for share in shares]
    assert numbers[0].isdisjoint(numbers[1])
    assert numbers[0] | numbers[1] == set(known.states)
    more = await importer.transactions.known(importer.caller, {"fourth"})
    shares_then = await importer.processes.prepare(message.SerializeToString(), more, is_first=False)
    assert [share.item_count for share in shares_then if share is not None] == [4, 4]


async def test_a_request_of_before_among_new_ones(server: Server, importer: Importer, admin: Client) -> None:
    """It is found when what was worked out can't be written, and nothing that was written before it stays."""
    await admin.create_account("acme")
    first = [item(9, GRANT, "1", request_id=f"id-{n}") for n in range(30)]
    assert await importer.bring_in(first) == ImportOutcome(30, 0)
    assert server.book.database.conflict_count == 0, "what is new is not looked for"
    new = [item(9, GRANT, "2", request_id=f"ia-{n}") for n in range(30)]
    assert await importer.bring_in([*new, first[7]], [item(7, GRANT, "4")]) == ImportOutcome(31, 1)
    assert importer.transactions.prepared == [(1, 1), (1, 0), (1, 0)], "the third was worked out on the second"
    assert server.book.database.conflict_count == 1
    rows = await admin.history()
    assert [row.sequence for row in rows] == list(range(1, 62))
    assert rows[-1].balance_after == "94"
    assert await admin.verify() == []


@only_sqlite
async def test_a_damaged_ledger_is_no_request_of_before(server: Server, importer: Importer, admin: Client) -> None:
    """A row that can't be written for any other reason is an error of the server's, and not tried again for ever."""
    await admin.create_account("acme")
    assert await importer.bring_in([item(9, request_id="a")]) == ImportOutcome(1, 0)
    await server.book.database.transact(
        lambda connection: connection.execute(update(account_states).values(sequence=0))
    )
    with pytest.raises(DaybookError) as refused:
        await importer.bring_in([item(8, request_id="b")])
    assert refused.value.reason == "INTERNAL_FAILURE"
    assert server.book.database.conflict_count == 1, "the request is looked for once"
    assert len(await admin.history()) == 1


@only_sqlite
async def test_a_process_that_is_killed(importer: Importer, admin: Client) -> None:
    """An import goes on without the process that prepares it, and the next one gets another."""
    for account_id in ("acme", "other"):
        await admin.create_account(account_id)
    pids = pids_of(importer.processes)
    killed = min(pids)
    upload = importer.upload()
    await upload.add(ImportTransactionsRequest(items=[item(9), item(9, account_id="other")]))
    await upload.finish()
    os.kill(killed, signal.SIGSTOP)
    await upload.add(ImportTransactionsRequest(items=[item(8), item(8, account_id="other")]))
    os.kill(killed, signal.SIGKILL)
    assert await upload.finish() == ImportOutcome(4, 0)
    async with asyncio.timeout(60):
        while importer.processes.are_ready:
            await asyncio.sleep(0.01)
    await upload.add(ImportTransactionsRequest(items=[item(7)]))
    assert await upload.finish() == ImportOutcome(5, 0)
    await upload.close()
    assert importer.processes.take()
    await ready(importer.processes)
    assert pids & pids_of(importer.processes) == pids - {killed}
    importer.processes.give_back()
    assert await importer.bring_in([item(6)]) == ImportOutcome(1, 0)
    assert importer.transactions.prepared == [(1, 1), (1, 1)]
    assert await admin.verify() == []


GARBLES = """
import pickle, sys
from server.rpc.preparing import _HEAD, _write
answers = sys.stdout.buffer
_write(answers, None)
answers.flush()
sys.stdin.buffer.read(_HEAD.size)
answer = pickle.dumps(None)
answers.write(_HEAD.pack(len(answer), 1) + answer)
answers.flush()
sys.stdin.buffer.read()
"""
"""A process whose answers come otherwise than it sent them."""


@only_sqlite
async def test_what_comes_garbled(importer: Importer, admin: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not read: the import goes on without the process, which is ended."""
    await admin.create_account("acme")
    await importer.processes.close()
    monkeypatch.setattr(preparing, "PROGRAM", (sys.executable, "-c", GARBLES))
    assert importer.processes.take()
    importer.processes.give_back()
    await ready(importer.processes)
    with capture_logs() as logs:
        assert await importer.bring_in([item(9)], [item(8)]) == ImportOutcome(2, 0)
    assert [each["event"] for each in logs] == ["process that prepares imports ended"] * PROCESSES
    assert not importer.processes.are_ready
    assert importer.transactions.prepared == []
    assert await admin.verify() == []


@only_sqlite
async def test_one_import_has_the_processes(importer: Importer, admin: Client) -> None:
    """A second import at the same time does without."""
    for account_id in ("acme", "other"):
        await admin.create_account(account_id)
    upload = importer.upload()
    await upload.add(ImportTransactionsRequest(items=[item(9)]))
    assert await importer.bring_in([item(9, account_id="other")]) == ImportOutcome(1, 0)
    assert await upload.finish() == ImportOutcome(1, 0)
    await upload.close()
    assert importer.transactions.prepared == [(1, 1)]
    assert await importer.bring_in([item(8, account_id="other")]) == ImportOutcome(1, 0)
    assert importer.transactions.prepared == [(1, 1), (1, 1)]


@only_sqlite
async def test_the_processes_end_with_the_server(importer: Importer, admin: Client) -> None:
    """When the server stops, the processes are gone, and what waits for them isn't left waiting."""
    await admin.create_account("acme")
    pids = pids_of(importer.processes)
    upload = importer.upload()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    await upload.add(ImportTransactionsRequest(items=[item(8)]))
    await importer.processes.close()
    assert not any(map(psutil.pid_exists, pids))
    assert await upload.finish() == ImportOutcome(1, 0)
    starting = PreparingProcesses(Random(3).randbytes)
    assert starting.take()
    await starting.close()
    assert not starting.are_ready


def test_the_process_ends_with_its_input() -> None:
    """Nobody has to stop the process: it ends by itself when the server is gone, by a kill -9 too."""
    ended = subprocess.run(PROGRAM, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=60, check=False)
    assert ended.returncode == 0
