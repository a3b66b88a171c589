"""The clock for postings and reads; its reference is the past, or on PostgreSQL the database's clock."""

from __future__ import annotations

from itertools import count

import pytest
from structlog.testing import capture_logs

from server.book import Book, system_clock
from server.ledger.errors import ClockSkewed, ServiceUnavailable
from server.ledger.instants import SECOND, Instant
from server.store.database import Database
from server.store.posting_clock import SETTLE_SECONDS, PostingClock, boot_stopwatch
from tests.support.clock import NOON
from tests.support.markers import only_postgresql, only_sqlite

DAY_SECONDS = 24 * 3600
SKEW_MAX = 5 * SECOND


class Machine:
    """A machine whose clock and stopwatch stand still until a test advances them."""

    def __init__(self, database: Database) -> None:
        self.wall: Instant = NOON
        self.elapsed: Instant = 0
        self.clock = PostingClock(database, lambda: self.wall, lambda: 1000 * self.elapsed, SKEW_MAX)

    def run(self, seconds: float) -> None:
        """Advances clock and stopwatch by the same time."""
        self.wall += round(seconds * SECOND)
        self.elapsed += round(seconds * SECOND)

    def set(self, seconds: float) -> None:
        """Sets the clock forward, or back."""
        self.wall += round(seconds * SECOND)


@pytest.fixture
def machine(book: Book) -> Machine:
    """A machine whose clock was right at the start."""
    return Machine(book.database)


@only_sqlite
@pytest.mark.parametrize("jump", [5, -5, 0.5, 0])
async def test_a_small_step_is_accepted(machine: Machine, jump: float) -> None:
    """A clock that deviates by at most the bound is right, and returns its own time."""
    machine.run(100)
    machine.set(jump)
    assert machine.clock() == machine.clock.time_of_reads() == machine.wall
    assert machine.clock.is_right


@only_sqlite
@pytest.mark.parametrize("jump", [5.000001, -5.000001, 2 * DAY_SECONDS, -2 * DAY_SECONDS])
async def test_a_jump_is_refused_at_once(machine: Machine, jump: float) -> None:
    """A clock that jumps by more than the bound is refused before the next check, until it is set back."""
    await machine.clock.check()
    machine.set(jump)
    with pytest.raises(ClockSkewed) as refusal:
        machine.clock()
    assert (machine.clock.is_right, machine.clock.skew) == (False, round(jump * SECOND))
    side = "ahead of" if jump > 0 else "behind"
    assert f"is {abs(jump):.1f} s {side} its reference" in refusal.value.message
    machine.run(30)
    await machine.clock.check()
    assert machine.clock.time_of_reads() == NOON + 30 * SECOND + min(0, round(jump * SECOND))
    machine.set(-jump)
    assert machine.clock() == machine.wall == NOON + 30 * SECOND


@only_sqlite
async def test_small_steps_do_not_add_up(machine: Machine) -> None:
    """A clock that is slewed by a second at each check, an hour in total, is right throughout."""
    for _ in range(3600):
        machine.run(2)
        machine.set(1)
        assert machine.clock() == machine.wall
        await machine.clock.check()
    assert machine.clock.skew == 0


@only_sqlite
async def test_an_even_clock_after_a_jump_becomes_the_reference(machine: Machine) -> None:
    """A clock that runs evenly after a jump becomes the reference after exactly a minute."""
    machine.set(-DAY_SECONDS)
    await machine.clock.check()
    machine.run(SETTLE_SECONDS - 0.000001)
    await machine.clock.check()
    assert not machine.clock.is_right
    machine.run(0.000001)
    await machine.clock.check()
    assert (machine.clock(), machine.clock.skew) == (machine.wall, 0)


@only_sqlite
async def test_a_wrong_clock_is_logged(machine: Machine) -> None:
    """The log has one line with the skew when the clock becomes wrong, and one when it is right again."""
    with capture_logs() as logs:
        for step in (0, -6, -0.5, 6.5, 0, 7):
            machine.set(step)
            machine.run(2)
            await machine.clock.check()
            await machine.clock.check()
        machine.run(SETTLE_SECONDS)
        await machine.clock.check()
    assert [(line["log_level"], line.get("skew_seconds")) for line in logs] == [
        ("error", -6.0),
        ("info", None),
        ("error", 7.0),
        # The clock became the reference, and is therefore right.
        ("warning", 7.0),
        ("info", None),
    ]


@only_sqlite
async def test_each_jump_restarts_the_minute(machine: Machine) -> None:
    """A clock that jumps again within the minute stays refused."""
    for _ in range(10):
        machine.set(DAY_SECONDS)
        await machine.clock.check()
        machine.run(SETTLE_SECONDS - 1)
        await machine.clock.check()
        assert not machine.clock.is_right
    machine.set(-10 * DAY_SECONDS)
    assert machine.clock() == machine.wall


@only_postgresql
@pytest.mark.parametrize("offset_seconds", [2 * DAY_SECONDS, -2 * DAY_SECONDS, 6, -6])
async def test_a_clock_that_is_wrong_at_the_start_is_refused(book: Book, offset_seconds: int) -> None:
    """PostgreSQL's clock is the reference, even for a process whose clock is wrong at its start."""
    offset = offset_seconds * SECOND
    clock = PostingClock(book.database, lambda: system_clock() + offset, boot_stopwatch, SKEW_MAX)
    await clock.check()
    assert abs(clock.skew - offset) < SECOND / 2
    with pytest.raises(ClockSkewed):
        clock()
    assert abs(clock.time_of_reads() - system_clock() - min(0, offset)) < SECOND
    # On PostgreSQL a wrong clock never becomes the reference.
    await clock.check()
    assert not clock.is_right
    offset = 0
    assert abs(clock() - system_clock()) < SECOND


@only_postgresql
async def test_a_slow_answer_is_ignored(book: Book) -> None:
    """A time of the database from a round trip longer than the bound does not change the reference."""
    readings = count(0, 6_000_000_000)
    clock = PostingClock(book.database, lambda: NOON, lambda: next(readings), SKEW_MAX)
    await clock.check()
    assert abs(clock.skew) < 60 * SECOND, "the database's time is years away from NOON"
    with pytest.raises(ServiceUnavailable):
        clock()


async def test_nothing_is_posted_before_the_first_answer() -> None:
    """Nothing is posted until the database's clock has been read once."""
    database = Database("postgresql+asyncpg://user@127.0.0.1:1/none")
    clock = PostingClock(database, lambda: NOON, lambda: 0, SKEW_MAX)
    try:
        await clock.check()
        with pytest.raises(ServiceUnavailable):
            clock()
        assert not clock.is_right
        assert clock.time_of_reads() == NOON
    finally:
        await database.close()


@only_postgresql
async def test_the_reference_continues_without_the_database(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference continues by the stopwatch while the database is unavailable."""
    wall, elapsed = system_clock(), 0
    clock = PostingClock(book.database, lambda: wall, lambda: 1000 * elapsed, SKEW_MAX)
    await clock.check()
    assert clock() == wall
    unavailable = Database("postgresql+asyncpg://user@127.0.0.1:1/none")
    monkeypatch.setattr(clock, "_database", unavailable)
    try:
        wall, elapsed = wall + 9 * SECOND, 9 * SECOND
        await clock.check()
        assert clock() == wall
        wall += DAY_SECONDS * SECOND
        await clock.check()
        assert not clock.is_right
    finally:
        await unavailable.close()


def test_the_stopwatch_counts_nanoseconds() -> None:
    """The stopwatch increases, and its unit is nanoseconds."""
    first = boot_stopwatch()
    started = system_clock()
    while system_clock() < started + 2000:
        pass
    assert 1_000_000 < boot_stopwatch() - first < 60_000_000_000
