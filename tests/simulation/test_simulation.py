"""Deterministic simulation: no seed violates an invariant, and planted faults are found."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from unittest.mock import patch

import pytest

from server.posting.unit import Attempt
from server.usecases.expirations import Expirations
from tests.simulation.__main__ import first_failure, lines
from tests.simulation.loop import SimulatedLoop, Stuck
from tests.simulation.planted import PLANTED

SEEDS_AT_ONCE = 25
SEEDS_TO_FIND_MAX = 40
STARTS = {"limit-ignored": 70, "lost-answer-posted-again": 170, "revoked-key-works": 230}
"""The first seed to try, for faults that take more seeds from 0."""
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("start", range(0, 200, SEEDS_AT_ONCE))
def test_invariants_hold(start: int) -> None:
    """No invariant is violated under any schedule."""
    found = first_failure(start, SEEDS_AT_ONCE)
    assert found is None, "\n".join(lines(found))


@pytest.mark.parametrize("fault", sorted(PLANTED))
def test_planted_fault_is_found(fault: str) -> None:
    """An invariant finds a planted fault."""
    with PLANTED[fault]():
        found = first_failure(STARTS.get(fault, 0), SEEDS_TO_FIND_MAX)
    assert found is not None
    assert not found.is_crash, found.problem


def test_error_is_no_violation() -> None:
    """An error that no injected fault explains ends a simulation, but does not count as found by an invariant."""
    # Prepares the initial database, which every simulation copies, without the error.
    assert first_failure(0, 1) is None
    with patch.object(Attempt, "stage_answer", lambda attempt, *_, **__: attempt.missing):
        found = first_failure(0, SEEDS_TO_FIND_MAX)
    assert found is not None
    assert found.is_crash
    assert "AttributeError" in str(found.problem)


def test_error_in_the_background_ends_a_simulation() -> None:
    """An error that only a server's log shows is found, too."""

    async def fail(_: Expirations) -> int:
        raise TypeError("planted")

    assert first_failure(0, 1) is None
    with patch.object(Expirations, "sweep", fail):
        found = first_failure(0, SEEDS_TO_FIND_MAX)
    assert found is not None
    assert found.is_crash
    assert "planted" in str(found.problem)


def test_replay_is_exact() -> None:
    """The command that a failure prints repeats it byte for byte, in another process with another hash seed."""
    fault = "other-body-replayed"
    with PLANTED[fault]():
        found = first_failure(0, SEEDS_TO_FIND_MAX)
    assert found is not None
    expected = [*lines(found, fault)]
    command = f"make simulate SEEDS=1 START={found.seed} FAULT={fault}"
    assert expected[-1] == f"repeat with: {command}"
    program = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", *command.split()[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()[-1]
    _, *arguments = program.split()
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout.splitlines() == expected


def _order(seed: int, disorder: float) -> list[int]:
    ran: list[int] = []

    async def note(number: int) -> None:
        await asyncio.sleep(0)
        ran.append(number)

    async def notes() -> None:
        await asyncio.gather(*map(note, range(20)))

    loop = SimulatedLoop(Random(seed), disorder=disorder, step_microseconds=1)
    loop.run_until_complete(notes())
    loop.close()
    return ran


def test_order() -> None:
    """The seed decides the order of ready callbacks; without disorder it is that of their arrival."""
    assert _order(1, 1.0) == _order(1, 1.0) != _order(2, 1.0)
    assert _order(1, 0.0) == list(range(20))


def test_time() -> None:
    """A sleep takes virtual time only, and timeouts come in their order."""
    loop = SimulatedLoop(Random(1), disorder=1.0, step_microseconds=0)

    async def sleep() -> float:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.sleep(3600), 1800)
        await asyncio.sleep(86400)
        return loop.time()

    assert loop.run_until_complete(sleep()) == 1800 + 86400
    loop.close()


def test_endless_wait_is_an_error() -> None:
    """A wait that nothing ends is an error."""
    loop = SimulatedLoop(Random(1), disorder=0.0, step_microseconds=0)

    async def wait() -> None:
        await loop.create_future()

    with pytest.raises(Stuck, match="nothing is left"):
        loop.run_until_complete(wait())
    loop.close()
