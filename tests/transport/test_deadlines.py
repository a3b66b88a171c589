"""Deadlines: tasks are cancelled at the end of a common time limit."""

from __future__ import annotations

import asyncio

from server.transport.deadlines import Deadlines

SECONDS = 0.02


async def work_for_ever(deadlines: Deadlines, ended: list[str], name: str) -> None:
    """Waits until it is cancelled at its deadline."""
    work = asyncio.current_task()
    assert work is not None
    deadlines.begin(work)
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        assert deadlines.end(work)
        ended.append(name)
        raise


async def test_tasks_are_cancelled_at_their_deadlines() -> None:
    """Tasks are cancelled in the order of their start, and none before its deadline."""
    deadlines, ended, loop = Deadlines(SECONDS), list[str](), asyncio.get_running_loop()

    async def seconds_of(name: str) -> float:
        began = loop.time()
        await asyncio.wait([asyncio.create_task(work_for_ever(deadlines, ended, name))])
        return loop.time() - began

    tasks = []
    for name in ("first", "second", "third"):
        tasks.append(asyncio.create_task(seconds_of(name)))
        await asyncio.sleep(SECONDS / 4)
    # Timers have the resolution of the loop's clock.
    assert min(await asyncio.gather(*tasks)) >= SECONDS - 0.001
    assert ended == ["first", "second", "third"]
    assert not deadlines._cancelled, "finished tasks are forgotten"


async def test_finished_task_is_not_cancelled() -> None:
    """A task that ends in time is forgotten, and a later task gets its full time."""
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


async def test_cancellation_by_another_is_distinguished() -> None:
    """`end` returns False for a task that was not cancelled at its deadline."""
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


async def test_restarted_task_gets_its_full_time() -> None:
    """A restarted task gets its full time again, and ends after tasks that started in between."""
    deadlines, ended = Deadlines(SECONDS), list[str]()
    tasks = [asyncio.create_task(work_for_ever(deadlines, ended, name)) for name in ("first", "second")]
    await asyncio.sleep(SECONDS / 2)
    deadlines.restart(tasks[0])
    await asyncio.wait(tasks)
    assert ended == ["second", "first"]
    # A restart does not start a finished task.
    deadlines.restart(tasks[0])
    assert not deadlines._ends
