"""The data loader: the batches of calls and their results."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping

import pytest

from server.store import data_loader
from server.store.data_loader import DataLoader


class Reads:
    """A database whose reads are answered by the test."""

    def __init__(self) -> None:
        self.begun: list[tuple[Collection[int], asyncio.Future[Mapping[int, str]]]] = []

    async def __call__(self, keys: Collection[int]) -> Mapping[int, str]:
        """Waits for the answer."""
        answer: asyncio.Future[Mapping[int, str]] = asyncio.get_running_loop().create_future()
        self.begun.append((keys, answer))
        return await answer

    def answer(self, values: str) -> None:
        """Answers the newest read: the value of key n is the letter n times."""
        keys, answer = self.begun[-1]
        answer.set_result({key: values * key for key in keys})


async def rounds(condition: Callable[[], bool]) -> None:
    """Runs the ready tasks until the condition holds."""
    for _ in range(100):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("the condition never holds")


async def begun(reads: Reads, count: int) -> None:
    """Waits until `count` reads have begun, and asserts that no further one begins."""
    await rounds(lambda: len(reads.begun) == count)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(reads.begun) == count


async def test_a_caller_never_receives_a_value_read_before_it_asked() -> None:
    """Calls that arrive during a read share the next one, which begins after its end."""
    reads = Reads()
    load = DataLoader(reads)
    early = asyncio.create_task(load(1))
    await begun(reads, 1)
    late = [asyncio.create_task(load(key)) for key in (1, 2, 2, 3)]
    await asyncio.sleep(0)
    # A cancelled call does not affect the others.
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


async def test_a_failed_read_affects_its_batch_only() -> None:
    """The error of a read reaches each call of its batch, and a missing key only its own call."""
    reads = Reads()
    load = DataLoader(reads)
    calls = [asyncio.create_task(load(key)) for key in (1, 2)]
    await begun(reads, 1)
    reads.begun[0][1].set_exception(ConnectionError("lost"))
    assert [str(each) for each in await asyncio.gather(*calls, return_exceptions=True)] == ["lost", "lost"]
    calls = [asyncio.create_task(load(key)) for key in (1, 2)]
    await begun(reads, 2)
    reads.begun[1][1].set_result({2: "b"})
    nothing, value = await asyncio.gather(*calls, return_exceptions=True)
    assert (type(nothing), value) == (KeyError, "b")


async def test_a_hanging_read_delays_others_for_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a read hangs, each later batch begins after at most WAIT_SECONDS_MAX."""
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
