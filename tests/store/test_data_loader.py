"""The data loader: which calls share a batch, and what each of them receives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping

import pytest

from server.store import data_loader
from server.store.data_loader import DataLoader


class Reads:
    """A database whose every read is answered when the test says so."""

    def __init__(self) -> None:
        self.begun: list[tuple[Collection[int], asyncio.Future[Mapping[int, str]]]] = []

    async def __call__(self, keys: Collection[int]) -> Mapping[int, str]:
        """Waits for the answer."""
        answer: asyncio.Future[Mapping[int, str]] = asyncio.get_running_loop().create_future()
        self.begun.append((keys, answer))
        return await answer

    def answer(self, values: str) -> None:
        """Answers the newest read: each key with as many of the letter."""
        keys, answer = self.begun[-1]
        answer.set_result({key: values * key for key in keys})


async def rounds(condition: Callable[[], bool]) -> None:
    """Gives every ready task a turn until the condition holds."""
    for _ in range(100):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("the condition never holds")


async def begun(reads: Reads, count: int) -> None:
    """Waits until this many reads have begun, and checks that no further one begins."""
    await rounds(lambda: len(reads.begun) == count)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(reads.begun) == count


async def test_a_caller_never_receives_a_value_read_before_it_asked() -> None:
    """Calls that arrive during a read share the next one, which begins when that one has ended."""
    reads = Reads()
    load = DataLoader(reads)
    early = asyncio.create_task(load(1))
    await begun(reads, 1)
    late = [asyncio.create_task(load(key)) for key in (1, 2, 2, 3)]
    await asyncio.sleep(0)
    # A cancelled call takes nothing from the others.
    late.pop().cancel()
    await begun(reads, 1)
    reads.answer("a")
    assert await early == "a"
    await begun(reads, 2)
    assert sorted(reads.begun[1][0]) == [1, 2, 3]
    reads.answer("b")
    assert await asyncio.gather(*late) == ["b", "bb", "bb"]
    last = asyncio.create_task(load(1))
    await begun(reads, 3)
    reads.answer("c")
    assert await last == "c"


async def test_a_read_that_fails() -> None:
    """Its error reaches each call of its batch, a missing key only its own call; the next batch is unaffected."""
    reads = Reads()
    load = DataLoader(reads)
    calls = [asyncio.create_task(load(key)) for key in (1, 2)]
    await begun(reads, 1)
    reads.begun[0][1].set_exception(ConnectionError("away"))
    assert [str(each) for each in await asyncio.gather(*calls, return_exceptions=True)] == ["away", "away"]
    calls = [asyncio.create_task(load(key)) for key in (1, 2)]
    await begun(reads, 2)
    reads.begun[1][1].set_result({2: "b"})
    nothing, value = await asyncio.gather(*calls, return_exceptions=True)
    assert (type(nothing), value) == (KeyError, "b")


async def test_a_read_that_hangs_delays_others_for_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """After WAIT_SECONDS_MAX the next batch begins, and so does each later one."""
    monkeypatch.setattr(data_loader, "WAIT_SECONDS_MAX", 0)
    reads = Reads()
    load = DataLoader(reads)
    hanging = asyncio.create_task(load(1))
    await begun(reads, 1)
    for count, values in ((2, "b"), (3, "c")):
        next_one = asyncio.create_task(load(2))
        await begun(reads, count)
        reads.answer(values)
        assert await next_one == values * 2
    assert not hanging.done()
    reads.begun[0][1].set_result({1: "a"})
    assert await hanging == "a"
