"""Retries: only if a call can't take effect twice, with the same request_id, as the server asks, until the deadline."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from daybook_client import AccountKind, AsyncDaybook, Daybook, DaybookError, NewTransaction, Retry, TransactionKind
from daybook_client.errors import Cancelled, DeadlineExceeded, RateLimited, TimedOut, Unavailable
from tests.support.processes import free_port
from tests.support.python_clients import ServedLedger
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import SECONDS_MAX, wait_until

CHARGE = NewTransaction(TransactionKind.CHARGE, "inference", -1)
Opened = Callable[..., Any]


class Ids:
    """A source of request_ids that remembers them."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def __call__(self) -> str:
        """Makes one."""
        self.made.append(f"id-{uuid.uuid4()}")
        return self.made[-1]


class Sleep:
    """Sleeps in no time, and remembers for how long it was called. Suits both clients."""

    def __init__(self, *, is_real: bool = False) -> None:
        self.delays: list[float] = []
        self.is_real = is_real

    def __call__(self, seconds: float) -> Any:
        """Sleeps, or returns a coroutine that does."""
        self.delays.append(seconds)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return time.sleep(seconds if self.is_real else 0)
        return asyncio.sleep(seconds if self.is_real else 0)


@pytest.fixture
def ids() -> Ids:
    """The source of request_ids of a test."""
    return Ids()


@contextmanager
def in_background(call: Callable[..., Any], *arguments: Any, **named: Any) -> Iterator[Callable[[], Any]]:
    """Makes a call in another thread; yields a function that waits for its result."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call, *arguments, **named)
        yield lambda: future.result(SECONDS_MAX)


def charges(direct: Daybook, account: str) -> list[str]:
    """Returns the request_ids of the charges of an account."""
    return [each.request_id for each in direct.list_transactions(account, filter="kind = CHARGE")]


def test_lost_answer_posts_once(
    ledger: ServedLedger, proxy: TcpProxy, opened: Opened, direct: Daybook, account: str, ids: Ids
) -> None:
    """If the connection breaks after the posting, the call is repeated with its request_id and returns the posting."""
    client = opened(f"127.0.0.1:{proxy.port}", key=ledger.key, new_request_id=ids)
    client.get_account(account)
    proxy.withhold_answers()
    with in_background(client.create_transaction, account, CHARGE) as result:
        wait_until(lambda: bool(charges(direct, account)), "the charge is posted")
        proxy.cut()
        assert result().request_id == ids.made[0]
    assert charges(direct, account) == ids.made


def test_given_request_id_is_kept(client: Any, direct: Daybook, account: str) -> None:
    """A call with the caller's own request_id returns the first answer again."""
    first, second = (client.create_transaction(account, CHARGE, request_id="invoice-7") for _ in range(2))
    assert first == second
    assert charges(direct, account) == ["invoice-7"]


def test_lost_answer_of_a_new_key_is_not_repeated(
    ledger: ServedLedger, proxy: TcpProxy, opened: Opened, direct: Daybook
) -> None:
    """A key whose answer is lost is created once, because its call takes no request_id."""
    client = opened(f"127.0.0.1:{proxy.port}", key=ledger.key)
    client.list_accounts().page()
    name = str(uuid.uuid4())
    proxy.withhold_answers()

    def made() -> int:
        return sum(each.display_name == name for each in direct.list_api_keys())

    with in_background(client.create_api_key, ["accounts"], display_name=name) as result:
        wait_until(lambda: made() == 1, "the key is created")
        proxy.cut()
        with pytest.raises(Unavailable):
            result()
    assert made() == 1


def test_list_survives_a_broken_connection(
    ledger: ServedLedger, proxy: TcpProxy, opened: Opened, direct: Daybook, account: str
) -> None:
    """A list whose connection breaks between two pages returns each item once."""
    for _ in range(5):
        direct.create_transaction(account, CHARGE)
    client = opened(f"127.0.0.1:{proxy.port}", key=ledger.key)
    sequences = []
    for transaction in client.list_transactions(account, page_size=2):
        sequences.append(transaction.sequence)
        proxy.cut()
    assert sequences == [6, 5, 4, 3, 2, 1]


@pytest.fixture
def own_ledger(tmp_path: Path) -> Iterator[ServedLedger]:
    """A server that a test may end."""
    started = ServedLedger.start(tmp_path, shutdown_grace_seconds=0)
    yield started
    started.daybook.kill()


def with_account(ledger: ServedLedger) -> str:
    """Creates an account with 10 credits; returns its name."""
    with ledger.client() as client:
        name = client.create_account("acme", AccountKind.USER).name
        client.create_transaction(name, NewTransaction(TransactionKind.GRANT, "purchase", 10))
        return name


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_call_in_a_server_that_ends_is_repeated_in_the_next(
    own_ledger: ServedLedger, opened: Opened, number: signal.Signals, ids: Ids
) -> None:
    """A posting that is running when the server is killed, or stops and cancels it, is posted once by the next one."""
    account = with_account(own_ledger)
    sleep = Sleep(is_real=True)
    retry = Retry(attempts_max=1000)
    client = opened(own_ledger.address, key=own_ledger.key, new_request_id=ids, retry=retry, sleep=sleep)
    client.get_account(account)
    other = sqlite3.connect(own_ledger.folder / "daybook.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with in_background(client.create_transaction, account, CHARGE) as result:
        wait_until(lambda: bool(ids.made), "the call is made")
        own_ledger.daybook.process.send_signal(number)
        wait_until(lambda: bool(sleep.delays), "the call has failed")
        other.execute("ROLLBACK")
        other.close()
        own_ledger.daybook.process.wait(SECONDS_MAX)
        own_ledger.start_again()
        assert result().balance_after == 9
    with own_ledger.client() as direct:
        assert charges(direct, account) == ids.made


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedLedger]:
    """A server with a rate limit of one call in 2 seconds."""
    folder = tmp_path_factory.mktemp("limited")
    started = ServedLedger.start(folder, rate_limit_calls_per_second=0.5, rate_limit_burst=1)
    yield started
    assert started.daybook.stop() == 0


def test_retry_waits_as_long_as_the_server_says(limited: ServedLedger, opened: Opened) -> None:
    """A call beyond the rate limit is repeated after the delay of RetryInfo, and succeeds."""
    sleep = Sleep(is_real=True)
    client = opened(limited.address, key=limited.key, sleep=sleep, random=lambda: 0.0)
    for _ in range(2):
        client.list_accounts().page()
    assert sleep.delays
    assert sleep.delays == [pytest.approx(1.5, abs=0.5)] * len(sleep.delays)
    hasty = opened(limited.address, key=limited.key, retry=Retry(attempts_max=1))
    with pytest.raises(RateLimited) as limit:
        hasty.list_accounts().page()
    assert limit.value.retry_delay is not None
    assert 0 < limit.value.retry_delay.total_seconds() <= 2


def test_delay_beyond_the_deadline_fails_at_once(limited: ServedLedger, opened: Opened) -> None:
    """A call is not repeated if the server asks for a longer delay than the deadline leaves."""
    sleep = Sleep()
    opened(limited.address, key=limited.key).list_accounts().page()
    client = opened(limited.address, key=limited.key, sleep=sleep, timeout=0.2)
    with pytest.raises(RateLimited):
        client.list_accounts().page()
    assert sleep.delays == []


def test_delays_grow_up_to_a_bound(opened: Opened) -> None:
    """Without a server, the delays double up to their bound, each times a random factor, until the last attempt."""
    sleep, factors = Sleep(), iter([1, 0.5] * 5)
    client = opened(f"127.0.0.1:{free_port()}", key="x", sleep=sleep, random=lambda: next(factors))
    with pytest.raises(Unavailable, match="refused") as failed:
        client.get_account("accounts/acme")
    assert failed.value.reason == ""
    assert sleep.delays == pytest.approx([0.1, 0.1, 0.4, 0.4, 1.6, 1.6, 5, 2.5, 5])


def test_deadline_bounds_all_attempts(opened: Opened) -> None:
    """Without a server, a call fails before the sum of its delays exceeds the deadline."""
    now, delays = [0.0], []

    def sleep(seconds: float) -> Any:
        now[0] += seconds
        delays.append(seconds)
        return Sleep()(seconds)

    client = opened(
        f"127.0.0.1:{free_port()}", key="x", sleep=sleep, random=lambda: 1.0, clock=lambda: now[0], timeout=1
    )
    with pytest.raises(Unavailable):
        client.get_account("accounts/acme")
    assert delays == [0.1, 0.2, 0.4]


@pytest.mark.parametrize("settings", [{"client": 0.3}, {"call": 0.3}])
def test_silent_server_ends_the_call_at_its_deadline(
    ledger: ServedLedger,
    proxy: TcpProxy,
    opened: Opened,
    direct: Daybook,
    account: str,
    settings: dict[str, float],
) -> None:
    """Without an answer, a call fails at the deadline of the client or the call, with the request_id to repeat it."""
    client = opened(f"127.0.0.1:{proxy.port}", key=ledger.key, timeout=settings.get("client", SECONDS_MAX))
    client.get_account(account, timeout=SECONDS_MAX)
    proxy.withhold_answers()
    with pytest.raises(DeadlineExceeded) as late:
        client.create_transaction(account, CHARGE, timeout=settings.get("call"))
    assert (late.value.reason, len(late.value.request_id)) == ("", 36)
    proxy.cut()
    repeated = client.create_transaction(account, CHARGE, request_id=late.value.request_id, timeout=SECONDS_MAX)
    assert charges(direct, account) == [repeated.request_id]


def test_time_limit_of_the_server_is_retried(tmp_path: Path, opened: Opened) -> None:
    """A call that exceeds the server's time limit is repeated with its request_id while its own deadline lasts."""
    ledger = ServedLedger.start(tmp_path, call_seconds_max=0.5)
    account = with_account(ledger)
    other = sqlite3.connect(tmp_path / "daybook.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    sleep = Sleep()

    def release(seconds: float) -> Any:
        if other.in_transaction:
            other.execute("ROLLBACK")
        return sleep(seconds)

    client = opened(ledger.address, key=ledger.key, sleep=release)
    assert client.create_transaction(account, CHARGE).balance_after == 9
    assert sleep.delays
    other.execute("BEGIN IMMEDIATE")
    hasty = opened(ledger.address, key=ledger.key, retry=Retry(attempts_max=1))
    with pytest.raises(TimedOut):
        hasty.create_transaction(account, CHARGE)
    other.execute("ROLLBACK")
    other.close()
    assert ledger.daybook.stop() == 0


@pytest.mark.parametrize("bad", [NewTransaction(TransactionKind.CHARGE, "inference", -11), CHARGE])
def test_refusal_is_not_retried(ledger: ServedLedger, opened: Opened, account: str, bad: NewTransaction) -> None:
    """A call that the ledger refuses is made once."""
    sleep = Sleep()
    client = opened(ledger.address, key=ledger.key, sleep=sleep)
    with pytest.raises(DaybookError):
        client.create_transaction(account if bad is not CHARGE else "accounts/unknown", bad)
    assert sleep.delays == []


def test_closing_ends_a_call_without_a_retry(
    ledger: ServedLedger, proxy: TcpProxy, direct: Daybook, account: str
) -> None:
    """A call that another thread ends by closing the client fails with Cancelled, and is not repeated."""
    sleep = Sleep()
    client = Daybook(f"127.0.0.1:{proxy.port}", key=ledger.key, sleep=sleep)
    client.get_account(account)
    proxy.withhold_answers()
    with in_background(client.create_transaction, account, CHARGE) as result:
        wait_until(lambda: bool(charges(direct, account)), "the charge is posted")
        client.close()
        with pytest.raises(Cancelled):
            result()
    assert sleep.delays == []


async def test_cancelled_task_ends_its_call(
    ledger: ServedLedger, proxy: TcpProxy, direct: Daybook, account: str
) -> None:
    """A cancelled task raises CancelledError, and its call is not repeated."""
    sleep = Sleep()
    async with AsyncDaybook(f"127.0.0.1:{proxy.port}", key=ledger.key, sleep=sleep) as client:
        await client.get_account(account)
        proxy.withhold_answers()
        running = asyncio.create_task(client.create_transaction(account, CHARGE))
        await asyncio.to_thread(wait_until, lambda: bool(charges(direct, account)), "the charge is posted")
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert sleep.delays == []


def test_threads_share_a_client(ledger: ServedLedger, account: str) -> None:
    """Calls of eight threads through one client all succeed, each with its own request_id."""
    with ledger.client() as client, ThreadPoolExecutor(8) as pool:
        small = NewTransaction(TransactionKind.CHARGE, "inference", "-0.01")
        posted = list(pool.map(lambda _: client.create_transaction(account, small), range(200)))
        assert len({each.request_id for each in posted}) == len({each.sequence for each in posted}) == 200
        assert client.get_balance(account).amount == 8


async def test_tasks_share_a_client(ledger: ServedLedger, account: str) -> None:
    """Concurrent calls of tasks through one client all succeed, each with its own request_id."""
    small = NewTransaction(TransactionKind.CHARGE, "inference", "-0.01")
    async with AsyncDaybook(ledger.address, key=ledger.key) as client:
        posted = await asyncio.gather(*(client.create_transaction(account, small) for _ in range(200)))
        assert len({each.request_id for each in posted}) == len({each.sequence for each in posted}) == 200
