"""Background tasks: they survive failed runs and end with their block."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from server.background import repeating
from server.ledger.errors import ServiceUnavailable


@pytest.mark.parametrize("at_once", [True, False])
async def test_failed_run_is_logged_and_repeated(at_once: bool) -> None:
    """A known error is logged with its reason, an unexpected one with a traceback; neither ends the task."""
    outcomes: list[Exception | None] = [ServiceUnavailable(), ZeroDivisionError(), None]
    succeeded = asyncio.Event()

    async def work() -> None:
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome
        succeeded.set()
        await asyncio.Event().wait()

    with capture_logs() as logs:
        async with asyncio.timeout(30), repeating(work, 0.001, "work failed", at_once=at_once):
            await succeeded.wait()
    assert [(each["event"], each["log_level"], "exc_info" in each) for each in logs] == [
        ("work failed", "warning", False),
        ("work failed", "error", True),
    ]
    assert logs[0]["reason"] == "SERVICE_UNAVAILABLE"


async def test_first_run_starts_after_the_interval_or_at_once() -> None:
    """Without `at_once` the first run starts after the first interval; with `at_once` it starts immediately."""
    runs: list[str] = []

    async def late() -> None:
        runs.append("late")

    async def soon() -> None:
        runs.append("soon")

    async with repeating(late, 3600, "failed"), repeating(soon, 3600, "failed", at_once=True):
        for _ in range(10):
            await asyncio.sleep(0)
    assert runs == ["soon"]


@pytest.mark.parametrize("error", [None, KeyError("of the block"), asyncio.CancelledError()])
async def test_run_in_flight_ends_before_the_block(error: BaseException | None) -> None:
    """When the block ends, the run is cancelled and its cleanup awaited. An exception of the block propagates."""
    started, cleaned_up = asyncio.Event(), False

    async def work() -> None:
        nonlocal cleaned_up
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(3):
                await asyncio.sleep(0)
            cleaned_up = True

    async def call() -> None:
        async with asyncio.timeout(30), repeating(work, 3600, "failed", at_once=True):
            await started.wait()
            if error is not None:
                raise error

    raised: BaseException | None = None
    try:
        await call()
    except BaseException as caught:
        raised = caught
    assert raised is error
    assert cleaned_up


async def test_cancellation_during_cleanup_reaches_the_caller() -> None:
    """A cancellation during the cleanup of a run cancels the caller."""
    cleaning, never = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        try:
            await never.wait()
        finally:
            cleaning.set()
            await never.wait()

    async def call() -> str:
        async with repeating(work, 3600, "failed", at_once=True):
            await asyncio.sleep(0)
        return "done"

    caller = asyncio.create_task(call())
    async with asyncio.timeout(30):
        await cleaning.wait()
        caller.cancel()
        await asyncio.wait([caller])
    assert caller.cancelled()
    never.set()
