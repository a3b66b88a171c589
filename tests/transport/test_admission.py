"""Admission: how credentials share the limit of running calls, and how calls wait in the queue."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.transport.admission import Admission


@pytest.mark.parametrize(("places", "most"), [(1, 1), (2, 1), (3, 2), (8, 4), (1000, 500)])
def test_single_credential_gets_half_of_the_places(places: int, most: int) -> None:
    """If only one credential calls, it gets half of all places, and at least one."""
    admission = Admission(places)
    assert [admission.enter("a") for _ in range(places)] == [True] * most + [False] * (places - most)
    assert admission.in_flight == most


def test_another_credential_is_admitted() -> None:
    """If several credentials use all they can get, another credential is still admitted."""
    admission = Admission(100)
    for holder in ("a", "b", "c"):
        while admission.enter(holder):
            pass
    assert admission.enter("d")


def test_released_place_is_reused() -> None:
    """A released place can be used by a credential that has less than its share."""
    admission = Admission(4)
    assert [admission.enter(holder) for holder in "aaabb"] == [True, True, False, True, False]
    admission.leave("a")
    assert [admission.enter(holder) for holder in "cc"] == [True, False]
    for holder in "abc":
        admission.leave(holder)
    assert admission.in_flight == 0
    assert admission.enter("a")


@given(st.integers(1, 20), st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=200))
def test_running_calls_never_exceed_the_places(places: int, steps: list[tuple[str, bool]]) -> None:
    """The number of running calls never exceeds the places, and equals the sum over all credentials."""
    admission = Admission(places)
    held: dict[str, int] = dict.fromkeys("abc", 0)
    for holder, enters in steps:
        if enters:
            free = places - sum(held.values())
            entered = admission.enter(holder)
            assert entered == (held[holder] < free)
            held[holder] += entered
        elif held[holder]:
            admission.leave(holder)
            held[holder] -= 1
        assert admission.in_flight == sum(held.values()) <= places


async def waiting_at(admission: Admission, holders: str) -> list[asyncio.Task[bool]]:
    """Starts calls of these credentials, which wait in this order."""
    calls = [asyncio.create_task(admission.wait(holder)) for holder in holders]
    await asyncio.sleep(0)
    assert admission.waiting == len(calls)
    return calls


async def test_released_place_goes_to_a_waiting_call() -> None:
    """A released place goes to the oldest waiting call of a credential; credentials take turns."""
    admission = Admission(4, wait_seconds=60)
    assert [admission.enter(holder) for holder in "aabb"] == [True, True, True, False]
    calls = await waiting_at(admission, "aabb")
    assert not admission.enter("a"), "no call overtakes an older one of its credential"
    admission.leave("a")
    await asyncio.sleep(0)
    assert [call.done() for call in calls] == [True, False, False, False]
    admission.leave("b")
    await asyncio.sleep(0)
    assert [call.done() for call in calls] == [True, False, True, False]
    for holder in "aab":
        admission.leave(holder)
    assert await asyncio.gather(*calls) == [True] * 4
    assert (admission.in_flight, admission.waiting, admission.refused) == (2, 0, 0)


async def test_wait_is_limited() -> None:
    """A waiting call is refused at the timeout; without a timeout or room in the queue it is refused at once."""
    for admission in (
        Admission(1, wait_seconds=0.01),
        Admission(1),
        Admission(1, wait_seconds=60, waiting_max=0),
    ):
        assert admission.enter("a")
        assert not admission.enter("b")
        async with asyncio.timeout(30):
            assert await admission.wait("b") is False
        assert (admission.in_flight, admission.waiting, admission.refused) == (1, 0, 1)
        admission.leave("a")
        assert admission.enter("b")


async def test_call_is_refused_at_once_unless_it_is_part_of_a_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call waits unless a call of its credential has waited for a tenth of the longest wait."""
    admission, loop = Admission(1, wait_seconds=60), asyncio.get_running_loop()
    assert admission.enter("a")
    started = loop.time()
    waiting = await waiting_at(admission, "b")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "time", lambda: started + 5.9)
        waiting.append(asyncio.create_task(admission.wait("b")))
        await asyncio.sleep(0)
        patch.setattr(loop, "time", lambda: started + 6.9)
        refused = asyncio.create_task(admission.wait("b"))
        waiting.append(asyncio.create_task(admission.wait("c")))
        await asyncio.sleep(0)
        assert refused.done()
        assert not refused.result()
    assert (admission.waiting, admission.refused) == (3, 1)
    # The oldest call of b gets the place. The next one has waited for too short a time to make others wait.
    admission.leave("a")
    assert await waiting[0]
    monkeypatch.setattr(loop, "time", lambda: started + 11)
    waiting.append(asyncio.create_task(admission.wait("b")))
    await asyncio.sleep(0)
    assert (admission.waiting, admission.refused) == (3, 1)
    monkeypatch.undo()
    admission.end_waiting()
    assert await asyncio.gather(*waiting) == [True, False, False, False]


async def test_cancelled_call_takes_no_place() -> None:
    """A call that is cancelled while it waits, or while it is being admitted, takes no place."""
    admission = Admission(1, wait_seconds=60)
    assert admission.enter("a")
    first, second, third = await waiting_at(admission, "bcd")
    first.cancel()
    await asyncio.wait([first])
    assert (admission.in_flight, admission.waiting) == (1, 2)
    admission.leave("a")
    # The second call has its place, but its task has not resumed yet.
    second.cancel()
    assert await third is True
    assert (second.cancelled(), admission.in_flight, admission.waiting) == (True, 1, 0)


async def test_place_skips_a_call_that_is_being_cancelled() -> None:
    """A place that is released while a waiting call is being cancelled goes to the next call, exactly once."""
    admission = Admission(4, wait_seconds=60)
    assert [admission.enter("a") for _ in range(2)] == [True, True]
    first, second = await waiting_at(admission, "aa")
    first.cancel()
    admission.leave("a")
    assert await second is True
    assert first.cancelled()
    admission.leave("a")
    admission.leave("a")
    assert (admission.in_flight, admission.waiting) == (0, 0)
    assert [admission.enter("a") for _ in range(3)] == [True, True, False]


async def test_shutdown_refuses_waiting_calls() -> None:
    """At shutdown all waiting calls are refused, and every later call without a free place."""
    admission = Admission(1, wait_seconds=60)
    assert admission.enter("a")
    calls = await waiting_at(admission, "aabb")
    admission.end_waiting()
    assert await asyncio.gather(*calls) == [False] * 4
    assert await admission.wait("c") is False
    assert (admission.in_flight, admission.waiting, admission.refused) == (1, 0, 5)
