"""The token bucket of each credential: which calls are admitted, and the errors of the others."""

from __future__ import annotations

import grpc
import pytest
from daybook.v1.ledger_service_pb2 import GetBalanceRequest

from server.app import serving
from server.book import Book
from server.config import Settings
from server.ledger.errors import RateLimited
from server.transport import limits
from server.transport.limits import RateLimiter
from tests.support.callers import Client, Server
from tests.support.markers import only_sqlite
from tests.support.refusals import read_refusal, refusal_of

MILLISECOND = 1_000_000
SECOND = 1000 * MILLISECOND


class Stopwatch:
    """A stopwatch that a test moves."""

    def __init__(self) -> None:
        # An arbitrary value, because a real stopwatch does not start at 0.
        self.now = 12_345_678_901_234_567

    def __call__(self) -> int:
        """Returns the nanoseconds."""
        return self.now


@pytest.fixture
def stopwatch() -> Stopwatch:
    """The stopwatch of the limiter under test."""
    return Stopwatch()


def taken(limiter: RateLimiter, credential_id: str = "one", tries: int = 1000) -> int:
    """Returns the number of consecutive calls that are admitted."""
    for count in range(tries):
        try:
            limiter.take(credential_id)
        except RateLimited:
            return count
    return tries


def wait_of(limiter: RateLimiter, credential_id: str = "one") -> float:
    """Returns the retry delay of a refused call."""
    with pytest.raises(RateLimited) as caught:
        limiter.take(credential_id)
    return caught.value.retry_seconds


@pytest.mark.parametrize(
    ("calls_per_second", "burst"), [(10, 1), (10, 5), (3, 7), (0.001, 3), (1_000_000, 500), (7.7, 99)]
)
def test_burst_is_admitted(stopwatch: Stopwatch, calls_per_second: float, burst: int) -> None:
    """An idle credential may make exactly as many calls at once as its burst."""
    assert taken(RateLimiter(calls_per_second, burst, stopwatch)) == burst


def test_token_is_refilled_exactly_on_time(stopwatch: Stopwatch) -> None:
    """At 10 calls per second, a further call is refused before and admitted after a tenth of a second."""
    limiter = RateLimiter(10, 2, stopwatch)
    assert taken(limiter) == 2
    stopwatch.now += 100 * MILLISECOND - 1
    assert taken(limiter) == 0
    stopwatch.now += 1
    assert taken(limiter) == 1


def test_bucket_is_refilled_up_to_its_burst(stopwatch: Stopwatch) -> None:
    """After any idle time, at most the burst is admitted at once."""
    limiter = RateLimiter(10, 3, stopwatch)
    assert taken(limiter) == 3
    stopwatch.now += 200 * MILLISECOND
    assert taken(limiter) == 2
    stopwatch.now += 300 * MILLISECOND
    assert taken(limiter) == 3
    stopwatch.now += 1_000_000 * SECOND
    assert taken(limiter) == 3


def test_steady_caller_is_never_refused(stopwatch: Stopwatch) -> None:
    """A caller that calls exactly at the limit is never refused, with a burst of 1."""
    limiter = RateLimiter(10, 1, stopwatch)
    for _ in range(1000):
        limiter.take("one")
        stopwatch.now += 100 * MILLISECOND


def test_refused_call_has_a_retry_delay(stopwatch: Stopwatch) -> None:
    """The retry delay is the time until the next token, after which a call is admitted."""
    limiter = RateLimiter(0.5, 1, stopwatch)
    assert taken(limiter) == 1
    assert wait_of(limiter) == 2
    stopwatch.now += 1500 * MILLISECOND
    assert wait_of(limiter) == 0.5
    stopwatch.now += 500 * MILLISECOND
    assert taken(limiter) == 1


def test_refused_calls_take_no_tokens(stopwatch: Stopwatch) -> None:
    """Repeated calls while refused do not delay the next token."""
    limiter = RateLimiter(1, 1, stopwatch)
    assert taken(limiter) == 1
    for _ in range(100):
        wait_of(limiter)
    stopwatch.now += SECOND
    assert taken(limiter) == 1


def test_stopwatch_that_goes_back_does_not_block_calls(stopwatch: Stopwatch) -> None:
    """After the stopwatch goes back by an hour a bucket is at worst empty: the next token comes on time."""
    limiter = RateLimiter(1, 5, stopwatch)
    limiter.take("one")
    stopwatch.now -= 3600 * SECOND
    assert wait_of(limiter) == 1
    stopwatch.now += SECOND
    assert taken(limiter) == 1


def test_each_credential_has_its_own_bucket(stopwatch: Stopwatch) -> None:
    """A credential that exceeds its limit does not affect another."""
    limiter = RateLimiter(1, 3, stopwatch)
    assert taken(limiter, "one") == 3
    assert taken(limiter, "other") == 3
    assert taken(limiter, "one") == 0


def test_number_of_buckets_is_limited(stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bucket of the least recent credential is evicted; active credentials keep their buckets."""
    monkeypatch.setattr(limits, "BUCKETS_MAX", 100)
    limiter = RateLimiter(1, 1, stopwatch)
    for number in range(1000):
        assert taken(limiter, f"key {number}") == 1
        assert taken(limiter, "one that calls on and on") == (number == 0)
    assert len(limiter._full_times) == 100
    assert taken(limiter, "key 999") == 0
    assert taken(limiter, "key 0") == 1


async def balance_under(settings: Settings, book: Book, client: Client, stopwatch: Stopwatch, calls: int) -> list[str]:
    """Makes calls to a server with these settings. Returns `OK` or the reason for each."""
    found = []
    async with (
        serving(book, settings, stopwatch) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        caller = Client(channel, client.key)
        for _ in range(calls):
            try:
                await caller.balance()
                found.append("OK")
            except grpc.aio.AioRpcError as error:
                found.append(read_refusal(error).reason)
    return found


@only_sqlite
async def test_server_applies_its_rate_limit(server: Server, client: Client, stopwatch: Stopwatch) -> None:
    """The server applies the rate limit of the settings; 0 means no limit."""
    await client.create_account("acme")
    strict = Settings(port=0, rate_limit_calls_per_second=0.001, rate_limit_burst=3)
    assert await balance_under(strict, server.book, client, stopwatch, 5) == ["OK"] * 3 + ["RATE_LIMITED"] * 2
    unlimited = Settings(port=0, rate_limit_calls_per_second=0, rate_limit_burst=3)
    assert await balance_under(unlimited, server.book, client, stopwatch, 5) == ["OK"] * 5


@only_sqlite
async def test_server_limits_each_key(server: Server, client: Client, admin: Client, stopwatch: Stopwatch) -> None:
    """Each key of a tenant has its own bucket, also if it is sent in another header."""
    settings = Settings(port=0, rate_limit_calls_per_second=0.001, rate_limit_burst=1)
    await client.create_account("acme")
    async with (
        serving(server.book, settings, stopwatch) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        request = GetBalanceRequest(name="accounts/acme/balance")
        for key in (client.key, admin.key):
            caller = Client(channel, key)
            await caller.balance()
            assert (await refusal_of(caller.balance())).reason == "RATE_LIMITED"
            other_header = caller.ledger.GetBalance(request, metadata=(("x-api-key", key),))
            assert (await refusal_of(other_header)).reason == "RATE_LIMITED"


@only_sqlite
async def test_refusal_has_retry_info_and_retry_after(server: Server, client: Client, stopwatch: Stopwatch) -> None:
    """A refused call gets RESOURCE_EXHAUSTED with a RetryInfo, and retry-after in whole seconds, rounded up."""
    settings = Settings(port=0, rate_limit_calls_per_second=0.4, rate_limit_burst=1)
    await client.create_account("acme")
    async with (
        serving(server.book, settings, stopwatch) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        caller = Client(channel, client.key)
        await caller.balance()
        for elapsed, wait, retry_after in ((0, 2500, "3"), (500, 2000, "2"), (1900, 100, "1")):
            stopwatch.now += elapsed * MILLISECOND
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await caller.balance()
            refusal = read_refusal(caught.value)
            assert refusal.verdict == ("RESOURCE_EXHAUSTED", "RATE_LIMITED")
            assert refusal.retry_delay is not None
            assert refusal.retry_delay.ToMilliseconds() == wait
            assert dict(caught.value.trailing_metadata())["retry-after"] == retry_after
        stopwatch.now += 100 * MILLISECOND
        await caller.balance()


@only_sqlite
async def test_credential_is_checked_before_the_rate_limit(
    server: Server, client: Client, stopwatch: Stopwatch
) -> None:
    """A call with an invalid credential does not count; an invalid request counts, and is checked last."""
    settings = Settings(port=0, rate_limit_calls_per_second=0.001, rate_limit_burst=1)
    async with (
        serving(server.book, settings, stopwatch) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        stranger, caller = Client(channel, f"{client.key}x"), Client(channel, client.key)
        for _ in range(3):
            assert (await refusal_of(stranger.balance())).reason == "CREDENTIAL_INVALID"
        wrong = caller.ledger.GetBalance(GetBalanceRequest(name="?"), metadata=caller.metadata)
        assert (await refusal_of(wrong)).reason == "FIELD_INVALID"
        wrong = caller.ledger.GetBalance(GetBalanceRequest(name="?"), metadata=caller.metadata)
        assert (await refusal_of(wrong)).reason == "RATE_LIMITED"
        assert (await refusal_of(stranger.balance())).reason == "CREDENTIAL_INVALID"


@pytest.mark.parametrize("value", [-1, 0.0009, 1e-300, 1_000_001, float("nan"), float("inf")])
def test_invalid_rate_is_refused(value: float) -> None:
    """A rate outside the bounds of the setting is refused."""
    with pytest.raises(ValueError, match="rate_limit_calls_per_second"):
        Settings(rate_limit_calls_per_second=value)


@pytest.mark.parametrize("value", [0, -1, 10_000_001])
def test_invalid_burst_is_refused(value: int) -> None:
    """A burst outside the bounds of the setting is refused."""
    with pytest.raises(ValueError, match="rate_limit_burst"):
        Settings(rate_limit_burst=value)
