"""Skewed clocks: none is used for a posting, and an account's newest time never affects another account's credits."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from daybook.v1.account_pb2 import Account
from daybook.v1.admin_service_pb2 import (
    CreateApiKeyRequest,
    ImportTransactionsRequest,
    ListApiKeysRequest,
    RevokeApiKeyRequest,
    RotateApiKeyRequest,
)
from daybook.v1.api_key_pb2 import ApiKey
from daybook.v1.ledger_service_pb2 import (
    BatchCreateTransactionsRequest,
    CreateTransactionRequest,
    RefundTransactionRequest,
    UpdateAccountRequest,
)
from daybook.v1.transaction_pb2 import Transaction, Usage
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from server.app import serving
from server.book import open_book, system_clock
from server.config import Settings
from server.ledger.errors import ClockSkewed
from server.ledger.instants import SECOND, Instant, from_timestamp, parse, to_timestamp
from server.ledger.names import RandomBytes
from server.transport import readiness
from tests.support.callers import Client, Server
from tests.support.clock import NOON, Clock, after
from tests.support.databases import database_occupied
from tests.support.gateways import gateway_before
from tests.support.http_client import Answer, send
from tests.support.markers import only_sqlite
from tests.support.refusals import refusal_of

GRANT, CHARGE, EXPIRATION = Transaction.GRANT, Transaction.CHARGE, Transaction.EXPIRATION
HOUR_SECONDS = 3600
TWO_DAYS_SECONDS = 2 * 24 * HOUR_SECONDS
YEAR_SECONDS = 365 * 24 * HOUR_SECONDS


@pytest.fixture
async def ahead(client: Client, clock: Clock) -> Client:
    """`a` holds 100 credits that expire in an hour and 10 permanent ones; `b` got 1 with the clock two days ahead."""
    for account_id in ("a", "b", "c"):
        await client.create_account(account_id)
    await client.post("a", GRANT, "100", expire_time=after(HOUR_SECONDS))
    await client.post("a", GRANT, "10")
    clock.advance(TWO_DAYS_SECONDS)
    await client.post("b", GRANT, "1")
    clock.advance(-TWO_DAYS_SECONDS)
    return client


async def test_transfer_with_an_account_ahead_expires_nothing(ahead: Client, admin: Client) -> None:
    """Transfers to and from an account whose newest transaction is two days ahead lose no credits."""
    clock_time = after(0)
    sides = await ahead.transfer("a", "b", "5")
    assert (sides.outgoing.balance_after, sides.outgoing.create_time) == ("105", clock_time)
    # The times of `b` stay in order: it repeats its newest create_time until the clock has passed it.
    assert (sides.incoming.balance_after, sides.incoming.create_time) == ("6", after(TWO_DAYS_SECONDS))
    sides = await ahead.transfer("a", "c", "5")
    assert (sides.outgoing.balance_after, sides.outgoing.create_time) == ("100", clock_time)
    assert (sides.incoming.balance_after, sides.incoming.create_time) == ("5", clock_time)
    sides = await ahead.transfer("b", "c", "6")
    assert (sides.outgoing.balance_after, sides.outgoing.create_time) == ("0", after(TWO_DAYS_SECONDS))
    assert (sides.incoming.balance_after, sides.incoming.create_time) == ("11", clock_time)
    assert not [row for row in await ahead.history("-") if row.kind == EXPIRATION]
    assert await admin.verify() == []


async def test_credits_of_an_account_ahead_are_usable(ahead: Client, admin: Client, clock: Clock) -> None:
    """Credits of an account with a future create_time are usable, and expire by the clock."""
    # Credits that expire before the account's newest create_time can be granted, held and spent.
    await ahead.post("b", GRANT, "7", expire_time=after(HOUR_SECONDS))
    granted = await ahead.post("b", GRANT, "2", ttl={"seconds": 600})
    assert granted.expire_time == after(600)
    held = await ahead.balance("b")
    assert (held.amount, held.expiring_amount, held.read_time) == ("10", "9", after(0))
    charge = await ahead.post("b", CHARGE, "-3")
    assert (charge.create_time, charge.balance_after) == (after(TWO_DAYS_SECONDS), "7")
    assert [lot.remaining_amount for lot in await ahead.lots("b")] == ["1", "6", "0"]
    # Credits expire by the clock, and the expiration's create_time keeps the account's order.
    clock.advance(HOUR_SECONDS)
    assert (await ahead.balance("b")).amount == "1"
    assert (await ahead.post("b", GRANT, "1")).balance_after == "2"
    expired = [row for row in await ahead.history("b") if row.kind == EXPIRATION]
    assert [(row.amount, row.create_time) for row in expired] == [("-6", after(TWO_DAYS_SECONDS))]
    clock.advance(TWO_DAYS_SECONDS)
    assert (await ahead.post("b", CHARGE, "-2")).create_time == after(TWO_DAYS_SECONDS + HOUR_SECONDS)
    assert await admin.verify() == []


async def test_account_ahead_is_logged_once(ahead: Client, clock: Clock) -> None:
    """An account that is ahead is logged once, with its lead; again only after the clock has passed it."""

    def leads(logs: list[Any]) -> list[float]:
        return [line["ahead_seconds"] for line in logs if line["event"] == "account ahead of clock"]

    with capture_logs() as logs:
        await ahead.post("a", GRANT, "1")
        assert leads(logs) == []
        for account_id in ("b", "a", "b"):
            await ahead.post(account_id, GRANT, "1")
        assert leads(logs) == [TWO_DAYS_SECONDS]
        clock.advance(TWO_DAYS_SECONDS + 61)
        await ahead.post("a", GRANT, "1")
        clock.advance(-61)
        await ahead.post("a", GRANT, "1")
        assert leads(logs) == [TWO_DAYS_SECONDS, 61]
        clock.advance(1)
        await ahead.post("a", GRANT, "1")
        assert leads(logs) == [TWO_DAYS_SECONDS, 61]


async def test_refund_on_an_account_ahead(ahead: Client, admin: Client, clock: Clock) -> None:
    """Credits that expired after their charge return with the lifetime they had left, by the clock, at the charge."""
    await ahead.post("b", GRANT, "7", expire_time=after(HOUR_SECONDS))
    charge = await ahead.post("b", CHARGE, "-3")
    clock.advance(2 * HOUR_SECONDS)
    request = RefundTransactionRequest(name=charge.name)
    refund = await ahead.ledger.RefundTransaction(request, metadata=ahead.metadata)
    assert (refund.balance_after, refund.expiring_amount) == ("4", "3")
    assert (await ahead.lots("b"))[-1].expire_time == after(3 * HOUR_SECONDS)
    clock.advance(HOUR_SECONDS - 1)
    assert (await ahead.balance("b")).amount == "4"
    clock.advance(1)
    assert (await ahead.balance("b")).amount == "1"
    assert await admin.verify() == []


async def test_expire_time_is_compared_with_the_clock(ahead: Client) -> None:
    """An expire_time is compared with the clock, not with the account's newest create_time."""
    refusal = await refusal_of(ahead.post("b", GRANT, "1", expire_time=after(0)))
    assert refusal.fields == ("transaction.expire_time",)
    assert (await ahead.post("b", GRANT, "1", expire_time=after(0.000001))).balance_after == "2"


async def test_sweep_expires_by_the_clock(server: Server, ahead: Client, admin: Client, clock: Clock) -> None:
    """The sweep expires everything that is due by the clock, on every account, and nothing else."""
    await ahead.post("b", GRANT, "7", expire_time=after(HOUR_SECONDS))
    assert await server.book.expirations.sweep() == 0
    clock.advance(HOUR_SECONDS)
    assert await server.book.expirations.sweep() == 2
    assert [(await ahead.balance(name)).amount for name in "abc"] == ["10", "1", "0"]
    times = [from_timestamp(row.create_time) for row in await ahead.history("b")]
    assert times == sorted(times)
    assert await admin.verify() == []


async def test_import_with_the_clock_ahead_delays_no_sweep(server: Server, admin: Client, clock: Clock) -> None:
    """An import while the clock was ahead doesn't delay the account's next sweep."""
    await admin.create_account("acme")
    clock.advance(TWO_DAYS_SECONDS)
    transaction = Transaction(kind=GRANT, amount="5", category="test", expire_time=after(60))
    item = ImportTransactionsRequest.Item(parent="accounts/acme", transaction=transaction, create_time=after(-60))
    call = admin.admin.ImportTransactions(iter([ImportTransactionsRequest(items=[item])]), metadata=admin.metadata)
    assert (await call).imported_count == 1
    clock.advance(60 - TWO_DAYS_SECONDS)
    assert await server.book.expirations.sweep() == 1
    assert [(row.amount, row.create_time) for row in await admin.history("acme")] == [
        ("5", after(-60)),
        ("-5", after(60)),
    ]


async def post_each_kind(client: Client, number: int) -> None:
    """Posts a grant, a usage charge, its refund, a transfer and a batch, of accounts `a` and `b`."""
    await client.post("a", GRANT, "10", ttl={"seconds": 600})
    charge = await client.post("a", CHARGE, "-2", category="computing", usage=Usage(model="m"))
    await client.ledger.RefundTransaction(
        RefundTransactionRequest(name=charge.name, request_id=f"refund {number}"), metadata=client.metadata
    )
    await client.transfer("a", "b", "1")
    grant = Transaction(kind=GRANT, amount="1", category="test")
    requests = [CreateTransactionRequest(parent=f"accounts/{account}", transaction=grant) for account in "ab"]
    await client.ledger.BatchCreateTransactions(
        BatchCreateTransactionsRequest(parent="accounts/-", requests=requests), metadata=client.metadata
    )


async def check_order(client: Client) -> None:
    """Checks that create_time never decreases within an account."""
    for account_id in "ab":
        times = [from_timestamp(row.create_time) for row in await client.history(account_id)]
        assert times == sorted(times)


async def test_clock_an_hour_back_refuses_and_expires_nothing(client: Client, admin: Client, clock: Clock) -> None:
    """After a step back by an hour each kind of posting succeeds, and credits last until the clock says so."""
    for account_id in "ab":
        await client.create_account(account_id)
    await client.post("a", GRANT, "100", expire_time=after(HOUR_SECONDS / 2), priority=1)
    await post_each_kind(client, 0)
    clock.advance(-HOUR_SECONDS)
    for number in range(1, 4):
        await post_each_kind(client, number)
        await client.create_account(f"new-{number}")
        clock.advance(1)
    assert not [row for row in await client.history("-") if row.kind == EXPIRATION]
    clock.now = NOON + (HOUR_SECONDS // 2 * SECOND) - 1
    assert "100" in {lot.remaining_amount for lot in await client.lots("a")}
    assert float((await client.balance("a")).amount) > 100
    clock.now += 1
    assert float((await client.balance("a")).amount) < 100
    await post_each_kind(client, 4)
    assert "-100" in {row.amount for row in await client.history("a") if row.kind == EXPIRATION}
    await check_order(client)
    assert await admin.verify() == []


@pytest.mark.parametrize("end_seconds", [0, 1], ids=["59 twice", "00 twice"])
async def test_leap_second_refuses_and_expires_nothing(
    server: Server, client: Client, admin: Client, clock: Clock, end_seconds: int
) -> None:
    """While the clock repeats the second before or after midnight, every posting succeeds, and no lot expires."""
    end = parse("2016-12-31T00:00:00Z") + end_seconds * SECOND
    clock.now = end - 10 * SECOND
    for account_id in "ab":
        await client.create_account(account_id)
    await client.post("a", GRANT, "100", expire_time=to_timestamp(end), priority=1)
    for number, seconds in enumerate((-0.9, -0.1, -1, -0.5, -0.000001)):
        clock.now = end + round(seconds * SECOND)
        await post_each_kind(client, number)
        assert await server.book.expirations.sweep() == 0
        assert "100" in {lot.remaining_amount for lot in await client.lots("a")}
    clock.now = end
    assert await server.book.expirations.sweep() == 1
    await check_order(client)
    assert await admin.verify() == []


@dataclass
class WallClock:
    """The system clock plus an offset that a test sets."""

    offset: Instant = 0

    def __call__(self) -> Instant:
        """The current time, with the offset."""
        return system_clock() + self.offset


@dataclass
class Checked:
    """A server that checks its clock, and its callers."""

    server: Server
    port: int
    clock: WallClock
    client: Client
    admin: Client


@pytest.fixture
async def checked(
    database_url: str, random_bytes: RandomBytes, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Checked]:
    """A server that tolerates a clock skew of five seconds, with 10 credits in `a` and 1 in `b`."""
    # Tests wait for health to change.
    monkeypatch.setattr(readiness, "CHECK_SECONDS", 0.1)
    clock = WallClock()
    async with (
        open_book(database_url, clock, random_bytes, clock_skew_max=5 * SECOND) as book,
        serving(book, Settings(port=0, shutdown_grace_seconds=1)) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        server = Server(book, channel)
        tenant = await server.create_tenant("house")
        client, admin = await server.client(tenant), await server.client(tenant, scopes={"admin"})
        for account_id, amount in (("a", "10"), ("b", "1")):
            await client.create_account(account_id)
            await client.post(account_id, GRANT, amount)
        await client.create_account("past")
        yield Checked(server, port, clock, client, admin)


async def until_health_is(channel: grpc.aio.Channel, status: object) -> None:
    """Returns once the health service reports this status of the ledger."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    call = stub.Watch(health_pb2.HealthCheckRequest(service="daybook.v1.Ledger"))
    async with asyncio.timeout(30):
        async for answer in call:
            if answer.status == status:
                break
    call.cancel()


def writes(checked: Checked, charge: Transaction, key: ApiKey) -> dict[str, Callable[[], Awaitable[object]]]:
    """Every call that stores a time."""
    client, admin = checked.client, checked.admin
    grant = CreateTransactionRequest(
        parent="accounts/a", transaction=Transaction(kind=GRANT, amount="1", category="test")
    )
    item = ImportTransactionsRequest.Item(
        parent="accounts/past", transaction=grant.transaction, create_time=to_timestamp(system_clock())
    )
    return {
        "post": lambda: client.post("a", GRANT, "1"),
        "transfer": lambda: client.transfer("a", "b", "1"),
        "refund": lambda: client.ledger.RefundTransaction(
            RefundTransactionRequest(name=charge.name), metadata=client.metadata
        ),
        "batch": lambda: client.ledger.BatchCreateTransactions(
            BatchCreateTransactionsRequest(parent="accounts/a", requests=[grant]), metadata=client.metadata
        ),
        "import": lambda: admin.admin.ImportTransactions(
            iter([ImportTransactionsRequest(items=[item])]), metadata=admin.metadata
        ),
        "create account": lambda: client.create_account("c"),
        "update account": lambda: client.ledger.UpdateAccount(
            UpdateAccountRequest(account=Account(name="accounts/a", display_name="A")), metadata=client.metadata
        ),
        "create key": lambda: admin.admin.CreateApiKey(
            CreateApiKeyRequest(api_key=ApiKey(scopes=["accounts"])), metadata=admin.metadata
        ),
        "rotate key": lambda: admin.admin.RotateApiKey(RotateApiKeyRequest(name=key.name), metadata=admin.metadata),
    }


@pytest.mark.parametrize("jump_seconds", [TWO_DAYS_SECONDS, -TWO_DAYS_SECONDS, -HOUR_SECONDS])
async def test_skewed_clock_posts_nothing(checked: Checked, jump_seconds: int) -> None:
    """While the clock is wrong, calls that store a time are refused and all others work; then all work again."""
    client, admin = checked.client, checked.admin
    charge = await client.post("a", CHARGE, "-1")
    created = await admin.admin.CreateApiKey(
        CreateApiKeyRequest(api_key=ApiKey(scopes=["accounts"])), metadata=admin.metadata
    )
    rows, held = await client.history("-"), await client.balance("a")
    calls = writes(checked, charge, created.api_key)

    checked.clock.offset = jump_seconds * SECOND
    for name, call in calls.items():
        refusal = await refusal_of(call())
        assert refusal.verdict == ("UNAVAILABLE", "CLOCK_SKEWED"), name
        assert refusal.retry_delay == Duration(seconds=5)
        skew = re.match(r"the server's clock is ([0-9.]+) s (ahead of|behind) its reference", refusal.message)
        assert skew is not None
        assert abs(float(skew[1]) - abs(jump_seconds)) < 1
        assert skew[2] == ("ahead of" if jump_seconds > 0 else "behind")
    with pytest.raises(ClockSkewed):
        await checked.server.book.expirations.sweep()
    held_now = await client.balance("a")
    held_now.read_time.CopyFrom(held.read_time)
    assert (await client.history("-"), held_now) == (rows, held)
    await until_health_is(checked.server.channel, health_pb2.HealthCheckResponse.NOT_SERVING)
    # A leaked secret can be revoked, whatever the clock says.
    revoked = await admin.admin.RevokeApiKey(RevokeApiKeyRequest(name=created.api_key.name), metadata=admin.metadata)
    assert revoked.HasField("revoke_time")

    checked.clock.offset = 0
    await until_health_is(checked.server.channel, health_pb2.HealthCheckResponse.SERVING)
    for name, call in calls.items():
        if name != "rotate key":
            await call()
    times = [from_timestamp(row.create_time) for row in await client.history("-")]
    assert max(times) <= system_clock()
    assert len((await admin.admin.ListApiKeys(ListApiKeysRequest(), metadata=admin.metadata)).api_keys) == 4
    assert await admin.verify() == []


async def test_queued_call_is_refused_after_a_clock_jump(checked: Checked) -> None:
    """The clock at the commit counts: a call that is queued while the clock jumps is refused."""
    book = checked.server.book
    async with database_occupied(book), asyncio.timeout(30):
        # The poster takes the first and waits for the database; the second stays in the queue.
        postings = [asyncio.create_task(checked.client.post("a", GRANT, "1", request_id="first"))]
        while not any(use.waiting for use in book.database.pools.values()):
            await asyncio.sleep(0.01)
        postings.append(asyncio.create_task(checked.client.post("a", GRANT, "1", request_id="waits")))
        while not book.poster.queue_length:
            await asyncio.sleep(0.01)
        checked.clock.offset = TWO_DAYS_SECONDS * SECOND
    for posting in postings:
        assert (await refusal_of(posting)).verdict == ("UNAVAILABLE", "CLOCK_SKEWED")
    checked.clock.offset = 0
    assert (await checked.client.post("a", GRANT, "1", request_id="waits")).balance_after == "11"


async def test_clock_a_year_ahead_expires_nothing(checked: Checked) -> None:
    """While the clock is a year ahead and after it, no credit and no key expires, and no key was used in the future."""
    client, admin = checked.client, checked.admin
    in_an_hour = to_timestamp(system_clock() + HOUR_SECONDS * SECOND)
    await client.post("a", GRANT, "5", expire_time=in_an_hour)
    request = CreateApiKeyRequest(api_key=ApiKey(scopes=["accounts"], expire_time=in_an_hour))
    created = await admin.admin.CreateApiKey(request, metadata=admin.metadata)
    holder = Client(client.channel, created.key_string)

    checked.clock.offset = YEAR_SECONDS * SECOND
    assert (await refusal_of(client.post("a", CHARGE, "-1"))).verdict == ("UNAVAILABLE", "CLOCK_SKEWED")
    # The key is read anew, and then found in the cache.
    for _ in range(2):
        held = await holder.balance("a")
        assert (held.amount, held.expiring_amount) == ("15", "5")
        assert abs(from_timestamp(held.read_time) - system_clock()) < 5 * SECOND
    assert [lot.remaining_amount for lot in await client.lots("a")] == ["10", "5"]
    with pytest.raises(ClockSkewed):
        await checked.server.book.expirations.sweep()
    await checked.server.book.api_key_uses.flush()

    checked.clock.offset = 0
    assert (await holder.balance("a")).amount == "15"
    assert (await client.post("a", CHARGE, "-1")).balance_after == "14"
    assert [lot.remaining_amount for lot in await client.lots("a")] == ["10", "4"]
    assert not [row for row in await client.history("-") if row.kind == EXPIRATION]
    await check_order(client)
    await checked.server.book.api_key_uses.flush()
    keys = (await admin.admin.ListApiKeys(ListApiKeysRequest(), metadata=admin.metadata)).api_keys
    assert max(from_timestamp(key.last_use_time) for key in keys) <= system_clock()
    assert await admin.verify() == []


async def test_small_skew_is_accepted(checked: Checked) -> None:
    """Servers whose clocks differ by less than the bound can post, and each account's times stay in order."""
    for offset_seconds in (4, -4, 0):
        checked.clock.offset = offset_seconds * SECOND
        await checked.client.transfer("a", "b", "1")
    for account_id, balance in (("a", "7"), ("b", "4")):
        times = [from_timestamp(row.create_time) for row in await checked.client.history(account_id)]
        assert times == sorted(times)
        assert (await checked.client.balance(account_id)).amount == balance
    assert await checked.admin.verify() == []


@only_sqlite
async def test_skewed_clock_over_rest(checked: Checked, tmp_path: Path) -> None:
    """A posting gets 503 with Retry-After; a vendor's list works, though no server is ready."""
    key = {"authorization": f"Bearer {checked.client.key}"}
    body = {"kind": "GRANT", "amount": "1", "category": "test"}

    async def ask(origin: str, path: str, body: object = None) -> Answer:
        method, content = ("GET", b"") if body is None else ("POST", json.dumps(body).encode())
        headers = key if body is None else {**key, "content-type": "application/json"}
        return await asyncio.to_thread(partial(send, origin, path, method=method, headers=headers, body=content))

    async def until_ready_is(origin: str, status: int) -> None:
        async with asyncio.timeout(30):
            while (await ask(origin, "/readyz")).status != status:
                await asyncio.sleep(0.02)

    with gateway_before(tmp_path, checked.port) as origin:
        await until_ready_is(origin, 200)
        checked.clock.offset = TWO_DAYS_SECONDS * SECOND
        refused = await ask(origin, "/v1/accounts/a/transactions", body)
        error: Any = refused.json()
        assert (refused.status, error["details"][0]["reason"]) == (503, "CLOCK_SKEWED")
        assert refused.header("retry-after") == "5"
        await until_ready_is(origin, 503)
        held: Any = (await ask(origin, "/v1/accounts/a/balance")).json()
        assert held["amount"] == "10"
        assert (await ask(origin, "/api/v1/org/a/credits/transactions")).status == 200
        checked.clock.offset = 0
        await until_ready_is(origin, 200)
        posted: Any = (await ask(origin, "/v1/accounts/a/transactions", body)).json()
        assert posted["balanceAfter"] == "11"
