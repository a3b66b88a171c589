"""Calls with the same bound: who is cancelled, when, and who isn't."""

from __future__ import annotations

import asyncio

from server.transport.deadlines import Deadlines

SECONDS = 0.02


async def work_for_ever(deadlines: Deadlines, ended: list[str], name: str) -> None:
    """Something that ends only when it is cancelled."""
    work = asyncio.current_task()
    assert work is not None
    deadlines.begin(work)
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        assert deadlines.end(work)
        ended.append(name)
        raise


async def test_each_is_cancelled_at_its_end() -> None:
    """Tasks that begin one after another are cancelled in that order, none before its time."""
    deadlines, ended, loop = Deadlines(SECONDS), list[str](), asyncio.get_running_loop()

    async def seconds_of(name: str) -> float:
        began = loop.time()
        await asyncio.wait([asyncio.create_task(work_for_ever(deadlines, ended, name))])
        return loop.time() - began

    tasks = []
    for name in ("first", "second", "third"):
        tasks.append(asyncio.create_task(seconds_of(name)))
        await asyncio.sleep(SECONDS / 4)
    # Timers are as exact as the clock of the loop.
    assert min(await asyncio.gather(*tasks)) >= SECONDS - 0.001
    assert ended == ["first", "second", "third"]
    assert not deadlines._cancelled, "who is done is forgotten"


async def test_who_is_done_is_left_alone() -> None:
    """A task that ends in time is not kept, and one that begins later has all of its time."""
    deadlines, ended = Deadlines(SECONDS), list[str]()

    async def quick() -> None:
        work = asyncio.current_task()
        assert work is not None
        deadlines.begin(work)
        assert not deadlines.end(work)

    for _ in range(3):
        task = asyncio.create_task(quick())
        await task
        assert not deadlines._ends
        await asyncio.sleep(SECONDS)
        assert not task.cancelled()
    task = asyncio.create_task(work_for_ever(deadlines, ended, "late"))
    await asyncio.wait([task])
    assert ended == ["late"]


async def test_cancelled_by_another() -> None:
    """A task that somebody else cancels is not said to have ended here."""
    deadlines = Deadlines(60)

    async def work() -> bool:
        task = asyncio.current_task()
        assert task is not None
        deadlines.begin(task)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return deadlines.end(task)
        return True

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    assert await task is False


async def test_begun_anew() -> None:
    """Whoever begins anew has all of the time again, and is behind those that began in between."""
    deadlines, ended = Deadlines(SECONDS), list[str]()
    tasks = [asyncio.create_task(work_for_ever(deadlines, ended, name)) for name in ("first", "second")]
    await asyncio.sleep(SECONDS / 2)
    deadlines.restart(tasks[0])
    await asyncio.wait(tasks)
    assert ended == ["second", "first"]
    # It does not begin by this.
    deadlines.restart(tasks[0])
    assert not deadlines._ends
