"""Reads that are asked together: who is told what, and who waits for whom."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping

import pytest

from server.store import gathering
from server.store.gathering import Gathered


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
        """Answers the read that was begun last: each key with as many of the letter."""
        keys, answer = self.begun[-1]
        answer.set_result({key: values * key for key in keys})


async def rounds(condition: Callable[[], bool]) -> None:
    """Lets everybody who is ready have a turn until the condition holds."""
    for _ in range(100):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never comes about")


async def begun(reads: Reads, count: int) -> None:
    """Waits until so many reads were begun, and no other one after them."""
    await rounds(lambda: len(reads.begun) == count)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(reads.begun) == count


@pytest.fixture(autouse=True)
def no_company(monkeypatch: pytest.MonkeyPatch) -> None:
    """No read waits for others; the tests of that set how long."""
    monkeypatch.setattr(gathering, "COMPANY_SECONDS", 0)


async def test_nobody_is_told_what_was_read_before_they_came() -> None:
    """Who comes while something is being read shares the next read, which begins when that one has ended."""
    reads = Reads()
    gathered = Gathered(reads)
    early = asyncio.create_task(gathered(1))
    await begun(reads, 1)
    late = [asyncio.create_task(gathered(key)) for key in (1, 2, 2, 3)]
    await asyncio.sleep(0)
    # Who goes away takes nothing from the others.
    late.pop().cancel()
    await begun(reads, 1)
    reads.answer("a")
    assert await early == "a"
    await begun(reads, 2)
    assert sorted(reads.begun[1][0]) == [1, 2, 3]
    reads.answer("b")
    assert await asyncio.gather(*late) == ["b", "bb", "bb"]
    last = asyncio.create_task(gathered(1))
    await begun(reads, 3)
    reads.answer("c")
    assert await last == "c"


async def test_a_read_waits_for_others_where_the_one_before_was_for_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """For COMPANY_SECONDS, and for all who come until then; who asks alone doesn't wait."""
    monkeypatch.setattr(gathering, "COMPANY_SECONDS", 3600)
    reads = Reads()
    gathered = Gathered(reads)
    for count in range(1, 4):
        alone = asyncio.create_task(gathered(1))
        await begun(reads, count)
        reads.answer("a")
        assert await alone == "a"
    several = [asyncio.create_task(gathered(key)) for key in (1, 2)]
    await begun(reads, 4)
    reads.answer("b")
    assert await asyncio.gather(*several) == ["b", "bb"]
    late = []
    for key in (1, 2, 3):
        late.append(asyncio.create_task(gathered(key)))
        await begun(reads, 4)
    loop = asyncio.get_running_loop()
    later = loop.time() + 3600
    monkeypatch.setattr(loop, "time", lambda: later)
    await begun(reads, 5)
    assert sorted(reads.begun[4][0]) == [1, 2, 3]
    reads.answer("c")
    assert await asyncio.gather(*late) == ["c", "cc", "ccc"]


async def test_a_read_that_fails() -> None:
    """All who shared it are told, a key without a value by itself, and the next read is another one."""
    reads = Reads()
    gathered = Gathered(reads)
    calls = [asyncio.create_task(gathered(key)) for key in (1, 2)]
    await begun(reads, 1)
    reads.begun[0][1].set_exception(ConnectionError("away"))
    assert [str(each) for each in await asyncio.gather(*calls, return_exceptions=True)] == ["away", "away"]
    calls = [asyncio.create_task(gathered(key)) for key in (1, 2)]
    await begun(reads, 2)
    reads.begun[1][1].set_result({2: "b"})
    nothing, value = await asyncio.gather(*calls, return_exceptions=True)
    assert (type(nothing), value) == (KeyError, "b")


async def test_a_read_that_hangs_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """For longer than GATHERED_SECONDS_MAX: then there is another read, for who waited and for who comes next."""
    monkeypatch.setattr(gathering, "GATHERED_SECONDS_MAX", 0)
    reads = Reads()
    gathered = Gathered(reads)
    hanging = asyncio.create_task(gathered(1))
    await begun(reads, 1)
    for count, values in ((2, "b"), (3, "c")):
        next_one = asyncio.create_task(gathered(2))
        await begun(reads, count)
        reads.answer(values)
        assert await next_one == values * 2
    assert not hanging.done()
    reads.begun[0][1].set_result({1: "a"})
    assert await hanging == "a"
